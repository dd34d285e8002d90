"""Two results of one bench: what changed, and what is noise.

Every variant's rounds are compared by the Mann-Whitney test (Mann and Whitney, 1947), which asks nothing of how times
are distributed; p values of all variants together are corrected by Benjamini and Hochberg (1995), so that of the
changes that are told at most 5 % are none, on average. How large a change is, the ratio of the medians tells, with
its 95 % interval by bootstrap over the rounds. It is called one if it is more than noise and than --least percent.

A test over the rounds of two runs cannot know why they differ: another load on the machine is a difference too.
--over VARIANT compares ratios to that variant within each round, which such a load leaves alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.table import Table
from scipy import stats

from tldist.config import UserError, nearest
from tldist_benchmarks import harness, results
from tldist_benchmarks.harness import Measured, Series
from tldist_benchmarks.results import Result

ALPHA = 0.05
HARDWARE = ("hardware", "cores", "threads", "device", "machines")
VERSIONS = ("commit", "python", "torch", "torchvision", "triton")
LESS_IS_BETTER = ("_ms", "_s", "_us", "_mib", "_mb", "_s_per_image")
PRIMARY = ("images_per_s", "step_ms", "us")
"""What is compared of a variant: the first of these that it has."""


@dataclass(frozen=True)
class Settings:
    """The flags of `tldist bench compare A B`."""

    metric: str = ""
    """What to compare (default: images_per_s, step_ms or us, whichever a variant has)."""
    over: str = ""
    """Compare ratios to this variant, round by round."""
    least: float = 2.0
    """Percent below which a change is of no interest."""
    hardware: Literal["same", "any"] = "same"
    """any: compare although the hardware differs; what differs is then a finding about machines."""
    json: str = ""
    """Also write the comparison to this file."""


@dataclass(frozen=True)
class Change:
    """Of one variant, from A to B."""

    variant: str
    metric: str
    a: Series
    b: Series
    p: float
    """Corrected for the number of variants."""
    low: float
    high: float
    """95 % of the bootstrap's ratios."""
    least: float

    @property
    def ratio(self) -> float:
        """Of the medians, B over A."""
        return self.b.median / self.a.median

    @property
    def verdict(self) -> Literal["better", "worse", "no change shown", "too few rounds"]:
        """A change that is shown, or why none is."""
        if _smallest_p(self.a, self.b) > ALPHA:
            return "too few rounds"
        if self.p > ALPHA or abs(self.ratio - 1) * 100 < self.least:
            return "no change shown"
        return "better" if (self.ratio < 1) == less_is_better(self.metric) else "worse"


def less_is_better(metric: str) -> bool:
    """Of times and bytes; not of rates and of ratios, which are named after what should be fast."""
    return (metric.endswith(LESS_IS_BETTER) or metric == "us") and not metric.endswith("per_s")


def _smallest_p(a: Series, b: Series) -> float:
    """Of so many rounds, even if all of A are below all of B."""
    return _p(range(len(a.values)), range(len(a.values), len(a.values) + len(b.values)))


def _p(a: Sequence[float], b: Sequence[float]) -> float:
    return float(stats.mannwhitneyu(a, b, alternative="two-sided").pvalue)


def compare(a: Result, b: Result, settings: Settings) -> list[Change]:
    """Every variant that both have. Raises UserError where they are not comparable."""
    check_alike(a, b, settings.hardware)
    before, after = (_chosen(result, settings) for result in (a, b))
    both = [key for key in before if key in after]
    if not both:
        raise UserError(f"nothing to compare: A has {_names(before)}, B has {_names(after)}")
    raw = [_p(before[key].values, after[key].values) for key in both]
    corrected = stats.false_discovery_control(raw)
    return [
        Change(*key, before[key], after[key], float(p), *_interval(before[key], after[key]), settings.least)
        for key, p in zip(both, corrected, strict=True)
    ]


def _names(found: Mapping[tuple[str, str], Series]) -> str:
    return ", ".join(f"{variant} {metric}" for variant, metric in found) or "nothing that was asked for"


def check_alike(a: Result, b: Result, hardware: Literal["same", "any"]) -> None:
    """Raise UserError for two benches, for other flags, and, unless it was asked for, for other hardware."""
    one, other = results.kind(a), results.kind(b)
    different = [key for key in dict.fromkeys((*one, *other)) if one.get(key) != other.get(key)]
    told = {key: f"{key} {one.get(key, 'none')} and {other.get(key, 'none')}" for key in different}
    flags = [told[key] for key in different if key not in (*HARDWARE, *VERSIONS)]
    machines = [told[key] for key in different if key in HARDWARE]
    if flags:
        raise UserError(f"A and B measured different things ({'; '.join(flags)}): compare runs with the same flags")
    if machines and hardware == "same":
        raise UserError(
            f"A and B ran on different hardware ({'; '.join(machines)}), so a difference says nothing of the code: "
            "measure both on one machine, or compare the machines with --hardware any"
        )


