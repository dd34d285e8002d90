"""Phase and Plan: which stages train, when, and at what share of the base rate. Pure data, printable without a GPU.

Every strategy of the lecture is one small function from the stage names to a list of phases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from tldist.config import StrategyConfig, UserError, nearest


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs over which the same stages train."""

    name: str
    epochs: int
    """Its length; with `patience`, its greatest length."""
    multiples: tuple[tuple[str, float], ...]
    """(what trains, its learning rate as a multiple of the base rate), in network order: whole stages, or, where
    only a part of a stage trains, single parameters by name. Everything else is frozen."""
    span: Literal["phase", "plan"] = "phase"
    """Does the schedule run over this phase, or over the whole plan?"""
    patience: int = 0
    """End it after this many epochs without improvement on validation; 0: it lasts its epochs."""
    start: Literal["last", "best"] = "last"
    """Begin with the weights as they are, or with the best so far."""
    optimizer_state: Literal["carry", "reset"] = "carry"
    """Begin with the optimizer's state of the phases before, or without any."""
    own_multiple: float = 1.0
    """The multiple of what the objective itself trains (a discriminator)."""

    @property
    def stages(self) -> dict[str, float]:
        """The stages in which something trains, in network order, and each one's highest multiple."""
        found: dict[str, float] = {}
        for name, multiple in self.multiples:
            stage = name.split(".", 1)[0]
            found[stage] = max(multiple, found.get(stage, 0.0))
        return found

    def multiple(self, parameter: str) -> float:
        """The learning-rate multiple of a parameter (its name begins with its stage); 0.0 when frozen."""
        if parameter.startswith("objective."):
            return self.own_multiple
        table = dict(self.multiples)
        return table.get(parameter, table.get(parameter.split(".", 1)[0], 0.0))


@dataclass(frozen=True)
class Plan:
    """The phases in order, over the named stages of one model."""

    stages: tuple[str, ...]
    phases: tuple[Phase, ...]
    epochs: int
    """Epochs over all phases."""
    pretrained: bool = True
    """Does it start from the configured weights?"""

    def first_epoch(self, index: int) -> int:
        """The epoch (from 0) at which phase `index` starts, if no phase ends early."""
        return sum(phase.epochs for phase in self.phases[:index])

    def cut(self, index: int) -> int:
        """Where phase `index` cuts the model: the position of its first trainable stage."""
        return min(self.stages.index(stage) for stage in self.phases[index].stages)


def build_plan(
    config: StrategyConfig, stages: Sequence[str], epochs: int, parameters: Mapping[str, bool] | None = None
) -> Plan:
    """The plan of a strategy over `stages` (input to output, head last).

    `parameters`: the model's parameter names, and whether a normalisation layer owns each; only by_hand needs them.
    Raises UserError if the plan cannot fit.
    """
    stages = tuple(stages)
    if config.name == "by_hand":
        phases = _by_hand(config, epochs, parameters or {})
    else:
        phases = _BUILDERS[config.name](config, stages, epochs)
    phases = [replace(phase, optimizer_state=config.optimizer_state) for phase in phases]
    return Plan(stages, tuple(phases), epochs, pretrained=config.name not in _WITHOUT_WEIGHTS)


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


def _two_domains(config: StrategyConfig, stages: Sequence[str], epochs: int) -> list[Phase]:
    """Lecture 6: all stages; what makes the domains alike is the objective's."""
    if config.align_at and config.align_at not in stages:
        known = f"{nearest(config.align_at, stages)}: choose from {', '.join(stages)}"
        raise UserError(f"--strategy.align-at: the model has no stage '{config.align_at}'{known}")
    everything = _tail(config, stages, len(stages))
    return [Phase(config.name, epochs, everything, own_multiple=config.discriminator_lr)]


def _discriminative(config: StrategyConfig, stages: Sequence[str], epochs: int) -> list[Phase]:
    """Lecture 5.1, with its operator order mended: lr_l = lr_base * decay^(L-1-l), l = 0 at the input."""
    top = len(stages) - 1
    multiples = tuple((stage, config.decay ** (top - depth)) for depth, stage in enumerate(stages))
    return [Phase("all, decayed", epochs, multiples)]


def _two_phase(config: StrategyConfig, stages: Sequence[str], epochs: int) -> list[Phase]:
    """Lecture 8.1: the last stages, then everything at a lower rate, from the first phase's last or best weights."""
    return _then_all(config, stages, epochs, _trainable_count(config, stages))


def _lp_ft(config: StrategyConfig, stages: Sequence[str], epochs: int) -> list[Phase]:
    """LP-FT (Kumar et al., 2022): the head alone, then everything, so that a random head distorts no features."""
    return _then_all(config, stages, epochs, 1)


def _then_all(config: StrategyConfig, stages: Sequence[str], epochs: int, count: int) -> list[Phase]:
    if epochs < 2:
        raise UserError(f"{config.name} needs at least 2 epochs, not {epochs}: raise --train.epochs")
    first = min(max(round(epochs * config.first_phase), 1), epochs - 1)
    everything = _tail(config, stages, len(stages), config.second_phase_lr)
    return [
        Phase(f"last {count}" if count > 1 else stages[-1], first, _tail(config, stages, count)),
        Phase("all", epochs - first, everything, start=config.second_phase_from),
    ]


