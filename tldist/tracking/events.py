"""metrics.jsonl: one JSON object per line, on disk before training goes on; everything else is a mirror of it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Event = dict[str, Any]


def _ends_in_a_line(path: Path) -> bool:
    """Or did a writer that was killed leave half a line? It must not swallow the next one."""
    with path.open("rb") as file:
        return file.seek(0, 2) == 0 or (file.seek(-1, 2) >= 0 and file.read() == b"\n")


class EventLog:
    """Appends events to a file, a line at once, and hands them to mirrors. Without a path it is silent.

    What finds no room on the disk is kept, and written before the next line that finds some. (A buffered file would
    drop part of it: it keeps 8 KiB.)
    """

    def __init__(self, path: Path | None) -> None:
        self.mirrors: list[Callable[[Event], None]] = []
        self._file = path.open("ab", buffering=0) if path else None
        self._unwritten = b"\n" if path and not _ends_in_a_line(path) else b""

    def write(self, event: str, **fields: Any) -> None:
        """One line: {"event": ..., "time": unix seconds, ...}."""
        if self._file is None:
            return
        record = {"event": event, "time": round(time.time(), 3), **fields}
        self._unwritten += (json.dumps(record) + "\n").encode()
        self._write_on()
        for mirror in self.mirrors:
            mirror(record)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._write_on()
            self._file.close()

    def _write_on(self) -> None:
        assert self._file is not None
        with contextlib.suppress(OSError):
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
