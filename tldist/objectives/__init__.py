"""What a strategy minimises; `plans.py` says what it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tldist.config import StrategyConfig
from tldist.models.backbones import Segment
from tldist.objectives.anchor import AnchorPenalty
from tldist.objectives.base import Objective
from tldist.objectives.domains import DANN, MMD, discriminator
from tldist.objectives.supervised import Supervised


@dataclass(frozen=True)
class Ingredients:
    """What objectives are made of."""

    network: Segment
    strategy: StrategyConfig
    label_smoothing: float
    penalty: AnchorPenalty | None
    seed: int
    """Initialises an objective's own parameters, the same on all workers."""
    width: Callable[[str], int]
    """Features of a stage's output, by its name."""

    @property
    def aligned_stage(self) -> str:
        """Where MMD and DANN compare the domains: what the head sees, unless another stage is named."""
        return self.strategy.align_at or list(self.network.stages)[-2]


def build_objective(given: Ingredients) -> Objective:
    """The strategy's objective: cross-entropy, unless it has another."""
    return _OBJECTIVES.get(given.strategy.name, _supervised)(given)


def _supervised(given: Ingredients) -> Objective:
    return Supervised(given.network, given.label_smoothing, given.penalty)


def _mmd(given: Ingredients) -> Objective:
    stage, weight = given.aligned_stage, given.strategy.align_weight
    return MMD(given.network, given.label_smoothing, given.penalty, stage, weight)


def _dann(given: Ingredients) -> Objective:
    stage, weight = given.aligned_stage, given.strategy.align_weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(given.seed)
        learned = discriminator(given.width(stage), given.strategy.discriminator_units)
    return DANN(given.network, given.label_smoothing, given.penalty, stage, weight, learned)


_OBJECTIVES: dict[str, Callable[[Ingredients], Objective]] = {"mmd": _mmd, "dann": _dann}
