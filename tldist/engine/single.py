"""One worker: the objective itself and a torch optimizer."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from tldist.config import OptimConfig
from tldist.engine.base import HeldBytes, Numerics, Stepped, stored_bytes
from tldist.objectives.base import Objective, StepOutput, Targets
from tldist.optim import OptimizerState, build_optimizer, load_state, parameter_groups, read_state, set_learning_rates
from tldist.plans import Phase


class SingleEngine:
    """Forward, backward and step in one process. `DDPEngine` differs only in what it wraps around the objective."""

    def __init__(
        self,
        objective: Objective,
        phase: Phase,
        config: OptimConfig,
        numerics: Numerics,
        state: OptimizerState | None = None,
    ) -> None:
        self.objective = objective
        self.config = config
        self.numerics = numerics
        self.optimizer = build_optimizer(parameter_groups(objective.parameters_by_stage(), phase, config), config)
        load_state(self.optimizer, state or {})
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

    def step(self, factor: float) -> Stepped:
        """No host sync: the clip factor, and whether the step is left out, stay on the device."""
        set_learning_rates(self.optimizer, self.config.base_lr, factor)
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip_norm, norm)
        skipped = 1.0 - torch.isfinite(norm).float()
        self._step(skipped)
        self.optimizer.zero_grad(set_to_none=True)
        return Stepped(skipped, norm)

    def _step(self, skipped: Tensor) -> None:
        """fp16's scaler finds out by itself; what it tells a fused optimizer is told to it here in other precisions."""
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return
        self.optimizer.grad_scale, self.optimizer.found_inf = None, skipped  # type: ignore[attr-defined]
        self.optimizer.step()

    def optimizer_state(self) -> OptimizerState:
        """The live tensors by parameter name."""
        return read_state(self.optimizer)

    def whole(self) -> AbstractContextManager[object]:
        """They always are."""
        return nullcontext()

    def held_bytes(self) -> HeldBytes:
        """All of it."""
        parameters = list(self.objective.parameters())
        state = [t for tensors in self.optimizer.state.values() for t in tensors.values() if isinstance(t, Tensor)]
        return HeldBytes(stored_bytes(parameters), stored_bytes(p.grad for p in parameters), stored_bytes(state))

    def close(self) -> None:
        """Drop gradients, so that parameters that freeze again keep none."""
        self.optimizer.zero_grad(set_to_none=True)
