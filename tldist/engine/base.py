"""What the loop asks of an engine, and how numbers are stored while it steps."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tldist.config import Precision, UserError
from tldist.objectives.base import Objective, StepOutput, Targets
from tldist.optim import OptimizerState

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Numerics:
    """The type the network computes in; weights that train stay fp32."""

    dtype: torch.dtype
    device: torch.device

    def autocast(self) -> AbstractContextManager[object]:
        """Autocast to `dtype`, or nothing in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def scales_loss(self) -> bool:
        """fp16 gradients underflow without a scaled loss (Micikevicius et al., 2018)."""
        return self.dtype == torch.float16


def numerics(precision: Precision, device: torch.device) -> Numerics:
    """Raises UserError for fp16 without a GPU."""
    if precision == "fp16" and device.type != "cuda":
        raise UserError("--train.precision fp16 needs a GPU: use bf16 or fp32 here")
    return Numerics(DTYPES[precision], device)


class Engine(Protocol):
    """Replicates and steps one phase's live suffix. A phase boundary closes it and builds the next."""

    objective: Objective
    """The unwrapped objective around the live suffix."""

    def forward_backward(self, features: Tensor, targets: Targets) -> StepOutput:
        """One pass; gradients are summed up over workers where there are several."""
        ...

    def step(self, factor: float) -> None:
        """Clip, step at `factor` of the peak rates, and clear the gradients."""
        ...

    def optimizer_state(self) -> OptimizerState:
        """The optimizer's tensors by parameter name, whole; collective."""
        ...

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Carry state over by name; parameters not in it start fresh."""
        ...

    def close(self) -> None:
        """Free what the engine holds; the weights stay in the model."""
        ...
