"""`tldist runs` and `tldist logs`, for runs that no Slurm knows."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tldist.tracking import runlog
from tldist_launcher.cli import main
from tldist_launcher.commands import machine
from tldist_launcher.slurm.runs import Queued, Watch, first_step, job_of, queue, state_of

RUN = {"event": "run", "time": 1.0, "recipe": "folder", "epochs": 3, "steps_per_epoch": 2, "plan": [{}, {}]}
ROWS: list[dict[str, Any]] = [
    RUN,
    {"event": "phase", "time": 2.0, "phase": 1, "name": "+layer4", "epoch": 0, "step": 0},
    {"event": "train", "time": 12.5, "step": 2, "epoch": 0, "loss": 0.5, "images_per_s": 100.0},
    {"event": "eval", "time": 13.0, "step": 2, "epoch": 1, "val_top1": 0.75},
]


def make_run(folder: Path, *more: dict[str, Any], age_s: float = 3600) -> Path:
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").touch()
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, *more]))
    os.utime(metrics, (time.time() - age_s, time.time() - age_s))
    return folder


def note(run_dir: Path, **told: Any) -> None:
    with (run_dir / "logs" / "jobs.jsonl").open("a") as file:
        file.write(json.dumps({"job": "7", "time": 5.0, **told}) + "\n")


def test_states(tmp_path: Path) -> None:
    assert state_of(make_run(tmp_path / "old"), {}) == "interrupted"
    assert state_of(make_run(tmp_path / "young", age_s=1), {}) == "running"
    assert state_of(make_run(tmp_path / "failed", {"event": "error", "time": 14.0, "text": "no"}), {}) == "failed"
    stopped = {"event": "notice", "time": 14.0, "text": "stopped by SIGUSR1, all saved"}
    assert state_of(make_run(tmp_path / "stopped", stopped), {}) == "stopped"
    done = make_run(tmp_path / "done")
    (done / "summary.json").touch()
    assert state_of(done, {}) == "done"


def test_states_of_jobs(tmp_path: Path) -> None:
    """While Slurm knows the job its word counts; afterwards the exit code that the batch script noted."""
    run = make_run(tmp_path / "run", age_s=1)
    (run / "submit.json").write_text(json.dumps({"job": "7", "time": 1.0}))
    assert job_of(run) == "7"
    assert state_of(run, {"7": Queued("PENDING", "Priority")}) == "pending (Priority)"
    assert state_of(run, {"7": Queued("RUNNING", "None")}) == "running"
    note(run, restart=0, nodes="n[1-2]")
    assert state_of(run, {}) == "interrupted"
    for code, state in ((2, "failed"), (143, "cancelled"), (75, "interrupted"), (0, "done")):
        note(run, code=code)
        assert state_of(run, {}) == state


def test_a_run_that_is_submitted_again_is_the_new_job(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    note(run, code=0)
    (run / "submit.json").write_text(json.dumps({"job": "9", "time": 6.0}))
    assert state_of(run, {"9": Queued("PENDING", "Priority")}) == "pending (Priority)"
    assert state_of(run, {}) == "interrupted"


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Gives `squeue` a body."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    def be(body: str) -> None:
        (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / "squeue").chmod(0o755)

    return be


def test_a_queue_that_does_not_answer_is_not_empty(
    tmp_path: Path, squeue: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose job it may hold is not called interrupted, and is followed on."""
    run = make_run(tmp_path / "run")
    note(run, restart=0, nodes="n1")
    squeue("echo '7|7|RUNNING|None'")
    assert queue() == {"7": Queued("RUNNING", "None")}
    monkeypatch.setattr(machine, "COMMAND_TIMEOUT_S", 0.2)
    for body in ("echo 'slurm_load_jobs error' >&2; exit 1", "exec sleep 60"):
        squeue(body)
        assert queue() is None
        assert state_of(run, queue()) == "unknown (squeue fails)"
        assert Watch(run).is_under_way()
    squeue("exit 0")
    assert queue() == {}
    assert not Watch(run).is_under_way()
    assert state_of(make_run(tmp_path / "by hand"), None) == "interrupted"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert queue() == {}


def test_the_time_to_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.delattr(runlog, "read")  # nothing is read where nothing was submitted
        assert first_step(run) == ""
    (run / "submit.json").write_text(json.dumps({"job": "7", "time": 1.5}))
    note(run, restart=0, nodes="n1")
    assert first_step(run) == "step 2 was done 11.0 s after the submission: 3.5 s in the queue, 7.5 s to start"


def test_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "array" / "seed-0")
    assert main(["runs", str(tmp_path)]) == 0
    heading, first, second = (line.split() for line in capsys.readouterr().out.splitlines())
    assert heading == ["run", "state", "phase", "epoch", "top-1", "best", "images/s", "job"]
    assert first == ["a", "interrupted", "2/2", "+layer4", "1/3", "0.750", "0.750", "100"]
    assert second[0] == "array/seed-0"


def test_the_list_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert "no run in" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "absent")]) == 2
    assert main(["runs", "a", "b"]) == 2


def test_logs_of_a_run_started_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", {"event": "notice", "time": 14.0, "text": "stopped by SIGUSR1"})
    assert main(["logs", str(run)]) == 0
    assert "val 0.750" in capsys.readouterr().out
    assert main(["logs", str(run), "--follow"]) == 1
    assert "stopped by SIGUSR1" in capsys.readouterr().out


def test_logs_of_a_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What its jobs printed, the earlier one first."""
    run = make_run(tmp_path / "run")
    (run / "submit.json").write_text(json.dumps({"job": "7", "time": 1.0}))
    for age, name in ((1, "slurm-2.log"), (9, "slurm-1.log")):
        (run / "logs" / name).write_text(f"of {name}\n")
        os.utime(run / "logs" / name, (time.time() - age, time.time() - age))
    assert main(["logs", str(run)]) == 0
    assert capsys.readouterr().out == "of slurm-1.log\nof slurm-2.log\n"


def test_logs_of_a_batch_script_submitted_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its output is where its user wanted it: the run's own log is shown."""
    run = make_run(tmp_path / "run")
    note(run, restart=0, nodes="n1")
    note(run, code=1)
    assert main(["logs", str(run)]) == 0
    assert "val 0.750" in capsys.readouterr().out


def test_logs_wants_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs"]) == 2
    assert "name one run directory" in capsys.readouterr().err
    assert main(["logs", str(tmp_path)]) == 2
    assert "is no run directory" in capsys.readouterr().err
    assert main(["logs", str(tmp_path), "--folow"]) == 2
    assert "no flag --folow" in capsys.readouterr().err
