"""What the benches print, write and read again: tables, charts, long-format CSV, and JSON."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from tldist.config import UserError
from tldist.tracking.console import print_whole
from tldist_benchmarks.harness import Measured, Series

RATIOS = "ratios"
"""Stands for a variant in rows that hold ratios between variants."""


@dataclass(frozen=True)
class Result:
    """One run of a bench: what stands in each of its rows, and what was measured."""

    same: Mapping[str, Any]
    """Commit, hardware, versions, flags; text where it was read from a CSV."""
    measured: Measured

    @property
    def bench(self) -> str:
        """Which one it is."""
        return str(self.same["bench"])

    @property
    def ratios(self) -> dict[str, Series]:
        """Those between variants, by name."""
        return self.measured.get(RATIOS, {})

    @property
    def variants(self) -> Measured:
        """Without the ratios."""
        return {name: metrics for name, metrics in self.measured.items() if name != RATIOS}


@dataclass(frozen=True)
class View:
    """A result as a person sees it."""

    tables: Sequence[Table]
    chart: Figure | None = None


def print_tables(*tables: Table) -> None:
    """To stdout."""
    for one in tables:
        print_whole(one)


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


# Files


def write(
    name: str, settings: Any, environment: Mapping[str, Any], measured: Measured, **constants: Any
) -> tuple[Result, Path]:
    """`OUT/NAME-DATE.csv`; returns what was written and where.

    `settings` are the bench's flags, `constants` what it measures with and no flag changes; with `environment` they
    stand in every row.
    """
    flags = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("json", "out", "data")}
    result = Result({"bench": name.split("-")[0], **environment, **flags, **constants}, measured)
    path = append_csv(Path(settings.out), f"{name}-{time.strftime('%Y-%m-%d')}", result)
    print(f"rows: {path}")
    return result, path


def write_json(path: str, result: Result, rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """Where `path` is given: the environment, a row per variant, medians of the ratios, and every round."""
    if path:
        medians = {name: series.median for name, series in result.ratios.items()}
        rounds = {v: {m: list(s.values) for m, s in metrics.items()} for v, metrics in result.measured.items()}
        told = {"environment": result.same, "rows": rows, "ratios": medians, **more, "measured": rounds}
        Path(path).write_text(json.dumps(told, indent=1) + "\n")


def append_csv(folder: Path, stem: str, result: Result) -> Path:
    """One row per variant, measurement and round, in `STEM.csv`, under those of earlier runs.

    Where that file has other columns, in `STEM-2.csv`, and so on: a table of two widths is of no use to anyone.
    """
    rows = [
        {**result.same, "variant": variant, "metric": metric, "round": number, "value": f"{value:.6g}"}
        for variant, metrics in result.measured.items()
        for metric, series in metrics.items()
        for number, value in enumerate(series.values, start=1)
    ]
    columns = list(rows[0])
    names = (stem if number == 1 else f"{stem}-{number}" for number in itertools.count(1))
    path = next(p for name in names if _header(p := folder / f"{name}.csv") in (None, columns))
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
    return path


def _header(path: Path) -> list[str] | None:
    if not path.exists():
        return None
    with path.open(newline="") as file:
        return next(csv.reader(file), [])


def read_csv(path: Path) -> list[Result]:
    """All runs in a bench's CSV, in the order of their rows. Raises UserError."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not rows or not rows[0].keys() >= _ROW or "bench" not in rows[0]:
        raise UserError(f"{path} is not a bench's CSV: it needs columns bench, {', '.join(sorted(_ROW))}")
    runs = itertools.groupby(rows, key=lambda row: {k: v for k, v in row.items() if k not in _ROW})
    return [Result(same, _measured(list(of_run), path)) for same, of_run in runs]


_ROW = {"variant", "metric", "round", "value"}


def _measured(rows: Sequence[Mapping[str, str]], path: Path) -> Measured:
    found: dict[str, dict[str, list[float]]] = {}
    try:
        for row in rows:
            found.setdefault(row["variant"], {}).setdefault(row["metric"], []).append(float(row["value"]))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} holds a value that is no number: {error}") from error
    return _as_series(found)


def _as_series(found: Mapping[str, Mapping[str, Sequence[float]]]) -> Measured:
    return {v: {m: Series(tuple(values)) for m, values in metrics.items()} for v, metrics in found.items()}


def read_json(path: Path) -> Result:
    """What `--json` wrote. Raises UserError."""
    try:
        told = json.loads(path.read_text())
        return Result(told["environment"], _as_series(told["measured"]))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not what a bench writes with --json: it lacks environment or measured") from error


def latest(runs: Sequence[Result]) -> Iterator[Result]:
    """The last run of each kind: of a bench, with the same flags, on the same hardware."""
    last = {tuple(sorted(kind(result).items())): result for result in runs}
    yield from last.values()


_CHANGES = {"started", "commit", "python", "torch", "torchvision", "rounds", "steps"}


def kind(result: Result) -> dict[str, str]:
    """What makes two runs comparable: flags and hardware, but neither versions nor how often they measured."""
    return {key: str(value) for key, value in result.same.items() if key not in _CHANGES}
