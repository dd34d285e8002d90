"""A study's directory read back: its trials, what each measured, and its arms. Knows nothing of how they were run.

    STUDY/study.json            what was asked
    STUDY/trials/NAME/          one run directory per trial, and in it
    STUDY/trials/NAME/trial.json    which choices and which seed it stands for, and the cores or GPUs it had

A trial whose summary.json is there is finished. One that early stopping ended has `pruned.json`, one that failed
`failed.json`; any other was interrupted.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tldist.study.statistics import Block
from tldist.tracking import wording
from tldist.tracking.runlog import Row, RunLog, read
from tldist.tracking.wording import number, whole

State = Literal["finished", "pruned", "failed", "interrupted"]
Choices = dict[str, str]
"""Axis -> the label of what was chosen on it."""

PRUNED, FAILED, TRIAL, STUDY = "pruned.json", "failed.json", "trial.json", "study.json"


@dataclass(frozen=True)
class Metric:
    """A number of a finished trial."""

    heading: str
    written: Callable[[float | None], str]
    lower_is_better: bool = False
    is_share: bool = False
    """Made of shares of the validation images, which move in steps of one image."""


_percent = partial(wording.percent, digits=1)
METRICS: dict[str, Metric] = {
    "val_top1": Metric("top-1", _percent, is_share=True),
    "best_val_top1": Metric("best epoch", _percent, is_share=True),
    "mean_val_top1": Metric("mean over epochs", _percent, is_share=True),
    "val_loss": Metric("validation loss", wording.fraction, lower_is_better=True),
    "gap": Metric("train - val", _percent, lower_is_better=True, is_share=True),
    "images_per_s": Metric("images/s", wording.rate),
    "seconds": Metric("seconds", wording.rate, lower_is_better=True),
    "device_seconds": Metric("device-seconds", wording.rate, lower_is_better=True),
    "peak_mem_gib": Metric("peak memory", wording.gib, lower_is_better=True),
}
"""What a study can be judged by. mean_val_top1 is the area under the validation curve: how fast it converges. gap is
the last epoch's training top-1 (on augmented images) less the last validation top-1. seconds count all attempts of a
trial that was interrupted; device_seconds are those times the GPUs it had, or its cores where it had none."""
EVERY_EPOCH = ("val_top1", "best_val_top1", "val_loss")
"""Those that are known while a trial runs: what a search can go by."""


@dataclass(frozen=True)
class Trial:
    """One run of a study, as far as it came."""

    name: str
    choices: Choices
    seed: int
    stage: str
    """grid; search; or kept: a search's best, run with other seeds."""
    state: State
    exact: dict[str, Any] = field(default_factory=dict)
    """Its choices as they were made: numbers of a range, before they were rounded to a label."""
    why: str = ""
    """What ended it, where it failed."""
    values: dict[str, float] = field(default_factory=dict)
    """By metric; those it did not come to are absent."""
    curve: tuple[float, ...] = ()
    """val_top1 of each epoch."""
    val_images: int | None = None
    gpus: float = 0.0

    @property
    def arm(self) -> tuple[str, ...]:
        """The labels of its choices, in the order of the axes."""
        return tuple(self.choices.values())


@dataclass(frozen=True)
class StudyLog:
    """What a study's directory holds."""

    told: Row
    """study.json: name, title, metric, axes (labels by axis), seeds, planned (how many trials), is_search."""
    trials: tuple[Trial, ...]

    @property
    def metric(self) -> str:
        """What it is judged by."""
        return str(self.told.get("metric", "val_top1"))

    @property
    def axes(self) -> dict[str, list[str]]:
        """The labels on each axis; empty for a range of numbers."""
        return self.told.get("axes", {})

    @property
    def judged(self) -> list[Trial]:
        """Finished trials that count: of a search only the runs of what was kept, where there are any."""
        finished = [trial for trial in self.trials if trial.state == "finished"]
        return [trial for trial in finished if trial.stage != "search"] or finished

    def arms(self) -> dict[tuple[str, ...], list[Trial]]:
        """The trials that count by arm, in the order of the axes' labels, each arm's by seed."""
        ranks = [{label: i for i, label in enumerate(labels)} for labels in self.axes.values()]

        def place(trial: Trial) -> tuple[Any, ...]:
            return (*(rank.get(label, -1) for rank, label in zip(ranks, trial.arm, strict=False)), trial.arm)

        found: dict[tuple[str, ...], list[Trial]] = {}
        for trial in sorted(self.judged, key=lambda trial: (place(trial), trial.seed)):
            found.setdefault(trial.arm, []).append(trial)
        return found

    @property
    def grain(self) -> float:
        """The step in which the study's metric counts."""
        return grain(self.judged, self.metric)


