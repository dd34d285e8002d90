"""What the benches print and write: tables of rows and of ratios beside their targets, CSV, chart and JSON."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tldist import plots
from tldist_benchmarks import harness
from tldist_benchmarks.harness import Measured, Series

TABLE_WIDTH = 132


def print_tables(*tables: Table) -> None:
    """To stdout."""
    console = Console(width=max(Console().width, TABLE_WIDTH))  # a terminal may wrap lines; cut numbers tell nothing
    for one in tables:
        console.print(one)


def table(title: str, first: str, columns: Sequence[str], caption: str | None = None) -> Table:
    """Numbers to the right under `columns`, what they are of to the left under `first`."""
    made = Table(
        title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    made.add_column(first, no_wrap=True)
    for name in columns:
        made.add_column(name, justify="right", no_wrap=True)
    return made


def ratio_table(compared: Mapping[str, Series], targets: Mapping[str, float]) -> Table:
    """Medians of the rounds' ratios."""
    made = table("ratios: medians of the rounds' ratios", "ratio", ("median", "p20..p80", "target (2 CPU cores)"))
    for name, series in compared.items():
        target = f"at least {targets[name]:g}" if name in targets else ""
        made.add_row(name, shown(series.median), spread(series), target)
    return made


def spread(series: Series) -> str:
    """'p20..p80'."""
    return f"{shown(series.percentile(0.2))}..{shown(series.percentile(0.8))}"


def shown(value: float | None) -> str:
    """Three digits, none after the point from a hundred on and at most three there."""
    if value is None:
        return ""
    if 0 < value < 0.001:
        return "<0.001"
    return f"{value:,.0f}" if value >= 100 else f"{float(f'{value:.3g}'):.3f}".rstrip("0").rstrip(".")


def write(
    name: str,
    settings: Any,
    environment: Mapping[str, Any],
    measured: Measured,
    rows: list[dict[str, Any]],
    compared: Mapping[str, Series],
    **constants: Any,
) -> Path:
    """`OUT/NAME-DATE.csv` and, where it is wanted, the JSON; returns the former's path.

    `settings` are the bench's flags, `constants` what it measures with and no flag changes; with `environment` they
    stand in every row.
    """
    flags = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("json", "out", "data")}
    same = {"bench": name.split("-")[0], **environment, **flags, **constants}
    path = Path(settings.out) / f"{name}-{time.strftime('%Y-%m-%d')}.csv"
    harness.append_csv(path, same, {**measured, "ratios": dict(compared)} if compared else measured)
    if settings.json:
        medians = {ratio: series.median for ratio, series in compared.items()}
        told = {"environment": same, "rows": rows, "ratios": medians}
        Path(settings.json).write_text(json.dumps(told, indent=1) + "\n")
    print(f"rows: {path}")
    return path


def chart(title: str, values: Mapping[str, float], path: Path) -> None:
    """Bars."""
    figure = plots.bars(title, values, shown)
    assert figure is not None
    plots.png(figure, path)
    print(f"chart: {path}")
