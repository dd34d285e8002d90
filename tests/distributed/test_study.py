"""Studies on Ray Tune, killed and resumed, as a user runs them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tldist.study.log import read_study
from tldist.tracking.runlog import parse
from tldist.train.launch import is_running
from tldist_launcher.cli import main
from tldist_launcher.start.launch import launch
from tldist_launcher.study.command import resolved
from tldist_launcher.study.file import read_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two trials at once need two cores"),
]


def written(folder: Path, photos: Path, **told: Any) -> Path:
    flags = {
        "data.root": str(photos), "model.weights": "none", "data.image_size": 32, "data.batch_size": 8,
        "train.epochs": 3, "tracking.wandb": "disabled", "tracking.log_every": 1,
    }  # fmt: skip
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({"recipe": "folder", "flags": flags, **told}, sort_keys=False))
    return path


def arguments(path: Path, folder: Path) -> list[str]:
    return ["study", str(path), "--workers", str(len(os.sched_getaffinity(0))), "--dir", str(folder)]


def finished(folder: Path) -> dict[str, int]:
    """When each finished trial was finished, in nanoseconds."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("trials/*/summary.json")}


def killed(path: Path, folder: Path, at: int, kill: Callable[[subprocess.Popen[bytes]], None]) -> int:
    """Start the study, and kill when so many trials are finished, while others run; returns its exit code."""
    words = [sys.executable, "-m", "tldist_launcher.cli", *arguments(path, folder)]
    environment = {**os.environ, "RAY_gcs_rpc_server_reconnect_timeout_s": "3"}
    with (
        (folder.parent / f"log-{at}").open("wb") as log,
        subprocess.Popen(words, env=environment, stdout=log, stderr=log) as driver,
    ):
        deadline = time.monotonic() + 400
        while len(finished(folder)) < at:
            assert time.monotonic() < deadline, "too slow"
            assert driver.poll() is None, (folder.parent / f"log-{at}").read_text()
            time.sleep(0.05)
        kill(driver)
        driver.wait(timeout=200)
    return driver.returncode


def tell_to_stop(driver: subprocess.Popen[bytes]) -> None:
    driver.terminate()


def kill_driver(driver: subprocess.Popen[bytes]) -> None:
    driver.kill()


def kill_cluster(driver: subprocess.Popen[bytes]) -> None:
    """Ray's own processes, which are the driver's children."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == driver.pid:
                os.kill(int(path.parent.name), signal.SIGKILL)


@pytest.mark.timeout(900)
def test_a_study_stopped_once_and_killed_twice_ends_with_the_same_table(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = written(tmp_path, photos, grid={"strategy.name": ["full", "partial"]}, seeds=3), tmp_path / "study"
    assert killed(path, folder, 1, tell_to_stop) == 75
    begun = list((folder / "trials").iterdir())
    assert len(begun) <= len(finished(folder)) + 2  # those that ran; none was begun to be stopped
    assert not any(map(is_running, begun))
    assert f"stopped by SIGTERM, all saved, {6 - len(finished(folder))} trials" in (tmp_path / "log-1").read_text()
    killed(path, folder, 2, kill_driver)
    first = finished(folder)
    killed(path, folder, 4, kill_cluster)
    second = finished(folder)
    assert len(second) < 6
    assert first.items() <= second.items()
    assert main(arguments(path, folder)) == 0
    assert second.items() <= finished(folder).items()  # finished trials ran once
    log = read_study(folder)
    assert [trial.state for trial in log.trials] == ["finished"] * 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(len(os.sched_getaffinity(0))))  # one thread, as each trial had
    for job in resolved(read_file(path, [], folder)).grid():
        alone = launch(replace(job.settings, run_dir=str(tmp_path / "alone" / job.name)), quiet=True)
        one, other = (json.loads((d / "summary.json").read_text()) for d in (Path(job.settings.run_dir), alone))
        assert (one["val_top1"], one["best_val_top1"]) == (other["val_top1"], other["best_val_top1"])
        rows = [parse(line) or {} for line in Path(job.settings.run_dir, "metrics.jsonl").read_text().splitlines()]
        assert sum(row.get("event") == "end" for row in rows) == 1
    assert (folder / "report.html").exists()
    assert "of 6 begun" in (folder / "report.html").read_text()
    before = finished(folder)
    assert main(["study", str(path), "--dir", str(folder)]) == 0  # nothing is left: no Ray, the same table
    assert finished(folder) == before
    assert "cannot be told" in capfd.readouterr().out


@pytest.mark.timeout(600)
def test_a_search_stopped_before_it_began_tries_gives_up_and_runs_the_best_again(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    search = {"optim.base_lr": {"from": 1e-4, "to": 1.0, "log": True}, "strategy.name": ["full", "partial"]}
    budget = {"trials": 4, "keep": 1}
    folder, short = tmp_path / "study", {**budget, "hours": 1e-4}  # over before Ray has started
    assert main(arguments(written(tmp_path, photos, search=search, budget=short, seeds=2), folder)) == 0
    assert "the budget of hours, all saved, 5 trials are left" in capfd.readouterr().out
    assert not list((folder / "trials").iterdir())
    path = written(tmp_path, photos, search=search, budget=budget, seeds=2)
    assert main(arguments(path, folder)) == 0
    log = read_study(folder)
    searched = [trial for trial in log.trials if trial.stage == "search"]
    (kept,) = [trial for trial in log.trials if trial.stage == "kept"]
    assert len(searched) == 4
    assert {trial.state for trial in searched} <= {"finished", "pruned"}
    assert kept.seed == 1
    best = max((trial for trial in searched if trial.state == "finished"), key=lambda trial: trial.values["val_top1"])
    assert kept.exact in [t.exact for t in searched if t.values["val_top1"] == best.values["val_top1"]]
    assert [trial.name for trials in log.arms().values() for trial in trials] == [kept.name]


@pytest.mark.timeout(600)
def test_a_trial_that_fails_does_not_end_the_others(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    grid = {"how": {"sound": {"optim.base_lr": 0.01}, "wild": {"optim.base_lr": 1e30, "train.max_skipped": 1}}}
    path, folder = written(tmp_path, photos, grid=grid, seeds=1), tmp_path / "study"
    assert main(arguments(path, folder)) == 1
    assert "1 trials failed, the first wild-seed=0" in capfd.readouterr().err
    assert {trial.name: trial.state for trial in read_study(folder).trials} == {
        "sound-seed=0": "finished",
        "wild-seed=0": "failed",
    }
