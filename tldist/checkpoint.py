"""What a run leaves on disk: weights under torchvision's names, optimizer state by name, and where it stood."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
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


def save(folder: Path, model: dict[str, Tensor], state: TrainState, extra: dict[str, Any]) -> None:
    """Write `folder` so that a reader sees the old one or the new one, never a mixture.

    model.safetensors: torchvision's names; optimizer.safetensors: `parameter/key`; state.json: the rest.
    """
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    safetensors.torch.save_file(_plain(model), fresh / "model.safetensors")
    moments = {f"{name}/{key}": t for name, tensors in state.optimizer.items() for key, t in tensors.items()}
    safetensors.torch.save_file(_plain(moments), fresh / "optimizer.safetensors")
    scalars = {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name != "optimizer"}
    (fresh / "state.json").write_text(json.dumps({**extra, **scalars}, indent=1))
    for file in fresh.iterdir():
        _sync(file)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
