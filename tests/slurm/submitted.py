"""Runs submitted to the cluster as a user submits them, and what is to be seen of them from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster import NODES, Cluster

from tldist.tracking.runlog import parse

LIMIT_S = 900.0
"""For whatever takes half a minute on two idle cores."""

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

ROOT = Path(__file__).parents[2]


class Submitted:
    """One run directory and its job."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.run_dir = cluster, cluster.shared / "runs" / name

    def submit(self, *words: str) -> Submitted:
        """`tldist submit folder ...`; what it printed is in `said`."""
        flags = f"""--nodes 2 --cpus-per-node 1 --model.weights none --strategy.name partial --data.image-size 32
            --data.batch-size 8 --train.epochs 3 --checkpoint.steps 2 --tracking.log-every 1 --tracking.wandb offline
            --data.root {self.cluster.shared}/photos --run-dir {self.run_dir}"""
        self.said = self.tldist("submit", "folder", *flags.split(), *words)
        return self

    def tldist(self, *words: str, check: bool = True) -> str:
        """What one of our commands prints."""
        return self.cluster.run(sys.executable, "-m", "tldist_launcher.cli", *words, check=check, seconds=LIMIT_S)

    def follow(self) -> subprocess.Popen[str]:
        """`tldist logs RUN --follow`, while it runs."""
        words = [sys.executable, "-m", "tldist_launcher.cli", "logs", str(self.run_dir), "--follow"]
        return subprocess.Popen(words, env=self.cluster.environment, stdout=subprocess.PIPE, text=True)

    @cached_property
    def number(self) -> str:
        """Of the job."""
        return json.loads((self.run_dir / "submit.json").read_text())["job"]

    @property
    def state(self) -> str:
        """As Slurm calls it."""
        return self.cluster.job(self.number)["JobState"]

    @property
    def restarts(self) -> int:
        """As Slurm counts them."""
        return int(self.cluster.job(self.number)["Restarts"])

    def rows(self, event: str) -> list[dict[str, Any]]:
        """Of metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        rows = [parse(line) for line in path.read_bytes().splitlines()] if path.exists() else []
        return [row for row in rows if row is not None and row["event"] == event]

    def until_step(self, step: int) -> None:
        """Wait until so many steps were logged."""

        def is_there() -> bool:
            assert self.state not in ENDED, self.log()
            return any(row["step"] >= step for row in self.rows("train"))

        self.until(is_there, f"step {step}")

    @contextlib.contextmanager
    def held(self, step: int) -> Iterator[None]:
        """From this step on the worker of n1 stands still while the block runs, and so the other one waits."""
        self.until_step(step)
        workers = self.cluster.processes("n1", "RayTrainWorker")
        assert workers
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def until_asked_to_save(self) -> None:
        """Slurm's notice has reached the run."""
        self.until(lambda: any((self.run_dir / "logs").glob("stop.*")), "the signal to save")

    def until(self, condition: Any, what: str) -> float:
        """Wait for it; returns the seconds that took."""
        try:
            return self.cluster.until(condition, LIMIT_S, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None

    def until_over(self) -> str:
        """Wait for the job's end, and return its state."""
        self.until(lambda: self.state in ENDED, "the job's end")
        return self.state

    def log(self) -> str:
        """What its jobs printed."""
        return "".join(path.read_text() for path in sorted((self.run_dir / "logs").glob("slurm-*.log")))

    def weights(self) -> bytes:
        """Of the last checkpoint."""
        return (self.run_dir / "checkpoints" / "last" / "model.safetensors").read_bytes()

    def summary(self) -> dict[str, Any]:
        """What the run came to."""
        return json.loads((self.run_dir / "summary.json").read_text())

    def hosts(self) -> list[str]:
        """Of the workers, by rank."""
        signs = sorted((self.run_dir / "logs" / "workers").glob("rank-*.json"))
        return [json.loads(path.read_text())["host"] for path in signs]

    def left(self) -> list[str]:
        """Processes of jobs on either node: all but Slurm's own and the node's first."""
        own = ("unshare ", "bash -c hostname", "slurmd ", "sleep inf")
        return [title for name in NODES for title in self.cluster.processes(name).values() if not title.startswith(own)]

    def until_clean(self, seconds: float) -> float:
        """Wait until nothing of a job is left on either node; returns how long that took."""
        began = time.monotonic()
        while left := self.left():
            waited = time.monotonic() - began
            assert waited < seconds, f"left after {waited:.1f} s: {[title[:80] for title in left]}"
            time.sleep(0.05)
        return time.monotonic() - began
