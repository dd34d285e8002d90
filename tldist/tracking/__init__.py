"""Who watches a run: metrics.jsonl is the source of truth, the console and W&B are mirrors of it."""
