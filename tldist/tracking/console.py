"""What the driver shows while a run writes `metrics.jsonl`.

On a terminal: one live line, with phases and notices above it. Elsewhere (a Slurm log, a pipe): plain lines,
one per epoch. The rows come from the file, so the same view fits a run on another machine's workers.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import rich.box
import rich.console
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tldist.tracking import wording
from tldist.tracking.runlog import parse
from tldist.tracking.wording import number, whole

PLAIN_COLUMNS = 100
BAR_COLUMNS = (8, 24)
"""Least and most columns of the bar."""
GAP = "  "

# (label, value, rank): on a narrow terminal the highest rank is left out first.
Field = tuple[str, str, int]


def print_whole(table: Table) -> None:
    """To stdout, however narrow that is: a terminal may wrap lines, but cut names and numbers tell nothing."""
    console, wide = rich.console.Console(), rich.console.Console(width=1000)
    console.width = max(console.width, Measurement.get(wide, wide.options, table).maximum)
    console.print(table)


class Console:
    """Turns rows of `metrics.jsonl` into what a person watches; use as a context manager around `feed`."""

    def __init__(self, stream: TextIO | None = None) -> None:
        out: TextIO = sys.stdout if stream is None else stream
        terminal = out.isatty()
        # rich believes FORCE_COLOR and TTY_COMPATIBLE; a log file stays free of control codes all the same.
        self._rich = rich.console.Console(
            file=out,
            force_terminal=terminal,
            color_system="auto" if terminal else None,
            width=_columns(stream) if terminal else PLAIN_COLUMNS,
            highlight=False,
            markup=False,
            emoji=False,
        )
        self._live: Live | None = None
        self.is_live = terminal and not self._rich.is_dumb_terminal
        self._run: dict[str, Any] = {}
        self._train: dict[str, Any] = {}
        self._eval: dict[str, Any] = {}
        self._step = 0
        self._ended = False
        self._pace_from: tuple[int, float] | None = None
        self._pace_to: tuple[int, float] | None = None

    def __enter__(self) -> Self:
        if self.is_live:
            self._live = Live(get_renderable=self._line, console=self._rich, transient=True, refresh_per_second=5)
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        if self._run and not self._ended:
            self._say("stopped  " + GAP.join(f"{label} {value}".strip() for label, value, _ in self._fields()))

    def feed(self, event: dict[str, Any]) -> None:
        """Show one row; kinds and keys it does not know are passed over."""
        handlers = {
            "run": self._on_run,
            "phase": self._on_phase,
            "train": self._on_train,
            "eval": self._on_eval,
            "notice": lambda row: self._say(str(row.get("text", "")), style="yellow"),
            "end": self._on_end,
        }
        handlers.get(str(event.get("event")), lambda row: None)(event)

    def _on_run(self, row: dict[str, Any]) -> None:
        self._run, self._train, self._eval, self._step, self._ended = row, {}, {}, 0, False
        self._pace_from = self._pace_to = None
        who = [str(row[key]) for key in ("recipe", "strategy", "model") if row.get(key)]
        who.append(wording.workers(row.get("engine"), whole(row, "world_size")))
        self._say(GAP.join(who), style="bold")
        self._say(_size(row))

    def _on_phase(self, row: dict[str, Any]) -> None:
        phases = len(self._run["plan"]) if isinstance(self._run.get("plan"), list) else None
        text = f"phase {_of((whole(row, 'phase') or 0) + 1, phases)}{GAP}{row.get('name', '')}"
        text += f"{GAP}from epoch {(whole(row, 'epoch') or 0) + 1}"
        if (trainable := number(row, "trainable_params")) is not None:
            text += f"{GAP}{wording.count(trainable)} trainable parameters"
        self._say(text, style="cyan")

    def _on_train(self, row: dict[str, Any]) -> None:
        self._train = row
        self._advance(row)

    def _on_eval(self, row: dict[str, Any]) -> None:
        self._eval = row
        self._advance(row)
        if not self.is_live:
            self._say(GAP.join(f"{label} {value}".strip() for label, value, _ in self._fields()))

    def _on_end(self, row: dict[str, Any]) -> None:
        self._ended = True
        self._stop()
        self._rich.print(_closing_table(self._run | {k: v for k, v in row.items() if v is not None}))

    def _advance(self, row: dict[str, Any]) -> None:
        """Note how far the run is, and how fast it came from its first row to here."""
        step, seconds = whole(row, "step"), number(row, "time")
        if step is None:
            return
        self._step = step
        if seconds is not None:
            self._pace_from = self._pace_from or (step, seconds)
            self._pace_to = (step, seconds)

    def _eta_s(self) -> float | None:
        total = whole(self._run, "total_steps")
        if total is None or self._pace_from is None or self._pace_to is None:
            return None
        steps, seconds = (to - start for to, start in zip(self._pace_to, self._pace_from, strict=True))
        return seconds / steps * max(total - self._step, 0) if steps > 0 else None

    def _epoch(self) -> int:
        """The epoch under way or just finished, counted from 1."""
        per_epoch = whole(self._run, "steps_per_epoch") or 0
        if per_epoch > 0:
            return max(-(-self._step // per_epoch), 1)
        return max((whole(self._train, "epoch") or 0) + 1, whole(self._eval, "epoch") or 0)

    def _fields(self) -> list[Field]:
        """What is known of where the run stands."""
        fields = [
            ("epoch", _of(self._epoch(), whole(self._run, "epochs")), 0),
            ("step", _of(self._step, whole(self._run, "total_steps")), 5),
            ("loss", wording.fraction(number(self._train, "loss")), 1),
            ("top-1", wording.fraction(number(self._train, "top1")), 4),
            ("", f"{wording.rate(number(self._train, 'images_per_s'))} img/s", 3),
            ("wait", wording.percent(number(self._train, "data_wait_share")), 6),
            ("grad", wording.rate(number(self._train, "grad_norm")), 7),
            ("val", wording.fraction(number(self._eval, "val_top1")), 2),
            ("ETA", wording.duration(self._eta_s()), 1),
        ]
        unknown = (wording.MISSING, f"{wording.MISSING} img/s", wording.duration(None))
        return [field for field in fields if field[1] not in unknown]

    def _line(self) -> rich.console.RenderableType:
        """The live line: a bar and as many fields as the terminal's width allows."""
        if not self._run:
            return Text("starting the workers ...", style="dim")
        columns = self._rich.width - 1
        fields = _fit(self._fields(), columns - BAR_COLUMNS[0])
        text = Text(no_wrap=True, overflow="crop")
        for label, value, _ in fields:
            text.append(GAP).append(f"{label} " if label else "", style="dim").append(value)
        width = min(max(columns - text.cell_len, 1), BAR_COLUMNS[1])
        total = whole(self._run, "total_steps") or 1
        grid = Table.grid()
        grid.add_column(width=width)
        grid.add_column(no_wrap=True)
        grid.add_row(ProgressBar(total, min(self._step, total), width=width, complete_style="cyan"), text)
        return grid

    def _say(self, text: str, style: str = "") -> None:
        """Print a permanent line; what cannot be printed (a control code, say) becomes a question mark."""
        if self._live is not None:
            self._live.refresh()  # else the line under this one would be drawn from the row before
        encoding = self._rich.encoding
        shown = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.splitlines()))
        shown = shown.encode(encoding, "replace").decode(encoding)
        self._rich.print(Text(shown, style=style))

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def follow(path: Path, console: Console, alive: Callable[[], bool], poll_s: float = 0.2, offset: int = 0) -> bool:
    """Feed `console` with the rows of `path` as they are written; True once an `end` row was seen.

    Goes on until `alive()` is false and all is read: a notice may follow the `end` row. The file may not exist
    yet. `offset` is the byte to start at: the file's size before a resumed run appends to it.
    """
    tail, ended = _Tail(path, offset), False
    while True:
        running = alive()  # asked before reading: rows written just before the end are still read
        for row in tail.rows(final=not running):
            console.feed(row)
            ended |= row.get("event") == "end"
        if not running:
            return ended
        time.sleep(poll_s)


