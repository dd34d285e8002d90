"""`tldist doctor`: what this machine has, what is missing, and what that costs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import rich.box
import rich.console
from rich.table import Table
from rich.text import Text

from tldist.tracking import wandb as tracking
from tldist_launcher.commands.machine import GIB, Machine, brief, command, cores, cpu_quota, examine, memory_gib, read

State = Literal["ok", "missing", "note"]

PLAIN_COLUMNS = 120
NEEDED_PYTHON = (3, 11)
OPTIONAL_PACKAGES = ("deepspeed", "nvidia-dali-cuda130", "ray", "wandb")
JPEG_HARDWARE = {"A30", "A100", "H100", "H200", "GH200", "B100", "B200", "GB200", "B300", "GB300"}
"""GPUs with an NVJPG engine that DALI's mixed decoder uses (nvJPEG documentation, "Hardware accelerated decode")."""


@dataclass(frozen=True)
class Row:
    """One line of the doctor's answer."""

    name: str
    state: State
    found: str
    cost: str = ""
    """What a missing thing costs and how to mend it; empty only where the state is ok."""
    fatal: bool = False
    """tldist cannot train at all."""


Probe = Callable[[Machine], Row]


def doctor_rows(machine: Machine | None = None) -> list[Row]:
    """Every row, in order; a probe that fails says so in its own row. `dataclasses.asdict` makes them JSON."""
    machine = examine() if machine is None else machine
    return [_guarded(name, probe, machine) for name, probe in PROBES.items()]


def print_doctor(rows: Sequence[Row], console: rich.console.Console | None = None) -> None:
    """The rows as a table, and one line that says whether tldist can train here."""
    if console is None:
        console = rich.console.Console(width=None if sys.stdout.isatty() else PLAIN_COLUMNS)
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for title, ratio in (("", None), ("state", None), ("found", 1), ("what it costs, and the mend", 1)):
        table.add_column(title, ratio=ratio, overflow="fold")
    style = {"ok": "green", "missing": "red", "note": "yellow"}
    for row in rows:
        table.add_row(Text(row.name), Text(row.state, style[row.state]), Text(row.found), Text(row.cost))
    console.print(table)
    fatal = [row.name for row in rows if row.fatal]
    verdict = f"tldist cannot train here: mend {', '.join(fatal)}" if fatal else "tldist can train here"
    console.print(Text(verdict, "bold red" if fatal else "bold green"))


def _guarded(name: str, probe: Probe, machine: Machine) -> Row:
    try:
        return probe(machine)
    except Exception as error:
        return Row(name, "note", f"the probe failed: {brief(error)}", "unknown; this row tells nothing")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def python_row(machine: Machine) -> Row:
    """The interpreter."""
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info[:2] >= NEEDED_PYTHON:
        return Row("Python", "ok", found)
    needed = ".".join(map(str, NEEDED_PYTHON))
    return Row("Python", "missing", found, f"nothing runs: install Python {needed} or newer", fatal=True)


def packages_row(machine: Machine) -> Row:
    """The packages no run can do without."""
    names = [
        re.split(r"[^\w.-]", line)[0] for line in importlib.metadata.requires("tldist") or () if "extra" not in line
    ]
    needed = [name for name in names if name not in OPTIONAL_PACKAGES]
    if absent := [name for name in needed if _version(name) is None]:
        cost = f"nothing runs: pip install {' '.join(absent)}"
        return Row("packages", "missing", f"without {', '.join(absent)}", cost, fatal=True)
    return Row("packages", "ok", f"all {len(needed)} that every run needs")


def torch_row(machine: Machine) -> Row:
    """torch, and the CUDA it was built for."""
    facts = machine.torch
    if "error" in facts:
        mend = "nothing trains: reinstall torch (make env)"
        return Row("torch", "missing", facts["error"], mend, fatal=True)
    return Row("torch", "ok", f"{facts['version']}, {_cuda_build(facts)}")


def _cuda_build(facts: dict[str, Any]) -> str:
    return f"built for CUDA {facts['cuda']}" if facts.get("cuda") else "built without CUDA"


def torchvision_row(machine: Machine) -> Row:
    """torchvision: the backbones and their weights."""
    if found := machine.torch.get("torchvision"):
        return Row("torchvision", "ok", found)
    version = _version("torchvision")
    found = f"{version} is installed and cannot be imported" if version else "not installed"
    mend = "no backbone can be built: install the torchvision that belongs to this torch (make env)"
    return Row("torchvision", "missing", found, mend, fatal=True)


