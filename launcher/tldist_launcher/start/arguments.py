"""From words on the command line to a RunConfig; every mistake becomes one sentence."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from tldist import config
from tldist.config import RunConfig, UserError, nearest
from tldist.recipes import RECIPES, recipe
from tldist.rules import validate

Number = TypeVar("Number", int, float)


def parse_run(arguments: Sequence[str], command: str, own: Iterable[str] = ()) -> RunConfig:
    """`RECIPE [--config FILE] [--section.field VALUE ...]`; a config file stands above the recipe, flags above both.

    `own`: flags that the command has taken out already, which a mistyped one may have meant.
    """
    words = list(arguments)
    name = words.pop(0) if words and not words[0].startswith("-") else None
    file = _take_config(words)
    if name is None and file is None and not {"-h", "--help"} & set(words):
        raise UserError(f"name a recipe: tldist {command} RECIPE, one of {', '.join(RECIPES)}")
    base = recipe(name) if name else RunConfig()
    if file is not None:
        # Repeating a run must not write over it.
        base = dataclasses.replace(config.load(file, base), run_dir="")
    parsed = parse_over(base, words, f"{command} {name or 'RECIPE'}", own)
    validate(parsed)
    return parsed


def parse_over(base: RunConfig, words: Sequence[str], command: str, own: Iterable[str] = ()) -> RunConfig:
    """`base` with `--section.field VALUE ...` over it, not yet validated."""
    _check_flags(words, command.split()[0], own)
    return tyro.cli(
        RunConfig,
        default=base,
        args=list(words),
        prog=f"tldist {command}",
        description=f"Recipes: {', '.join(RECIPES)}. `--config FILE` repeats a run from its config.yaml.",
    )


MAY_CHANGE = ("--launch", "--engine", "--checkpoint", "--tracking", "--train.compile")
"""Sections and flags."""


def parse_resume(arguments: Sequence[str]) -> tuple[RunConfig, Path] | None:
    """`--resume RUN_DIR [--launch.flag VALUE ...]` -> the run's own config, and its directory; None without --resume.

    An interrupted run goes on as it was configured; only where and how it runs, and who watches, may change.
    """
    words = list(arguments)
    place = next((i for i, word in enumerate(words) if word.split("=")[0] == "--resume"), None)
    if place is None:
        return None
    _, _, given = words.pop(place).partition("=")
    if not given and (place == len(words) or words[place].startswith("--")):
        raise UserError("--resume needs a run directory")
    run_dir = Path(given or words.pop(place)).expanduser().absolute()
    if not (run_dir / "config.yaml").is_file() or not any((run_dir / name).is_file() for name in _BEGUN):
        raise UserError(f"{run_dir} is no run directory: give the folder that a run printed as `run:`")
    for word in words:
        flag = word.split("=")[0]
        if word.startswith("--") and not {flag, flag.split(".")[0]} & set(MAY_CHANGE):
            raise UserError(f"{flag} cannot change in a resumed run: only flags of {', '.join(MAY_CHANGE)} can")
    settings = parse_run(["--config", str(run_dir / "config.yaml"), *words], "train", ("--resume",))
    return dataclasses.replace(settings, run_dir=str(run_dir)), run_dir


_BEGUN = ("index.json", "submit.json")
"""A run has the first when it has begun, and the second when it was submitted to begin elsewhere."""


def _take_config(words: list[str]) -> Path | None:
    for i, word in enumerate(words):
        if word.startswith("--config="):
            return Path(words.pop(i).split("=", 1)[1])
        if word == "--config":
            if i + 1 == len(words):
                raise UserError("--config needs a file: give a run's config.yaml")
            words.pop(i)
            return Path(words.pop(i))
    return None


def flag_types() -> dict[str, Any]:
    """`--data.batch-size` -> int, for every field of RunConfig that can be set."""
    types = {"--" + name.replace("_", "-"): _type_of(name) for name in config.flags()}
    types.pop("--recipe")
    return types


def _type_of(dotted: str) -> Any:
    owner: Any = RunConfig
    *sections, leaf = dotted.split(".")
    for section in sections:
        owner = typing.get_type_hints(owner)[section]
    return typing.get_type_hints(owner)[leaf]


def _check_flags(words: Sequence[str], command: str, own: Iterable[str]) -> None:
    """Say unknown flags, stray words and bad values in one sentence, before tyro says them in ten."""
    types, rest = flag_types(), list(words)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            continue
        flag, given, value = word.partition("=")
        flag = flag.replace("_", "-")
        if not flag.startswith("--"):
            raise UserError(f"'{word}' is no flag: after the recipe come --section.flag VALUE pairs")
        if flag not in types:
            raise UserError(
                f"there is no flag {flag}{nearest(flag, [*own, *types])}: `tldist {command} RECIPE --help` lists all"
            )
        values = [value] if given else []
        while rest and not rest[0].startswith("--") and not given:
            values.append(rest.pop(0))
        _check_values(flag, values, types[flag])


def _check_values(flag: str, values: list[str], kind: Any) -> None:
    if typing.get_origin(kind) is tuple:
        return
    if not values or (not values[0] and kind is not str):
        raise UserError(f"{flag} needs a value")
    if len(values) > 1:
        raise UserError(f"{flag} takes one value, not {len(values)}: '{values[1]}' is too much")
    _check_value(flag, values[0], kind)


def _check_value(flag: str, value: str, kind: Any) -> None:
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise UserError(f"{flag} '{value}' is not known{nearest(value, choices)}: choose from {', '.join(choices)}")
    elif kind in (int, float):
        as_number(flag, value, kind)


def as_number(flag: str, value: str, kind: type[Number]) -> Number:
    """The flag's value, or UserError."""
    try:
        return kind(value)
    except ValueError:
        number = "a whole number" if kind is int else "a number"
        raise UserError(f"{flag} '{value}' is not {number}") from None


