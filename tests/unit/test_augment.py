"""The numbers behind augmentation: pure, independent, and distributed as torchvision's."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from tldist.data.augment import PRESETS, AugmentSpec, draw_views, random_boxes, uniforms
from tldist.data.batches import Worker, eval_batches, steps_per_epoch, train_batches
from tldist.data.index import Split

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