def gpu_row(machine: Machine) -> Row:
    """The GPUs torch sees; those it does not see are told apart from none."""
    driver = ", ".join(sorted({line.split(", ")[-1] for line in machine.nvidia_smi.splitlines()}))
    if machine.gpus:
        kinds = [f"{gpu['name']} ({gpu['memory_gib']} GiB)" for gpu in machine.gpus]
        found = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
        return Row("GPUs", "ok", found + (f", driver {driver}" if driver else ""))
    cpu = f"training runs on {cores()} cores"
    if machine.nvidia_smi:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        found = f"{len(machine.nvidia_smi.splitlines())} with driver {driver}, none that torch can use"
        why = f"CUDA_VISIBLE_DEVICES is '{hidden}'" if hidden is not None else "compare the driver with torch's CUDA"
        return Row("GPUs", "missing", f"{found}; torch is {_cuda_build(machine.torch)}", f"{cpu}; {why}")
    return Row("GPUs", "missing", "none", cpu)


def bf16_row(machine: Machine) -> Row:
    """Whether bf16, the default precision, is computed in hardware."""
    if machine.gpus:
        old = [gpu["name"] for gpu in machine.gpus if not gpu["bf16"]]
        if not old:
            return Row("bf16", "ok", "in hardware on every GPU")
        return Row("bf16", "note", f"not on {', '.join(old)}", "bf16 is emulated there: use --train.precision fp16")
    flags = set(re.findall(r"\b(?:avx512_bf16|amx_bf16)\b", read("/proc/cpuinfo")))
    if flags:
        return Row("bf16", "ok", f"in hardware on the CPU ({', '.join(sorted(flags))})")
    return Row("bf16", "note", "not on this CPU", "bf16 is emulated and slow here: use --train.precision fp32")


def nccl_row(machine: Machine) -> Row:
    """The collectives between GPUs."""
    if nccl := machine.torch.get("nccl"):
        return Row("NCCL", "ok", nccl if machine.gpus else f"{nccl} (no GPU to use it)")
    if not machine.gpus:
        return Row("NCCL", "note", "not in this torch", "nothing on a machine without GPUs")
    return Row("NCCL", "missing", "not in this torch", "each run has one GPU: install a CUDA build of torch")


def gloo_row(machine: Machine) -> Row:
    """The collectives between CPU workers."""
    if machine.torch.get("gloo"):
        return Row("gloo", "ok", "in torch")
    return Row("gloo", "missing", "not in this torch", "CPU runs have one worker: install a torch with gloo")


def cores_row(machine: Machine) -> Row:
    """Cores and memory this process may use."""
    count, quota = cores(), cpu_quota()
    found = f"{count} cores, {memory_gib():.0f} GiB"
    if quota is not None and quota < count:
        cost = f"loaders would start more threads than run: set --data.threads {max(int(quota), 1)}"
        return Row("cores and memory", "note", f"{found}, of which the container gets {quota:g} cores", cost)
    return Row("cores and memory", "ok", found)


def shared_memory_row(machine: Machine) -> Row:
    """/dev/shm: where Ray, NCCL and loader workers exchange data."""
    size = shutil.disk_usage("/dev/shm")
    found = f"/dev/shm has {size.free / GIB:.1f} of {size.total / GIB:.1f} GiB free"
    if size.free >= GIB:
        return Row("shared memory", "ok", found)
    cost = "Ray falls back to disk and NCCL may fail: give the container more (docker run --shm-size 8g)"
    return Row("shared memory", "note", found, cost)


def dali_row(machine: Machine) -> Row:
    """The fast loader, and where it decodes."""
    if version := machine.dali.get("version"):
        where = "decodes on the GPU (mixed)" if machine.gpus else "decodes on the CPU"
        return Row("DALI", "ok", f"{version}, {where}")
    installed = _version("nvidia-dali-cuda130")
    found = f"{installed} is installed: {machine.dali.get('error')}" if installed else "not installed"
    cost = "images are decoded on the CPU alone, and in full where a crop would do: pip install nvidia-dali-cuda130"
    return Row("DALI", "missing", found, cost)


def jpeg_row(machine: Machine) -> Row:
    """The GPU's own JPEG engine."""
    with_engine = [gpu["name"] for gpu in machine.gpus if JPEG_HARDWARE & set(re.split(r"\W+", gpu["name"]))]
    if with_engine and machine.dali.get("version"):
        return Row("JPEG hardware", "ok", f"on {', '.join(dict.fromkeys(with_engine))}, used by DALI")
    if with_engine:
        return Row("JPEG hardware", "note", f"on {with_engine[0]}, unused", "DALI would use it: install it")
    cost = "JPEGs are decoded by CUDA cores and CPU threads" if machine.gpus else "JPEGs are decoded by the CPU"
    return Row("JPEG hardware", "note", "none known here (A100, H100 and newer data-centre GPUs have it)", cost)


def ray_row(machine: Machine) -> Row:
    """The launcher of more than one worker."""
    if version := _version("ray"):
        address = os.environ.get("RAY_ADDRESS")
        return Row("Ray", "ok", version + (f", cluster at {address}" if address else ""))
    return Row(
        "Ray", "missing", "not installed", "runs have one worker (--launch.kind local): pip install 'ray[train]'"
    )


