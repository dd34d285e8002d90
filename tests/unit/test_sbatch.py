"""What the batch scripts decide, with stand-ins for Slurm's commands (tests/slurm runs them on a cluster)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_INS = {
    # Runs COMMAND alone of what node.sh gets: FOLDER IP PLACES LOGS COMMAND...
    "srun": 'while [ "${1##*/}" != node.sh ]; do shift; done; shift 5; exec "$@"',
    "tldist": 'echo "tldist $*" >> "$CALLS"; eval "${RUN:-}"; exit "$CODE"',
    "scontrol": 'echo "scontrol $*" >> "$CALLS"',
    "squeue": 'echo "squeue $*" >> "$CALLS"; echo "$PREEMPTED"',
    "getent": "echo 10.0.0.1",
}


class Bash:
    """A job's batch script: what ran, in which environment, and how it ended."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        (folder / "bin").mkdir()
        (folder / "slurm").symlink_to(ROOT / "slurm")
        for name, body in STAND_INS.items():
            (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
            (folder / "bin" / name).chmod(0o755)

    def run(self, script: str = "train.sbatch", *words: str, code: int = 0, preempted: str = "N/A", **more: str) -> int:
        """Its exit code. `code` is that of `tldist`."""
        job = {"ID": "8", "NAME": "job", "NUM_NODES": "1", "NODELIST": "n1"}
        environment = {f"SLURM_JOB_{name}": value for name, value in job.items()}
        environment |= {"SLURM_SUBMIT_DIR": str(self.folder), "SLURMD_NODENAME": "n1"}
        environment |= {"CALLS": str(self.calls), "CODE": str(code), "PREEMPTED": preempted}
        environment |= {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "RAY_TMPDIR": str(self.folder), **more}
        self.calls.write_text("")
        path = self.folder / "slurm" / script
        return subprocess.run(["bash", str(path), *words], env=environment, timeout=60, capture_output=True).returncode

    def called(self, command: str) -> list[str]:
        """The words of each call of it."""
        lines = self.calls.read_text().splitlines()
        return [line.removeprefix(f"{command} ").strip() for line in lines if line.startswith(f"{command} ")]

    @property
    def requeued(self) -> list[str]:
        """The jobs that went back into the queue."""
        return [words.removeprefix("requeue ") for words in self.called("scontrol") if words.startswith("requeue ")]


@pytest.fixture
def bash(tmp_path: Path) -> Bash:
    return Bash(tmp_path)


def test_what_saved_goes_back_into_the_queue(bash: Bash) -> None:
    assert bash.run("train.sbatch", "folder", "--seed", "1", code=75) == 0
    assert bash.called("tldist") == [
        f"train folder --seed 1 --run-dir {bash.folder}/runs/job-8 --launch.workers 1",
    ]
    assert bash.requeued == ["8"]
    assert bash.run(code=75, SLURM_RESTART_COUNT="20") == 75
    assert bash.requeued == []


def test_a_task_of_an_array_goes_back_alone(bash: Bash) -> None:
    """The number of its last task is that of the array."""
    array = {"SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "3"}
    assert bash.run("study.sbatch", "folder", code=75, RUN='echo "group $WANDB_RUN_GROUP" >> "$CALLS"', **array) == 0
    assert bash.requeued == ["8_3"]
    assert bash.called("group") == ["job-8"]


@pytest.mark.parametrize("code", [0, 1, 2])
def test_what_ends_otherwise_does_not(bash: Bash, code: int) -> None:
    assert bash.run(code=code) == code
    assert bash.requeued == []


def test_a_preemption_without_notice_is_no_failure(bash: Bash) -> None:
    """Slurm has ended the nodes' processes, and the batch script, which it leaves alone, saw them fail."""
    assert bash.run(code=1, preempted="2026-11-25T21:50:00") == 0
    assert bash.requeued == ["8"]
    assert bash.run(code=0, preempted="2026-11-25T21:50:00") == 0
    assert bash.requeued == []


def test_a_notice_before_the_start_is_not_lost(bash: Bash) -> None:
    """Slurm gives it once, maybe while Ray starts; what an earlier start was told is over."""
    logs = bash.folder / "runs" / "job-8" / "logs"
    logs.mkdir(parents=True)
    (logs / "stop.SIGTERM").touch()
    notice = 'kill -USR1 $PPID; until ls "$TLDIST_RUN_DIR/logs/stop.SIGUSR1"; do sleep 0.01; done'
    assert bash.run(code=75, RUN=notice) == 0
    assert [path.name for path in logs.glob("stop.*")] == ["stop.SIGUSR1"]
    assert bash.requeued == ["8"]


def test_a_study_is_asked_for_again_and_again(bash: Bash) -> None:
    """It knows itself what is finished."""
    text = (ROOT / "slurm" / "train.sbatch").read_text()
    (bash.folder / "slurm").unlink()
    shutil.copytree(ROOT / "slurm", bash.folder / "slurm")
    (bash.folder / "slurm" / "train.sbatch").write_text(re.sub("(?m)^study=.*", "study=(a.yaml --workers 2)", text))
    for restart in ("0", "1"):
        assert bash.run(code=75, SLURM_RESTART_COUNT=restart) == 0
        assert bash.called("tldist") == [f"study a.yaml --workers 2 --dir {bash.folder}/runs/job-8"]
        assert bash.requeued == ["8"]
