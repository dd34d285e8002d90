"""Confidences that mean what they say: temperature scaling, one number fitted on validation (Guo et al., 2017)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tldist import dist

LOWEST, HIGHEST = 0.05, 20.0
"""Temperatures are looked for in between: beyond, the logits themselves are worth nothing."""

Batches = Sequence[tuple[Tensor, Tensor]]
"""(logits_NC, labels_N), of any number of images each; none where a worker saw no image."""


@torch.no_grad()
def fit_temperature(batches: Batches, device: torch.device) -> float:
    """The T under which the labels are most probable as softmax(logits / T), over the images of all workers.

    The mean cross-entropy is convex in 1/T (Guo et al., 2017, section 4.2): Newton's steps, inside a bracket. A network
    that is right on all of 19 images is not sure beyond measure: as in Platt (1999), labels count as if of N + 1 images
    one were of every class in equal parts. 1.0 where logits are not finite. Collective.

    Sums are of fp64, which one batch's logits at a time are cast to.
    """
    images, of_labels, of_all = _total(batches, device, _told)
    spread = 1 / (images + 1)
    wanted = (1 - spread) * of_labels + spread * of_all
    low, high, inverse = 1 / HIGHEST, 1 / LOWEST, 1.0
    for _ in range(60):
        mean, curvature = _total(batches, device, lambda z_NC, _, inverse=inverse: _moments(z_NC, inverse))
        slope = mean - wanted
        if not math.isfinite(slope):
            return 1.0
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        newton = inverse - slope / curvature if curvature > 0 else low
        following = newton if low < newton < high else (low + high) / 2
        if abs(following - inverse) < 1e-9 * inverse:
            break
        inverse = following
    return 1 / inverse


def _total(batches: Batches, device: torch.device, of: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
    """What `of` makes of a batch, summed over those of all workers: one copy to the host."""
    none_NC, no_labels_N = torch.zeros(0, 1, dtype=torch.float64, device=device), torch.zeros(0, device=device).long()
    sums_K = of(none_NC, no_labels_N)
    for logits_NC, labels_N in batches:
        sums_K = sums_K + of(logits_NC.double(), labels_N)
    return dist.all_sum(sums_K).tolist()


def _told(z_NC: Tensor, labels_N: Tensor) -> Tensor:
    """(images, summed logits of the labels, summed mean logits)."""
    of_labels = z_NC.gather(1, labels_N[:, None]).sum()
    return torch.stack([of_labels.new_tensor(len(z_NC)), of_labels, z_NC.mean(dim=1).sum()])


def _moments(z_NC: Tensor, inverse: float) -> Tensor:
    """Mean and variance of each image's logits under the model, summed: the cross-entropy's derivatives by 1/T, but for
    what the labels add to the first."""
    p_NC = (z_NC * inverse).softmax(dim=1)
    mean_N = (p_NC * z_NC).sum(dim=1)
    return torch.stack([mean_N.sum(), (p_NC * (z_NC - mean_N[:, None]) ** 2).sum()])
