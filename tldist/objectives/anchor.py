"""A quadratic pull of weights towards an anchor: L2-SP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

foreach: Any = torch  # whose stubs lack the operations over lists of tensors


class AnchorPenalty(nn.Module):
    """strength / 2 * sum ||w - w0||^2 over the given parameters (L2-SP: Li, Grandvalet and Davoine, 2018, eq. 2).

    Value and gradient take three passes over all parameters together instead of three small kernels for each.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], anchors: Mapping[str, Tensor], strength: float) -> None:
        """`anchors` holds w0 for every name of `parameters`, of the same shape."""
        super().__init__()
        self.strength = strength
        # In plain lists: they belong to the network, and the anchors neither train nor are saved.
        self._parameters_of_network = [tuple(parameters.values())]
        self._anchors = [tuple(anchors[name] for name in parameters)]

    @property
    def reads(self) -> tuple[nn.Parameter, ...]:
        """Parameters of other modules that forward reads: where weights are sharded, they are gathered for it."""
        return self._parameters_of_network[0]

    def forward(self) -> Tensor:
        parameters, anchors = self._parameters_of_network[0], self._anchors[0]
        return _Quadratic.apply(self.strength, anchors, *parameters)  # type: ignore[return-value]


class _Quadratic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, strength: float, anchors: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.strength, ctx.pulls = strength, foreach._foreach_sub(parameters, anchors)
        norms = foreach._foreach_norm(ctx.pulls)
        return 0.5 * strength * torch.stack(norms).float().square().sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *foreach._foreach_mul(ctx.pulls, gradients[0] * ctx.strength)
