"""`tldist plan`: phases x stages x learning rates x parameter counts."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from tldist.config import DOMAINS, OptimConfig, RunConfig, StrategyConfig
from tldist.models import backbones
from tldist.plans import Phase, Plan
from tldist.train.summary import describe_plan
from tldist.train.worker import plan_of

CLASSES_SHOWN = 1000
"""The plan needs no data, so the head is sized for ImageNet's classes."""


def print_plan(settings: RunConfig) -> None:
    """One column per phase, one row per stage: its peak learning rate, or frozen."""
    import torch

    with torch.device("meta"):
        model = backbones.build(
            settings.model, CLASSES_SHOWN, settings.data.image_size, settings.seed, pretrained=False
        )
    counts = {name: sum(p.numel() for p in stage.parameters()) for name, stage in model.stages.items()}
    plan = plan_of(settings)
    rows = describe_plan(plan, settings.optim.base_lr, model)
    table = Table()
    table.add_column("stage")
    table.add_column("parameters", justify="right")
    for index in range(len(rows)):
        table.add_column(_heading(rows, index), justify="right")
    for stage in plan.stages:
        rates = [_rate(row, phase, stage) for row, phase in zip(rows, plan.phases, strict=True)]
        table.add_row(stage, f"{counts[stage]:,}", *rates)
    table.add_section()
    table.add_row("trainable", f"{sum(counts.values()):,}", *(f"{row['trainable_params']:,}" for row in rows))
    # Columns stay whole in a file or a pipe, where no terminal sets a width.
    console = Console(width=None if sys.stdout.isatty() else 140)
    # Not the table's title, which would be wrapped to the table's width.
    console.print(
        f"{settings.recipe}: {settings.strategy.name} of {settings.model.name}, {_epochs(plan.epochs)}", highlight=False
    )
    console.print(table)
    for note in _notes(settings, plan):
        console.print(f"{note}.", soft_wrap=True, highlight=False)


def _heading(rows: list[dict[str, Any]], index: int) -> str:
    """The phase's name (a hand-written one rule by rule, which keeps its column narrow) and its length."""
    row, early = rows[index], any(before["patience"] for before in rows[:index])
    name = row["name"].replace(", ", ",\n") if "=" in row["name"] else row["name"]
    if row["patience"]:
        return f"{name}\nuntil\n{_epochs(row['patience'])}\nwithout gain"
    return f"{name}\n{'the rest' if early else _epochs(row['epochs'])}"


def _epochs(count: float) -> str:
    return f"{count:g} epoch" if count == 1 else f"{count:g} epochs"


def _rate(row: dict[str, Any], phase: Phase, stage: str) -> str:
    """The stage's peak rate; `in part` where some of its parameters are frozen."""
    rate = row["stages"][stage]
    if not rate:
        return "frozen"
    return f"{rate:.2g}" if any(name == stage for name, _ in phase.multiples) else f"{rate:.2g} in part"


def _notes(settings: RunConfig, plan: Plan) -> list[str]:
    """What the table cannot show, a sentence a line: the schedule, whatever is not tldist's default, what counts."""
    optim, train, data = settings.optim, settings.train, settings.data
    mixed = data.mixup > 0 and data.mix_at == "cut"
    differing = [
        (optim.clip_norm != OptimConfig.clip_norm, _clipping(optim.clip_norm)),
        (optim.l2_sp > 0, f"L2-SP of {optim.l2_sp:g} in place of weight decay on pre-trained weights"),
        (optim.ewc > 0, _ewc(settings)),
        (train.batchnorm == "eval", "BatchNorm in stages that train keeps the source's statistics"),
        (train.batchnorm == "sync", "BatchNorm in stages that train sees all workers' batches together"),
        (train.batchnorm == "domain", "BatchNorm normalises each domain by itself, and keeps the target's statistics"),
        (train.accumulate > 1, f"A worker's share of a batch passes in {train.accumulate} parts"),
        (train.ema > 0, f"A moving average of the weights (decay {train.ema:g}) is evaluated and saved"),
        (mixed, "Mixup of the features at the cut"),
        (settings.cache.views > 0, f"Features of the frozen prefix are kept ({settings.cache.features})"),
        (data.pixels != "off", f"Decoded pixels are kept ({data.pixels}), at the size that evaluation resizes to"),
    ]
    return [
        f"Peak learning rates of {optim.name}; {_schedule(optim, plan)}",
        *_boundaries(settings, plan),
        *_stopping(settings, plan),
        *_domains(settings.strategy, plan),
        *(sentence for differs, sentence in differing if differs),
        f"The head is counted for {CLASSES_SHOWN} classes",
        *_prefix(plan),
    ]


