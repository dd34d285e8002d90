"""`tldist demo`: pre-train on the digits 0-4 through Ray, transfer to 5-9 under every strategy, compare."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tldist import dist
from tldist.config import STRATEGIES, LaunchConfig, RunConfig, UserError
from tldist.data.make.datasets import fetch
from tldist.recipes.demo import demo as target_recipe
from tldist.recipes.demo import demo_source
from tldist.report.run_page import write_comparison
from tldist_launcher.start.launch import launch


def demo(folder: Path) -> None:
    """Everything under `folder`, which is made anew: runs, summary.json with one row per strategy, report.html."""
    _make_anew(folder)
    root = str(fetch("digits", folder / "digits"))
    workers = min(2, dist.cores())
    print(f"1. pre-train ResNet-18 on the digits 0-4, {workers} data-parallel workers on Ray")
    source = launch(_at(demo_source(), root, folder / "source", workers))
    print("2. transfer to the digits 5-9, 20 images per class, the same budget for every strategy")
    weights = str(source / "checkpoints" / "best" / "model.safetensors")
    runs = {name: folder / name for name in STRATEGIES}
    for name, run_dir in track(runs.items(), description="strategies", transient=True):
        launch(_transfer(root, run_dir, name, weights), quiet=True)
    rows = [json.loads((run_dir / "summary.json").read_text()) for run_dir in runs.values()]
    (folder / "summary.json").write_text(json.dumps({"rows": rows}, indent=1))
    report = write_comparison(runs, folder, "Transfer from the digits 0-4 to 5-9", _intro(rows))
    _print(rows)
    print(f"{_intro(rows)}\nreport: {report}\nrun: {folder}")


def _make_anew(folder: Path) -> None:
    """An empty folder; one that holds anything but an earlier demo is left alone."""
    mark = folder / ".tldist-demo"
    try:
        if mark.exists():
            shutil.rmtree(folder)
        elif folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} holds something else than a demo: choose another --run-dir")
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --run-dir") from error


def _at(settings: RunConfig, root: str, run_dir: Path, workers: int) -> RunConfig:
    return replace(
        settings,
        run_dir=str(run_dir),
        data=replace(settings.data, root=root),
        launch=LaunchConfig(workers=workers, kind="ray" if workers > 1 else "local"),
    )


def _transfer(root: str, run_dir: Path, strategy: Any, weights: str) -> RunConfig:
    base = _at(target_recipe(), root, run_dir, 1)
    return replace(base, strategy=replace(base.strategy, name=strategy), model=replace(base.model, weights=weights))


def _intro(rows: list[dict[str, Any]]) -> str:
    """What transfer gained, as measured; nothing is promised for a set this small."""
    by_name = {row["strategy"]: row for row in rows}
    scratch = by_name.pop("scratch")
    best = max(by_name.values(), key=lambda row: row["val_top1"])
    gain = 100 * (best["val_top1"] - scratch["val_top1"])
    return (
        f"From 20 images per class, scratch reached {scratch['val_top1']:.3f} top-1 and {best['strategy']} "
        f"{best['val_top1']:.3f} ({gain:+.1f} points), {best['val_images']} validation images, one seed, last epoch."
    )


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(title="digits 5-9 from 20 images per class, ResNet-18")
    for column in ("strategy", "top-1", "images/s", "trainable", "total", "seconds"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for row in rows:
        table.add_row(
            row["strategy"],
            f"{row['val_top1']:.3f}",
            f"{row['images_per_s']:,.0f}",
            f"{row['trainable_params']:,}",
            f"{row['total_params']:,}",
            f"{row['wall_s']:.1f}",
        )
    Console().print(table)
