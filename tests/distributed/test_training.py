"""Whole runs on real gloo ranks, through the same `worker.run` that Ray calls."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import run_ranks, write_images

from tldist import config, dist
from tldist.config import (
    CacheConfig,
    CheckpointConfig,
    DataConfig,
    LaunchConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    StrategyConfig,
    TrackingConfig,
    TrainConfig,
)
from tldist.data.batches import Worker, eval_batches
from tldist.data.load.loader import Batch
from tldist.data.load.open import open_loader
from tldist.data.presets import AugmentSpec
from tldist.data.source.index import build_index
from tldist.engine import numerics
from tldist.engine.ddp import DDPEngine
from tldist.models import backbones
from tldist.models.batchnorm import synchronise, unsynchronise
from tldist.objectives.base import Targets
from tldist.objectives.supervised import Supervised
from tldist.plans import Phase
from tldist.train import fit, worker
from tldist.train.evaluate import evaluate
from tldist.train.inputs.inputs import to_input
from tldist.train.phase import freeze

CPU = torch.device("cpu")


def settings(photos: Path, run_dir: Path, **sections: Any) -> RunConfig:
    """Small and exact: fp32, source statistics in BatchNorm, five steps an epoch."""
    base = RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(weights="none"),
        strategy=StrategyConfig(name="full"),
        data=DataConfig(root=str(photos), batch_size=8, image_size=32, augment="basic", threads=1),
        optim=OptimConfig(name="sgd", base_lr=5e-3),
        train=TrainConfig(epochs=2, precision="fp32", batchnorm="eval"),
        tracking=TrackingConfig(wandb="disabled", log_every=2),
    )
    return replace(base, **sections)


def train(made: RunConfig, world: int) -> dict[str, Any]:
    Path(made.run_dir).mkdir(parents=True)
    if world == 1:
        return worker.run(config.to_json(made))
    return run_ranks(worker.run, world, config.to_json(made))[0]


def weights(made: RunConfig, which: str = "last") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(made.run_dir) / "checkpoints" / which / "model.safetensors")


def rows(made: RunConfig, event: str) -> list[dict[str, Any]]:
    lines = (Path(made.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


ROUNDING = 2**-23 * (2 * 20) * 4608**0.5 * 2048**0.5
"""How far rounding may move a weight, as a share of the largest move: two ranks add in another order than one, and each
processor in its own. A sum of n terms is off by about sqrt(n) eps, and ResNet-18 passes 20 layers forward and backward,
whose longest sums have 512 * 9 terms. The gradient of the first BatchNorm's bias adds 8 * 16 * 16 such values, which
cancel to the root of their number while their errors may have one sign. It comes to 1.5 %; a gradient that misses a
rank's part is off by a share of order 1."""


@pytest.mark.parametrize("name", ["full", "gradual"])
def test_two_ranks_equal_one_process_with_the_joined_batch(photos: Path, tmp_path: Path, name: str) -> None:
    """fp32, ten steps: every weight within what rounding explains; for gradual, across a phase boundary."""
    strategy = StrategyConfig(name=name)  # type: ignore[arg-type]
    one, two = (settings(photos, tmp_path / str(n), strategy=strategy) for n in (1, 2))
    alone, together = train(one, 1), train(two, 2)
    assert (alone["engine"], together["engine"]) == ("single", "ddp")
    start = backbones.build(one.model, 2, 32, 0).torchvision_state()
    ended, other = weights(one), weights(two)
    moved = max((value.double() - start[key].double()).abs().max().item() for key, value in ended.items())
    assert moved > 1e-3  # the weights went somewhere
    for key, value in ended.items():
        torch.testing.assert_close(other[key], value, rtol=0, atol=ROUNDING * moved, msg=lambda m, k=key: f"{k}: {m}")
    assert [r["loss"] for r in rows(two, "train")] == pytest.approx([r["loss"] for r in rows(one, "train")], abs=1e-4)
    assert together["val_top1"] == alone["val_top1"]


def test_gradual_unfreezing_on_two_ranks_keeps_replicas_equal(photos: Path, tmp_path: Path) -> None:
    """All six phases, with everything on that moves: BatchNorm in train mode, AdamW, Mixup, bf16."""
    made = settings(
        photos,
        tmp_path / "run",
        strategy=StrategyConfig(name="gradual"),
        optim=OptimConfig(name="adamw", base_lr=1e-3),
        train=TrainConfig(epochs=6, precision="bf16"),
    )
    made = replace(made, data=replace(made.data, mixup=0.2, cutmix=1.0))
    summary = train(made, 2)
    assert summary["phases"] == 6
    assert summary["replica_spread"] == 0.0
    assert [r["replica_spread"] for r in rows(made, "eval")] == [0.0] * 6
    counts = [r["trainable_params"] for r in rows(made, "phase")]
    assert counts == sorted(counts)
    assert counts[-1] == summary["total_params"]


