"""What a machine has, as far as finding out takes a child process or the kernel's files.

torch and DALI are imported in child processes, side by side: a driver that crashes or hangs them costs their facts,
not the caller.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
"""What a child process reported; only the key `error` where it failed."""

GIB = 2**30
CHILD_TIMEOUT_S = 60
COMMAND_TIMEOUT_S = 5

_TORCH_CHILD = "import json; from tldist_launcher.commands.machine import torch_facts; print(json.dumps(torch_facts()))"
_DALI_CHILD = "import json, nvidia.dali; print(json.dumps({'version': nvidia.dali.__version__}))"


@dataclass(frozen=True)
class Machine:
    """What the slow probes found."""

    torch: Facts
    dali: Facts
    nvidia_smi: str

    @property
    def gpus(self) -> list[Facts]:
        """name, memory_gib and bf16 of each GPU that torch sees."""
        return self.torch.get("gpus", [])


def examine() -> Machine:
    """Run the slow probes at once; about as long as importing torch and torchvision."""
    with ThreadPoolExecutor(3) as pool:
        torch, dali = pool.submit(child, _TORCH_CHILD), pool.submit(child, _DALI_CHILD)
        query = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
        smi = pool.submit(command, *query)
        return Machine(torch.result(), dali.result(), smi.result())


def torch_facts() -> Facts:
    """What torch says of itself and its devices; called in a child process."""
    import torch
    from torch.cuda import nccl

    count = torch.cuda.device_count()
    properties = [torch.cuda.get_device_properties(i) for i in range(count)]
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [
            {"name": p.name, "memory_gib": round(p.total_memory / GIB, 1), "bf16": (p.major, p.minor) >= (8, 0)}
            for p in properties
        ],
        "nccl": _attempt(lambda: ".".join(map(str, nccl.version()))),
        "gloo": _attempt(torch.distributed.is_gloo_available) is True,
        "hub": _attempt(torch.hub.get_dir),
        "torchvision": _attempt(_import_torchvision) or "",
    }


def _import_torchvision() -> str:
    """Its version; raises where it was built for another torch, which its version alone does not show."""
    import torchvision

    return torchvision.__version__


def _attempt(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception:
        return None


def child(code: str) -> Facts:
    """The JSON that `code` prints last, run by this Python with this process's import path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=CHILD_TIMEOUT_S,
            env=environment,
            check=False,
        )
        if done.returncode == 0:
            return json.loads(done.stdout.strip().splitlines()[-1])
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"exit code {done.returncode}: {last[:200]}"}
    except Exception as error:
        return {"error": brief(error)}


def command(*words: str) -> str:
    """What a command prints; empty where it is absent, fails or hangs."""
    return answer(*words) or ""


def answer(*words: str) -> str | None:
    """What a command prints; None where it is absent, fails or hangs."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
        return done.stdout.strip() if done.returncode == 0 else None
    except (OSError, subprocess.TimeoutExpired):
        return None


def brief(error: Exception) -> str:
    """The first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota() -> float | None:
    """Cores the control group (version 2) grants; None without a limit."""
    match read("/sys/fs/cgroup/cpu.max").split():
        case [quota, period] if quota != "max":
            return int(quota) / int(period)
    return None


def memory_gib() -> float:
    """Physical memory, or the control group's limit where that is lower."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (read(f"/sys/fs/cgroup/{file}").strip() for file in ("memory.max", "memory/memory.limit_in_bytes"))
    return min([physical, *(int(limit) for limit in limits if limit.isdigit())]) / GIB


def read(path: str) -> str:
    """A small file; empty where it cannot be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
