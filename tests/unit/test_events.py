"""metrics.jsonl on a full disk, and after a writer that was killed."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tldist.tracking.events import EventLog


@contextmanager
def no_room_after(bytes_: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes: a write is cut short there, the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_no_line_is_lost_while_the_disk_is_full(tmp_path: Path) -> None:
    """Many lines, and one that is longer than any buffer; the first that finds room brings all of them."""
    path = tmp_path / "metrics.jsonl"
    log = EventLog(path)
    with no_room_after(1000):
        for step in range(500):
            log.write("train", step=step, text="x" * (30_000 if step == 100 else 50))
        assert path.stat().st_size == 1000
    log.write("train", step=500)
    assert steps(path) == list(range(501))
    log.close()


def test_half_a_line_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "train", "st')
    for step in range(2):
        log = EventLog(path)
        log.write("train", step=step)
        log.close()
    assert [line.startswith('{"event": "train"') for line in path.read_text().split("\n")] == [True, True, True, False]
