"""A study that is to run elsewhere, as one job of a cluster: read and looked through here."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from tldist.config import RunConfig, UserError
from tldist_launcher.slurm.runs import job_of, queue
from tldist_launcher.start.arguments import as_number, take_flags
from tldist_launcher.study.command import examples, open_folder, resolved
from tldist_launcher.study.file import OWN, Job, Study, find_study, read_file

SHARING = {"--workers": int, "--gpus-per-trial": float}
"""Flags of `tldist study` that depend on the cluster, and so are for the job to judge."""


def read(name: str, words: Sequence[str], check: Callable[[RunConfig], None]) -> tuple[Study, list[str]]:
    """The study of that file or name, with the flags of `tldist study` over it, and those that are for the job.

    Every trial is checked. Raises UserError, naming it.
    """
    own, rest = take_flags(words, dict.fromkeys(OWN, ""))
    path = find_study(name)
    folder = Path(own["--dir"] or f"studies/{path.stem}").expanduser().absolute()
    study = resolved(read_file(path, rest, folder, own["--seeds"]))
    for trial in trials_of(study):
        try:
            check(trial.settings)
        except UserError as error:
            raise UserError(f"{', '.join(trial.labels.values())}: {error}") from error
    given = {flag: as_number(flag, own[flag], kind) for flag, kind in SHARING.items() if own[flag]}
    return study, [word for flag, number in given.items() for word in (flag, f"{number:g}")]


def trials_of(study: Study) -> list[Job]:
    """One for each combination; of a search, those at the ends of its ranges."""
    return list(examples(study)) if study.is_search else [job for job in study.grid() if job.seed == study.seeds[0]]


def make_folder(study: Study) -> Path:
    """The study's directory, which may hold what is done of it. Raises UserError where a job is at it already."""
    if (number := job_of(study.folder)) and number in (queue() or {}):
        raise UserError(f"job {number} is at {study.folder}: wait for its end, or scancel it, or choose another --dir")
    open_folder(study)
    shutil.rmtree(study.folder / "code", ignore_errors=True)  # of an earlier job
    return study.folder
