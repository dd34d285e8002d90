"""environment.json: what a run ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "nvidia-dali-cuda130",
    "deepspeed",
    "ray",
    "wandb",
    "numpy",
    "tldist",
)


def environment() -> dict[str, Any]:
    """Versions, commit and hardware, as plain values."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "commit": _commit(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "hardware": hardware(),
        "cuda": torch.version.cuda,
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }


def hardware() -> dict[str, Any]:
    """Processor, usable cores, GPUs by name."""
    count = torch.cuda.device_count()
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(count)],
        "gpu_memory_gib": [round(torch.cuda.get_device_properties(i).total_memory / 2**30, 1) for i in range(count)],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str | None:
    """The commit of the source tree that runs, `+` when it has changes; None where it is an installed wheel."""
    here = Path(__file__).resolve().parents[2]
    if (here / "COMMIT").exists():  # a copy that `tldist submit` took
        return (here / "COMMIT").read_text() or None
    if not (here / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(here)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "") if head.returncode == 0 else None
