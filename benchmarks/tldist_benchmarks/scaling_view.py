"""What the scaling bench's figures say: efficiency, time in all-reduce, the cost model's error and extrapolation."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.table import Table

from tldist.report import plots
from tldist_benchmarks import results
from tldist_benchmarks.cost_model import AllReduce, Link, Work, all_reduce_s, fit_link, step_s
from tldist_benchmarks.harness import Series
from tldist_benchmarks.results import Result, View, shown

EXTRAPOLATED = (1, 8, 64, 512)
"""GPUs."""


def name(strategy: str, workers: int) -> str:
    """A variant's."""
    return f"{strategy} x{workers}"


@dataclass(frozen=True)
class Scaling:
    """A result, read."""

    result: Result

    @property
    def cases(self) -> list[tuple[str, int]]:
        """Strategy and workers of every variant, in order."""
        split = (variant.rpartition(" x") for variant in self.result.variants)
        return sorted(((strategy, int(n)) for strategy, _, n in split), key=lambda case: self._order(case))

    def _order(self, case: tuple[str, int]) -> tuple[int, int]:
        ones = [variant for variant in self.result.variants if variant.endswith(" x1")]
        return ones.index(name(case[0], 1)), case[1]

    @property
    def strategies(self) -> list[str]:
        """In order."""
        return list(dict.fromkeys(strategy for strategy, _ in self.cases))

    def series(self, strategy: str, workers: int, metric: str) -> Series:
        """Its rounds."""
        return self.result.measured[name(strategy, workers)][metric]

    def flag(self, key: str) -> float:
        """A number that stands in every row."""
        return float(self.result.same[key])

    @property
    def is_weak(self) -> bool:
        """Does each worker keep its images however many there are?"""
        return self.result.same["scaling"] == "weak"

    def images(self, workers: int) -> float:
        """Of a step, over all workers."""
        return self.flag("batch_size") * (workers if self.is_weak else 1)

    def efficiency(self, strategy: str, workers: int, metric: str = "step_ms") -> Series:
        """Round by round. Weak: step time of one worker over that of N. Strong: that, over N."""
        alone = "cpu_ms" if metric == "cpu_ms" else "step_ms"
        ratio = self.series(strategy, 1, alone).over(self.series(strategy, workers, metric))
        return ratio if self.is_weak else Series(tuple(value / workers for value in ratio.values))

    def work(self, strategy: str, workers: int = 1) -> Work:
        """Of one of so many workers, from the step of one alone."""
        compute_s = self.series(strategy, 1, "step_ms").median / 1e3 / (1 if self.is_weak else workers)
        return Work(compute_s, compute_s * self.backward_share(strategy), self.reduced_bytes(strategy))

    def reduced_bytes(self, strategy: str) -> float:
        """Of what trains."""
        return 1e6 * self.series(strategy, 1, "reduced_mb").median

    def gflops(self, strategy: str, *parts: str) -> float:
        """Of an image."""
        return sum(self.series(strategy, 1, f"{part}_gflops").median for part in parts)

    def backward_share(self, strategy: str) -> float:
        """Of a step's arithmetic."""
        return self.gflops(strategy, "backward") / self.gflops(strategy, "prefix", "forward", "backward")

    @property
    def per_machine(self) -> int:
        """Workers on one machine, at most."""
        return int(self.flag("most_workers") / self.flag("machines"))

    def link(self, workers: int) -> Link:
        """Fitted to the all-reduces that were measured alone, by groups as far apart: on one machine, or on several."""
        apart = workers > self.per_machine
        alike = [
            AllReduce(w.reduced_bytes, w.buckets, n, self.series(strategy, n, "all_reduce_ms").median / 1e3)
            for strategy, n in self.cases
            if n > 1 and (n > self.per_machine) == apart
            for w in (self.work(strategy),)
        ]
        return fit_link(alike, hides=self.result.same["device"] == "cuda")


def points(result: Result) -> list[dict[str, Any]]:
    """One row per strategy and number of workers; what one worker has none of is None."""
    s, found = Scaling(result), []
    for strategy, n in s.cases:
        step, efficiency = s.series(strategy, n, "step_ms"), s.efficiency(strategy, n)
        predicted_ms = 1e3 * (step_s(s.work(strategy, n), n, s.link(n)) if n > 1 else s.work(strategy).compute_s)
        found.append(
            {
                "bench": "scaling",
                "strategy": strategy,
                "workers": n,
                "step_ms": step.median,
                "step_ms_p20": step.percentile(0.2),
                "step_ms_p80": step.percentile(0.8),
                "images_per_s": s.images(n) / step.median * 1e3,
                "efficiency": efficiency.median,
                "efficiency_p20": efficiency.percentile(0.2),
                "efficiency_p80": efficiency.percentile(0.8),
                "cpu_ms": s.series(strategy, n, "cpu_ms").median,
                "cpu_efficiency": s.efficiency(strategy, n, "cpu_ms").median,
                **_all_reduce(s, strategy, n),
                "model_ms": predicted_ms,
                "model_efficiency": s.work(strategy).compute_s * 1e3 / predicted_ms / (1 if s.is_weak else n),
                "model_error": predicted_ms / step.median - 1 if n > 1 else None,
            }
        )
    return found


