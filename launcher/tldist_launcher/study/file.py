"""From a study's YAML file to its trials; every mistake in it is one sentence, said before anything starts.

    recipe: cifar10                     # what every trial starts from
    flags:                              # flags of `tldist train` over the recipe's
      train.epochs: 10
    grid:                               # every combination of:
      strategy.name: [partial, full]    # a flag and its values
      augmentation:                     # or a name, and choices that set several flags each
        plain: {}
        mixed: {data.mixup: 0.2, data.cutmix: 1.0}
    seeds: 5                            # each combination with the seeds 0 to 4
    metric: val_top1

With `search:` in place of `grid:`, an axis may also be a range, `{from: 1e-4, to: 1.0, log: true}`. docs/studies.md.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from tldist import config
from tldist.config import RunConfig, UserError, nearest
from tldist.recipes import recipe
from tldist.study.log import EVERY_EPOCH, METRICS
from tldist_launcher.start.arguments import flag_types, parse_over

KEYS = ("title", "recipe", "flags", "grid", "search", "seeds", "metric", "budget")
BUDGET = {"trials": 20, "keep": 3, "grace_epochs": 1, "hours": 0.0}
OF_A_SEARCH = ("trials", "keep", "grace_epochs")
Value = str | float | int
"""What is chosen on an axis: a label, or a number from a range."""


@dataclass(frozen=True)
class Span:
    """A range of numbers."""

    low: float
    high: float
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Axis:
    """Something that varies: by label what each choice sets, or a range of one flag's values."""

    name: str
    choices: dict[str, dict[str, Any]]
    span: Span | None = None

    @property
    def flags(self) -> set[str]:
        """Whatever it sets, by dotted name."""
        return {self.name} if self.span else {flag for values in self.choices.values() for flag in values}

    def values(self, chosen: Value) -> dict[str, Any]:
        """The flags that a choice sets."""
        return {self.name: chosen} if self.span else self.choices[str(chosen)]

    def holds(self, chosen: Any) -> bool:
        """Can it be chosen?"""
        if self.span is None:
            return chosen in self.choices
        return isinstance(chosen, int | float) and self.span.low <= chosen <= self.span.high

    def label(self, chosen: Value) -> str:
        """How tables write it."""
        return f"{chosen:.4g}" if isinstance(chosen, float) else str(chosen)


@dataclass(frozen=True)
class Budget:
    """How far a study goes."""

    trials: int
    """search: configurations tried, with the first seed."""
    keep: int
    """search: the best so many are run with the other seeds."""
    grace_epochs: int
    """search: epochs before early stopping may end a trial."""
    hours: float
    """Stop, saved, after so long; 0: no limit."""


@dataclass(frozen=True)
class Job:
    """One trial to run."""

    name: str
    choices: dict[str, Value]
    seed: int
    stage: str
    settings: RunConfig
    labels: dict[str, str]


@dataclass(frozen=True)
class Study:
    """A study as it was asked for, with the command line's flags over it."""

    name: str
    title: str
    base: RunConfig
    axes: tuple[Axis, ...]
    is_search: bool
    seeds: tuple[int, ...]
    metric: str
    budget: Budget
    folder: Path

    def job(self, choices: Mapping[str, Value], seed: int, stage: str) -> Job:
        """The trial of these choices. Raises UserError where a choice sets a flag to what it cannot be."""
        values: dict[str, Any] = {"seed": seed}
        for axis in self.axes:
            values |= axis.values(choices[axis.name])
        name = self._name(choices, seed, stage)
        settings = config.with_values(self.base, values)
        launch = replace(settings.launch, workers=1, kind="local")
        tracking = replace(settings.tracking, group=settings.tracking.group or self.name)
        run_dir = str(self.folder / "trials" / name)
        settings = replace(settings, launch=launch, tracking=tracking, run_dir=run_dir)
        labels = {axis.name: axis.label(choices[axis.name]) for axis in self.axes}
        return Job(name, dict(choices), seed, stage, settings, labels)

    @property
    def file_name(self) -> str:
        """Of a file that reads as it does: the name is the study's."""
        return f"{self.name}.yaml"

    def grid(self) -> list[Job]:
        """Every combination with every seed; one seed of all before the next, so that an early look is a fair one."""
        labels = [list(axis.choices) for axis in self.axes]
        return [
            self.job(dict(zip([axis.name for axis in self.axes], combination, strict=True)), seed, "grid")
            for seed in self.seeds
            for combination in itertools.product(*labels)
        ]

    def _name(self, choices: Mapping[str, Value], seed: int, stage: str) -> str:
        parts = [_part(axis, choices[axis.name]) for axis in self.axes]
        exact = "" if all(axis.span is None for axis in self.axes) else f"-{_digest(choices)}"
        return "-".join([*(["search"] if stage == "search" else []), *parts, f"seed={seed}"]) + exact


