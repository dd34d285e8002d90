"""The learning-rate range test (Smith, 2017): the rate rises exponentially, and the loss says which one to train with.

The steps are those of the plan's first phase, through the pieces that train it. The suggestion is the middle of the
decade of rates over which the loss falls fastest ("steep" in fastai, the default in Lightning), by the slope of a
straight line through that decade's raw losses. fastai's default, the middle of the longest valley, was tried and
left: the flat start, where the rate is too small to matter, counts as valley. On ants and bees (three seeds, feature
extraction) it moved from 0.015-0.024 to 0.034-0.089 when the same curve was cut at 1e-3 instead of 1e-6; the steepest
decade stayed where it was.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tldist import dist
from tldist.checkpoints.checkpoint import TrainState
from tldist.config import CacheConfig, EngineConfig, LaunchConfig, RunConfig, UserError
from tldist.tracking.events import EventLog
from tldist.train import worker
from tldist.train.fit import train_step
from tldist.train.phase import begin_phase
from tldist.train.run import Run

LEAST_STEPS = 20
"""Fewer losses show no slope."""
DIVERGED = 4.0
"""The test ends when the smoothed loss is this many times its best (fastai and Lightning use the same)."""


@dataclass(frozen=True)
class Sweep:
    """The rates to try, lowest to highest, one a step."""

    steps: int = 100
    lowest: float = 1e-6
    highest: float = 10.0

    def validate(self) -> None:
        """Raises UserError."""
        if self.steps < LEAST_STEPS:
            raise UserError(f"--steps is {self.steps}: give at least {LEAST_STEPS}, or the curve shows nothing")
        if not 0 < self.lowest < self.highest < math.inf:
            raise UserError(
                f"--lowest {self.lowest:g} and --highest {self.highest:g}: give two rates above 0, the lower one first"
            )

    @property
    def rates(self) -> list[float]:
        """Equal steps on a logarithmic axis."""
        return np.geomspace(self.lowest, self.highest, self.steps).tolist()

    @property
    def spacing(self) -> float:
        """Decades from one rate to the next."""
        return math.log10(self.highest / self.lowest) / (self.steps - 1)

    @property
    def decade(self) -> int:
        """Steps that a slope is taken over: a decade's, or, where the whole sweep is narrow, a third of it."""
        return min(max(round(1 / self.spacing), 4), self.steps // 3)

    @property
    def memory(self) -> float:
        """The smoothing's decay: averages reach over a twentieth of the sweep, however many steps it has."""
        return max(0.0, 1 - 20 / self.steps)


@dataclass(frozen=True)
class Curve:
    """The loss of each step that was made, and the rate it was made at; shorter than the sweep where it diverged."""

    sweep: Sweep
    losses: tuple[float, ...]

    @property
    def rates(self) -> tuple[float, ...]:
        """One for each loss."""
        return tuple(self.sweep.rates[: len(self.losses)])

    @property
    def is_cut(self) -> bool:
        """Did it diverge before the highest rate?"""
        return len(self.losses) < self.sweep.steps or not math.isfinite(self.losses[-1])


@dataclass(frozen=True)
class Finding:
    """What a curve says; `remark` is what to know or to do about it, in a sentence."""

    suggestion: float | None
    """The rate to train with, to two figures; None where the curve shows none."""
    diverges_from: float | None
    """The rate from which the smoothed loss never came back to within a quarter of its fall; None: it did not rise."""
    remark: str = ""


def trial(settings: RunConfig, run_dir: str) -> RunConfig:
    """The run on one worker, with nothing that pays only over a whole run: no compiling, no cache, no average.

    A pass shows as many images as on one of several workers, so that BatchNorm and memory are as they will be.
    """
    parts = settings.train.accumulate * settings.launch.most
    train = dataclasses.replace(settings.train, accumulate=parts, compile="off", ema=0.0)
    return dataclasses.replace(
        settings, run_dir=run_dir, train=train, cache=CacheConfig(), engine=EngineConfig(), launch=LaunchConfig()
    )


def measure(settings: RunConfig, sweep: Sweep, progress: Callable[[Iterable[float]], Iterable[float]] = iter) -> Curve:
    """Train through the sweep. The run directory must exist; only the index is written there.

    `progress` wraps the rates to show how far it is.
    """
    device = dist.local_device()
    with worker.process_settings(device):
        torch.set_num_threads(dist.cores())
        parts = worker.build(settings, device, EventLog(None))
        try:
            return Curve(sweep, tuple(_climb(parts, sweep, progress(sweep.rates))))
        finally:
            parts.close_loaders()
            parts.saver.close()


def _climb(parts: Run, sweep: Sweep, rates: Iterable[float]) -> list[float]:
    """A step at each rate, epoch after epoch, until they are done or the loss is lost."""
    live = begin_phase(parts, 0, TrainState())
    live.train_mode(parts.config.train.batchnorm)
    batches = itertools.chain.from_iterable(live.inputs.train(epoch) for epoch in itertools.count())
    losses: list[float] = []
    for step, (rate, batch) in enumerate(zip(rates, batches, strict=False)):
        train_step(parts, live, step, batch, rate / parts.config.optim.base_lr)
        loss = live.meter.drain().loss
        losses.append(math.nan if loss is None else loss)
        if is_lost(losses, sweep.memory):
            break
    live.engine.close()
    live.inputs.close()
    return losses


def is_lost(losses: Sequence[float], memory: float) -> bool:
    """Is the smoothed loss infinite, or several times its best and above the one it began with?

    The latter, because four times a best of 0.01 is still a good loss.
    """
    if not math.isfinite(losses[-1]):
        return True
    smoothed = averaged(losses, memory)
    return smoothed[-1] > max(DIVERGED * smoothed.min(), smoothed[0])


def averaged(losses: Sequence[float], memory: float) -> np.ndarray:
    """The exponential average up to each step, corrected for its start at zero (Kingma and Ba, 2015)."""
    average, found = 0.0, []
    for step, loss in enumerate(losses, start=1):
        average = memory * average + (1 - memory) * loss
        found.append(average / (1 - memory**step))
    return np.array(found)


def smoothed(curve: Curve) -> np.ndarray:
    """The exponential average to both sides: one over the steps before alone lags behind the rate.

    Losses count up to one and a half times the first ones: how far above a diverging one shoots would colour the
    steps before it.
    """
    losses, memory = _readable(curve), curve.sweep.memory
    weights = (1 - memory ** np.arange(1, len(losses) + 1)) / (1 - memory)
    before = averaged(losses.tolist(), memory) * weights
    after = (averaged(losses[::-1].tolist(), memory) * weights)[::-1]
    return (before + after - losses) / (weights + weights[::-1] - 1)


def _readable(curve: Curve) -> np.ndarray:
    losses = np.array(curve.losses)
    ceiling = 1.5 * _first(losses)
    return np.where(np.isfinite(losses), np.minimum(losses, ceiling), ceiling)


def _first(losses: np.ndarray) -> float:
    """The loss before anything was learnt: the mean of the first steps."""
    first = losses[: max(3, len(losses) // 10)]
    return float(first[np.isfinite(first)].mean()) if np.isfinite(first).any() else 1.0


def read_curve(curve: Curve) -> Finding:
    """The suggestion, or in words why there is none."""
    lowest, highest = f"{curve.rates[0]:g}", f"{curve.rates[-1]:g}"
    if len(curve.losses) <= curve.sweep.decade:
        return Finding(None, curve.rates[0], f"the loss diverged at once: lower --lowest (it is {lowest})")
    smooth, first = smoothed(curve), _first(np.array(curve.losses))
    fall = first - float(smooth.min())
    if fall <= max(2 * _noise(curve), 0.02 * first):
        if curve.is_cut or float(smooth[-1]) > 1.2 * first:
            return Finding(None, curve.rates[0], f"the loss rose without having fallen: lower --lowest ({lowest})")
        return Finding(None, None, f"no rate up to {highest} lowered the loss by more than its noise: raise --highest")
    turn = int(np.flatnonzero(smooth <= smooth.min() + fall / 4)[-1])
    diverges_from = curve.rates[turn] if turn < len(smooth) - 1 else None
    arrival = int(np.flatnonzero(smooth <= smooth.min() + fall / 10)[0])
    return _steepest(curve, arrival, turn, diverges_from)


def _noise(curve: Curve) -> float:
    """How much a step's loss differs from its neighbours' by chance, where the rate is low."""
    early = _readable(curve)[: max(10, len(curve.losses) // 2)]
    return float(np.diff(early).std() / math.sqrt(2))


def _steepest(curve: Curve, arrival: int, turn: int, diverges_from: float | None) -> Finding:
    """The middle of the decade that falls fastest, before nine tenths of the fall are done (`arrival`).

    At the bottom losses are noisy, and some ten of them always seem to fall.
    """
    width = curve.sweep.decade
    slopes = decade_slopes(curve, turn)[: max(arrival - width // 2 + 1, 0)]
    start = int(slopes.argmin()) if len(slopes) else 0
    if start == 0:
        remark = f"the loss fell fastest at the lowest rates: lower --lowest (it is {curve.rates[0]:g})"
        return Finding(None, diverges_from, remark)
    if diverges_from is None and start + width == turn:
        remark = f"the loss was falling fastest at the highest rate: raise --highest (it is {curve.rates[-1]:g})"
        return Finding(None, None, remark)
    middle = math.sqrt(curve.rates[start] * curve.rates[start + width])
    remark = (
        "" if diverges_from else f"the loss did not diverge up to {curve.rates[-1]:g}: a higher rate may do as well"
    )
    return Finding(float(f"{middle:.2g}"), diverges_from, remark)


def decade_slopes(curve: Curve, turn: int) -> np.ndarray:
    """The slope of the loss, per decade of rates, over each decade that ends at step `turn` or before."""
    width, losses = curve.sweep.decade, _readable(curve)[: turn + 1]
    if len(losses) <= width:
        return np.zeros(0)
    places = (np.arange(width + 1) - width / 2) * curve.sweep.spacing
    return np.lib.stride_tricks.sliding_window_view(losses, width + 1) @ places / (places @ places)
