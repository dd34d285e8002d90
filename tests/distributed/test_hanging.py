"""Hung workers in real processes, under torchrun and alone: the run ends in time, and the right one is named."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
from conftest import long
from test_training import settings

from tldist import config
from tldist.config import LaunchConfig, RunConfig
from tldist.guard.watchdog import hung

TIMEOUT_S = 6.0
SLACK_S = 6.0
"""Some intervals of 0.3 s, the grace in which all leave their stacks, and torchrun's own end on a busy machine."""


def prepared(photos: Path, run_dir: Path, timeout_s: float) -> RunConfig:
    run_dir.mkdir()
    made = replace(settings(photos, run_dir), launch=LaunchConfig(hang_minutes=timeout_s / 60))
    config.save(made, run_dir / "config.yaml")
    return made


def torchrun(made: RunConfig, how: str, world: int) -> subprocess.CompletedProcess[str]:
    script = [str(Path(__file__).with_name("hanging_worker.py")), how, f"{made.run_dir}/config.yaml"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command = [sys.executable, *(launcher if world > 1 else []), *script]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("how", "world"),
    [("sleep", 2), ("stop", 2), pytest.param("gil", 2, marks=long), pytest.param("sleep", 1, marks=long)],
)
def test_a_hung_worker_is_named_and_the_run_ends(photos: Path, tmp_path: Path, how: str, world: int) -> None:
    made = prepared(photos, tmp_path / "run", TIMEOUT_S)
    run_dir = tmp_path / "run"
    done = torchrun(made, how, world)
    took_s = time.time() - (run_dir / "hangs").stat().st_mtime
    assert done.returncode == 1
    assert TIMEOUT_S - 1 <= took_s <= TIMEOUT_S + SLACK_S, done.stderr
    sentence, culprit = hung(run_dir), world - 1
    assert done.stderr.count(f"tldist: {sentence}\n") == 1
    told = json.loads((run_dir / "logs" / "workers" / f"rank-{culprit:04d}.json").read_text())
    assert sentence.startswith(f"worker {culprit} (host {told['host']}, pid {told['pid']}) hangs: ")
    if how == "sleep":
        assert "it has been waiting for data for " in sentence
        assert ", after step 7 in distributed/hanging_worker.py" in sentence or ", after step 7 in tldist/" in sentence
    assert ("while the others wait for it" in sentence) == (world > 1)
    assert ("no sign of life" in sentence) == (how in ("stop", "gil"))
    for rank in range(world if how != "gil" else 1):  # a thread that keeps the GIL lets no other look at it
        stacks = (run_dir / "logs" / f"rank{rank}.log").read_text()
        assert "fit.py" in stacks
        assert ("hanging_worker.py" in stacks and "in hang" in stacks) == (rank == culprit)
        assert "Traceback" not in stacks
    assert not Path(f"/proc/{told['pid']}").exists()
    last = run_dir / "checkpoints" / "last"
    assert json.loads((last / "state.json").read_text())["epoch"] == 1
    assert safetensors.torch.load_file(last / "model.safetensors")


def test_slow_is_not_hung(photos: Path, tmp_path: Path) -> None:
    """Training and evaluation of an epoch take half of the timeout each, a batch a tenth; nothing is left behind."""
    made = prepared(photos, tmp_path / "run", TIMEOUT_S)
    done = torchrun(made, "slow", 2)
    assert done.returncode == 0, done.stderr
    run_dir = Path(made.run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["epochs"] == 2
    assert summary["wall_s"] > TIMEOUT_S
    assert hung(run_dir) == ""
    signs = [json.loads(path.read_text()) for path in sorted((run_dir / "logs" / "workers").iterdir())]
    assert [(sign["rank"], sign["ended"], sign["error"]) for sign in signs] == [(0, True, ""), (1, True, "")]