def take_flags(words: Sequence[str], known: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The `--flag VALUE` pairs of a command's own flags, over their defaults, and the words that are left."""
    values, left, rest = dict(known), [], list(words)
    while rest:
        word = rest.pop(0)
        flag, given, value = word.partition("=")
        if flag not in known:
            left.append(word)
            continue
        if not given and (not rest or rest[0].startswith("--")):
            raise UserError(f"{flag} needs a value")
        values[flag] = value if given else rest.pop(0)
    return values, left


def take_own(
    words: Sequence[str], known: Mapping[str, str], switches: Sequence[str], command: str
) -> tuple[dict[str, str], set[str], list[str]]:
    """A command that takes nothing but its own flags: (the values of `known`, the `switches` that were given, and what
    is no flag). Behind `--` nothing is a flag."""
    words = list(words)
    end = words.index("--") if "--" in words else len(words)
    values, rest = take_flags(words[:end], known)
    given = {word for word in rest if word in switches}
    if wrong := [word for word in rest if word.startswith("-") and word not in switches]:
        flags = [*known, *switches]
        hint = nearest(wrong[0].partition("=")[0], flags)
        raise UserError(f"tldist {command} has no flag {wrong[0]}{hint}: it takes {', '.join(flags)}")
    return values, given, [word for word in rest if word not in switches] + words[end + 1 :]


def at_least(flag: str, value: str, low: int) -> int:
    """The flag's value, or UserError."""
    number = as_number(flag, value, int)
    if number < low:
        raise UserError(f"{flag} is {number}: give {low} or more")
    return number


def parse_flags(words: Sequence[str], known: dict[str, str], command: str) -> dict[str, str]:
    """`--flag VALUE` pairs of the small commands, over their defaults."""
    values, rest = dict(known), list(words)
    while rest:
        flag, _, value = rest.pop(0).partition("=")
        if flag not in known:
            allowed = f"it takes {', '.join(known)}" if known else "it takes none"
            raise UserError(f"tldist {command} has no flag {flag}{nearest(flag, known)}: {allowed}")
        if not value and not rest:
            raise UserError(f"{flag} needs a value")
        values[flag] = value or rest.pop(0)
    return values