@pytest.mark.parametrize(("name", "world"), [("feature_extraction", 1), ("partial", 1), ("partial", 3)])
def test_frozen_stages_end_bit_identical(photos: Path, tmp_path: Path, name: str, world: int) -> None:
    """BatchNorm's buffers included, though the trainable stages' BatchNorm is in train mode.

    On three ranks too: the mean of three equal numbers need not be the number, so frozen statistics are not averaged.
    """
    made = settings(
        photos,
        tmp_path / "run",
        strategy=StrategyConfig(name=name),  # type: ignore[arg-type]
        train=TrainConfig(epochs=2, precision="bf16"),
    )
    if world == 3:
        made = replace(made, data=replace(made.data, batch_size=9))
        # Statistics of a fresh network are 0 and 1, which average exactly: give them values.
        path = tmp_path / "source.safetensors"
        source = backbones.build(made.model, 5, 32, 0)
        for name_, buffer in source.named_buffers():
            if name_.endswith(("mean", "var")):
                buffer.uniform_(0.1, 0.9)
        safetensors.torch.save_file(source.torchvision_state(), path)
        made = replace(made, model=replace(made.model, weights=str(path)))
    train(made, world)
    start, end = backbones.build(made.model, 2, 32, 0).torchvision_state(), weights(made)
    live = ("fc.",) if name == "feature_extraction" else ("fc.", "layer4.")
    moved = {key for key, value in start.items() if not torch.equal(end[key], value)}
    assert all(key.startswith(live) for key in moved)
    assert {"fc.weight", "fc.bias"} <= moved
    assert ("layer4.1.bn2.running_mean" in moved) == (name == "partial")


def _left_out_of_the_reducer() -> str:
    """What other tools do: unfreeze under a live DDP. The new parameters get gradients that nobody averages."""
    dist.init(CPU)
    stages = backbones.stage_names("resnet18")
    model = backbones.build(ModelConfig(weights="none"), 2, 32, 0)
    head = Phase("head", 1, (("head", 1.0),))
    both = Phase("two", 1, (("layer4", 1.0), ("head", 1.0)))
    freeze(model, head)
    _, network = model.cut(stages.index("layer4"))
    network.eval()
    objective = Supervised(network, 0.0)
    stale = DDPEngine(objective, head, OptimConfig(), numerics("fp32", CPU)).module
    freeze(model, both)

    class Faulty(DDPEngine):
        def wrap(self, objective: Any) -> Any:
            return stale

    engine = Faulty(objective, both, OptimConfig(), numerics("fp32", CPU))
    generator = torch.Generator().manual_seed(dist.rank())
    for _ in range(3):
        engine.forward_backward(torch.randn(4, 256, 2, 2, generator=generator), Targets(torch.tensor([0, 1, 0, 1])))
        engine.step(1.0)
    try:
        dist.replica_spread(model.state_dict())
    except dist.ReplicasDiverged as error:
        return str(error)
    finally:
        dist.close()
    return "nothing was noticed"


def test_parameters_left_out_of_the_reducer_are_caught_by_name() -> None:
    first, second = run_ranks(_left_out_of_the_reducer, 2)
    assert first == second
    assert "copies of 'layer4.0.conv1.weight' differ" in first


def _spread_of(name: str, value: float) -> float | str:
    dist.init(CPU)
    tensors = {"a": torch.ones(3), "flag": torch.tensor([True]), "steps": torch.tensor(4), "b": torch.ones(2, 2)}
    if dist.rank() == 1:
        tensors[name].view(-1)[-1] += value
    try:
        return dist.replica_spread(tensors)
    except dist.ReplicasDiverged as error:
        return str(error)
    finally:
        dist.close()


def test_the_check_sees_one_bit() -> None:
    assert run_ranks(_spread_of, 2, "b", 0.0) == [0.0, 0.0]
    assert all("'b' differ by up to 1.19e-07" in str(s) for s in run_ranks(_spread_of, 2, "b", 1.2e-7))


