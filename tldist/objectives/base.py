"""An objective is the module an engine wraps: the live suffix plus what is minimised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from tldist.backbones import Segment


@dataclass(frozen=True)
class Targets:
    """What a batch should be: labels, and for mixed images the partner's label and the own label's weight."""

    labels_N: Tensor
    partner_labels_N: Tensor | None = None
    weight_N: Tensor | None = None

    def part(self, rows: slice) -> Targets:
        """Those of some of the images."""
        partner, weight = self.partner_labels_N, self.weight_N
        return Targets(
            self.labels_N[rows],
            None if partner is None else partner[rows],
            None if weight is None else weight[rows],
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
