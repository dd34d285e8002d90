"""What a run leaves on disk: weights under torchvision's names, optimizer state by name, and where it stood."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
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


def save(
    folder: Path,
    names: Sequence[str],
    model: dict[str, Tensor],
    live: dict[str, Tensor] | None,
    state: TrainState,
    extra: dict[str, Any],
) -> None:
    """Write `folder/epoch-N` once and point `folder/NAME` at it for each name; what no name points at is removed.

    A name is a link that is replaced in one step, so a reader sees the old checkpoint or the new one, whenever
    the process dies. model.safetensors: what was evaluated, under torchvision's names; live.safetensors: what
    trains on, where that is another (a moving average was evaluated); optimizer.safetensors: `parameter/key`;
    state.json: the rest.
    """
    fresh = folder / f"epoch-{state.epoch:04d}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    safetensors.torch.save_file(_plain(model), fresh / "model.safetensors")
    if live is not None:
        safetensors.torch.save_file(_plain(live), fresh / "live.safetensors")
    moments = {f"{name}/{key}": t for name, tensors in state.optimizer.items() for key, t in tensors.items()}
    safetensors.torch.save_file(_plain(moments), fresh / "optimizer.safetensors")
    scalars = dataclasses.asdict(dataclasses.replace(state, optimizer={}, average={}))
    del scalars["optimizer"], scalars["average"]
    (fresh / "state.json").write_text(json.dumps({**extra, **scalars}, indent=1))
    for path in (*fresh.iterdir(), fresh, folder):
        _sync(path)
    for name in names:
        point(folder, name, fresh.name)
    _sync(folder)
    _remove_unnamed(folder)


def point(folder: Path, name: str, target: str) -> None:
    """Let `folder/name` lead to `folder/target`, in one step."""
    link = folder / f".{name}"
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    link.replace(folder / name)


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """What was evaluated, under torchvision's names."""
    return safetensors.torch.load_file(checkpoint / "model.safetensors")


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


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _sync(path: Path) -> None:
    """Onto the disk: a file's bytes, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
