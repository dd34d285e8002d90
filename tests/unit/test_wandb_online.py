"""The mirror against a server: a run that goes on, a network that dies, several nodes, and an upload afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_wandb import a_run, clean_environment, connected, log_of, train
from tests.wandb_server import Server, serving
from tldist.tracking import wandb as mirror
from tldist.tracking.wandb import WandbSink
from tldist.tracking.wandb_files import parts, unsent
from tldist_launcher.cli import main

__all__ = ["clean_environment"]
KEY = "a" * 40


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving() as held:
        monkeypatch.setenv("WANDB_BASE_URL", held.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield held
        mirror._teardown()


def steps(server: Server) -> list[tuple[int, int]]:
    return [(row["_step"], row["train/step"]) for row in server.history("abc12345")]


def test_a_run_that_goes_on_fills_up_what_the_server_lacks(server: Server, tmp_path: Path) -> None:
    """The first process logged five steps, of which the server has four; the second begins at step 4 again."""
    rows = [train(step) for step in range(1, 6)]
    sink, said = connected(tmp_path, mode="online")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows[:4]:
        sink.write(row)
    sink.close()
    mirror._teardown()
    assert steps(server) == [(step, step) for step in range(1, 5)]
    sink, said = connected(tmp_path, mode="online")
    for step in range(4, 8):
        sink.write(train(step))
    sink.close()
    assert (said, unsent(tmp_path)) == ([], [])
    assert steps(server) == [(step, step) for step in range(1, 8)]
    assert server.config["abc12345"]["project"] == "tldist"


def test_a_network_that_dies_costs_a_line(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not uploaded is kept, and `tldist sync` finds it."""
    monkeypatch.setattr(mirror, "FINISH_TIMEOUT_S", 3)
    sink, said = connected(tmp_path, mode="online")
    server.answers = False
    for step in range(1, 6):
        sink.write(train(step))
    sink.close()
    assert said == [f"W&B: not all was uploaded in 3 s; upload it with `tldist sync {tmp_path}`"]
    assert unsent(tmp_path) == [parts(tmp_path)[0].parent]


NODE = """
import sys
from pathlib import Path
from tests.unit.test_wandb import a_run
from tldist.tracking.wandb import NodeMonitor
monitor = NodeMonitor(a_run(Path(sys.argv[1]), nodes=2, label="second"))
print("ready", flush=True)
sys.stdin.read()
monitor.close()
print(monitor.trouble)
"""


def test_two_nodes_are_in_one_run(server: Server, tmp_path: Path) -> None:
    sink = WandbSink.open("online", a_run(tmp_path, nodes=2, label="first"), pytest.fail)
    assert sink is not None
    assert sink.mode == "shared"
    words: Any = [sys.executable, "-c", NODE, str(tmp_path)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(words, env=os.environ | {"PYTHONPATH": "."}, **pipes) as node:
        assert node.stdout
        assert node.stdout.readline() == "ready\n"
        for step in (10, 20, 30):
            sink.write(train(step))
        assert node.communicate(timeout=120)[0] == "None\n"
    sink.close()
    assert [row["train/step"] for row in server.history("abc12345")] == [10, 20, 30]
    assert server.nodes["abc12345"] == {"first", "second"}


def test_what_was_kept_offline_is_uploaded_once_and_in_order(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seen in ((1, 2, 3), (3, 4, 5)):
        log_of(tmp_path, [train(step) for step in seen], arrives=3)
    assert main(["sync", str(tmp_path)]) == 0
    assert steps(server) == [(step, step) for step in range(1, 6)]
    assert capsys.readouterr().out == f"{tmp_path}: 2 parts\n"
    assert main(["sync", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "nothing waits to be uploaded\n"
