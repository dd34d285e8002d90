"""What a study came to: tables as Markdown, CSV and JSON, sentences on which differences are real, and report.html."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from tldist.report.run_page import Cell, Drawer, Fact, Page, Section, Table, environment_table, render
from tldist.study import plots as study_plots
from tldist.study.log import METRICS, StudyLog, Trial, blocks, came_to, grain, read_study, tried
from tldist.study.statistics import Difference, Mean, against, all_pairs, corrected, mean_of
from tldist.tracking import wording
from tldist.tracking.runlog import read
from tldist.tracking.wording import MISSING

WITH_INTERVAL = ("val_top1", "best_val_top1", "mean_val_top1", "val_loss", "gap")
SHOWN = ("val_top1", "best_val_top1", "mean_val_top1", "gap", "images_per_s", "device_seconds", "peak_mem_gib")
"""The metrics that have a column; what the study is judged by comes first."""
MOST_ARMS_IN_PAIRS = 6
EVERY_TWO = "Every two"
MOST_TRIALS = 300
NOTE = (
    "Mean and 95 % interval (Student's t) over seeds. All runs are judged on the same validation images, so this says "
    "nothing of how other images would come out."
)


@dataclass(frozen=True)
class Family:
    """Differences that were looked at together, and are corrected together."""

    title: str
    text: str
    differences: list[Difference]


def write_study(folder: Path) -> Path:
    """Write table.md, table.csv, table.json, plots/ and report.html of the study in `folder`; returns the page's path.

    The study must have a finished trial.
    """
    log = read_study(folder)
    (folder / "table.md").write_text(markdown(log))
    (folder / "table.csv").write_text(as_csv(log))
    (folder / "table.json").write_text(json.dumps(as_json(log), indent=1) + "\n")
    return render(_page(log, folder), folder / "report.html")


def arm_title(log: StudyLog, arm: Sequence[str]) -> str:
    """`full, base-lr 0.1`: a label that is a number goes with its axis's name."""
    names = [axis.rsplit(".", 1)[-1].replace("_", "-") for axis in log.axes]
    parts = [f"{n} {label}" if _is_number(label) else label for n, label in zip(names, arm, strict=False)]
    return ", ".join(parts)


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


def columns(log: StudyLog) -> list[str]:
    """The metrics that the tables show, the study's own first."""
    return [log.metric, *(name for name in SHOWN if name != log.metric)]


def heading(log: StudyLog, name: str) -> str:
    """A column's heading: what a device is, is known only now."""
    if name == "device_seconds":
        return "GPU-seconds" if any(trial.gpus for trial in log.judged) else "core-seconds"
    return METRICS[name].heading


def means(trials: Sequence[Trial], name: str) -> Mean | None:
    """Over the trials that have it."""
    values = [trial.values[name] for trial in trials if name in trial.values]
    return mean_of(values, grain(trials, name)) if values else None


def written(name: str, mean: Mean | None) -> str:
    """`82.1 ± 1.3 %`: the interval only where it is of interest."""
    if mean is None:
        return MISSING
    plain = METRICS[name].written(mean.mean)
    if mean.half is None or name not in WITH_INTERVAL:
        return plain
    half = METRICS[name].written(mean.half)
    return f"{plain.removesuffix(' %')} ± {half}"


def table_of(log: StudyLog) -> list[list[str]]:
    """Heading and one row per arm."""
    names = columns(log)
    rows = [
        [arm_title(log, arm), str(len(trials)), *(written(name, means(trials, name)) for name in names)]
        for arm, trials in log.arms().items()
    ]
    return [["", "runs", *(heading(log, name) for name in names)], *rows]


