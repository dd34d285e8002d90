"""A bench's results as a page that needs neither network nor scripts: tables, charts, flags and environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import rich.table

from tldist.report import plots
from tldist.report.run_page import Cell, Fact, Page, Picture, Section, Table, render
from tldist_benchmarks.results import Result, View, print_tables

WIDE_PX = 600
"""A chart wider than half of the page has a row of its own."""


@dataclass(frozen=True)
class Shown:
    """A result, what a person sees of it, and the file of its rows."""

    result: Result
    view: View
    path: Path
    picture: Picture | None = None

    @property
    def ran(self) -> str:
        """When and on what."""
        told = "{started}, {hardware}, {cores} cores, {threads} threads".format_map(self.result.same)
        return told.replace("T", " ", 1)

    @property
    def versions(self) -> str:
        """Of what, and how often."""
        same = self.result.same
        return f"torch {same['torch']}, commit {str(same['commit'])[:8]}, {same['rounds']} rounds"


def draw(result: Result, view: View, path: Path) -> Shown:
    """With its chart, which is saved beside the rows at `path`."""
    if view.chart is None:
        return Shown(result, view, path)
    uri, width = plots.png(view.chart, path.with_suffix(".png")), plots.width_px(view.chart)
    return Shown(result, view, path, Picture(uri, f"{result.bench}: {path.stem}", width, width > WIDE_PX))


def show(result: Result, view: View, path: Path) -> None:
    """Tables to stdout; chart and page beside the rows at `path`."""
    print_tables(*view.tables)
    shown = draw(result, view, path)
    if shown.picture is not None:
        print(f"chart: {path.with_suffix('.png')}")
    print(f"page: {write(shown)}")


def write(shown: Shown) -> Path:
    """The page of one result, beside its rows."""
    same = shown.result.same
    rows = [[Cell(key, "name"), Cell(str(value))] for key, value in same.items()]
    page = Page(
        f"tldist bench {shown.result.bench}",
        shown.ran,
        "",
        [
            Fact("hardware", str(same["hardware"]), f"{same['cores']} cores, {same['threads']} threads"),
            Fact("torch", str(same["torch"])),
            Fact("commit", str(same["commit"])[:8]),
            Fact("rounds", str(same["rounds"]), "all variants take turns in each"),
        ],
        [*_sections(shown, ""), Section("Flags and environment", table=Table([], rows))],
    )
    return render(page, shown.path.with_suffix(".html"))


def write_all(found: Sequence[Shown], path: Path) -> Path:
    """One page of several results."""
    benches = list(dict.fromkeys(shown.result.bench for shown in found))
    facts = [Fact("benches", str(len(benches)), ", ".join(benches)), Fact("results", str(len(found)))]
    sections = [section for shown in found for section in _sections(shown, f"{shown.ran}; {shown.versions}")]
    return render(Page("tldist's benchmarks", "The last run of each kind.", "", facts, sections), path)


def _sections(shown: Shown, ran: str) -> list[Section]:
    """One for each table, `ran` under the first title; the chart stands under the last."""
    first, *more = shown.view.tables
    pictures = [shown.picture] if shown.picture else []
    sections = [_section(first, ran, [] if more else pictures, shown.result.bench)]
    return sections + [_section(made, "", pictures if made is more[-1] else [], shown.result.bench) for made in more]


def _section(made: rich.table.Table, ran: str, pictures: list[Picture], bench: str) -> Section:
    rows = [
        [Cell(str(cell), "number" if i else "name") for i, cell in enumerate(row)]
        for row in zip(*(column.cells for column in made.columns), strict=True)
    ]
    title = str(made.title or "results")
    text = ". ".join(part for part in (ran, str(made.caption or "")) if part)
    table = Table([str(column.header) for column in made.columns], rows)
    return Section(title if title.startswith(bench) else f"{bench}: {title}", text and f"{text}.", [], table, pictures)
