"""`tldist sync`: each thing that can stand in its way is one sentence. Uploading itself is W&B's."""

from __future__ import annotations

import http.server
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from tldist_launcher.cli import main
from tldist_launcher.commands import sync


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No login, and a server that nobody runs."""
    for variable in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)


def kept_offline(run_dir: Path) -> Path:
    folder = run_dir / "wandb" / "offline-run-20260101_000000-abc"
    folder.mkdir(parents=True)
    (folder / "run-abc.wandb").write_bytes(b":W&B\xbe\xe1\x00")
    return folder


def test_nothing_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync"]) == 0
    (kept_offline(tmp_path / "runs" / "a") / "run-abc.wandb.synced").touch()
    assert main(["sync", "runs/a"]) == 0
    assert capsys.readouterr().out == "nothing waits to be uploaded\n" * 2


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, sentence in (
        (["sync", "--all"], "tldist sync has no flag --all: it takes run directories (default: all under runs/)"),
        (["sync", "nowhere"], "nowhere holds nothing for W&B: give the folder that a run printed as `run:`"),
    ):
        assert main(words) == 2
        assert capsys.readouterr().err == f"tldist: {sentence}\n"


def test_without_login_or_network_it_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_offline(tmp_path / "runs" / "study" / "a")
    assert main(["sync"]) == 2
    assert "there is no W&B login" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert main(["sync"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("tldist: cannot reach http://127.0.0.1:9 ([Errno 111] Connection refused): nothing was")
    assert said.count("\n") == 1


class _Refusing(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def do_POST(self) -> None:
        self.send_error(403)

    def log_message(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_a_server_that_refuses_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's own sync runs, and fails."""
    folder = kept_offline(tmp_path / "runs" / "a")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        assert main(["sync", "runs/a"]) == 1
        server.shutdown()
    told = capsys.readouterr()
    assert told.out == "runs/a: 1 part\n"
    assert told.err.endswith("tldist: not all was uploaded, nothing is lost: say `tldist sync runs/a` again later\n")
    assert (folder / "run-abc.wandb").exists()
    assert sync.wandb_files.unsent(tmp_path / "runs" / "a") == [folder]
