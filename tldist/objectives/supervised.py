"""Cross-entropy, with label smoothing and mixed targets, and a penalty on the weights where one is wanted."""

from __future__ import annotations

from torch import Tensor

from tldist.models.backbones import Segment
from tldist.objectives.anchor import AnchorPenalty
from tldist.objectives.base import Objective, StepOutput, Targets
from tldist_kernels import mixed_cross_entropy


class Supervised(Objective):
    """weight * CE(label) + (1 - weight) * CE(partner label), averaged over the batch (Zhang et al., 2018)."""

    def __init__(self, network: Segment, label_smoothing: float, penalty: AnchorPenalty | None = None) -> None:
        super().__init__(network)
        self.label_smoothing = label_smoothing
        self.penalty = penalty

    def forward(self, features: Tensor, targets: Targets) -> StepOutput:
        """features: the prefix's output (or images) -> loss and logits_NC."""
        return self.task(self.network(features), targets)

    def task(self, logits: Tensor, targets: Targets) -> StepOutput:
        """The loss of these logits_NC, with the penalty."""
        loss_N = mixed_cross_entropy(
            logits, targets.labels_N, targets.partner_labels_N, targets.weight_N, self.label_smoothing
        )
        loss = loss_N.mean()
        return StepOutput(loss if self.penalty is None else loss + self.penalty(), logits)
