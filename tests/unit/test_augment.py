"""The numbers behind augmentation: pure, independent, and distributed as torchvision's."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite
from nvidia.dali.auto_aug.trivial_augment import get_trivial_augment_wide_suite
from scipy import stats
from torchvision.transforms import v2

from tldist.config import DataConfig, RunConfig, UserError
from tldist.data.augment import draw_views, random_boxes, uniforms
from tldist.data.batches import Worker, eval_batches, steps_per_epoch, train_batches
from tldist.data.load.torchvision_loader import show
from tldist.data.presets import (
    BINS,
    POLICY_OPS,
    PRESETS,
    SIGNED_OPS,
    AugmentSpec,
    PolicyName,
    augment_spec,
    magnitude_range,
)
from tldist.data.source.index import Split
from tldist.rules import validate

SIZES = np.array([[375, 500]])


def same_distribution(ours_N: np.ndarray, theirs_N: np.ndarray) -> bool:
    """Two-sample Kolmogorov-Smirnov; fixed seeds, so it passes always or never."""
    result: Any = stats.ks_2samp(ours_N, theirs_N)
    return result.pvalue > 0.001


def test_uniforms_are_uniform_and_independent_of_their_neighbours() -> None:
    many = uniforms(3, 1, np.arange(20_000), 4)
    assert all(stats.kstest(many[:, k], "uniform").pvalue > 0.001 for k in range(4))
    assert np.abs(np.corrcoef(many.T) - np.eye(4)).max() < 0.03
    assert np.array_equal(many[[7, 123]], uniforms(3, 1, np.array([7, 123]), 4))
    assert abs(np.corrcoef(many[:, 0], uniforms(3, 2, np.arange(20_000), 4)[:, 0])[0, 1]) < 0.03
    assert abs(np.corrcoef(many[:, 0], uniforms(4, 1, np.arange(20_000), 4)[:, 0])[0, 1]) < 0.03


def test_crop_boxes_follow_torchvisions_distribution() -> None:
    """Two-sample tests on height, width, place and share against RandomResizedCrop.get_params."""
    ids, scale, ratio = np.arange(4000), (0.08, 1.0), (3 / 4, 4 / 3)
    ours = random_boxes(np.repeat(SIZES, len(ids), 0), uniforms(0, 0, ids, 22), scale, ratio)
    torch.manual_seed(0)
    transform, image = v2.RandomResizedCrop(224, scale, ratio), torch.zeros(3, 375, 500)
    drawn = [transform.make_params([image]) for _ in ids]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in drawn])
    for column in range(4):
        assert same_distribution(ours[:, column], theirs[:, column]), column
    assert same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])


@pytest.mark.parametrize("size", [(1, 1), (3, 4000), (4000, 3), (375, 500)])
def test_boxes_lie_inside_any_image(size: tuple[int, int]) -> None:
    ids = np.arange(500)
    views = draw_views(PRESETS["lecture"], np.repeat([size], 500, 0), 64, 0, 0, ids)
    top, left, height, width = views.box_N4.T
    assert (height > 0).all()
    assert (width > 0).all()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= size[0]).all()
    assert (left + width <= size[1]).all()


def test_the_lecture_preset_draws_what_lecture_7_2_says() -> None:
    ids = np.arange(8000)
    v = draw_views(PRESETS["lecture"], np.repeat(SIZES, len(ids), 0), 96, 0, 0, ids)
    share = v.box_N4[:, 2] * v.box_N4[:, 3] / (375 * 500)
    assert 0.79 < share.min() < share.max() <= 1.0
    assert abs(v.flip_N.mean() - 0.5) < 0.03
    assert stats.kstest(v.angle_N, stats.uniform(-15, 30).cdf).pvalue > 0.001
    assert stats.kstest(v.brightness_N, stats.uniform(0.8, 0.4).cdf).pvalue > 0.001
    assert stats.kstest(v.hue_N, stats.uniform(-36, 72).cdf).pvalue > 0.001
    assert stats.kstest(v.blur_sigma_N, stats.uniform(0.1, 1.9).cdf).pvalue > 0.001
    assert abs((v.saturation_N == 0).mean() - 0.1) < 0.015
    erased = v.erase_N4[:, 2] > 0
    assert abs(erased.mean() - 0.2) < 0.02
    area = (v.erase_N4[:, 2] * v.erase_N4[:, 3])[erased] / 96**2
    assert 0.015 < area.min() < area.max() < 0.16


def photo(side: int = 24) -> torch.Tensor:
    """Red from left to right, green from top to bottom."""
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    return (torch.stack([0.35 + 0.4 * x, 0.3 + 0.3 * y, 0.45 - 0.2 * x]) * 255).to(torch.uint8)


def jittered(spec: AugmentSpec, images: int) -> np.ndarray:
    """The statistics of `photo` as `spec` shows it, uncropped."""
    spec = replace(spec, crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    views = draw_views(spec, np.full((images, 2), 24), 24, 0, 0, np.arange(images))
    return np.array([colour_statistics(show(photo(), views[i], spec, 24)) for i in range(images)])


def colour_statistics(image_CHW: torch.Tensor) -> list[float]:
    """(mean grey, its spread, mean distance from grey, hue's angle in degrees, all in YIQ)."""
    luma, i, q = torch.tensordot(
        torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]]),
        image_CHW.float(),
        dims=1,
    )
    i, q = i.mean(), q.mean()
    return [luma.mean().item(), luma.std().item(), torch.hypot(i, q).item(), torch.rad2deg(torch.atan2(q, i)).item()]


