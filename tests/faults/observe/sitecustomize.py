"""On the PYTHONPATH of Ray's workers: notes every training step and every checkpoint written, beside the product.

Python imports this module in each process that starts. Where TLDIST_OBSERVE names a folder, it waits for
`tldist.train.fit` and `tldist.checkpoints.checkpoint` to be imported and wraps one function of each, which then
writes to FOLDER/RUN/PID.jsonl.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = os.environ.get("TLDIST_OBSERVE", "")


def note(run_dir: Path, **told: Any) -> None:
    """One line, whole even if the process is killed: a single write to a file opened for appending."""
    path = Path(FOLDER) / run_dir.name / f"{os.getpid()}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps({"at": time.time(), "pid": os.getpid(), **told}) + "\n").encode())


def watch_steps(fit: ModuleType) -> None:
    """A line when a step is done: where it stands, and which images it showed."""
    real = fit.train_step

    def train_step(run: Any, live: Any, step: int, batch: Any, factor: float) -> None:
        real(run, live, step, batch, factor)
        place = {"rank": run.worker.rank, "world": run.worker.world_size}
        note(run.run_dir, what="step", step=step, epoch=step // run.steps_per_epoch, **place, ids=batch.ids_N.tolist())

    fit.train_step = train_step  # type: ignore[attr-defined]


def watch_saves(checkpoint: ModuleType) -> None:
    """A line when a checkpoint's writing begins, and one when it is done, or has failed."""
    real = checkpoint.save

    def save(folder: Path, names: Sequence[str], contents: Any, keep: int) -> None:
        note(folder.parent, what="saving", name=contents.name)
        try:
            real(folder, names, contents, keep)
        except BaseException as error:
            note(folder.parent, what="unsaved", name=contents.name, error=str(error))
            raise
        note(folder.parent, what="saved", name=contents.name)

    checkpoint.save = save  # type: ignore[attr-defined]


WATCHED: dict[str, Callable[[ModuleType], None]] = {
    "tldist.train.fit": watch_steps,
    "tldist.checkpoints.checkpoint": watch_saves,
}


class Finder(importlib.abc.MetaPathFinder):
    """Finds the watched modules as Python does, and wraps their functions once they have run."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """A module's spec, its loader followed by the wrapping; None for every other module."""
        if fullname not in WATCHED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            real = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                real(module)
                WATCHED[fullname](module)

            spec.loader.exec_module = exec_module
        return spec


if FOLDER:
    sys.meta_path.insert(0, Finder())
