"""tldist's strategies against the lecture's plain loop and against frameworks that freeze by `requires_grad` alone.

`tldist bench strategies`, or `python -m tldist_benchmarks.strategies`; docs/benchmarks.md says how it is measured.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch._dynamo
from rich.table import Table

from tldist import dist
from tldist.config import (
    CacheConfig,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ModelName,
    OptimConfig,
    RunConfig,
    StrategyConfig,
    StrategyName,
    TrackingConfig,
    TrainConfig,
    UserError,
)
from tldist.engine.base import DTYPES
from tldist.fit import FitResult, train_epoch
from tldist.flops import count_flops
from tldist.inputs import open_inputs, to_input
from tldist.metrics import Window
from tldist.phase import begin_phase
from tldist.prefix import Prefix
from tldist.run import Run
from tldist.worker import keep_freed_memory
from tldist_benchmarks import harness, report
from tldist_benchmarks.ceiling import Ceiling
from tldist_benchmarks.harness import Measured, Series, Turn, show, synchronize
from tldist_benchmarks.plain import CLIP_NORM, LABEL_SMOOTHING, PlainProcess, PlainSpec, plain_model
from tldist_benchmarks.pool import CLASSES, Pool, build_run, draw_pool
from tldist_benchmarks.report import shown

HEAD, PARTIAL = 1, 2
"""Stages that train, counted from the output: the head; the last stage of the trunk as well."""
CACHED_STEPS = 32
"""Steps of an epoch from cached features of the whole trunk: enough of them to be measured, and to be filled."""
EPOCHS = 10
"""Of feature extraction, in a turn of `fe_cached` and in `fe_ten_epochs_vs_full`."""

TARGETS: dict[str, dict[str, float]] = {
    "resnet18": {"full_vs_lecture": 2.3},
    "resnet50": {
        "full_vs_lecture": 2.6,
        "partial_vs_lecture": 6.7,
        "fe_vs_lecture": 11.0,
        "fe_vs_frozen_fp32": 4.0,
        "partial_vs_requires_grad_only": 1.10,
        "fe_vs_requires_grad_only": 1.15,
        "prefix_vs_ceiling": 0.90,
        "partial_cached_vs_lecture": 12.0,
        "fe_cached_epoch_vs_uncached": 100.0,
        "fe_ten_epochs_vs_full": 80.0,
    },
}
"""At least so much on two CPU cores with bf16 instructions, at the default flags."""


@dataclass(frozen=True)
class Settings:
    """The flags of `tldist bench strategies`."""

    model: ModelName = "resnet50"
    image_size: int = 224
    batch_size: int = 16
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of everything but the lecture's own loops, which are fp32."""
    rounds: int = 5
    steps: int = 4
    """Steps of a variant's turn; cached feature extraction makes EPOCHS of at least CACHED_STEPS."""
    compile: Literal["on", "off"] = "on"
    """Of what tldist compiles."""
    json: str = ""
    """Also write rows, ratios and the environment to this file."""
    out: str = "benchmarks/results"
    """Folder for the CSV and the chart."""

    @property
    def images(self) -> int:
        """Of a variant's turn."""
        return self.steps * self.batch_size

    @property
    def cached_images(self) -> int:
        """Of an epoch from cached features of the whole trunk."""
        return max(self.steps, CACHED_STEPS) * self.batch_size

    def validate(self) -> None:
        """Raise UserError for what cannot be measured."""
        if self.batch_size < 2:
            raise UserError("--batch-size is 1: BatchNorm in train mode needs 2 images or more")
        if self.image_size < 32:
            raise UserError(f"--image-size is {self.image_size}: the networks need 32 or more")
        if self.model.startswith("vit") and self.image_size % 16:
            raise UserError(f"--image-size {self.image_size} does not divide into 16-pixel patches: use a multiple")
        compilers = (os.environ.get("CXX", "g++"), "c++", "clang++")
        if self.compile == "on" and not any(map(shutil.which, compilers)):
            raise UserError("--compile on needs a C++ compiler, and there is none: install g++, or use --compile off")


@dataclass(frozen=True)
class Variant:
    """Something that takes turns, and what is known of it beforehand."""

    turn: Turn
    flops_per_image: float | None = None
    compile_s: float | None = None


