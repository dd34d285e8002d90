"""`tldist evaluate`: how good a finished run's best model is, and how much its confidences are worth."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tldist import dist
from tldist.config import UserError
from tldist.data.load.bad_images import DecodeError
from tldist.tracking.progress import bar
from tldist.tracking.wording import MISSING
from tldist.trained.model import open_run, validation_images
from tldist.trained.scores import BINS, Scores, logits_and_labels, scores
from tldist_launcher.start.arguments import at_least, take_own

HELP = f"""\
  --data.root: other data with classes of the model (its val split); default: the run's own validation images.
  --batch-size: images at a time (default 32).
  --json: as JSON, with every class.
  Calibration: the temperature was fitted on the run's validation images when the best checkpoint was written. ECE is
  the expected calibration error over {BINS} bins."""


def evaluate_command(words: Sequence[str]) -> int:
    """`evaluate RUN [--data.root OTHER] [--batch-size N] [--json]`."""
    flags, switches, rest = take_own(words, {"--data.root": "", "--batch-size": "32"}, ("--json",), "evaluate")
    if len(rest) != 1:
        raise UserError("name one run: tldist evaluate RUN")
    run_dir, batch_size = Path(rest[0]).expanduser(), at_least("--batch-size", flags["--batch-size"], 1)
    trained = open_run(run_dir)
    card, judged = trained.card, validation_images(run_dir, trained.card, flags["--data.root"])
    try:
        with bar("evaluating") as progress:
            found = logits_and_labels(trained.classifier(dist.local_device()), judged, batch_size, progress)
    except DecodeError as error:
        print(f"tldist: {error}", file=sys.stderr)
        return 1
    told = scores(*found, card.classes, card.temperature)
    where = {"run": str(run_dir), "epoch": card.epoch, "data": str(judged.root)}
    if "--json" in switches:
        print(json.dumps({**where, **dataclasses.asdict(told)}, indent=1))
    else:
        _print(f"{run_dir}, epoch {card.epoch}, on {told.images:,} images of {judged.root}", told)
        if not flags["--data.root"]:
            print("The temperature was fitted on these images; --data.root OTHER tells how it does on others.")
    return 0


MOST_CLASSES = 30
"""Classes in the printed table: with more, those of the lowest recall."""


def _print(title: str, told: Scores) -> None:
    console = Console(width=100)
    console.print(title, soft_wrap=True, highlight=False)
    top5 = "" if told.top5 is None else f", top-5 {told.top5:.4f}"
    console.print(f"top-1 {told.top1:.4f}{top5}, mean recall of the classes {told.mean_recall:.4f}", highlight=False)
    table = Table("", "as the network says", "calibrated")
    table.add_row("loss", f"{told.loss:.4f}", f"{told.loss_calibrated:.4f}")
    table.add_row("ECE", f"{told.ece:.4f}", f"{told.ece_calibrated:.4f}")
    fitted = MISSING if told.temperature is None else f"{told.temperature:.3f}"
    table.add_row("temperature", "1", f"{fitted} (best here {told.best_temperature:.3f})")
    console.print(table)
    worst = sorted(told.classes, key=lambda score: (score.recall is None, score.recall))
    shown = told.classes if len(told.classes) <= MOST_CLASSES else worst[:MOST_CLASSES]
    classes = Table("class", "images", "predicted", "recall", "precision")
    for score in shown:
        shares = (MISSING if share is None else f"{share:.3f}" for share in (score.recall, score.precision))
        classes.add_row(score.name, str(score.images), str(score.predicted), *shares)
    console.print(classes)
    if len(shown) < len(told.classes):
        print(f"The {MOST_CLASSES} of {len(told.classes)} classes with the lowest recall; --json has all.")