def families(log: StudyLog) -> list[Family]:
    """What is compared with what: the labels of each axis over all else, and every arm with the best one."""
    arms = {arm_title(log, arm): blocks_of_arm(trials, log.metric) for arm, trials in log.arms().items()}
    arms = {name: values for name, values in arms.items() if values}
    is_grid = not log.told.get("is_search")
    axes = {axis: labels for axis, labels in log.axes.items() if len(labels) > 1}
    if len(arms) <= MOST_ARMS_IN_PAIRS and (len(axes) <= 1 or not is_grid):
        return [Family(EVERY_TWO, "Paired by seed.", corrected(all_pairs(arms, log.grain)))]
    best = best_arm(log)
    text = "Paired by seed. The best one was chosen on these very runs, which flatters it."
    found = [Family(f"The best, {best}, against each other", text, corrected(against(best, arms, log.grain)))]
    return [*_by_axis(log, list(axes)), *found] if is_grid and len(axes) > 1 else found


def blocks_of_arm(trials: Sequence[Trial], metric: str) -> dict[Any, float]:
    """An arm's values by seed."""
    return {(trial.seed,): trial.values[metric] for trial in trials if metric in trial.values}


def _by_axis(log: StudyLog, axes: Sequence[str]) -> list[Family]:
    """For each axis its labels, paired by seed and by all that the other axes hold; corrected over all axes."""
    found = {axis: all_pairs(_labels(log, axis), log.grain) for axis in axes}
    right = iter(corrected([difference for pairs in found.values() for difference in pairs]))
    text = (
        "Paired by seed and by every choice on the other axes. A seed's pairs share its images and their order, so "
        "they are averaged first: what counts is how many seeds there are."
    )
    return [Family(axis, text, [next(right) for _ in pairs]) for axis, pairs in found.items()]


def _labels(log: StudyLog, axis: str) -> dict[str, dict[Any, float]]:
    return {
        label: blocks([trial for trial in log.judged if trial.choices.get(axis) == label], log.metric, axis)
        for label in log.axes[axis]
    }


def best_arm(log: StudyLog) -> str:
    """The title of the arm with the best mean."""
    found = {arm_title(log, arm): means(trials, log.metric) for arm, trials in log.arms().items()}
    sign = -1 if METRICS[log.metric].lower_is_better else 1
    return max(found, key=lambda name: sign * mean.mean if (mean := found[name]) else -float("inf"))


def conclusions(log: StudyLog) -> list[str]:
    """The comparisons in words: what is real, and what is noise."""
    differences = [d for family in families(log) for d in family.differences]
    if differences and all(d.p is None for d in differences):
        return ["One seed: nothing can be said of any difference. Give more seeds."]
    return [sentence for family in families(log) for sentence in _told(log, family)]


def _told(log: StudyLog, family: Family) -> list[str]:
    tested = [d for d in family.differences if d.p is not None]
    real = [d for d in tested if d.is_real]
    where = "" if family.title == EVERY_TWO else f"{family.title}: "
    said = [f"{where}{_difference(log, d)} ({_p_told(d)}, {d.seeds} seeds)." for d in real]
    if rest := len(tested) - len(real):
        of = f"{rest} of {len(tested)} differences" if len(tested) > 1 else "the difference"
        said.append(f"{where}{of} cannot be told from noise.")
    if rest := len(family.differences) - len(tested):
        of = f"{rest} differences" if rest > 1 else "a difference"
        said.append(f"{where}nothing can be said of {of} seen with one seed.")
    return said


def _difference(log: StudyLog, d: Difference) -> str:
    first, second = (d.first, d.second) if d.mean >= 0 else (d.second, d.first)
    much = amount(log, abs(d.mean))
    number, _, unit = much.partition(" ")
    if d.half is not None:
        much = f"{number} ± {amount(log, d.half)}" if unit else f"{much} ± {amount(log, d.half)}"
    return f"{first} is {much} above {second}"


def _p_told(d: Difference) -> str:
    told = _p(d.corrected_p)
    return f"p {told}" if told.startswith("<") else f"p = {told}"


def amount(log: StudyLog, value: float) -> str:
    """A difference of the metric, in its unit: points for shares."""
    metric = METRICS[log.metric]
    return f"{100 * value:.1f} points" if metric.written(0.5).endswith("%") else metric.written(value)


def _p(value: float | None) -> str:
    if value is None:
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