def _all_reduce(s: Scaling, strategy: str, n: int) -> dict[str, float | None]:
    """What the step takes longer for it, what it takes alone, and what the workers lose without it."""
    megabytes = s.reduced_bytes(strategy) / 1e6
    if n == 1:
        return dict.fromkeys(("apart_efficiency", "in_step_ms", "alone_ms"), None) | {"reduced_mb": megabytes}
    step, apart = s.series(strategy, n, "step_ms"), s.series(strategy, n, "apart_ms")
    in_step = Series(tuple(a - b for a, b in zip(step.values, apart.values, strict=True)))
    return {
        "apart_efficiency": s.efficiency(strategy, n, "apart_ms").median,
        "in_step_ms": in_step.median,
        "in_step_ms_p20": in_step.percentile(0.2),
        "in_step_ms_p80": in_step.percentile(0.8),
        "alone_ms": s.series(strategy, n, "all_reduce_ms").median,
        "reduced_mb": megabytes,
    }


def gpu_work(s: Scaling, strategy: str) -> Work:
    """Of one GPU: as measured, where the bench ran on GPUs; else its arithmetic at the assumed rate."""
    if s.result.same["device"] == "cuda":
        return s.work(strategy)
    gflops = s.gflops(strategy, "prefix", "forward", "backward") * s.flag("gpu_batch_size")
    compute_s = gflops / 1e3 / s.flag("gpu_tflops")
    return Work(compute_s, compute_s * s.backward_share(strategy), s.reduced_bytes(strategy))


def gpu_link(s: Scaling, gpus: int) -> Link:
    """The assumed one: inside a node, where one holds them all, or between nodes."""
    inside = gpus <= s.flag("gpus_per_node")
    gb_per_s = s.flag("node_gb_per_s" if inside else "network_gb_per_s")
    return Link(gb_per_s * 1e9, 0.0 if inside else s.flag("network_latency_us") / 1e6, hides=True)


def extrapolated(result: Result) -> list[dict[str, Any]]:
    """Weak scaling to many GPUs, by the model alone."""
    s, found = Scaling(result), []
    images = s.flag("batch_size" if result.same["device"] == "cuda" else "gpu_batch_size")
    for strategy in s.strategies:
        for gpus in EXTRAPOLATED:
            work, link = gpu_work(s, strategy), gpu_link(s, gpus)
            seconds = step_s(work, gpus, link)
            found.append(
                {
                    "strategy": strategy,
                    "gpus": gpus,
                    "step_ms": 1e3 * seconds,
                    "images_per_s": gpus * images / seconds,
                    "efficiency": work.compute_s / seconds,
                    "all_reduce_ms": 1e3 * all_reduce_s(work.reduced_bytes, work.buckets, gpus, link),
                    "reduced_mb": work.reduced_bytes / 1e6,
                }
            )
    return found


def assumptions(result: Result) -> str:
    """What the extrapolation takes for granted, in words."""
    same = result.same
    if same["device"] == "cuda":
        rate = "step of one GPU as measured here ({hardware}, {batch_size} images)"
    else:
        rate = "every GPU sustains {gpu_tflops} TFLOP/s on {gpu_batch_size} images, whatever trains"
    links = (
        "all-reduce in fp32 at {node_gb_per_s} GB/s in a node of {gpus_per_node} and {network_gb_per_s} GB/s between "
        "nodes (bus bandwidth), {network_latency_us} us a hop"
    )
    rest = "all of it but the last bucket hides behind the backward pass; no stragglers; data never waits"
    return f"{rate}; {links}; {rest}".format_map(same)


# What is shown


def view(result: Result) -> View:
    """Measured points beside the model, and what it makes of many GPUs."""
    found, far = points(result), extrapolated(result)
    return View((measured_table(result, found), extrapolated_table(result, far)), chart(result, found, far))


