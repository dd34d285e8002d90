"""Tables and charts of all results, written into docs/benchmarks.md.

`tldist bench report` reads the CSVs, draws a chart beside each, writes a page of all of them, report.html, into their
folder, and the tables between the markers

    <!-- results of NAME -->
    <!-- end of results -->

of the document. Prose stays, and a second run changes nothing. A bench without markers gets them at the document's end.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from tldist.config import UserError
from tldist_benchmarks import engines, harness, kernels, loaders, page, results, scaling_view, strategies
from tldist_benchmarks.page import Shown
from tldist_benchmarks.results import Result, View

VIEWS: Mapping[str, Callable[[Result], View]] = {
    "strategies": strategies.view,
    "engines": engines.view,
    "scaling": scaling_view.view,
    "loaders": loaders.view,
    "kernels": kernels.view,
}
"""By what stands in a CSV's column `bench`; in this order at the document's end."""
END = "<!-- end of results -->"


@dataclass(frozen=True)
class Settings:
    """The flags of `tldist bench report`."""

    results: str = "benchmarks/results"
    """Folder of the CSVs; charts are drawn beside them, and report.html."""
    document: str = "docs/benchmarks.md"
    """What the tables are written into."""


def look(folder: Path) -> Iterator[Shown]:
    """Of every CSV the last run of each kind, newest files first; the last run of a CSV is drawn. Raises UserError."""
    for path in sorted(folder.glob("*.csv"), reverse=True):
        runs = results.read_csv(path)
        for result in results.latest(runs):
            if result.bench not in VIEWS:
                raise UserError(f"{path} is of a bench '{result.bench}' that has no view: {', '.join(VIEWS)} have")
            view = VIEWS[result.bench](result)
            yield page.draw(result, view, path) if result is runs[-1] else Shown(result, view, path)


def render(found: Sequence[Shown], document: Path) -> dict[str, str]:
    """Each bench's part of the document."""
    parts: dict[str, list[str]] = {}
    for shown in found:
        parts.setdefault(shown.result.bench, []).append(_part(shown, document))
    return {bench: "\n\n".join(texts) for bench, texts in parts.items()}


def _part(shown: Shown, document: Path) -> str:
    rows = f"{shown.ran}; {shown.versions} ([rows]({_link(shown.path, document)}))."
    lines = [rows, *map(markdown, shown.view.tables)]
    if shown.picture is not None:
        chart = _link(shown.path.with_suffix(".png"), document)
        lines.append(f'<img src="{chart}" alt="{shown.picture.alt}" width="{shown.picture.width_px}">')
    return "\n\n".join(lines)


def _link(path: Path, document: Path) -> str:
    return Path(os.path.relpath(path, document.parent)).as_posix()


def markdown(table: Table) -> str:
    """A table as Markdown, its title above and its caption below."""
    cells = [[str(cell).replace("|", "\\|") for cell in column.cells] for column in table.columns]
    heads = [str(column.header) for column in table.columns]
    lines = [f"**{table.title}**", ""] if table.title else []
    lines += [_line(heads), _line(["---" if i == 0 else "---:" for i in range(len(heads))])]
    lines += [_line(row) for row in zip(*cells, strict=True)]
    return "\n".join([*lines, "", f"{table.caption}."] if table.caption else lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def insert(text: str, bench: str, part: str) -> str:
    """`text` with `part` between the bench's markers."""
    begin = f"<!-- results of {bench} -->"
    block = f"{begin}\n{part}\n{END}"
    if begin not in text:
        return f"{text.rstrip()}\n\n## {bench}: results\n{block}\n"
    if not (found := re.search(f"{re.escape(begin)}.*?{re.escape(END)}", text, re.DOTALL)):
        raise UserError(f"the document has '{begin}' without '{END}' after it: add that")
    return text[: found.start()] + block + text[found.end() :]


def run(settings: Settings) -> None:
    """Write the document. Raises UserError."""
    folder, document = Path(settings.results), Path(settings.document)
    if not document.is_file():
        raise UserError(f"there is no document {document}: name one with --document")
    if not (found := list(look(folder))):
        raise UserError(f"there is no CSV in {folder}: run a bench first, or name its folder with --results")
    parts = render(found, document)
    text = before = document.read_text()
    for bench in VIEWS:
        if bench in parts:
            text = insert(text, bench, parts[bench])
    if text != before:
        document.write_text(text)
    order = list(VIEWS)
    found.sort(key=lambda shown: order.index(shown.result.bench))
    print(f"page: {page.write_all(found, folder / 'report.html')}")
    print(f"{'written' if text != before else 'unchanged'}: {document} ({', '.join(parts)})")


def bench(words: Sequence[str]) -> int:
    """The command. Raises UserError."""
    if {"-h", "--help"} & set(words):
        print(f"{harness.usage(Settings, 'report')}\n\n{(__doc__ or '').strip()}")
        return 0
    run(harness.parse(words, Settings, "report"))
    return 0


if __name__ == "__main__":
    harness.main(bench)
