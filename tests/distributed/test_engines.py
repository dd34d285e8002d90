"""Every strategy on every engine: two gloo ranks end where one process with the joined batch ends.

Each engine's runs share one pair of ranks: starting ranks and importing DeepSpeed costs seconds, a run one or two.
"""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import LONG, run_ranks

from tldist import config, dist
from tldist.checkpoints import checkpoint
from tldist.config import (
    DOMAINS,
    STRATEGIES,
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    StrategyConfig,
    TrackingConfig,
    TrainConfig,
)
from tldist.engine import build_engine, numerics
from tldist.engine.base import DTYPES, Engine, HeldBytes, Numerics
from tldist.models import backbones
from tldist.objectives.base import Targets
from tldist.objectives.supervised import Supervised
from tldist.optim import OptimizerState
from tldist.plans import Phase
from tldist.train import fit, worker
from tldist.train.phase import freeze

pytestmark = pytest.mark.usefixtures("two_domains")

CPU = torch.device("cpu")
ZERO = ("zero1", "zero2", "zero3")
FP32 = TrainConfig(epochs=3, precision="fp32", batchnorm="eval")
SGD = OptimConfig(name="sgd", base_lr=5e-3)
# Adam divides by the root of the second moment: where that is near zero a gradient's last bit becomes a step of up to
# the rate. At 1e-3 (six steps) DDP itself ends 2e-4 from a single process; at this rate 1e-5 is a third of one step.
ADAMW = OptimConfig(name="adamw", base_lr=3e-5)
BY_HAND = StrategyConfig(name="by_hand", phases=("norm=1, head=1, *=frozen",))
MIXED = DataConfig(mixup=0.4, cutmix=1.0)
DIGITS = ModelConfig(name="dann_mnist", weights="none")
TEN_STEPS = replace(FP32, epochs=5)

CASES: dict[str, dict[str, Any]] = {
    **{name: {"strategy": StrategyConfig(name=name)} for name in STRATEGIES},
    "gradual_adamw": {"strategy": StrategyConfig(name="gradual"), "optim": ADAMW},
    "full_adamw": {"strategy": StrategyConfig(name="full"), "optim": ADAMW},
    "accumulate": {"strategy": StrategyConfig(name="full"), "train": replace(FP32, accumulate=3)},
    "frozen_in_suffix": {"strategy": BY_HAND, "optim": ADAMW},
    "ema": {"strategy": StrategyConfig(name="two_phase"), "train": replace(FP32, ema=0.9)},
    "l2_sp": {"strategy": StrategyConfig(name="two_phase"), "optim": replace(SGD, l2_sp=0.5)},
    "ewc": {"strategy": StrategyConfig(name="two_phase"), "optim": replace(SGD, ewc=50.0)},
    # Ten steps on two domains, with what the objective learns by itself, at another rate.
    "dann": {
        "strategy": StrategyConfig(name="dann", align_at="fc4", discriminator_units=32, discriminator_lr=3.0),
        "model": DIGITS,
        "train": TEN_STEPS,
        "optim": replace(SGD, base_lr=0.02),
    },
    "dann_in_parts": {
        "strategy": StrategyConfig(name="dann", discriminator_units=16),
        "train": replace(FP32, accumulate=2),
    },
    "mmd": {"strategy": StrategyConfig(name="mmd", align_at="layer3"), "train": TEN_STEPS},
    # Each rank draws its own mixtures, and bf16 rounds sums over half a batch: these are compared with DDP's.
    "mixed": {"strategy": StrategyConfig(name="full"), "data": MIXED},
    "bf16": {"strategy": StrategyConfig(name="two_phase"), "train": replace(FP32, precision="bf16", epochs=2)},
}
OF_TWO = {"mixed": 1e-5, "bf16": 2e-3}
EXACT = tuple(name for name in CASES if name not in OF_TWO)
# DDP runs every case. Where there is no time for all with ZeRO too: those in which its own code has most to do.
WITH_ZERO = (
    tuple(CASES)
    if LONG
    else ("gradual", "gradual_adamw", "accumulate", "frozen_in_suffix", "ema", "ewc", "dann", "mixed", "bf16")
)


@dataclass(frozen=True)
class Ended:
    """What a run left; read when it is asked for, because thirty runs' weights are gigabytes."""

    summary: dict[str, Any]
    run_dir: Path

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return checkpoint.read_weights(self.run_dir / "checkpoints" / "last")

    @property
    def live(self) -> dict[str, torch.Tensor]:
        return checkpoint.read_live(self.run_dir / "checkpoints" / "last")

    @property
    def objective(self) -> dict[str, torch.Tensor]:
        return checkpoint.read_objective(self.run_dir / "checkpoints" / "last")

    @property
    def optimizer(self) -> OptimizerState:
        return checkpoint.read_optimizer(self.run_dir / "checkpoints" / "last")