def test_colour_statistics_follow_torchvisions_jitter() -> None:
    """Two-sample tests of the pictures' mean, contrast and saturation against the lecture's ColorJitter."""
    torch.manual_seed(0)
    jitter = v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2)
    theirs = np.array([colour_statistics(jitter(photo())) for _ in range(1500)])
    ours = jittered(AugmentSpec(brightness=0.2, contrast=0.2, saturation=0.2), 1500)
    less = jittered(AugmentSpec(brightness=0.15, contrast=0.15, saturation=0.15), 1500)
    for k, name in enumerate(("mean", "spread", "chroma")):
        assert same_distribution(ours[:, k], theirs[:, k]), name
        assert not same_distribution(less[:, k], theirs[:, k]), name


def test_hue_turns_as_far_as_torchvisions() -> None:
    """By the same angle but in YIQ, which keeps the brightness that HSV's turn changes."""
    spec = AugmentSpec(hue=0.1)
    views = draw_views(spec, np.full((200, 2), 24), 24, 0, 0, np.arange(200))
    ours, before = jittered(spec, 200), colour_statistics(photo())
    turned = before[3] - ours[:, 3]
    assert np.abs(turned - views.hue_N).max() < 1
    assert np.abs(ours[:, 0] - before[0]).max() < 0.5
    theirs = [colour_statistics(v2.functional.adjust_hue(photo(), float(h) / 360))[3] for h in views.hue_N]
    assert np.abs(ours[:, 3] - theirs).mean() < 10
    assert np.corrcoef(ours[:, 3], theirs)[0, 1] > 0.98


def test_policies_draw_as_their_papers_say() -> None:
    """RandAugment: N operations, each equally likely, at one magnitude. TrivialAugment: one, at any magnitude."""
    ids = np.arange(6000)
    rand = draw_views(augment_spec("randaugment,rand-ops=3"), np.repeat(SIZES, len(ids), 0), 96, 0, 0, ids)
    trivial = draw_views(PRESETS["trivialaugment"], np.repeat(SIZES, len(ids), 0), 96, 0, 0, ids)
    assert rand.policy_op_NK.shape == (6000, 3)
    assert trivial.policy_op_NK.shape == (6000, 1)
    for ops in (*rand.policy_op_NK.T, *trivial.policy_op_NK.T):
        assert stats.chisquare(np.bincount(ops, minlength=len(POLICY_OPS))).pvalue > 0.001
    assert (rand.policy_bin_NK == 9).all()
    assert stats.chisquare(np.bincount(trivial.policy_bin_NK[:, 0], minlength=BINS)).pvalue > 0.001
    assert abs(rand.policy_sign_NK.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(rand.policy_op_NK.T) - np.eye(3)).max() < 0.05
    plain = draw_views(PRESETS["basic"], np.repeat(SIZES, len(ids), 0), 96, 0, 0, ids)
    assert np.array_equal(plain.box_N4, rand.box_N4)  # a policy moves no other choice


