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
class TrainState:
    """All that is not a pure function of the step: the rest of a run follows from the config and these."""

    epoch: int = 0
    """Epochs finished."""
    step: int = 0
    """Optimizer steps finished."""
    val_top1: float = 0.0
    best_val_top1: float = -1.0
    best_epoch: int = 0
    optimizer: OptimizerState = field(default_factory=dict)


def save(
    folder: Path, names: Sequence[str], model: dict[str, Tensor], state: TrainState, extra: dict[str, Any]
) -> None:
    """Write `folder/epoch-N` once and point `folder/NAME` at it for each name; what no name points at is removed.

    A name is a link that is replaced in one step, so a reader sees the old checkpoint or the new one, whenever
    the process dies. model.safetensors: torchvision's names; optimizer.safetensors: `parameter/key`; state.json:
    the rest.
    """
    fresh = folder / f"epoch-{state.epoch:04d}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    safetensors.torch.save_file(_plain(model), fresh / "model.safetensors")
    moments = {f"{name}/{key}": t for name, tensors in state.optimizer.items() for key, t in tensors.items()}
    safetensors.torch.save_file(_plain(moments), fresh / "optimizer.safetensors")
    scalars = {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name != "optimizer"}
    (fresh / "state.json").write_text(json.dumps({**extra, **scalars}, indent=1))
    for path in (*fresh.iterdir(), fresh, folder):
        _sync(path)
    for name in names:
        link = folder / f".{name}"
        link.unlink(missing_ok=True)
        link.symlink_to(fresh.name)
        link.replace(folder / name)
    _sync(folder)
    _remove_unnamed(folder)


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
