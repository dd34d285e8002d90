"""A run on one GPU: every precision, loader and engine, compiled and not, and a step that the host never waits in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor.config
from PIL import Image

from tldist import config, dist
from tldist.checkpoints import checkpoint
from tldist.config import (
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    StrategyConfig,
    TrackingConfig,
    TrainConfig,
)
from tldist.data.batches import Worker, train_batches
from tldist.data.load.open import loader_kind, open_loader
from tldist.data.presets import PRESETS, AugmentSpec
from tldist.data.source.index import build_index
from tldist.train import fit, worker

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

    def watched(run: fit.Run, live: fit.LivePhase, number: int, *rest: Any) -> None:
        torch.cuda.set_sync_debug_mode("error" if number % 5 > 1 else "default")
        try:
            step(run, live, number, *rest)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(fit, "train_step", watched)
    worker.run(config.to_json(settings(photos, tmp_path / "run", "torchvision")))


@DALI
@pytest.mark.parametrize("preset", ["none", "basic"])
def test_dali_decodes_on_the_gpu_what_torchvision_decodes_on_the_cpu(tmp_path: Path, preset: str) -> None:
    """nvJPEG enlarges colour (4:2:0) without libjpeg's smoothing: on smooth pictures two levels of 255 on average, on
    pixels of pure noise (sigma 40) five."""
    for split, seed in (("train", 1), ("val", 2)):
        rng = np.random.default_rng(seed)
        for i in range(12):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            (folder := tmp_path / split / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
            coarse.resize((160, 120), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=92)
    photos = tmp_path
    spec: AugmentSpec = PRESETS[preset]  # type: ignore[index]
    index, device = build_index(photos), torch.device("cuda", 0)
    plans = list(train_batches(index.train, spec, 64, 8, 0, 0, Worker(0, 1)))
    shown = []
    for kind in ("dali", "torchvision"):
        data = replace(DataConfig(root=str(photos), image_size=64, threads=2), loader=kind)
        batches = list(open_loader(data, spec, 8, device).batches(plans))
        assert all(batch.images_NHWC.is_cuda for batch in batches)
        shown.append(torch.cat([batch.images_NHWC for batch in batches]).float())
    assert (shown[0] - shown[1]).abs().mean() < 2


# Where a run ends

SGD = OptimConfig(name="sgd", base_lr=5e-3)
CASES: dict[str, dict[str, Any]] = {
    "full": {"strategy": StrategyConfig(name="full")},
    "gradual": {"strategy": StrategyConfig(name="gradual")},
    "partial, in parts, averaged": {
        "strategy": StrategyConfig(name="partial"),
        "train": TrainConfig(epochs=3, precision="fp32", accumulate=2, ema=0.9),
    },
    "mmd": {"strategy": StrategyConfig(name="mmd"), "data": {"root": "../two_domains"}},
    "dann": {"strategy": StrategyConfig(name="dann"), "data": {"root": "../two_domains"}},
}


@pytest.fixture
def exact_fp32() -> Iterator[None]:
    """Convolutions without TF32, whose 10 bits would hide a mistake."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def plain(photos: Path, run_dir: Path, case: dict[str, Any]) -> RunConfig:
    """fp32, SGD, nothing mixed: what two devices, or two engines, can agree on."""
    run_dir.mkdir()
    data = {"root": ".", "batch_size": 8, "image_size": 64, "loader": "torchvision", **case.get("data", {})}
    data["root"] = str(photos / data["root"])
    base = RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(weights="none"),
        data=DataConfig(**data),
        optim=SGD,
        train=TrainConfig(epochs=3, precision="fp32", batchnorm="eval"),
        tracking=TrackingConfig(wandb="disabled"),
    )
    return replace(base, **{key: value for key, value in case.items() if key != "data"})


def ended(made: RunConfig) -> dict[str, torch.Tensor]:
    worker.run(config.to_json(made))
    return checkpoint.read_weights(Path(made.run_dir) / "checkpoints" / "last")


