"""The faults: each function lets one happen to one run at a random moment, and yields what does not hold afterwards."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from checks import each_image_once, figures, lost_no_more, nothing_left, same_end
from disk import Ballast, small_disk
from runs import Bench, Run

from tldist.checkpoints import checkpoint

STOP_BOUND_S = 45.0
"""From the signal to exit code 75: a look (a second), an evaluation and the writing, on a machine that is busy."""


@dataclass
class Trial:
    """One fault in one run, and what came of it."""

    number: int
    random: random.Random
    moment: str = ""
    fault_at: float = 0.0
    training_again_s: float | None = None
    steps_redone: int = 0
    problems: list[str] = field(default_factory=list)
    fixed: tuple[int, float] | None = None
    """The moment, where it is not to be drawn: steps done, and seconds after."""
    skipped: str = ""
    """Why it cannot be tried here."""

    def happened(self, what: str) -> None:
        """The fault, just now."""
        self.fault_at, self.moment = time.time(), f"{self.moment}: {what}"


class TooLate(Exception):  # noqa: N818 - it states a fact of the trial
    """The run was over before the fault's moment; another moment is drawn."""


def await_moment(run: Run, reference: Run, trial: Trial, last: float = 1.0) -> None:
    """Wait for a moment drawn evenly from the reference run's time between its first step and its last checkpoint.

    It is told as so many steps and so many seconds after the last of them, for a machine that is slower today. Of
    every third trial the moment comes while a checkpoint is being written. Raises TooLate.
    """
    seen, draw = reference.seen(), trial.random
    times = [note["at"] for note in seen.steps if note["rank"] == 0]
    begin, end = times[0], seen.saves[-1]["at"]
    at = begin + draw.uniform(0, last) * (end - begin)
    steps = sum(done <= at for done in times)
    delay, into = at - times[steps - 1], draw.uniform(0, 0.5)
    steps, delay = trial.fixed or (steps, delay)
    trial.moment = f"{delay:.2f} s after step {steps}"
    if not run.until(lambda: run.done() >= steps):
        raise TooLate
    time.sleep(delay)
    if trial.number % 3 == 2:
        trial.moment += f", {into:.2f} s into the writing of a checkpoint"
        run.until(lambda: bool(list(run.checkpoints.glob(".draft-*"))), seconds=20)
        time.sleep(into)
    if run.is_over:
        raise TooLate


def killed_worker(reference: Run, run: Run, trial: Trial) -> Iterator[str]:
    """SIGKILL for a worker: the command itself ends with code 0."""
    run.start()
    await_moment(run, reference, trial)
    rank = trial.random.randrange(2)
    pid = next(note["pid"] for note in reversed(run.seen().steps) if note["rank"] == rank)
    trial.happened(f"SIGKILL to rank {rank}")
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    yield from must_end(run, 0)
    yield from lost_no_more(run, trial.fault_at)


def stopped(reference: Run, run: Run, trial: Trial) -> Iterator[str]:
    """SIGTERM or SIGUSR1 for the command: exit code 75 in time, nothing lost, and --resume ends with 0.

    A signal after the last step finds nothing to stop: the run then ends with code 0.
    """
    run.start()
    await_moment(run, reference, trial)
    number = (signal.SIGTERM, signal.SIGUSR1)[trial.number % 2]
    trial.happened(number.name)
    run.signal(number)
    code = run.wait()
    took = time.time() - trial.fault_at
    if took > STOP_BOUND_S:
        yield f"{number.name} took {took:.0f} s"
    if code == 0 and (run.run_dir / "summary.json").exists():
        return
    if code != 75:
        yield f"{number.name} led to exit code {code}: {run.said[-300:]}"
    done = run.done()
    run.resume()
    yield from must_end(run, 0)
    yield from lost_no_more(run, trial.fault_at, expected=done)


def cut_short(reference: Run, run: Run, trial: Trial) -> Iterator[str]:
    """A file of the newest checkpoint ends early: that checkpoint is named, and the one before it used."""

    def cut(path: Path) -> str:
        length = trial.random.randrange(path.stat().st_size)
        os.truncate(path, length)
        return f"{path.name} cut to {length} bytes"

    yield from _damaged(reference, run, trial, cut)


def flipped(reference: Run, run: Run, trial: Trial) -> Iterator[str]:
    """A bit of a file of the newest checkpoint is another: that checkpoint is named, and the one before it used."""

    def flip(path: Path) -> str:
        place, bit = trial.random.randrange(path.stat().st_size), trial.random.randrange(8)
        with path.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << bit]))
        return f"bit {bit} of byte {place} of {path.name} flipped"

    yield from _damaged(reference, run, trial, flip)


def _damaged(reference: Run, run: Run, trial: Trial, harm: Callable[[Path], str]) -> Iterator[str]:
    run.start()
    if not run.until(lambda: len(run.names()) >= 2):
        raise TooLate
    await_moment(run, reference, trial, last=0.5)  # the workers go on for seconds, until Ray ends them
    run.signal(signal.SIGKILL)
    trial.happened("SIGKILL to the command")
    if left := run.left_processes(60):
        yield f"the command was killed, and its workers {left} work on"
    if (run.run_dir / "summary.json").exists():
        raise TooLate
    before, newest = run.names()[-2:]
    path = trial.random.choice(sorted((run.checkpoints / newest).iterdir()))
    trial.moment += f", {newest}: {harm(path)}"
    run.resume()
    yield from must_end(run, 0)
    sentences = [text for text in run.notices() if text.startswith(f"the checkpoint {newest} is damaged: ")]
    if not any(text.endswith(f"; the one before it is used: {before}") for text in sentences):
        yield f"no notice names {newest} and {before}: {run.notices()}"
    yield from lost_no_more(run, trial.fault_at, expected=run.position(before))
    yield from nothing_left(run, damaged=(newest,))


