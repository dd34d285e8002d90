"""Whole runs under W&B: one that was killed arrives whole, and nothing done to wandb-core changes the training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import long

from tldist import config
from tldist.config import DataConfig, ModelConfig, RunConfig, StrategyConfig, TrackingConfig, TrainConfig
from tldist.tracking.wandb_files import parts, read
from tldist.train import worker

Row = dict[str, Any]


def settings(photos: Path, run_dir: Path, wandb: Any = "offline") -> RunConfig:
    """Forty steps in two phases."""
    run_dir.mkdir()
    made = RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(weights="none"),
        strategy=StrategyConfig(name="two_phase"),
        data=DataConfig(root=str(photos), batch_size=8, image_size=32, threads=1, loader="torchvision"),
        train=TrainConfig(epochs=8, compile="off"),
        tracking=TrackingConfig(wandb=wandb, log_every=1, group="a study"),
    )
    config.save(made, run_dir / "config.yaml")
    return made


def start(made: RunConfig) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "tldist.worker", str(Path(made.run_dir) / "config.yaml")]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=kept)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=240)
    return process.returncode, said


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def rows(made: RunConfig, kind: str) -> list[Row]:
    path = Path(made.run_dir) / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    return [row for row in found if row["event"] == kind]


def weights(made: RunConfig) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(made.run_dir) / "checkpoints" / "last" / "model.safetensors")


def service_of(process: subprocess.Popen[str]) -> list[int]:
    """The wandb-core that a worker started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = status.read_text().rpartition(")")
        except OSError:
            continue
        if "wandb-core" in name and int(rest.split()[1]) == process.pid:
            found.append(int(status.parent.name))
    return found


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    made = settings(photos, tmp_path_factory.mktemp("undisturbed") / "run", wandb="disabled")
    worker.run(config.to_json(made))
    return made


@pytest.mark.parametrize("when", ["at its start", pytest.param("under way", marks=long)])
def test_a_killed_wandb_core_changes_nothing_in_the_training(
    photos: Path, tmp_path: Path, undisturbed: RunConfig, when: str
) -> None:
    """At its start: wandb.setup() would never return, and the run would wait for it after its last step."""
    made = settings(photos, tmp_path / "run")
    process = start(made)
    until(lambda: bool(service_of(process)))
    if when == "under way":
        until(lambda: bool(list((tmp_path / "run" / "wandb").glob("*/*.wandb"))) and bool(rows(made, "train")))
    assert not rows(made, "end")
    os.kill(service_of(process)[0], signal.SIGKILL)
    assert ended(process) == (0, "")
    assert [row["text"] for row in rows(made, "notice") if row["text"].startswith("W&B: stopped (")]
    expected = weights(undisturbed)
    assert all(torch.equal(value, expected[name]) for name, value in weights(made).items())


def test_a_run_that_was_killed_and_went_on_is_one_whole_run_in_wandb(
    photos: Path, tmp_path: Path, undisturbed: RunConfig
) -> None:
    made = settings(photos, tmp_path / "run")
    process = start(made)
    until(lambda: len(rows(made, "train")) >= 12)  # epochs of five steps: two evaluations, and two steps more
    process.kill()
    assert ended(process)[0] == -signal.SIGKILL
    assert ended(start(made)) == (0, "")

    # W&B writes every fifteen seconds: of a process killed earlier there is nothing yet, and the next one sends it.
    stored = [run for run in map(read, parts(tmp_path / "run")) if run.run_id]
    history = [row for run in stored for row in run.history]
    assert len({run.run_id for run in stored}) == 1
    assert {run.group for run in stored} == {"a study"}
    assert stored[-1].tags == ["custom", "two_phase", "resnet18", "single"]
    trained, evaluated = ([row for row in history if key in row] for key in ("train/step", "val/step"))
    assert [row["train/step"] for row in trained] == list(range(1, 41))
    assert [row["val/step"] for row in evaluated if "val/top1" in row] == list(range(5, 41, 5))
    steps = [row["_step"] for row in history]
    assert steps == sorted(set(steps))
    assert len(rows(made, "train")) > 40, "steps were repeated"
    final = {row["step"]: row for row in rows(made, "train")}
    for row in trained:
        ours = final[row["train/step"]]
        assert (row["train/loss"], row["gradient/norm"]) == (ours["loss"], ours["grad_norm"])
        assert row["lr/head"] == ours["lr"]["head"]
    expected = weights(undisturbed)
    assert all(torch.equal(value, expected[name]) for name, value in weights(made).items())
    assert {name.split("-")[0] for name, _, _ in stored[-1].artifacts} >= {"model", "config"}
    assert [title for _, title, _ in stored[-1].alerts] == ["tldist: finished"]