def _ewc(settings: RunConfig) -> str:
    tasks = len(settings.optim.ewc_from)
    held = f"EWC of {settings.optim.ewc:g} holds the weights of {tasks} earlier task{'s' if tasks > 1 else ''}"
    if settings.train.batchnorm == "eval":
        return held
    return f"{held}, but BatchNorm's statistics move: --train.batchnorm eval keeps them"


def _domains(strategy: StrategyConfig, plan: Plan) -> list[str]:
    """What a step shows of two domains, and where they are made alike."""
    shown = DOMAINS.get(strategy.name, ())
    if len(shown) < 2:
        return [f"Trains on the {shown[0]} domain, is evaluated on the target"] if shown else []
    where = f"output of {strategy.align_at or plan.stages[-2]}, with a weight that grows to {strategy.align_weight:g}"
    own = f"; the discriminator learns at {strategy.discriminator_lr:g} of the head's rate"
    return [
        "A step shows as many images of the target as of the source, in one pass; no label of the target is read",
        f"{strategy.name} makes the domains alike at the {where}{own if strategy.name == 'dann' else ''}",
    ]


def _schedule(optim: OptimConfig, plan: Plan) -> str:
    """Which curve, over what, from and to where."""
    curve = optim.schedule.replace("_", " with ")
    if optim.schedule == "cosine_restarts":
        curve += f" (first cycle {_epochs(optim.restart_epochs)}, each next {optim.restart_factor:g} times as long)"
    if optim.schedule.startswith("cosine") and optim.final_lr:
        curve += f" down to {optim.final_lr:g} of the peak"
    phases, wide = len(plan.phases), plan.phases[0].span == "plan"
    over = "the run" if phases == 1 else "the whole plan" if wide else "each phase"
    return f"{curve} over {over}, {_warmup(optim, phases, wide)}"


def _warmup(optim: OptimConfig, phases: int, wide: bool) -> str:
    rises_itself = optim.schedule == "onecycle"
    if rises_itself and not (wide and phases > 1):
        return "which rises by itself"
    if not optim.warmup_epochs:
        return "no warm-up"
    where = "the start" if phases == 1 else "the start of each later phase" if rises_itself else "each phase's start"
    return f"warm-up of {_epochs(optim.warmup_epochs)} at {where}"


def _clipping(norm: float) -> str:
    return f"Gradients are clipped at norm {norm:g}" if norm else "Gradients are not clipped"


def _boundaries(settings: RunConfig, plan: Plan) -> list[str]:
    """What a phase takes over from the one before."""
    if len(plan.phases) == 1:
        return []
    best = [phase.name for phase in plan.phases if phase.start == "best"]
    reset = settings.strategy.optimizer_state == "reset"
    return [
        *(f"Phase '{name}' goes on from the best weights so far" for name in best),
        *(["Every phase starts its optimizer anew"] if reset else []),
    ]


def _stopping(settings: RunConfig, plan: Plan) -> list[str]:
    """Where validation decides; the least rise that counts is only told where it is not any rise at all."""
    stop, delta = settings.train.early_stop, settings.train.min_delta
    waits = stop > 0 or any(phase.patience for phase in plan.phases)
    return [
        *([f"The run stops after {_epochs(stop)} without gain and restores the best weights"] if stop else []),
        *([f"A gain is a rise of validation top-1 by more than {delta:g}"] if waits and delta else []),
    ]


def _prefix(plan: Plan) -> list[str]:
    if not any(plan.cut(i) for i in range(len(plan.phases))):
        return []
    return [
        "Frozen stages before the first trainable one run folded, in eval mode, without autograd, outside the engine"
    ]
