"""The machines of the Ray cluster at RAY_ADDRESS, for benches that measure several."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tldist.config import UserError
from tldist_launcher.start.ray import _has_token


@contextmanager
def on_ray(join: str) -> Iterator[int]:
    """One task on each node, which has all of its cores and GPUs, starts workers there until the bench ends."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads its settings when it is imported
    if _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from tldist_benchmarks import workers

    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise UserError(f"cannot reach the Ray cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']}: {error}") from error
    try:
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        if not nodes:
            raise UserError("no node of the Ray cluster has a CPU to give: wait until it is free")
        serve: Any = ray.remote(max_retries=0)(workers.serve)
        tasks = []
        for node in nodes:
            has, place = node["Resources"], NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            whole = serve.options(num_cpus=has["CPU"], num_gpus=has.get("GPU", 0), scheduling_strategy=place)
            tasks.append(whole.remote(join))
        yield len(nodes)
        ray.wait(tasks, num_returns=len(tasks), timeout=15)  # they end their workers
    finally:
        ray.shutdown()