DIFFERENCES = ("first", "second", "difference", "95 % interval", "p", "p (Holm)", "real?")


def _difference_rows(log: StudyLog, family: Family) -> list[list[str]]:
    return [
        [
            d.first,
            d.second,
            _signed(log, d.mean),
            MISSING if d.half is None else f"{_signed(log, d.mean - d.half)} to {_signed(log, d.mean + d.half)}",
            _p(d.p),
            _p(d.corrected_p),
            "yes" if d.is_real else "not told from noise" if d.p is not None else "one seed: no test",
        ]
        for d in family.differences
    ]


def _signed(log: StudyLog, value: float) -> str:
    return ("+" if value >= 0 else "-") + amount(log, abs(value))


def markdown(log: StudyLog) -> str:
    """The tables and the sentences, to paste into a document."""
    parts = [f"# {log.told.get('title', '')}\n", _pipe(table_of(log)), NOTE + "\n"]
    for family in families(log):
        parts += [
            f"## {family.title}\n",
            _pipe([list(DIFFERENCES), *_difference_rows(log, family)]),
            family.text + "\n",
        ]
    return "\n".join([*parts, *(f"- {sentence}" for sentence in conclusions(log))]) + "\n"


def _pipe(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def as_csv(log: StudyLog) -> str:
    """One row per arm: its choices, how many runs, and mean and half width of every metric's 95 % interval."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow([*log.axes, "runs", *(f"{name}{end}" for name in METRICS for end in ("", "_half_width"))])
    for arm, trials in log.arms().items():
        found = [means(trials, name) for name in METRICS]
        numbers = [value for mean in found for value in ((mean.mean, mean.half) if mean else (None, None))]
        writer.writerow([*arm, len(trials), *("" if value is None else value for value in numbers)])
    return buffer.getvalue()


def as_json(log: StudyLog) -> dict[str, Any]:
    """Everything, for programs."""
    arms = [
        {
            "arm": dict(zip(log.axes, arm, strict=False)),
            "runs": len(trials),
            **{name: asdict(mean) for name in METRICS if (mean := means(trials, name)) is not None},
        }
        for arm, trials in log.arms().items()
    ]
    compared = [
        {"family": family.title, **asdict(d), "is_real": d.is_real}
        for family in families(log)
        for d in family.differences
    ]
    return {"study": log.told, "arms": arms, "differences": compared, "trials": [asdict(trial) for trial in log.trials]}


def _page(log: StudyLog, folder: Path) -> Page:
    drawn = Drawer(folder / "plots")
    by_title = {arm_title(log, arm): trials for arm, trials in log.arms().items()}
    costs = {
        name: (spent, value)
        for name, trials in by_title.items()
        if (spent := means(trials, "device_seconds")) and (value := means(trials, log.metric))
    }
    seen = {name: [trial.curve for trial in trials] for name, trials in by_title.items()}
    example = read(folder / "trials" / log.judged[0].name)
    sections = [
        Section("Results", NOTE, table=_results(log)),
        Section("Which differences are real", lines=conclusions(log)),
        *(Section(f.title, f.text, table=_table(DIFFERENCES, _difference_rows(log, f))) for f in families(log)),
        Section(
            "Accuracy against cost",
            "Joined: what no other beats in both. Bars: 95 % intervals.",
            pictures=drawn.all(
                [("pareto", study_plots.pareto(costs, METRICS[log.metric], heading(log, "device_seconds")))]
            ),
        ),
        Section(
            "Epoch by epoch",
            "Mean over seeds, and the range between the lowest and the highest.",
            pictures=drawn.all([("curves", study_plots.curves(seen))]),
        ),
        *_search(log, drawn),
        Section("Trials", table=_trials(log)),
        Section("Environment", table=environment_table(example)),
        Section("Study", code=yaml.safe_dump(dict(log.told), sort_keys=False)),
    ]
    title = str(log.told.get("title") or log.told.get("name") or "A study")
    return Page(
        title, _subtitle(log), _banner(log), _facts(log), [section for section in sections if not section.is_empty]
    )


def _subtitle(log: StudyLog) -> str:
    seeds = log.told.get("seeds", [])
    kind = "search" if log.told.get("is_search") else "grid"
    parts = [
        f"recipe {log.told.get('recipe')}",
        f"{kind} over {', '.join(log.axes)}",
        f"seeds {', '.join(map(str, seeds))}",
    ]
    return " · ".join(parts)


def _banner(log: StudyLog) -> str:
    over = tried([trial for trial in log.trials if trial.stage == "search"])
    states = [trial.state for trial in log.trials if trial not in over]
    counts = {state: states.count(state) for state in ("interrupted", "failed")}
    if not any(counts.values()):
        return ""
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return f"Not all trials are finished: {told}. The same command goes on with them."


def _facts(log: StudyLog) -> list[Fact]:
    done = [trial for trial in log.trials if trial.state in ("finished", "pruned")]
    spent = sum(trial.values.get("device_seconds", 0.0) for trial in log.trials)
    best = next(trials for arm, trials in log.arms().items() if arm_title(log, arm) == best_arm(log))
    mean = means(best, log.metric)
    return [
        Fact("trials", str(len(done)), f"of {len(log.trials)} begun"),
        Fact("arms", str(len(log.arms()))),
        Fact(f"best {METRICS[log.metric].heading}", METRICS[log.metric].written(mean and mean.mean), best_arm(log)),
        Fact("spent", wording.rate(spent), heading(log, "device_seconds")),
    ]


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return Table(list(names), [[Cell(cell, "best" if cell == "yes" else "number") for cell in row] for row in rows])


def _results(log: StudyLog) -> Table:
    head, *rows = table_of(log)
    best = best_arm(log)
    cells = [
        [
            Cell(row[0], "name"),
            *(Cell(cell, "best" if i == 1 and row[0] == best else "number") for i, cell in enumerate(row[1:])),
        ]
        for row in rows
    ]
    return Table(head, cells)


def _search(log: StudyLog, drawn: Drawer) -> list[Section]:
    """What a search tried, best first."""
    begun = [trial for trial in log.trials if trial.stage == "search"]
    values = {trial.name: value for trial in begun if (value := came_to(trial, log.metric)) is not None}
    if not values:
        return []
    sign = 1 if METRICS[log.metric].lower_is_better else -1
    searched = sorted(begun, key=lambda trial: sign * values.get(trial.name, sign * math.inf))
    ranges = [axis for axis, labels in log.axes.items() if not labels]
    points = {
        axis: [
            (float(t.exact[axis]), values[t.name], t.state == "pruned")
            for t in searched
            if axis in t.exact and t.name in values
        ]
        for axis in ranges
    }
    rows = [
        [*trial.arm, METRICS[log.metric].written(values.get(trial.name)), str(len(trial.curve)), _standing(trial)]
        for trial in searched
    ]
    kept = any(trial.stage == "kept" for trial in log.trials)
    text = f"Chosen by seed {searched[0].seed}; " + (
        "the best were run again with the other seeds, and only those runs count above."
        if kept
        else "the best is the luckiest too: give more seeds to have the best run again."
    )
    picture = drawn.all([("tried", study_plots.tried(points, METRICS[log.metric]))])
    table = _table([*log.axes, METRICS[log.metric].heading, "epochs", "state"], rows)
    return [Section("What was tried", text, table=table, pictures=picture)]


def _standing(trial: Trial) -> str:
    return f"failed: {trial.why}" if trial.state == "failed" else trial.state


def _trials(log: StudyLog) -> Table:
    rows = [
        [
            Cell(trial.name, "name"),
            Cell(_standing(trial)),
            *(Cell(METRICS[name].written(trial.values.get(name)), "number") for name in (log.metric, "seconds")),
        ]
        for trial in log.trials[:MOST_TRIALS]
    ]
    return Table(["trial", "state", METRICS[log.metric].heading, "seconds"], rows)
