"""What a run tells Weights & Biases besides the rows of `metrics.jsonl`: what it is, its pictures, its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tldist import config, dist
from tldist.data.source.index import Index
from tldist.engine import engine_kind
from tldist.tracking.wandb import Mirrored, NodeMonitor, WandbSink, new_id
from tldist.train.run import Run


def open_wandb(parts: Run) -> tuple[WandbSink | None, NodeMonitor | None]:
    """Rank 0's W&B mirror of this run, if it is wanted, and what watches another node, on its first worker."""
    nodes, sink = dist.nodes(), None
    if dist.is_main():
        told = mirrored(parts, wandb_run_id(parts.run_dir), nodes=len(set(nodes)))
        sink = WandbSink.open(parts.config.tracking.wandb, told, lambda text: parts.log.write("notice", text=text))
    if len(set(nodes)) == 1:
        return sink, None
    shared_id = dist.from_main(sink.run_id if sink is not None and sink.mode == "shared" else None)
    is_first = nodes.index(nodes[dist.rank()]) == dist.rank()
    joins = shared_id and is_first and not dist.is_main()
    return sink, NodeMonitor(mirrored(parts, shared_id, len(set(nodes)))) if joins else None


def mirrored(parts: Run, run_id: str, nodes: int) -> Mirrored:
    """What W&B is told of this run."""
    settings = parts.config
    engine = engine_kind(settings.engine, dist.world_size())
    return Mirrored(
        parts.run_dir,
        run_id,
        settings.tracking.project,
        parts.run_dir.name,
        config.to_dict(settings),
        (settings.recipe, settings.strategy.name, settings.model.name, engine),
        settings.tracking.group or None,
        nodes,
        dist.node(),
    )


def wandb_run_id(run_dir: Path) -> str:
    """The id under which an earlier process of this run wrote to W&B, or one that stays from now on."""
    path = run_dir / "logs" / "wandb_run_id"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(new_id())
    return path.read_text().strip()


def predictions_event(index: Index, shown: dict[str, Any], step: int) -> dict[str, Any]:
    """What W&B draws: whole paths, and classes by name."""
    samples = [
        {
            **sample,
            "path": str(Path(index.root) / sample["path"]),
            "label": index.classes[sample["label"]],
            "predicted": index.classes[sample["predicted"]],
        }
        for sample in shown["samples"]
    ]
    return {"event": "predictions", **shown, "samples": samples, "step": step}


def weights_events(parts: Run) -> list[dict[str, Any]]:
    """The best and the last weights, for W&B to keep, where they are small enough."""
    folders: dict[Path, list[str]] = {}
    for name in ("last", "best"):
        if (parts.saver.folder / name / "model.safetensors").exists():
            folders.setdefault((parts.saver.folder / name).resolve(), []).append(name)
    limit, events = parts.config.tracking.upload_mib, []
    for folder, aliases in folders.items():
        size = (folder / "model.safetensors").stat().st_size / 2**20
        if size <= limit:
            paths = [str(folder / file) for file in ("model.safetensors", "state.json")]
            events.append({"event": "files", "name": "model", "paths": paths, "aliases": aliases})
        elif limit:
            named = f"W&B: the weights of {' and '.join(aliases)}, {size:.0f} MiB, stay here"
            parts.log.write("notice", text=f"{named} (--tracking.upload-mib {limit})")
    return events


def error_event(error: BaseException) -> dict[str, Any]:
    """The row of what ended a run."""
    row = {"event": "error", "text": str(error), "kind": type(error).__name__}
    return row | {"lost_peer": True} if dist.is_lost_peer(error) else row
