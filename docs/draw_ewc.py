"""Draw docs/images/ewc.png and print its table: what is left of the digits 0-4 after 5-9 were learnt.

    python docs/draw_ewc.py RUNS_FOLDER [SEEDS]

ResNet-18 learns 0-4 from scratch; from there all of it is trained on 5-9 (60 images per class), freely, under L2-SP and
under EWC, at several strengths, with BatchNorm's statistics kept. Each task has its own head: 0-4 are counted with
theirs on the new trunk. Runs that are there already are not repeated.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from tldist import dist
from tldist.config import OptimConfig, RunConfig
from tldist.data.make.datasets import fetch
from tldist.objectives.ewc import FISHER_FILE, checkpoint_at
from tldist.recipes.demo import TARGET_CLASSES, demo_source
from tldist.transfer import forgetting
from tldist_launcher.commands.forgetting import fisher_command
from tldist_launcher.commands.transfer import at_its_end

STRENGTHS: dict[str, tuple[float, ...]] = {
    "free": (0.0,),
    "ewc": (1e4, 1e5, 1e6, 1e7),
    "l2_sp": (0.1, 1.0, 10.0),
}


def main(folder: Path, seeds: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    root = fetch("digits", folder / "digits")
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        base = replace(demo_source(), seed=seed, data=replace(demo_source().data, root=str(root)))
        source = at_its_end(replace(base, run_dir=str(folder / f"source-{seed}")))
        if not (checkpoint_at(source) / FISHER_FILE).exists():
            fisher_command([str(source), "--images", "300"])
        for method, strengths in STRENGTHS.items():
            for strength in strengths:
                run_dir = at_its_end(target(base, source, method, strength, folder / f"{method}-{strength:g}-{seed}"))
                rows.append({"method": method, "strength": strength, "seed": seed, **measured(run_dir, source)})
                print(rows[-1], flush=True)
        moving = target(base, source, "ewc", 1e6, folder / f"moving-{seed}")
        moving = replace(moving, train=replace(moving.train, batchnorm="train"))
        run_dir = at_its_end(moving)
        rows.append({"method": "ewc, statistics move", "strength": 1e6, "seed": seed, **measured(run_dir, source)})
        print(rows[-1], flush=True)
        (folder / "rows.json").write_text(json.dumps(rows, indent=1))
        draw(rows, Path(__file__).parent / "images" / "ewc.png")


def target(base: RunConfig, source: Path, method: str, strength: float, run_dir: Path) -> RunConfig:
    """5-9 from the source's weights, all of the network at one rate."""
    tasks = (str(source),) if method == "ewc" else ()
    held = {} if method == "free" else {method: strength}
    return replace(
        base,
        recipe="digits",
        run_dir=str(run_dir),
        strategy=replace(base.strategy, name="full", backbone_lr=1.0),
        model=replace(base.model, weights=str(source)),
        data=replace(base.data, classes=TARGET_CLASSES, train_images_per_class=60),
        optim=OptimConfig(base_lr=1e-3, ewc_from=tasks, **held),
        train=replace(base.train, batchnorm="eval"),
    )


def measured(run_dir: Path, source: Path) -> dict[str, float]:
    """Top-1 of 5-9 at the end, and of 0-4 then and now."""
    last = run_dir / "checkpoints" / "last"
    kept = forgetting.kept(last, source, dist.local_device())
    new = json.loads((run_dir / "summary.json").read_text())["val_top1"]
    return {"new": new, "then": kept.then, "now": kept.now}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel for each method: both tasks over the strength; dashed: nothing held."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    colours = {"now": "#c44e52", "new": "#4c72b0"}
    names = {"now": "0-4, learnt before", "new": "5-9, learnt now"}
    for axis, (method, title) in zip(axes, (("l2_sp", "L2-SP"), ("ewc", "EWC")), strict=True):
        for key, colour in colours.items():
            points = {
                s: [r[key] for r in rows if (r["method"], r["strength"]) == (method, s)] for s in STRENGTHS[method]
            }
            free = [r[key] for r in rows if r["method"] == "free"]
            axis.axhline(sum(free) / len(free), color=colour, linestyle="--", linewidth=1)
            axis.plot(list(points), [sum(p) / len(p) for p in points.values()], color=colour, label=names[key])
            for strength, values in points.items():
                axis.plot([strength] * len(values), values, ".", color=colour)
        axis.set(xscale="log", title=title, xlabel="strength (lambda)", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("top-1 on validation")
    axes[1].legend(loc="lower right", frameon=False)
    figure.suptitle("After learning 5-9; dashed: nothing held", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), int(sys.argv[2]) if len(sys.argv) > 2 else 3)
