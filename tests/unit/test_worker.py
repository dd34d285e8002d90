"""One worker's run: what it leaves behind, and that nothing in it depends on chance."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tldist import config
from tldist.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    StrategyConfig,
    TrackingConfig,
    TrainConfig,
    UserError,
)
from tldist.train import worker

SUMMARY = {
    "recipe",
    "strategy",
    "model",
    "engine",
    "world_size",
    "seed",
    "epochs",
    "phases",
    "train_images",
    "val_images",
    "val_top1",
    "best_val_top1",
    "images_per_s",
    "data_wait_share",
    "trainable_params",
    "total_params",
    "replica_spread",
    "peak_mem_gib",
    "wall_s",
    "resumed_from",
    "wandb_run_id",
}


def settings(photos: Path, run_dir: Path) -> RunConfig:
    run_dir.mkdir()
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(weights="none"),
        strategy=StrategyConfig(name="two_phase"),
        data=DataConfig(root=str(photos), batch_size=8, image_size=32, augment="lecture", mixup=0.2, cutmix=1.0),
        optim=OptimConfig(base_lr=1e-3),
        train=TrainConfig(epochs=3),
        tracking=TrackingConfig(wandb="disabled", log_every=2),
    )


@pytest.fixture(scope="module")
def done(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, Any]]:
    made = settings(photos, tmp_path_factory.mktemp("worker") / "run")
    return made, worker.run(config.to_json(made))


def test_the_run_directory_is_complete(done: tuple[RunConfig, dict[str, Any]]) -> None:
    made, summary = done
    run_dir = Path(made.run_dir)
    for name in ("environment.json", "metrics.jsonl", "summary.json", "report.html", "predictions.json"):
        assert (run_dir / name).stat().st_size > 0, name
    assert list((run_dir / "plots").iterdir())
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert set(summary) >= SUMMARY
    assert (summary["train_images"], summary["val_images"], summary["epochs"]) == (40, 19, 3)
    assert 0 <= summary["val_top1"] <= summary["best_val_top1"] <= 1
    assert summary["images_per_s"] > 0
    assert 0 <= summary["data_wait_share"] <= 1
    environment = json.loads((run_dir / "environment.json").read_text())
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert environment["hardware"]["cores"] > 0


def test_the_best_checkpoint_predicts_what_was_counted(done: tuple[RunConfig, dict[str, Any]]) -> None:
    made, summary = done
    state = json.loads((Path(made.run_dir) / "checkpoints" / "best" / "state.json").read_text())
    assert state["val_top1"] == summary["best_val_top1"]
    assert state["classes"] == ["ants", "bees"]
    shown = json.loads((Path(made.run_dir) / "predictions.json").read_text())
    confusion = torch.tensor(shown["confusion_CC"])
    assert confusion.sum() == 19
    assert confusion.sum(1).tolist() == [9, 10]
    assert confusion.trace() / 19 == pytest.approx(summary["best_val_top1"])


def test_metrics_are_in_order_and_complete(done: tuple[RunConfig, dict[str, Any]]) -> None:
    made, _ = done
    rows = [json.loads(line) for line in (Path(made.run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["event"] == "run"
    assert rows[-1]["event"] == "end"
    assert [r["phase"] for r in rows if r["event"] == "phase"] == [0, 1]
    trained = [r for r in rows if r["event"] == "train"]
    assert [r["step"] for r in trained] == [2, 4, 5, 7, 9, 10, 12, 14, 15]
    assert sorted(trained[0]["lr"]) == ["head", "layer4"]
    assert len(trained[-1]["lr"]) == 6
    assert [r["epoch"] for r in rows if r["event"] == "eval"] == [1, 2, 3]


def test_the_same_config_gives_the_same_bits(
    photos: Path, tmp_path: Path, done: tuple[RunConfig, dict[str, Any]]
) -> None:
    """Order, augmentation, mixing, initialisation: all from the seed; another seed gives other weights."""
    made, _ = done

    def last(run: RunConfig) -> dict[str, torch.Tensor]:
        return safetensors.torch.load_file(Path(run.run_dir) / "checkpoints" / "last" / "model.safetensors")

    again = settings(photos, tmp_path / "again")
    torch.manual_seed(1234)  # whatever the process did before
    worker.run(config.to_json(again))
    assert all(torch.equal(last(again)[k], v) for k, v in last(made).items())
    other = replace(settings(photos, tmp_path / "other"), seed=1)
    worker.run(config.to_json(other))
    assert not torch.equal(last(other)["layer4.0.conv1.weight"], last(made)["layer4.0.conv1.weight"])


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("train", {"precision": "fp16"}),
        ("train", {"compile": "graphs"}),
        ("engine", {"kind": "zero1", "offload": "optimizer"}),
    ],
)
def test_a_worker_on_a_cpu_refuses_what_needs_a_gpu(
    photos: Path, tmp_path: Path, section: str, values: dict[str, Any]
) -> None:
    """Under torchrun, or on a cluster's machine, no launcher has looked."""
    made = settings(photos, tmp_path / "run")
    made = replace(made, **{section: replace(getattr(made, section), **values)})
    with pytest.raises(UserError, match="GPU"):
        worker.run(config.to_json(made))


def test_a_failure_is_recorded(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = settings(photos, tmp_path / "run")
    monkeypatch.setattr("tldist.train.fit.evaluate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        worker.run(config.to_json(made))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1] | {"time": 0} == {
        "event": "error",
        "time": 0,
        "text": "division by zero",
        "kind": "ZeroDivisionError",
    }
    assert "ZeroDivisionError" in (tmp_path / "run" / "logs" / "rank0.log").read_text()


def test_half_a_summary_is_none(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full at the very end: --resume must not take the run for one that is done."""
    made, real = settings(photos, tmp_path / "run"), Path.write_text

    def write(path: Path, text: str) -> int:
        if "summary" in path.name:
            real(path, text[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write)
        with pytest.raises(OSError, match="No space left"):
            worker.run(config.to_json(made))
    assert not (tmp_path / "run" / "summary.json").exists()
    assert worker.run(config.to_json(made))["epochs"] == made.train.epochs
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["resumed_from"] == "epoch-0003"


def test_the_main_worker_waits_for_an_earlier_one(tmp_path: Path) -> None:
    """Whose driver was killed, and which Ray has not ended yet."""
    with worker.sole_writer(tmp_path):
        pid = os.fork()
        if pid == 0:
            try:
                with worker.sole_writer(tmp_path, wait_s=0.3):
                    os._exit(1)
            except RuntimeError:
                os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    with worker.sole_writer(tmp_path, wait_s=0.3):
        pass