def full_disk(reference: Run, run: Run, trial: Trial) -> Iterator[str]:
    """No room for the next checkpoints: those before stay whole, and training goes on, to the end if room comes.

    In every second trial room comes only after the run has ended with code 1, and --resume ends with 0.
    """
    run.start()
    await_moment(run, reference, trial, last=0.6)
    room = trial.random.randrange(4 << 20)
    with Ballast(run.run_dir.parent, room) as ballast:
        trial.happened(f"{room} bytes left on the disk")
        refused = run.until(lambda: bool(_refused(run)))
        yield from _stands(run)
        if trial.number % 2 == 0 and refused:
            time.sleep(trial.random.uniform(0, 4))
            yield from _stands(run)
            ballast.close()
            trial.moment += f", room again {time.time() - trial.fault_at:.1f} s later"
        code = run.wait()
    yield from _said_no_room(run, code)
    last_try = max(note["at"] for note in run.seen().saves if note["what"] == "saving")
    if code != 0 and ballast.closed_at < last_try:
        yield f"there was room for the last checkpoint, and the run ended with code {code}: {run.said[-300:]}"
    if code != 0:
        stood = run.names()[-1]
        trial.fault_at = time.time()
        run.resume()
        yield from must_end(run, 0)
        yield from lost_no_more(run, trial.fault_at, expected=run.position(stood))


def _refused(run: Run) -> list[str]:
    """Checkpoints that found no room, as the workers noted."""
    return [note["name"] for note in run.seen().saves if note["what"] == "unsaved"]


def _stands(run: Run) -> Iterator[str]:
    """While the disk is full: the last checkpoint is whole; `sha256sum -c` says the same."""
    last = (run.checkpoints / "last").resolve()
    if not run.checkpoints.exists() or not last.exists():
        return  # it was full before the first
    if reason := checkpoint.damage(last):
        yield f"on the full disk, {last.name} is damaged: {reason}"
    check = subprocess.run(["sha256sum", "--quiet", "-c", checkpoint.SUMS], cwd=last, capture_output=True, text=True)
    if check.returncode != 0:
        yield f"on the full disk, sha256sum says of {last.name}: {check.stdout}{check.stderr}"


_NO_ROOM = re.compile(r"the checkpoint (\S+) could not be written to \S+: .*?[Nn]o space left on device")


def _said_no_room(run: Run, code: int) -> Iterator[str]:
    """A notice in metrics.jsonl where the run went on, the command's last words where it ended: both name it."""
    said = " ".join(run.notices()) if code == 0 else run.said
    if not set(_NO_ROOM.findall(said)) & set(_refused(run)):
        yield f"code {code}, and nothing names one of {_refused(run)} and says that no space is left: {said[-400:]}"
    if code not in (0, 1):
        yield f"a full disk led to exit code {code}"
    if code == 0 and "checkpoints are written again" not in said:
        yield "nothing says that checkpoints are written again"


def must_end(run: Run, code: int) -> Iterator[str]:
    """The command's exit code."""
    try:
        ended = run.wait()
    except subprocess.TimeoutExpired:
        yield f"the command had not ended in time: {run.said[-300:]}"
        return
    if ended != code:
        yield f"exit code {ended}, not {code}: {run.said[-500:]}"


FAULTS: dict[str, Callable[[Run, Run, Trial], Iterator[str]]] = {
    "killed worker": killed_worker,
    "stopped by a signal": stopped,
    "checkpoint cut short": cut_short,
    "a bit flipped": flipped,
    "disk full": full_disk,
}


def try_fault(
    bench: Bench, reference: Run, name: str, seed: str, number: int, fixed: tuple[int, float] | None = None
) -> Trial:
    """One trial from its start to the checks that follow every fault; another moment is drawn where one was late."""
    trial = Trial(number, random.Random(f"{seed} {name} {number}"), fixed=fixed)
    for again in range(5):
        with contextlib.ExitStack() as stack:
            try:
                disk = stack.enter_context(small_disk(bench.folder / "small", 1000)) if name == "disk full" else None
            except PermissionError as error:
                trial.skipped = str(error)
                return trial
            run = bench.run(f"{name.replace(' ', '-')}-{number}-{again}", disk)
            with contextlib.suppress(TooLate):
                run_trial(run, trial, lambda run=run: _all_checks(name, reference, run, trial))
                return trial
    trial.problems = ["five runs were over before their faults"]
    return trial


def run_trial(run: Run, trial: Trial, checks: Callable[[], Iterator[str]]) -> None:
    """Keep what does not hold, end what still runs, and free the memory that the run took. Raises TooLate."""
    try:
        for problem in checks():
            trial.problems.append(problem)
    except TooLate:
        raise
    except Exception as error:
        trial.problems.append(
            f"{type(error).__name__}: {error} ({traceback.format_exc(limit=-1).splitlines()[1].strip()})"
        )
    finally:
        run.end()
        shutil.rmtree(run.run_dir, ignore_errors=True)


def _all_checks(name: str, reference: Run, run: Run, trial: Trial) -> Iterator[str]:
    yield from FAULTS[name](reference, run, trial)
    trial.training_again_s, trial.steps_redone = figures(run, trial.fault_at)
    yield from same_end(run, reference)
    yield from each_image_once(run, run.bench.epochs)
    if not any(path.name.startswith("damaged-") for path in run.checkpoints.iterdir()):
        yield from nothing_left(run)
