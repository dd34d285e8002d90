"""A run as the harness sees it: its command, its folder, and what its workers were seen doing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from nodes import end_cleaners, environment, is_alive, marked, works_for_a_run

from tldist.tracking.runlog import parse

BATCH = 16
SAVE_EVERY = 3
"""Steps between two checkpoints inside an epoch."""
RUN_LIMIT_S = 300.0
_STEP = re.compile(rb'"step": (\d+)')


@dataclass(frozen=True)
class Bench:
    """What all trials share: real photos, source weights, where runs go, the cluster, how long a run is."""

    data: Path
    weights: str
    folder: Path
    address: str
    epochs: int = 6
    images_per_class: int = 60

    @property
    def observed(self) -> Path:
        """Where the workers' notes go: not into the run directory, whose disk may be full."""
        return self.folder / "observed"

    @property
    def environment(self) -> dict[str, str]:
        """Of every process of a run."""
        return {**environment(self.observed), "RAY_ADDRESS": self.address}

    def run(self, name: str, disk: Path | None = None, **changes: Any) -> Run:
        """A run that is yet to start, in a folder of its own."""
        return Run(replace(self, **changes), (disk or self.folder) / name)

    def words(self) -> list[str]:
        """Everything that moves does so here: phases, BatchNorm statistics, an average, mixed images."""
        flags = f"""--strategy.name gradual --train.epochs {self.epochs} --train.precision fp32 --train.ema 0.9
            --data.image-size 48 --data.batch-size {BATCH} --data.mixup 0.4 --data.cutmix 1.0 --optim.schedule onecycle
            --data.train-images-per-class {self.images_per_class} --checkpoint.steps {SAVE_EVERY} --checkpoint.keep 2
            --data.on-bad-image skip --tracking.wandb disabled --tracking.log-every 1"""
        return [*flags.split(), "--data.root", str(self.data), "--model.weights", self.weights]


@dataclass
class Seen:
    """A worker's notes of one run, in order of time."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    saves: list[dict[str, Any]] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Steps done, at most, so far."""
        return max((step["step"] + 1 for step in self.steps), default=0)

    @property
    def pids(self) -> set[int]:
        """Of the workers."""
        return {note["pid"] for note in (*self.steps, *self.saves)}

    def until(self, at: float) -> Seen:
        """What had been seen by then."""
        return Seen(*([note for note in notes if note["at"] <= at] for notes in (self.steps, self.saves)))

    def since(self, at: float) -> Seen:
        """What was seen later."""
        return Seen(*([note for note in notes if note["at"] > at] for notes in (self.steps, self.saves)))


class Run:
    """One run directory and the commands that work on it."""

    def __init__(self, bench: Bench, run_dir: Path) -> None:
        self.bench, self.run_dir = bench, run_dir
        self.process: subprocess.Popen[bytes] | None = None
        self.mark = f"TLDIST_FAULTS={run_dir}"

    def start(self, workers: str = "2") -> Run:
        """`tldist train folder ...`."""
        self.run_dir.parent.mkdir(parents=True, exist_ok=True)
        return self._start(["folder", "--run-dir", str(self.run_dir), "--launch.workers", workers, *self.bench.words()])

    def resume(self) -> Run:
        """`tldist train --resume RUN_DIR`."""
        return self._start(["--resume", str(self.run_dir)])

    def _start(self, words: Sequence[str]) -> Run:
        command = [sys.executable, "-m", "tldist_launcher.cli", "train", *words]
        self.bench.observed.mkdir(parents=True, exist_ok=True)
        marked_environment = {**self.bench.environment, "TLDIST_FAULTS": str(self.run_dir)}
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=marked_environment)
        return self

    @property
    def output(self) -> Path:
        """What the commands printed."""
        return self.bench.observed / f"{self.run_dir.name}.txt"

    @property
    def said(self) -> str:
        """The same, as text."""
        return self.output.read_text() if self.output.exists() else ""

    def wait(self, seconds: float = RUN_LIMIT_S) -> int:
        """The exit code. A command that outlasts `seconds` is killed, and has none: TimeoutExpired."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            raise

    def signal(self, number: signal.Signals) -> None:
        """To the command."""
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()

    @property
    def is_over(self) -> bool:
        """Has the command ended?"""
        return self.process is not None and self.process.poll() is not None

    def until(self, condition: Callable[[], bool], seconds: float = RUN_LIMIT_S) -> bool:
        """Wait for it to become true; False where the command ended, or the time was up, before it did."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.is_over or time.monotonic() > deadline:
                return condition()
            time.sleep(0.01)
        return True

    def seen(self) -> Seen:
        """What the workers noted so far."""
        notes: list[dict[str, Any]] = []
        for path in (self.bench.observed / self.run_dir.name).glob("*.jsonl"):
            notes += [row for line in path.read_bytes().splitlines() if (row := parse(line)) is not None]
        notes.sort(key=lambda note: note["at"])
        return Seen([n for n in notes if n["what"] == "step"], [n for n in notes if n["what"] != "step"])

    def done(self) -> int:
        """As `seen().done`, for a loop that asks often."""
        folder = self.bench.observed / self.run_dir.name
        steps = (step for path in folder.glob("*.jsonl") for step in _STEP.findall(path.read_bytes()))
        return max((int(step) + 1 for step in steps), default=0)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.run_dir / "checkpoints"

    def names(self) -> list[str]:
        """Of the checkpoints, oldest first."""
        return sorted(path.name for path in self.checkpoints.glob("epoch-*"))

    def rows(self, event: str) -> list[dict[str, Any]]:
        """Of metrics.jsonl."""
        path = self.run_dir / "metrics.jsonl"
        rows = [parse(line) for line in path.read_bytes().splitlines()] if path.exists() else []
        return [row for row in rows if row is not None and row["event"] == event]

    def notices(self) -> list[str]:
        """What metrics.jsonl says in words."""
        return [row["text"] for row in self.rows("notice")]

    @cached_property
    def steps_per_epoch(self) -> int:
        """As the run itself told."""
        return int(self.rows("run")[0]["steps_per_epoch"])

    def position(self, name: str) -> int:
        """Steps that a checkpoint stands for."""
        epoch, _, steps = name.removeprefix("epoch-").partition("-step-")
        return int(epoch) * self.steps_per_epoch + int(steps or 0)

    def left_processes(self, seconds: float = 20) -> list[int]:
        """Of the command, its workers and what Ray started beside them, those that still run after so many seconds."""
        workers, deadline = self.seen().pids, time.monotonic() + seconds
        ray = f"TLDIST_OBSERVE={self.bench.observed}"
        while left := {*marked(self.mark), *filter(is_alive, workers), *filter(works_for_a_run, marked(ray))}:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return sorted(left)

    def end(self) -> None:
        """Whatever became of it: no process of it stays."""
        if self.process is not None and not self.is_over:
            self.signal(signal.SIGKILL)
        for pid in self.left_processes(30):
            os.kill(pid, signal.SIGKILL)
        end_cleaners(f"TLDIST_OBSERVE={self.bench.observed}")