def _part(axis: Axis, chosen: Value) -> str:
    """A choice in the name of a run directory; what a file name cannot hold is told apart by a digest."""
    label = axis.label(chosen)
    cleaned = re.sub(r"[^A-Za-z0-9_.+]+", "_", label)[:40]
    if cleaned != label and cleaned != label.replace(" ", "_"):
        cleaned += f"_{_digest(label)}"
    is_number = re.fullmatch(r"[-+.\d]+(e[-+]?\d+)?", label) is not None
    return f"{axis.name.rsplit('.', 1)[-1]}={cleaned}" if is_number else cleaned


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:6]


def named_studies() -> dict[str, Path]:
    """The studies that come with tldist."""
    folder = Path(str(files("tldist.recipes") / "studies"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_study(name: str) -> Path:
    """The file of that name, or the study that comes with tldist. Raises UserError."""
    path, known = Path(name).expanduser(), named_studies()
    if path.is_file():
        return path.absolute()
    if name not in known:
        raise UserError(
            f"there is no study '{name}'{nearest(name, known)}: give a YAML file, or one of {', '.join(known)}"
        )
    return known[name]


def read_file(path: Path, words: Sequence[str], folder: Path, seeds: str = "") -> Study:
    """The study in the file, flags of `tldist train` over it: one that an axis varies takes the axis's place.

    `seeds`: the command line's, `5` or `0,1,2`. Raises UserError with what is wrong, naming the file.
    """
    try:
        told = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the study {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    given = {word.split("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    try:
        return _study(path.stem, told, words, given, folder, seeds)
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from error


def write_file(study: Study, path: Path) -> None:
    """A file that reads as this study does, with the command line's flags in it."""
    base, recipes = _values(study.base), _values(recipe(study.base.recipe))
    told = {
        "title": study.title,
        "recipe": study.base.recipe,
        "flags": {flag: value for flag, value in base.items() if value != recipes[flag]},
        "search" if study.is_search else "grid": {axis.name: _range_or_choices(axis) for axis in study.axes},
        "seeds": list(study.seeds),
        "metric": study.metric,
        "budget": {k: v for k, v in vars(study.budget).items() if study.is_search or k not in OF_A_SEARCH},
    }
    path.write_text(yaml.safe_dump(told, sort_keys=False))


def _range_or_choices(axis: Axis) -> dict[str, Any]:
    return axis.choices if axis.span is None else {"from": axis.span.low, "to": axis.span.high, "log": axis.span.log}


def _values(settings: RunConfig) -> dict[str, Any]:
    """Of all flags, by dotted name."""
    told = config.to_dict(settings)
    return {name: functools.reduce(operator.getitem, name.split("."), told) for name in config.flags()}


def _study(name: str, told: Any, words: Sequence[str], given: set[str], folder: Path, seeds: str) -> Study:
    if not isinstance(told, dict):
        raise UserError("it is no study: write recipe, grid or search, and seeds, as docs/studies.md shows")
    _only(told, KEYS)
    if ("grid" in told) == ("search" in told):
        raise UserError("write either grid: or search:, with what varies")
    if "recipe" not in told:
        raise UserError("recipe: is missing: name what every trial starts from")
    is_search = "search" in told
    axes = _without(_axes(told["search" if is_search else "grid"], is_search), given)
    study = Study(
        name=name,
        title=str(told.get("title", name)),
        base=_base(told, words, name),
        axes=axes,
        is_search=is_search,
        seeds=_seeds(seeds.split(",") if "," in seeds else seeds or told.get("seeds", 1)),
        metric=_metric(told.get("metric", "val_top1"), is_search),
        budget=_budget(told.get("budget", {}), is_search),
        folder=folder,
    )
    _check_base(study)
    return study


def _base(told: Mapping[str, Any], words: Sequence[str], name: str) -> RunConfig:
    fixed = {_flag(flag): value for flag, value in _mapping(told.get("flags") or {}, "flags").items()}
    return parse_over(config.with_values(recipe(str(told["recipe"])), fixed), words, f"study {name}", OWN)


OWN = ("--workers", "--gpus-per-trial", "--dir", "--seeds")
"""The command's own flags, which a mistyped one may have meant."""


def _check_base(study: Study) -> None:
    """What trials take from the study cannot be asked of each."""
    if study.base.run_dir:
        raise UserError("run_dir is the study's to give to its trials: use --dir for the study's own folder")
    if study.base.seed != RunConfig().seed:
        raise UserError("seed is a study's replicate: write seeds: (or --seeds 0,1,2)")
    if study.base.launch.workers != 1:
        raise UserError("each trial runs one worker: leave launch.workers out, --workers says how many trials at once")
    names = [job.name for job in ([] if study.is_search else study.grid())]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two choices lead to one trial, {twice}: name them differently")


def _axes(told: Any, is_search: bool) -> tuple[Axis, ...]:
    what = "search" if is_search else "grid"
    axes = tuple(_axis(str(name), choices, is_search) for name, choices in _mapping(told, what).items())
    if not axes:
        raise UserError(f"{what}: is empty: write what varies, as in strategy.name: [partial, full]")
    for a, b in itertools.combinations(axes, 2):
        if both := a.flags & b.flags:
            raise UserError(f"'{min(both)}' is varied by {a.name} and by {b.name}: one of them must go")
    return axes


def _axis(name: str, choices: Any, is_search: bool) -> Axis:
    if isinstance(choices, list):
        flag = _flag(name)
        if not choices:
            raise UserError(f"{name} has no values: give at least one")
        labels = {_label(choice): {flag: choice} for choice in choices}
        if len(labels) < len(choices):
            raise UserError(f"{name} names a value twice")
        return Axis(flag, labels)
    if not isinstance(choices, dict) or not choices:
        raise UserError(f"{name}: give a list of values, or named choices, each with the flags it sets")
    if "from" in choices:
        if not is_search:
            raise UserError(f"{name} is a range, and a grid needs values: give a list, or write search: for grid:")
        return Axis(_flag(name), {}, _span(name, choices))
    sets = {str(label): _mapping(values or {}, f"{name}, {label}") for label, values in choices.items()}
    if not any(sets.values()):
        raise UserError(f"{name}: none of its choices sets a flag")
    return Axis(name, {label: {_flag(str(f)): v for f, v in values.items()} for label, values in sets.items()})


def _label(choice: Any) -> str:
    return ", ".join(map(str, choice)) if isinstance(choice, list) else str(choice)


def _span(name: str, told: Mapping[str, Any]) -> Span:
    _only(told, ("from", "to", "log"), f"{name}: ")
    try:
        low, high = float(told["from"]), float(told["to"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name}: a range needs two numbers, as in {{from: 1e-4, to: 1.0, log: true}}") from error
    kind, log = flag_types()["--" + _flag(name).replace("_", "-")], bool(told.get("log", False))
    if kind not in (int, float):
        raise UserError(f"{name} takes no numbers: give a list of values")
    if not low < high or (log and low <= 0):
        raise UserError(f"{name}: {low:g} to {high:g} is no range{' on a log scale' if log else ''}")
    return Span(low, high, log, kind is int)


def _without(axes: tuple[Axis, ...], given: set[str]) -> tuple[Axis, ...]:
    """The axes that the command line leaves."""
    left = tuple(axis for axis in axes if axis.name not in given)
    for axis in left:
        if both := axis.flags & given:
            raise UserError(f"--{min(both).replace('_', '-')} is varied by {axis.name}: leave the flag out")
    if not left:
        raise UserError("the flags given leave nothing that varies: leave one out, or use tldist train")
    return left


def _seeds(told: Any) -> tuple[int, ...]:
    try:
        found = tuple(int(seed) for seed in told) if isinstance(told, list) else tuple(range(int(told)))
    except (TypeError, ValueError):
        raise UserError(f"seeds '{told}' are no numbers: give how many (5), or a list ([0, 1, 2])") from None
    if not found or len(set(found)) < len(found) or min(found) < 0:
        raise UserError(f"seeds '{told}': give at least one, and none twice")
    return found


def _metric(told: Any, is_search: bool) -> str:
    known = EVERY_EPOCH if is_search else tuple(METRICS)
    if told not in known:
        of = " that is known after each epoch" if is_search else ""
        raise UserError(f"there is no metric '{told}'{of}{nearest(str(told), known)}: choose from {', '.join(known)}")
    return str(told)


def _budget(told: Any, is_search: bool) -> Budget:
    values = _mapping(told or {}, "budget")
    _only(values, BUDGET, "budget: ")
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or value < (name not in ("hours", "keep")):
            raise UserError(f"budget: {name} '{value}' is no number above 0")
        if name in OF_A_SEARCH and not is_search:
            raise UserError(f"budget: {name} is for a search, and this is a grid: leave it out")
    merged = {**BUDGET, **values}
    return Budget(int(merged["trials"]), int(merged["keep"]), int(merged["grace_epochs"]), float(merged["hours"]))


def _flag(name: str) -> str:
    """A flag as RunConfig names it, however it was written."""
    found, known = name.removeprefix("--").replace("-", "_"), config.flags()
    if found not in known:
        raise UserError(f"there is no flag '{name}'{nearest(found, known)}: `tldist train RECIPE --help` lists all")
    return found


def _mapping(told: Any, what: str) -> dict[str, Any]:
    if not isinstance(told, dict):
        raise UserError(f"{what}: write names and values below it")
    return told


def _only(told: Mapping[str, Any], known: Iterable[str], where: str = "") -> None:
    for key in told:
        if key not in known:
            raise UserError(f"{where}there is no '{key}'{nearest(str(key), known)}: write {', '.join(known)}")