def settings(photos: Path, run_dir: Path, kind: str, case: str) -> RunConfig:
    """Two steps an epoch, fp32, source statistics in BatchNorm."""
    sections = CASES[case]
    strategy = sections.get("strategy", StrategyConfig())
    root = photos.with_name("two_domains") if strategy.name in DOMAINS else photos
    data = replace(sections.get("data", DataConfig()), root=str(root), batch_size=20, image_size=32, threads=1)
    model = ModelConfig(weights=str(source(run_dir.parent)) if case in ("l2_sp", "ewc") else "none")
    if case == "ewc":
        sections = {**sections, "optim": replace(sections["optim"], ewc_from=(str(task(run_dir.parent)),))}
    base = RunConfig(
        run_dir=str(run_dir),
        model=model,
        optim=SGD,
        train=FP32,
        engine=EngineConfig(kind=kind),  # type: ignore[arg-type]
        tracking=TrackingConfig(wandb="disabled", log_every=2),
    )
    return replace(base, **{**sections, "data": data})


def source(folder: Path) -> Path:
    """Weights to start from, and to be pulled to."""
    path = folder / "source.safetensors"
    safetensors.torch.save_file(backbones.build(ModelConfig(weights="none"), 5, 32, 7).torchvision_state(), path)
    return path


def task(folder: Path) -> Path:
    """A checkpoint with the source's weights, each of another importance."""
    path = folder / "epoch-0001"
    if not path.exists():
        weights = safetensors.torch.load_file(source(folder))
        checkpoint.save(folder, (), checkpoint.snapshot(path.name, weights, None, checkpoint.TrainState(), {}), 1)
        made = torch.Generator().manual_seed(0)
        importances = {name: torch.rand(t.shape, generator=made) for name, t in weights.items()}
        checkpoint.add(path, "fisher.safetensors", importances, {})
    return path


def _runs(configs_json: list[str]) -> list[dict[str, Any]]:
    """One run after the other in the same process group, without reports."""
    dist.init(CPU)
    gc.freeze()  # DeepSpeed collects garbage at each ZeRO-3 start: a second a time over all that is imported
    worker.write_report = lambda *_: None  # type: ignore[assignment]
    summaries = []
    for text in configs_json:
        summaries.append(worker.run(text))
        if dist.is_main():
            keep_last(Path(config.from_json(text).run_dir) / "checkpoints")
    dist.close()
    return summaries


def keep_last(checkpoints: Path) -> None:
    for folder in checkpoints.glob("epoch-*"):
        if folder.resolve() != (checkpoints / "last").resolve():
            shutil.rmtree(folder)


def train(photos: Path, folder: Path, kinds: dict[str, str], world: int) -> dict[str, Ended]:
    """Case -> engine; all runs on `world` ranks."""
    made = {case: settings(photos, folder / case, kind, case) for case, kind in kinds.items()}
    for settings_ in made.values():
        Path(settings_.run_dir).mkdir(parents=True)
    summaries = run_ranks(_runs, world, [config.to_json(settings_) for settings_ in made.values()])[0]
    return {case: Ended(summary, folder / case) for case, summary in zip(made, summaries, strict=True)}


@pytest.fixture(scope="module")
def alone(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ended]]:
    folder = tmp_path_factory.mktemp("single")
    yield train(photos, folder, dict.fromkeys(EXACT, "single"), 1)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def ddp(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ended]]:
    folder = tmp_path_factory.mktemp("ddp")
    yield train(photos, folder, dict.fromkeys(CASES, "ddp"), 2)
    shutil.rmtree(folder)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["ddp", *ZERO])
def test_every_strategy_ends_where_one_process_ends(
    photos: Path, tmp_path: Path, alone: dict[str, Ended], ddp: dict[str, Ended], kind: str
) -> None:
    """Weights within 1e-5, moments within a share of a parameter's largest, replicas equal in every bit."""
    together = ddp if kind == "ddp" else train(photos, tmp_path, dict.fromkeys(WITH_ZERO, kind), 2)
    for case, run in together.items():
        assert (run.summary["engine"], run.summary["replica_spread"]) == (kind, 0.0), case
        if case in EXACT:
            assert_equal(run, alone[case], case)
            assert norms(run) == pytest.approx(norms(alone[case]), rel=1e-3), case
    assert together["gradual"].summary["phases"] == 3
    for case, atol in OF_TWO.items():
        ours = together[case].weights
        for key, value in ddp[case].weights.items():
            torch.testing.assert_close(ours[key], value, rtol=0, atol=atol, msg=f"{case} {key}")
    shutil.rmtree(tmp_path)


