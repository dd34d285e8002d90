"""Breaks runs in every way we know, at random moments, and proves that nothing is lost but a few steps' time.

    python tests/faults/harness.py [--times 10] [--only NAME] [--trial N] [--seed S] [--moment STEPS+SECONDS]

One undisturbed run is the reference. Each fault then happens to N runs of two workers on Ray, through the real command
line, on real photos; every run must end with the reference's bits. `elastic` loses a node and gets another one, and
each image of an epoch must still be seen once. Exit code 1 where anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from elastic import try_elastic
from faults import FAULTS, Trial, try_fault
from nodes import cluster, environment
from runs import Bench, Run

SHARED = Path(os.environ.get("TLDIST_DATA", Path(__file__).parents[3] / "shared" / "data"))
ELASTIC = "elastic"


def main() -> int:
    """All faults, or the one that was asked for; the table; the exit code."""
    words = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through every finally: no cluster and no mount stays
    seed = words.seed or str(time.time_ns() % 10**6)
    chosen = [name for name in (*FAULTS, ELASTIC) if words.only in (None, name)]
    print(f"seed {seed}, faults: {', '.join(chosen)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="faults", dir=words.folder) as folder:
        done = list(trials(words, Path(folder), seed, chosen))
    return report({name: [trial for of, trial in done if of == name] for name in chosen})


def trials(words: argparse.Namespace, folder: Path, seed: str, chosen: list[str]) -> Iterator[tuple[str, Trial]]:
    """The trials as they end, told one by one: the first of each fault, the second of each, ..."""
    data = photos(words.data, folder)
    numbers = range(words.times) if words.trial is None else [words.trial]
    fewer = range(max(3, words.times // 3)) if words.trial is None else [words.trial]
    if on_one_cluster := [name for name in chosen if name in FAULTS]:
        with bench(data, words.weights, folder) as (made, reference):
            for number, name in itertools.product(numbers, on_one_cluster):
                yield name, told(name, seed, try_fault(made, reference, name, seed, number, words.moment))
    for number in fewer if ELASTIC in chosen else ():
        yield ELASTIC, told(ELASTIC, seed, try_elastic(data, words.weights, folder, seed, number))


def arguments() -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10, help="trials of each fault; elastic: a third, at least 3")
    parser.add_argument("--only", choices=(*FAULTS, ELASTIC), help="this fault alone")
    parser.add_argument("--trial", type=int, help="this trial alone, to repeat one that failed")
    parser.add_argument("--moment", type=moment, help="STEPS+SECONDS: its moment, which depends on the machine's speed")
    parser.add_argument("--seed", help="of all moments; default: another one each time")
    parser.add_argument("--data", type=Path, default=SHARED, help="hymenoptera_data.tar, or the folder with it")
    parser.add_argument("--weights", default=default_weights(), help="of resnet18, or none")
    parser.add_argument("--folder", default=default_folder(), help="where the runs go: memory, where there is any")
    return parser.parse_args()


def moment(text: str) -> tuple[int, float]:
    """'14+0.3' -> (14, 0.3)."""
    steps, _, seconds = text.partition("+")
    return int(steps), float(seconds or 0)


def default_weights() -> str:
    """The shared source weights, where they are."""
    path = SHARED.parent / "weights" / "resnet18-tinyimagenet.safetensors"
    return str(path) if path.exists() else "none"


def default_folder() -> str | None:
    """Writing takes the least time in memory, so that a short run has many checkpoints."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and os.statvfs(memory).f_bavail * 4096 > 4 << 30 else None


def photos(data: Path, folder: Path) -> Path:
    """The folder with train/ and val/, unpacked where it is still an archive."""
    if (data / "train").is_dir():
        return data
    import tarfile

    with tarfile.open(data if data.is_file() else data / "hymenoptera_data.tar") as archive:
        archive.extractall(folder / "photos", filter="data")
    return next(path.parent for path in (folder / "photos").rglob("train"))


@contextlib.contextmanager
def bench(data: Path, weights: str, folder: Path, epochs: int = 4) -> Iterator[tuple[Bench, Run]]:
    """A cluster of two CPUs for all runs, and the reference run, done."""
    with cluster(environment(folder / "observed"), cpus=2) as head:
        made = Bench(data, weights, folder, head.address, epochs)
        reference = made.run("reference").start()
        if reference.wait() != 0:
            raise RuntimeError(f"the undisturbed run failed: {reference.said}")
        yield made, reference


def told(name: str, seed: str, trial: Trial) -> Trial:
    """One line for a trial; what one needs to repeat it, where it failed."""
    state = "FAILED" if trial.problems else "skipped" if trial.skipped else "passed"
    print(f"{name} {trial.number}: {state}  ({trial.skipped or trial.moment})", flush=True)
    for problem in trial.problems:
        print(f"    {problem}", flush=True)
    if trial.problems:
        again = f"--only '{name}' --trial {trial.number} --seed {seed}"
        print(f"    again: tests/faults/harness.py {again}; its moment, with --moment, above", flush=True)
    return trial


def report(all_trials: dict[str, list[Trial]]) -> int:
    """The table and the closing line; the exit code."""
    columns = ("trials", "passed", "failed", "s to training again", "most steps redone")
    print(f"\n{'fault':<21}", *(f"{column:>{len(column)}}" for column in columns), sep="  ")
    total = {"passed": 0, "failed": 0}
    for name, all_of_it in all_trials.items():
        done = [trial for trial in all_of_it if not trial.skipped]
        failed = sum(bool(trial.problems) for trial in done)
        seconds = [trial.training_again_s for trial in done if trial.training_again_s is not None]
        median = f"{statistics.median(seconds):.1f}" if seconds else "-"
        redone = max((trial.steps_redone for trial in done), default=0)
        row = (len(done), len(done) - failed, failed, median, redone)
        print(f"{name:<21}", *(f"{x:>{len(c)}}" for x, c in zip(row, columns, strict=True)), sep="  ")
        total["passed"] += len(done) - failed
        total["failed"] += failed
    print(f"\n{total['passed']} passed, {total['failed']} failed")
    return 1 if total["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
