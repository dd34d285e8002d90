"""`tldist doctor` survives every machine, and says what each missing thing costs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import rich.console

from tldist_launcher.commands import doctor
from tldist_launcher.commands import machine as machine_module
from tldist_launcher.commands.doctor import Row, doctor_rows, print_doctor
from tldist_launcher.commands.machine import Machine

TORCH = {"version": "2.11.0", "cuda": "13.0", "gpus": [], "nccl": "2.30.7", "gloo": True, "torchvision": "0.26.0"}
H100 = {"name": "NVIDIA H100 80GB HBM3", "memory_gib": 79.2, "bf16": True}
T4 = {"name": "Tesla T4", "memory_gib": 14.6, "bf16": False}
BARE = Machine({"error": "no torch"}, {"error": "no DALI"}, "")


def machine(**changes: Any) -> Machine:
    facts: dict[str, Any] = {"torch": dict(TORCH), "dali": {"version": "2.4.0"}, "nvidia_smi": ""}
    return Machine(**(facts | changes))


def with_gpus(*gpus: dict[str, Any], **changes: Any) -> Machine:
    smi = "\n".join(f"{gpu['name']}, 81559 MiB, 580.95" for gpu in gpus)
    return machine(torch=TORCH | {"gpus": list(gpus)}, nvidia_smi=smi, **changes)


def row(name: str, rows: list[Row]) -> Row:
    return next(row for row in rows if row.name == name)


def check(rows: list[Row]) -> None:
    """What holds of every answer: each probe has its row, each fault its cost, and all of it is JSON."""
    assert [row.name for row in rows] == list(doctor.PROBES)
    assert [row for row in rows if row.state != "ok" and not row.cost] == []
    assert [row for row in rows if row.fatal and row.state != "missing"] == []
    json.dumps([dataclasses.asdict(row) for row in rows])


def printed(rows: list[Row]) -> str:
    stream = io.StringIO()
    print_doctor(rows, rich.console.Console(file=stream, width=200))
    return stream.getvalue()


def test_this_machine_can_train_and_the_answer_is_quick() -> None:
    start = time.monotonic()
    rows = doctor_rows()
    assert time.monotonic() - start < 30  # 3 s where nothing else runs
    check(rows)
    assert [row for row in rows if row.fatal] == []
    assert row("torch", rows).state == row("torchvision", rows).state == "ok"
    assert "tldist can train here" in printed(rows)


def test_a_bare_machine_gets_every_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    for variable in list(os.environ):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = doctor_rows(BARE)
    check(rows)
    assert {row.name for row in rows if row.fatal} == {"packages", "torch", "torchvision"}
    for name in ("DALI", "Ray", "DeepSpeed", "Weights & Biases", "Slurm", "torch.compile", "Triton", "gloo"):
        assert row(name, rows).state == "missing", name
    assert "cannot train here: mend packages, torch, torchvision" in printed(rows)


@pytest.mark.parametrize("broken", ["os.sysconf", "shutil.disk_usage", "shutil.which", "pathlib.Path.is_dir"])
def test_a_probe_that_fails_is_its_own_row(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken\nin two lines")

    monkeypatch.setattr(broken, fail)
    rows = doctor_rows(machine())
    monkeypatch.undo()
    check(rows)
    failed = [row for row in rows if row.found == "the probe failed: RuntimeError: broken"]
    assert failed
    assert all(row.state == "note" and not row.fatal for row in failed)


def test_every_probe_is_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Machine) -> Row:
        raise ValueError("no such thing")

    monkeypatch.setattr(doctor, "PROBES", dict.fromkeys(doctor.PROBES, fail))
    check(doctor_rows(BARE))


def test_children_and_commands_that_crash_hang_or_are_absent_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "CHILD_TIMEOUT_S", 1)
    monkeypatch.setattr(machine_module, "COMMAND_TIMEOUT_S", 1)
    assert "exit code -11" in machine_module.child("import os; os.kill(os.getpid(), 11)")["error"]
    assert machine_module.child("import no_such_package")["error"].endswith("No module named 'no_such_package'")
    assert "TimeoutExpired" in machine_module.child("import time; time.sleep(9)")["error"]
    assert "error" in machine_module.child("print('not JSON')")
    assert machine_module.child("print('a warning'); print('{}')") == {}
    assert machine_module.command(sys.executable, "-c", "import time; time.sleep(9)") == ""
    assert machine_module.command("no-such-command") == ""
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert "error" in machine_module.child("print('{}')")


def test_an_empty_path_and_no_python_do_not_stop_the_examination(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    rows = doctor_rows()
    check(rows)
    assert row("torch", rows).fatal


def test_gpus_are_grouped_and_named_with_their_driver() -> None:
    rows = doctor_rows(with_gpus(H100, H100))
    assert row("GPUs", rows).found == "2 x NVIDIA H100 80GB HBM3 (79.2 GiB), driver 580.95"
    assert row("bf16", rows).state == "ok"
    assert row("JPEG hardware", rows).found == "on NVIDIA H100 80GB HBM3, used by DALI"
    assert row("DALI", rows).found.endswith("decodes on the GPU (mixed)")


def test_an_old_gpu_computes_no_bf16_and_has_no_jpeg_engine() -> None:
    rows = doctor_rows(with_gpus(T4))
    assert "--train.precision fp16" in row("bf16", rows).cost
    assert row("JPEG hardware", rows).state == "note"


def test_a_gpu_that_torch_cannot_use_is_not_called_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = row("GPUs", doctor_rows(machine(nvidia_smi="Tesla T4, 15360 MiB, 470.82")))
    assert found.found == "1 with driver 470.82, none that torch can use; torch is built for CUDA 13.0"
    assert "CUDA_VISIBLE_DEVICES is ''" in found.cost


def test_a_torchvision_of_another_torch_is_fatal() -> None:
    found = row("torchvision", doctor_rows(machine(torch=TORCH | {"torchvision": ""})))
    assert found.fatal
    assert "cannot be imported" in found.found


def test_small_disks_and_small_shared_memory_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    small = type("usage", (), {"total": 64 * 2**20, "free": 64 * 2**20})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: small)
    rows = doctor_rows(machine())
    assert row("disk", rows).state == row("shared memory", rows).state == "note"


def test_a_container_with_fewer_cores_than_it_shows_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/sys/fs/cgroup/cpu.max": "150000 100000\n", "/sys/fs/cgroup/memory.max": f"{2**30}\n"}
    monkeypatch.setattr(machine_module, "read", lambda path: files.get(path, ""))
    monkeypatch.setattr(doctor, "cores", lambda: 8)
    found = row("cores and memory", doctor_rows(machine()))
    assert (found.state, found.found) == ("note", "8 cores, 1 GiB, of which the container gets 1.5 cores")
    assert found.cost.endswith("--data.threads 1")


def test_slurm_weights_and_login_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho slurm 22.05.8\n")
    (tmp_path / "sbatch").chmod(0o755)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "resnet18.pth").write_bytes(b"x")
    for variable, value in {"PATH": str(tmp_path), "SLURM_JOB_ID": "7", "WANDB_API_KEY": "k"}.items():
        monkeypatch.setenv(variable, value)
    rows = doctor_rows(machine(torch=TORCH | {"hub": str(tmp_path / "hub")}))
    assert row("Slurm", rows) == Row("Slurm", "ok", "slurm 22.05.8, inside job 7")
    assert row("weights", rows).found.startswith("1 file, ")
    assert row("Weights & Biases", rows).found.endswith("login from WANDB_API_KEY")


def test_the_doctor_itself_imports_nothing_heavy() -> None:
    code = (
        "import sys, tldist_launcher.commands.doctor; "
        "sys.exit(bool({'torch', 'ray', 'wandb', 'deepspeed'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0
