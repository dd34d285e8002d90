"""Who is named, from what the workers wrote; and the watchdog's own arithmetic, without waiting."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tldist.config import LaunchConfig, RunConfig, UserError
from tldist.guard.hang import Sign, judge
from tldist.guard.watchdog import Watchdog, forget, hung, verdict_file
from tldist.rules import validate

LOGS = Path("run/logs")


def sign(rank: int, **told: Any) -> Sign:
    waits = {"step": 17, "place": 1, "doing": "computing", "quiet_s": 60.0, "host": f"h{rank}", "pid": 100 + rank}
    return Sign(rank, **{**waits, **told})


LATE: dict[str, Any] = {"place": 0, "doing": "waiting for data", "at": "data/dali.py:9 batches"}
WAIT = ", while the others wait for it (stacks of the living in run/logs/rank*.log)"


@pytest.mark.parametrize(
    ("workers", "silent_s", "says"),
    [
        (
            [sign(0), sign(1, **LATE), sign(2)],
            {},
            "worker 1 (host h1, pid 101) hangs: it has been waiting for data for 60 s, after step 17 in "
            f"data/dali.py:9 batches{WAIT}",
        ),
        (
            [sign(0), sign(1, step=16, place=9)],
            {},
            f"worker 1 (host h1, pid 101) hangs: it has been computing for 60 s, after step 16{WAIT}",
        ),
        (
            [sign(0, **LATE)],
            {},
            "worker 0 (host h0, pid 100) hangs: it has been waiting for data for 60 s, after step 17 in "
            "data/dali.py:9 batches (stacks of the living in run/logs/rank*.log)",
        ),
        (  # the silent one, though another seems to be behind: what it wrote last is old
            [sign(0, **LATE), sign(1)],
            {1: 45.0},
            "worker 1 (host h1, pid 101) hangs: no sign of life for 45 s or more (a stopped or dead process, or "
            f"machine); it was last seen computing, after step 17{WAIT}",
        ),
        ([sign(0, step=0), Sign(1)], {1: 45.0}, f"worker 1 hangs: it never began{WAIT}"),
        (
            [sign(0), sign(1, ended=True, error="KeyError")],
            {1: 45.0},
            f"worker 1 (host h1, pid 101) has ended with KeyError, after step 17{WAIT}",
        ),
        (
            [sign(0, at="a.py:1 f"), sign(1, at="b.py:2 g", quiet_s=61.0)],
            {},
            "the run hangs: all 2 workers have been computing for 60 s, after step 17, and none can be singled out: "
            "worker 0 (host h0, pid 100) in a.py:1 f; worker 1 (host h1, pid 101) in b.py:2 g "
            "(stacks in run/logs/rank*.log)",
        ),
        ([sign(0, place=7), sign(1, ended=True, place=8)], {1: 50.0}, "worker 0 (host h0, pid 100) hangs: "),
    ],
)
def test_the_right_one_is_named(workers: list[Sign], silent_s: dict[int, float], says: str) -> None:
    verdict = judge(workers, silent_s, 60.0, LOGS)
    assert verdict is not None
    assert verdict.sentence.startswith(says)
    assert verdict.silent == tuple(w for w in workers if w.rank in silent_s and not w.ended)


@pytest.mark.parametrize(
    ("workers", "silent_s"),
    [
        ([sign(0), sign(1, **LATE, quiet_s=5.0)], {}),  # the others wait for one that is slow, not hung
        ([sign(0), sign(1, quiet_s=55.0)], {}),  # it came to the same place later: its time is not over
        ([sign(0), sign(1, **{**LATE, "quiet_s": 59.0})], {1: 20.0}),
        ([sign(0), Sign(1)], {1: 20.0}),
    ],
)
def test_nobody_is_named_too_early(workers: list[Sign], silent_s: dict[int, float]) -> None:
    assert judge(workers, silent_s, 60.0, LOGS) is None


def test_many_are_told_in_one_sentence() -> None:
    verdict = judge([sign(0), *(sign(r, **LATE) for r in range(1, 8))], {}, 60.0, LOGS)
    assert verdict is not None
    assert verdict.sentence.count("hangs: ") == 4
    assert "; 3 more workers do too, while the others wait for them (" in verdict.sentence


def test_places_are_counted_within_a_step() -> None:
    """A beat more or less at one place (evaluation shares 19 images unevenly) does not move a worker ahead."""
    long, short = Watchdog(), Watchdog()
    for dog, batches in ((long, 3), (short, 2)):
        dog.beat("waiting for data", 5)
        assert list(dog.along(range(batches), "evaluating", then="joining")) == list(range(batches))
    assert long._sign().position == short._sign().position == (5, 2)
    long.beat("waiting for data", 6)
    assert long._sign().position == (6, 0)


class Ended(BaseException):
    """Instead of the process."""


def watching(run_dir: Path, rank: int, world: int, monkeypatch: pytest.MonkeyPatch) -> Watchdog:
    """A watchdog of ten seconds that ticks only when told to, and raises where the process would end."""
    dog = Watchdog(run_dir, rank, world, 10.0)
    monkeypatch.setattr(dog, "_thread", threading.Thread(target=lambda: None))

    def end() -> None:
        raise Ended

    monkeypatch.setattr(dog, "_end", end)
    return dog.__enter__()


def seconds_until_the_end(dog: Watchdog, others: list[Watchdog]) -> float:
    for half_seconds in range(1, 100):
        for other in others:
            other._tick(0.5)
        try:
            dog._tick(0.5)
        except Ended:
            return half_seconds / 2
    return 0.0


def test_time_counts_from_the_first_beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dog = watching(tmp_path, 0, 1, monkeypatch)
    assert seconds_until_the_end(dog, []) == 0.0
    dog.beat("computing", 3)
    assert seconds_until_the_end(dog, []) == 10.5  # the first tick sees the beat
    assert hung(tmp_path).startswith("worker 0 (")
    assert "has been computing for 10 s, after step 3" in hung(tmp_path)


def test_a_silent_worker_is_found_without_clocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    zero, one = (watching(tmp_path, rank, 2, monkeypatch) for rank in (0, 1))
    for dog in (zero, one):
        dog.beat("computing", 3)
        dog._tick(0.5)
    assert seconds_until_the_end(zero, []) == 10.0
    assert hung(tmp_path).startswith("worker 1 (")
    assert "no sign of life" in hung(tmp_path)
    assert capfd.readouterr().err == f"tldist: {hung(tmp_path)}\n"
    with pytest.raises(Ended):  # it wakes, and finds the verdict
        one._tick(0.5)
    assert capfd.readouterr().err == ""


def test_one_that_moves_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zero, one = (watching(tmp_path, rank, 2, monkeypatch) for rank in (0, 1))
    for dog in (zero, one):
        dog.beat("evaluating", 3)
    zero.beat("joining the evaluations")
    for _ in range(100):
        one.beat("evaluating")
        one._tick(0.5)
        zero._tick(0.5)
    assert not hung(tmp_path)


def test_an_earlier_verdict_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 begins before rank 0 has cleaned up, and judges though rank 0 never does."""
    (tmp_path / "logs").mkdir()
    verdict_file(tmp_path).write_text(json.dumps({"sentence": "old", "silent": []}))
    one = watching(tmp_path, 1, 2, monkeypatch)
    one.beat("computing", 3)
    assert seconds_until_the_end(one, []) > 0
    assert hung(tmp_path).startswith("worker 0 hangs: it never began")
    watching(tmp_path, 0, 2, monkeypatch)
    assert hung(tmp_path) == ""
    forget(tmp_path)


def test_a_folder_that_cannot_be_written_blames_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    zero = watching(tmp_path, 0, 2, monkeypatch)
    zero.beat("computing", 3)
    zero.logs = tmp_path / "gone" / "logs"
    assert seconds_until_the_end(zero, []) == 10.5
    assert capfd.readouterr().err.startswith("tldist: worker 0 (")


def test_off_watches_nothing(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 1, 0.0) as dog:
        dog.beat("computing", 1)
    assert not list(tmp_path.iterdir())


def test_how_a_worker_ended_is_written(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Watchdog(tmp_path, 0, 1, 60.0):
        raise KeyError("x")
    told = json.loads((tmp_path / "logs" / "workers" / "rank-0000.json").read_text())
    assert (told["ended"], told["error"]) == (True, "KeyError")


@pytest.mark.parametrize("minutes", [-1.0, float("nan"), float("inf")])
def test_the_timeout_has_a_rule(minutes: float) -> None:
    with pytest.raises(UserError, match=r"--launch\.hang-minutes"):
        validate(RunConfig(launch=LaunchConfig(hang_minutes=minutes)))
