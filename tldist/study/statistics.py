"""Which differences are real: means with their intervals, and paired tests with Holm's correction. Pure functions.

Two arms of an experiment are compared on equal terms: pair by pair, where a pair shares its seed and all else but what
is compared. What the pairs share (an easy draw of images, a lucky order) then cancels. Pairs of one seed are no
independent witnesses: they are averaged, and the test counts seeds. What no seed can tell is how other validation
images would come out: all runs of a study are judged on the same ones.

An accuracy is a whole multiple of its grain (on 153 images: 1 / 153). Equal values, then, do not mean that there is no
noise, only less than the grain shows: each value's noise counts as at least that of rounding, grain^2 / 12.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy import stats

LEVEL = 0.05
"""A difference is called real where its corrected p is below this."""

Block = tuple[Any, ...]
"""What a pair shares: the seed first, and every other choice."""


@dataclass(frozen=True)
class Mean:
    """A mean over so many values, and half the width of its 95 % interval (Student's t; None for a single value)."""

    n: int
    mean: float
    half: float | None


@dataclass(frozen=True)
class Difference:
    """`first` less `second`, over the pairs that both have."""

    first: str
    second: str
    seeds: int
    mean: float
    half: float | None
    """Half the width of the mean's 95 % interval, uncorrected; None for fewer than two seeds."""
    p: float | None
    """Of the paired t-test, two-sided; None for fewer than two seeds."""
    corrected_p: float | None = None
    """After Holm (1979), over all differences that were looked at together."""

    @property
    def is_real(self) -> bool:
        """Beyond chance, as far as these seeds tell."""
        return self.corrected_p is not None and self.corrected_p < LEVEL


def mean_of(values: Sequence[float], grain: float = 0.0) -> Mean:
    """Raises ValueError (statistics.StatisticsError) for no values."""
    return Mean(len(values), statistics.fmean(values), _half_width(values, grain / math.sqrt(12)))


def paired(
    first: tuple[str, Mapping[Block, float]], second: tuple[str, Mapping[Block, float]], grain: float = 0.0
) -> Difference | None:
    """Two arms, each a name and its values by block; None where they share no block.

    The differences of one seed's blocks are averaged first: what they share (the draw of images, the order) is in all
    of them, so only seeds are independent, and the test has as many degrees of freedom as there are seeds, less one.
    """
    (name, values), (other_name, other) = first, second
    by_seed: dict[Any, list[float]] = {}
    for block in values:
        if block in other:
            by_seed.setdefault(block[0], []).append(values[block] - other[block])
    if not by_seed:
        return None
    differences = [statistics.fmean(of_seed) for of_seed in by_seed.values()]
    mean, n = statistics.fmean(differences), len(differences)
    if n < 2:
        return Difference(name, other_name, n, mean, None, None)
    least = grain / math.sqrt(6 * min(map(len, by_seed.values())))  # two values rounded, and their difference averaged
    error = _deviation(differences, least) / math.sqrt(n)
    p = (1.0 if mean == 0 else 0.0) if error == 0 else float(2 * stats.t.sf(abs(mean) / error, n - 1))
    return Difference(name, other_name, n, mean, _half_width(differences, least), p)


def all_pairs(arms: Mapping[str, Mapping[Block, float]], grain: float = 0.0) -> list[Difference]:
    """Every two arms of one kind, uncorrected."""
    found = (paired(a, b, grain) for a, b in itertools.combinations(arms.items(), 2))
    return [difference for difference in found if difference is not None]


def against(name: str, arms: Mapping[str, Mapping[Block, float]], grain: float = 0.0) -> list[Difference]:
    """One arm less each of the others, uncorrected."""
    others = ((other, values) for other, values in arms.items() if other != name)
    found = (paired((name, arms[name]), other, grain) for other in others)
    return [difference for difference in found if difference is not None]


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """The same, with p corrected for having looked at all of them: Holm's step-down procedure.

    The smallest of m values is multiplied by m, the next one by m - 1, ..., none ends below one before it (Holm, 1979).
    """
    tested = [d for d in differences if d.p is not None]
    order = sorted(range(len(tested)), key=lambda i: tested[i].p or 0.0)
    so_far, found = 0.0, {}
    for rank, i in enumerate(order):
        so_far = max(so_far, min(1.0, (len(tested) - rank) * (tested[i].p or 0.0)))
        found[id(tested[i])] = so_far
    return [replace(d, corrected_p=found.get(id(d))) for d in differences]


def frontier(points: Mapping[str, tuple[float, float]], lower_is_better: bool = False) -> list[str]:
    """Names of the points (cost, value) that no other beats in both, cheapest first."""
    sign = -1 if lower_is_better else 1
    best, kept = -math.inf, []
    for name, (_, value) in sorted(points.items(), key=lambda item: (item[1][0], -sign * item[1][1])):
        if sign * value > best:
            best = sign * value
            kept.append(name)
    return kept


def _deviation(values: Sequence[float], least: float) -> float:
    """Standard deviation of a sample, at least that of rounding."""
    return max(statistics.stdev(values), least)


def _half_width(values: Sequence[float], least: float) -> float | None:
    if len(values) < 2:
        return None
    return float(stats.t.ppf(0.975, len(values) - 1)) * _deviation(values, least) / math.sqrt(len(values))
