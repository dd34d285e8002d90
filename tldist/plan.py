"""Phase and Plan: which stages train, when, and at what share of the base rate. Pure data, printable without a GPU.

Every strategy of the lecture is one small function from the stage names to a list of phases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tldist.config import StrategyConfig, UserError


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs over which the same stages train."""

    name: str
    epochs: int
    multiples: tuple[tuple[str, float], ...]
    """(trainable stage, learning rate as a multiple of the base rate), in network order; the others are frozen."""
    span: Literal["phase", "plan"] = "phase"
    """Does the schedule run over this phase, or over the whole plan?"""

    @property
    def trainable(self) -> tuple[str, ...]:
        """The stages that train."""
        return tuple(stage for stage, _ in self.multiples)

    def multiple(self, stage: str) -> float:
        """The stage's learning-rate multiple; 0.0 when frozen."""
        return dict(self.multiples).get(stage, 0.0)


@dataclass(frozen=True)
class Plan:
    """The phases in order, over the named stages of one model."""

    stages: tuple[str, ...]
    phases: tuple[Phase, ...]
    pretrained: bool = True
    """Does it start from the configured weights?"""

    @property
    def epochs(self) -> int:
        """Epochs over all phases."""
        return sum(phase.epochs for phase in self.phases)

    def first_epoch(self, index: int) -> int:
        """The epoch (from 0) at which phase `index` starts."""
        return sum(phase.epochs for phase in self.phases[:index])

    def cut(self, index: int) -> int:
        """Where phase `index` cuts the model: the position of its first trainable stage."""
        return min(self.stages.index(stage) for stage in self.phases[index].trainable)


def build_plan(config: StrategyConfig, stages: Sequence[str], epochs: int) -> Plan:
    """The plan of a strategy over `stages` (input to output, head last). Raises UserError if it cannot fit."""
    stages = tuple(stages)
    phases = tuple(_BUILDERS[config.name](config, stages, epochs))
    return Plan(stages, phases, pretrained=config.name not in _WITHOUT_WEIGHTS)


def _tail(
    config: StrategyConfig, stages: Sequence[str], count: int, factor: float = 1.0
) -> tuple[tuple[str, float], ...]:
    """The last `count` stages: pre-trained ones at `backbone_lr`, the head at 1, all times `factor`."""
    tail = stages[len(stages) - count :]
    return tuple((stage, factor * (config.backbone_lr if stage != stages[-1] else 1.0)) for stage in tail)


def _scratch(config: StrategyConfig, stages: Sequence[str], epochs: int) -> list[Phase]:
    return [Phase("scratch", epochs, tuple((stage, 1.0) for stage in stages))]


def _feature_extraction(config: StrategyConfig, stages: Sequence[str], epochs: int) -> list[Phase]:
    """Lecture 3.1: only the head."""
    return [Phase("head", epochs, _tail(config, stages, 1))]


def _partial(config: StrategyConfig, stages: Sequence[str], epochs: int) -> list[Phase]:
    """Lecture 4.2: the last stages."""
    count = _trainable_count(config, stages)
    return [Phase(f"last {count}", epochs, _tail(config, stages, count))]


def _full(config: StrategyConfig, stages: Sequence[str], epochs: int) -> list[Phase]:
    """Lecture 4.1: all stages."""
    return [Phase("all", epochs, _tail(config, stages, len(stages)))]


def _discriminative(config: StrategyConfig, stages: Sequence[str], epochs: int) -> list[Phase]:
    """Lecture 5.1, with its operator order mended: lr_l = lr_base * decay^(L-1-l), l = 0 at the input."""
    top = len(stages) - 1
    multiples = tuple((stage, config.decay ** (top - depth)) for depth, stage in enumerate(stages))
    return [Phase("all, decayed", epochs, multiples)]


def _two_phase(config: StrategyConfig, stages: Sequence[str], epochs: int) -> list[Phase]:
    """Lecture 8.1: the last stages, then everything at a lower rate, from the last weights of the first phase."""
    if epochs < 2:
        raise UserError(f"two_phase needs at least 2 epochs, not {epochs}: raise --train.epochs")
    count = _trainable_count(config, stages)
    first = min(max(round(epochs * config.first_phase), 1), epochs - 1)
    return [
        Phase(f"last {count}", first, _tail(config, stages, count)),
        Phase("all", epochs - first, _tail(config, stages, len(stages), config.second_phase_lr)),
    ]


def _gradual(config: StrategyConfig, stages: Sequence[str], epochs: int) -> list[Phase]:
    """Lecture 4.3 and ULMFiT (Howard and Ruder, 2018): the head, then one stage more every N epochs, top down.

    One schedule runs over the whole plan; the last phase takes the epochs that are left.
    """
    every = config.epochs_per_stage
    count = min(len(stages), max(1, epochs // every))
    lengths = [every] * (count - 1)
    lengths.append(epochs - sum(lengths))
    names = [stages[-1], *(f"+{stage}" for stage in reversed(stages[:-1]))]
    return [Phase(names[i], length, _tail(config, stages, i + 1), span="plan") for i, length in enumerate(lengths)]


def _trainable_count(config: StrategyConfig, stages: Sequence[str]) -> int:
    if config.trainable_stages > len(stages):
        raise UserError(
            f"--strategy.trainable-stages is {config.trainable_stages}, but the model has {len(stages)} stages "
            f"({', '.join(stages)}): give at most {len(stages)}"
        )
    return config.trainable_stages


_WITHOUT_WEIGHTS = frozenset({"scratch"})
_BUILDERS: dict[str, Callable[[StrategyConfig, Sequence[str], int], list[Phase]]] = {
    "scratch": _scratch,
    "feature_extraction": _feature_extraction,
    "partial": _partial,
    "full": _full,
    "discriminative": _discriminative,
    "two_phase": _two_phase,
    "gradual": _gradual,
}
