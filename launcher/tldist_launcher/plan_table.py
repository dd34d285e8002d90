"""`tldist plan`: phases x stages x learning rates x parameter counts."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from tldist import backbones
from tldist.config import RunConfig
from tldist.plan import Phase
from tldist.worker import describe_plan, plan_of

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
    table = Table(title=f"{settings.recipe}: {settings.strategy.name} of {settings.model.name}, {plan.epochs} epochs")
    table.add_column("stage")
    table.add_column("parameters", justify="right")
    for row in rows:
        table.add_column(f"{row['name']}\n{_length(row)}", justify="right")
    for stage in plan.stages:
        rates = [_rate(row, phase, stage) for row, phase in zip(rows, plan.phases, strict=True)]
        table.add_row(stage, f"{counts[stage]:,}", *rates)
    table.add_section()
    table.add_row("trainable", f"{sum(counts.values()):,}", *(f"{row['trainable_params']:,}" for row in rows))
    # Columns stay whole in a file or a pipe, where no terminal sets a width.
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    _notes(settings, console)


def _length(row: dict[str, Any]) -> str:
    return f"{row['epochs']} epochs" if not row["patience"] else f"until {row['patience']} epochs\nbring nothing"


def _rate(row: dict[str, Any], phase: Phase, stage: str) -> str:
    """The stage's peak rate; `in part` where some of its parameters are frozen."""
    rate = row["stages"][stage]
    if not rate:
        return "frozen"
    return f"{rate:.2g}" if any(name == stage for name, _ in phase.multiples) else f"{rate:.2g} in part"


def _notes(settings: RunConfig, console: Console) -> None:
    optim = settings.optim
    console.print(
        f"Peak learning rates of {optim.name}; {optim.schedule} schedule, warm-up of {optim.warmup_epochs:g} epochs "
        f"at each phase's start. The head is counted for {CLASSES_SHOWN} classes. Frozen stages before the first "
        "trainable one run folded, in eval mode, without autograd, outside the engine.",
        soft_wrap=True,
    )
