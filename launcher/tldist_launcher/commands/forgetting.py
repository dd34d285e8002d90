"""`tldist fisher` and `tldist forgetting`: before a task's weights are changed by the next one, and after it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tldist import dist
from tldist.config import RunConfig, TrainingFailed, UserError, nearest
from tldist.guard import control
from tldist.guard.watchdog import forget
from tldist.objectives.ewc import FISHER_FILE, checkpoint_at
from tldist.rules import validate
from tldist.train.launch import launch_kind, only_one
from tldist.transfer import fisher, forgetting
from tldist.transfer.forgetting import FisherJob, Kept
from tldist_launcher.start.arguments import as_number, take_flags

FISHER_FLAGS = {"--labels": "model", "--images": "0", "--launch.workers": "1"}


def fisher_command(words: Sequence[str]) -> int:
    """Compute the Fisher information of one finished run, and show where it lies."""
    own, rest = take_flags(words, FISHER_FLAGS)
    place = Path(_places(rest, "fisher", FISHER_FLAGS, exactly=1)[0]).expanduser().absolute()
    if own["--labels"] not in ("model", "data"):
        raise UserError(f"--labels '{own['--labels']}' is not known: model (drawn from its output) or data (their own)")
    images = as_number("--images", own["--images"], int)
    if images < 0:
        raise UserError(f"--images is {images}: give 0 (all training images) or more")
    found = checkpoint_at(place)
    settings = forgetting.settings_for(place, own["--launch.workers"])
    validate(settings)
    started = time.perf_counter()
    (Path(settings.run_dir) / "logs").mkdir(exist_ok=True)
    with only_one(Path(settings.run_dir)):
        control.forget_stop(Path(settings.run_dir))  # that ended the training is no order to this
        forget(Path(settings.run_dir))
        _compute(settings, FisherJob(str(found), own["--labels"], images))  # type: ignore[arg-type]
    _show_shares(place, found, time.perf_counter() - started)
    return 0


def _compute(settings: RunConfig, job: FisherJob) -> None:
    text = json.dumps(dataclasses.asdict(job))
    try:
        if launch_kind(settings) == "local":
            forgetting.compute(text)
        else:
            from tldist_launcher.start.ray import Work, train_on_ray

            def watch(start: Callable[[], Any], _: Any) -> None:
                start()

            train_on_ray(settings, watch, Work("tldist.transfer.forgetting", "compute", text))
    except (UserError, TrainingFailed):
        raise
    except Exception as error:
        raise TrainingFailed(f"{type(error).__name__}: {error}") from error


def _show_shares(place: Path, found: Path, seconds: float) -> None:
    task = forgetting.read_task(found, dist.local_device())
    about = fisher.about(found)
    drawn = "drawn from the model" if about["labels"] == "model" else "the data's own"
    table = Table()
    table.add_column("stage")
    table.add_column("share", justify="right")
    for stage, share in forgetting.shares(task).items():
        table.add_row(stage, f"{share:.1%}")
    console = Console(width=120)
    console.print(
        f"Fisher information of {place}: {about['images']} images, labels {drawn}, {seconds:.0f} s",
        soft_wrap=True,
        highlight=False,
    )
    console.print(table)
    console.print(f"written: {found / FISHER_FILE}", soft_wrap=True, highlight=False)
    console.print(
        f"Hold them in the next task: tldist train RECIPE --model.weights {place} --optim.ewc 1000 --optim.ewc-from "
        f"{place} --train.batchnorm eval",
        soft_wrap=True,
        highlight=False,
    )


FORGETTING_FLAGS = {"--json": ""}


def forgetting_command(words: Sequence[str]) -> int:
    """What a run's network still knows of earlier tasks; `--json FILE` also writes it."""
    own, rest = take_flags(words, FORGETTING_FLAGS)
    later, *earlier = (Path(word).expanduser() for word in _places(rest, "forgetting", FORGETTING_FLAGS))
    if not earlier:
        raise UserError("tldist forgetting needs a run and the earlier runs to ask for: RUN_DIR EARLIER_RUN_DIR ...")
    checkpoint_at(later)
    rows = [forgetting.kept(later, task, dist.local_device()) for task in earlier]
    if own["--json"]:
        Path(own["--json"]).write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    _show_kept(later, rows)
    return 0


def _show_kept(later: Path, rows: Sequence[Kept]) -> None:
    table = Table(title=f"What {later.name or later} still knows")
    for heading in ("earlier task", "images", "top-1 then", "top-1 now", "forgotten"):
        table.add_column(heading, justify="left" if heading == "earlier task" else "right")
    for row in rows:
        table.add_row(row.task, str(row.val_images), f"{row.then:.3f}", f"{row.now:.3f}", f"{row.then - row.now:+.3f}")
    Console(width=120).print(table)


def _places(words: Sequence[str], command: str, known: dict[str, str], exactly: int = 0) -> list[str]:
    for word in words:
        if word.startswith("--"):
            flag = word.partition("=")[0]
            raise UserError(f"tldist {command} has no flag {flag}{nearest(flag, known)}: it takes {', '.join(known)}")
    if not words or (exactly and len(words) != exactly):
        raise UserError(f"tldist {command} needs {'one run directory' if exactly else 'run directories'}")
    return list(words)
