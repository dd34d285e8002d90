"""Checkpoints are written by a thread, so that training does not wait for the disk."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError

from tldist.checkpoints import checkpoint
from tldist.checkpoints.checkpoint import Snapshot


class NotWritten(RuntimeError):  # noqa: N818 - it states a fact of the disk
    """A checkpoint that the run cannot do without could not be written."""


class Saver:
    """Writes checkpoints on a thread of its own, at most a tenth of the time.

    Epochs from cached features take milliseconds, a checkpoint does not: of several that wait under one name only
    the newest is written. One that cannot be written (the disk is full) waits for the next try, and training goes on:
    the checkpoints before it stand.
    """

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder, self.keep = folder, keep
        self._thread = ThreadPoolExecutor(1)
        self._waiting: dict[str, Snapshot] = {}
        self._lock, self._hurry = threading.Lock(), threading.Event()
        self._writing: Future[None] | None = None
        self.problem = ""
        """Why what waits could not be written."""
        self._told = ""

    def save(self, names: Sequence[str], contents: Snapshot) -> None:
        """Soon. Raises what an earlier write raised, but for what a disk may do."""
        with self._lock:
            self._waiting |= dict.fromkeys(names, contents)
        if self._writing is None or self._writing.done():
            self.check()
            self._writing = self._thread.submit(self._write)

    def check(self) -> None:
        """Raise what a finished write raised."""
        if self._writing is not None and self._writing.done():
            self._writing.result()

    def drain_news(self) -> str | None:
        """What a person should know that has not been told: a checkpoint could not be written."""
        problem = self.problem
        if problem == self._told:
            return None
        self._told = problem
        return problem or "checkpoints are written again"

    def flush(self, must: bool = False) -> None:
        """Wait until everything is on disk, or was tried; with `must`, raise NotWritten where it is not."""
        self._hurry.set()
        if self._writing is not None:
            self._writing.result()
        self._write()  # what came while the thread was ending
        self._hurry.clear()
        self._set_apart()
        if must and self.problem:
            raise NotWritten(self.problem)

    def close(self) -> None:
        """Write what waits, and end. Raises NotWritten where something is not on disk."""
        try:
            self.flush(must=True)
        finally:
            self._thread.shutdown()

    def _write(self) -> None:
        while waiting := self._take():
            started = time.monotonic()
            # The older first: `last` must not tell of a best that is not there yet.
            for contents in sorted(
                {id(c): c for c in waiting.values()}.values(), key=lambda c: checkpoint.order(c.name)
            ):
                names = [name for name in waiting if waiting[name] is contents]
                if not self._wrote(names, contents):
                    with self._lock:
                        self._waiting = waiting | self._waiting
                    return
                for name in names:
                    del waiting[name]
            self._hurry.wait(9 * (time.monotonic() - started))

    def _wrote(self, names: Sequence[str], contents: Snapshot) -> bool:
        try:
            checkpoint.save(self.folder, names, contents, self.keep)
        except (OSError, SafetensorError) as error:
            reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
            stands = (self.folder / "last").resolve().name if (self.folder / "last").exists() else "none"
            self.problem = (
                f"the checkpoint {contents.name} could not be written to {self.folder}: {reason}; the last whole one "
                f"is {stands}, and the next is tried in its turn: make room on the disk"
            )
            return False
        self.problem = ""
        return True

    def _set_apart(self) -> None:
        """What still waits outlives the phase that it was taken in, and the next one may train what that one froze."""
        with self._lock:
            apart = {id(contents): contents.apart() for contents in self._waiting.values()}
            self._waiting = {name: apart[id(contents)] for name, contents in self._waiting.items()}

    def _take(self) -> dict[str, Snapshot]:
        with self._lock:
            taken, self._waiting = self._waiting, {}
        return taken
