"""Read a run directory back: `metrics.jsonl` is the source of truth, and any part of it may be missing.

A crashed run has no `end` row, a killed writer leaves half a line, and a resumed run repeats the steps since
its checkpoint: all of these are read without complaint.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tldist.tracking.wording import number, whole

Row = dict[str, Any]


@dataclass(frozen=True)
class RunLog:
    """What a run directory holds; rows are in order of step, one per step."""

    run: Row = field(default_factory=dict)
    phases: list[Row] = field(default_factory=list)
    train: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    summary: Row = field(default_factory=dict)
    """The `end` row over what can be told from the other rows."""
    finished: bool = False
    predictions: Row = field(default_factory=dict)
    environment: Row = field(default_factory=dict)
    config: Row = field(default_factory=dict)

    @property
    def plan(self) -> list[Row]:
        """The planned phases, in order."""
        return _rows(self.run.get("plan"))

    @property
    def per_phase(self) -> list[Row]:
        """What each phase came to, in order; phases that never began are not in it."""
        return _rows(self.summary.get("per_phase"))

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps in an epoch, where the run told."""
        steps = whole(self.run, "steps_per_epoch")
        return steps if steps and steps > 0 else None

    def position(self, step: float) -> float:
        """Where `step` lies on the horizontal axis: in epochs, or in steps where their number is unknown."""
        return step / (self.steps_per_epoch or 1)

    def series(self, rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
        """Positions and values of `key` over the rows that have it."""
        found = [(whole(row, "step"), number(row, key)) for row in rows]
        kept = [(self.position(step), value) for step, value in found if step is not None and value is not None]
        return [x for x, _ in kept], [y for _, y in kept]


def parse(line: str | bytes) -> Row | None:
    """One row, or None for anything that is not a JSON object (half a line, for one)."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def read(run_dir: Path) -> RunLog:
    """Everything known about the run in `run_dir`, as far as it was written."""
    rows = _read_rows(run_dir / "metrics.jsonl")
    last_start = max((i for i, row in enumerate(rows) if row.get("event") == "run"), default=0)
    # An `end` before the last start belongs to an earlier attempt; a leftover summary.json may too.
    ends = [row for row in rows[last_start:] if row.get("event") == "end"]
    final = ends[-1] if ends else {} if rows else _read_json(run_dir / "summary.json")
    log = RunLog(
        run=next((row for row in reversed(rows) if row.get("event") == "run"), {}),
        phases=_first_per_phase(rows),
        train=_last_per_step(rows, "train"),
        evals=_last_per_step(rows, "eval"),
        notices=[str(row.get("text", "")) for row in rows if row.get("event") == "notice"],
        finished=bool(final),
        predictions=_read_json(run_dir / "predictions.json"),
        environment=_read_json(run_dir / "environment.json"),
        config=_read_yaml(run_dir / "config.yaml"),
    )
    told = {key: value for key, value in final.items() if value is not None}
    log.summary.update(_derived(log, rows) | told)
    return log


def _derived(log: RunLog, rows: Sequence[Row]) -> Row:
    """The summary's numbers as the rows tell them, for a run that never got to write its own."""
    top1 = _finite(log.evals, "val_top1")
    times = _finite(rows, "time")
    live = [row for row in log.phases if number(row, "trainable_params") is not None] or log.plan[:1]
    known = {
        "val_top1": top1[-1] if top1 else None,
        "best_val_top1": max(top1, default=None),
        **_speed(log.train),
        "per_phase": [_phase_summary(log, row) for row in log.phases] or None,
        "replica_spread": max(_finite(log.evals, "replica_spread"), default=None),
        "peak_mem_gib": max(_finite(log.train, "peak_mem_gib"), default=None),
        "trainable_params": live[-1].get("trainable_params") if live else None,
        "wall_s": max(times) - min(times) if times else None,
        "seconds": _seconds(rows),
    }
    return log.run | {key: value for key, value in known.items() if value is not None}


def _seconds(rows: Sequence[Row]) -> float | None:
    """How long the run ran, over all its attempts: not the time between an interruption and the next start."""
    total, began, last = 0.0, None, None
    for row in rows:
        time = number(row, "time")
        if time is None or not math.isfinite(time):
            continue
        if began is None or row.get("event") == "run":
            total += last - began if began is not None and last is not None else 0.0
            began = time
        last = time
    return None if began is None or last is None else round(total + last - began, 2)


def _speed(rows: Sequence[Row]) -> Row:
    """Medians of the rates, the mean of the waiting; None where no row tells."""
    medians = ("images_per_s", "tflops_per_s", "mfu")
    known: Row = {key: statistics.median(v) if (v := _finite(rows, key)) else None for key in medians}
    waits = _finite(rows, "data_wait_share")
    return known | {"data_wait_share": statistics.fmean(waits) if waits else None}


def _phase_summary(log: RunLog, phase: Row) -> Row:
    """An entry of the summary's `per_phase`, with the epochs that came to their end."""
    index = whole(phase, "phase")
    train, evals = ([row for row in rows if whole(row, "phase") == index] for rows in (log.train, log.evals))
    told = ("name", "trainable_params", "gflops_per_image", "compile_s", "cache_fill_s")
    known = {key: phase.get(key) for key in told} | {"epochs": len(evals)} | _speed(train)
    # Runs from before FLOPs were counted logged the peak of the whole run so far.
    if known["gflops_per_image"] is not None:
        known["peak_mem_gib"] = max(_finite(train, "peak_mem_gib"), default=None)
    return known


def _finite(rows: Sequence[Row], key: str) -> list[float]:
    values = (number(row, key) for row in rows)
    return [value for value in values if value is not None and math.isfinite(value)]


def _last_per_step(rows: Sequence[Row], event: str) -> list[Row]:
    """The newest row of each step: a resumed run writes the steps since its checkpoint again."""
    by_step = {whole(row, "step"): row for row in rows if row.get("event") == event}
    return [by_step[step] for step in sorted(step for step in by_step if step is not None)]


def _first_per_phase(rows: Sequence[Row]) -> list[Row]:
    """Where each phase began; a run resumed inside a phase announces it once more, later."""
    first: dict[int, Row] = {}
    for row in rows:
        phase = whole(row, "phase")
        if row.get("event") == "phase" and phase is not None and whole(row, "step") is not None:
            first.setdefault(phase, row)
    return [first[phase] for phase in sorted(first)]


def _rows(value: object) -> list[Row]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _read_rows(path: Path) -> list[Row]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    return [row for row in map(parse, lines) if row is not None]


def _read_json(path: Path) -> Row:
    try:
        return parse(path.read_bytes()) or {}
    except OSError:
        return {}


def _read_yaml(path: Path) -> Row:
    try:
        value = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}