def test_the_policies_ranges_are_dalis() -> None:
    rand, wide = get_rand_augment_suite(use_shape=True), get_trivial_augment_wide_suite(max_translate_abs=32)
    suites: tuple[tuple[PolicyName, Any], ...] = (("rand", rand), ("trivial", wide))
    for policy, suite in suites:
        assert tuple(op.name for op in suite) == POLICY_OPS
        for op in suite:
            low, high = magnitude_range(policy, op.name, 1)
            assert (low, high) == pytest.approx(op.mag_range or (0, 0))
            assert op.randomly_negate == (op.name in SIGNED_OPS)


def test_switches_replace_single_ranges_of_a_preset() -> None:
    assert augment_spec("lecture") == PRESETS["lecture"]
    made = augment_spec("lecture, rotate-deg=30, crop-area=0.5:1, hue=off, blur-sigma=off, policy=rand, rand-ops=3")
    wanted = replace(PRESETS["lecture"], rotate_deg=30.0, crop_area=(0.5, 1.0), hue=0.0, blur_sigma=None)
    assert made == replace(wanted, policy="rand", rand_ops=3)
    assert augment_spec("basic,crop-area=off,flip=off").deterministic


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lectur", "is no preset .did you mean 'lecture'"),
        ("", "is no preset"),
        ("basic,rotat=3", "no switch 'rotat' .did you mean 'rotate-deg'"),
        ("basic,flip", "flip needs a value"),
        ("basic,flip=often", "flip=often is not one number from 0 to 1"),
        ("basic,flip=1.5", "flip=1.5 is not one number from 0 to 1"),
        ("basic,flip=nan", "flip=nan is not one number"),
        ("basic,crop-area=0.5", "crop-area=0.5 is not LOW:HIGH"),
        ("basic,crop-area=1:0.5", "crop-area=1:0.5 is not LOW:HIGH"),
        ("basic,rand-ops=1.5", "rand-ops=1.5 is not a whole number from 1 to 14"),
        ("basic,policy=auto", "policy 'auto' is not known: give none, rand, trivial"),
    ],
)
def test_a_switch_that_cannot_be_is_refused_in_a_sentence(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        augment_spec(text)
    with pytest.raises(UserError, match=says):
        validate(RunConfig(data=DataConfig(augment=text)))


def test_only_the_evaluation_crop_is_deterministic() -> None:
    assert AugmentSpec().deterministic
    assert [name for name, spec in PRESETS.items() if spec.deterministic] == ["none"]
    first, second = (draw_views(PRESETS["none"], SIZES, 96, 0, epoch, np.array([3])) for epoch in (0, 1))
    assert np.array_equal(first.crop_N2, second.crop_N2)
    before, after = (draw_views(PRESETS["basic"], SIZES, 96, 0, epoch, np.array([3])).box_N4 for epoch in (0, 1))
    assert not np.array_equal(before, after)


def split(images: int) -> Split:
    return Split(
        tuple(f"train/a/{i:04d}.jpg" for i in range(images)),
        np.arange(images) % 3,
        np.tile([[50, 60]], (images, 1)).astype(np.int32),
    )


@pytest.mark.parametrize("world", [1, 2, 4])
def test_workers_share_each_step_of_one_order(world: int) -> None:
    """The images of step s are the same for any number of workers; no image comes twice in an epoch."""

    def steps(size: int) -> list[list[int]]:
        parts = [
            [p.ids_N.tolist() for p in train_batches(split(50), PRESETS["basic"], 32, 8, 5, 2, Worker(r, size))]
            for r in range(size)
        ]
        return [list(chain.from_iterable(step)) for step in zip(*parts, strict=True)]

    assert steps(world) == steps(1)
    seen = list(chain.from_iterable(steps(world)))
    assert len(seen) == len(set(seen)) == 8 * steps_per_epoch(50, 8)
    first = next(train_batches(split(50), PRESETS["basic"], 32, 8, 5, 3, Worker(0, 1)))
    assert first.ids_N.tolist() != steps(1)[0]


@pytest.mark.parametrize("world", [1, 2, 3, 7, 200])
def test_evaluation_takes_each_image_once(world: int) -> None:
    seen = [i for r in range(world) for p in eval_batches(split(153), 32, 10, Worker(r, world)) for i in p.ids_N]
    assert sorted(seen) == list(range(153))