def compare(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    """All weights at once, so that a failure tells the largest difference."""
    assert got.keys() == expected.keys()
    floats = [name for name, tensor in expected.items() if tensor.is_floating_point()]
    got_P, expected_P = (torch.cat([weights[name].flatten() for name in floats]) for weights in (got, expected))
    torch.testing.assert_close(got_P, expected_P, rtol=0, atol=atol)


@pytest.mark.usefixtures("exact_fp32", "two_domains")
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_ends_where_the_cpu_ends(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    on_gpu = ended(plain(photos, tmp_path / "gpu", CASES[name]))
    monkeypatch.setattr(dist, "local_device", lambda: torch.device("cpu"))
    compare(on_gpu, ended(plain(photos, tmp_path / "cpu", CASES[name])), atol=1e-4)


@pytest.mark.usefixtures("exact_fp32")
@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2", "zero3", "offload"])
def test_every_engine_ends_where_one_process_ends(photos: Path, tmp_path: Path, kind: str) -> None:
    """One rank over NCCL."""
    if kind != "ddp":
        pytest.importorskip("deepspeed")
    engine = EngineConfig(kind="zero2", offload="optimizer") if kind == "offload" else EngineConfig(kind=kind)  # type: ignore[arg-type]
    expected = ended(plain(photos, tmp_path / "single", CASES["gradual"]))
    got = ended(replace(plain(photos, tmp_path / "run", CASES["gradual"]), engine=engine))
    compare(got, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_zero_in_low_precision(photos: Path, tmp_path: Path, kind: str, precision: str) -> None:
    pytest.importorskip("deepspeed")
    made = settings(photos, tmp_path / "run", "torchvision", precision)
    summary = worker.run(config.to_json(replace(made, engine=EngineConfig(kind=kind))))  # type: ignore[arg-type]
    assert summary["phases"] == 3
    assert summary["skipped_steps"] <= 10  # fp16 looks for its scale


@pytest.mark.usefixtures("exact_fp32")
@pytest.mark.parametrize(
    ("kind", "compile"), [("single", "on"), ("single", "graphs"), ("ddp", "graphs"), ("zero2", "on")]
)
@pytest.mark.parametrize("name", ["full", "gradual", "partial, in parts, averaged"])
@pytest.mark.parametrize("batchnorm", ["eval", "train"])
def test_a_compiled_run_ends_where_an_eager_one_ends(
    photos: Path,
    tmp_path: Path,
    name: str,
    kind: str,
    compile: str,
    batchnorm: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that trains, averages, and what BatchNorm keeps, which graphs move in place."""
    if kind == "zero2":
        pytest.importorskip("deepspeed")
    # Else Inductor goes on without graphs where it cannot make them, and says so in its log alone.
    monkeypatch.setattr(torch._inductor.config.triton, "cudagraph_or_error", compile == "graphs")
    eager = plain(photos, tmp_path / "eager", CASES[name])
    eager = replace(eager, train=replace(eager.train, compile="off", batchnorm=batchnorm))  # type: ignore[arg-type]
    compiled = plain(photos, tmp_path / "compiled", CASES[name])
    train, engine = replace(eager.train, compile=compile), EngineConfig(kind=kind)  # type: ignore[arg-type]
    compiled = replace(compiled, train=train, engine=engine)
    # Statistics of eight images and fewer make more of a rounding error.
    atol = 1e-4 if batchnorm == "eval" else 1e-3
    compare(ended(compiled), ended(eager), atol)
    one, other = (checkpoint.read_live(Path(made.run_dir) / "checkpoints" / "last") for made in (compiled, eager))
    compare(one, other, atol)


def test_graphs_in_bf16_learn_what_eager_steps_learn(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed, everything trains: rounded otherwise in every layer, so only the losses are compared."""
    monkeypatch.setattr(torch._inductor.config.triton, "cudagraph_or_error", True)

    def losses(compile: str) -> list[float]:
        made = settings(photos, tmp_path / compile, "torchvision")
        train = replace(made.train, compile=compile)  # type: ignore[arg-type]
        worker.run(config.to_json(replace(made, strategy=StrategyConfig(name="full"), train=train)))
        rows = [json.loads(line) for line in (tmp_path / compile / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if row["event"] == "train"]

    assert losses("graphs") == pytest.approx(losses("off"), rel=0.05)


@pytest.mark.parametrize(
    ("model", "side", "compile"),
    [
        *((name, 64, "off") for name in ("resnet18", "efficientnet_b0", "convnext_base")),
        ("vit_b_16", 384, "off"),  # as many tokens as make attention's backward pass add up parts
        ("resnet18", 64, "on"),
        ("resnet18", 64, "graphs"),
    ],
)
def test_a_run_repeats_to_the_bit(photos: Path, tmp_path: Path, model: str, side: int, compile: str) -> None:
    """bf16, mixed, everything trains: what an interrupted run's exactness rests on."""

    def run(name: str) -> dict[str, torch.Tensor]:
        made = settings(photos, tmp_path / name, "torchvision")
        return ended(
            replace(
                made,
                model=ModelConfig(name=model, weights="none"),  # type: ignore[arg-type]
                data=replace(made.data, image_size=side),
                strategy=StrategyConfig(name="full"),
                train=replace(made.train, compile=compile),  # type: ignore[arg-type]
            )
        )

    first, again = run("first"), run("again")
    assert [name for name, tensor in first.items() if not torch.equal(tensor, again[name])] == []
