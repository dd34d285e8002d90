"""One trial of a study in a process of its own, forked from one that has imported everything once.

A process per trial, because what one trial held must not count as the next one's peak memory, and a crash must not take
others along; forked, because importing torch anew would cost every trial seconds.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tldist.config import TrainingFailed, UserError
from tldist.guard import control
from tldist.guard.control import Stopped
from tldist.study.log import FAILED, state_of
from tldist.train.launch import is_running, undo
from tldist_launcher.start.launch import launch, resume
from tldist_launcher.study.file import Job

POLL_S = 0.2
STOPPED, SAID_WHY = 75, 1
"""Exit codes: stopped and saved; failed, and failed.json says why."""


class TrialProcess:
    """A trial that runs; it saves and stops when this object's process is gone."""

    def __init__(self, job: Job, environment: Mapping[str, str]) -> None:
        self.run_dir = Path(job.settings.run_dir)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        theirs, self._ours = context.Pipe(duplex=False)
        self._process = context.Process(target=_main, args=(job, dict(environment), theirs))
        with _without_main():
            self._process.start()
        theirs.close()

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.exitcode

    def ask_to_stop(self) -> None:
        """Save and stop, soon."""
        control.ask_to_stop(self.run_dir, "study")

    def stop(self) -> None:
        """Return when it has saved and stopped."""
        while self._process.is_alive():
            self.ask_to_stop()  # again: a run that begins forgets what it was asked before
            self._process.join(timeout=1.0)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """multiprocessing would have the trial run the main program's file, which is Ray's own and imports all of it."""
    main = sys.modules["__main__"].__dict__
    file = main.pop("__file__", None)
    try:
        yield
    finally:
        if file is not None:
            main["__file__"] = file


def _main(job: Job, environment: dict[str, str], alive: Connection) -> None:
    os.environ.update(environment)
    run_dir = Path(job.settings.run_dir)
    threading.Thread(target=_stop_when_lost, args=(run_dir, alive), daemon=True).start()
    try:
        run_job(job)
    except Stopped:
        sys.exit(STOPPED)
    except Exception as error:
        why = str(error) if isinstance(error, UserError | TrainingFailed) else f"{type(error).__name__}: {error}"
        write_json(run_dir / FAILED, {"why": why})
        sys.exit(SAID_WHY)


def _stop_when_lost(run_dir: Path, alive: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        alive.recv()
    while True:
        control.ask_to_stop(run_dir, "study")
        time.sleep(1.0)


def run_job(job: Job) -> None:
    """To its end, from wherever an earlier process left it."""
    run_dir = Path(job.settings.run_dir)
    while is_running(run_dir):  # by a process whose study is gone, and which ends in a moment
        time.sleep(POLL_S)
    (run_dir / FAILED).unlink(missing_ok=True)
    if state_of(run_dir) == "finished":
        return
    if (run_dir / "index.json").exists():
        resume(job.settings, run_dir, quiet=True)
    else:
        undo(run_dir)  # killed before it had begun
        launch(job.settings, quiet=True)


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    draft.replace(path)
