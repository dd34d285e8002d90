"""Orders to a running job: found within about a second, at the same step by every worker."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from conftest import run_ranks

from tldist import dist
from tldist.config import LaunchConfig
from tldist.guard import control
from tldist.guard.control import Control, Orders
from tldist_launcher.start.ray import workers_for

CPU = torch.device("cpu")
NONE_SKIPPED = torch.tensor(0.0)


def test_looks_follow_the_time_a_step_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 steps a second: looks after 1, 11, 111 and then every 128; a new epoch, whose steps may be slow, begins with
    one."""
    now: list[float] = [0.0]
    looks: list[float] = []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(control, "stop_reason", lambda _: looks.append(now[0] * 128))
    orders = Control(tmp_path, 0, CPU)
    for _ in range(400):
        now[0] += 1 / 128
        orders.after_step(NONE_SKIPPED)
    assert looks == [1, 11, 111, 239, 367]
    orders.begin()
    orders.after_step(NONE_SKIPPED)
    assert len(looks) == 6


def test_what_it_is_told(tmp_path: Path) -> None:
    orders = Control(tmp_path, 0, CPU)
    assert orders.after_step(NONE_SKIPPED) == Orders()
    control.ask_to_stop(tmp_path, "SIGUSR1")
    assert orders.after_step(torch.tensor(4.0), now=True) == Orders(stop=True, most_skipped=4)
    assert control.stop_reason(tmp_path) == "SIGUSR1"
    control.forget_stop(tmp_path)
    assert orders.after_step(NONE_SKIPPED, now=True) == Orders()


def test_what_came_while_it_started_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch script, which forgot what is old by itself; a reason that has been answered goes there, too."""
    monkeypatch.setenv("TLDIST_RUN_DIR", str(tmp_path))
    for reason in ("SIGUSR1", control.MORE_PLACES):
        control.ask_to_stop(tmp_path, reason)
    control.forget_stop(tmp_path)
    control.forget_stop(tmp_path, control.MORE_PLACES)
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["stop.SIGUSR1"]
    monkeypatch.setenv("TLDIST_RUN_DIR", "/another")
    control.forget_stop(tmp_path)
    assert control.stop_reason(tmp_path) is None


def test_an_old_checkpoint_calls_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    orders = Control(tmp_path, 2, CPU)
    now[0] = 119.0
    assert not orders.after_step(NONE_SKIPPED, now=True).save
    now[0] = 120.0
    assert orders.after_step(NONE_SKIPPED, now=True).save
    orders.saved()
    assert not orders.after_step(NONE_SKIPPED, now=True).save


def _stops_at(run_dir: str) -> int:
    """Rank 1 is asked, rank 0 looks; rank 1's steps are uneven."""
    dist.init(CPU)
    orders = Control(Path(run_dir), 0, CPU)
    step = 0
    while True:
        step += 1
        if dist.rank() == 1 and step == 50:
            control.ask_to_stop(Path(run_dir), "SIGTERM")
        time.sleep(0.002 * dist.rank())
        if orders.after_step(NONE_SKIPPED).stop:
            break
    dist.close()
    return step


def test_all_workers_stop_at_one_step(tmp_path: Path) -> None:
    first, second = run_ranks(_stops_at, 2, str(tmp_path))
    assert first == second >= 50


@pytest.mark.parametrize(
    ("places", "wanted", "batch", "workers"),
    [(8, "4", 32, 4), (3, "4", 32, 0), (3, "1:4", 32, 2), (9, "1:4", 32, 4), (3, "2:6", 30, 3), (1, "2:6", 30, 0)],
)
def test_workers_for_so_many_places(places: int, wanted: str, batch: int, workers: int) -> None:
    assert workers_for(places, LaunchConfig(workers=wanted), batch) == workers