class Phase:
    """A tldist strategy's first phase, kept alive, and stepped by the real loop."""

    def __init__(self, run: Run) -> None:
        self.run, self.result = run, FitResult()
        self.images = len(run.index.train)
        self.live = begin_phase(run, 0, self.result.state)
        if run.config.cache.views and not self.live.inputs.cached:
            raise UserError(f"no room for cached features in {tempfile.gettempdir()}: name another folder by TMPDIR")
        while not self.live.clock.phase.images:  # the clock leaves a phase's first steps out
            self.epoch()

    def epoch(self) -> tuple[Window, float]:
        """One pass over the images: what the run's own clock counted, and the seconds of all of it."""
        before, started = self.live.clock.phase, time.perf_counter()
        train_epoch(self.run, self.live, self.result)  # ends by reading the loss: the device is done
        wall_s, after = time.perf_counter() - started, self.live.clock.phase
        self.result.state.epoch += 1
        return Window(after.images - before.images, after.seconds - before.seconds), wall_s

    def turn(self, epochs: int = 1) -> dict[str, float]:
        """So many epochs of images in memory."""
        passes = [self.epoch() for _ in range(epochs)]
        window = sum((window for window, _ in passes), Window())
        wall_s = sum(seconds for _, seconds in passes)
        return {"images_per_s": window.images_per_s, "epoch_s_per_image": wall_s / (epochs * self.images)}

    def cached_turn(self, epochs: int = 1) -> dict[str, float]:
        """Fill the cache anew, then so many epochs from it."""
        self.live.inputs.close()
        frozen, _ = self.run.model.cut(self.run.plan.cut(0))
        self.live.inputs = open_inputs(self.run, frozen, self.live.prefix)
        fill_s = self.live.inputs.fill_s
        return {"fill_s": fill_s, "fill_images_per_s": self.images / fill_s, **self.turn(epochs)}

    def close(self) -> None:
        """End it as the loop ends a phase."""
        self.live.engine.close()
        self.live.inputs.close()
        self.run.saver.close()


class Bench:
    """All variants of one model, alive at once, over the same images."""

    def __init__(self, settings: Settings, device: torch.device, folder: Path) -> None:
        self.settings, self.device, self.folder = settings, device, folder
        self.phases: list[Phase] = []
        self.processes: list[PlainProcess] = []
        self.pool: Pool = draw_pool(settings.cached_images, settings.image_size, device)
        self.variants: dict[str, Variant] = {}

    def build(self) -> None:
        """In the order of the table: baselines first."""
        autocast = None if self.settings.precision == "fp32" else DTYPES[self.settings.precision]
        stages = 10**6  # more than any model has: all
        self._add_plain("lecture_full", stages, False, None)
        self._add_plain("frozen_fp32", HEAD, False, None)
        self._add_plain("requires_grad_only_partial", PARTIAL, True, autocast)
        self._add_plain("requires_grad_only_fe", HEAD, True, autocast)
        self._add_phase("full", "full")
        self._add_phase("partial", "partial")
        frozen_trunk = self._add_phase("feature_extraction", "feature_extraction")
        self._add_phase("partial_cached", "partial", cached=True)
        self._add_phase("fe_cached", "feature_extraction", cached=True, images=self.settings.cached_images)
        self._add_prefix(frozen_trunk)
        ceiling = Ceiling(DTYPES[self.settings.precision], self.device)
        self.variants["conv_ceiling"] = Variant(ceiling.turn)

    def close(self) -> None:
        """End all phases and processes."""
        for part in (*self.phases, *self.processes):
            part.close()

    def _add_plain(self, name: str, stages: int, channels_last: bool, autocast: torch.dtype | None) -> None:
        show(f"building {name}")
        s = self.settings
        flops = count_flops([], plain_model(s.model, s.image_size, stages), s.image_size)
        spec = PlainSpec(s.model, s.image_size, stages, s.steps, s.batch_size, channels_last, autocast)
        loop = PlainProcess(spec) if self.device.type == "cpu" else spec.loop(self.pool)
        if isinstance(loop, PlainProcess):
            self.processes.append(loop)

        def turn() -> dict[str, float]:
            seconds = loop.epoch()
            return {"images_per_s": s.images / seconds, "epoch_s_per_image": seconds / s.images}

        self.variants[name] = Variant(turn, flops.total)

    def _add_phase(self, name: str, strategy: StrategyName, cached: bool = False, images: int = 0) -> Phase:
        show(f"building {name}")
        run_dir = self.folder / name
        run_dir.mkdir()
        config = run_config(self.settings, strategy, cached, run_dir)
        phase = Phase(build_run(config, self.pool, images or self.settings.images, self.device))
        self.phases.append(phase)
        epochs = EPOCHS if name == "fe_cached" else 1

        def turn() -> dict[str, float]:
            return phase.cached_turn(epochs) if cached else phase.turn(epochs)

        self.variants[name] = Variant(turn, phase.live.flops.total, phase.live.compile_s)
        return phase

    def _add_prefix(self, frozen_trunk: Phase) -> None:
        """The frozen trunk alone, as feature extraction runs it."""
        s, prefix = self.settings, frozen_trunk.live.prefix
        x = to_input(self.pool.images_NHWC[: s.batch_size], DTYPES[s.precision])

        def turn() -> dict[str, float]:
            return {"images_per_s": s.images / _seconds(prefix, x, s.steps, self.device)}

        self.variants["prefix"] = Variant(turn, frozen_trunk.live.flops.prefix, frozen_trunk.live.compile_s)


