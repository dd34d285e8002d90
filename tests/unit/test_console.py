"""The console: one live line on a terminal, plain lines elsewhere, and a file read while it grows."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import struct
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import synthetic_run
from rich.table import Table
from synthetic_run import Shape

from tldist.tracking.console import Console, follow, print_whole

ROWS = synthetic_run.rows(Shape())
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def plain(rows: list[dict[str, Any]]) -> list[str]:
    """What a log file shows of `rows`."""
    stream = io.StringIO()
    with Console(stream) as console:
        for row in rows:
            console.feed(row)
    return stream.getvalue().splitlines()


def on_terminal(columns: int, show: Callable[[Console], None]) -> str:
    """What a terminal of this width receives while `show` uses a console."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    received: list[bytes] = []
    reader = threading.Thread(target=_drain, args=(master, received))
    reader.start()
    with os.fdopen(slave, "w", encoding="utf-8") as stream, Console(stream) as console:
        assert console.is_live
        show(console)
    reader.join(timeout=10)
    os.close(master)
    return b"".join(received).decode()


def _drain(descriptor: int, received: list[bytes]) -> None:
    try:
        while data := os.read(descriptor, 4096):
            received.append(data)
    except OSError:  # Linux says EIO once the other side is closed
        return


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def test_plain_lines_one_per_epoch_without_control_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    lines = plain(synthetic_run.rows(Shape()))
    text = "\n".join(lines)
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert max(map(len, lines)) <= 100
    assert [line.split()[1] for line in lines if line.startswith("epoch ")] == [f"{e}/10" for e in range(1, 11)]
    assert sum(line.startswith("phase ") for line in lines) == 3
    assert "phase 2/3  +layer4  from epoch 4  8.39 M trainable parameters" in lines
    assert "1 image skipped" in lines


def test_an_epoch_line_says_where_the_run_stands() -> None:
    lines = [line for line in plain(synthetic_run.rows(Shape())) if line.startswith("epoch ")]
    # A step takes 0.6 s: 49 steps are left after the third epoch.
    shown = re.sub(r"0\.\d{3}", "0.000", lines[2])
    assert re.fullmatch(
        r"epoch 3/10  step 21/70  loss 0.000  top-1 0.000  \d+ img/s  wait \d %  val 0.000  ETA 0:(29|30)",
        shown,
    )
    assert lines[-1].endswith("ETA 0:00")


def test_the_closing_table() -> None:
    lines = plain(synthetic_run.rows(Shape()))
    cells = dict(re.findall(r"│ (\S.*?) +│ (.*?) +│", "\n".join(lines)))
    assert cells["strategy"] == "gradual"
    assert cells["engine"] == "ddp, 2 workers"
    assert cells["parameters"] == "10.5 M trainable of 11.2 M"
    assert cells["replica spread"] == "0 (identical)"
    assert cells["time"] == "0:48"
    assert cells["val top-1"] == "0.946"
    assert cells["images/s"] == "240, MFU 41.5 % of the measured conv peak"
    assert len(cells) == 11


@pytest.mark.parametrize(
    ("peak", "speed"), [((2.1, "table"), "240, MFU 20.7 %"), ((0.0, "unknown"), "240"), (None, "240")]
)
def test_the_closing_table_s_mfu_depends_on_what_is_known_of_the_peak(
    peak: tuple[float, str] | None, speed: str
) -> None:
    rows = synthetic_run.rows(Shape(peak=peak)) if peak else list(map(synthetic_run.as_before, ROWS))
    cells = dict(re.findall(r"│ (\S.*?) +│ (.*?) +│", "\n".join(plain(rows))))
    assert cells["images/s"] == speed
    assert len(cells) == 11


def test_the_table_is_ascii_where_the_stream_is() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with Console(stream) as console:
        for row in [*synthetic_run.rows(Shape()), {"event": "notice", "text": "Bäume \x1b[31m[red]x[/red]"}]:
            console.feed(row)
    stream.seek(0)
    assert "B?ume ?[31m[red]x[/red]" in stream.read()


def test_odd_rows_are_passed_over() -> None:
    odd: list[dict[str, Any]] = [
        {},
        {"event": "new"},
        {"event": ["run"]},
        {"event": "train"},
        {"event": "eval", "step": None, "val_top1": "x"},
        {"event": "phase"},
        {"event": "notice"},
        {"event": "run", "plan": 3, "classes": None},
        {"event": "train", "step": 1, "loss": float("nan"), "images_per_s": float("inf"), "time": 1},
        {"event": "eval", "step": 1, "epoch": 1, "time": 1},
        {"event": "end"},
    ]
    assert any("loss nan" in line for line in plain(odd))


