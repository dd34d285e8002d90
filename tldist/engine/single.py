"""One worker: the objective itself and a torch optimizer."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from tldist.config import OptimConfig
from tldist.engine.base import Numerics
from tldist.objectives.base import Objective, StepOutput, Targets
from tldist.optim import (
    OptimizerState,
    build_optimizer,
    load_state,
    parameter_groups,
    read_state,
    set_learning_rates,
)
from tldist.plan import Phase


class SingleEngine:
    """Forward, backward and step in one process. `DDPEngine` differs only in what it wraps around the objective."""

    def __init__(self, objective: Objective, phase: Phase, config: OptimConfig, numerics: Numerics) -> None:
        self.objective = objective
        self.config = config
        self.numerics = numerics
        self.optimizer = build_optimizer(parameter_groups(objective.parameters_by_stage(), phase, config), config)
        self.scaler = numerics.scaler
        self.module = self.wrap(objective)

    def wrap(self, objective: Objective) -> nn.Module:
        """The module whose forward is called in training."""
        return objective

    def accumulating(self, on: bool) -> AbstractContextManager[object]:
        """Around a pass whose gradients are not yet averaged over workers."""
        return nullcontext()

    def forward_backward(
        self, features: Tensor, targets: Targets, share: float = 1.0, reduce: bool = True
    ) -> StepOutput:
        """features: what the prefix returned; the loss is the mean over the pass's images."""
        with self.accumulating(not reduce):
            with self.numerics.autocast():
                output: StepOutput = self.module(features, targets)
            loss = output.loss if share == 1.0 else output.loss * share
            self.scaler.scale(loss).backward()
        return StepOutput(output.loss.detach(), output.logits.detach())

    def step(self, factor: float) -> None:
        """No host sync: the clip factor and fp16's skip decision stay on the device."""
        set_learning_rates(self.optimizer, self.config.base_lr, factor)
        if self.config.clip_norm:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self) -> OptimizerState:
        """The live tensors by parameter name."""
        return read_state(self.optimizer)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """For the parameters this engine trains."""
        load_state(self.optimizer, state)

    def close(self) -> None:
        """Drop gradients, so that parameters that freeze again keep none."""
        self.optimizer.zero_grad(set_to_none=True)
