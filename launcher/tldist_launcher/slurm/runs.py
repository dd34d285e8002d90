"""`tldist runs` and `tldist logs`: how runs stand, told from their directories and, for submitted ones, by Slurm."""

from __future__ import annotations

import getpass
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.table import Table

from tldist.config import UserError
from tldist.tracking import runlog, wording
from tldist.tracking.console import Console, follow
from tldist.tracking.runlog import RunLog
from tldist.tracking.wording import number, whole
from tldist_launcher.commands.machine import answer
from tldist_launcher.start.arguments import parse_flags

ALIVE_S = 60.0
"""A run without a job is under way while something in its folder is younger: workers write a sign every 10 s."""

LOOK_S = 0.5
"""Between two looks at a log."""

ASK_S = 3.0
"""Between two questions to Slurm's controller, which a whole cluster asks."""


DONE, STOPPED, TERMINATED = 0, 75, 143
"""Exit codes of a job that reached its end, of one that saved and stopped, and of one that was cancelled."""


@dataclass(frozen=True)
class Queued:
    """A job in Slurm's queue: `state` is RUNNING, PENDING and the like."""

    state: str
    reason: str = ""

    def __str__(self) -> str:
        words = self.state.lower().replace("_", " ")
        return f"{words} ({self.reason})" if self.state == "PENDING" and self.reason != "None" else words


Jobs = Mapping[str, Queued] | None
"""A user's jobs, by number and for a task of an array also by JOB_TASK; None where Slurm does not tell."""


def queue() -> Jobs:
    """This user's jobs; empty where there is no Slurm."""
    if shutil.which("squeue") is None:
        return {}
    told = answer("squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%A|%i|%T|%r")
    if told is None:
        return None
    found: dict[str, Queued] = {}
    for row in told.splitlines():
        job, name, state, reason = row.split("|", 3)
        found[name] = found[job] = Queued(state, reason)
    return found


def job_of(run_dir: Path) -> str | None:
    """The Slurm job that runs it, ran it last, or is to run it; None: it was started by hand."""
    notes, submission = job_notes(run_dir), _submission(run_dir)
    if notes and (number(notes[-1], "time") or 0) >= (number(submission, "time") or 0):
        return str(notes[-1].get("job"))
    return submission.get("job")


def job_notes(run_dir: Path) -> list[dict[str, Any]]:
    """What the batch script noted: job and time, and of a start `restart` and `nodes`, of an end its `code`."""
    try:
        lines = (run_dir / "logs" / "jobs.jsonl").read_bytes().splitlines()
    except OSError:
        return []
    return [row for line in lines if (row := runlog.parse(line)) is not None]


def _code_of(job: str | None, run_dir: Path) -> int | None:
    """What a job ended with, as far as it was noted."""
    notes = job_notes(run_dir)
    return whole(notes[-1], "code") if notes and notes[-1].get("job") == job else None


def _submission(run_dir: Path) -> dict[str, Any]:
    try:
        return json.loads((run_dir / "submit.json").read_text())
    except (OSError, ValueError):
        return {}


def state_of(run_dir: Path, jobs: Jobs) -> str:
    """`done`, `running`, `pending (Priority)`, `stopped`, `failed`, `cancelled`, `interrupted`, or `unknown (...)`."""
    if (run_dir / "summary.json").exists():
        return "done"
    job = job_of(run_dir)
    if job is not None and jobs is None:
        return "unknown (squeue fails)"
    if queued := (jobs or {}).get(job or ""):
        return str(queued)
    last, code = _last_word(run_dir), _code_of(job, run_dir)
    if code == DONE:
        return "done"
    if code == TERMINATED:
        return "cancelled"
    if last.get("event") == "error" or code not in (None, STOPPED):
        return "failed"
    if last.get("event") == "notice" and str(last.get("text", "")).startswith("stopped"):
        return "stopped"
    return "running" if job is None and time.time() - _youngest(run_dir) < ALIVE_S else "interrupted"


def _last_word(run_dir: Path) -> dict[str, Any]:
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 65536))
            rows = [row for line in file.read().splitlines() if (row := runlog.parse(line)) is not None]
    except OSError:
        return {}
    return rows[-1] if rows else {}


def _youngest(run_dir: Path) -> float:
    """When anything of what a run writes while it lives was written last."""
    paths = [run_dir / "metrics.jsonl", run_dir / "index.json", *(run_dir / "logs" / "workers").glob("*")]
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)


def runs_command(words: Sequence[str]) -> int:
    """`tldist runs [FOLDER]`."""
    if len(words) > 1 or any(word.startswith("-") for word in words):
        raise UserError("tldist runs takes one folder, and `runs` where none is given")
    folder = Path(words[0] if words else "runs").expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name the one that holds run directories")
    found = find_runs(folder)
    if not found:
        print(f"no run in {folder}")
        return 0
    RichConsole(width=None if sys.stdout.isatty() else 160).print(_table(folder, found))
    return 0


def find_runs(folder: Path) -> list[Path]:
    """Run directories in a folder, or one level below it (an array's), oldest first."""
    found = [path for pattern in ("", "*/", "*/*/") for path in folder.glob(f"{pattern}config.yaml")]
    return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime)]


