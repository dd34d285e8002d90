"""Ray nodes on this machine, each of so many CPUs; a node can lose its power."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = (ROOT, ROOT / "kernels", ROOT / "launcher", ROOT / "benchmarks")

QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
"""For a cluster that is to notice a lost node in seconds: Ray's own setting takes half a minute."""


def environment(observed: Path) -> dict[str, str]:
    """For everything the harness starts: this checkout, no services, and notes of what the workers do."""
    paths = os.pathsep.join(map(str, (HERE / "observe", *SOURCES)))
    own = {"PYTHONPATH": paths, "TLDIST_OBSERVE": str(observed), "RAY_AUTH_MODE": "disabled"}
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    # Other programs' memory is no reason to kill a worker, nor their work one to wait.
    alone = {"RAY_memory_monitor_refresh_ms": "0", "RAY_worker_niceness": "0"}
    return {**os.environ, **own, **quiet, **alone}


class Node:
    """One raylet with its workers; the first node of a cluster holds its head too."""

    def __init__(self, environment: dict[str, str], cpus: int, head: str = "") -> None:
        self.mark = f"TLDIST_NODE={os.getpid()}-{time.monotonic_ns()}"
        name, _, value = self.mark.partition("=")
        self.address = head or f"127.0.0.1:{free_port()}"
        words = [str(Path(sys.executable).parent / "ray"), "start", "--block", f"--num-cpus={cpus}"]
        words += ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
        # Ray's sockets live in its temp dir, the head's for all, and a socket's path may have 107 characters only.
        self.folder = "" if head else tempfile.mkdtemp(prefix="ray")
        if head:
            words += [f"--address={head}"]
        else:
            words += ["--head", f"--port={self.address.split(':')[1]}", "--include-dashboard=false"]
            words += [f"--temp-dir={self.folder}"]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(words, env={**environment, name: value}, start_new_session=True, **quiet)
        if not head:
            wait_for_port(self.address)

    def kill(self) -> None:
        """As if its power were cut: every process of it, at once."""
        for _ in range(20):
            for pid in marked(self.mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.poll()
            if not marked(self.mark):
                return
            time.sleep(0.05)

    def close(self) -> None:
        """Its end, and its sockets' and logs'."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def cluster(environment: dict[str, str], cpus: int) -> Iterator[Node]:
    """A cluster of one node while the block runs."""
    head = Node(environment, cpus)
    try:
        yield head
    finally:
        head.close()


def marked(mark: str) -> list[int]:
    """Living processes with `mark` in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def is_alive(pid: int) -> bool:
    """Does it run? A zombie, which nobody has waited for yet, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def works_for_a_run(pid: int) -> bool:
    """Is it one of Ray's actors, and none of those that live as long as the cluster?"""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
    return title.startswith("ray::") and not title.startswith(tuple(f"ray::{name}" for name in _LIVE_ON))


def end_cleaners(mark: str) -> None:
    """End what Ray leaves of drivers that were killed; for when no run is under way.

    Each such run leaves an actor of 200 MB that asks the dashboard whether its controller lives, without end where
    there is no dashboard: fifteen of them and Ray's memory monitor began to kill workers.
    """
    for pid in marked(mark):
        with contextlib.suppress(OSError):
            if b"ray::PlacementGroupCleaner" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


_LIVE_ON = ("IDLE", "DashboardAgent", "RuntimeEnvAgent", "_AutoscalingCoordinatorActor", "PlacementGroupCleaner")


def free_port() -> int:
    """A port that nothing listens on, and that Ray does not want for its dashboard's agent."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return free_port() if port == 52365 else port


def wait_for_port(address: str, seconds: float = 90) -> None:
    """Until something listens there. Raises TimeoutError."""
    host, port = address.split(":")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as s:
            if s.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError(f"no Ray cluster listens at {address}")