def norms(run: Ended) -> list[float]:
    rows = map(json.loads, (run.run_dir / "metrics.jsonl").read_text().splitlines())
    return [row[key] for row in rows if row["event"] == "train" for key in ("grad_norm", "grad_norm_max")]


def assert_equal(run: Ended, expected: Ended, case: str) -> None:
    pairs = ((run.weights, expected.weights), (run.live, expected.live), (run.objective, expected.objective))
    assert bool(run.objective) == case.startswith("dann")
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-5, msg=lambda m, k=key: f"{case} {k}: {m}")
    states, own = expected.optimizer, run.optimizer
    assert own.keys() == states.keys()
    for name, tensors in states.items():
        assert own[name].keys() == tensors.keys()
        for key, value in tensors.items():
            assert own[name][key].shape == value.shape
            off = (own[name][key] - value).abs().max() / value.abs().max().clamp(min=1e-12)
            assert off <= (0.0 if key == "step" else 0.05), (case, name, key, off)


CHANGES = [(("zero3", 2), ("ddp", 1)), (("ddp", 1), ("zero3", 2)), (("zero2", 2), ("single", 1))]


def _broken(config_json: str) -> list[str]:
    """Dies inside the second epoch, in the second phase."""
    real = fit.train_step

    def dying(run: Any, live: Any, step: int, *rest: Any) -> None:
        if step == 3:
            raise RuntimeError("power cut")
        real(run, live, step, *rest)

    dist.init(CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "train_step", dying)
        with pytest.raises(RuntimeError, match="power cut"):
            worker.run(config_json)
    dist.close()
    return ["power cut"]


@pytest.mark.parametrize(("before", "after"), CHANGES, ids=str)
def test_another_engine_on_other_workers_goes_on(
    photos: Path, tmp_path: Path, before: tuple[str, int], after: tuple[str, int]
) -> None:
    """Stopped inside an epoch: the next batches' losses, and the weights of the end, within 1e-5."""

    def made(name: str, kind: str) -> RunConfig:
        base = settings(photos, tmp_path / name, kind, "gradual_adamw")
        log = replace(base.tracking, log_every=1)
        return replace(base, tracking=log, checkpoint=CheckpointConfig(steps=1))

    whole, first, second = made("whole", "single"), made("run", before[0]), made("run", after[0])
    for name in ("whole", "run"):
        (tmp_path / name).mkdir()
    run_ranks(_runs, 1, [config.to_json(whole)])
    run_ranks(_broken, before[1], config.to_json(first))
    summary = run_ranks(_runs, after[1], [config.to_json(second)])[0][0]
    assert (summary["engine"], summary["resumed_from"]) == (after[0], "epoch-0001-step-000001")
    expected, ours = losses(whole), losses(second)
    assert sorted(ours) == list(range(1, 7))
    assert [ours[step] for step in (4, 5, 6)] == pytest.approx([expected[step] for step in (4, 5, 6)], abs=1e-5)
    assert_equal(Ended(summary, tmp_path / "run"), Ended(summary, tmp_path / "whole"), "changed")