def _table(folder: Path, found: Sequence[Path]) -> Table:
    table, jobs = Table(box=None, pad_edge=False), queue()
    for heading in ("run", "state", "phase", "epoch", "top-1", "best", "images/s", "job"):
        table.add_column(heading, justify="right" if heading in ("top-1", "best", "images/s") else "left")
    for run_dir in found:
        log = runlog.read(run_dir)
        name = str(run_dir.relative_to(folder)) if run_dir != folder else run_dir.name
        table.add_row(name, state_of(run_dir, jobs), *_standing(log), job_of(run_dir) or "")
    return table


def _standing(log: RunLog) -> list[str]:
    """Phase, epoch, top-1 of the last and of the best epoch, images/s."""
    phase, last = (rows[-1] if rows else {} for rows in (log.phases, log.evals))
    epochs = whole(log.run, "epochs")
    return [
        f"{(whole(phase, 'phase') or 0) + 1}/{len(log.plan)} {phase.get('name', '')}" if phase else wording.MISSING,
        f"{whole(last, 'epoch') or 0}/{epochs}" if epochs else wording.MISSING,
        wording.fraction(number(last, "val_top1")),
        wording.fraction(number(log.summary, "best_val_top1")),
        wording.rate(number(log.summary, "images_per_s")),
    ]


def logs_command(words: Sequence[str]) -> int:
    """`tldist logs RUN_DIR [--follow]`."""
    goes_on, rest = "--follow" in words, [word for word in words if word != "--follow"]
    if len(rest) != 1 or rest[0].startswith("-"):
        parse_flags([word for word in rest if word.startswith("-")], {}, "logs")
        raise UserError("name one run directory: tldist logs RUN_DIR [--follow]")
    run_dir = Path(rest[0]).expanduser()
    if not (run_dir / "config.yaml").is_file() and not _keeps_output(run_dir):
        raise UserError(f"{run_dir} is no run directory: `tldist runs` lists those in a folder")
    if goes_on:
        return follow_run(run_dir)
    if _keeps_output(run_dir):
        Output(run_dir).show()
        _tell_first_step(run_dir)
    else:
        _show_metrics(run_dir, lambda: False)
    return 0


def _keeps_output(run_dir: Path) -> bool:
    """Is what it printed in its folder? The job of a batch script that was submitted by hand writes it elsewhere."""
    return (run_dir / "submit.json").exists()


def follow_run(run_dir: Path) -> int:
    """Show what a run prints until it is over; the exit code is 0 where it reached its end. Ctrl-C ends the showing."""
    watch = Watch(run_dir)
    try:
        if _keeps_output(run_dir):
            _show_job(run_dir, watch)
        else:
            _show_metrics(run_dir, watch.is_under_way)
    except KeyboardInterrupt:
        print(f"\nthe run goes on: `tldist logs {run_dir} --follow` shows it again", file=sys.stderr)
        return 130
    return 0 if watch.state == "done" else 1


class Watch:
    """Whether a run is under way, asked often and looked up now and then."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.state, self._is_queued, self._asked = run_dir, "", False, -ASK_S

    def is_under_way(self) -> bool:
        """Running, or still to run."""
        if time.monotonic() - self._asked >= ASK_S:
            jobs = queue()
            self.state, self._is_queued = state_of(self.run_dir, jobs), job_of(self.run_dir) in (jobs or {})
            self._asked = time.monotonic()
        return self._is_queued or self.state not in ("done", "failed", "stopped", "cancelled", "interrupted")


def _show_metrics(run_dir: Path, alive: Callable[[], bool]) -> None:
    with Console() as console:
        follow(run_dir / "metrics.jsonl", console, alive)


def _show_job(run_dir: Path, watch: Watch) -> None:
    output, waiting, told = Output(run_dir), "", False
    while True:
        under_way = watch.is_under_way()  # asked before reading: what was written just before the end is still read
        output.show()
        told = told or _tell_first_step(run_dir)
        if watch.state != waiting and watch.state.startswith(("pending", "unknown")):
            print(f"tldist: {watch.state}", flush=True)
        waiting = watch.state
        if not under_way:
            return
        time.sleep(LOOK_S)


class Output:
    """What the jobs of a run wrote to their logs, shown as it grows."""

    def __init__(self, run_dir: Path) -> None:
        self.logs, self._seen = run_dir / "logs", dict[Path, int]()

    def show(self) -> None:
        """What is new, the oldest log first."""
        for path in sorted(self.logs.glob("slurm-*.log"), key=lambda path: path.stat().st_mtime):
            with path.open("rb") as file:
                file.seek(self._seen.get(path, 0))
                sys.stdout.write(file.read().decode(errors="replace"))
                self._seen[path] = file.tell()
        sys.stdout.flush()


def _tell_first_step(run_dir: Path) -> bool:
    if sentence := first_step(run_dir):
        print(f"tldist: {sentence}", flush=True)
    return bool(sentence)


def first_step(run_dir: Path) -> str:
    """How long it took from the submission to the first step that was logged; empty where there is none yet."""
    submitted, notes = number(_submission(run_dir), "time"), job_notes(run_dir)
    began = number(notes[0], "time") if notes else None
    if submitted is None or began is None:
        return ""
    row = next((row for row in runlog.read(run_dir).train), {})
    step, at = whole(row, "step"), number(row, "time")
    if step is None or at is None:
        return ""
    return (
        f"step {step} was done {at - submitted:.1f} s after the submission: "
        f"{began - submitted:.1f} s in the queue, {at - began:.1f} s to start"
    )
