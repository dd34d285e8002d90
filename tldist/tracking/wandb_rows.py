"""What a row of `metrics.jsonl` becomes in W&B: names in sections, pictures, charts."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

MAX_SAMPLES = 32
THUMBNAIL_PX = 224
MAX_CHART_CLASSES = 50
"""Above this a confusion matrix of C x C cells is unreadable: only its largest cells are kept."""
MAX_WORKERS = 16
"""Of more workers, the least, the median and the most are drawn instead of a curve each."""

_SECTIONS = {
    "images_per_s": "throughput/images_per_s",
    "tflops_per_s": "throughput/tflops_per_s",
    "mfu": "throughput/mfu",
    "data_wait_share": "throughput/data_wait_share",
    "peak_mem_gib": "memory/peak_gib",
    "grad_norm": "gradient/norm",
    "grad_norm_max": "gradient/norm_max",
    "phase": "phase",
    "epoch": "epoch",
}
_BY_WORKER = {
    "worker_images_per_s": "workers_images_per_s",
    "worker_data_wait_share": "workers_data_wait_share",
}
_BOOKKEEPING = ("event", "time", "step")

STEPS = {"phase": "phase/step", "train": "train/step", "eval": "val/step"}
"""Kind of row -> the key that holds its step, by which a later process knows what has arrived."""
AXES = {
    "train/step": (
        "train/*",
        "lr/*",
        "gradient/*",
        "throughput/*",
        "memory/*",
        *(f"{s}/*" for s in _BY_WORKER.values()),
    ),
    "val/step": ("val/*",),
    "phase/step": ("phase/*",),
}
"""The horizontal axis of each section: true steps, also where W&B counts by itself (shared mode)."""


def history_row(event: Row) -> Row | None:
    """The row in W&B's names; None for kinds that have no place in the history."""
    kind = str(event.get("event"))
    if kind not in _ROWS:
        return None
    row = _ROWS[kind](event)
    return row | {STEPS[kind]: int(event["step"])} if kind in STEPS else row


def summary(event: Row) -> Row:
    """The end's values; those of a phase as `per_phase/2_layer4/mfu`, which W&B can plot where a list is only text."""
    row = plain(event)
    phases = row.pop("per_phase", None)
    for i, phase in enumerate(phases if isinstance(phases, list) else [], start=1):
        name = re.sub(r"\W+", "_", str(phase.get("name", ""))).strip("_")
        row |= {f"per_phase/{i}_{name}/{key}": value for key, value in _numbers(phase).items()}
    return row


def plain(row: Row) -> Row:
    """Without what every row has."""
    return {key: value for key, value in row.items() if key not in _BOOKKEEPING and value is not None}


def _phase_row(event: Row) -> Row:
    return {"phase": event.get("phase"), "phase_name": event.get("name")} | _named(
        event, "phase/", skip=("phase", "name", "epoch")
    )


def _train_row(event: Row) -> Row:
    rates = event.get("lr")
    rates = rates if isinstance(rates, dict) else {}
    row = {f"lr/{stage}": rate for stage, rate in rates.items()} | _named(event, "train/")
    for key, section in _BY_WORKER.items():
        row |= _per_worker(section, event.get(key))
    if event.get("worker_images_per_s"):
        row["throughput/images_per_s_per_worker"] = statistics.fmean(event["worker_images_per_s"])
    return row


def _per_worker(section: str, values: Any) -> Row:
    if not isinstance(values, list) or not values:
        return {}
    if len(values) <= MAX_WORKERS:
        return {f"{section}/{rank}": value for rank, value in enumerate(values)}
    return {f"{section}/{of.__name__}": of(values) for of in (min, statistics.median, max)}


def _eval_row(event: Row) -> Row:
    # Not through _SECTIONS: an eval row counts finished epochs, a train row the one under way.
    numbers = _numbers(event)
    return {f"val/{key.replace('val_', '')}": value for key, value in numbers.items() if key != "phase"}


def _inputs_row(event: Row) -> Row:
    import wandb

    return {"data/inputs": wandb.Image(event["path"], caption="what training sees")}


