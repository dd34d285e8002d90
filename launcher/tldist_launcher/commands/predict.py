"""`tldist predict`: what a run's best model, or an exported file, says of images."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tldist import dist
from tldist.config import UserError
from tldist.data.source.files import find_files
from tldist.tracking.progress import bar
from tldist.trained.exported import SUFFIXES, open_exported
from tldist.trained.model import Classifier, open_run
from tldist.trained.predict import Prediction, predict
from tldist_launcher.start.arguments import at_least, take_own

HELP = """\
  RUN|FILE: a run directory (its best model), or a file that `tldist export` wrote.
  PATH: image files, folders with all that is in them, or a quoted pattern ('photos/**/*.jpg').
  --top: classes told of each image (default 3).
  --batch-size: images that go through the network at once (default 32).
  --json: one JSON document; --csv: one row a file. Both go to stdout, what could not be read also to stderr.
  Exit code: 0 where every file was predicted, 1 where some could not be read (the others were predicted)."""


def predict_command(words: Sequence[str]) -> int:
    """`predict RUN|FILE PATH... [--top 3] [--batch-size 32] [--json|--csv]`."""
    flags, switches, rest = take_own(words, {"--top": "3", "--batch-size": "32"}, ("--json", "--csv"), "predict")
    if len(rest) < 2:
        raise UserError("name a run or an exported file, then images: tldist predict RUN PATH...")
    if len(switches) == 2:
        raise UserError("--json and --csv are two ways to print the same: give one")
    top, batch_size = (at_least(flag, flags[flag], 1) for flag in ("--top", "--batch-size"))
    paths = find_files(rest[1:])
    classifier = open_classifier(Path(rest[0]).expanduser())
    if classifier.card.temperature is None:
        print("tldist: confidences are not calibrated: the run has no calibration.json", file=sys.stderr)
    started = time.perf_counter()
    with bar("predicting") as progress:
        watched = _watched(predict(classifier, paths, top, batch_size), len(paths), progress)
        bad = _WRITERS[next(iter(switches), "")](watched, classifier, min(top, len(classifier.card.classes)))
    seconds = time.perf_counter() - started
    good = len(paths) - bad
    lost = f"; {bad:,} could not be read" if bad else ""
    print(f"{good:,} of {len(paths):,} files in {seconds:.2f} s: {good / seconds:,.1f} images/s{lost}", file=sys.stderr)
    return 1 if bad else 0


def open_classifier(place: Path) -> Classifier:
    """A run's best model on this machine's device, or an exported file on the CPU. Raises UserError."""
    if place.suffix in SUFFIXES.values() and not place.is_dir():
        return open_exported(place)
    if place.is_file():
        raise UserError(f"{place} is neither a run directory nor a file that `tldist export` wrote (.onnx, .pt2)")
    return open_run(place).classifier(dist.local_device())


def _watched(
    found: Iterator[Prediction], files: int, progress: Callable[[int, int], None]
) -> Iterator[tuple[str, Prediction]]:
    """Each with its path as text; what could not be read is said at once."""
    for done, prediction in enumerate(found, start=1):
        path = os.fsencode(prediction.path).decode(errors="replace")
        if prediction.problem:
            print(f"cannot predict {path}: {prediction.problem}", file=sys.stderr)
        yield path, prediction
        progress(done, files)


Writer = Callable[[Iterator[tuple[str, Prediction]], Classifier, int], int]
"""Prints all, and returns how many files could not be read."""


def _as_text(found: Iterator[tuple[str, Prediction]], classifier: Classifier, top: int) -> int:
    bad = 0
    for path, prediction in found:
        if not prediction.problem:
            print(f"{path}: {', '.join(f'{name} {confidence:.4f}' for name, confidence in prediction.top)}")
        bad += bool(prediction.problem)
    return bad


def _as_csv(found: Iterator[tuple[str, Prediction]], classifier: Classifier, top: int) -> int:
    writer, bad = csv.writer(sys.stdout, lineterminator="\n"), 0
    writer.writerow(
        ["path", *(f"{what}_{i}" for i in range(1, top + 1) for what in ("class", "confidence")), "problem"]
    )
    for path, prediction in found:
        told: list[Any] = [part for pair in prediction.top for part in pair] or [""] * (2 * top)
        writer.writerow([path, *told, prediction.problem])
        bad += bool(prediction.problem)
    return bad


def _as_json(found: Iterator[tuple[str, Prediction]], classifier: Classifier, top: int) -> int:
    good, bad = [], []
    for path, prediction in found:
        if prediction.problem:
            bad.append({"path": path, "problem": prediction.problem})
        else:
            said = [{"class": name, "confidence": confidence} for name, confidence in prediction.top]
            good.append({"path": path, "top": said})
    card = classifier.card
    about = {"model": card.model, "weights_sha256": card.weights_sha256, "temperature": card.temperature}
    print(json.dumps({**about, "predictions": good, "unreadable": bad}, indent=1))
    return len(bad)


_WRITERS: dict[str, Writer] = {"": _as_text, "--json": _as_json, "--csv": _as_csv}
