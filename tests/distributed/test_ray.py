"""The whole command through Ray, as a user runs it: two workers on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tldist_launcher.cli import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two workers need two cores"),
]


def arguments(photos: Path, run_dir: Path) -> list[str]:
    words = """train folder --model.weights none --strategy.name gradual --data.image-size 32 --data.batch-size 8
        --train.epochs 2 --launch.workers 2 --tracking.wandb offline --tracking.log-every 2"""
    return [*words.split(), "--data.root", str(photos), "--run-dir", str(run_dir)]


def test_two_workers_on_ray(photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    assert main(arguments(photos, run_dir)) == 0
    output = capfd.readouterr()
    lines = output.out.splitlines()
    assert lines[-1] == f"run: {run_dir}"
    assert sum(line.startswith("epoch ") for line in lines) == 2
    assert not any(word in output.out + output.err for word in ("ray::", "raylet", "Traceback", "WARNING", "\x1b["))
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["engine"], summary["world_size"], summary["replica_spread"]) == ("ddp", 2, 0.0)
    assert summary["val_images"] == 19
    assert summary["wandb_run_id"]
    assert (run_dir / "checkpoints" / "best" / "model.safetensors").exists()
    assert (run_dir / "report.html").exists()
    assert len(list((run_dir / "wandb").glob("offline-run-*"))) == 1


def test_an_existing_cluster(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At RAY_ADDRESS, with token authentication, from another folder, paths relative; the cluster lives on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token = tmp_path / "token"
    token.write_text("f" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    head = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
    head += ["--num-cpus=2", "--include-dashboard=false", "--node-ip-address=127.0.0.1", f"--temp-dir={_short()}"]
    train = [sys.executable, "-m", "tldist_launcher.cli", *arguments(Path("photos"), Path("run"))]
    environment = {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    (tmp_path / "photos").symlink_to(photos)
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(head, env={**os.environ, "RAY_AUTH_MODE": "token"}, **quiet) as cluster:
        try:
            _wait_for(port)
            done = subprocess.run(train, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
            assert cluster.poll() is None
        finally:
            cluster.terminate()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["world_size"], summary["replica_spread"]) == (2, 0.0)


def _short() -> str:
    """Ray's sockets live in its temp dir, and a socket's path may have 107 characters only."""
    return tempfile.mkdtemp(prefix="ray")


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError("the Ray cluster did not start")


def test_a_workers_failure_is_told_in_a_sentence(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file that breaks behind the index's back (same size and time): exit code 1, the file named, no traceback."""
    root, run_dir = tmp_path / "photos", tmp_path / "run"
    shutil.copytree(photos, root)
    assert main(["data", "check", str(root)]) == 0
    for path in (root / "train" / "ants").iterdir():
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert main(arguments(root, run_dir)) == 1
    error = capfd.readouterr().err
    assert "cannot decode train/ants/" in error
    assert error.count("\n") <= 2
    assert "DecodeError" in (run_dir / "logs" / "rank0.log").read_text()


def test_ctrl_c_ends_the_run_and_its_workers(photos: Path, tmp_path: Path) -> None:
    """Exit code 130, the last checkpoint complete, and no process of the run left behind."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "tldist_launcher.cli", *arguments(photos, run_dir), "--train.epochs", "1000"]
    # The mark is inherited by every process Ray starts for this run, however it detaches itself.
    mark = f"TLDIST_TEST={run_dir}"
    environment = {**os.environ, "TLDIST_TEST": str(run_dir)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert any(line.startswith("epoch 2/") for line in run.stdout)
        assert marked(mark)
        run.send_signal(signal.SIGINT)
        _, error = run.communicate(timeout=60)
    assert run.returncode == 130
    assert error.splitlines()[-1] == "tldist: interrupted"
    deadline = time.monotonic() + 20
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert marked(mark) == []
    assert (run_dir / "checkpoints" / "last" / "model.safetensors").exists()


def test_a_stopped_worker_is_named_and_gone(photos: Path, tmp_path: Path) -> None:
    """A process that only SIGKILL or SIGCONT reaches: exit code 1, one sentence, and none of its processes left."""
    run_dir = tmp_path / "run"
    words = [*arguments(photos, run_dir), "--train.epochs", "1000", "--launch.hang-minutes", "0.1"]
    mark = f"TLDIST_TEST={run_dir}"
    environment = {**os.environ, "TLDIST_TEST": str(run_dir)}
    command = [sys.executable, "-m", "tldist_launcher.cli", *words]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert any(line.startswith("epoch 2/") for line in run.stdout)
        told = json.loads((run_dir / "logs" / "workers" / "rank-0001.json").read_text())
        os.kill(told["pid"], signal.SIGSTOP)
        stopped = time.monotonic()
        _, error = run.communicate(timeout=90)
    assert time.monotonic() - stopped < 6 + 30
    assert run.returncode == 1
    assert error.count("\n") == 1
    assert error.startswith(f"tldist: worker 1 (host {told['host']}, pid {told['pid']}) hangs: no sign of life for ")
    deadline = time.monotonic() + 20
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert marked(mark) == []
    assert "fit.py" in (run_dir / "logs" / "rank1.log").read_text()
    assert (run_dir / "checkpoints" / "last" / "model.safetensors").exists()


def test_a_signal_while_ray_starts_is_not_lost(photos: Path, tmp_path: Path) -> None:
    """Ray's own handler raises SystemExit, which its start may swallow: the run went on to its end."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "tldist_launcher.cli", *arguments(photos, run_dir), "--train.epochs", "1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while not (run_dir / "logs" / "ray.log").exists():
            assert run.poll() is None
            time.sleep(0.02)
        time.sleep(0.7)
        run.send_signal(signal.SIGTERM)
        _, error = run.communicate(timeout=60)
    assert run.returncode == 75
    assert "stopped by SIGTERM" in error


def marked(mark: str) -> list[str]:
    """Living processes with `mark` in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:100])
        except OSError:
            continue
    return found
