"""An objective is the module an engine wraps: the live suffix plus what is minimised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tldist.models.backbones import Segment


@dataclass(frozen=True)
class Targets:
    """What a batch should be: labels, and for mixed images the partner's label and the own label's weight."""

    labels_N: Tensor
    partner_labels_N: Tensor | None = None
    weight_N: Tensor | None = None
    progress: float = 0.0
    """Share of the plan's steps that are done: what a schedule inside an objective is a function of."""

    def part(self, rows: slice) -> Targets:
        """Those of some of the images."""
        partner, weight = self.partner_labels_N, self.weight_N
        return Targets(
            self.labels_N[rows],
            None if partner is None else partner[rows],
            None if weight is None else weight[rows],
            self.progress,
        )


class StepOutput(NamedTuple):
    """loss: scalar, the mean over the batch; logits_NC: for the running accuracy."""

    loss: Tensor
    logits: Tensor


class Objective(nn.Module):
    """Holds the live suffix as `network`; parameters of its own (a discriminator, say) are reduced with it."""

    def __init__(self, network: Segment) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Tensor, targets: Targets) -> StepOutput:
        raise NotImplementedError

    def parameters_by_stage(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter): the network's under its own names, others under `objective.`."""
        for name, parameter in self.named_parameters():
            inner = name.removeprefix("network.")
            yield (inner if inner != name else f"objective.{name}"), parameter

    def own_state(self) -> dict[str, Tensor]:
        """Copies of the objective's own parameters, by name; the network's are not among them."""
        own = self.named_parameters()
        return {name: p.detach().clone() for name, p in own if not name.startswith("network.")}

    @torch.no_grad()
    def load_own(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `own_state` gave, of an earlier phase or process; parameters without a value stay new."""
        for name, parameter in self.named_parameters():
            if name in state and not name.startswith("network."):
                parameter.copy_(state[name])