def _gradual(config: StrategyConfig, stages: Sequence[str], epochs: int) -> list[Phase]:
    """Lecture 4.3 and ULMFiT (Howard and Ruder, 2018): the head, then one stage more, top down, every N epochs or
    whenever validation stands still.

    One schedule runs over the whole plan; the last phase takes the epochs that are left.
    """
    names = [stages[-1], *(f"+{stage}" for stage in reversed(stages[:-1]))]
    if config.unfreeze == "plateau":
        patience = [config.patience] * (len(stages) - 1) + [0]
        lengths = [epochs] * len(stages)
    else:
        every = config.epochs_per_stage
        count = min(len(stages), max(1, epochs // every))
        patience = [0] * count
        lengths = [every] * (count - 1)
        lengths.append(epochs - sum(lengths))
    return [
        Phase(names[i], lengths[i], _tail(config, stages, i + 1), span="plan", patience=patience[i])
        for i in range(len(lengths))
    ]


def _by_hand(config: StrategyConfig, epochs: int, parameters: Mapping[str, bool]) -> list[Phase]:
    """Plans that a person wrote: ordered rules per phase, first match wins, every parameter covered.

    The rules are those of big_vision's optimizer, applied to freezing as well; what trains need not be a tail
    (surgical fine-tuning, Lee et al., 2023; BatchNorm alone, Frankle et al., 2021).
    """
    if not config.phases:
        raise UserError("by_hand needs a plan: give --strategy.phases 'head=1, *=frozen', one text for each phase")
    texts = [_phase_text(text) for text in config.phases]
    lengths = _lengths([length for length, _ in texts], epochs)
    return [
        Phase(" ".join(rules.split()), length, _resolve(_rules(rules), parameters))
        for length, (_, rules) in zip(lengths, texts, strict=True)
    ]


def _phase_text(text: str) -> tuple[int | None, str]:
    """'5: head=1, *=frozen' -> (5, 'head=1, *=frozen'); without a number the length is None."""
    length, colon, rules = text.partition(":")
    if not colon:
        return None, text
    if not length.strip().isdigit() or int(length) == 0:
        raise UserError(f"--strategy.phases '{text}': before the colon goes the number of epochs, not '{length}'")
    return int(length), rules


def _lengths(given: Sequence[int | None], epochs: int) -> list[int]:
    """Phases without a length share what the others leave."""
    open_phases = given.count(None)
    left = epochs - sum(length for length in given if length)
    if left < open_phases or (left and not open_phases):
        total = epochs - left if not open_phases else epochs - left + open_phases
        raise UserError(
            f"the phases of --strategy.phases last {'at least ' if open_phases else ''}{total} epochs, but "
            f"--train.epochs is {epochs}: make them agree"
        )
    shares = iter([left * (i + 1) // open_phases - left * i // open_phases for i in range(open_phases)])
    return [next(shares) if length is None else length for length in given]


def _rules(text: str) -> list[tuple[str, float]]:
    found = []
    for rule in text.split(","):
        pattern, _, value = (part.strip() for part in rule.partition("="))
        try:
            multiple = 0.0 if value == "frozen" else float(value)
        except ValueError:
            multiple = -1.0
        if not pattern or not 0 <= multiple < float("inf") or (multiple == 0 and value != "frozen"):
            raise UserError(
                f"--strategy.phases: '{rule.strip()}' is no rule: write PATTERN=MULTIPLE or PATTERN=frozen, as in "
                "'layer4=0.1, head=1, *=frozen'"
            )
        found.append((pattern, multiple))
    return found


def _resolve(rules: Sequence[tuple[str, float]], parameters: Mapping[str, bool]) -> tuple[tuple[str, float], ...]:
    """Each parameter's multiple; a stage whose parameters all have the same stands for them."""
    stages = dict.fromkeys(name.split(".", 1)[0] for name in parameters)
    for pattern, _ in rules:
        if not any(_fits(pattern, name, norm) for name, norm in parameters.items()):
            known = [*stages, "norm", *parameters]
            raise UserError(f"--strategy.phases: no parameter is called '{pattern}'{nearest(pattern, known)}")
    multiples = {name: _first_match(rules, name, norm) for name, norm in parameters.items()}
    found: list[tuple[str, float]] = []
    for stage in stages:
        own = {name: multiple for name, multiple in multiples.items() if name.split(".", 1)[0] == stage}
        same = set(own.values())
        entries = [(stage, same.pop())] if len(same) == 1 else list(own.items())
        found += [(name, multiple) for name, multiple in entries if multiple > 0]
    if not found:
        raise UserError("--strategy.phases: a phase freezes everything: let it train something")
    return tuple(found)


def _first_match(rules: Sequence[tuple[str, float]], name: str, norm: bool) -> float:
    for pattern, multiple in rules:
        if _fits(pattern, name, norm):
            return multiple
    raise UserError(f"--strategy.phases says nothing about '{name}': end each phase with *=frozen, or *=1")


def _fits(pattern: str, name: str, norm: bool) -> bool:
    return (norm and pattern == "norm") or name.split(".", 1)[0] == pattern or fnmatchcase(name, pattern)


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
    "lp_ft": _lp_ft,
    "gradual": _gradual,
    "source_only": _two_domains,
    "target_only": _two_domains,
    "mmd": _two_domains,
    "dann": _two_domains,
}
