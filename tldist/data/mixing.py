"""Mixup and CutMix on the device: what to mix is drawn from a device generator, without a host sync.

The generator is seeded from (seed, step, rank) at every step, so mixing is a pure function of the step: it has no
state to save, and a resumed run mixes as the uninterrupted one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tldist.config import DataConfig
from tldist.objectives.base import Targets


@dataclass(frozen=True)
class Mix:
    """Inside boxes_N4 (top, left, bottom, right) image i is weight_N[i] of itself plus the rest of partner_N[i]."""

    partner_N: Tensor
    weight_N: Tensor
    boxes_N4: Tensor
    label_weight_N: Tensor
    """Share of the own label: lambda for Mixup, one minus the clipped box's area share for CutMix."""


def step_generator(device: torch.device, seed: int, step: int, rank: int) -> torch.Generator:
    """A device generator that depends on these numbers alone."""
    words = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(words[0] >> np.uint64(1)))


def draw_mix(config: DataConfig, n: int, generator: torch.Generator) -> Mix | None:
    """A random partner for each of n images, and how much of it, for the batch or for each image; None: mixing is off.

    Mixup (Zhang et al., 2018): lambda ~ Beta(alpha, alpha) over the whole image. CutMix (Yun et al., 2019): a box
    of area share 1 - lambda, its centre uniform, clipped at the border. With both on, a coin decides.
    """
    if not (config.mixup or config.cutmix):
        return None
    device, size, draws = generator.device, config.image_size, n if config.mix_per == "image" else 1
    partner = torch.randperm(n, generator=generator, device=device)
    # No tensor is made from Python numbers here: on a GPU that would be a copy the host waits for.
    share_cut = config.cutmix_share if config.mixup and config.cutmix else float(config.cutmix > 0)
    cut_K = torch.rand(draws, generator=generator, device=device) < share_cut
    lam_K = torch.where(cut_K, _beta(config.cutmix, draws, generator), _beta(config.mixup, draws, generator))
    if config.mix_probability < 1:
        lam_K = lam_K.masked_fill(torch.rand(draws, generator=generator, device=device) >= config.mix_probability, 1.0)
    whole_4 = torch.arange(4, device=device).div(2, rounding_mode="floor") * size  # 0, 0, size, size
    boxes_K4 = torch.where(cut_K[:, None], _cut_boxes(lam_K, size, generator), whole_4)
    area_K = ((boxes_K4[:, 2] - boxes_K4[:, 0]) * (boxes_K4[:, 3] - boxes_K4[:, 1])).float() / (size * size)
    weight_K = lam_K.masked_fill(cut_K, 0.0)
    label_weight_K = torch.where(cut_K, 1 - area_K, lam_K)
    return Mix(partner, weight_K.expand(n), boxes_K4.int().expand(n, 4).contiguous(), label_weight_K.expand(n))


def _beta(alpha: float, draws: int, generator: torch.Generator) -> Tensor:
    """Draws of Beta(alpha, alpha); 1 when alpha is 0. torch.distributions cannot take a generator, its op can."""
    if not alpha:
        return torch.ones(draws, device=generator.device)
    both_K2 = torch.full((draws, 2), alpha, device=generator.device)
    return torch._sample_dirichlet(both_K2, generator=generator)[:, 0]  # pyright: ignore[reportPrivateImportUsage]


def _cut_boxes(lam_K: Tensor, size: int, generator: torch.Generator) -> Tensor:
    side_K1 = (size * torch.sqrt(1 - lam_K)).long()[:, None]
    centre_K2 = torch.randint(size, (len(lam_K), 2), generator=generator, device=lam_K.device)
    low_K2 = (centre_K2 - side_K1 // 2).clamp(0, size)
    high_K2 = (centre_K2 - side_K1 // 2 + side_K1).clamp(0, size)
    return torch.cat([low_K2, high_K2], dim=1)


def mix_features(features: Tensor, mix: Mix) -> Tensor:
    """Mixup where the prefix ends: lam * h_i + (1 - lam) * h_partner (manifold mixup, Verma et al., 2019)."""
    weight = mix.label_weight_N.to(features.dtype).view(-1, *[1] * (features.ndim - 1))
    return torch.lerp(features[mix.partner_N], features, weight)


def mixed_targets(labels_N: Tensor, mix: Mix | None, progress: float = 0.0) -> Targets:
    """The labels, with their partners' where images were mixed."""
    if mix is None:
        return Targets(labels_N, progress=progress)
    return Targets(labels_N, labels_N[mix.partner_N], mix.label_weight_N, progress)
