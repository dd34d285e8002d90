"""`tldist find-lr`: a learning-rate range test of what `tldist train` would run, and what to train with."""

from __future__ import annotations

import dataclasses
import json
import shlex
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tldist.config import RunConfig, TrainingFailed, UserError
from tldist.data.source.index import save_index
from tldist.report import plots
from tldist.tracking.wording import MISSING
from tldist.train.find_lr import Curve, Finding, Sweep, measure, read_curve, smoothed, trial
from tldist.train.launch import absolute, preflight
from tldist_launcher.start.arguments import as_number, parse_run, take_flags

FLAGS = {"--steps": "100", "--lowest": "1e-6", "--highest": "10", "--json": "", "--plot": ""}


def find_lr(words: Sequence[str]) -> None:
    """Measure, print, and write what was asked for. Raises UserError, or TrainingFailed with the reason."""
    own, rest = take_flags(words, FLAGS)
    sweep = Sweep(
        as_number("--steps", own["--steps"], int),
        as_number("--lowest", own["--lowest"], float),
        as_number("--highest", own["--highest"], float),
    )
    settings = absolute(parse_run(rest, "find-lr", own=FLAGS))
    if settings.run_dir:
        raise UserError("find-lr keeps no run directory: leave --run-dir out, --json and --plot write what was found")
    sweep.validate()
    outputs = {flag: _writable(flag, own[flag]) for flag in ("--json", "--plot") if own[flag]}
    curve = _measured(settings, sweep)
    finding = read_curve(curve)
    _write(curve, finding, outputs)
    _print(settings, curve, finding, rest)
    for flag, path in outputs.items():
        print(f"{flag.removeprefix('--')}: {path}")


def _writable(flag: str, name: str) -> Path:
    """Said before the test, not after it."""
    path = Path(name).expanduser().absolute()
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{flag} {name}: name a file in a folder that exists")
    return path


def _measured(settings: RunConfig, sweep: Sweep) -> Curve:
    index = preflight(settings)
    with tempfile.TemporaryDirectory(prefix="tldist-find-lr-") as folder:
        save_index(index, Path(folder) / "index.json")
        try:
            return measure(trial(settings, folder), sweep, _progress)
        except UserError:
            raise
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()] or [""]
            raise TrainingFailed(f"{type(error).__name__}: {lines[-1]}") from error


def _progress(rates: Iterable[float]) -> Iterable[float]:
    console = Console(stderr=True)
    return track(rates, "learning-rate range test", console=console, transient=True, disable=not console.is_terminal)


def _write(curve: Curve, finding: Finding, outputs: dict[str, Path]) -> None:
    smooth = smoothed(curve).tolist()
    if "--json" in outputs:
        told = {**dataclasses.asdict(finding), **dataclasses.asdict(curve.sweep)}
        # json.dumps would write a diverged loss as a bare NaN, which is no JSON.
        losses = [loss if abs(loss) < float("inf") else None for loss in curve.losses]
        told |= {"rates": curve.rates, "losses": losses, "smoothed": smooth}
        outputs["--json"].write_text(json.dumps(told, indent=1) + "\n")
    if "--plot" in outputs:
        marks = {"suggestion": finding.suggestion, "diverges from": finding.diverges_from}
        plots.png(plots.rate_range(curve.rates, curve.losses, smooth, marks), outputs["--plot"])


def _print(settings: RunConfig, curve: Curve, finding: Finding, words: Sequence[str]) -> None:
    optim, console = settings.optim, Console(width=120)
    table = Table(title=f"{settings.recipe}: {settings.strategy.name} of {settings.model.name}, {optim.name}")
    for heading in ("steps", "rates tried", "loss falls fastest at", "diverges from", "--optim.base-lr now"):
        table.add_column(heading, justify="right")
    suggestion, limit = (
        MISSING if rate is None else f"{rate:.2g}" for rate in (finding.suggestion, finding.diverges_from)
    )
    tried = f"{curve.rates[0]:.1g} to {curve.rates[-1]:.2g}"
    table.add_row(str(len(curve.losses)), tried, suggestion, limit, f"{optim.base_lr:g}")
    console.print(table)
    if finding.suggestion is not None:
        command = ["tldist", "train", *words, "--optim.base-lr", f"{finding.suggestion:g}"]
        console.print(f"Train with it: {shlex.join(command)}", soft_wrap=True, highlight=False)
    if finding.remark:
        lead = "Note: " if finding.suggestion is not None else "No suggestion: "
        console.print(f"{lead}{finding.remark}.", soft_wrap=True, highlight=False)
