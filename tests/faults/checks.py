"""What must hold after a fault: nothing lost but the work since the last checkpoint, and the same bits at the end."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import safetensors.torch
import torch
from runs import BATCH, SAVE_EVERY, Run, Seen

from tldist.checkpoints import checkpoint

SLACK_S = 3.0
"""For a machine that has other things to do."""


def same_end(run: Run, reference: Run) -> Iterator[str]:
    """What differs from the undisturbed run: weights, moments, averages; losses of every step; validation."""
    for name in ("last", "best"):
        ours, theirs = (of.checkpoints / name for of in (run, reference))
        if reason := checkpoint.damage(ours):
            yield f"the checkpoint {name} is damaged: {reason}"
            continue
        if ours.resolve().name != theirs.resolve().name:
            yield f"{name} is {ours.resolve().name}, not {theirs.resolve().name}"
        for file in sorted(path.name for path in theirs.glob("*.safetensors")):
            if (ours / file).read_bytes() != (theirs / file).read_bytes():
                yield f"{name}/{file} differs: {_first_difference(ours / file, theirs / file)}"
    for event, keys in _TOLD.items():
        yield from _same_rows(run, reference, event, keys)
    if _predictions(run) != _predictions(reference):
        yield "predictions.json differs"


_TOLD = {
    "train": ("loss", "top1", "lr", "epoch", "epoch_step", "phase"),
    "eval": ("val_loss", "val_top1", "best_val_top1", "replica_spread", "skipped_steps", "phase"),
}


def _first_difference(ours: Any, theirs: Any) -> str:
    one, other = (safetensors.torch.load_file(path) for path in (ours, theirs))
    if one.keys() != other.keys():
        return f"other names: {sorted(one.keys() ^ other.keys())[:3]}"
    return next((name for name in one if not torch.equal(one[name], other[name])), "only its header")


def _same_rows(run: Run, reference: Run, event: str, keys: tuple[str, ...]) -> Iterator[str]:
    """Each row of each attempt equals the reference's row of that step, and no step is without one."""
    expected = {row["step"]: row for row in reference.rows(event)}
    rows = run.rows(event)
    if missing := sorted(expected.keys() - {row["step"] for row in rows}):
        yield f"metrics.jsonl has no {event} row of the steps {missing}"
    for row in rows:
        for key in keys:
            if row[key] != expected[row["step"]][key]:
                yield f"{event} row of step {row['step']}: {key} is {row[key]}, not {expected[row['step']][key]}"
                return


def _predictions(run: Run) -> Any:
    path = run.run_dir / "predictions.json"
    return json.loads(path.read_text()) if path.exists() else None


