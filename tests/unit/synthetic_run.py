"""A made-up but plausible run directory: what a gradual run on two classes of insects writes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

Row = dict[str, Any]

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "head")
START = 1_750_000_000.0
TOTAL_PARAMS = 11_177_538
PARAMS = {
    "head": 1026,
    "layer4": 8_393_728,
    "layer3": 2_099_712,
    "layer2": 525_568,
    "layer1": 147_968,
    "stem": 9536,
}
GFLOPS = (3.63, 5.15, 6.67)
"""Per image, phase by phase."""
ADDED = ("gflops_per_image", "tflops_per_s", "mfu", "compile_s", "cache_fill_s", "peak_flops")
"""What runs from before FLOPs were counted lack."""


@dataclass(frozen=True)
class Shape:
    """How the made-up run looks."""

    strategy: str = "gradual"
    epochs: int = 10
    steps_per_epoch: int = 7
    log_every: int = 2
    classes: tuple[str, ...] = ("ants", "bees")
    phase_starts: tuple[int, ...] = (0, 3, 6)
    world_size: int = 2
    best: float = 0.94
    images_per_s: float = 240.0
    peak: tuple[float, str] = (1.05, "measured")
    """TFLOP/s of a worker, and where the figure is from."""
    seed: int = 0


def rows(shape: Shape) -> list[Row]:
    """All rows of metrics.jsonl, in the order a run writes them."""
    found = [_run_row(shape)]
    for epoch in range(shape.epochs):
        if epoch in shape.phase_starts:
            found.append(_phase_row(shape, epoch))
        first = epoch * shape.steps_per_epoch
        for step in range(first + 1, first + shape.steps_per_epoch + 1):
            if step % shape.log_every == 0:
                found.append(_train_row(shape, epoch, step))
        found.append(_eval_row(shape, epoch + 1))
    return [*found, {"event": "notice", "time": _time(shape, 0), "text": "1 image skipped"}, _end_row(shape)]


def as_before(row: Row) -> Row:
    """`row` as a run wrote it before FLOPs were counted."""
    kept = {key: value for key, value in row.items() if key not in ADDED}
    if "per_phase" in kept:
        kept["per_phase"] = [as_before(phase) for phase in kept["per_phase"]]
        for phase in kept["per_phase"]:
            del phase["peak_mem_gib"]
    return kept


def write(run_dir: Path, shape: Shape | None = None, data_root: Path | None = None) -> Path:
    """A whole run directory; with `data_root` also pictures there and predictions that show them."""
    shape = shape or Shape()
    run_dir.mkdir(parents=True, exist_ok=True)
    written = rows(shape)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    (run_dir / "summary.json").write_text(json.dumps(written[-1]))
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"recipe": "insects", "data": {"root": str(data_root or "")}}))
    environment = {
        "python": "3.11.2",
        "torch": {"version": "2.11.0", "cuda": "13.0"},
        "host": {"cpu": "2 shared cores", "gpus": ["NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3"]},
    }
    (run_dir / "environment.json").write_text(json.dumps(environment))
    if data_root is not None:
        (run_dir / "predictions.json").write_text(json.dumps(_predictions(shape, data_root)))
    return run_dir


def _live(shape: Shape, phase: int) -> list[str]:
    """The stages that train: one more, from the output down, in each phase."""
    return list(STAGES[len(STAGES) - 1 - phase :])


def _peaks(shape: Shape, phase: int) -> dict[str, float]:
    live = _live(shape, phase)
    return {stage: 1e-3 * 0.3 ** (len(STAGES) - 1 - i) if stage in live else 0.0 for i, stage in enumerate(STAGES)}


def _trainable(shape: Shape, phase: int) -> int:
    return sum(PARAMS[stage] for stage in _live(shape, phase))


def _name(phase: int) -> str:
    return "head" if phase == 0 else f"+{STAGES[len(STAGES) - 1 - phase]}"


def _phase(shape: Shape, epoch: int) -> int:
    return sum(epoch >= start for start in shape.phase_starts) - 1


def _speed(shape: Shape, phase: int, images_per_s: float) -> Row:
    """A phase's rates at so many images per second."""
    tflops = images_per_s * GFLOPS[phase] / 1e3
    share = tflops / (shape.world_size * shape.peak[0]) if shape.peak[0] else None
    return {"images_per_s": images_per_s, "tflops_per_s": tflops, "mfu": share}


def _time(shape: Shape, step: int) -> float:
    return START + 5 + step * 0.6


def _run_row(shape: Shape) -> Row:
    ends = [*shape.phase_starts[1:], shape.epochs]
    plan = [
        {
            "phase": i,
            "name": _name(i),
            "epochs": end - start,
            "stages": _peaks(shape, i),
            "trainable_params": _trainable(shape, i),
            "prefix": [stage for stage in STAGES if stage not in _live(shape, i)],
        }
        for i, (start, end) in enumerate(zip(shape.phase_starts, ends, strict=True))
    ]
    return {
        "event": "run",
        "time": START,
        "recipe": "insects",
        "strategy": shape.strategy,
        "model": "resnet18",
        "engine": "ddp",
        "world_size": shape.world_size,
        "epochs": shape.epochs,
        "steps_per_epoch": shape.steps_per_epoch,
        "total_steps": shape.epochs * shape.steps_per_epoch,
        "train_images": 244,
        "val_images": 153,
        "classes": list(shape.classes),
        "plan": plan,
        "skipped_images": 1,
    }