def _predictions_row(event: Row) -> Row:
    row: Row = {}
    if event.get("confusion_CC"):
        row["val/confusion"] = _confusion_chart(event["classes"], event["confusion_CC"])
        row["val/per_class"] = _per_class_chart(event["classes"], event["confusion_CC"])
    if event.get("samples"):
        row["val/predictions"] = _sample_table(event["samples"])
    return row


_ROWS: dict[str, Callable[[Row], Row]] = {
    "phase": _phase_row,
    "train": _train_row,
    "eval": _eval_row,
    "predictions": _predictions_row,
    "inputs": _inputs_row,
}


def _numbers(event: Row) -> Row:
    return {k: v for k, v in event.items() if k not in _BOOKKEEPING and isinstance(v, int | float)}


def _named(event: Row, prefix: str, skip: Sequence[str] = ()) -> Row:
    """The numbers of a row under W&B's section names; what has no section of its own goes under `prefix`."""
    return {_SECTIONS.get(k, prefix + k): v for k, v in _numbers(event).items() if k not in skip}


def _confusion_chart(classes: Sequence[str], counts_CC: Sequence[Sequence[int]]) -> Any:
    """W&B's own confusion chart from counts; `wandb.plot.confusion_matrix` wants every label instead."""
    import wandb

    cells: Any = [
        [actual, predicted, int(n)]
        for actual, counts_C in zip(classes, counts_CC, strict=True)
        for predicted, n in zip(classes, counts_C, strict=True)
    ]
    if len(classes) > MAX_CHART_CLASSES:
        cells = sorted(cells, key=lambda cell: -cell[2])[: MAX_CHART_CLASSES**2]
    columns: Any = ["Actual", "Predicted", "nPredictions"]
    return wandb.plot_table(
        vega_spec_name="wandb/confusion_matrix/v1",
        data_table=wandb.Table(columns=columns, data=cells),
        fields={column: column for column in columns},
        string_fields={"title": "Validation confusion matrix"},
    )


def per_class(classes: Sequence[str], counts_CC: Sequence[Sequence[int]]) -> list[tuple[str, float | None, int]]:
    """(class, share of its images that were predicted right, its images), the worst first; None without images."""
    rows = [
        (name, counts_C[i] / sum(counts_C) if sum(counts_C) else None, int(sum(counts_C)))
        for i, (name, counts_C) in enumerate(zip(classes, counts_CC, strict=True))
    ]
    return sorted(rows, key=lambda row: (row[1] is None, row[1]))


def _per_class_chart(classes: Sequence[str], counts_CC: Sequence[Sequence[int]]) -> Any:
    import wandb

    columns = ["class", "accuracy", "images"]
    table = wandb.Table(columns=columns, data=[list(row) for row in per_class(classes, counts_CC)])  # pyright: ignore[reportArgumentType]
    return wandb.plot.bar(table, "class", "accuracy", title="Validation accuracy per class")


def _sample_table(samples: Sequence[Row]) -> Any:
    import wandb

    table = wandb.Table(columns=["image", "label", "predicted", "confidence", "correct"])
    for sample in samples[:MAX_SAMPLES]:
        label, predicted = str(sample["label"]), str(sample["predicted"])
        image = _thumbnail(Path(sample["path"]))
        picture = None if image is None else wandb.Image(image, caption=predicted, file_type="jpg")
        table.add_data(picture, label, predicted, float(sample["confidence"]), label == predicted)
    return table


def _thumbnail(path: Path) -> Any:
    """A small upright copy of an image file or tar's member; None where it cannot be read."""
    from PIL import Image, ImageOps

    from tldist.data.source.shards import read_path
    from tldist.data.source.verify import pillow_without_limit

    try:
        with pillow_without_limit(), Image.open(io.BytesIO(read_path(path))) as image:
            image.draft("RGB", (2 * THUMBNAIL_PX, 2 * THUMBNAIL_PX))
            small = ImageOps.exif_transpose(image).convert("RGB")
    except Exception:
        return None
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return small
