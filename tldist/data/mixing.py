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
    """One lambda for the batch, a random partner for each of n images; None when mixing is off.

    Mixup (Zhang et al., 2018): lambda ~ Beta(alpha, alpha) over the whole image. CutMix (Yun et al., 2019): a box
    of area share 1 - lambda, its centre uniform, clipped at the border. With both on, a fair coin decides.
    """
    if not (config.mixup or config.cutmix):
        return None
    device, size = generator.device, config.image_size
    partner = torch.randperm(n, generator=generator, device=device)
    # No tensor is made from Python numbers here: on a GPU that would be a copy the host waits for.
    share_cut = 0.5 if config.mixup and config.cutmix else float(config.cutmix > 0)
    cut = torch.rand((), generator=generator, device=device) < share_cut
    lam = torch.where(cut, _beta(config.cutmix, generator), _beta(config.mixup, generator))
    whole = torch.arange(4, device=device).div(2, rounding_mode="floor") * size  # 0, 0, size, size
    box = torch.where(cut, _cut_box(lam, size, generator), whole)
    area = ((box[2] - box[0]) * (box[3] - box[1])).float() / (size * size)
    weight = torch.where(cut, torch.zeros_like(lam), lam)
    label_weight = torch.where(cut, 1 - area, lam)
    return Mix(partner, weight.expand(n), box.int().expand(n, 4).contiguous(), label_weight.expand(n))


def _beta(alpha: float, generator: torch.Generator) -> Tensor:
    """One draw of Beta(alpha, alpha); 1 when alpha is 0. torch.distributions cannot take a generator, its op can."""
    if not alpha:
        return torch.ones((), device=generator.device)
    both = torch.full((2,), alpha, device=generator.device)
    return torch._sample_dirichlet(both, generator=generator)[0]  # pyright: ignore[reportPrivateImportUsage]


def _cut_box(lam: Tensor, size: int, generator: torch.Generator) -> Tensor:
    side = (size * torch.sqrt(1 - lam)).long()
    centre = torch.randint(size, (2,), generator=generator, device=lam.device)
    low = (centre - side // 2).clamp(0, size)
    high = (centre - side // 2 + side).clamp(0, size)
    return torch.cat([low, high])


def mix_features(features: Tensor, mix: Mix) -> Tensor:
    """Mixup where the prefix ends: lam * h_i + (1 - lam) * h_partner (manifold mixup, Verma et al., 2019)."""
    weight = mix.label_weight_N.to(features.dtype).view(-1, *[1] * (features.ndim - 1))
    return torch.lerp(features[mix.partner_N], features, weight)


def mixed_targets(labels_N: Tensor, mix: Mix | None) -> Targets:
    """The labels, with their partners' where images were mixed."""
    if mix is None:
        return Targets(labels_N)
    return Targets(labels_N, labels_N[mix.partner_N], mix.label_weight_N)
