"""What a running job is asked to do besides stepping: save, stop. The main worker decides, and all do the same."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tldist import dist

LOOK_S = 1.0
"""Seconds between two looks, about: each costs one small all-reduce and one copy to the host."""


class Stopped(Exception):  # noqa: N818 - it states a fact of the run
    """The run was asked to stop, and what it had is saved."""


class Diverged(RuntimeError):  # noqa: N818 - it states a fact of the run
    """No step of many in a row had finite gradients."""


@dataclass(frozen=True)
class Orders:
    """Equal on all workers."""

    stop: bool = False
    save: bool = False
    most_skipped: int = 0
    """Steps in a row that were left out."""


def ask_to_stop(run_dir: Path, reason: str) -> None:
    """Let the run in this directory, on whatever machines, save and stop at its next look."""
    with contextlib.suppress(OSError):
        (run_dir / "logs").mkdir(exist_ok=True)
        (run_dir / "logs" / f"{_STOP}{reason}").touch()  # a name needs no room on a full disk


def stop_reason(run_dir: Path) -> str | None:
    """Why the run was asked to stop; None: it was not."""
    # A network file system asks its server when a folder is listed, but may answer from memory whether a file is there.
    asked = sorted((run_dir / "logs").glob(f"{_STOP}*"))
    return asked[0].name.removeprefix(_STOP) if asked else None


def forget_stop(run_dir: Path, reason: str = "") -> None:
    """One reason, which has been answered; or before a new start all, as what an earlier one was asked has been done.

    A batch script, which says so in TLDIST_RUN_DIR, has forgotten all before it began to listen to Slurm: what stands
    there now is for this start, although it came earlier, and Slurm does not say it again.
    """
    if reason or os.environ.get("TLDIST_RUN_DIR") != str(run_dir):
        for asked in (run_dir / "logs").glob(f"{_STOP}{reason or '*'}"):
            asked.unlink(missing_ok=True)


_STOP = "stop."
MORE_PLACES = "more-places"
"""The reason that is none to end: there are places for more workers. (After a signal's in the alphabet.)"""


@contextlib.contextmanager
def stopping_on_signals(run_dir: Path) -> Iterator[None]:
    """SIGTERM and SIGUSR1, which a cluster sends some time before it kills, ask the run to save and stop."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def ask(number: int, _: Any) -> None:
        ask_to_stop(run_dir, signal.Signals(number).name)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Control:
    """Looks for orders about once a second.

    The workers cannot act on a file or a clock each for itself: they would do so at different steps, and wait for each
    other for ever. So the main worker looks, all learn what it saw in one all-reduce, and it tells the step of the next
    look with it.
    """

    def __init__(self, run_dir: Path, minutes: float, device: torch.device) -> None:
        self.run_dir, self.minutes, self.device = run_dir, minutes, device
        self._steps = self._left = 1
        self._looked = self._saved = time.monotonic()

    def begin(self) -> None:
        """Of an epoch, whose steps may take another time."""
        self._steps = self._left = 1
        self._looked = time.monotonic()

    def saved(self) -> None:
        """A checkpoint was taken."""
        self._saved = time.monotonic()

    def after_step(self, most_skipped: Tensor, now: bool = False) -> Orders:
        """Say what to do after this step. All workers call it after each; `now` makes it a look for certain.

        most_skipped: how many steps in a row were left out at most, a scalar on the device; read at a look alone.
        """
        self._left -= 1
        if self._left > 0 and not now:
            return Orders()
        told = torch.zeros(4, dtype=torch.float64)
        if dist.is_main():
            is_old = 0 < self.minutes * 60 <= time.monotonic() - self._saved
            told[:3] = torch.tensor([stop_reason(self.run_dir) is not None, is_old, self._next()])
            told[3] = most_skipped
        stop, save, self._steps, most = map(int, dist.all_sum(told.to(self.device)).tolist())
        self._left, self._looked = self._steps, time.monotonic()
        return Orders(stop > 0, save > 0, most)

    def _next(self) -> int:
        """Steps until the next look: from the time they took since the last one, at most ten times as many."""
        step_s = max(time.monotonic() - self._looked, 1e-6) / max(self._steps - self._left, 1)
        return max(1, min(int(LOOK_S / step_s), 10 * self._steps))
