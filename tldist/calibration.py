"""Confidences that mean what they say: temperature scaling, one number fitted on validation (Guo et al., 2017)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tldist import dist

LOWEST, HIGHEST = 0.05, 20.0
"""Temperatures are looked for in between: beyond, the logits themselves are worth nothing."""


@torch.no_grad()
def fit_temperature(logits_NC: Tensor, labels_N: Tensor) -> float:
    """The T under which the labels are most probable as softmax(logits / T), over the images of all workers.

    The mean cross-entropy is convex in 1/T (Guo et al., 2017, section 4.2): Newton's steps, inside a bracket. A network
    that is right on all of 19 images is not sure beyond measure: as in Platt (1999), labels count as if of N + 1 images
    one were of every class in equal parts. 1.0 where logits are not finite. Collective.
    """
    z_NC = logits_NC.double()
    (images,) = dist.all_sum(torch.tensor([float(len(z_NC))], dtype=torch.float64, device=z_NC.device)).tolist()
    spread = 1 / (images + 1)
    wanted_N = (1 - spread) * z_NC.gather(1, labels_N[:, None])[:, 0] + spread * z_NC.mean(dim=1)
    low, high, inverse = 1 / HIGHEST, 1 / LOWEST, 1.0
    for _ in range(60):
        slope, curvature = _derivatives(z_NC, wanted_N, inverse)
        if not math.isfinite(slope):
            return 1.0
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        newton = inverse - slope / curvature if curvature > 0 else low
        following = newton if low < newton < high else (low + high) / 2
        if abs(following - inverse) < 1e-9 * inverse:
            break
        inverse = following
    return 1 / inverse


def _derivatives(z_NC: Tensor, wanted_N: Tensor, inverse: float) -> tuple[float, float]:
    """First and second, by 1/T, of the summed cross-entropy: mean and variance of the logits under the model."""
    p_NC = (z_NC * inverse).softmax(dim=1)
    mean_N = (p_NC * z_NC).sum(dim=1)
    variance_N = (p_NC * (z_NC - mean_N[:, None]) ** 2).sum(dim=1)
    slope, curvature = dist.all_sum(torch.stack([(mean_N - wanted_N).sum(), variance_N.sum()])).tolist()
    return slope, curvature