def test_a_run_that_stops_says_where() -> None:
    rows = [row for row in synthetic_run.rows(Shape()) if row.get("step", 0) <= 24 and row["event"] != "end"]
    assert plain(rows)[-1].startswith("stopped  epoch 4/10  step 24/70")


def test_a_terminal_gets_a_live_line_and_permanent_ones(terminal: None) -> None:
    rows = synthetic_run.rows(Shape())

    def show(console: Console) -> None:
        for row in rows[:12]:
            console.feed(row)
        time.sleep(0.5)  # the line is drawn five times a second
        for row in rows[12:]:
            console.feed(row)

    received = on_terminal(120, show)
    assert "\x1b[" in received
    seen = ESCAPE.sub("", received)
    step = max(row["step"] for row in rows[:12] if row["event"] in ("train", "eval"))
    assert re.search(rf"━ *epoch \d/10  step {step}/70  loss 0\.\d+  top-1 0\.\d+  \d+ img/s  wait \d %  val", seen)
    assert "phase 2/3  +layer4" in seen
    assert "1 image skipped" in seen
    assert "10.5 M trainable of 11.2 M" in seen


@pytest.mark.parametrize("columns", [30, 60, 80, 100])
def test_the_live_line_fits_a_narrow_terminal(terminal: None, columns: int) -> None:
    rows = synthetic_run.rows(Shape())

    def show(console: Console) -> None:
        for row in rows[:12]:
            console.feed(row)
        time.sleep(0.5)

    drawn = [ESCAPE.sub("", part) for part in re.split(r"[\r\n]+", on_terminal(columns, show))]
    live = [line for line in drawn if "━" in line]
    assert live
    assert all(len(line) <= columns and "epoch 3/10" in line for line in live[-1:])


def test_follow_waits_for_the_file_and_for_the_other_half_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = "".join(json.dumps(row) + "\n" for row in synthetic_run.rows(Shape())).encode()
    cuts = [len(lines) // 3, len(lines) // 2 + 1]

    def write() -> None:
        for start, end in zip([0, *cuts], [*cuts, len(lines)], strict=True):
            time.sleep(0.05)
            with path.open("ab") as file:
                file.write(lines[start:end])

    writer = threading.Thread(target=write)
    console = Recorder()
    writer.start()
    assert follow(path, console, writer.is_alive, poll_s=0.01)
    writer.join()
    assert console.rows == synthetic_run.rows(Shape())


def test_follow_drains_what_a_dead_run_left(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event":"notice","text":"a"}\n\nnonsense\n{"event":"notice","text":"b"}\n{"event":"tr')
    console = Recorder()
    assert not follow(path, console, lambda: False)
    assert [row["text"] for row in console.rows] == ["a", "b"]
    assert not follow(tmp_path / "absent", Recorder(), lambda: False)


def test_follow_reads_rows_written_just_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    console = Recorder()

    def alive() -> bool:
        path.write_text('{"event":"notice","text":"last words"}')  # without its newline
        return False

    assert not follow(path, console, alive)
    assert console.rows == [{"event": "notice", "text": "last words"}]


def test_follow_can_start_behind_an_earlier_attempt(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event":"end"}\n')
    offset = path.stat().st_size
    with path.open("a") as file:
        file.write('{"event":"notice","text":"resumed"}\n{"event":"end"}\n')
    console = Recorder()
    assert follow(path, console, lambda: False, offset=offset)
    assert [row["event"] for row in console.rows] == ["notice", "end"]


class Recorder(Console):
    """A console that keeps its rows."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.rows: list[dict[str, Any]] = []

    def feed(self, event: dict[str, Any]) -> None:
        self.rows.append(event)


def test_a_table_is_never_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Arms of a study differ at the ends of their names."""
    monkeypatch.setenv("COLUMNS", "40")
    table = Table("arm", "top-1")
    names = [f"feature_extraction, randaugment, cosine_restarts, seed {i}" for i in (1, 2)]
    for name in names:
        table.add_row(name, "44.6 ± 2.3 %")
    print_whole(table)
    printed = capsys.readouterr().out
    assert all(f"{name} │ 44.6 ± 2.3 %" in printed for name in names)