def _count_evaluated(root: str, kind: str) -> list[int]:
    dist.init(CPU)
    data = DataConfig(root=root, image_size=16, loader=kind, threads=1)  # type: ignore[arg-type]
    index = build_index(root)
    loader = open_loader(data, AugmentSpec(), 10, CPU)
    seen: list[int] = []

    def counting(batch: Batch) -> torch.Tensor:
        n = len(to_input(batch.images_NHWC, torch.float32))
        seen.append(n)
        return torch.nn.functional.one_hot(torch.arange(n) % 2, 2).float()

    plans = eval_batches(index.val, 16, 10, Worker(dist.rank(), dist.world_size()))
    numbers = numerics("fp32", CPU)
    result = evaluate(counting, loader.batches(plans), len(index.val), numbers)
    assert torch.equal(result.labels_N, torch.from_numpy(index.val.labels_N))
    dist.close()
    return [sum(seen), len(result.labels_N)]


@pytest.fixture(scope="module")
def val_153(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("val153")
    write_images(root / "train", {"ants": 1, "bees": 1}, side=16)
    write_images(root / "val", {"ants": 70, "bees": 83}, side=16)
    return root


@pytest.mark.parametrize("world", [1, 2, 3])
def test_153_validation_images_count_once_each(val_153: Path, world: int) -> None:
    kind = "dali" if world != 2 else "torchvision"
    counts = run_ranks(_count_evaluated, world, str(val_153), kind)
    assert sum(mine for mine, _ in counts) == 153
    assert {whole for _, whole in counts} == {153}


def test_plateau_unfreezing_on_two_ranks_makes_one_decision(photos: Path, tmp_path: Path) -> None:
    """The figure is gathered from both, so both end the phase together: the run ends (no rank waits for the other),
    every phase's first step finds equal replicas, and one process with the joined batch unfreezes at the same epochs.
    """
    made = settings(
        photos,
        tmp_path / "two",
        strategy=StrategyConfig(name="gradual", unfreeze="plateau", patience=1),
        train=TrainConfig(epochs=6, precision="fp32", batchnorm="eval", ema=0.9, accumulate=2, min_delta=0.05),
    )
    one = replace(made, run_dir=str(tmp_path / "one"))
    summary = train(made, 2)
    assert summary["replica_spread"] == 0.0
    phases = [(r["phase"], r["epoch"]) for r in rows(made, "phase")]
    assert len(phases) > 1
    train(one, 1)
    assert [r["val_top1"] for r in rows(made, "eval")] == [r["val_top1"] for r in rows(one, "eval")]
    assert [(r["phase"], r["epoch"]) for r in rows(one, "phase")] == phases
    for key, value in weights(one).items():
        torch.testing.assert_close(weights(made)[key], value, rtol=0, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def _normalised(world: int) -> dict[str, np.ndarray]:
    """Two training steps of a small network in double precision on this rank's part of eight images."""
    dist.init(CPU)
    torch.manual_seed(0)
    convolution, linear = torch.nn.Conv2d(3, 5, 3), torch.nn.Linear(5, 2)
    network = torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(5), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1))
    network = torch.nn.Sequential(network, torch.nn.Flatten(1), linear).double()
    images, labels = torch.randn(8, 3, 6, 6).double(), torch.arange(8) % 2
    mine = slice(dist.rank() * 8 // world, (dist.rank() + 1) * 8 // world)
    if world > 1:
        synchronise(network, CPU)
        assert not any(type(m) is torch.nn.BatchNorm2d for m in network.modules())
    wrapped = torch.nn.parallel.DistributedDataParallel(network) if world > 1 else network
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(wrapped(images[mine]), labels[mine]).backward()
        optimizer.step()
    unsynchronise(network)
    assert type(network.get_submodule("0.1")) is torch.nn.BatchNorm2d
    dist.close()
    return {name: t.numpy() for name, t in network.state_dict().items()}


def test_synchronised_batchnorm_is_the_joined_batchs() -> None:
    """Weights (so gradients too) and statistics after two steps, to rounding."""
    (alone,) = run_ranks(_normalised, 1, 1)
    for together in run_ranks(_normalised, 2, 2):
        for name, value in alone.items():
            np.testing.assert_allclose(together[name], value, rtol=1e-9, atol=1e-9, err_msg=name)


def test_a_run_with_synchronised_batchnorm_folds_and_saves_as_ever(photos: Path, tmp_path: Path) -> None:
    """Layers that were live under sync are frozen and folded in the second phase; names stay torchvision's."""
    strategy = StrategyConfig(name="by_hand", phases=("layer3=1, layer4=1, head=1, *=frozen", "head=1, *=frozen"))
    made = settings(
        photos,
        tmp_path / "sync",
        strategy=strategy,
        train=TrainConfig(epochs=2, precision="fp32", batchnorm="sync"),
    )
    summary = train(made, 2)
    assert summary["replica_spread"] == 0.0
    start, end = backbones.build(made.model, 2, 32, 0).torchvision_state(), weights(made)
    assert sorted(start) == sorted(end)
    moved = {key.split(".")[0] for key, value in start.items() if not torch.equal(end[key], value)}
    assert moved == {"layer3", "layer4", "fc"}


@pytest.mark.parametrize("kind", ["exact", "views:2"])
def test_cached_features_on_two_ranks_are_the_uncached_run(photos: Path, tmp_path: Path, kind: str) -> None:
    """Each rank fills half and reads both; batches are those of the uncached run, so weights agree in every bit."""
    data = {"augment": "none" if kind == "exact" else "basic"}
    base = settings(photos, tmp_path / "off", strategy=StrategyConfig(name="partial"))
    off = replace(base, data=replace(base.data, **data))
    cached = replace(off, run_dir=str(tmp_path / "cached"), cache=CacheConfig(features=kind))
    train(off, 2)
    summary = train(cached, 2)
    assert summary["per_phase"][0]["cache_fill_s"] > 0
    assert not (tmp_path / "cached" / "features").exists()
    for key, value in weights(off).items():
        assert torch.equal(weights(cached)[key], value), key


def _stopped_before_step(config_json: str, stop: int) -> str:
    """A run that dies on every rank."""
    real = fit.train_step

    def dying(run: Any, live: Any, step: int, *rest: Any) -> None:
        if step == stop:
            raise RuntimeError("power cut")
        real(run, live, step, *rest)

    fit.train_step = dying
    try:
        worker.run(config_json)
    except RuntimeError as error:
        return str(error)
    return "it ran to its end"


def test_two_ranks_resume_with_the_same_bits(photos: Path, tmp_path: Path) -> None:
    """BatchNorm in train mode, a moving average and Mixup; the interrupted run's second half is two other processes."""
    base = settings(
        photos,
        tmp_path / "whole",
        strategy=StrategyConfig(name="gradual"),
        train=TrainConfig(epochs=3, precision="fp32", batchnorm="train", ema=0.9),
    )
    whole = replace(base, data=replace(base.data, mixup=0.4))
    broken = replace(whole, run_dir=str(tmp_path / "broken"), checkpoint=CheckpointConfig(steps=1))
    train(whole, 2)
    Path(broken.run_dir).mkdir()
    for step in (3, 5, 12):
        assert run_ranks(_stopped_before_step, 2, config.to_json(broken), step) == ["power cut"] * 2
    summary = run_ranks(worker.run, 2, config.to_json(broken))[0]
    assert (summary["resumed_from"], summary["replica_spread"]) == ("epoch-0002-step-000002", 0.0)
    losses = [{r["step"]: r["loss"] for r in rows(made, "train")} for made in (whole, broken)]
    assert losses[0] == losses[1]
    for key, value in weights(whole).items():
        assert torch.equal(weights(broken)[key], value), key


def test_other_numbers_of_workers_go_on(photos: Path, tmp_path: Path) -> None:
    """2, then 1, then 2 workers, stopped inside epochs: the same steps over the same images, in passes of one size."""
    two = LaunchConfig(workers="1:2")
    whole = replace(settings(photos, tmp_path / "whole", train=TrainConfig(3, "fp32", batchnorm="eval")), launch=two)
    broken = replace(whole, run_dir=str(tmp_path / "broken"), checkpoint=CheckpointConfig(steps=1))
    train(whole, 2)
    Path(broken.run_dir).mkdir()
    assert run_ranks(_stopped_before_step, 2, config.to_json(broken), 3) == ["power cut"] * 2
    assert _sizes_of_passes(broken, 7) == {4}
    summary = run_ranks(worker.run, 2, config.to_json(broken))[0]
    assert (summary["resumed_from"], summary["world_size"]) == ("epoch-0001-step-000002", 2)
    for key, value in weights(whole).items():
        torch.testing.assert_close(weights(broken)[key], value, rtol=0, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    losses = [{r["step"]: r["loss"] for r in rows(made, "train")} for made in (whole, broken)]
    assert losses[0].keys() == losses[1].keys()
    assert list(losses[1].values()) == pytest.approx(list(losses[0].values()), abs=1e-5)


def _sizes_of_passes(made: RunConfig, stop: int) -> set[int]:
    """Alone, until a step: how many images went through the network at once."""
    seen: set[int] = set()
    real, part = fit.train_step, Targets.part

    def counting(targets: Targets, rows: slice) -> Targets:
        made = part(targets, rows)
        seen.add(len(made.labels_N))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Targets, "part", counting)
        assert _stopped_before_step(config.to_json(made), stop) == "power cut"
        fit.train_step = real
    return seen
