"""What the benches share: flags, rounds in which all variants take turns, medians with their spread, and the CSV.

All variants of a bench take turns in every round, so that a change of clocks or of the machine's other load meets all
of them; the first round is a warm-up and is not kept. A ratio is taken within each round, and the median of these is
reported: it survives a slow round that a ratio of medians would mix with a fast one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import statistics
import sys
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from tldist import dist
from tldist.config import TrainingFailed, UserError, nearest
from tldist.tracking.environment import environment

Turn = Callable[[], dict[str, float]]
"""One variant's turn in a round: its measurements by name."""
Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Series:
    """One measurement of one variant, round by round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the rounds were lower."""
        return statistics.median(self.values)

    def percentile(self, share: float) -> float:
        """The value of the round that `share` of the rounds are below."""
        return sorted(self.values)[round(share * (len(self.values) - 1))]

    def over(self, other: Series) -> Series:
        """Round by round."""
        return Series(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))


Measured = dict[str, dict[str, Series]]
"""Variant -> measurement -> its rounds."""


def take_turns(variants: Mapping[str, Turn], rounds: int, show: Callable[[str], None]) -> Measured:
    """Each variant's turn in every round; a warm-up round comes before and is dropped.

    Each round begins with another variant, so that none always follows the same one.
    """
    names, found = list(variants), {name: [] for name in variants}
    for number in range(rounds + 1):
        show(f"round {number} of {rounds}" if number else "warm-up")
        start = number % len(names)
        for name in names[start:] + names[:start]:
            turn = variants[name]()
            if number:
                found[name].append(turn)
    return {
        name: {key: Series(tuple(turn[key] for turn in turns)) for key in turns[0]} for name, turns in found.items()
    }


def synchronize(device: torch.device) -> None:
    """Wait for the device; the CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def worker_threads() -> Iterator[None]:
    """As many threads as a run's only worker takes, for all variants alike."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, dist.cores()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def show(text: str) -> None:
    """Progress, apart from the results on stdout."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# Facts and files


def facts(device: torch.device) -> dict[str, Any]:
    """Commit, hardware and versions, as every row of a CSV holds them."""
    found = environment()
    hardware, packages = found["hardware"], found["packages"]
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "commit": found["commit"],
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else hardware["cpu"],
        "cores": hardware["cores"],
        "threads": torch.get_num_threads(),
        "python": found["python"],
        "torch": packages.get("torch"),
        "torchvision": packages.get("torchvision"),
    }


def check_writable(folder: Path, *files: Path) -> None:
    """Make `folder`, and find out before anything is measured that results could not be written."""
    for place in (folder, *(file.parent for file in files)):
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {place} for the results: {error.strerror}") from error
        if not os.access(place, os.W_OK):
            raise UserError(f"the folder {place} for the results is not writable: name another")
    for file in files:
        if file.is_dir():
            raise UserError(f"{file} is a folder: name a file for the results")


# Flags


def parse(words: Sequence[str], settings: type[Settings], command: str) -> Settings:
    """`--flag VALUE` pairs over the defaults of a dataclass whose fields are numbers (above 0), choices or text."""
    fields = {"--" + f.name.replace("_", "-"): f.name for f in dataclasses.fields(settings)}  # type: ignore[arg-type]
    kinds, values, rest = typing.get_type_hints(settings), {}, list(words)
    while rest:
        flag, given, value = rest.pop(0).partition("=")
        if flag not in fields:
            raise UserError(
                f"tldist bench {command} has no flag {flag}{nearest(flag, fields)}: it takes {', '.join(fields)}"
            )
        if not given and not rest:
            raise UserError(f"{flag} needs a value")
        name = fields[flag]
        values[name] = _value(flag, value if given else rest.pop(0), kinds[name])
    return settings(**values)


def _value(flag: str, text: str, kind: Any) -> Any:
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if text not in choices:
            raise UserError(f"{flag} '{text}' is not known{nearest(text, choices)}: choose from {', '.join(choices)}")
        return text
    if kind not in (int, float):
        return text
    try:
        number = kind(text)
    except ValueError:
        raise UserError(f"{flag} '{text}' is not a {'whole ' if kind is int else ''}number") from None
    if not (number >= 1 if kind is int else 0 < number < math.inf):
        raise UserError(f"{flag} is {number}: give {'1 or more' if kind is int else 'a number above 0'}")
    return number


def command(
    words: Sequence[str], settings: type[Settings], name: str, doc: str, run: Callable[[Settings], None]
) -> int:
    """A bench's command: --help, or flags, and then `run`. Raises UserError and TrainingFailed."""
    if {"-h", "--help"} & set(words):
        print(f"{usage(settings, name)}\n\n{doc.splitlines()[0]}")
        return 0
    asked: Any = parse(words, settings, name)
    check_writable(Path(asked.out), *([Path(asked.json)] if asked.json else []))
    run(asked)
    return 0


def main(bench: Callable[[Sequence[str]], int]) -> None:
    """Without the launcher: `python -m tldist_benchmarks.NAME`."""
    try:
        sys.exit(bench(sys.argv[1:]))
    except (UserError, TrainingFailed) as error:
        print(f"tldist: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


def usage(settings: type, command: str) -> str:
    """One line with every flag and its default."""
    flags = [f"[--{f.name.replace('_', '-')} {f.default or f.name.upper()}]" for f in dataclasses.fields(settings)]
    return f"usage: tldist bench {command} {' '.join(flags)}"
