"""The W&B mirror: what arrives, and that nothing which happens to W&B reaches the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tldist.tracking import wandb as mirror
from tldist.tracking import wandb_rows
from tldist.tracking.wandb import Mirrored, NodeMonitor, WandbSink, login
from tldist.tracking.wandb_files import Stored, parts, unsent
from tldist.tracking.wandb_files import read as read_file

FAKE_KEY = "a" * 40


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No login, no W&B variable and no W&B process of another test."""
    mirror._teardown()
    for variable in list(os.environ):
        if variable.startswith("WANDB_"):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETRC", raising=False)
    yield
    mirror._teardown()
    for variable in list(os.environ):  # what the sink itself set
        if variable.startswith("WANDB_"):
            del os.environ[variable]


def read(run_dir: Path) -> list[Stored]:
    """What each process wrote, oldest first."""
    return [read_file(path) for path in parts(run_dir)]


def a_run(run_dir: Path, **changes: Any) -> Mirrored:
    told: dict[str, Any] = {
        "run_id": "abc12345",
        "project": "tldist",
        "name": "a run",
        "config": {"seed": 3, "model": {"name": "resnet18"}},
        "tags": ["gradual", "x" * 80],
    }
    return Mirrored(run_dir, **(told | changes))


def open_sink(run_dir: Path, mode: str = "offline", **changes: Any) -> tuple[WandbSink | None, list[str]]:
    said: list[str] = []
    return WandbSink.open(mode, a_run(run_dir, **changes), said.append), said


def opened(run_dir: Path, **changes: Any) -> tuple[WandbSink, list[str]]:
    sink, said = open_sink(run_dir, **changes)
    assert sink is not None, said
    return sink, said


def connected(run_dir: Path, **changes: Any) -> tuple[WandbSink, list[str]]:
    """A sink whose thread has begun to take rows."""
    sink, said = opened(run_dir, **changes)
    deadline = time.monotonic() + 60
    while sink._run is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    return sink, said


