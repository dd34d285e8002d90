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

from tests.wandb_reader import read
from tldist.tracking import wandb as mirror
from tldist.tracking.wandb import WandbSink, login

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


def open_sink(run_dir: Path, mode: str = "offline", **changes: Any) -> tuple[WandbSink | None, list[str]]:
    said: list[str] = []
    arguments: dict[str, Any] = {
        "project": "tldist",
        "name": "a run",
        "config": {"seed": 3, "model": {"name": "resnet18"}},
        "tags": ["gradual", "x" * 80],
        "run_id": None,
        "notice": said.append,
    }
    return WandbSink.open(mode, run_dir=run_dir, **(arguments | changes)), said


def opened(run_dir: Path, **changes: Any) -> tuple[WandbSink, list[str]]:
    sink, said = open_sink(run_dir, **changes)
    assert sink is not None, said
    return sink, said


def train(step: int, **more: Any) -> dict[str, Any]:
    row = {"event": "train", "time": 1.0 * step, "step": step, "epoch": step // 10, "phase": 0, "loss": 1 / step}
    row |= {"top1": 0.5, "lr": {"layer4": 1e-4, "head": 1e-3}, "images_per_s": 100.0}
    return row | {"data_wait_share": 0.1, "peak_mem_gib": 0.5} | more


def service_pid() -> int:
    """The wandb-core process that this process started."""
    from wandb.sdk import wandb_setup

    service: Any = wandb_setup.singleton().ensure_service()
    return service._proc._process.pid


def test_history_summary_and_config_arrive(tmp_path: Path) -> None:
    sink, said = opened(tmp_path)
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
        }
    )
    for step in range(1, 41):
        sink.write(train(step, tflops_per_s=1.5, mfu=0.4 if step > 1 else None))
    sink.write({"event": "eval", "epoch": 4, "step": 40, "val_loss": 0.3, "val_top1": 0.9, "best_val_top1": 0.95})
    sink.write({"event": "notice", "text": "not for W&B"})
    phases = [{"name": "head", "mfu": 0.4, "compile_s": 0.0}, {"name": "+layer4", "mfu": None, "gflops_per_image": 5.1}]
    end = {"event": "end", "val_top1": 0.9, "wall_s": 12.5, "images_per_s": 99.0, "tflops_per_s": 1.4, "mfu": 0.39}
    sink.write(end | {"per_phase": phases, "peak_flops": {"tflops": 1.05, "source": "measured"}})
    sink.close()

    (stored,) = read(tmp_path)
    assert said == []
    assert stored.run_id == sink.run_id
    assert (stored.project, stored.tags) == ("tldist", ["gradual", "x" * 64])
    assert stored.config["model"] == {"name": "resnet18"}
    assert stored.config["run"] == {"classes": ["ants", "bees"], "world_size": 2}
    assert [row["_step"] for row in stored.history] == list(range(41))
    assert stored.history[0]["phase/trainable_params"] == 1026
    assert stored.history[0]["phase/gflops_per_image"] == 3.6
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
    assert stored.history[-1]["val/predictions.nrows"] == mirror.MAX_SAMPLES
    assert stored.history[-1]["val/confusion_table.nrows"] == 4
    assert "wandb/confusion_matrix/v1" in str(stored.config)
    staged = [*tmp_path.glob("wandb/artifacts/staging/*")]  # what `wandb sync` uploads stays with the run
    table = next(t for f in staged if (t := load_table(f)) and t["columns"][0] == "image")
    assert table["data"][0][1:] == ["ants", "bees", 0.7, False]
    assert max(table["data"][0][0]["width"], table["data"][0][0]["height"]) == mirror.THUMBNAIL_PX
    assert table["data"][1][0] is None, "a file that cannot be read keeps its row"


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
    chart = mirror._confusion_chart(classes, counts_CC)
    assert len(chart.table.data) == mirror.MAX_CHART_CLASSES**2
    assert [cell[:2] for cell in chart.table.data[:60]] == [[c, c] for c in classes]


def test_a_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    for steps in ((1, 2), (2, 3)):
        sink, said = opened(tmp_path, run_id="abc12345")
        for step in steps:
            sink.write(train(step))
        sink.close()
        assert (sink.run_id, said) == ("abc12345", [])
        mirror._teardown()
    assert [run.run_id for run in read(tmp_path)] == ["abc12345"] * 2


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_without_a_login_the_run_is_kept_offline_and_says_so(mode: str, tmp_path: Path) -> None:
    sink, said = opened(tmp_path, mode=mode)
    sink.write(train(1))
    sink.close()
    assert len(said) == 1
    assert said[0].startswith(f"W&B: no login, the run is kept in {tmp_path}/wandb; upload it with `wandb sync ")
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
    sink, said = opened(tmp_path, mode="auto", run_id="abc12345")
    sink.write(train(1))
    sink.close()
    assert len(said) == 1
    assert said[0].startswith("W&B: no connection (")
    assert [len(run.history) for run in read(tmp_path) if run.history] == [1]
    assert capfd.readouterr().err == ""


def test_an_error_at_the_start_is_one_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no wandb-core\nsecond line")

    monkeypatch.setattr(mirror, "_init", broken)
    sink, said = open_sink(tmp_path)
    assert sink is None
    assert said == ["W&B: off for this run (RuntimeError: no wandb-core); metrics.jsonl has everything"]


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_hanging_wandb_core_neither_raises_nor_blocks(
    fault: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "FINISH_TIMEOUT_S", -9)  # waits FINISH_TIMEOUT_S + 10 = 1 s for a hanging one
    sink, said = opened(tmp_path)
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
    sink, said = opened(tmp_path)
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
        "sink, said = t.opened(Path(sys.argv[1]))\n"
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
