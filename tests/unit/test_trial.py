"""A trial in a process of its own: it outlives nobody, loses nothing, and says why it failed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import long
from test_study_file import FLAGS, read, written

from tldist.study.log import read_study, state_of
from tldist.train.launch import is_running
from tldist_launcher.start.launch import launch
from tldist_launcher.study.command import resolved
from tldist_launcher.study.file import Job
from tldist_launcher.study.trial import STOPPED, TrialProcess, run_job, write_json

OWNER = """
import sys, time
from pathlib import Path
from tldist_launcher.study import resolved
from tldist_launcher.study_file import read_file
from tldist_launcher.trial import TrialProcess

(job,) = resolved(read_file(Path(sys.argv[1]), [], Path(sys.argv[2]))).grid()
trial = TrialProcess(job, {})
time.sleep(600)
"""


def long_job(folder: Path, photos: Path, **more: object) -> tuple[Path, Job]:
    """A study's file, and its only trial: six epochs of five steps."""
    flags = {**FLAGS, "data.root": str(photos), "train.epochs": 6, "tracking.log_every": 1, **more}
    path = written(folder, photos, flags=flags, grid={"strategy.name": ["full"]}, seeds=1)
    (job,) = resolved(read(path)).grid()
    return path, job


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)


def has_trained(run_dir: Path) -> bool:
    path = run_dir / "metrics.jsonl"
    return path.exists() and '"train"' in path.read_text()


@long
@pytest.mark.timeout(600)
def test_a_trial_whose_study_is_killed_saves_and_goes_on_to_the_same_end(photos: Path, tmp_path: Path) -> None:
    path, job = long_job(tmp_path, photos)
    run_dir = Path(job.settings.run_dir)
    run_dir.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", OWNER, str(path), str(tmp_path / "study")]) as owner:
        until(lambda: has_trained(run_dir), "a step")
        assert is_running(run_dir)
        owner.kill()
    until(lambda: not is_running(run_dir), "its end")
    assert state_of(run_dir) == "interrupted"
    assert (run_dir / "checkpoints" / "last").exists()
    run_job(job)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["resumed_from"]
    alone = launch(replace(job.settings, run_dir=str(tmp_path / "alone")), quiet=True)
    other = json.loads((alone / "summary.json").read_text())
    assert [summary[key] for key in ("val_top1", "best_val_top1", "best_epoch")] == [
        other[key] for key in ("val_top1", "best_val_top1", "best_epoch")
    ]


@pytest.mark.timeout(600)
def test_a_trial_stops_when_asked_and_one_that_fails_says_why(photos: Path, tmp_path: Path) -> None:
    _, job = long_job(tmp_path, photos)
    run_dir = Path(job.settings.run_dir)
    run_dir.mkdir(parents=True)
    trial = TrialProcess(job, {})
    until(lambda: has_trained(run_dir), "a step")
    trial.stop()
    assert trial.exit_code == STOPPED
    assert state_of(run_dir) == "interrupted"
    # A number that no step survives.
    wild = replace(job.settings.optim, base_lr=1e30)
    run_dir = tmp_path / "study" / "trials" / "wild"
    train = replace(job.settings.train, max_skipped=1)
    job = replace(job, name="wild", settings=replace(job.settings, optim=wild, train=train, run_dir=str(run_dir)))
    run_dir.mkdir()
    write_json(run_dir / "trial.json", {"choices": {}, "seed": 0, "stage": "grid"})
    trial = TrialProcess(job, {})
    until(lambda: trial.exit_code is not None, "its failure")
    assert state_of(run_dir) == "failed"
    (failed,) = read_study(tmp_path / "study").trials
    assert "not finite" in failed.why
