"""Two domains made alike while the labelled one is learned: MMD and DANN.

Source and target go through the network in one pass, the source's images first, and no label of the target exists.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tldist import dist
from tldist.models.backbones import Segment
from tldist.objectives.anchor import AnchorPenalty
from tldist.objectives.base import StepOutput, Targets
from tldist.objectives.supervised import Supervised
from tldist_kernels import mmd


def ramp(progress: float) -> float:
    """lambda(p) = 2 / (1 + exp(-10 p)) - 1: from 0 to 1 while p does (Ganin et al., 2016, section 5.2.2)."""
    return 2.0 / (1.0 + math.exp(-10.0 * progress)) - 1.0


def rows_of(output: Tensor) -> Tensor:
    """A stage's output as features_ND: maps are averaged over their pixels, of tokens the class token is taken."""
    if output.ndim == 4:
        return output.mean((2, 3))
    return output[:, 0] if output.ndim == 3 else output


class Aligned(Supervised):
    """Cross-entropy of the source, plus what tells the two domains apart at the output of one stage."""

    def __init__(
        self, network: Segment, label_smoothing: float, penalty: AnchorPenalty | None, stage: str, weight: float
    ) -> None:
        super().__init__(network, label_smoothing, penalty)
        self.stage = stage
        self.weight = weight

    def forward(self, features: Tensor, targets: Targets) -> StepOutput:
        """features: N of the source, then N of the target -> loss, and logits_NC of the source."""
        logits, output = self.network(features, self.stage)
        source, target = rows_of(output).split(len(targets.labels_N))
        task = self.task(logits[: len(source)], targets)
        strength = self.weight * ramp(targets.progress)
        return StepOutput(task.loss + self.apart(source.float(), target.float(), strength), task.logits)

    def apart(self, source_ND: Tensor, target_ND: Tensor, strength: float) -> Tensor:
        """What is added to the loss, `strength` being the weight times `ramp`."""
        raise NotImplementedError


class MMD(Aligned):
    """strength * MMD^2 of the features, unbiased, under five RBF bandwidths (DAN: Long et al., 2015; lecture 6.2).

    It is that of all workers' batches joined, because it is no mean over images.
    """

    def apart(self, source_ND: Tensor, target_ND: Tensor, strength: float) -> Tensor:
        source_ND, target_ND = _GatherRows.apply(source_ND), _GatherRows.apply(target_ND)  # type: ignore[assignment]
        return strength * mmd(source_ND, target_ND, unbiased=True)


class DANN(Aligned):
    """A discriminator learns to tell the domains apart, and the features, by its reversed gradient, to deceive it.

    min over features and classifier, max over the discriminator, of L_task - strength * L_domain (Ganin et al., 2016,
    eq. 18; lecture 6.3). The discriminator itself learns at full rate. It is a part of this module, so every engine
    reduces and steps it with the network.
    """

    def __init__(
        self,
        network: Segment,
        label_smoothing: float,
        penalty: AnchorPenalty | None,
        stage: str,
        weight: float,
        discriminator: nn.Module,
    ) -> None:
        super().__init__(network, label_smoothing, penalty, stage, weight)
        self.discriminator = discriminator

    def apart(self, source_ND: Tensor, target_ND: Tensor, strength: float) -> Tensor:
        reversed_ND = reverse_gradient(torch.cat([source_ND, target_ND]), strength)
        logits_N = self.discriminator(reversed_ND)[:, 0].float()
        is_source_N = torch.arange(len(logits_N), device=logits_N.device) < len(source_ND)
        return F.binary_cross_entropy_with_logits(logits_N, is_source_N.float())


def discriminator(features: int, units: int) -> nn.Sequential:
    """features_ND -> the logit (N, 1) of being the source's: two hidden layers, as for the larger nets of the paper."""
    return nn.Sequential(nn.Linear(features, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU(), nn.Linear(units, 1))


def reverse_gradient(x: Tensor, strength: float) -> Tensor:
    """The identity, whose gradient is -strength times what arrives."""
    return _ReverseGradient.apply(x, strength)  # type: ignore[return-value]


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * gradients[0], None


class _GatherRows(torch.autograd.Function):
    """All workers' rows on every worker, for a loss that each of them computes in full.

    Engines average gradients over workers, and each row's gradient exists on its own worker alone: there it is
    multiplied by their number.
    """

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor) -> Tensor:
        return dist.all_rows(rows_ND)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].chunk(dist.world_size())[dist.rank()] * dist.world_size()
