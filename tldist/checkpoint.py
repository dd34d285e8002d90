"""What a run leaves on disk: weights under torchvision's names, optimizer state by name, and where it stood."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Container, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from tldist.optim import OptimizerState


@dataclass
class Plateau:
    """How long a figure has not risen."""

    best: float = -1.0
    stale: int = 0
    """Looks since the best."""

    def look(self, value: float, min_delta: float) -> None:
        """Only a rise by more than `min_delta` counts."""
        if value > self.best + min_delta:
            self.best, self.stale = value, 0
        else:
            self.stale += 1


@dataclass
class TrainState:
    """All that is not a pure function of the step: the rest of a run follows from the config and these."""

    epoch: int = 0
    """Epochs finished."""
    step: int = 0
    """Optimizer steps finished."""
    val_top1: float = 0.0
    best_val_top1: float = -1.0
    best_epoch: int = 0
    phase: int = 0
    """The phase that runs, and the epoch at which it began."""
    phase_epoch: int = 0
    phase_plateau: Plateau = field(default_factory=Plateau)
    """Validation since the phase began, and since the run began."""
    run_plateau: Plateau = field(default_factory=Plateau)
    optimizer: OptimizerState = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    """The moving average of what trains, by parameter and buffer name; empty without --train.ema."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """fp16's loss scale; empty otherwise."""
    seconds: float = 0.0
    """Spent in the loop until this epoch's end, and until the best epoch's."""
    seconds_to_best: float = 0.0


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint's contents, out of reach of further training."""

    epoch: int
    tensors: dict[str, dict[str, Tensor]]
    """File -> its tensors."""
    state: dict[str, Any]


def snapshot(
    model: dict[str, Tensor],
    live: dict[str, Tensor] | None,
    state: TrainState,
    extra: dict[str, Any],
    fixed: Container[str] = (),
) -> Snapshot:
    """Copy what a checkpoint holds; tensors of `model` named in `fixed` do not change and are only referred to.

    model.safetensors: what was evaluated, under torchvision's names; live.safetensors: what trains on, where that is
    another (a moving average was evaluated); optimizer.safetensors: `parameter/key`; state.json: the rest.
    """
    moments = {f"{name}/{key}": t for name, tensors in state.optimizer.items() for key, t in tensors.items()}
    files = {"model": model, "optimizer": moments} | ({} if live is None else {"live": live})
    scalars = dataclasses.asdict(dataclasses.replace(state, optimizer={}, average={}))
    del scalars["optimizer"], scalars["average"]
    tensors = {
        f"{file}.safetensors": {
            name: t.detach().cpu() if name in fixed else t.detach().to("cpu", copy=True) for name, t in named.items()
        }
        for file, named in files.items()
    }
    return Snapshot(state.epoch, tensors, {**extra, **scalars})


def save(folder: Path, names: Sequence[str], contents: Snapshot) -> None:
    """Write `folder/epoch-N` once and point `folder/NAME` at it for each name; what no name points at is removed.

    A name is a link that is replaced in one step, so a reader sees the old checkpoint or the new one, whenever
    the process dies.
    """
    fresh = folder / f"epoch-{contents.epoch:04d}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    for file, tensors in contents.tensors.items():
        safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, fresh / file)
    (fresh / "state.json").write_text(json.dumps(contents.state, indent=1))
    for path in (*fresh.iterdir(), fresh, folder):
        _sync(path)
    point(folder, names, fresh.name)


class Saver:
    """Writes checkpoints on a thread of its own, at most a tenth of the time.

    Epochs from cached features take milliseconds, a checkpoint does not: of several that wait under one name only
    the newest is written. `flush` writes what waits.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._thread = ThreadPoolExecutor(1)
        self._waiting: dict[str, Snapshot] = {}
        self._lock, self._hurry = threading.Lock(), threading.Event()
        self._writing: Future[None] | None = None

    def save(self, names: Sequence[str], contents: Snapshot) -> None:
        """Soon. Raises what an earlier write raised."""
        with self._lock:
            self._waiting |= dict.fromkeys(names, contents)
        if self._writing is None or self._writing.done():
            self.check()
            self._writing = self._thread.submit(self._write)

    def check(self) -> None:
        """Raise what a finished write raised."""
        if self._writing is not None and self._writing.done():
            self._writing.result()

    def flush(self) -> None:
        """Wait until everything is on disk."""
        self._hurry.set()
        if self._writing is not None:
            self._writing.result()
        self._write()  # what came while the thread was ending
        self._hurry.clear()

    def close(self) -> None:
        """Write what waits, and end."""
        try:
            self.flush()
        finally:
            self._thread.shutdown()

    def _write(self) -> None:
        while waiting := self._take():
            started = time.monotonic()
            for contents in {id(contents): contents for contents in waiting.values()}.values():
                save(self.folder, [name for name in waiting if waiting[name] is contents], contents)
            self._hurry.wait(9 * (time.monotonic() - started))

    def _take(self) -> dict[str, Snapshot]:
        with self._lock:
            taken, self._waiting = self._waiting, {}
        return taken


def point(folder: Path, names: Sequence[str], target: str) -> None:
    """Let each name lead to `folder/target`, in one step, and remove what no name leads to any more."""
    for name in names:
        link = folder / f".{name}"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        link.replace(folder / name)
    _sync(folder)
    _remove_unnamed(folder)


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """What was evaluated, under torchvision's names."""
    return safetensors.torch.load_file(checkpoint / "model.safetensors")


def read_live(checkpoint: Path) -> dict[str, Tensor]:
    """What trains on, under torchvision's names: what was evaluated, unless that was an average."""
    live = checkpoint / "live.safetensors"
    return safetensors.torch.load_file(live) if live.exists() else read_weights(checkpoint)


def read_state(checkpoint: Path) -> tuple[TrainState, dict[str, Any]]:
    """Where a run stood, without its average, and what else was told there (the model's description, ...)."""
    told = json.loads((checkpoint / "state.json").read_text())
    own = {f.name: told.pop(f.name) for f in dataclasses.fields(TrainState) if f.name in told}
    own |= {name: Plateau(**own[name]) for name in ("phase_plateau", "run_plateau")}
    return TrainState(**own, optimizer=read_optimizer(checkpoint)), told


def read_optimizer(checkpoint: Path) -> OptimizerState:
    """The optimizer's state by parameter name."""
    found: OptimizerState = {}
    for place, tensor in safetensors.torch.load_file(checkpoint / "optimizer.safetensors").items():
        name, _, key = place.rpartition("/")
        found.setdefault(name, {})[key] = tensor
    return found


def _remove_unnamed(folder: Path) -> None:
    named = {path.resolve() for path in folder.iterdir() if path.is_symlink()}
    for path in folder.glob("epoch-*"):
        if path.resolve() not in named:
            shutil.rmtree(path)


def _sync(path: Path) -> None:
    """Onto the disk: a file's bytes, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
