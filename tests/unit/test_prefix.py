"""The frozen prefix: folded, compiled where it pays, and untouched by both."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tldist import config
from tldist.config import (
    CacheConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    StrategyConfig,
    TrackingConfig,
    TrainConfig,
)
from tldist.models import backbones
from tldist.models.batchnorm import synchronise
from tldist.models.flops import StepFlops
from tldist.models.prefix import Prefix, fold_batchnorm
from tldist.plans import build_plan
from tldist.train import phase, worker


def model_with_statistics(name: Any = "resnet18") -> backbones.StagedModel:
    model = backbones.build(ModelConfig(name=name, weights="none"), 3, 64, 0)
    torch.manual_seed(0)
    for key, buffer in model.named_buffers():
        if key.endswith(("mean", "var")):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
@pytest.mark.parametrize("synchronised", [False, True])
def test_folding_keeps_the_function_and_leaves_no_batchnorm(name: str, synchronised: bool) -> None:
    model = model_with_statistics(name)
    if synchronised:
        synchronise(model, torch.device("cpu"))
    before = {key: t.clone() for key, t in model.state_dict().items()}
    frozen, _ = model.cut(len(model.stages) - 1)
    prefix = Prefix(frozen, torch.float32)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in prefix.network.modules())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(prefix(images), frozen(images), rtol=1e-3, atol=1e-3)
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())


def test_pooling_at_the_heads_entry_belongs_to_the_prefix() -> None:
    """Features at the cut are (N, 512), and parameter names stay as they are; ViT keeps its class token alone."""
    model = model_with_statistics()
    frozen, network = model.cut(5)
    assert Prefix(frozen, torch.float32)(torch.randn(2, 3, 64, 64)).shape == (2, 512)
    assert [name for name, _ in network.named_parameters()] == ["head.fc.weight", "head.fc.bias"]
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network(frozen(images)), model(images))
    vit = backbones.build(ModelConfig(name="vit_b_16", weights="none"), 3, 32, 0).eval()
    frozen, network = vit.cut(5)
    with torch.no_grad():
        assert frozen(torch.randn(2, 3, 32, 32)).shape == (2, 768)
    assert next(network.named_parameters())[0] == "head.ln.weight"


def test_compiling_gives_the_same_run_and_its_time_apart(photos: Path, tmp_path: Path) -> None:
    """One real compilation: losses as without, seconds reported, the odd last validation batch (3 images) runs too."""
    off = RunConfig(
        run_dir=str(tmp_path / "off"),
        model=ModelConfig(weights="none"),
        strategy=StrategyConfig(name="feature_extraction"),
        data=DataConfig(root=str(photos), batch_size=8, image_size=32, threads=1),
        optim=OptimConfig(base_lr=1e-2),
        train=TrainConfig(epochs=1, precision="fp32", compile="off"),
        cache=CacheConfig(),
        tracking=TrackingConfig(wandb="disabled", log_every=1),
    )
    on = replace(off, run_dir=str(tmp_path / "on"), train=replace(off.train, compile="on"))
    summaries = []
    for made in (off, on):
        Path(made.run_dir).mkdir()
        summaries.append(worker.run(config.to_json(made)))
    assert summaries[0]["per_phase"][0]["compile_s"] == 0
    assert summaries[1]["per_phase"][0]["compile_s"] > 1
    losses = [[r["loss"] for r in _train_rows(made)] for made in (off, on)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def _train_rows(made: RunConfig) -> list[dict[str, Any]]:
    import json

    lines = (Path(made.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == "train"]


@pytest.mark.parametrize(
    ("images", "epochs", "features", "pays"),
    [(244, 15, "off", False), (50_000, 10, "off", True), (50_000, 10, "exact", False), (1_281_167, 1, "exact", True)],
)
def test_auto_compiles_where_the_time_comes_back(images: int, epochs: int, features: str, pays: bool) -> None:
    """ResNet-18's frozen trunk at 224 px, 3.6 GFLOP an image: not for ants and bees, nor where a cache sees each
    image once, unless there are very many."""
    settings = RunConfig(cache=CacheConfig(features=features), data=DataConfig(augment="none"))
    plan = build_plan(StrategyConfig(), backbones.stage_names("resnet18"), epochs)
    run: Any = SimpleNamespace(
        config=settings,
        plan=plan,
        index=SimpleNamespace(train=range(images), val=range(images // 5)),
        numbers=SimpleNamespace(device=torch.device("cpu")),
        worker=SimpleNamespace(world_size=1),
    )
    assert phase._compiling_pays(run, plan.phases[0], StepFlops(3.6e9, 1e6, 1e6)) == pays


@pytest.mark.parametrize(
    ("images", "pass_size", "pays"), [(5000, 256, False), (50_000, 256, True), (50_000, 32, False)]
)
def test_auto_compiles_for_gpus_that_do_not_wait_for_the_host(images: int, pass_size: int, pays: bool) -> None:
    """A full ResNet-50 over ten epochs: a phase of enough work, whose passes are large."""
    plan = build_plan(StrategyConfig(name="full"), backbones.stage_names("resnet50"), 10)
    run: Any = SimpleNamespace(
        config=RunConfig(),
        plan=plan,
        index=SimpleNamespace(train=range(images), val=range(100)),
        numbers=SimpleNamespace(device=torch.device("cuda")),
        worker=SimpleNamespace(world_size=1),
        pass_size=pass_size,
    )
    assert phase._compiling_pays(run, plan.phases[0], StepFlops(0.0, 8.2e9, 16.1e9)) == pays


def test_every_phase_of_many_is_compiled(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch compiles the same code eight times and then silently no more: ten phases share theirs."""
    compiled = []

    def backend(module: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        compiled.append(module)
        return module

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    made = RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(weights="none"),
        strategy=StrategyConfig(name="by_hand", phases=("1: head=1, *=frozen",) * 10),
        data=DataConfig(root=str(photos), batch_size=20, image_size=32, threads=1),
        train=TrainConfig(epochs=10, precision="fp32", compile="on"),
        tracking=TrackingConfig(wandb="disabled"),
    )
    worker.run(config.to_json(made))
    assert len(compiled) == 10


def test_folding_copies() -> None:
    stage = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    folded = fold_batchnorm(stage)
    assert stage.training
    assert all(p.requires_grad for p in stage.parameters())
    assert not any(p.requires_grad for p in folded.parameters())
