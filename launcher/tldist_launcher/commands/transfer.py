"""`tldist transfer-score` and `tldist transfer-gain`: what to start from, and whether to start from it at all."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tldist import config, dist
from tldist.config import ModelName, RunConfig, TrainingFailed, UserError, nearest
from tldist.data.source.index import save_index
from tldist.train.launch import absolute, preflight
from tldist.transfer import forgetting
from tldist.transfer.gain import ARMS, Arm, Gain, arm, check, gain, pairs, sentence
from tldist.transfer.score import Score, candidate, score
from tldist_launcher.start.arguments import as_number, parse_run, take_flags
from tldist_launcher.start.launch import launch, resume

SCORE_FLAGS = {"--models": "", "--json": ""}


def score_command(words: Sequence[str]) -> int:
    """Rank source models for a recipe's images."""
    own, rest = take_flags(words, SCORE_FLAGS)
    models = [text.strip() for text in own["--models"].split(",") if text.strip()]
    if not models:
        raise UserError("transfer-score needs --models: NAME or NAME:WEIGHTS, with commas between them")
    for text in models:
        name = text.partition(":")[0]
        if name not in get_args(ModelName):
            known = ", ".join(get_args(ModelName))
            raise UserError(f"--models: there is no model '{name}'{nearest(name, get_args(ModelName))}: use {known}")
    settings = parse_run(rest, "transfer-score", own=SCORE_FLAGS)
    with tempfile.TemporaryDirectory(prefix="tldist-transfer-score-") as folder:
        made = [absolute(candidate(settings, text, Path(folder, str(i)))) for i, text in enumerate(models)]
        indexes = [preflight(each) for each in made]  # all mistakes are said before the first is computed
        scores = []
        for each, index in zip(track(made, "scoring", transient=True, console=_progress()), indexes, strict=True):
            Path(each.run_dir).mkdir()
            save_index(index, Path(each.run_dir) / "index.json")
            scores.append(_score(each))
    scores.sort(key=lambda found: -found.logme)
    if own["--json"]:
        Path(own["--json"]).write_text(json.dumps([dataclasses.asdict(found) for found in scores], indent=1) + "\n")
    _show_scores(settings, scores)
    return 0


def _score(settings: RunConfig) -> Score:
    try:
        return score(settings)
    except UserError:
        raise
    except Exception as error:
        raise TrainingFailed(f"{type(error).__name__}: {error}") from error


def _progress() -> Console:
    return Console(stderr=True)


def _show_scores(settings: RunConfig, scores: Sequence[Score]) -> None:
    table, console = Table(), Console(width=120)
    for heading in ("model", "weights", "features", "LogME", "linear probe top-1", "seconds"):
        table.add_column(heading, justify="left" if heading in ("model", "weights") else "right")
    for found in scores:
        weights = Path(found.weights).name
        row = (str(found.dimensions), f"{found.logme:.4f}", f"{found.probe_top1:.3f}", f"{found.seconds:.1f}")
        table.add_row(found.model, weights, *row)
    console.print(f"Source models for {settings.recipe}, the most promising first", highlight=False)
    console.print(table)
    probed = max(scores, key=lambda found: found.probe_top1)
    if probed != scores[0]:
        said = f"LogME prefers {scores[0].model} ({Path(scores[0].weights).name}), the linear probe {probed.model}"
        console.print(f"{said} ({Path(probed.weights).name}): try both.", soft_wrap=True, highlight=False)


GAIN_FLAGS = {"--seeds": "5", "--scratch-lr": "0"}


def gain_command(words: Sequence[str]) -> int:
    """Fine-tuned against scratch, seed by seed; goes on where an earlier call was interrupted."""
    own, rest = take_flags(words, GAIN_FLAGS)
    count, scratch_lr = as_number("--seeds", own["--seeds"], int), as_number("--scratch-lr", own["--scratch-lr"], float)
    settings = absolute(parse_run(rest, "transfer-gain", own=GAIN_FLAGS))
    check(settings, count)
    folder = Path(settings.run_dir or f"runs/{settings.recipe}-transfer-gain").expanduser().absolute()
    seeds = range(settings.seed, settings.seed + count)
    keys: list[tuple[Arm, int]] = [(name, seed) for seed in seeds for name in ARMS]
    runs = {(name, seed): arm(settings, name, seed, folder, scratch_lr) for name, seed in keys}
    for made in runs.values():
        _check_earlier(made)
    preflight(runs["fine-tuned", settings.seed])
    right: dict[tuple[Arm, int], np.ndarray] = {}
    for key in track(keys, "runs", transient=True, console=_progress()):
        right[key] = _right(at_its_end(runs[key]))
    found = gain(*pairs(right, seeds))
    _write(folder, settings, right, found)
    _show_gain(settings, seeds, right, found)
    print(f"run: {folder}")
    return 0


def _check_earlier(made: RunConfig) -> None:
    """An earlier call's run must be of the same config. Raises UserError."""
    path = Path(made.run_dir) / "config.yaml"
    if path.exists() and _told(config.load(path)) != _told(made):
        raise UserError(f"{made.run_dir} is a run with other settings: choose another --run-dir")


def _told(made: RunConfig) -> dict[str, Any]:
    """What decides a run's result."""
    told = config.to_dict(absolute(made))
    return {name: part for name, part in told.items() if name not in ("run_dir", "launch", "tracking", "checkpoint")}


def at_its_end(made: RunConfig) -> Path:
    """The run's directory once it has reached its end: now, or in an earlier call."""
    run_dir = Path(made.run_dir)
    if (run_dir / "summary.json").exists():
        return run_dir
    if (run_dir / "index.json").exists():
        return resume(made, run_dir, quiet=True)
    return launch(made, quiet=True)


def _right(run_dir: Path) -> np.ndarray:
    """Which validation images the last weights get right, one number for each: 1 or 0."""
    task = forgetting.read_task(run_dir / "checkpoints" / "last", dist.local_device())
    return task.evaluate(task.model).right_N.numpy().astype(np.int64)


def _write(folder: Path, settings: RunConfig, right: dict[tuple[Arm, int], np.ndarray], found: Gain) -> None:
    told = {
        "recipe": settings.recipe,
        "model": settings.model.name,
        "weights": settings.model.weights,
        "strategy": settings.strategy.name,
        "epochs": settings.train.epochs,
        **dataclasses.asdict(found),
        "verdict": found.verdict,
        "runs": [{"arm": name, "seed": seed, "top1": float(r.mean())} for (name, seed), r in right.items()],
    }
    (folder / "transfer_gain.json").write_text(json.dumps(told, indent=1) + "\n")


def _show_gain(
    settings: RunConfig, seeds: Sequence[int], right: dict[tuple[Arm, int], np.ndarray], found: Gain
) -> None:
    table, console = Table(), Console(width=120)
    for heading in ("seed", *ARMS, "gain"):
        table.add_column(heading, justify="right")
    for seed in seeds:
        tuned, scratch = (float(right[name, seed].mean()) for name in ARMS)
        table.add_row(str(seed), f"{tuned:.3f}", f"{scratch:.3f}", f"{tuned - scratch:+.3f}")
    weights, epochs = Path(settings.model.weights).name, settings.train.epochs
    title = f"{settings.recipe}: {settings.strategy.name} from {weights} against scratch, {epochs} epochs each"
    console.print(title, highlight=False, soft_wrap=True)
    console.print(table)
    images = len(next(iter(right.values())))
    console.print(sentence(found, len(seeds), images), highlight=False, soft_wrap=True)