def _phase_row(shape: Shape, epoch: int) -> Row:
    phase, step = _phase(shape, epoch), epoch * shape.steps_per_epoch
    return {
        "event": "phase",
        "time": _time(shape, step),
        "phase": phase,
        "name": _name(phase),
        "epoch": epoch,
        "step": step,
        "trainable_params": _trainable(shape, phase),
        "gflops_per_image": GFLOPS[phase],
        "compile_s": 0.0,
        "cache_fill_s": 4.2 if phase == 0 else 0.0,
    }


def _train_row(shape: Shape, epoch: int, step: int) -> Row:
    phase = _phase(shape, epoch)
    noise = np.random.default_rng([shape.seed, step]).normal(0, 1, 3)
    total = shape.epochs * shape.steps_per_epoch
    cosine = 0.5 * (1 + math.cos(math.pi * step / total))
    peaks = _peaks(shape, phase)
    return {
        "event": "train",
        "time": _time(shape, step),
        "step": step,
        "epoch": epoch,
        "epoch_step": step - epoch * shape.steps_per_epoch,
        "phase": phase,
        "loss": 0.25 + 0.5 * math.exp(-step / 20) + 0.02 * noise[0],
        "top1": min(shape.best - 0.35 * math.exp(-step / 15) + 0.02 * noise[1], 1.0),
        "lr": {stage: peak * cosine for stage, peak in peaks.items() if peak},
        **_speed(shape, phase, shape.images_per_s * (1 - 0.12 * phase) + 4 * noise[2]),
        "data_wait_share": 0.02 + 0.01 * abs(noise[0]),
        "peak_mem_gib": 1.2 + 0.3 * phase,
        "a_key_from_the_future": [1, 2],
    }


def _eval_row(shape: Shape, epoch: int) -> Row:
    step = epoch * shape.steps_per_epoch
    top1 = [shape.best - 0.3 * math.exp(-e / 2) + 0.01 * math.sin(7 * e) for e in range(1, epoch + 1)]
    return {
        "event": "eval",
        "time": _time(shape, step) + 0.1,
        "epoch": epoch,
        "step": step,
        "phase": _phase(shape, epoch - 1),
        "val_loss": 0.3 + 0.35 * math.exp(-epoch / 3),
        "val_top1": top1[-1],
        "best_val_top1": max(top1),
        "replica_spread": 0.0,
    }


def _end_row(shape: Shape) -> Row:
    last, total = _eval_row(shape, shape.epochs), shape.epochs * shape.steps_per_epoch
    return {
        "event": "end",
        "time": _time(shape, total) + 1,
        "recipe": "insects",
        "strategy": shape.strategy,
        "model": "resnet18",
        "engine": "ddp",
        "world_size": shape.world_size,
        "seed": shape.seed,
        "epochs": shape.epochs,
        "phases": len(shape.phase_starts),
        "per_phase": [_phase_summary(shape, phase) for phase in range(len(shape.phase_starts))],
        "train_images": 244,
        "val_images": 153,
        "val_top1": last["val_top1"],
        "best_val_top1": last["best_val_top1"],
        **_speed(shape, 0, shape.images_per_s),
        "peak_flops": {"tflops": shape.peak[0], "source": shape.peak[1]},
        "data_wait_share": 0.021,
        "trainable_params": _trainable(shape, len(shape.phase_starts) - 1),
        "total_params": TOTAL_PARAMS,
        "replica_spread": 0.0,
        "peak_mem_gib": 1.8,
        "wall_s": 48.2,
        "resumed_from": None,
        "wandb_run_id": "abc123",
    }


def _phase_summary(shape: Shape, phase: int) -> Row:
    begun = _phase_row(shape, shape.phase_starts[phase])
    ends = [*shape.phase_starts[1:], shape.epochs]
    return {
        "name": begun["name"],
        "epochs": ends[phase] - shape.phase_starts[phase],
        "trainable_params": begun["trainable_params"],
        **_speed(shape, phase, shape.images_per_s * (1 - 0.12 * phase)),
        "data_wait_share": 0.021,
        "gflops_per_image": begun["gflops_per_image"],
        "peak_mem_gib": 1.2 + 0.3 * phase,
        "compile_s": begun["compile_s"],
        "cache_fill_s": begun["cache_fill_s"],
    }


def _predictions(shape: Shape, data_root: Path) -> Row:
    """A confusion matrix, and samples with their pictures: six mistakes, then six right ones."""
    size = len(shape.classes)
    confusion = [[70 if i == j else 6 if (i + j) % 3 == 1 else 0 for j in range(size)] for i in range(size)]
    samples = []
    for i in range(12):
        label = i % size
        predicted = (label + 1) % size if i < 6 else label
        path = Path("val") / str(label) / f"{i}.jpg"
        (data_root / path).parent.mkdir(parents=True, exist_ok=True)
        colours = np.random.default_rng(i).integers(40, 220, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((300, 200)).save(data_root / path)
        samples.append({"path": str(path), "label": label, "predicted": predicted, "confidence": 0.99 - 0.03 * i})
    return {"classes": list(shape.classes), "confusion_CC": confusion, "samples": samples}
