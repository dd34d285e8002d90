"""A made-up study directory: what three strategies with some seeds left behind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import synthetic_run
from synthetic_run import Shape

ARMS = {"feature_extraction": (0.80, 420.0), "partial": (0.90, 300.0), "full": (0.91, 180.0)}
"""Best top-1 and images/s."""


def write(
    folder: Path,
    seeds: Sequence[int] = (0, 1, 2),
    arms: Mapping[str, tuple[float, float]] = ARMS,
    axes: Mapping[str, list[str]] | None = None,
    stage: str = "grid",
) -> Path:
    """The study's directory; arms are labels joined by '/', one for each axis."""
    axes = axes or {"strategy.name": list(arms)}
    folder.mkdir(parents=True)
    told = {"name": "made-up", "title": "Which <strategy>?", "recipe": "insects", "metric": "val_top1"}
    told |= {"is_search": stage == "search", "axes": axes, "seeds": list(seeds)}  # type: ignore[dict-item]
    (folder / "study.json").write_text(json.dumps(told))
    for place, (arm, (best, images_per_s)) in enumerate(arms.items()):
        for seed in seeds:
            run_dir = folder / "trials" / f"{arm.replace('/', '-')}-seed={seed}"
            # Most of the luck is the seed's, and the same for all arms.
            luck = 0.01 * ((seed * 7) % 5 - 2) + 0.002 * ((3 * seed + 2 * place) % 4)
            shape = Shape(strategy=arm, phase_starts=(0,), best=best + luck, images_per_s=images_per_s, seed=seed)
            synthetic_run.write(run_dir, shape)
            choices = dict(zip(axes, arm.split("/"), strict=True))
            trial = {"choices": choices, "exact": choices, "seed": seed, "stage": stage, "cores": 2.0, "gpus": 0.0}
            (run_dir / "trial.json").write_text(json.dumps(trial))
    return folder
