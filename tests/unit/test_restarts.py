"""The launcher's loop around lost workers and changing clusters; the workers here are functions."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from tldist.config import LaunchConfig, RunConfig, TrainingFailed
from tldist.guard import control
from tldist_launcher.start import ray
from tldist_launcher.start.ray import WorkersLost


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


def play(monkeypatch: pytest.MonkeyPatch, run_dir: Path, *starts: Callable[[], None], workers: str = "1:2") -> int:
    """How often the workers were started; each start does the next thing."""
    told = list(starts)

    def fit(_: object) -> None:
        told.pop(0)()

    monkeypatch.setattr(ray, "_fit", fit)
    monkeypatch.setattr(ray, "_trainer", lambda *_: None)
    monkeypatch.setattr(ray, "_wait_for_places", lambda _, wanted, __: wanted.most)
    made = RunConfig(run_dir=str(run_dir), launch=LaunchConfig(workers=workers, restarts=2))
    ray._fit_with_restarts(made, io.StringIO())
    return len(starts) - len(told)


def lost() -> None:
    raise WorkersLost("worker 1 died")


def saving(run_dir: Path, name: str) -> Callable[[], None]:
    """A start that saves, and then loses a worker."""

    def start() -> None:
        (run_dir / "checkpoints" / name).mkdir(parents=True)
        last = run_dir / "checkpoints" / "last"
        last.unlink(missing_ok=True)
        last.symlink_to(name)
        lost()

    return start


def finishing(run_dir: Path) -> Callable[[], None]:
    return lambda: (run_dir / "summary.json").touch()


def test_it_goes_on_while_there_is_progress(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
    starts = [saving(run_dir, f"epoch-{i:04d}") for i in range(9)]
    assert play(monkeypatch, run_dir, lost, *starts, finishing(run_dir)) == 11
    said = (run_dir / "metrics.jsonl").read_text()
    assert "worker 1 died: starting again from the beginning" in said
    assert "worker 1 died: starting again from epoch-0008" in said


def test_it_ends_where_there_is_none(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
    with pytest.raises(TrainingFailed, match=r"3 times since the last checkpoint \(epoch-0001\)"):
        play(monkeypatch, run_dir, saving(run_dir, "epoch-0001"), lost, lost, lost)


def test_a_hang_is_not_started_again(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
    (run_dir / "logs" / "hung.json").write_text('{"sentence": "worker 1 hangs"}')
    with pytest.raises(TrainingFailed, match="worker 1 hangs"):
        play(monkeypatch, run_dir, lost)


def test_more_places_and_a_lost_worker_at_once(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
    def both() -> None:
        control.ask_to_stop(run_dir, control.MORE_PLACES)
        lost()

    assert play(monkeypatch, run_dir, both, finishing(run_dir)) == 2


def test_more_places_when_the_run_is_done(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
    def done() -> None:
        control.ask_to_stop(run_dir, control.MORE_PLACES)
        finishing(run_dir)()

    assert play(monkeypatch, run_dir, done, lost) == 1


def test_a_signal_counts_more_than_places(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
    def both() -> None:
        control.ask_to_stop(run_dir, control.MORE_PLACES)
        control.ask_to_stop(run_dir, "SIGUSR1")

    assert play(monkeypatch, run_dir, both, lost) == 1
    assert control.stop_reason(run_dir) == "SIGUSR1"


def test_fewer_workers_where_more_do_not_start(monkeypatch: pytest.MonkeyPatch, run_dir: Path) -> None:
    """Two halves of a GPU add up to a place that nobody fits in."""
    asked: list[int] = []

    def start() -> None:
        error = WorkersLost("the workers did not start")
        error.never_began = True
        raise error

    monkeypatch.setattr(ray, "_growing", _noting(asked))
    play(monkeypatch, run_dir, start, start, finishing(run_dir), workers="1:4")
    assert asked == [4, 3, 2]


def _noting(asked: list[int]) -> Callable[..., object]:
    import contextlib

    def growing(_: RunConfig, __: LaunchConfig, workers: int) -> object:
        asked.append(workers)
        return contextlib.nullcontext()

    return growing
