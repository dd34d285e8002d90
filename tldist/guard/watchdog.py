"""Stops a run that stands still, and says which worker holds it up.

A worker that waits in a collective sees no exception under NCCL, and under gloo only a lost connection: neither says
who is missing. So each worker writes every few seconds where it stands, into the run directory that all share, and the
first whose main thread has not moved for the timeout reads what all wrote, names the one they wait for, and ends the
run. No collective, no network of its own, no clock that two machines must share.

Time counts only while this thread runs: a job that was suspended (Slurm, Ctrl-Z, a closed laptop), or whose file system
stood still, goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from tldist.guard.hang import Sign, Verdict, judge

EXIT = 1
LISTEN_FROM = 0.25
"""Share of the timeout from which a quiet worker reads what the others write; a run that is well only writes."""

Item = TypeVar("Item")


class Watchdog:
    """`beat` wherever the loop goes on; a context manager around everything that may hang.

    Without a folder or a timeout it watches nothing. A beat takes 0.1 microseconds (Zen 5), watched or not.
    """

    def __init__(self, run_dir: Path | None = None, rank: int = 0, world_size: int = 1, timeout_s: float = 0.0) -> None:
        self.logs = (run_dir or Path()) / "logs"
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.interval_s = max(0.1, min(10.0, timeout_s / 20))
        self._is_on = run_dir is not None and timeout_s > 0
        self._at = (0, 0, 0, Sign(rank).doing)  # beats, step, place, doing: one object, so never half of a beat
        self._seen_beats, self._quiet_s, self._count = 0, 0.0, 0
        self._signs: dict[int, Sign] = {}
        self._silent_s: dict[int, float] = {}
        self._owner = 0
        self._old: tuple[int, int] | None = None
        self._over, self._ending = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str, step: int | None = None) -> None:
        """The main thread goes on to what it is `doing`, `step` optimizer steps finished (default: as before).

        All workers must pass the same places in the same order, whatever their rank: that is how one that is behind
        is known. The count starts anew with each step. Time counts from the first beat on.
        """
        beats, at_step, place, was = self._at
        if step is not None and step != at_step:
            at_step, place = step, 0
        elif doing != was:
            place += 1
        self._at = (beats + 1, at_step, place, doing)

    def along(self, items: Iterable[Item], doing: str, then: str) -> Iterator[Item]:
        """Hand `items` on, with a beat before each and one at their end, where workers with fewer come to wait."""
        self.beat(doing)
        for item in items:
            yield item
            self.beat(doing)
        self.beat(then)

    def __enter__(self) -> Self:
        if self._is_on:
            self._owner = threading.get_ident()
            (self.logs / "workers").mkdir(parents=True, exist_ok=True)
            self._own_file(self.rank).unlink(missing_ok=True)  # an earlier process's, as is the verdict
            self._old = _mark(verdict_file(self.logs.parent))
            if self.rank == 0:
                forget(self.logs.parent)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_on:
            return
        self._over.set()
        if kind is not None and self._is_out():
            self._end()  # the error is only that a peer has gone
        if self._ending.locked():
            self._thread.join()  # which ends the process
        self._thread.join(timeout=5)  # it may hang in a file system
        self._write(ended=True, error=kind.__name__ if kind is not None and issubclass(kind, Exception) else "")

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._over.wait(self.interval_s if self._count else 0.0):
            now = time.monotonic()
            self._tick(min(now - before, 2 * self.interval_s))
            before = now

    def _tick(self, passed_s: float) -> None:
        """`passed_s` after the last: say where we stand, and look whether the run must end."""
        beats = self._at[0]
        moved = beats == 0 or beats != self._seen_beats
        self._seen_beats, self._quiet_s = beats, 0.0 if moved else self._quiet_s + passed_s
        written = self._write()
        if self._quiet_s >= LISTEN_FROM * self.timeout_s:
            self._listen(passed_s)
        else:
            self._silent_s.clear()
        if self._is_out() or (self._quiet_s >= self.timeout_s and self._judged(alone=not written)):
            self._end()

    def _judged(self, alone: bool) -> bool:
        """Is there a verdict now? `alone`: our own sign could not be written, so the others' silence says nothing."""
        own = self._sign()
        others = [] if alone else [self._signs.get(r, Sign(r)) for r in range(self.world_size) if r != self.rank]
        workers = sorted([own, *others], key=lambda worker: worker.rank)
        verdict = judge(workers, self._silent_s, self.timeout_s, self.logs)
        if verdict is not None and self._publish(verdict):
            restore = "\x1b[?25h\n" if os.isatty(2) else ""  # the live line had hidden the cursor
            os.write(2, f"{restore}tldist: {verdict.sentence}\n".encode())
        return verdict is not None

    def _listen(self, passed_s: float) -> None:
        """Read the others' signs, and count for how long each has been the same."""
        for rank in range(self.world_size):
            if rank == self.rank:
                continue
            sign, before = _read_sign(self._own_file(rank)) or self._signs.get(rank), self._signs.get(rank)
            is_first = rank not in self._silent_s
            same = sign is None or (before is not None and (sign.pid, sign.count) == (before.pid, before.count))
            self._silent_s[rank] = self._silent_s[rank] + passed_s if same and not is_first else 0.0
            if sign is not None:
                self._signs[rank] = sign

    def _sign(self, ended: bool = False, error: str = "") -> Sign:
        _, step, place, doing = self._at
        at = _place_of(self._owner) if self._quiet_s >= LISTEN_FROM * self.timeout_s else ""
        return Sign(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            born=_born(os.getpid()),
            count=self._count,
            step=step,
            place=place,
            doing=doing,
            at=at,
            quiet_s=round(self._quiet_s, 1),
            ended=ended,
            error=error,
            time=round(time.time(), 1),
        )

    def _write(self, ended: bool = False, error: str = "") -> bool:
        """Replace this worker's file; False where the run directory cannot be written."""
        self._count += 1
        path = self._own_file(self.rank)
        try:
            draft = path.with_suffix(".draft")
            draft.write_text(json.dumps(dataclasses.asdict(self._sign(ended, error))))
            draft.replace(path)
        except OSError:
            return False
        return True

    def _own_file(self, rank: int) -> Path:
        return self.logs / "workers" / f"rank-{rank:04d}.json"

    def _is_out(self) -> bool:
        """Has any worker written a verdict in this run? One that lay there when we came is another's."""
        return _mark(verdict_file(self.logs.parent)) not in (None, self._old)

    def _publish(self, verdict: Verdict) -> bool:
        """Write the verdict, unless another worker was faster; where it cannot be written, only we know it."""
        path = verdict_file(self.logs.parent)
        try:
            if not self._is_out():
                path.unlink(missing_ok=True)
            with path.open("x") as file:
                json.dump(dataclasses.asdict(verdict), file, indent=1)
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    def _end(self) -> None:
        """Leave our stacks, let the others leave theirs, and end: `os._exit`, as anything else might wait."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # the other thread is ending the process
        with contextlib.suppress(OSError):
            self._dump_stacks()
        self._write(ended=True)
        silent = [worker for worker in _silent(self.logs.parent) if _is_here(worker)]
        _send(silent, signal.SIGCONT)  # a stopped process wakes, sees the verdict, and leaves its stacks too
        deadline = time.monotonic() + 2 * self.interval_s + 1
        # Whoever goes first takes the others with it: launchers kill a group that lost a worker.
        while time.monotonic() < deadline and not self._all_ended(silent):
            time.sleep(min(1.0, self.interval_s))
        _send(silent, signal.SIGKILL)
        os._exit(EXIT)

    def _all_ended(self, silent: list[Sign]) -> bool:
        """Has everybody who can, ended? Dead machines cannot."""
        dead = {worker.rank for worker in _silent(self.logs.parent)} - {worker.rank for worker in silent}
        signs = [_read_sign(self._own_file(rank)) for rank in range(self.world_size) if rank not in dead]
        return all(sign is not None and sign.ended for sign in signs)

    def _dump_stacks(self) -> None:
        with (self.logs / f"rank{self.rank}.log").open("a") as file:
            print(f"watchdog: the run hangs; worker {self.rank} has these threads:", file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)


def verdict_file(run_dir: Path) -> Path:
    """Where the first worker that notices writes why the run stops."""
    return run_dir / "logs" / "hung.json"


def forget(run_dir: Path) -> None:
    """Remove an earlier process's verdict."""
    verdict_file(run_dir).unlink(missing_ok=True)