def measured_table(result: Result, found: Sequence[Mapping[str, Any]]) -> Table:
    """A row per strategy and number of workers."""
    same = result.same
    images = "{batch_size} images on each worker" if same["scaling"] == "weak" else "{batch_size} images in all"
    flags = "{model}, {image_size} px, {scaling} scaling: " + images + ", {threads} threads each, {precision}"
    columns = ("workers", "step ms", "images/s", "efficiency", "p20..p80", "by CPU time", "apart")
    columns += ("in step ms", "alone ms", "MB", "model ms", "error")
    table = results.table(flags.format_map(same), "strategy", columns, _caption(Scaling(result)))
    for row in found:
        efficient = f"{row['efficiency_p20']:.3f}..{row['efficiency_p80']:.3f}" if row["workers"] > 1 else ""
        cpu = f"{row['cpu_efficiency']:.3f}" if row["workers"] > 1 else ""
        apart, error = row["apart_efficiency"], row["model_error"]
        table.add_row(
            *(row["strategy"], str(row["workers"]), shown(row["step_ms"]), shown(row["images_per_s"])),
            *(f"{row['efficiency']:.3f}", efficient, cpu, "" if apart is None else f"{apart:.3f}"),
            *(shown(row[key]) for key in ("in_step_ms", "alone_ms", "reduced_mb", "model_ms")),
            "" if error is None else f"{100 * error:+.1f} %",
        )
    return table


def _caption(s: Scaling) -> str:
    groups = [n for n in dict.fromkeys((s.per_machine, int(s.flag("most_workers")))) if n > 1]
    fitted = [
        f"{'on one machine' if n <= s.per_machine else 'between machines'} {s.link(n).bytes_per_s / 1e9:.2f} GB/s and "
        f"{1e6 * s.link(n).latency_s:.0f} us a hop"
        for n in groups
    ]
    return f"model: compute of one worker, all-reduce {', '.join(fitted)} (fitted to those alone)" if fitted else ""


def extrapolated_table(result: Result, far: Sequence[Mapping[str, Any]]) -> Table:
    """A row per strategy and number of GPUs."""
    columns = ("GPUs", "step ms", "images/s", "efficiency", "all-reduce ms", "MB")
    made = results.table("model: weak scaling on GPUs, extrapolated, not measured", "strategy", columns)
    made.caption = f"assumed: {assumptions(result)}"
    for row in far:
        numbers = (shown(row["step_ms"]), f"{row['images_per_s']:,.0f}", f"{row['efficiency']:.3f}")
        made.add_row(row["strategy"], str(row["gpus"]), *numbers, shown(row["all_reduce_ms"]), shown(row["reduced_mb"]))
    return made


# The chart


def chart(result: Result, found: Sequence[Mapping[str, Any]], far: Sequence[Mapping[str, Any]]) -> Figure:
    """Efficiency: measured points beside the model's lines at the left, the model's further on at the right."""
    with mpl.rc_context(cast("Any", plots.STYLE)):
        figure = Figure(figsize=(2 * plots.PANEL_IN[0], 1.3 * plots.PANEL_IN[1]), layout="constrained")
        near, beyond = figure.subplots(1, 2)
        for i, strategy in enumerate(Scaling(result).strategies):
            colour = plots.PALETTE[i]
            rows = [row for row in found if row["strategy"] == strategy]
            _measured(near, rows, colour, 1 + 0.03 * (i - 1), strategy)
            modelled = [row["model_efficiency"] for row in rows]
            near.plot([row["workers"] for row in rows], modelled, color=colour, linestyle="--", linewidth=1.2)
            rows = [row for row in far if row["strategy"] == strategy]
            style = {"color": colour, "linestyle": "--", "marker": "s"}
            beyond.plot([row["gpus"] for row in rows], [row["efficiency"] for row in rows], **style)
        title = "{model}, {scaling} scaling, measured".format_map(result.same)
        _dress(near, title, "workers", [row["workers"] for row in found])
        _dress(beyond, "Extrapolated by the model alone", "GPUs", EXTRAPOLATED)
        near.plot([], [], color=plots.MUTED, linestyle="--", linewidth=1.2, label="model")
        near.set_ylabel("efficiency")
        figure.legend(loc="outside upper left", ncols=4)
        note = textwrap.fill(f"Assumed at the right: {assumptions(result)}.", 160)
        figure.supxlabel(note, fontsize=8, color=plots.MUTED, x=0.01, ha="left")
    return figure


def _measured(axes: Axes, rows: Sequence[Mapping[str, Any]], colour: str, shift: float, label: str) -> None:
    """Points a little beside each other, with bars from the 20th to the 80th percentile of the rounds."""
    y = [row["efficiency"] for row in rows]
    below = [row["efficiency"] - row["efficiency_p20"] for row in rows]
    above = [row["efficiency_p80"] - row["efficiency"] for row in rows]
    x = [row["workers"] * shift for row in rows]
    axes.errorbar(x, y, yerr=(below, above), fmt="o", color=colour, capsize=3, markersize=6, label=label)


def _dress(axes: Axes, title: str, xlabel: str, ticks: Sequence[int]) -> None:
    axes.set(title=title, xlabel=xlabel, xscale="log", ylim=(0, 1.1))
    axes.set_xticks(sorted(set(ticks)), [str(tick) for tick in sorted(set(ticks))])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
