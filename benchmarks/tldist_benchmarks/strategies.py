"""tldist's strategies against the lecture's plain loop and against frameworks that freeze by `requires_grad` alone.

`tldist bench strategies`, or `python -m tldist_benchmarks.strategies`; docs/benchmarks.md says how it is measured.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch._dynamo
from matplotlib.figure import Figure
from rich.table import Table

from tldist import dist
from tldist.config import ModelName, StrategyName, UserError
from tldist.engine.base import DTYPES
from tldist.models.flops import count_flops
from tldist.models.prefix import Prefix
from tldist.report import plots
from tldist.train.inputs.inputs import to_input
from tldist.train.worker import keep_freed_memory
from tldist_benchmarks import harness, page, results
from tldist_benchmarks.ceiling import Ceiling
from tldist_benchmarks.harness import Measured, Series, Turn, show, synchronize
from tldist_benchmarks.phase import HEAD, PARTIAL, Phase, Training, check_training
from tldist_benchmarks.plain import PlainProcess, PlainSpec, plain_model
from tldist_benchmarks.pool import CLASSES, Pool, build_run, draw_pool
from tldist_benchmarks.results import Result, View, shown

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
    compile: Literal["on", "off", "graphs"] = "on"
    """Of what tldist compiles; graphs: with CUDA graphs, on a GPU."""
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
        check_training(self.model, self.image_size, self.batch_size)
        compilers = (os.environ.get("CXX", "g++"), "c++", "clang++")
        if self.compile != "off" and not any(map(shutil.which, compilers)):
            raise UserError(
                f"--compile {self.compile} needs a C++ compiler, and there is none: install g++, or use --compile off"
            )


@dataclass(frozen=True)
class Variant:
    """Something that takes turns, and what is known of it beforehand."""

    turn: Turn
    flops_per_image: float | None = None
    compile_s: float | None = None


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
        s = self.settings
        training = Training(s.model, s.image_size, s.batch_size, s.precision, s.compile, strategy, cached)
        phase = Phase(build_run(training.config(run_dir), self.pool, images or s.images, self.device))
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

        self.variants["prefix"] = Variant(turn, frozen_trunk.live.flops.prefix, frozen_trunk.live.prefix_compile_s)


def _seconds(prefix: Prefix, x: torch.Tensor, steps: int, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(steps):
        prefix(x)
    synchronize(device)
    return time.perf_counter() - started


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


def with_work(measured: Measured, variants: dict[str, Variant]) -> Measured:
    """The same, with the arithmetic done in a second where it is known what an image needs, and the compile time."""
    found = {}
    for name, metrics in measured.items():
        flops, compile_s = variants[name].flops_per_image, variants[name].compile_s
        more = {} if flops is None else {"tflops_per_s": _times(metrics["images_per_s"], flops / 1e12)}
        more |= {} if compile_s is None else {"compile_s": Series((compile_s,))}
        found[name] = metrics | more
    return found


def rows(measured: Measured) -> list[dict[str, Any]]:
    """One row a variant: medians over the rounds; None where a measurement has no meaning."""
    ceiling, lecture = measured["conv_ceiling"]["tflops_per_s"], measured["lecture_full"]["images_per_s"]
    found = []
    for name, metrics in measured.items():
        rate, tflops = metrics.get("images_per_s"), metrics["tflops_per_s"]
        once = {key: metrics[key].median if key in metrics else None for key in ONCE}
        found.append(
            {
                "bench": "strategies",
                "variant": name,
                "images_per_s": rate and rate.median,
                "images_per_s_p20": rate and rate.percentile(0.2),
                "images_per_s_p80": rate and rate.percentile(0.8),
                "times_lecture": rate and rate.over(lecture).median,
                "gflops_per_image": rate and tflops.over(rate).median * 1e3,
                "tflops_per_s": tflops.median,
                "mfu": tflops.over(ceiling).median,
                **once,
            }
        )
    return found


ONCE = ("compile_s", "fill_s", "fill_images_per_s")
"""Paid before the first step."""


# What is shown


def view(result: Result) -> View:
    """Rates and ratios, and bars of what trains."""
    found = rows(result.variants)
    targets = TARGETS.get(result.same["model"], {}) if at_defaults(result.same) else {}
    tables = (variant_table(result.same, found), results.ratio_table(result.ratios, targets))
    return View(tables, chart(str(result.same["model"]), found))


def at_defaults(same: Mapping[str, Any]) -> bool:
    """Was it measured as the targets ask for?"""
    names = ("image_size", "batch_size", "precision", "compile")
    return all(str(same[name]) == str(getattr(Settings, name)) for name in names)


def variant_table(same: Mapping[str, Any], found: list[dict[str, Any]]) -> Table:
    """Rates, arithmetic, and what was paid before the first step."""
    flags = "{model}, {image_size} px, batch {batch_size}, {precision}, compile {compile}".format_map(same)
    columns = ("images/s", "p20..p80", "x lecture", "GF/image", "TF/s", "MFU", "compile s", "fill s", "fill img/s")
    table = results.table(f"{flags}: medians of rounds", "variant", columns, "MFU: share of conv_ceiling")
    for row in found:
        spread = f"{shown(row['images_per_s_p20'])}..{shown(row['images_per_s_p80'])}" if row["images_per_s"] else ""
        keys = ("times_lecture", "gflops_per_image", "tflops_per_s", "mfu", *ONCE)
        table.add_row(row["variant"], shown(row["images_per_s"]), spread, *(shown(row[key]) for key in keys))
    return table


def chart(model: str, found: list[dict[str, Any]]) -> Figure | None:
    """Cached feature extraction would leave the others no width and is told in the title."""
    speeds = {row["variant"]: row["times_lecture"] for row in found if row["times_lecture"] is not None}
    del speeds["prefix"]
    fastest = speeds.pop("fe_cached")
    title = f"{model}: images/s,\ntimes the lecture's loop\n(fe_cached: {fastest:,.0f})"
    return plots.bars(title, speeds, shown)


def measure(settings: Settings, device: torch.device) -> Measured:
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
    measured = with_work(measured, bench.variants)
    return {**measured, results.RATIOS: ratios(measured)}


def run(settings: Settings) -> None:
    """Measure, print, write. Raises UserError."""
    settings.validate()
    device = dist.local_device()
    # Where a model was compiled too often, torch would silently go on without: that must not be measured.
    with harness.worker_threads(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        measured = measure(settings, device)
        used = {"optimizer": "adamw", "classes": CLASSES}
        result, path = results.write(f"strategies-{settings.model}", settings, harness.facts(device), measured, **used)
        results.write_json(settings.json, result, rows(result.variants))
        page.show(result, view(result), path)


def bench(words: Sequence[str]) -> int:
    """The command. Raises UserError."""
    return harness.command(words, Settings, "strategies", __doc__ or "", run)


if __name__ == "__main__":
    harness.main(bench)