def grain(trials: Sequence[Trial], metric: str) -> float:
    """The step in which the metric counts: one validation image, for an accuracy."""
    images = [trial.val_images for trial in trials if trial.val_images]
    return 1 / min(images) if images and METRICS[metric].is_share else 0.0


def blocks(trials: Sequence[Trial], metric: str, but: str = "") -> dict[Block, float]:
    """The metric's values by what a pair must share: the seed, and all choices but that on the axis `but`."""
    return {
        (trial.seed, *((axis, label) for axis, label in trial.choices.items() if axis != but)): trial.values[metric]
        for trial in trials
        if metric in trial.values
    }


def came_to(trial: Trial, metric: str) -> float | None:
    """What a search goes by; None where the trial came to nothing: it failed, or the number is none."""
    value = trial.values.get(metric, math.nan)
    return value if trial.state in ("finished", "pruned") and math.isfinite(value) else None


def tried(searched: Sequence[Trial]) -> list[Trial]:
    """Of a search's trials those that need no other try: one that failed was a poor configuration.

    Where none came to its end, what failed may not be the configurations, and they are tried again.
    """
    over = ("finished", "pruned", *(["failed"] if any(trial.state == "finished" for trial in searched) else []))
    return [trial for trial in searched if trial.state in over]


def read_study(folder: Path) -> StudyLog:
    """Everything known about the study in `folder`."""
    found = sorted(path.parent for path in (folder / "trials").glob(f"*/{TRIAL}"))
    return StudyLog(_json(folder / STUDY), tuple(map(read_trial, found)))


def state_of(run_dir: Path) -> State:
    """How a trial stands."""
    if (run_dir / "summary.json").exists():
        return "finished"
    if (run_dir / PRUNED).exists():
        return "pruned"
    return "failed" if (run_dir / FAILED).exists() else "interrupted"


def read_trial(run_dir: Path) -> Trial:
    """A trial, with its numbers where it has any."""
    told, log = _json(run_dir / TRIAL), read(run_dir)
    return Trial(
        name=run_dir.name,
        choices={str(axis): str(label) for axis, label in told.get("choices", {}).items()},
        seed=whole(told, "seed") or 0,
        stage=str(told.get("stage", "")),
        state=state_of(run_dir),
        exact=told.get("exact", {}),
        why=str(_json(run_dir / FAILED).get("why", "")),
        values={name: value for name, value in _values(told, log).items() if value is not None},
        curve=tuple(log.series(log.evals, "val_top1")[1]),
        val_images=whole(log.summary, "val_images"),
        gpus=number(told, "gpus") or 0.0,
    )


def _values(told: Mapping[str, Any], log: RunLog) -> dict[str, float | None]:
    summary, curve = log.summary, log.series(log.evals, "val_top1")[1]
    val, train, seconds = number(summary, "val_top1"), _last_epoch_top1(log), number(summary, "seconds")
    devices = number(told, "gpus") or number(told, "cores") or 1.0
    return {
        "val_top1": val,
        "best_val_top1": number(summary, "best_val_top1"),
        "mean_val_top1": statistics.fmean(curve) if curve else None,
        "val_loss": number(log.evals[-1], "val_loss") if log.evals else None,
        "gap": train - val if train is not None and val is not None else None,
        "images_per_s": number(summary, "images_per_s"),
        "seconds": seconds,
        "device_seconds": None if seconds is None else seconds * devices,
        "peak_mem_gib": number(summary, "peak_mem_gib"),
    }


def _last_epoch_top1(log: RunLog) -> float | None:
    """Training top-1 over the last epoch: each row tells of the steps since the one before it."""
    if not log.train:
        return None
    last = whole(log.train[-1], "epoch")
    rows = [row for row in log.train if whole(row, "epoch") == last]
    total, before, weights = 0.0, 0, 0
    for row in rows:
        step, top1 = whole(row, "epoch_step"), number(row, "top1")
        if step is not None and top1 is not None and math.isfinite(top1):
            total, weights = total + top1 * (step - before), weights + step - before
            before = step
    return total / weights if weights else None


def _json(path: Path) -> Row:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