class _Tail:
    """Complete lines of a growing file; half a line waits for its other half."""

    def __init__(self, path: Path, offset: int) -> None:
        self._path = path
        self._offset = offset
        self._rest = b""

    def rows(self, final: bool) -> Iterator[dict[str, Any]]:
        """The rows added since the last call; with `final`, also a last line that lacks its newline."""
        *lines, self._rest = (self._rest + self._read()).split(b"\n")
        if final:
            lines.append(self._rest)
        for line in lines:
            if (row := parse(line)) is not None:
                yield row

    def _read(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                added = file.read()
        except OSError:
            return b""
        self._offset += len(added)
        return added


def _columns(stream: TextIO | None) -> int | None:
    """Width of the terminal behind `stream`; None for stdout, whose width rich follows when it changes."""
    return None if stream is None else os.get_terminal_size(stream.fileno()).columns


def _of(value: int, total: int | None) -> str:
    return f"{value}/{total}" if total is not None else str(value)


def _fit(fields: list[Field], columns: int) -> list[Field]:
    """Leave out the least important fields until the rest fit."""
    kept = list(fields)
    while len(kept) > 1 and sum(len(f"{GAP}{label} {value}") - (not label) for label, value, _ in kept) > columns:
        kept.remove(max(kept, key=lambda field: field[2]))
    return kept


def _size(row: dict[str, Any]) -> str:
    """`244 train and 153 val images, 2 classes, 10 epochs of 7 steps, 1 image skipped`."""
    skipped = whole(row, "skipped_images") or 0
    classes = row.get("classes")
    parts = [
        f"{row.get('train_images', '-')} train and {row.get('val_images', '-')} val images",
        f"{len(classes)} classes" if isinstance(classes, list) else "",
        f"{row.get('epochs', '-')} epochs of {row.get('steps_per_epoch', '-')} steps",
        f"{skipped} image{'' if skipped == 1 else 's'} skipped" if skipped else "",
    ]
    return ", ".join(part for part in parts if part)


def _speed(row: dict[str, Any]) -> str:
    """`240, MFU 41.2 %`; the second half where it is known."""
    share = "" if number(row, "mfu") is None else f", MFU {wording.mfu(row)}"
    return wording.rate(number(row, "images_per_s")) + share


def _closing_table(row: dict[str, Any]) -> Table:
    world_size, drift = whole(row, "world_size"), number(row, "replica_spread")
    parameters = (wording.count(number(row, key)) for key in ("trainable_params", "total_params"))
    lines = [
        ("strategy", str(row.get("strategy", wording.MISSING))),
        ("model", str(row.get("model", wording.MISSING))),
        ("engine", wording.workers(row.get("engine"), world_size)),
        ("val top-1", wording.fraction(number(row, "val_top1"))),
        ("best val top-1", wording.fraction(number(row, "best_val_top1"))),
        ("images/s", _speed(row)),
        ("data wait", wording.percent(number(row, "data_wait_share"), 1)),
        ("parameters", "{} trainable of {}".format(*parameters)),
        ("replica spread", wording.spread(drift, world_size)),
        ("peak memory", wording.gib(number(row, "peak_mem_gib"))),
        ("time", wording.duration(number(row, "wall_s"))),
    ]
    table = Table(box=rich.box.ROUNDED, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for label, value in lines:
        table.add_row(label, Text(value, style="bold red" if label == "replica spread" and drift else ""))
    return table