def hung(run_dir: Path) -> str:
    """The sentence that says who hung; empty where nobody did."""
    return str(_read(verdict_file(run_dir)).get("sentence", ""))


def _silent(run_dir: Path) -> list[Sign]:
    return [Sign(**worker) for worker in _read(verdict_file(run_dir)).get("silent", ())]


def _read(path: Path) -> dict[str, Any]:
    """Empty where there is no file, or only half of one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _read_sign(path: Path) -> Sign | None:
    told = _read(path)
    return Sign(**told) if told else None


def _mark(path: Path) -> tuple[int, int] | None:
    """Tells one file from another that took its name."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _born(pid: int) -> str:
    """When a process of this machine began, in its kernel's ticks; empty where there is no such process or no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_here(worker: Sign) -> bool:
    """Is it a living process of this machine, and still the one that wrote the sign?"""
    return bool(worker.born) and worker.host == socket.gethostname() and worker.born == _born(worker.pid)


def _send(workers: Iterable[Sign], number: signal.Signals) -> None:
    for worker in workers:
        if _is_here(worker) and worker.pid != os.getpid():
            with contextlib.suppress(OSError):
                os.kill(worker.pid, number)


def _place_of(thread: int) -> str:
    """The innermost line of tldist's that a thread is in, or of anything where none is."""
    frame = sys._current_frames().get(thread)
    lines: list[str] = []
    while frame is not None:
        code = frame.f_code
        module, file = str(frame.f_globals.get("__name__", "")), Path(code.co_filename)
        packages = module.count(".") + (file.name == "__init__.py")  # as many folders above the file are tldist's
        line = f"{'/'.join(file.parts[-max(packages + 1, 2) :])}:{frame.f_lineno} {code.co_name}"
        if module.startswith("tldist"):
            return line
        lines.append(line)
        frame = frame.f_back
    return lines[0] if lines else ""
