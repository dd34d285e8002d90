"""Learning-rate curves: those of torch's schedulers where torch has them, and pure functions of the step."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch.optim import lr_scheduler

from tldist.config import OptimConfig, StrategyConfig
from tldist.models import backbones
from tldist.optim import schedule_factor
from tldist.plans import Plan, build_plan

STAGES = backbones.stage_names("resnet18")
SCHEDULES = get_args(OptimConfig.__dataclass_fields__["schedule"].type) or (
    "cosine",
    "constant",
    "cosine_restarts",
    "onecycle",
)
PER_EPOCH = 10


def plan(name: str, epochs: int, **options: object) -> Plan:
    return build_plan(StrategyConfig(name=name, **options), STAGES, epochs)  # type: ignore[arg-type]


def curve(config: OptimConfig, made: Plan) -> list[float]:
    """The factor at every step of a plan whose phases end as planned."""
    return [
        schedule_factor(config, made, index, step, PER_EPOCH)
        for index, phase in enumerate(made.phases)
        for step in range(made.first_epoch(index) * PER_EPOCH, (made.first_epoch(index) + phase.epochs) * PER_EPOCH)
    ]


def torchs(make: object, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)  # type: ignore[operator]
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("epochs", [2, 6, 14])
@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        ("constant", lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
        ("cosine", lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=o.steps, eta_min=0.1)),
        ("cosine_restarts", lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=20, T_mult=2, eta_min=0.1)),
        ("onecycle", lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=o.steps, cycle_momentum=False)),
    ],
)
def test_curves_are_torchs(schedule: str, make: object, epochs: int) -> None:
    steps = epochs * PER_EPOCH

    def with_steps(optimizer: torch.optim.Optimizer) -> object:
        optimizer.steps = steps  # type: ignore[attr-defined]
        return make(optimizer)  # type: ignore[operator]

    config = OptimConfig(schedule=schedule, warmup_epochs=0, final_lr=0.1, restart_epochs=2.0)  # type: ignore[arg-type]
    assert curve(config, plan("full", epochs)) == pytest.approx(torchs(with_steps, steps), abs=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("name", "options"), [("two_phase", {}), ("gradual", {"epochs_per_stage": 2}), ("lp_ft", {})])
def test_every_curve_is_a_share_and_every_phase_starts_low(schedule: str, name: str, options: dict[str, int]) -> None:
    config, made = OptimConfig(schedule=schedule, warmup_epochs=0.5), plan(name, 12, **options)  # type: ignore[arg-type]
    factors = curve(config, made)
    assert len(factors) == 12 * PER_EPOCH
    assert all(0 <= factor <= 1 for factor in factors)
    for index in range(len(made.phases)):
        start = made.first_epoch(index) * PER_EPOCH
        assert factors[start] < 0.2
        assert factors[start] < factors[start + 1] < factors[start + 2]


def test_a_plan_wide_cosine_goes_on_through_unfreezing() -> None:
    """gradual: one cosine over the whole plan; the warm-ups dip below it and come back to it."""
    made = plan("gradual", 12, epochs_per_stage=2)
    whole = curve(OptimConfig(warmup_epochs=0), made)
    assert all(a > b for a, b in pairwise(whole))
    warmed = curve(OptimConfig(warmup_epochs=0.5), made)
    same = [i for i, (a, b) in enumerate(zip(whole, warmed, strict=True)) if a == b]
    assert [i % 20 for i in same] == [i for _ in range(6) for i in range(5, 20)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_phase_that_began_early_has_the_rest_of_the_plan(schedule: str) -> None:
    """On a plateau the second phase begins at epoch 3, wherever the plan expected it."""
    made = plan("gradual", 10, unfreeze="plateau")
    config = OptimConfig(schedule=schedule, warmup_epochs=1.0)  # type: ignore[arg-type]
    warm = [schedule_factor(config, made, 1, step, PER_EPOCH, first_epoch=3) for step in range(30, 42)]
    wide = replace(config, warmup_epochs=0.0)
    cold = [schedule_factor(wide, made, 1, step, PER_EPOCH, first_epoch=3) for step in range(30, 42)]
    assert [w / c for w, c in zip(warm, cold, strict=True)] == pytest.approx([i / 11 for i in range(1, 12)] + [1.0])
    if schedule == "cosine":
        assert cold[0] == pytest.approx(0.5 * (1 + torch.cos(torch.tensor(0.3 * torch.pi)).item()))


def test_restarts_lengthen() -> None:
    """T_0 = 1 epoch, T_mult = 2: restarts at epochs 1, 3 and 7."""
    config = OptimConfig(schedule="cosine_restarts", warmup_epochs=0, restart_epochs=1.0)
    factors = curve(config, plan("full", 10))
    assert [i for i, (a, b) in enumerate(pairwise(factors), start=1) if b > a] == [10, 30, 70]
    assert factors[-1] < 0.01, "the last cycle would be of 8 epochs and has 3"