def deepspeed_row(machine: Machine) -> Row:
    """The ZeRO engines."""
    if version := _version("deepspeed"):
        return Row("DeepSpeed", "ok", version)
    return Row("DeepSpeed", "missing", "not installed", "no engine zero1, zero2 or zero3: pip install deepspeed")


def wandb_row(machine: Machine) -> Row:
    """Weights & Biases and its login."""
    version, login = _version("wandb"), tracking.login()
    if version is None:
        cost = "runs are not mirrored; metrics.jsonl and the report have everything: pip install wandb"
        return Row("Weights & Biases", "missing", "not installed", cost)
    if login is None:
        cost = "runs are kept offline in RUN_DIR/wandb: wandb login, later tldist sync"
        return Row("Weights & Biases", "note", f"{version}, no login", cost)
    return Row("Weights & Biases", "ok", f"{version}, login from {login}")


def slurm_row(machine: Machine) -> Row:
    """Whether jobs can be submitted from here."""
    job = os.environ.get("SLURM_JOB_ID")
    inside = f"inside job {job}" if job else "outside a job"
    if shutil.which("sbatch"):
        return Row("Slurm", "ok", f"{command('sbatch', '--version') or 'sbatch without an answer'}, {inside}")
    cost = "no jobs can be submitted from here; training on this machine is unaffected"
    return Row("Slurm", "missing", f"no sbatch on the PATH, {inside}", cost)


def compiler_row(machine: Machine) -> Row:
    """What torch.compile calls: a C and a C++ compiler and Python's headers."""
    tools: dict[str, Any] = {
        "a C compiler": _tool("CC", "gcc", "cc", "clang"),
        "a C++ compiler": _tool("CXX", "g++", "clang++"),
    }
    tools["Python.h"] = (Path(sysconfig.get_path("include")) / "Python.h").is_file()
    if absent := [name for name, found in tools.items() if not found]:
        cost = "nothing in training; benchmarks cannot compile what they compare with: install gcc, g++, python3-dev"
        return Row("torch.compile", "missing", f"without {', '.join(absent)}", cost)
    return Row("torch.compile", "ok", f"{tools['a C++ compiler']} and Python's headers")


def _tool(variable: str, *names: str) -> str | None:
    wanted = os.environ.get(variable)
    return next(filter(None, map(shutil.which, (wanted,) if wanted else names)), None)


def triton_row(machine: Machine) -> Row:
    """The language of tldist's kernels."""
    if version := _version("triton"):
        unused = "" if machine.gpus else " (without a GPU each kernel's torch reference runs)"
        return Row("Triton", "ok", version + unused)
    return Row("Triton", "missing", "not installed", "each kernel's torch reference runs instead: pip install triton")


def weights_row(machine: Machine) -> Row:
    """torchvision's download folder."""
    home = os.environ.get("TORCH_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/torch"
    folder = Path(machine.torch.get("hub") or f"{home}/hub").expanduser() / "checkpoints"
    files = [*folder.glob("*.pth"), *folder.glob("*.safetensors")] if folder.is_dir() else []
    if files:
        size = sum(file.stat().st_size for file in files) / GIB
        return Row("weights", "ok", f"{len(files)} file{'' if len(files) == 1 else 's'}, {size:.1f} GiB in {folder}")
    cost = (
        "the first run downloads them: without a network put them there, give --model.weights FILE, or set TORCH_HOME"
    )
    return Row("weights", "note", f"none in {folder}", cost)


def disk_row(machine: Machine) -> Row:
    """Room for runs in the working directory."""
    free = shutil.disk_usage(Path.cwd()).free / GIB
    found = f"{free:.0f} GiB free in {Path.cwd()}"
    if free >= 5:
        return Row("disk", "ok", found)
    cost = "may fill up: a checkpoint of convnext_base with AdamW's state takes 1 GiB; set --run-dir to another disk"
    return Row("disk", "note", found, cost)


PROBES: dict[str, Probe] = {
    "Python": python_row,
    "packages": packages_row,
    "torch": torch_row,
    "torchvision": torchvision_row,
    "GPUs": gpu_row,
    "bf16": bf16_row,
    "cores and memory": cores_row,
    "shared memory": shared_memory_row,
    "disk": disk_row,
    "weights": weights_row,
    "torch.compile": compiler_row,
    "Triton": triton_row,
    "NCCL": nccl_row,
    "gloo": gloo_row,
    "DALI": dali_row,
    "JPEG hardware": jpeg_row,
    "Ray": ray_row,
    "DeepSpeed": deepspeed_row,
    "Slurm": slurm_row,
    "Weights & Biases": wandb_row,
}
