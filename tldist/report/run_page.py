"""`report.html`: what a run did, on one page that needs neither network nor scripts.

Reads only the run directory. Whatever a crashed run did not write is left out of its page.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from tldist.data.source.shards import read_path
from tldist.data.source.verify import pillow_without_limit
from tldist.report import plots
from tldist.tracking import wording
from tldist.tracking.runlog import RunLog, read
from tldist.tracking.wording import number, whole

THUMBNAIL_PX = 112
MOST_SAMPLES = 48


@dataclass(frozen=True)
class Fact:
    """One key figure of the heading."""

    label: str
    value: str
    hint: str = ""
    bad: bool = False


@dataclass(frozen=True)
class Cell:
    """A table cell; `tone` is one of the template's: number, name, off, best."""

    text: str
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under column names (none: no heading)."""

    columns: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Picture:
    """A figure as a `data:` URI; a `wide` one has a row of its own."""

    uri: str
    alt: str
    width_px: int
    wide: bool = False


@dataclass(frozen=True)
class Sample:
    """A validation image and what the model said; `uri` is empty where the image cannot be read."""

    uri: str
    alt: str
    wrong: bool


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    text: str = ""
    lines: list[str] = field(default_factory=list)
    table: Table | None = None
    pictures: list[Picture] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    code: str = ""

    @property
    def is_empty(self) -> bool:
        """Nothing but a heading."""
        return not (self.lines or self.table or self.pictures or self.samples or self.code)


@dataclass(frozen=True)
class Page:
    """All that the template shows."""

    title: str
    subtitle: str
    banner: str
    facts: list[Fact]
    sections: list[Section]


def write_report(run_dir: Path, data_root: Path | None = None) -> Path:
    """Write `run_dir/report.html` and `run_dir/plots/*.png`; returns the page's path.

    `data_root` is where the sample pictures are (default: `data.root` of the run's config.yaml).
    """
    log = read(run_dir)
    drawn = Drawer(run_dir / "plots")
    sections = [
        Section("Training", pictures=drawn.all([("loss", plots.loss(log)), ("top1", plots.top1(log))])),
        Section("What training sees", pictures=_inputs(run_dir)),
        Section("Learning rate and throughput", pictures=_speed_pictures(drawn, log)),
        _plan(log),
        _phases(log),
        _predictions(drawn, log, data_root or _data_root(log)),
        Section("Notices", lines=log.notices),
        Section("Environment", table=environment_table(log)),
        Section("Configuration", code=yaml.safe_dump(log.config, sort_keys=False) if log.config else ""),
    ]
    page = Page(_title(log), _subtitle(log), _banner(log), _facts(log), _filled(sections))
    return render(page, run_dir / "report.html")


def write_comparison(run_dirs: Mapping[str, Path], out_dir: Path, title: str, intro: str) -> Path:
    """Write `out_dir/report.html` and `out_dir/plots/*.png` on several runs, by name and in their order."""
    logs = {name: read(run_dir) for name, run_dir in run_dirs.items()}
    drawn = Drawer(out_dir / "plots")
    bars = [
        ("top1", plots.bars("Validation top-1, last epoch", _each(logs, "val_top1"), _percent)),
        ("images_per_s", plots.bars("Images per second", _each(logs, "images_per_s"), wording.rate)),
    ]
    overview = drawn.all(bars) + drawn.all([("val_top1", plots.validation_curves(logs))], wide=True)
    sections = [
        Section("Results", table=_results(logs) if logs else None),
        Section("Side by side", pictures=overview),
        *(_run_section(drawn, name, log) for name, log in logs.items()),
    ]
    page = Page(title, intro, "", [], [s for s in sections if s.text or not s.is_empty])
    return render(page, out_dir / "report.html")


class Drawer:
    """Saves figures in one folder and hands them on as pictures."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def all(self, figures: list[tuple[str, Figure | None]], wide: bool = False) -> list[Picture]:
        """The figures that have something to show, each saved as `NAME.png`."""
        return [self._picture(name, figure, wide) for name, figure in figures if figure is not None]

    def _picture(self, name: str, figure: Figure, wide: bool) -> Picture:
        uri = plots.png(figure, self._folder / f"{name}.png")
        return Picture(uri, name.replace("_", " "), plots.width_px(figure), wide)


def render(page: Page, path: Path) -> Path:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tldist.report", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    html = environment.get_template("page.html").render(page=page)
    path.parent.mkdir(parents=True, exist_ok=True)
    # File names may hold bytes that are no text; they show as question marks.
    path.write_text(html, encoding="utf-8", errors="replace")
    return path


def _filled(sections: list[Section]) -> list[Section]:
    return [section for section in sections if not section.is_empty]


def _title(log: RunLog) -> str:
    parts = [str(log.summary[key]) for key in ("recipe", "strategy", "model") if log.summary.get(key)]
    return ", ".join(parts) or "A run without records"


def _subtitle(log: RunLog) -> str:
    s = log.summary
    classes = s.get("classes")
    parts = [
        wording.workers(s.get("engine"), whole(s, "world_size")) if s.get("engine") else "",
        f"{s['train_images']} train and {s.get('val_images', '?')} val images" if s.get("train_images") else "",
        f"{len(classes)} classes" if isinstance(classes, list) else "",
        f"{s['epochs']} epochs" if s.get("epochs") else "",
        f"seed {s['seed']}" if s.get("seed") is not None else "",
        f"skipped images: {s['skipped_images']}" if s.get("skipped_images") else "",
        f"resumed from {s['resumed_from']}" if s.get("resumed_from") else "",
    ]
    return " · ".join(part for part in parts if part)


def _banner(log: RunLog) -> str:
    if log.finished:
        return ""
    if not (log.train or log.evals):
        return "This run has recorded no training step."
    step = max(whole(row, "step") or 0 for row in log.train[-1:] + log.evals[-1:])
    total = whole(log.run, "total_steps")
    return f"This run has not finished: its last record is of step {step}{f' of {total}' if total else ''}."


def _facts(log: RunLog) -> list[Fact]:
    s = log.summary
    drift, world_size = number(s, "replica_spread"), whole(s, "world_size")
    spread, _, hint = wording.spread(drift, world_size).partition(" (")
    facts = [
        Fact("validation top-1", _percent(number(s, "val_top1"))),
        Fact("best", _percent(number(s, "best_val_top1"))),
        Fact("images/s", wording.rate(number(s, "images_per_s"))),
        Fact("MFU", _percent(number(s, "mfu")), wording.peak(s)),
        Fact("waiting for data", wording.percent(number(s, "data_wait_share"), 1)),
        Fact("trainable", wording.count(number(s, "trainable_params")), "parameters, last phase"),
        Fact("total", wording.count(number(s, "total_params")), "parameters"),
        Fact("replica spread", spread, hint.rstrip(")"), bad=bool(drift)),
        Fact("peak memory", wording.gib(number(s, "peak_mem_gib"))),
        Fact("time", wording.duration(number(s, "wall_s"))),
    ]
    return [fact for fact in facts if fact.value not in (wording.MISSING, "-:--")]


def _percent(share: float | None) -> str:
    return wording.percent(share, 1)


def _inputs(run_dir: Path) -> list[Picture]:
    """The contact sheet, where there is one."""
    path = run_dir / "plots" / "inputs.jpg"
    if not path.is_file():
        return []
    with Image.open(path) as sheet:
        width_px = sheet.width
    uri = "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()
    return [Picture(uri, "training images as evaluation shows them, augmented, and mixed", width_px, wide=True)]


def _speed_pictures(drawn: Drawer, log: RunLog) -> list[Picture]:
    figures = {
        "learning_rate": plots.learning_rates(log),
        "gradient_norm": plots.gradient_norm(log),
        "throughput": plots.throughput(log),
    }
    return drawn.all(list(figures.items()))


def _plan(log: RunLog) -> Section:
    """The phases against the stages, from input to output."""
    stages = list(dict.fromkeys(stage for phase in log.plan for stage in _rates(phase)))
    rows = []
    for i, phase in enumerate(log.plan):
        head = [
            Cell(f"{(whole(phase, 'phase') or i) + 1}. {phase.get('name', '')}", "name"),
            Cell(str(phase.get("epochs", wording.MISSING)), "number"),
            Cell(wording.count(number(phase, "trainable_params")), "number"),
        ]
        rows.append(head + [_rate_cell(number(_rates(phase), stage)) for stage in stages])
    table = Table(["phase", "epochs", "trainable", *stages], rows) if rows else None
    return Section("Plan", text="Peak learning rate of each stage, from input to output.", table=table)


PHASE_COLUMNS: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "epochs": ("epochs", wording.count),
    "images/s": ("images_per_s", wording.rate),
    "GFLOP/image": ("gflops_per_image", wording.rate),
    "TFLOP/s": ("tflops_per_s", wording.rate),
    "MFU": ("mfu", _percent),
    "data wait": ("data_wait_share", _percent),
    "peak memory": ("peak_mem_gib", wording.gib),
    "compile": ("compile_s", wording.seconds),
    "cache fill": ("cache_fill_s", wording.seconds),
}
"""The phases' columns: heading, key of an entry of `per_phase`, how it is written."""
PAID_ONCE = ("compile_s", "cache_fill_s")
"""Columns in which 0.0 means that nothing was done."""


