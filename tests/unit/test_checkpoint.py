"""Checkpoints: complete, atomic, and no more of them than have a name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tldist import checkpoint
from tldist.checkpoint import TrainState


def save(folder: Path, epoch: int, names: tuple[str, ...]) -> None:
    moments = {"head.fc.weight": {"exp_avg": torch.full((2, 3), float(epoch)), "step": torch.tensor(4.0)}}
    state = TrainState(epoch=epoch, step=epoch * 5, optimizer=moments)
    contents = checkpoint.snapshot({"fc.weight": torch.full((2, 3), epoch)}, None, state, {"model": "resnet18"})
    checkpoint.save(folder, names, contents)


def value(folder: Path, name: str) -> float:
    return float(safetensors.torch.load_file(folder / name / "model.safetensors")["fc.weight"][0, 0])


def test_names_point_at_what_was_saved(tmp_path: Path) -> None:
    for epoch, names in [(1, ("last", "best")), (2, ("last",)), (3, ("last", "best")), (4, ("last",))]:
        save(tmp_path, epoch, names)
    assert (value(tmp_path, "last"), value(tmp_path, "best")) == (4, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "epoch-0003", "epoch-0004", "last"]
    state = json.loads((tmp_path / "best" / "state.json").read_text())
    assert (state["epoch"], state["step"], state["model"]) == (3, 15, "resnet18")
    moments = safetensors.torch.load_file(tmp_path / "last" / "optimizer.safetensors")
    assert sorted(moments) == ["head.fc.weight/exp_avg", "head.fc.weight/step"]


@pytest.mark.parametrize("call", ["json.dumps", "os.fsync", "pathlib.Path.symlink_to"])
def test_a_save_that_dies_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    save(tmp_path, 1, ("last", "best"))

    def die(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(call, die)
        with pytest.raises(OSError, match="no space"):
            save(tmp_path, 2, ("last", "best"))
    assert (value(tmp_path, "last"), value(tmp_path, "best")) == (1, 1)
    save(tmp_path, 2, ("last", "best"))
    assert (value(tmp_path, "last"), value(tmp_path, "best")) == (2, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "epoch-0002", "last"]
