"""Name the worker that hangs: a pure function of what the workers wrote about themselves (watchdog.py writes it)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SILENT = 0.5
"""Share of the timeout without a new sign after which a process counts as stopped. By then it has been silent for the
whole timeout, as the others began to wait when it fell silent; half of it leaves room for the minute that a network
file system may take to show a new file."""
NAMED = 4
"""Workers that a sentence describes one by one."""


@dataclass(frozen=True)
class Sign:
    """What one worker says of itself every few seconds. Without a host: nothing was ever heard of it."""

    rank: int
    host: str = ""
    pid: int = 0
    born: str = ""
    """When the process began, by its kernel; with the pid it names one process."""
    count: int = 0
    """Signs so far: a process whose count stands still is stopped or dead."""
    step: int = 0
    place: int = 0
    """Changes of what it is doing since `step` began: every worker passes the same places in the same order."""
    doing: str = "starting"
    at: str = ""
    """The line of code that the main thread is in, once that has been quiet for a while."""
    quiet_s: float = 0.0
    """Since its main thread moved, by its own clock."""
    ended: bool = False
    error: str = ""
    """The kind of error that ended it."""
    time: float = 0.0

    @property
    def position(self) -> tuple[int, int]:
        """Comparable between workers."""
        return self.step, self.place


@dataclass(frozen=True)
class Verdict:
    """Why the run stops; `silent` are the processes that cannot end by themselves."""

    sentence: str
    silent: tuple[Sign, ...]
    workers: tuple[Sign, ...]


def judge(workers: Sequence[Sign], silent_s: Mapping[int, float], timeout_s: float, logs: Path) -> Verdict | None:
    """The verdict of a worker that has been quiet for `timeout_s`; None while somebody it may be waiting for moves.

    `silent_s`: by rank, for how long there has been no new sign of the worker. Who ended with an error, or is silent,
    is to blame; else who is behind all others. Where all stand at one place, nobody is.
    """
    failed = [w for w in workers if w.error]
    silent = [w for w in workers if not w.ended and silent_s.get(w.rank, 0.0) >= SILENT * timeout_s]
    moving = [w for w in workers if not w.ended and w not in silent]
    if failed or silent:
        to_blame = [*failed, *silent]
    else:
        last = min((w.position for w in moving), default=(0, 0))
        to_blame = [w for w in moving if w.position == last]
        if not to_blame or any(w.quiet_s < timeout_s for w in to_blame):
            return None
        if len(to_blame) == len(workers) > 1:
            return Verdict(_nobody(to_blame, logs), (), tuple(workers))
    wait = any(w not in to_blame for w in moving)
    sentence = _blame(to_blame, {w.rank: silent_s[w.rank] for w in silent}, wait, logs)
    return Verdict(sentence, tuple(silent), tuple(workers))


def _blame(to_blame: Sequence[Sign], silent_s: Mapping[int, float], others_wait: bool, logs: Path) -> str:
    told = [f"{_who(w)} {_how(w, silent_s.get(w.rank))}" for w in to_blame[:NAMED]]
    if len(to_blame) > NAMED:
        told.append(f"{len(to_blame) - NAMED} more workers do too")
    wait = f", while the others wait for {'it' if len(to_blame) == 1 else 'them'}" if others_wait else ""
    return f"{'; '.join(told)}{wait} (stacks of the living in {logs}/rank*.log)"


def _nobody(workers: Sequence[Sign], logs: Path) -> str:
    first = workers[0]
    quiet_s = min(w.quiet_s for w in workers)
    places = "; ".join(f"{_who(w)}{_line(w)}" for w in workers[:NAMED])
    return (
        f"the run hangs: all {len(workers)} workers have been {first.doing} for {quiet_s:.0f} s, {_after(first)}, and "
        f"none can be singled out: {places} (stacks in {logs}/rank*.log)"
    )


def _who(worker: Sign) -> str:
    return f"worker {worker.rank}" + (f" (host {worker.host}, pid {worker.pid})" if worker.host else "")


def _how(worker: Sign, silent_s: float | None) -> str:
    if worker.error:
        return f"has ended with {worker.error}, {_after(worker)}"
    if not worker.host:
        return "hangs: it never began"
    if silent_s is not None:
        return (
            f"hangs: no sign of life for {silent_s:.0f} s or more (a stopped or dead process, or machine); it was last "
            f"seen {worker.doing}, {_after(worker)}"
        )
    return f"hangs: it has been {worker.doing} for {worker.quiet_s:.0f} s, {_after(worker)}{_line(worker)}"


def _after(worker: Sign) -> str:
    return f"after step {worker.step}" if worker.step else "before the first step's end"


def _line(worker: Sign) -> str:
    return f" in {worker.at}" if worker.at else ""
