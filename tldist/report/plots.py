"""The report's figures, all in one look; every function returns None where there is nothing to draw.

Figures are built without pyplot: no window, no global list of open figures, no state left behind.
"""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from tldist.tracking.runlog import RunLog
from tldist.tracking.wording import number, whole

# Okabe and Ito (2008), "Color universal design": told apart with every common colour blindness.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
DASHES = ("-", "--", ":", "-.")
INK, MUTED, RULE = "#1f2933", "#5f6b7a", "#e4e7eb"
LABELLED_CLASSES = 30
NUMBERED_CLASSES = 12
MARKED_POINTS = 40

# 5.2 in are 500 CSS pixels: half of the report's width, and still legible scaled down to a phone.
PANEL_IN = (5.2, 3.3)
STYLE: dict[str, Any] = {
    "figure.dpi": 96,
    "savefig.dpi": 192,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called $a$
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#9aa5b1",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}


def width_px(figure: Figure) -> int:
    """The width in CSS pixels at which the figure's type has the page's size."""
    return round(96 * figure.get_figwidth())


def png(figure: Figure, path: Path) -> str:
    """Save `figure` at `path` and return the same picture as a `data:` URI."""
    buffer = io.BytesIO()
    with look():
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def loss(log: RunLog) -> Figure | None:
    """Training and validation loss."""
    return _train_and_val(log, "Loss", "loss", "val_loss")


def top1(log: RunLog) -> Figure | None:
    """Training and validation top-1."""
    figure = _train_and_val(log, "Top-1", "top1", "val_top1")
    if figure is not None:
        figure.axes[0].yaxis.set_major_formatter(share)
    return figure


def learning_rates(log: RunLog) -> Figure | None:
    """Learning rate of each stage that trains; stages that share one curve share one label."""
    curves = [(stage, _rates(log, stage)) for stage in _stages(log)]
    curves = [(stage, curve) for stage, curve in curves if any(rate > 0 for _, rate in curve)]
    if not curves:
        return None
    shared = [([stage for stage, _ in group], curve) for curve, group in groupby(curves, key=lambda item: item[1])]
    with look():
        figure, axes = panel("Learning rate per stage")
        colours = mpl.colormaps["viridis"](np.linspace(0.0, 0.85, len(shared)))
        for (stages, curve), colour in zip(shared, colours, strict=True):
            label = stages[0] if len(stages) == 1 else f"{stages[0]} to {stages[-1]}"
            axes.plot(
                [x for x, _ in curve],
                [rate or math.nan for _, rate in curve],
                color=colour,
                marker=_marker(curve),
                label=label,
            )
        _log_rates(axes, [rate for _, curve in shared for _, rate in curve if rate > 0])
        _span_of_run(axes, log)
        _phase_lines(axes, log, labels=False)
        legend_below(figure, axes, columns=3)
    return figure


def gradient_norm(log: RunLog) -> Figure | None:
    """Gradient norm before clipping: the mean between two rows, and the largest."""
    mean, largest = log.series(log.train, "grad_norm"), log.series(log.train, "grad_norm_max")
    norms = [y for y in (*mean[1], *largest[1]) if y > 0 and math.isfinite(y)]
    if not norms:
        return None
    with look():
        figure, axes = panel("Gradient norm, before clipping")
        axes.plot(*largest, color=PALETTE[5], marker=_marker(largest[0]), label="largest step")
        axes.plot(*mean, color=PALETTE[0], marker=_marker(mean[0]), label="mean")
        _log_norms(axes, norms)
        _span_of_run(axes, log)
        _phase_lines(axes, log, labels=False)
        legend_below(figure, axes, columns=2)
    return figure


def throughput(log: RunLog) -> Figure | None:
    """Images per second, and the share of the time the loop waits for data."""
    speed, waits = log.series(log.train, "images_per_s"), log.series(log.train, "data_wait_share")
    if not speed[0] and not waits[0]:
        return None
    with look():
        figure = Figure(figsize=PANEL_IN, layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        upper.set_title("Images per second")
        upper.plot(*speed, color=PALETTE[0], marker=_marker(speed[0]))
        lower.set_title("Waiting for data")
        lower.plot(*waits, color=PALETTE[1], marker=_marker(waits[0]))
        lower.yaxis.set_major_formatter(share)
        upper.set_ylim(0, 1.15 * _largest(speed[1], 1.0))
        lower.set_ylim(0, 1.15 * _largest(waits[1], 0.1))
        _span_of_run(lower, log)
        for axes in (upper, lower):
            _phase_lines(axes, log, labels=False)
    return figure


def confusion(classes: Sequence[str], matrix: object) -> Figure | None:
    """Confusion matrix, rows (true class) shaded by share; `matrix` is CC counts as nested lists."""
    counts = _square(matrix)
    if counts is None:
        return None
    size = len(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(3.3 + 0.13 * size, 6.4)
    with look():
        figure = Figure(figsize=(side + 0.7, side), layout="constrained")
        axes = figure.subplots()
        axes.set_title("Confusion matrix")
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.grid(False)
        axes.set(xlabel="predicted", ylabel="true class")
        _class_ticks(axes, [printable(name) for name in classes], size)
        if size <= NUMBERED_CLASSES:
            for (row, column), value in np.ndenumerate(counts):
                ink = "white" if shares[row, column] > 0.5 else INK
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink)
    return figure


def bars(title: str, values: Mapping[str, float], written: Callable[[float], str]) -> Figure | None:
    """One horizontal bar per name, with its value beside it."""
    known = {name: value for name, value in values.items() if math.isfinite(value)}
    if not known:
        return None
    with look():
        figure = Figure(figsize=(PANEL_IN[0], 0.9 + 0.34 * len(known)), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title)
        drawn = axes.barh(range(len(known)), list(known.values()), color=PALETTE[0], height=0.62)
        axes.bar_label(drawn, [written(value) for value in known.values()], padding=4)
        axes.set_yticks(range(len(known)), [printable(name) for name in known], color=INK)
        axes.set_xlim(0, 1.18 * _largest(list(known.values()), 1e-9))
        axes.invert_yaxis()
        axes.xaxis.set_visible(False)
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
    return figure


def validation_curves(logs: Mapping[str, RunLog]) -> Figure | None:
    """Validation top-1 of several runs; dashes tell apart what the seven colours cannot."""
    curves = {name: log.series(log.evals, "val_top1") for name, log in logs.items()}
    if not any(x for x, _ in curves.values()):
        return None
    with look():
        figure, axes = panel("Validation top-1")
        figure.set_size_inches(1.12 * PANEL_IN[0], 1.3 * PANEL_IN[1])
        for i, (name, (x, y)) in enumerate(curves.items()):
            colour, dash = PALETTE[i % len(PALETTE)], DASHES[i // len(PALETTE) % len(DASHES)]
            # A label that starts with an underscore would be left out of the legend.
            label = " " + printable(name) if name.startswith("_") else printable(name)
            axes.plot(x, y, color=colour, linestyle=dash, marker=_marker(x), label=label)
        axes.yaxis.set_major_formatter(share)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(left=0)
        axes.set_xlabel("epoch" if all(log.steps_per_epoch for log in logs.values()) else "step")
        legend_below(figure, axes, columns=3)
    return figure


def rate_range(
    rates: Sequence[float], losses: Sequence[float], smooth: Sequence[float], marks: Mapping[str, float | None]
) -> Figure:
    """Loss over the learning rate, as measured and smoothed; a vertical line at each mark that has a rate."""
    with look():
        figure, axes = panel("Learning-rate range test")
        axes.plot(rates, losses, "o", color=MUTED, alpha=0.45, markersize=3, label="one step")
        axes.plot(rates, smooth, color=PALETTE[0], label="smoothed")
        known = [(name, rate) for name, rate in marks.items() if rate is not None]
        for (name, rate), colour, dash in zip(known, PALETTE[1:], DASHES, strict=False):
            axes.axvline(rate, color=colour, linestyle=dash, label=f"{name} {rate:.2g}")
        axes.set_xscale("log")
        exponents(axes.xaxis)
        # A diverged loss would press all the rest flat.
        finite = [loss for loss in losses if math.isfinite(loss)]
        axes.set_ylim(0, min(_largest(finite, 1e-9), 1.6 * _largest(smooth, 1e-9)) * 1.05)
        axes.set(xlabel="learning rate of the head (--optim.base-lr)", ylabel="training loss")
        legend_below(figure, axes, columns=2)
    return figure


@contextmanager
def look():
    """Draw in the report's style, whatever the user's matplotlibrc says."""
    with mpl.rc_context(cast("Any", {**mpl.rcParamsDefault, **STYLE})), warnings.catch_warnings():
        # A class name in a script the font lacks shows as boxes; the warning would only alarm.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def panel(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=PANEL_IN, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def _train_and_val(log: RunLog, title: str, train_key: str, val_key: str) -> Figure | None:
    train, val = log.series(log.train, train_key), log.series(log.evals, val_key)
    if not train[0] and not val[0]:
        return None
    with look():
        figure, axes = panel(title)
        axes.plot(*train, color=PALETTE[0], marker=_marker(train[0]), label="training")
        axes.plot(*val, color=PALETTE[1], marker=_marker(val[0]) or "o", label="validation")
        _span_of_run(axes, log)
        _phase_lines(axes, log, labels=True)
        legend_below(figure, axes, columns=2)
    return figure


def share(value: float, _position: float) -> str:
    """A tick in percent; none above 100 %, where only the phases' names stand."""
    return "" if value > 1.0001 else f"{100 * value:.3g} %"


def _marker(points: Sequence[object]) -> str | None:
    return "o" if len(points) <= MARKED_POINTS else None


def _span_of_run(axes: Axes, log: RunLog) -> None:
    """The whole planned run, so that a crashed one shows how far it came."""
    axes.set_xlabel("epoch" if log.steps_per_epoch else "step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    total = number(log.run, "total_steps")
    axes.set_xlim(0, log.position(total) * 1.01 if total else None)


def _phase_lines(axes: Axes, log: RunLog, labels: bool) -> None:
    """A vertical line where each phase begins, with its name where `labels`."""
    starts = {whole(row, "phase"): row for row in log.phases}
    if 0 not in starts and log.plan:
        starts = {0: log.plan[0] | {"phase": 0, "step": 0}, **starts}
    if len(starts) < 2:
        return
    if labels:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.25 * (high - low))  # room for the names above the curves
    for phase, row in sorted(starts.items(), key=lambda item: item[0] or 0):
        x = log.position(whole(row, "step") or 0)
        if phase:
            axes.axvline(x, color="#9aa5b1", linewidth=1, linestyle=(0, (3, 2)), zorder=1)
        if labels:
            axes.annotate(
                printable(row.get("name", phase)),
                (x, 1),
                xycoords=axes.get_xaxis_transform(),
                xytext=(3, -2),
                textcoords="offset points",
                rotation=90,
                ha="left",
                va="top",
                fontsize=8,
                color=MUTED,
            )


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=columns)


def _stages(log: RunLog) -> list[str]:
    """All stages with a learning rate, from input to output where the plan tells the order."""
    planned = [stage for phase in log.plan for stage in _mapping(phase.get("stages"))]
    logged = [stage for row in log.train for stage in _mapping(row.get("lr"))]
    return list(dict.fromkeys(str(stage) for stage in planned + logged))


def _rates(log: RunLog, stage: str) -> list[tuple[float, float]]:
    """(position, rate) of every row; 0 while the stage is frozen."""
    points = []
    for row in log.train:
        rate, step = number(_mapping(row.get("lr")), stage), whole(row, "step")
        if step is not None:
            points.append((log.position(step), rate if rate and math.isfinite(rate) and rate > 0 else 0.0))
    return points


def _log_rates(axes: Axes, rates: Sequence[float]) -> None:
    """Log axis over one to four decades: a cosine ends near zero, which would flatten all the rest."""
    axes.set_yscale("log")
    top = max(rates)
    axes.set_ylim(min(max(min(rates) / 1.5, top / 1e4), top / 12), top * 1.8)
    exponents(axes.yaxis)


def _log_norms(axes: Axes, norms: Sequence[float]) -> None:
    """Log axis over a factor of four or more, with numbers where it spans no two decades."""
    axes.set_yscale("log")
    low, high = min(norms) / 1.2, max(norms) * 1.2
    middle = math.sqrt(low * high)
    axes.set_ylim(min(low, middle / 2), max(high, middle * 2))
    log_numbers(axes.yaxis, norms)


def log_numbers(axis: Axis, values: Sequence[float]) -> None:
    """Labels of a log axis over `values` (above 0): 10, 20, 50, 100 where they span no two decades, else exponents."""
    exponents(axis)
    if max(values) / min(values) < 100:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def exponents(axis: Axis) -> None:
    """1e-3 at the decades of a log axis: matplotlib's own labels need the mathtext that class names rule out."""
    axis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.0e}".replace("e-0", "e-").replace("e+0", "e")))
    axis.set_minor_formatter(lambda rate, _: "")


def _largest(values: Sequence[float], at_least: float) -> float:
    return max([value for value in values if math.isfinite(value)] + [at_least])


def _square(matrix: object) -> np.ndarray | None:
    try:
        counts = np.asarray(matrix, dtype=float)
    except (TypeError, ValueError):
        return None
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or counts.size == 0:
        return None
    return np.nan_to_num(counts)


def _class_ticks(axes: Axes, names: Sequence[str], size: int) -> None:
    if size > LABELLED_CLASSES or len(names) != size:
        axes.set_xticks([])
        axes.set_yticks([])
        return
    short = [name if len(name) <= 18 else name[:17] + "…" for name in names]
    upright = size > 4 or max(map(len, short)) > 10
    axes.set_xticks(range(size), short, rotation=90 if upright else 0, color=INK)
    axes.set_yticks(range(size), short, color=INK)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def printable(name: object) -> str:
    """A name as the font machinery takes it: file names may hold bytes that are no text."""
    text = str(name).encode("utf-8", "replace").decode()
    return "".join(letter if letter.isprintable() else "?" for letter in text)
