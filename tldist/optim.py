"""A phase becomes parameter groups, an optimizer, and learning rates as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from tldist.config import OptimConfig
from tldist.plan import Phase, Plan

OptimizerState = dict[str, dict[str, Tensor]]
"""Parameter name -> the optimizer's tensors for it (AdamW: step, exp_avg, exp_avg_sq)."""


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], phase: Phase, config: OptimConfig
) -> list[dict[str, Any]]:
    """One group per trainable stage and kind of decay; frozen parameters are in none.

    Parameter names begin with their stage; names of the objective's own parameters begin with `objective` and
    train at the base rate. Biases and normalisation parameters (one dimension) are not decayed (Goyal et al.,
    2017; He et al., 2019). Raises ValueError if a parameter that requires a gradient belongs to no trainable
    stage, or the reverse.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in parameters:
        stage = name.split(".", 1)[0]
        multiple = 1.0 if stage == "objective" else phase.multiple(stage)
        if (multiple > 0) != parameter.requires_grad:
            raise ValueError(f"'{name}' requires_grad={parameter.requires_grad}, but its rate is {multiple}")
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1
        decay = config.weight_decay if decayed else 0.0
        new = {"params": [], "names": [], "stage": stage, "multiple": multiple, "weight_decay": decay}
        group = groups.setdefault((stage, decayed), new)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


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
    """Hand each parameter the state recorded under its name; parameters without one start fresh."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if name in state:
                optimizer.state[parameter] = {k: _placed(k, v, parameter) for k, v in state[name].items()}


def _placed(key: str, value: Tensor, parameter: nn.Parameter) -> Tensor:
    # A fused optimizer keeps its step counter on the parameter's device; moments also take its memory format.
    # Tensors that already fit are taken over as they are: at a phase boundary nothing exists twice.
    if key == "step":
        return value.to(parameter.device)
    fits = value.device == parameter.device and value.stride() == parameter.stride()
    return value if fits else torch.empty_like(parameter).copy_(value)


def schedule_factor(config: OptimConfig, plan: Plan, index: int, step: int, steps_per_epoch: int) -> float:
    """The share of the peak rate at optimizer step `step` (from 0, over the whole plan) in phase `index`.

    Linear warm-up at the start of every phase (a newly unfrozen stage has no Adam moments yet), times the
    schedule over the phase's or the plan's steps: cosine (Loshchilov and Hutter, 2017) or constant.
    """
    phase = plan.phases[index]
    phase_start, phase_steps = plan.first_epoch(index) * steps_per_epoch, phase.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), phase_steps // 2)
    start, steps = (phase_start, phase_steps) if phase.span == "phase" else (0, plan.epochs * steps_per_epoch)
    warm = min(1.0, (step - phase_start + 1) / (warmup + 1))
    if config.schedule == "constant":
        return warm
    progress = (step - start) / max(steps, 1)
    return warm * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))
