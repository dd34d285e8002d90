"""How numbers are written for people, the same in the terminal and in the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MISSING = "-"


def number(row: Mapping[str, Any], key: str) -> float | None:
    """The number under `key`; None where it is absent, null or something else (a row is never trusted)."""
    value = row.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return None


def whole(row: Mapping[str, Any], key: str) -> int | None:
    """The whole number under `key`, or None."""
    value = number(row, key)
    return int(value) if value is not None and math.isfinite(value) else None


def count(value: float | None) -> str:
    """8400000 -> `8.40 M`: three figures, for parameters."""
    if value is None or not math.isfinite(value):
        return MISSING
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        # 999.5 of a unit would round to 1000 of it: it is 1.00 of the next.
        if abs(value) >= 0.9995 * size and not (unit == "k" and abs(value) < 1e4):
            return f"{_three_figures(value / size)} {unit}"
    return f"{value:.0f}"


def rate(value: float | None) -> str:
    """Images or TFLOPs per second, GFLOPs per image: with as many digits as mean something."""
    if value is None:
        return MISSING
    return f"{value:.0f}" if not math.isfinite(value) or abs(value) >= 100 else f"{value:.3g}"


def percent(share: float | None, digits: int = 0) -> str:
    """0.02 -> `2 %`."""
    return MISSING if share is None else f"{100 * share:.{digits}f} %"


def seconds(value: float | None) -> str:
    """12.34 -> `12.3 s`: what a phase pays once."""
    return MISSING if value is None else f"{value:.1f} s"


def mfu(row: Mapping[str, Any]) -> str:
    """A summary's `41.2 %`, and of which peak where that is not a data sheet's."""
    share = number(row, "mfu")
    is_plain = share is None or _peak_source(row) == "table"
    return percent(share, 1) if is_plain else f"{percent(share, 1)} {peak(row)}"


def peak(row: Mapping[str, Any]) -> str:
    """What a summary's MFU is a share of."""
    named = {"table": "of the data sheet's peak", "measured": "of the measured conv peak"}
    return named.get(_peak_source(row), "of a peak that is not on record")


def _peak_source(row: Mapping[str, Any]) -> str:
    known = row.get("peak_flops")
    return str(known.get("source")) if isinstance(known, dict) else ""


def fraction(value: float | None) -> str:
    """0.7123 -> `0.712`; a loss that is no longer a number says so."""
    return MISSING if value is None else f"{value:.3f}"


def duration(seconds: float | None) -> str:
    """62 -> `1:02`, 3723 -> `1:02:03`."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def spread(value: float | None, world_size: int | None) -> str:
    """The largest difference between the workers' weights: anything above 0 is a fault."""
    if value is None:
        return MISSING
    if value == 0:
        return "0 (one worker)" if world_size == 1 else "0 (identical)"
    return f"{value:.1e} (workers differ)"


def gib(value: float | None) -> str:
    """1.234 -> `1.23 GiB`."""
    return MISSING if value is None else f"{value:.2f} GiB"


def workers(engine: object, world_size: int | None) -> str:
    """`ddp, 2 workers`."""
    name = str(engine or MISSING)
    if world_size is None:
        return name
    return f"{name}, {world_size} worker{'' if world_size == 1 else 's'}"


def _three_figures(value: float) -> str:
    return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}"