def train(step: int, **more: Any) -> dict[str, Any]:
    row = {"event": "train", "time": 1.0 * step, "step": step, "epoch": step // 10, "phase": 0, "loss": 1 / step}
    row |= {"top1": 0.5, "lr": {"layer4": 1e-4, "head": 1e-3}, "images_per_s": 100.0}
    return row | {"data_wait_share": 0.1, "peak_mem_gib": 0.5} | more


def service_pid() -> int:
    """The wandb-core process that the sink of this process started."""
    from wandb.sdk import wandb_setup

    service: Any = wandb_setup.singleton().ensure_service()
    return service._proc._process.pid


def test_history_summary_and_config_arrive(tmp_path: Path) -> None:
    sink, said = opened(tmp_path, group="a study")
    sink.write({"event": "run", "classes": ["ants", "bees"], "world_size": 2})
    sink.write(
        {
            "event": "phase",
            "phase": 0,
            "name": "head",
            "epoch": 0,
            "step": 0,
            "trainable_params": 1026,
            "gflops_per_image": 3.6,
            "compile_s": 0.0,
            "is_cached": True,
        }
    )
    for step in range(1, 41):
        workers = {"worker_images_per_s": [40.0, 60.0], "worker_data_wait_share": [0.1, 0.2]}
        sink.write(train(step, tflops_per_s=1.5, mfu=0.4 if step > 1 else None, grad_norm=2.5, **workers))
    sink.write({"event": "eval", "epoch": 4, "step": 40, "val_loss": 0.3, "val_top1": 0.9, "best_val_top1": 0.95})
    sink.write({"event": "notice", "text": "a notice"})
    phases = [{"name": "head", "mfu": 0.4, "compile_s": 0.0}, {"name": "+layer4", "mfu": None, "gflops_per_image": 5.1}]
    end = {"event": "end", "val_top1": 0.9, "wall_s": 12.5, "images_per_s": 99.0, "tflops_per_s": 1.4, "mfu": 0.39}
    sink.write(end | {"per_phase": phases, "peak_flops": {"tflops": 1.05, "source": "measured"}})
    sink.close()

    (stored,) = read(tmp_path)
    assert said == []
    assert stored.run_id == sink.run_id
    assert (stored.project, stored.group, stored.tags) == ("tldist", "a study", ["gradual", "x" * 64])
    assert stored.config["model"] == {"name": "resnet18"}
    assert stored.config["run"] == {"classes": ["ants", "bees"], "world_size": 2}
    assert [row["_step"] for row in stored.history] == list(range(41))
    assert stored.history[0]["phase/trainable_params"] == 1026
    assert stored.history[0]["phase/gflops_per_image"] == 3.6
    assert stored.history[0]["phase/is_cached"] is True
    assert stored.history[1]["gradient/norm"] == 2.5
    assert stored.history[1]["workers_images_per_s/1"] == 60.0
    assert stored.history[1]["workers_data_wait_share/0"] == 0.1
    assert stored.history[1]["throughput/images_per_s_per_worker"] == 50.0
    assert [row.get("throughput/mfu") for row in stored.history[1:3]] == [None, 0.4]
    assert stored.history[1]["throughput/tflops_per_s"] == 1.5
    assert [row["train/loss"] for row in stored.history[1:]] == [1 / step for step in range(1, 41)]
    expected = {"lr/layer4": 1e-4, "lr/head": 1e-3, "throughput/images_per_s": 100.0, "memory/peak_gib": 0.5}
    expected |= {"phase": 0, "epoch": 4, "val/loss": 0.3, "val/top1": 0.9, "val/best_top1": 0.95}
    assert expected.items() <= stored.history[-1].items()
    summary = {"val_top1": 0.9, "wall_s": 12.5, "images_per_s": 99.0, "tflops_per_s": 1.4, "mfu": 0.39}
    summary |= {"per_phase/1_head/mfu": 0.4, "per_phase/2_layer4/gflops_per_image": 5.1}
    assert summary.items() <= stored.summary.items()
    assert stored.summary["peak_flops"] == {"tflops": 1.05, "source": "measured"}
    assert not {"per_phase", "per_phase/2_layer4/mfu"} & stored.summary.keys()
    assert stored.alerts == [("INFO", "tldist: finished", "best validation top-1 -, after 0:12")]
    assert stored.exit_code == 0
    assert "a notice" in stored.logs
    assert "phase 1  head" in stored.logs


def test_rows_of_the_same_step_share_a_history_row_and_steps_never_go_back(tmp_path: Path) -> None:
    sink, said = opened(tmp_path)
    for step in (10, 20, 10, 15, 20, 30):
        sink.write(train(step, loss=float(step)))
    sink.write({"event": "eval", "step": 30, "val_top1": 0.5})
    sink.close()
    (stored,) = read(tmp_path)
    assert [(row["_step"], row["train/loss"]) for row in stored.history] == [(10, 10.0), (20, 20.0), (30, 30.0)]
    assert stored.history[-1]["val/top1"] == 0.5
    assert said == []


def test_predictions_become_a_table_of_thumbnails_and_a_confusion_chart(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.jpg" for i in range(40)]
    for file in files:
        Image.new("RGB", (640, 480), "red").save(file)
    files[1].write_bytes(b"not an image")
    samples = [{"path": str(f), "label": "ants", "predicted": "bees", "confidence": 0.7} for f in files]
    sink, said = opened(tmp_path)
    sink.write(train(10))
    sink.write(
        {"event": "predictions", "classes": ["ants", "bees"], "confusion_CC": [[5, 1], [0, 7]], "samples": samples}
    )
    sink.close()

    (stored,) = read(tmp_path)
    assert said == []
    assert stored.history[-1]["_step"] == 10
    assert stored.history[-1]["val/predictions.nrows"] == wandb_rows.MAX_SAMPLES
    assert stored.history[-1]["val/confusion_table.nrows"] == 4
    assert "wandb/confusion_matrix/v1" in str(stored.config)
    staged = [*tmp_path.glob("wandb/artifacts/staging/*")]  # what `wandb sync` uploads stays with the run
    table = next(t for f in staged if (t := load_table(f)) and t["columns"][0] == "image")
    assert table["data"][0][1:] == ["ants", "bees", 0.7, False]
    assert max(table["data"][0][0]["width"], table["data"][0][0]["height"]) == wandb_rows.THUMBNAIL_PX
    assert table["data"][1][0] is None, "a file that cannot be read keeps its row"
    per_class = next(t for f in staged if (t := load_table(f)) and t["columns"][0] == "class")
    assert per_class["data"] == [["ants", 5 / 6, 6], ["bees", 1.0, 7]]


def load_table(file: Path) -> dict[str, Any] | None:
    """A staged table; None for the pictures and the other files beside it."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        return None
    return content if "columns" in content else None


def test_a_large_confusion_matrix_keeps_its_largest_cells() -> None:
    classes = [f"c{i}" for i in range(60)]
    counts_CC = [[10 if i == j else 0 for j in range(60)] for i in range(60)]
    chart = wandb_rows._confusion_chart(classes, counts_CC)
    assert len(chart.table.data) == wandb_rows.MAX_CHART_CLASSES**2
    assert [cell[:2] for cell in chart.table.data[:60]] == [[c, c] for c in classes]


def test_many_workers_become_three_curves() -> None:
    row = wandb_rows.history_row(train(1, worker_images_per_s=[float(i) for i in range(101)])) or {}
    curves = {key: value for key, value in row.items() if key.startswith("workers_")}
    assert curves == {f"workers_images_per_s/{of}": value for of, value in (("min", 0), ("median", 50), ("max", 100))}


def log_of(run_dir: Path, rows: list[dict[str, Any]], arrives: int) -> Path:
    """One process of a run: metrics.jsonl has all rows, W&B only the first ones."""
    sink, said = opened(run_dir)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for row in rows[:arrives]:
        sink.write(row)
    sink.close()
    assert (sink.run_id, said) == ("abc12345", [])
    mirror._teardown()
    return parts(run_dir)[-1]


def test_a_run_that_goes_on_is_whole_and_has_each_step_once(tmp_path: Path) -> None:
    """A kill loses what W&B had not written (here an evaluation and all after it), and a resumed run repeats steps."""
    phase = {"event": "phase", "phase": 0, "name": "head", "epoch": 0, "step": 0, "trainable_params": 1026}
    val = {"event": "eval", "epoch": 1, "step": 3, "val_top1": 0.5}
    log_of(tmp_path, [phase, train(1), train(2), train(3), val, train(4), train(5)], arrives=4)
    again = [phase | {"step": 2}, train(3), val, train(4), train(5), train(6), val | {"epoch": 2, "step": 6}]
    file = log_of(tmp_path, again, arrives=6)
    with file.open("r+b") as cut:  # killed while it wrote
        cut.truncate(file.stat().st_size - 9)
    log_of(tmp_path, [train(7)], arrives=1)

    stored = read(tmp_path)
    assert [run.run_id for run in stored] == ["abc12345"] * 3
    history = [row for run in stored for row in run.history]
    for kind, key in (("train", "train/step"), ("eval", "val/step")):
        expected = {"train": list(range(1, 8)), "eval": [3, 6]}[kind]
        assert [row[key] for row in history if key in row] == expected
    steps = [row["_step"] for row in history]
    assert steps == sorted(set(steps))
    assert [row["train/loss"] for row in history if "train/loss" in row] == [1 / step for step in range(1, 8)]


def test_an_alert_on_another_worker_claims_no_more_than_is_known() -> None:
    """It may have failed, which the launcher does not mend."""
    alert = mirror._alert({"event": "error", "kind": "DistBackendError", "text": "closed by peer", "lost_peer": True})
    assert alert is not None
    assert alert["title"] == "tldist: another worker is gone"
    assert "if its process was lost, the launcher starts the workers again" in alert["text"]
    assert "if it failed, the run has ended" in alert["text"]
    assert alert["text"].endswith("closed by peer")


def test_a_run_that_failed_diverged_or_was_stopped_says_so(tmp_path: Path) -> None:
    for kind, exit_code in (("UserError", 1), ("ReplicasDiverged", 1), ("", mirror.STOPPED)):
        sink, _ = opened(tmp_path)
        if kind:
            sink.write({"event": "error", "kind": kind, "text": "because"})
        sink.close(exit_code)
        mirror._teardown()
    failed, diverged, stopped = read(tmp_path)
    assert failed.alerts == [("ERROR", "tldist: failed", "UserError: because")]
    assert diverged.alerts == [("ERROR", "tldist: diverged", "ReplicasDiverged: because")]
    assert "because" in failed.logs
    assert (failed.exit_code, failed.preempting, stopped.alerts) == (1, False, [])
    assert (stopped.exit_code, stopped.preempting) == (mirror.STOPPED, True)


def test_weights_are_an_artifact_that_refers_to_the_file(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(os.urandom(4_000_000))
    sink, said = opened(tmp_path)
    sink.write({"event": "files", "name": "model", "paths": [str(weights)], "aliases": ["best", "last"]})
    sink.close()
    (stored,) = read(tmp_path)
    assert stored.artifacts == [("model-abc12345", ["best", "last", "latest"], ["model.safetensors"])]
    assert said == []
    assert sum(path.stat().st_size for path in (tmp_path / "wandb").rglob("*") if path.is_file()) < 1_000_000


def test_several_nodes_offline_are_told_of_and_a_node_that_cannot_join_costs_nothing(tmp_path: Path) -> None:
    sink, said = opened(tmp_path, nodes=2)
    sink.close()
    assert said == ["W&B: offline, so GPU and CPU of the first node alone are on record"]
    mirror._teardown()
    monitor = NodeMonitor(a_run(tmp_path, nodes=2))  # shared mode wants a login
    monitor.close()
    assert monitor.trouble


def test_what_is_to_be_uploaded(tmp_path: Path) -> None:
    names = ["offline-run-20260101_1-abc", "run-20260101_2-abc", "run-20260101_3-abc", "offline-run-20260101_4-abc"]
    for name in names:
        (tmp_path / "wandb" / name).mkdir(parents=True)
        (tmp_path / "wandb" / name / "run-abc.wandb").touch()
    (tmp_path / "wandb" / names[1] / "unsent").touch()
    assert [folder.name for folder in unsent(tmp_path)] == [names[1], names[3]]
    (tmp_path / "wandb" / names[3] / "run-abc.wandb.synced").touch()
    assert [folder.name for folder in unsent(tmp_path)] == [names[1]]


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_without_a_login_the_run_is_kept_offline_and_says_so(mode: str, tmp_path: Path) -> None:
    sink, said = opened(tmp_path, mode=mode)
    sink.write(train(1))
    sink.close()
    assert len(said) == 1
    upload = f"upload it with `tldist sync {tmp_path}`"
    assert said[0] == f"W&B: no login, the run is kept in {tmp_path}/wandb; {upload}"
    assert len(read(tmp_path)[0].history) == 1


@pytest.mark.parametrize(("mode", "variable"), [("disabled", None), ("disabled", "online"), ("auto", "disabled")])
def test_disabled_is_none_and_silent(
    mode: str, variable: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert open_sink(tmp_path, mode) == (None, [])
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize("variable", ["", "offline", "dryrun"])
def test_wandb_mode_is_followed_and_may_be_empty(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", variable)
    sink, said = opened(tmp_path, mode="auto")
    sink.close()
    assert len(said) == (0 if variable else 1)  # an empty one is no wish: the missing login is told


def test_a_server_that_does_not_answer_means_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    monkeypatch.setattr(mirror, "INIT_TIMEOUT_S", 2)
    began = time.monotonic()
    sink, said = opened(tmp_path, mode="auto")
    sink.write(train(1))
    assert time.monotonic() - began < 1, "connecting is the thread's business"
    sink.close()
    assert len(said) == 1
    assert said[0].startswith("W&B: no connection (")
    assert said[0].endswith(f"the run is kept offline; upload it with `tldist sync {tmp_path}`")
    assert [len(run.history) for run in read(tmp_path) if run.history] == [1]
    assert capfd.readouterr().err == ""


def test_an_error_at_the_start_is_one_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no wandb-core\nsecond line")

    monkeypatch.setattr(mirror, "_init", broken)
    sink, said = opened(tmp_path)
    sink.close()
    sink.write(train(1))
    line = "W&B: stopped (RuntimeError: no wandb-core); training goes on and metrics.jsonl has everything"
    assert said == [line]


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_hanging_wandb_core_neither_raises_nor_blocks(
    fault: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "FINISH_TIMEOUT_S", -9)  # waits FINISH_TIMEOUT_S + 10 = 1 s for a hanging one
    sink, said = connected(tmp_path)
    sink.write(train(1))
    os.kill(service_pid(), fault)
    time.sleep(0.3)
    start = time.monotonic()
    for step in range(2, 2000):
        sink.write(train(step))
    writing_s = time.monotonic() - start
    sink.close()
    assert writing_s < 1
    assert time.monotonic() - start < 5
    assert len(said) == 1
    assert said[0].startswith("W&B: stopped (")
    assert not sink._thread.is_alive()


def test_a_full_queue_ends_the_mirror_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "QUEUE_ROWS", 2)
    sink, said = connected(tmp_path)
    pid = service_pid()
    os.kill(pid, signal.SIGSTOP)
    for step in range(1, 3000):
        sink.write(train(step, phase_note=1.0))
    sink.close()
    assert len(said) == 1
    assert "takes no more rows" in said[0]


def test_a_run_that_loses_wandb_core_exits_quietly(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        "from tests.unit import test_wandb as t\n"
        "sink, said = t.connected(Path(sys.argv[1]))\n"
        "os.kill(t.service_pid(), signal.SIGKILL); time.sleep(0.3)\n"
        "sink.write(t.train(1)); sink.write(t.train(2)); time.sleep(0.3); sink.close(); print(len(said))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": "."})
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_login_is_found_in_the_environment_and_in_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert login() is None
    file = tmp_path / "netrc"
    file.write_text(f"machine wandb.example.org login user password {FAKE_KEY}\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    assert login() is None, "a login for another server does not count"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert login() == str(file)
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    assert login() == "WANDB_API_KEY"


def test_importing_the_sink_does_not_import_wandb() -> None:
    code = "import sys, tldist.tracking.wandb; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_run_leaves_no_variable_behind_and_the_next_stages_in_its_own_folder(tmp_path: Path) -> None:
    before = dict(os.environ)
    for name in ("first", "second"):
        sink, said = connected(tmp_path / name)
        staged_in = os.environ["WANDB_DATA_DIR"]
        sink.close()
        assert said == []
        assert staged_in == str(tmp_path / name / "wandb")
        assert dict(os.environ) == before
