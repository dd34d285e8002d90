"""A quadratic pull of weights towards anchors: L2-SP with one strength for all, EWC with each weight's importance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

foreach: Any = torch  # whose stubs lack the operations over lists of tensors


@dataclass(frozen=True)
class Pull:
    """strength / 2 * sum_i importance_i * (w_i - anchor_i)^2, plus a constant, over parameters by name.

    L2-SP: importance 1 (Li, Grandvalet and Davoine, 2018, eq. 2). EWC: the Fisher information of an earlier task
    (Kirkpatrick et al., 2017, eq. 3).
    """

    strength: float
    anchors: Mapping[str, Tensor]
    importances: Mapping[str, Tensor] = field(default_factory=dict)
    """For every name of `anchors`, of the same shape; empty: 1 everywhere."""
    constants: Mapping[str, float] = field(default_factory=dict)
    """What each parameter's pull is where it is least, if that is not 0."""


def joined(pulls: Sequence[Pull]) -> Pull:
    """The sum of several pulls as one: two tensors for each parameter, however many tasks came before.

    A sum of squares is a square: sum_k F_k (w - a_k)^2 = F (w - a)^2 + sum_k F_k (a_k - a)^2, with F = sum_k F_k and
    a = sum_k F_k a_k / F. Computed in double precision.
    """
    if len(pulls) == 1:
        return pulls[0]
    anchors, importances, constants = {}, {}, {}
    for name in dict.fromkeys(name for pull in pulls for name in pull.anchors):
        terms = [(_importance(pull, name), pull.anchors[name]) for pull in pulls if name in pull.anchors]
        total = sum((f for f, _ in terms), torch.zeros_like(terms[0][0]))
        mean = sum((f * a for f, a in terms), torch.zeros_like(total)) / total.clamp(min=torch.finfo(total.dtype).tiny)
        anchors[name], importances[name] = mean.to(terms[0][1].dtype), total.to(terms[0][1].dtype)
        constants[name] = 0.5 * sum(float((f * (a - mean).square()).sum()) for f, a in terms)
        constants[name] += sum(pull.constants.get(name, 0.0) for pull in pulls)
    return Pull(1.0, anchors, importances, constants)


def _importance(pull: Pull, name: str) -> Tensor:
    """With the pull's strength in it."""
    given = pull.importances.get(name, torch.ones_like(pull.anchors[name]))
    return pull.strength * given.double()


class AnchorPenalty(nn.Module):
    """A pull's value at the given parameters, and its gradient.

    Both take a few passes over all parameters together instead of a few small kernels for each.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], pull: Pull) -> None:
        """`pull` knows every name of `parameters`; others that it knows are left alone."""
        super().__init__()
        self.strength = pull.strength
        self.constant = sum(pull.constants.get(name, 0.0) for name in parameters)
        # In plain lists: they belong to the network, and the anchors neither train nor are saved.
        self._parameters_of_network = [tuple(parameters.values())]
        self._anchors = [tuple(pull.anchors[name] for name in parameters)]
        # (sqrt(F) * (w - a))^2: the value is then a norm, which takes one kernel for a list of tensors.
        self._roots = [tuple(pull.importances[name].sqrt() for name in parameters) if pull.importances else ()]

    @property
    def reads(self) -> tuple[nn.Parameter, ...]:
        """Parameters of other modules that forward reads: where weights are sharded, they are gathered for it."""
        return self._parameters_of_network[0]

    def forward(self) -> Tensor:
        parameters, anchors, roots = self._parameters_of_network[0], self._anchors[0], self._roots[0]
        return _Quadratic.apply(self.strength, anchors, roots, *parameters) + self.constant  # type: ignore[operator]


class _Quadratic(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, strength: float, anchors: Sequence[Tensor], roots: Sequence[Tensor], *parameters: Tensor
    ) -> Tensor:
        ctx.strength, ctx.roots, ctx.pulls = strength, roots, foreach._foreach_sub(parameters, anchors)
        if roots:
            foreach._foreach_mul_(ctx.pulls, roots)
        norms = foreach._foreach_norm(ctx.pulls)
        return 0.5 * strength * torch.stack(norms).float().square().sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scale = gradients[0] * ctx.strength
        if not ctx.roots:
            return None, None, None, *foreach._foreach_mul(ctx.pulls, scale)
        scaled = foreach._foreach_mul(ctx.pulls, ctx.roots)
        foreach._foreach_mul_(scaled, scale)
        return None, None, None, *scaled