def _seconds(prefix: Prefix, x: torch.Tensor, steps: int, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(steps):
        prefix(x)
    synchronize(device)
    return time.perf_counter() - started


def run_config(settings: Settings, strategy: StrategyName, cached: bool, run_dir: Path) -> RunConfig:
    """The same optimizer, loss and pictures as the plain loop's; a line of metrics at an epoch's end alone."""
    return RunConfig(
        recipe="bench",
        run_dir=str(run_dir),
        model=ModelConfig(name=settings.model, weights="none"),
        strategy=StrategyConfig(name=strategy, trainable_stages=PARTIAL),
        data=DataConfig(
            root=str(run_dir),
            batch_size=settings.batch_size,
            image_size=settings.image_size,
            augment="none",
            loader="torchvision",
            threads=1,
        ),
        optim=OptimConfig(schedule="constant", warmup_epochs=0.0, clip_norm=CLIP_NORM),
        train=TrainConfig(precision=settings.precision, compile=settings.compile, label_smoothing=LABEL_SMOOTHING),
        cache=CacheConfig(features="exact" if cached else "off"),
        checkpoint=CheckpointConfig(minutes=0),
        tracking=TrackingConfig(wandb="disabled", log_every=10**9),
    )


# What the rounds say


def ratios(measured: Measured) -> dict[str, Series]:
    """Every ratio, round by round."""
    rate = {name: metrics["images_per_s"] for name, metrics in measured.items() if "images_per_s" in metrics}
    epoch = {name: m["epoch_s_per_image"] for name, m in measured.items() if "epoch_s_per_image" in m}
    fill_s_per_image = Series(tuple(1 / rate for rate in measured["fe_cached"]["fill_images_per_s"].values))
    ten_cached = _sum(fill_s_per_image, _times(epoch["fe_cached"], EPOCHS))
    return {
        "full_vs_lecture": rate["full"].over(rate["lecture_full"]),
        "partial_vs_lecture": rate["partial"].over(rate["lecture_full"]),
        "fe_vs_lecture": rate["feature_extraction"].over(rate["lecture_full"]),
        "fe_vs_frozen_fp32": rate["feature_extraction"].over(rate["frozen_fp32"]),
        "partial_vs_requires_grad_only": rate["partial"].over(rate["requires_grad_only_partial"]),
        "fe_vs_requires_grad_only": rate["feature_extraction"].over(rate["requires_grad_only_fe"]),
        "prefix_vs_ceiling": measured["prefix"]["tflops_per_s"].over(measured["conv_ceiling"]["tflops_per_s"]),
        "partial_cached_vs_lecture": rate["partial_cached"].over(rate["lecture_full"]),
        "fe_cached_epoch_vs_uncached": epoch["feature_extraction"].over(epoch["fe_cached"]),
        "fe_ten_epochs_vs_full": _times(epoch["lecture_full"], EPOCHS).over(ten_cached),
    }


def _times(series: Series, factor: float) -> Series:
    return Series(tuple(factor * value for value in series.values))


def _sum(one: Series, other: Series) -> Series:
    return Series(tuple(a + b for a, b in zip(one.values, other.values, strict=True)))


def with_flops(measured: Measured, variants: dict[str, Variant]) -> Measured:
    """The same, with the arithmetic done in a second wherever it is known what an image needs."""
    return {
        name: metrics
        if (flops := variants[name].flops_per_image) is None
        else {**metrics, "tflops_per_s": _times(metrics["images_per_s"], flops / 1e12)}
        for name, metrics in measured.items()
    }


def rows(measured: Measured, variants: dict[str, Variant]) -> list[dict[str, Any]]:
    """One row a variant: medians over the rounds; None where a measurement has no meaning."""
    ceiling, lecture = measured["conv_ceiling"]["tflops_per_s"], measured["lecture_full"]["images_per_s"]
    found = []
    for name, metrics in measured.items():
        rate, tflops, variant = metrics.get("images_per_s"), metrics["tflops_per_s"], variants[name]
        flops = variant.flops_per_image
        found.append(
            {
                "bench": "strategies",
                "variant": name,
                "images_per_s": rate and rate.median,
                "images_per_s_p20": rate and rate.percentile(0.2),
                "images_per_s_p80": rate and rate.percentile(0.8),
                "times_lecture": rate and rate.over(lecture).median,
                "gflops_per_image": flops and flops / 1e9,
                "tflops_per_s": tflops.median,
                "mfu": tflops.over(ceiling).median,
                "compile_s": variant.compile_s,
                "fill_s": metrics["fill_s"].median if "fill_s" in metrics else None,
                "fill_images_per_s": metrics["fill_images_per_s"].median if "fill_s" in metrics else None,
            }
        )
    return found


# What is written


def variant_table(settings: Settings, found: list[dict[str, Any]]) -> Table:
    """Rates, arithmetic, and what was paid before the first step."""
    s = settings
    title = f"{s.model}, {s.image_size} px, batch {s.batch_size}, {s.precision}, compile {s.compile}: medians of rounds"
    columns = ("images/s", "p20..p80", "x lecture", "GF/image", "TF/s", "MFU", "compile s", "fill s", "fill img/s")
    table = report.table(title, "variant", columns, "MFU: share of conv_ceiling")
    for row in found:
        spread = f"{shown(row['images_per_s_p20'])}..{shown(row['images_per_s_p80'])}" if row["images_per_s"] else ""
        keys = ("times_lecture", "gflops_per_image", "tflops_per_s", "mfu", "compile_s", "fill_s", "fill_images_per_s")
        table.add_row(row["variant"], shown(row["images_per_s"]), spread, *(shown(row[key]) for key in keys))
    return table


def draw(settings: Settings, found: list[dict[str, Any]], path: Path) -> None:
    """Bars of what trains; cached feature extraction would leave the others no width and is told in the title."""
    speeds = {row["variant"]: row["times_lecture"] for row in found if row["times_lecture"] is not None}
    del speeds["prefix"]
    fastest = speeds.pop("fe_cached")
    title = f"{settings.model}: images/s,\ntimes the lecture's loop\n(fe_cached: {fastest:,.0f})"
    report.chart(title, speeds, path)


def measure(settings: Settings, device: torch.device) -> tuple[Measured, list[dict[str, Any]]]:
    """All rounds of all variants."""
    if device.type == "cpu":
        keep_freed_memory()  # as a run's worker does
    with tempfile.TemporaryDirectory(prefix="tldist-bench-") as folder:
        bench = Bench(settings, device, Path(folder))
        try:
            bench.build()
            turns = {name: variant.turn for name, variant in bench.variants.items()}
            measured = harness.take_turns(turns, settings.rounds, show)
        finally:
            bench.close()
    measured = with_flops(measured, bench.variants)
    return measured, rows(measured, bench.variants)


def run(settings: Settings) -> None:
    """Measure, print, write. Raises UserError."""
    settings.validate()
    device = dist.local_device()
    # Where a model was compiled too often, torch would silently go on without: that must not be measured.
    with harness.worker_threads(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        measured, found = measure(settings, device)
        compared = ratios(measured)
        report.print_tables(
            variant_table(settings, found), report.ratio_table(compared, TARGETS.get(settings.model, {}))
        )
        used = {"optimizer": "adamw", "classes": CLASSES}
        facts = harness.facts(device)
        path = report.write(f"strategies-{settings.model}", settings, facts, measured, found, compared, **used)
        draw(settings, found, path.with_suffix(".png"))


def bench(words: Sequence[str]) -> int:
    """The command. Raises UserError."""
    return harness.command(words, Settings, "strategies", __doc__ or "", run)


if __name__ == "__main__":
    harness.main(bench)
