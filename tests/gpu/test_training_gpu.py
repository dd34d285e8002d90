"""A run on one GPU: every precision, both loaders, and a step that the host never waits in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tldist import config, fit, worker
from tldist.config import DataConfig, ModelConfig, RunConfig, StrategyConfig, TrackingConfig, TrainConfig
from tldist.data.batches import Worker, train_batches
from tldist.data.index import build_index
from tldist.data.loader import loader_kind, open_loader
from tldist.data.presets import PRESETS, AugmentSpec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DALI = pytest.mark.skipif(loader_kind(DataConfig(), torch.device("cuda")) != "dali", reason="DALI is not installed")
LOADERS = ["torchvision", pytest.param("dali", marks=DALI)]


def settings(photos: Path, run_dir: Path, loader: str, precision: str = "bf16") -> RunConfig:
    run_dir.mkdir()
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(weights="none"),
        strategy=StrategyConfig(name="gradual"),
        data=DataConfig(
            root=str(photos),
            batch_size=8,
            image_size=64,
            augment="lecture",
            mixup=0.2,
            cutmix=1.0,
            loader=loader,  # type: ignore[arg-type]
        ),
        train=TrainConfig(epochs=3, precision=precision),  # type: ignore[arg-type]
        tracking=TrackingConfig(wandb="disabled"),
    )


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_run_in_every_precision(photos: Path, tmp_path: Path, loader: str, precision: str) -> None:
    made = settings(photos, tmp_path / "run", loader, precision)
    summary = worker.run(config.to_json(made))
    assert summary["phases"] == 3
    assert 0 < summary["peak_mem_gib"] < 8
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["event"] == "train"]
    assert all(0 < loss < 20 for loss in losses)


def test_the_host_never_waits_in_a_step(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any synchronising call inside train_step is an error, after the first steps of each phase (allocation)."""
    step = fit.train_step

    def watched(run: fit.Run, live: fit.LivePhase, number: int, batch: object) -> None:
        torch.cuda.set_sync_debug_mode("error" if number % 5 > 1 else "default")
        try:
            step(run, live, number, batch)  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(fit, "train_step", watched)
    worker.run(config.to_json(settings(photos, tmp_path / "run", "torchvision")))


@DALI
@pytest.mark.parametrize("preset", ["none", "basic"])
def test_dali_decodes_on_the_gpu_what_torchvision_decodes_on_the_cpu(photos: Path, preset: str) -> None:
    """nvJPEG's chroma and rounding differ from libjpeg's: three levels of 255 on average."""
    spec: AugmentSpec = PRESETS[preset]  # type: ignore[index]
    index, device = build_index(photos), torch.device("cuda", 0)
    plans = list(train_batches(index.train, spec, 64, 8, 0, 0, Worker(0, 1)))
    shown = []
    for kind in ("dali", "torchvision"):
        data = replace(DataConfig(root=str(photos), image_size=64, threads=2), loader=kind)
        batches = list(open_loader(data, spec, 8, device).batches(plans))
        assert all(batch.images_NHWC.is_cuda for batch in batches)
        shown.append(torch.cat([batch.images_NHWC for batch in batches]).float())
    assert (shown[0] - shown[1]).abs().mean() < 3