def _phases(log: RunLog) -> Section:
    """What each phase came to; columns that no phase has a value for are left out."""
    values = {
        name: [(number(phase, key) or None) if key in PAID_ONCE else number(phase, key) for phase in log.per_phase]
        for name, (key, _) in PHASE_COLUMNS.items()
    }
    shown = [name for name, column in values.items() if any(value is not None for value in column)]
    rows = []
    for i, phase in enumerate(log.per_phase):
        cells = [Cell(PHASE_COLUMNS[name][1](values[name][i]), "number") for name in shown]
        rows.append([Cell(f"{i + 1}. {phase.get('name', '')}", "name"), *cells])
    text = f"TFLOP/s: of all workers, for what the model needs. MFU: {_peak(log)}." if "MFU" in shown else ""
    return Section("Phases", text, table=Table(["phase", *shown], rows) if rows else None)


def _peak(log: RunLog) -> str:
    """`of the measured conv peak, 1.05 TFLOP/s per worker`."""
    known = log.summary.get("peak_flops")
    tflops = number(known, "tflops") if isinstance(known, dict) else None
    return wording.peak(log.summary) + (f", {wording.rate(tflops)} TFLOP/s per worker" if tflops else "")


def _rates(phase: Mapping[str, Any]) -> dict[str, Any]:
    stages = phase.get("stages")
    return stages if isinstance(stages, dict) else {}