def _chosen(result: Result, settings: Settings) -> dict[tuple[str, str], Series]:
    """(variant, metric) -> its rounds, or their ratios to a variant's."""
    variants = result.measured if settings.metric else result.variants
    found = {}
    for variant, metrics in variants.items():
        wanted = (settings.metric,) if settings.metric else PRIMARY
        metric = next((m for m in wanted if m in metrics), None)
        if metric is not None and len(metrics[metric].values) > 1:
            found[variant, metric] = metrics[metric]
    return _over(found, settings.over, variants) if settings.over else found


def _over(found: Mapping[tuple[str, str], Series], name: str, variants: Measured) -> dict[tuple[str, str], Series]:
    metric = next((metric for variant, metric in found if variant == name), None)
    if metric is None:
        raise UserError(f"--over '{name}' is no variant with such a measurement{nearest(name, variants)}")
    base = found[name, metric]
    return {key: series.over(base) for key, series in found.items() if key[1] == metric and key[0] != name}


def _interval(a: Series, b: Series) -> tuple[float, float]:
    """Percentiles of the ratio of medians over resampled rounds; seeded, so that the same files say the same."""

    def ratio(after: np.ndarray, before: np.ndarray, axis: int) -> np.ndarray:
        return np.median(after, axis=axis) / np.median(before, axis=axis)

    drawn = {"n_resamples": 2000, "method": "percentile", "vectorized": True, "random_state": np.random.default_rng(0)}
    resampled = stats.bootstrap((b.values, a.values), ratio, **drawn)
    return float(resampled.confidence_interval.low), float(resampled.confidence_interval.high)


# The command


def read(words: str) -> Result:
    """The last run in a bench's CSV, the one that `FILE@STARTED` names, or what --json wrote. Raises UserError."""
    name, _, started = words.partition("@")
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"there is no file {path}: give a bench's CSV or JSON, or FILE@STARTED for one run of a CSV")
    found = [results.read_json(path)] if path.suffix == ".json" else results.read_csv(path)
    chosen = [result for result in found if str(result.same.get("started", "")).startswith(started)]
    if not chosen:
        times = ", ".join(str(result.same.get("started")) for result in found)
        raise UserError(f"{path} has no run that started {started}: it has {times}")
    return chosen[-1]


def table(a: Result, b: Result, changes: Sequence[Change], settings: Settings) -> Table:
    """A row per variant."""
    what = f"{a.bench}: B over A" + (f", both over {settings.over}" if settings.over else "")
    columns = ("A", "B", "B / A", "95 % interval", "p", "verdict")
    caption = "; ".join(
        f"{key}: {a.same.get(key)} -> {b.same.get(key)}"
        for key in (*HARDWARE, *VERSIONS)
        if str(a.same.get(key)) != str(b.same.get(key))
    )
    made = results.table(what, "variant", columns, caption or None)
    for c in changes:
        medians = (results.shown(c.a.median), results.shown(c.b.median), f"{c.ratio:.3f}")
        made.add_row(f"{c.variant} {c.metric}", *medians, f"{c.low:.3f}..{c.high:.3f}", f"{c.p:.3f}", c.verdict)
    return made


def run(before: str, after: str, settings: Settings) -> int:
    """Print the comparison; 1 where something got worse, else 0. Raises UserError."""
    a, b = read(before), read(after)
    changes = compare(a, b, settings)
    results.print_tables(table(a, b, changes, settings))
    few = min(len(s.values) for c in changes for s in (c.a, c.b))
    if any(c.verdict == "too few rounds" for c in changes):
        print(f"{few} rounds cannot show any change at all: give the benches --rounds 5 or more")
    worse = [c.variant for c in changes if c.verdict == "worse"]
    print(f"worse: {', '.join(worse)}" if worse else "nothing is shown to be worse")
    results.write_json(settings.json, Result(b.same, {}), [_row(c) for c in changes])
    return 1 if worse else 0


def _row(c: Change) -> dict[str, str | float]:
    return {
        "variant": c.variant,
        "metric": c.metric,
        "a": c.a.median,
        "b": c.b.median,
        "ratio": c.ratio,
        "low": c.low,
        "high": c.high,
        "p": c.p,
        "verdict": c.verdict,
    }


def bench(words: Sequence[str]) -> int:
    """`A B [--flag VALUE ...]`: exit code 0, or 1 where something got worse. Raises UserError."""
    if {"-h", "--help"} & set(words):
        print(f"{harness.usage(Settings, 'compare A B')}\n\n{(__doc__ or '').strip()}")
        return 0
    files, flags = list(words[:2]), words[2:]
    if len(files) < 2 or any(name.startswith("--") for name in files):
        raise UserError("tldist bench compare needs two files, then flags: tldist bench compare A.csv B.csv")
    return run(files[0], files[1], harness.parse(flags, Settings, "compare"))


if __name__ == "__main__":
    harness.main(bench)
