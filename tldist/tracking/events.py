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
    """Did a writer that was killed leave half a line? It must not swallow the next one."""
    with path.open("rb") as file:
        return bool(file.seek(0, 2)) and file.seek(-1, 2) >= 0 and file.read() != b"\n"


class EventLog:
    """Appends events to a file, flushed per line, and hands them to mirrors. Without a path it is silent."""

    def __init__(self, path: Path | None) -> None:
        self.mirrors: list[Callable[[Event], None]] = []
        self._file = path.open("a") if path else None
        if path and self._file and _ends_in_a_line(path):
            self._file.write("\n")

    def write(self, event: str, **fields: Any) -> None:
        """One line: {"event": ..., "time": unix seconds, ...}."""
        if self._file is None:
            return
        record = {"event": event, "time": round(time.time(), 3), **fields}
        self._file.write(json.dumps(record) + "\n")
        with contextlib.suppress(OSError):  # the disk is full: the line is kept, and written with the next that can be
            self._file.flush()
        for mirror in self.mirrors:
            mirror(record)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
