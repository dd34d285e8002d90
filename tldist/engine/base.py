"""What the loop asks of an engine, and how numbers are stored while it steps."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tldist.config import Precision
from tldist.objectives.base import Objective, StepOutput, Targets
from tldist.optim import OptimizerState

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Numerics:
    """The type the network computes in; weights that train stay fp32."""

    dtype: torch.dtype
    device: torch.device
    scaler: torch.amp.GradScaler
    """Scales the loss in fp16, whose gradients underflow otherwise (Micikevicius et al., 2018); else does nothing.
    It belongs to the run, so that a phase boundary does not search for the scale anew."""

    def autocast(self) -> AbstractContextManager[object]:
        """Autocast to `dtype`, or nothing in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def numerics(precision: Precision, device: torch.device) -> Numerics:
    """What `--train.precision` says."""
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    return Numerics(DTYPES[precision], device, scaler)


@dataclass(frozen=True)
class HeldBytes:
    """What this worker stores for what trains, counted where it is most: after the last backward pass of a step."""

    weights: int
    gradients: int
    optimizer: int


class Stepped(NamedTuple):
    """What a step came to: scalars on the device, equal on all workers."""

    skipped: Tensor
    """1.0 where it was left out, because its gradients were not finite; else 0.0."""
    grad_norm: Tensor
    """The L2 norm of the step's gradient over all that trains: averaged over workers, unscaled, before clipping."""


def stored_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


class Engine(Protocol):
    """Replicates and steps one phase's live suffix. A phase boundary closes it and builds the next.

    It is built with the optimizer's state of an engine that is no more (of any kind, on any number of workers), which
    it takes over by name; parameters without any start fresh.
    """

    objective: Objective
    """The unwrapped objective around the live suffix."""

    def forward_backward(
        self, features: Tensor, targets: Targets, share: float = 1.0, reduce: bool = True
    ) -> StepOutput:
        """One pass over `share` of the step's images. Gradients add up until `step`; the pass with `reduce` (the
        step's last) also averages them over workers where there are several."""
        ...

    def step(self, factor: float) -> Stepped:
        """Clip, step at `factor` of the peak rates, and clear the gradients.

        Gradients that are not finite change nothing: neither weights nor the optimizer.
        """
        ...

    def optimizer_state(self) -> OptimizerState:
        """The optimizer's tensors by parameter name, whole; collective."""
        ...

    def whole(self) -> AbstractContextManager[object]:
        """Around code that reads the weights: inside, each worker holds all of them. Collective."""
        ...

    def held_bytes(self) -> HeldBytes:
        """What this worker stores, counted from its tensors; to be asked between a backward pass and its step."""
        ...

    def close(self) -> None:
        """Free what the engine holds; the weights stay in the model."""
        ...
