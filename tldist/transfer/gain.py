"""Does transfer help here? Fine-tuned against scratch: the same budget, paired seeds, an interval, a verdict.

The lecture (10.2) asks to validate that transfer helps; a difference of two runs does not, because another seed, and
other validation images, would give another one. The interval takes both into account.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import stats

from tldist.config import RunConfig, UserError

Arm = Literal["fine-tuned", "scratch"]
ARMS: tuple[Arm, ...] = ("fine-tuned", "scratch")


@dataclass(frozen=True)
class Gain:
    """What transfer gained in top-1; all numbers are shares of 1."""

    mean: float
    low: float
    high: float
    confidence: float
    seeds_error: float
    """Standard error of the mean from the choice of seeds, and from the choice of validation images."""
    images_error: float

    @property
    def verdict(self) -> str:
        """helps, hurts, or no difference: the interval lies above 0, below it, or holds it."""
        if self.low > 0:
            return "helps"
        return "hurts" if self.high < 0 else "no difference"


def gain(tuned_SN: np.ndarray, scratch_SN: np.ndarray, confidence: float = 0.95) -> Gain:
    """From what was right (1) and wrong (0) in each run: rows are seeds, in pairs; columns validation images.

    Seeds and images are crossed random effects: Var = s_seeds^2 / S + s_images^2 / N, where s_seeds is the deviation of
    the seeds' mean differences and s_images that of the images'. What both share is counted twice, so the interval is
    rather too wide (Owen, 2007, on the same sum in the bootstrap). Degrees of freedom by Satterthwaite (1946).
    """
    difference_SN = tuned_SN.astype(np.float64) - scratch_SN.astype(np.float64)
    seeds, images = difference_SN.shape
    of_seeds = difference_SN.mean(axis=1).var(ddof=1) / seeds
    of_images = difference_SN.mean(axis=0).var(ddof=1) / images
    variance, mean = of_seeds + of_images, float(difference_SN.mean())
    errors = float(of_seeds**0.5), float(of_images**0.5)
    if variance == 0:
        return Gain(mean, mean, mean, confidence, *errors)
    freedom = variance**2 / (of_seeds**2 / (seeds - 1) + of_images**2 / (images - 1))
    low, high = stats.t.interval(confidence, freedom, loc=mean, scale=variance**0.5)
    return Gain(mean, float(low), float(high), confidence, *errors)


def arm(settings: RunConfig, name: Arm, seed: int, folder: Path, scratch_lr: float = 0.0) -> RunConfig:
    """One of the runs: as configured, or the same from random weights at one rate."""
    made = replace(settings, seed=seed, run_dir=str(folder / f"{name}-seed{seed}"))
    if name == "fine-tuned":
        return made
    optim = replace(made.optim, l2_sp=0.0, ewc=0.0, ewc_from=(), base_lr=scratch_lr or made.optim.base_lr)
    strategy, model = replace(made.strategy, name="scratch"), replace(made.model, weights="none")
    # Random weights have no statistics to keep.
    train = replace(made.train, batchnorm="train") if made.train.batchnorm == "eval" else made.train
    return replace(made, strategy=strategy, optim=optim, model=model, train=train)


def check(settings: RunConfig, seeds: int) -> None:
    """Raises UserError where there is nothing to compare."""
    if settings.strategy.name == "scratch" or settings.model.weights == "none":
        raise UserError("transfer-gain compares with scratch, and this run starts from it: give --model.weights")
    if seeds < 2:
        raise UserError(f"--seeds is {seeds}: two at least, or there is no telling what is chance")


def sentence(found: Gain, seeds: int, images: int) -> str:
    """The verdict, and what it rests on."""
    verdict = {
        "helps": "Transfer helps",
        "hurts": "Transfer hurts",
        "no difference": "No difference was found",
    }[found.verdict]
    points = f"{100 * found.mean:+.1f} points of top-1 (between {100 * found.low:+.1f} and {100 * found.high:+.1f}"
    return f"{verdict}: {points} with {found.confidence:.0%} confidence; {seeds} seeds, {images} validation images)."


def pairs(right: dict[tuple[Arm, int], np.ndarray], seeds: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """What each run got right -> (tuned_SN, scratch_SN)."""
    tuned, scratch = (np.stack([right[name, seed] for seed in seeds]) for name in ARMS)
    return tuned, scratch
