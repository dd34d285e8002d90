"""Mixup and CutMix as drawn on the device, against their papers' formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats

from tldist.config import DataConfig
from tldist.data.mixing import Mix, draw_mix, mixed_targets, step_generator
from tldist_kernels import mix_normalize, mixed_cross_entropy

CPU = torch.device("cpu")


def draw(step: int = 0, n: int = 7, **options: Any) -> Mix:
    mix = draw_mix(DataConfig(image_size=32, **options), n, step_generator(CPU, 1, step, 0))
    assert mix is not None
    return mix


def test_off() -> None:
    assert draw_mix(DataConfig(), 4, step_generator(CPU, 0, 0, 0)) is None


def test_a_pure_function_of_seed_step_and_rank() -> None:
    a, b = draw(3, mixup=0.2, cutmix=1.0), draw(3, mixup=0.2, cutmix=1.0)
    assert torch.equal(a.partner_N, b.partner_N)
    assert torch.equal(a.boxes_N4, b.boxes_N4)
    assert not torch.equal(a.partner_N, draw(4, mixup=0.2).partner_N)
    states = {step_generator(CPU, *key).initial_seed() for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len(states) == 4


@pytest.mark.parametrize("n", [1, 2, 7, 33])
def test_mixup_against_a_plain_loop(n: int) -> None:
    """x = lam x_i + (1 - lam) x_j and the loss likewise, for any batch size."""
    mix = draw(n=n, mixup=0.4)
    images = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8)
    labels = torch.randint(0, 5, (n,))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    kept = images.clone()
    ours = mix_normalize(
        images,
        mean,
        std,
        torch.float32,
        partner_N=mix.partner_N,
        weight_N=mix.weight_N,
        boxes_N4=mix.boxes_N4,
    )
    assert torch.equal(images, kept)
    targets, logits = mixed_targets(labels, mix), torch.randn(n, 5)
    losses = mixed_cross_entropy(logits, targets.labels_N, targets.partner_labels_N, targets.weight_N)
    for i in range(n):
        j, lam = int(mix.partner_N[i]), float(mix.weight_N[i])
        x = lam * images[i].double() + (1 - lam) * images[j].double()
        x = (x / 255 - torch.tensor(mean).double()) / torch.tensor(std).double()
        torch.testing.assert_close(ours[i], x.permute(2, 0, 1).float(), rtol=1e-4, atol=1e-4)
        log_p = logits[i].log_softmax(0)
        expected = -(lam * log_p[labels[i]] + (1 - lam) * log_p[labels[j]])
        torch.testing.assert_close(losses[i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 7])
def test_cutmix_against_a_plain_loop(n: int) -> None:
    """A box of the partner is pasted; the label's weight is one minus the clipped box's share."""
    for step in range(20):
        mix = draw(step, n=n, cutmix=1.0)
        images = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8)
        ours = mix_normalize(
            images,
            (0, 0, 0),
            (1, 1, 1),
            torch.float32,
            partner_N=mix.partner_N,
            weight_N=mix.weight_N,
            boxes_N4=mix.boxes_N4,
        )
        for i in range(n):
            top, left, bottom, right = mix.boxes_N4[i].tolist()
            expected = images[i].clone()
            expected[top:bottom, left:right] = images[mix.partner_N[i], top:bottom, left:right]
            torch.testing.assert_close(ours[i], expected.permute(2, 0, 1) / 255.0)
            share = (bottom - top) * (right - left) / 32**2
            assert float(mix.label_weight_N[i]) == pytest.approx(1 - share)


def test_lambda_follows_the_beta_distribution() -> None:
    lams = [float(draw(step, n=2, mixup=0.4).weight_N[0]) for step in range(2000)]
    assert stats.kstest(lams, stats.beta(0.4, 0.4).cdf).pvalue > 0.001


@pytest.mark.parametrize("per", ["batch", "image"])
@pytest.mark.parametrize(("share", "probability"), [(0.5, 1.0), (0.2, 0.6)])
def test_coins_fall_as_often_as_was_said(per: str, share: float, probability: float) -> None:
    """Per batch all images share a draw; per image each has its own."""
    chosen: dict[str, Any] = {"cutmix_share": share, "mix_probability": probability, "mix_per": per}
    batches = [draw(step, n=4, mixup=1.0, cutmix=1.0, **chosen) for step in range(1000)]
    images = [0, 1, 2, 3] if per == "image" else [0]
    mixed = torch.stack([b.label_weight_N < 1 for b in batches])
    cut = torch.stack([(b.weight_N == 0) & (b.label_weight_N < 1) for b in batches])
    assert bool((cut == cut[:, :1]).all()) == (per == "batch")
    for i in images:
        assert abs(mixed[:, i].float().mean() - probability) < 0.05
        assert abs(cut[:, i].float().mean() / mixed[:, i].float().mean() - share) < 0.06
    lams = [float(b.weight_N[i]) for b in batches for i in images if 0 < b.weight_N[i] < 1]
    assert stats.kstest(lams, "uniform").pvalue > 0.001


@pytest.mark.parametrize("per", ["batch", "image"])
def test_labels_weigh_what_is_seen(per: Any) -> None:
    """A white image among black ones: the share of white is the weight of its label."""
    images = torch.zeros(5, 32, 32, 3, dtype=torch.uint8)
    images[2] = 255
    for step in range(50):
        mix = draw(step, n=5, mixup=0.4, cutmix=1.0, mix_per=per, mix_probability=0.8)
        arguments: dict[str, Any] = {"partner_N": mix.partner_N, "weight_N": mix.weight_N, "boxes_N4": mix.boxes_N4}
        shown = mix_normalize(images, (0, 0, 0), (1, 1, 1), torch.float32, **arguments).mean(dim=(1, 2, 3))
        targets = mixed_targets(torch.tensor([0, 0, 1, 0, 0]), mix)
        assert targets.partner_labels_N is not None
        assert targets.weight_N is not None
        white = targets.labels_N * targets.weight_N + targets.partner_labels_N * (1 - targets.weight_N)
        torch.testing.assert_close(shown, white, rtol=0, atol=1e-5)
