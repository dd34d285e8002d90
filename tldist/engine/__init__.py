"""Engines: how the live suffix is replicated and stepped."""

from __future__ import annotations

from collections.abc import Callable

from tldist import dist
from tldist.config import EngineConfig, OptimConfig
from tldist.engine.base import Engine, Numerics, numerics
from tldist.engine.ddp import DDPEngine
from tldist.engine.single import SingleEngine
from tldist.objectives.base import Objective
from tldist.optim import OptimizerState
from tldist.plans import Phase

ENGINES: dict[str, Callable[..., Engine]] = {"single": SingleEngine, "ddp": DDPEngine}
ZERO_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}

__all__ = ["ENGINES", "Engine", "Numerics", "build_engine", "compiles", "engine_kind", "numerics"]


def engine_kind(config: EngineConfig, world_size: int) -> str:
    """The kind that `auto` stands for."""
    if config.kind != "auto":
        return config.kind
    return "ddp" if world_size > 1 else "single"


def compiles(config: EngineConfig) -> bool:
    """Can what trains be compiled under it? ZeRO-3's hooks gather weights between the layers."""
    return config.kind != "zero3"


def build_engine(
    config: EngineConfig,
    objective: Objective,
    phase: Phase,
    optim: OptimConfig,
    numbers: Numerics,
    state: OptimizerState,
) -> Engine:
    """The configured engine around one phase's objective, with the optimizer's `state` so far."""
    kind = engine_kind(config, dist.world_size())
    if kind in ENGINES:
        return ENGINES[kind](objective, phase, optim, numbers, state)
    from tldist.engine.zero import ZeroEngine  # imports DeepSpeed when it is built

    return ZeroEngine(
        objective, phase, optim, numbers, state, stage=ZERO_STAGES[kind], offload=config.offload != "none"
    )
