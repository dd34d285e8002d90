"""A phase becomes parameter groups, an optimizer, and learning rates as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from tldist.config import OptimConfig
from tldist.models.backbones import HEAD
from tldist.plans import Phase, Plan

OptimizerState = dict[str, dict[str, Tensor]]
"""Parameter name -> the optimizer's tensors for it (AdamW: step, exp_avg, exp_avg_sq)."""


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], phase: Phase, config: OptimConfig
) -> list[dict[str, Any]]:
    """One group per trainable stage, rate and kind of decay; frozen parameters are in none.

    Parameter names begin with their stage; names of the objective's own parameters begin with `objective`. Biases and
    normalisation parameters (one dimension) are not decayed (Goyal et al., 2017; He et al., 2019); nor are pre-trained
    weights under L2-SP or EWC, which take the decay's place there. Raises ValueError if a parameter that requires a
    gradient belongs to no trainable stage, or the reverse.
    """
    groups: dict[tuple[str, float, float], dict[str, Any]] = {}
    for name, parameter in parameters:
        stage = name.split(".", 1)[0]
        multiple = phase.multiple(name)
        if (multiple > 0) != parameter.requires_grad:
            raise ValueError(f"'{name}' requires_grad={parameter.requires_grad}, but its rate is {multiple}")
        if not parameter.requires_grad:
            continue
        anchored = (config.l2_sp > 0 or config.ewc > 0) and is_anchored(name, parameter)
        decay = config.weight_decay if parameter.ndim > 1 and not anchored else 0.0
        new = {"params": [], "names": [], "stage": stage, "multiple": multiple, "weight_decay": decay}
        group = groups.setdefault((stage, multiple, decay), new)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def is_anchored(name: str, parameter: Tensor) -> bool:
    """Does L2-SP hold this one? Weights of pre-trained stages: what decay would reach, but for the new head."""
    return parameter.ndim > 1 and name.split(".", 1)[0] not in (HEAD, "objective")


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    """AdamW or SGD over the groups, fused: one kernel per step."""
    if config.name == "adamw":
        return AdamW(groups, lr=config.base_lr, fused=True)
    return SGD(groups, lr=config.base_lr, momentum=config.momentum, fused=True)


def set_learning_rates(optimizer: Optimizer, base_lr: float, factor: float) -> None:
    """Every group's rate: base * its stage's multiple * the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = base_lr * group["multiple"] * factor


def read_state(optimizer: Optimizer) -> OptimizerState:
    """The optimizer's state by parameter name; the tensors are the optimizer's own."""
    found: OptimizerState = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            tensors = {k: v for k, v in optimizer.state.get(parameter, {}).items() if isinstance(v, Tensor)}
            if tensors:
                found[name] = tensors
    return found


def load_state(optimizer: Optimizer, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Hand each parameter the state recorded under its name; parameters without one start fresh.

    SGD's fresh momentum is written out as zeros: torch would take a first step's gradient for it, and where that step
    is left out (found_inf), whatever the memory held.
    """
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if name in state:
                optimizer.state[parameter] = {k: _placed(k, v, parameter) for k, v in state[name].items()}
            elif group.get("momentum"):
                optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}


def _placed(key: str, value: Tensor, parameter: nn.Parameter) -> Tensor:
    # A fused optimizer keeps its step counter on the parameter's device; moments also take its memory format.
    # Tensors that already fit are taken over as they are: at a phase boundary nothing exists twice.
    if key == "step":
        return value.to(parameter.device)
    fits = value.device == parameter.device and value.stride() == parameter.stride()
    return value if fits else torch.empty_like(parameter).copy_(value)


def schedule_factor(
    config: OptimConfig, plan: Plan, index: int, step: int, steps_per_epoch: int, first_epoch: int | None = None
) -> float:
    """The share of the peak rate at optimizer step `step` (from 0, over the whole plan) in phase `index`.

    Linear warm-up at the start of every phase (a newly unfrozen stage has no Adam moments yet), times the
    schedule's curve over the phase's or the plan's steps. `first_epoch` is where the phase began (default: where
    the plan says; a phase that ends on a plateau lets the next begin earlier). A pure function, so a resumed run
    continues the curve.
    """
    phase = plan.phases[index]
    first = plan.first_epoch(index) if first_epoch is None else first_epoch
    phase_start = first * steps_per_epoch
    phase_steps = min(phase.epochs, plan.epochs - first) * steps_per_epoch
    start, steps = (phase_start, phase_steps) if phase.span == "phase" else (0, plan.epochs * steps_per_epoch)
    curve = _CURVES[config.schedule](config, step - start, steps, steps_per_epoch)
    if config.schedule == "onecycle" and start == phase_start:
        return curve
    warmup = min(round(config.warmup_epochs * steps_per_epoch), phase_steps // 2)
    return min(1.0, (step - phase_start + 1) / (warmup + 1)) * curve


def _constant(config: OptimConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    return 1.0


def _cosine(config: OptimConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """Loshchilov and Hutter (2017), one cycle."""
    return _anneal(1.0, config.final_lr, step / max(steps, 1))


def _cosine_restarts(config: OptimConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """SGDR (Loshchilov and Hutter, 2017): cycles of T_0, T_0 * T_mult, ... epochs.

    The last one is shortened to end with the span: cut off, it would end the run at a high rate.
    """
    begin, length = 0.0, config.restart_epochs * steps_per_epoch
    while step >= begin + length:
        begin, length = begin + length, length * config.restart_factor
    return _anneal(1.0, config.final_lr, (step - begin) / min(length, steps - begin))


def _onecycle(config: OptimConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """Smith and Topin (2018) as torch's OneCycleLR draws it: from 1/25 up over 30 % of the steps, then to 4e-6."""
    low, lowest = 1 / 25, 1 / 25 / 1e4
    rise = 0.3 * steps - 1
    if step <= rise:
        return _anneal(low, 1.0, step / max(rise, 1e-9))
    return _anneal(1.0, lowest, min((step - rise) / max(steps - 1 - rise, 1e-9), 1.0))


def _anneal(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` to `end`."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


_CURVES: dict[str, Callable[[OptimConfig, int, int, int], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "cosine_restarts": _cosine_restarts,
    "onecycle": _onecycle,
}
