"""The figures of a study's report, in the look of all others; each function returns None with nothing to draw."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tldist.report.plots import (
    DASHES,
    INK,
    MUTED,
    PALETTE,
    PANEL_IN,
    legend_below,
    log_numbers,
    look,
    panel,
    printable,
    share,
)
from tldist.study.log import Metric
from tldist.study.statistics import Mean, frontier

MOST_CURVES = 10
NAMED_POINTS = 10
TALL_IN = (1.12 * PANEL_IN[0], 1.3 * PANEL_IN[1])


def pareto(arms: Mapping[str, tuple[Mean, Mean]], metric: Metric, cost: str) -> Figure | None:
    """Each arm's (cost, value) with its 95 % interval; those that no other beats in both are joined and named."""
    if not arms:
        return None
    points = {name: (spent.mean, value.mean) for name, (spent, value) in arms.items()}
    best = frontier(points, metric.lower_is_better)
    with look():
        figure = Figure(figsize=TALL_IN, layout="constrained")
        axes = figure.subplots()
        axes.set_title(f"{metric.heading} against cost")
        axes.plot(*zip(*(points[name] for name in best), strict=True), color=PALETTE[0], linewidth=1, zorder=1)
        for i, (name, (spent, value)) in enumerate(arms.items()):
            colour = PALETTE[0] if name in best else "#9aa5b1"
            axes.errorbar(spent.mean, value.mean, value.half or 0.0, fmt="o", color=colour, capsize=3, markersize=6)
            if name in best or len(arms) <= NAMED_POINTS:
                place = (7, 5 if i % 2 == 0 else -12)  # neighbours' names above and below
                ink = INK if name in best else MUTED
                axes.annotate(
                    printable(name), points[name], xytext=place, textcoords="offset points", fontsize=8.5, color=ink
                )
        costs = [spent for spent, _ in points.values()]
        if max(costs) > 10 * min(costs) > 0:
            axes.set_xscale("log")
            log_numbers(axes.xaxis, costs)
        axes.margins(x=0.25, y=0.15)
        axes.set_xlabel(f"{cost} per run")
        if metric.written(0.5).endswith("%"):
            axes.yaxis.set_major_formatter(share)
    return figure


def curves(arms: Mapping[str, Sequence[Sequence[float]]]) -> Figure | None:
    """Validation top-1 by epoch: each arm's mean over its seeds, and the range between its lowest and highest."""
    known = {name: [run for run in runs if run] for name, runs in arms.items()}
    known = dict(list({name: runs for name, runs in known.items() if runs}.items())[:MOST_CURVES])
    if not known:
        return None
    with look():
        figure, axes = panel("Validation top-1")
        figure.set_size_inches(*TALL_IN)
        for i, (name, runs) in enumerate(known.items()):
            by_epoch = list(zip(*runs, strict=False))  # as far as all seeds came
            epochs = range(1, len(by_epoch) + 1)
            colour, dash = PALETTE[i % len(PALETTE)], DASHES[i // len(PALETTE) % len(DASHES)]
            means = [statistics.fmean(values) for values in by_epoch]
            axes.plot(epochs, means, color=colour, linestyle=dash, label=printable(name))
            axes.fill_between(epochs, *_range(by_epoch), color=colour, alpha=0.13, linewidth=0)
        axes.yaxis.set_major_formatter(share)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        legend_below(figure, axes, columns=2 if max(map(len, known)) > 24 else 3)
    return figure


def _range(by_epoch: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [min(values) for values in by_epoch], [max(values) for values in by_epoch]


def tried(values: Mapping[str, Sequence[tuple[float, float, bool]]], metric: Metric) -> Figure | None:
    """Of a search: the metric over each range that was searched, as (value, metric, was it given up early?)."""
    known = {axis: [p for p in points if math.isfinite(p[1])] for axis, points in values.items()}
    known = {axis: points for axis, points in known.items() if points}
    if not known:
        return None
    with look():
        figure = Figure(figsize=(TALL_IN[0], 0.85 * PANEL_IN[1] * len(known)), layout="constrained")
        panels = figure.subplots(len(known), 1, squeeze=False).flat
        for axes, (axis, points) in zip(panels, known.items(), strict=False):
            for early, colour, label in ((False, PALETTE[0], "to the end"), (True, "#9aa5b1", "given up early")):
                shown = [(x, y) for x, y, was_early in points if was_early == early]
                axes.plot([x for x, _ in shown], [y for _, y in shown], "o", color=colour, label=label)
            xs = [x for x, _, _ in points]
            if max(xs) > 20 * min(xs) > 0:
                axes.set_xscale("log")
                log_numbers(axes.xaxis, xs)
            axes.set_xlabel(printable(axis))
            axes.set_ylabel(metric.heading)
            if metric.written(0.5).endswith("%"):
                axes.yaxis.set_major_formatter(share)
        legend_below(figure, figure.axes[0], columns=2)
    return figure