def _rate_cell(peak: float | None) -> Cell:
    return Cell(f"{peak:.2g}", "number") if peak else Cell("frozen", "off")


def _classes(log: RunLog) -> list[str]:
    names = log.predictions.get("classes") or log.run.get("classes")
    return [str(name) for name in names] if isinstance(names, list) else []


def _data_root(log: RunLog) -> Path | None:
    data = log.config.get("data")
    root = data.get("root") if isinstance(data, dict) else None
    return Path(root) if isinstance(root, str) and root else None


def _predictions(drawn: Drawer, log: RunLog, data_root: Path | None) -> Section:
    """The confusion matrix and the pictures the run chose: its worst mistakes, then some it got right."""
    classes, listed = _classes(log), log.predictions.get("samples")
    rows = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) and data_root else []
    return Section(
        "Predictions",
        "Pictures: the most confident mistakes first, marked, then some it got right." if rows else "",
        pictures=drawn.all([("confusion", plots.confusion(classes, log.predictions.get("confusion_CC")))]),
        samples=[_sample(row, classes, data_root or Path()) for row in rows[:MOST_SAMPLES]],
    )


def _sample(row: Mapping[str, Any], classes: list[str], data_root: Path) -> Sample:
    said, truth = (_class_name(row.get(key), classes) for key in ("predicted", "label"))
    wrong = row.get("predicted") != row.get("label")
    confidence = wording.percent(number(row, "confidence"))
    return Sample(
        uri=_thumbnail(data_root / str(row.get("path", ""))),
        alt=f"said {said} {confidence}, is {truth}" if wrong else f"said {said} {confidence}, right",
        wrong=wrong,
    )


def _class_name(label: object, classes: list[str]) -> str:
    return classes[label] if isinstance(label, int) and 0 <= label < len(classes) else f"class {label}"


def _thumbnail(path: Path) -> str:
    """The picture's centre as a `data:` URI, at twice its size on the page for dense screens."""
    side = 2 * THUMBNAIL_PX
    try:
        with pillow_without_limit(), Image.open(io.BytesIO(read_path(path))) as image:
            image.draft("RGB", (2 * side, 2 * side))
            small = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (side, side))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def environment_table(log: RunLog) -> Table | None:
    rows = [[Cell(name, "name"), Cell(value)] for name, value in _flat(log.environment)]
    return Table([], rows) if rows else None


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested dicts as (`outer.inner`, text) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, item in value.items():
        if isinstance(item, dict):
            pairs += _flat(item, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, item)) if isinstance(item, list) else str(item)
            pairs.append((f"{prefix}{key}", text))
    return pairs


def _each(logs: Mapping[str, RunLog], key: str) -> dict[str, float]:
    values = {name: number(log.summary, key) for name, log in logs.items()}
    return {name: value for name, value in values.items() if value is not None}


COLUMNS: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "top-1": ("val_top1", _percent),
    "best top-1": ("best_val_top1", _percent),
    "images/s": ("images_per_s", wording.rate),
    "data wait": ("data_wait_share", _percent),
    "trainable": ("trainable_params", wording.count),
    "total": ("total_params", wording.count),
    "time": ("wall_s", wording.duration),
}
"""The comparison's columns: heading, key of the summary, how it is written."""
HIGHEST_IS_BEST = ("val_top1", "best_val_top1", "images_per_s")


def _results(logs: Mapping[str, RunLog]) -> Table:
    best = {key: max(_each(logs, key).values(), default=None) for key in HIGHEST_IS_BEST}
    rows = []
    for name, log in logs.items():
        row = [Cell(name if log.finished else f"{name} (unfinished)", "name")]
        for key, written in COLUMNS.values():
            value = number(log.summary, key)
            is_best = value is not None and value == best.get(key)
            row.append(Cell(written(value), "best" if is_best else "number"))
        rows.append(row)
    return Table(["run", *COLUMNS], rows)


def _run_section(drawn: Drawer, name: str, log: RunLog) -> Section:
    file_name = re.sub(r"[^A-Za-z0-9_.+-]+", "_", name)
    curves = [(f"{file_name}-loss", plots.loss(log)), (f"{file_name}-top1", plots.top1(log))]
    phases = ", ".join(f"{phase.get('name', '')} ({phase.get('epochs', '?')} epochs)" for phase in log.plan)
    text = ". ".join(part for part in (_banner(log).rstrip("."), f"Phases: {phases}" if phases else "") if part)
    return Section(name, text=text and text + ".", pictures=drawn.all(curves))