def each_image_once(run: Run, epochs: int) -> Iterator[str]:
    """In the last attempt of every step: each epoch shows steps x batch images, and none of them twice."""
    shown: dict[int, list[int]] = defaultdict(list)
    counted = last_attempts(run.seen())
    for step, notes in counted.items():
        shown[step // run.steps_per_epoch] += [image for note in notes for image in note["ids"]]
    if missing := sorted(set(range(epochs * run.steps_per_epoch)) - counted.keys()):
        yield f"nobody did the steps {missing}"
    for epoch, images in sorted(shown.items()):
        distinct, due = len(set(images)), run.steps_per_epoch * BATCH
        if not len(images) == distinct == due:
            yield f"epoch {epoch + 1} showed {len(images)} images, {distinct} different ones, where {due} are due"


def last_attempts(seen: Seen) -> dict[int, list[dict[str, Any]]]:
    """Step -> the workers' notes of the attempt that counts: for as many ranks as worked on it, each one's last."""
    latest: dict[tuple[int, int], dict[str, Any]] = {(note["step"], note["rank"]): note for note in seen.steps}
    worlds = {step: latest[step, 0]["world"] for step, rank in latest if rank == 0}
    return {
        step: [latest[step, rank] for rank in range(world) if (step, rank) in latest]
        for step, world in sorted(worlds.items())
    }


def nothing_left(run: Run, damaged: tuple[str, ...] = ()) -> Iterator[str]:
    """No process of the run, no part of a checkpoint; those set aside are the damaged ones."""
    if left := run.left_processes():
        yield f"processes are left: {left}"
    known = {"last", "best", *run.names(), *(f"damaged-{name}" for name in damaged)}
    if more := sorted({path.name for path in run.checkpoints.iterdir()} - known):
        yield f"checkpoints/ holds {more}"
    if len(run.names()) > 3:
        yield f"--checkpoint.keep 2 and the best, but there are {run.names()}"
    for name in run.names():
        if reason := checkpoint.damage(run.checkpoints / name):
            yield f"{name} is damaged: {reason}"


def went_on_from(run: Run, fault_at: float) -> str:
    """The checkpoint from which the run went on after the fault, as its own notice has it; none: the beginning."""
    texts = [row["text"] for row in run.rows("notice") if row["time"] > fault_at]
    return next((text.split()[2].rstrip(":") for text in texts if text.startswith("resumed from ")), "")


def lost_no_more(run: Run, fault_at: float, expected: int | None = None) -> Iterator[str]:
    """It went on from the newest whole checkpoint, and that one was as new as the saver's rules make it.

    1. The first step after the fault is the one that follows the checkpoint that the notice names, and that is the
       newest whose writing had ended (or one whose writing had begun, where only the note of its end is missing), or
       the one of the `expected` step.
    2. When its writing began, at most SAVE_EVERY steps more were done than it holds.
    3. After a writing of d seconds the saver rests for 9 d (it writes a tenth of the time). Where a checkpoint was due
       between that rest and the fault, another writing had begun.
    """
    name, seen = went_on_from(run, fault_at), run.seen()
    resumed = run.position(name) if name else 0
    first = _first_step_of_new_workers(seen, fault_at)
    if first is not None and first["step"] != resumed:
        yield f"it says that it went on after step {resumed}, but the next step done was {first['step'] + 1}"
    before = seen.until(first["at"]) if first is not None else seen
    written = max((run.position(note["name"]) for note in before.saves if note["what"] == "saved"), default=0)
    begun = {run.position(note["name"]) for note in before.saves if note["what"] == "saving"}
    if expected is not None and resumed != expected:
        yield f"it went on from {name or 'the beginning'}, not from step {expected}"
    if expected is None and first is not None and (resumed < written or resumed not in {0, *begun}):
        yield f"it went on from step {resumed}, though the checkpoint of step {written} was written"
    yield from _was_new(run, seen.until(fault_at))


def _first_step_of_new_workers(seen: Seen, fault_at: float) -> dict[str, Any] | None:
    """The first step done by workers that had done none before the fault."""
    old = {note["pid"] for note in seen.steps if note["at"] <= fault_at}
    return next((note for note in seen.steps if note["pid"] not in old), None)


def _was_new(run: Run, before: Seen) -> Iterator[str]:
    writings = _writings(before)
    for began, ended, name in writings:
        behind = before.until(began).done - run.position(name)
        if behind > SAVE_EVERY:
            yield f"{name} was {behind} steps old when its writing began"
        due = _due(run, before, ended + 9 * (ended - began) + SLACK_S)
        if due is not None and not any(start > ended for start, _, _ in writings) and not _is_writing(before, ended):
            yield f"step {due} was to be saved, and the saver had rested since {name}"


def _writings(before: Seen) -> list[tuple[float, float, str]]:
    """(began, ended, name) of every checkpoint written; of several in a row, the beginning of the first."""
    found: list[tuple[float, float, str]] = []
    for start, end in pairwise(before.saves):
        if start["what"] == "saving" and end["what"] == "saved":
            in_a_row = found and start["at"] - found[-1][1] < 0.05
            found.append((found[-1][0] if in_a_row else start["at"], end["at"], end["name"]))
    return found


def _is_writing(before: Seen, ended: float) -> bool:
    return any(note["what"] == "saving" and note["at"] > ended for note in before.saves)


def _due(run: Run, before: Seen, since: float) -> int | None:
    """A step later than `since` after which a checkpoint was to be taken, long enough ago to have been."""
    steps = [note for note in before.steps if since < note["at"] < before.steps[-1]["at"] - SLACK_S]
    return next((note["step"] + 1 for note in steps if (note["step"] + 1) % SAVE_EVERY == 0), None)


def figures(run: Run, fault_at: float) -> tuple[float | None, int]:
    """Seconds from the fault to the next step done by new workers, and steps that had to be done again."""
    seen = run.seen()
    first = _first_step_of_new_workers(seen, fault_at)
    if first is None:
        return None, 0
    return first["at"] - fault_at, max(0, seen.until(first["at"] - 1e-6).done - first["step"])