def losses(made: RunConfig) -> dict[int, float]:
    rows = map(json.loads, (Path(made.run_dir) / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if row["event"] == "train"}


def test_frozen_parameters_in_the_suffix_keep_their_bits_and_have_no_state(alone: dict[str, Ended]) -> None:
    """The single process' run, which the other engines' equal."""
    start = backbones.build(ModelConfig(weights="none"), 2, 32, 0).torchvision_state()
    run = alone["frozen_in_suffix"]
    end = run.weights
    moved = {key for key, value in start.items() if not torch.equal(end[key], value)}
    assert moved
    assert not [key for key in moved if "conv" in key or "downsample.0" in key]
    assert not [name for name in run.optimizer if "conv" in name]


# Engines alone

LAST = Phase("last", 1, (("layer4", 0.5), ("head", 1.0)))
TWO = Phase("two", 1, (("layer3", 0.25), ("layer4", 0.5), ("head", 1.0)))


class Bench:
    """A ResNet-18's last stages, and the same images in every run; each rank takes its part."""

    def __init__(self, optim: OptimConfig, numbers: Numerics) -> None:
        self.optim, self.numbers = optim, numbers
        self.model = backbones.build(ModelConfig(weights="none"), 5, 32, 0).to(memory_format=torch.channels_last)
        self.images = torch.Generator().manual_seed(1)
        self.state: OptimizerState = {}

    def begin(self, kind: str, phase: Phase) -> Engine:
        freeze(self.model, phase)
        _, network = self.model.cut(backbones.stage_names("resnet18").index(next(iter(phase.stages))))
        network.eval()
        name, _, offload = kind.partition(" ")
        return build_engine(
            EngineConfig(kind=name, offload="optimizer" if offload else "none"),  # type: ignore[arg-type]
            Supervised(network, 0.1),
            phase,
            self.optim,
            self.numbers,
            self.state,
        )

    def backward(self, engine: Engine, phase: Phase, factor: float = 1.0) -> None:
        channels, side = (128, 4) if phase is TWO else (256, 2)
        x = torch.randn(8, channels, side, side, generator=self.images)
        mine = slice(dist.rank() * 8 // dist.world_size(), (dist.rank() + 1) * 8 // dist.world_size())
        engine.forward_backward(x[mine] * factor, Targets(torch.arange(8)[mine] % 5))

    def steps(self, kind: str, phase: Phase, count: int = 3) -> list[float]:
        """A whole phase; returns whether each step was left out."""
        engine = self.begin(kind, phase)
        gc.collect()  # an engine of an earlier phase, collected now, must not take anything from this one
        skipped = []
        for _ in range(count):
            self.backward(engine, phase)
            skipped.append(engine.step(1.0).skipped.item())
        self.state |= engine.optimizer_state()
        engine.close()
        return skipped


def _carried(kinds: tuple[str, ...]) -> dict[str, torch.Tensor]:
    bench = Bench(ADAMW, numerics("fp32", CPU))
    for kind, phase in zip(kinds, (LAST, TWO, TWO), strict=True):
        bench.steps(kind, phase)
    leftovers = [a for owner in (*bench.model.modules(), *bench.model.parameters()) for a in vars(owner) if "ds_" in a]
    assert not leftovers, leftovers[:5]
    assert all(type(module._parameters) is dict for module in bench.model.modules())
    return {name: p.detach().clone() for name, p in bench.model.state_dict().items()}


ROUTES = [("zero3", "ddp", "zero1"), *((f"{kind} offload", kind, f"{kind} offload") for kind in ZERO)]


def _state_travels() -> list[tuple[float, float]]:
    """Largest difference to a run that stays with DDP, and spread, of runs over several engines."""
    dist.init(CPU)
    stays, found = _carried(("ddp", "ddp", "ddp")), []
    for route in ROUTES:
        travels = _carried(route)
        difference = max((travels[name].double() - value.double()).abs().max().item() for name, value in stays.items())
        found.append((difference, dist.replica_spread(travels)))
    dist.close()
    return found


def test_the_optimizers_state_travels_between_engines() -> None:
    """Offloaded ones too, whose host memory here is where the rest is."""
    for route, (difference, spread) in zip(ROUTES, run_ranks(_state_travels, 2)[0], strict=True):
        assert difference < 1e-5, route
        assert spread == 0.0


def _not_finite(kind: str, numbers: Numerics) -> list[float]:
    """A good step, one that must change nothing (rank 0 alone sees the infinity), a good one; returns their flags."""
    bench = Bench(OptimConfig(name="adamw"), numbers)
    engine = bench.begin(kind, LAST)
    flags = []
    for factor in (1.0, float("inf") if dist.rank() == 0 else 1.0, 1.0):
        with engine.whole():
            before = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
        state = {name: {k: t.clone() for k, t in own.items()} for name, own in engine.optimizer_state().items()}
        bench.backward(engine, LAST, factor)
        flags.append(engine.step(1.0).skipped.item())
        with engine.whole():
            same = all(torch.equal(tensor, before[name]) for name, tensor in bench.model.state_dict().items())
        after = engine.optimizer_state()
        same_state = all(torch.equal(after[name][key], t) for name, own in state.items() for key, t in own.items())
        assert (same, same_state and bool(state)) == ((True, True) if flags[-1] else (False, False)), (kind, flags)
    engine.close()
    return flags


def _grad_norms() -> dict[str, list[float]]:
    """Of three steps under a clip that bites, fp32 and (as fp16 does on GPUs) scaled by 1024, which must not show."""
    dist.init(CPU)
    found, clipped = {}, replace(ADAMW, clip_norm=0.01)
    kinds = ("ddp", *ZERO, *(f"{kind} offload" for kind in ZERO))
    for kind in (*kinds, *(f"{kind} scaled" for kind in ("ddp", *ZERO))):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=kind.endswith("scaled"))
        bench = Bench(clipped, Numerics(torch.float32, CPU, scaler))
        engine = bench.begin(kind.removesuffix(" scaled"), LAST)
        found[kind] = []
        for _ in range(3):
            bench.backward(engine, LAST)
            found[kind].append(engine.step(1.0).grad_norm.item())
        engine.close()
    dist.close()
    return found


def test_every_engine_tells_the_norm_of_the_whole_gradient_before_clipping() -> None:
    first, second = run_ranks(_grad_norms, 2)
    assert first == second
    assert min(first["ddp"]) > 0.1
    for kind, found in first.items():
        assert found == pytest.approx(first["ddp"], rel=1e-4), kind


def _left_out() -> dict[str, list[float]]:
    dist.init(CPU)
    found = {}
    for kind in ZERO:
        found[kind] = _not_finite(kind, numerics("fp32", CPU))
        # What fp16 does on GPUs, with a scaler whose first scale is harmless.
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        found[f"{kind} scaled"] = _not_finite(kind, Numerics(DTYPES["bf16"], CPU, scaler))
        assert scaler.get_scale() == 512.0, "the scaler was not told of the step that was left out"
    dist.close()
    return found


def test_a_step_with_gradients_that_are_not_finite_changes_nothing() -> None:
    for found in run_ranks(_left_out, 2):
        assert found == {name: [0.0, 1.0, 0.0] for kind in ZERO for name in (kind, f"{kind} scaled")}


def _held(kind: str) -> HeldBytes:
    bench = Bench(ADAMW, numerics("fp32", CPU))
    engine = bench.begin(kind, LAST)
    bench.backward(engine, LAST)
    engine.step(1.0)  # makes the optimizer's state under DDP
    bench.backward(engine, LAST)
    held = engine.held_bytes()
    engine.close()
    return held


def _all_held() -> dict[str, HeldBytes]:
    dist.init(CPU)
    found = {kind: _held(kind) for kind in ("ddp", *ZERO)}
    dist.close()
    return found


def test_shares_are_shares() -> None:
    """Counted from the tensors of two ranks; a percent for padding, and a parameter that two shares meet in."""
    held = run_ranks(_all_held, 2)[0]
    full = held["ddp"]
    assert {kind: round(held[kind].optimizer / full.optimizer, 2) for kind in ZERO} == dict.fromkeys(ZERO, 0.5)
    assert held["zero1"].weights == pytest.approx(full.weights, rel=0.01)
    assert held["zero2"].gradients < 0.8 * full.gradients
    assert held["zero3"].weights == pytest.approx(0.5 * full.weights, rel=0.02)


def _beside(config_jsons: dict[str, str]) -> dict[str, list[int]]:
    """Bytes of optimizer state that a worker keeps besides its engine, after each epoch's checkpoint."""
    kept: dict[str, list[int]] = {kind: [] for kind in config_jsons}
    real = fit.end_epoch
    dist.init(CPU)
    for kind, config_json in config_jsons.items():

        def watching(run: Any, live: Any, result: Any, kept: list[int] = kept[kind]) -> None:
            real(run, live, result)
            kept.append(sum(t.nbytes for moments in result.state.optimizer.values() for t in moments.values()))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fit, "end_epoch", watching)
            worker.run(config_json)
    dist.close()
    return kept


def test_a_checkpoint_leaves_nothing_beside_a_share(photos: Path, tmp_path: Path) -> None:
    """Each worker kept the whole optimizer that was gathered for the first checkpoint, and ZeRO saved nothing."""
    made = {kind: settings(photos, tmp_path / kind, kind, "full_adamw") for kind in ("zero1", "zero3")}
    for config_of_kind in made.values():
        Path(config_of_kind.run_dir).mkdir(parents=True)
    for kept in run_ranks(_beside, 2, {kind: config.to_json(of_kind) for kind, of_kind in made.items()}):
        assert all(epochs and not any(epochs) for epochs in kept.values()), kept


def test_one_worker_alone_says_nothing(photos: Path, tmp_path: Path) -> None:
    """Neither DeepSpeed nor what it imports writes to the terminal, and it compiles nothing."""
    made = settings(photos, tmp_path / "run", "zero3", "feature_extraction")
    path = tmp_path / "config.yaml"
    config.save(made, path)
    (tmp_path / "run").mkdir()
    words = [sys.executable, "-m", "tldist.worker", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
