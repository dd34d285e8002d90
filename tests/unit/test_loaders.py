"""DALI and torchvision show the same files the same way, in the same order, and fail alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as v2

from tldist.config import DataConfig, UserError
from tldist.data.batches import BatchPlan, Worker, eval_batches, train_batches
from tldist.data.load.bad_images import DecodeError
from tldist.data.load.loader import Batch, Loader
from tldist.data.load.open import loader_kind, open_loader
from tldist.data.load.torchvision_loader import write_square
from tldist.data.presets import BINS, POLICY_OPS, PRESETS, AugmentSpec, PolicyName, augment_spec
from tldist.data.source.index import Index, build_index

CPU = torch.device("cpu")
SIDE = 40


def opened(root: Path, kind: str, spec: AugmentSpec) -> Loader:
    config = DataConfig(root=str(root), image_size=SIDE, loader=kind, threads=2)  # type: ignore[arg-type]
    return open_loader(config, spec, 16, CPU)


def training(index: Index, spec: AugmentSpec, epoch: int = 0) -> list[BatchPlan]:
    return list(train_batches(index.train, spec, SIDE, 16, 0, epoch, Worker(0, 1)))


def images(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([b.images_NHWC for b in batches]).float()


BASIC = PRESETS["basic"]
# Mean absolute difference of a pixel, in levels of 255: roundings, which policies magnify.
TOLERANCE = {
    "evaluation": (AugmentSpec(), 0.5),
    "basic": (BASIC, 0.5),
    "rotate": (replace(BASIC, rotate_deg=15), 0.8),
    "blur": (replace(BASIC, blur_sigma=(0.1, 2.0)), 0.5),
    "erase": (replace(BASIC, erase=1.0), 0.5),
    "brightness": (replace(BASIC, brightness=0.2), 0.5),
    "saturation": (replace(BASIC, saturation=0.2), 0.5),
    "grey": (replace(BASIC, grey=1.0), 0.5),
    "contrast": (replace(BASIC, contrast=0.2), 0.5),
    "hue": (replace(BASIC, hue=0.1), 0.5),
    "lecture": (PRESETS["lecture"], 0.5),
    "RandAugment": (augment_spec("randaugment,rand-ops=3"), 4.0),
    "TrivialAugment": (PRESETS["trivialaugment"], 1.0),
}


@pytest.mark.parametrize("name", TOLERANCE)
def test_dali_equals_torchvision(photos: Path, name: str) -> None:
    spec, tolerance = TOLERANCE[name]
    index = build_index(photos)
    plans = training(index, spec)
    dali, reference = (list(opened(photos, kind, spec).batches(plans)) for kind in ("dali", "torchvision"))
    assert all(torch.equal(a.labels_N, b.labels_N) for a, b in zip(dali, reference, strict=True))
    difference = (images(dali) - images(reference)).abs().mean(dim=(1, 2, 3))
    assert difference.mean() < tolerance
    # The comparison is not between two blank pictures: another epoch's views differ far more.
    if not spec.deterministic:
        other = images(list(opened(photos, "torchvision", spec).batches(training(index, spec, epoch=1))))
        assert (images(dali) - other).abs().mean() > 10


@pytest.mark.parametrize("kind", ["dali", "torchvision"])
def test_epochs_repeat_and_partial_batches_come_through(photos: Path, kind: str) -> None:
    index = build_index(photos)
    loader = opened(photos, kind, BASIC)
    first = images(list(loader.batches(training(index, BASIC))))
    other = images(list(loader.batches(training(index, BASIC, epoch=1))))
    again = images(list(loader.batches(training(index, BASIC))))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    evaluation = opened(photos, kind, AugmentSpec())
    for world in (1, 2, 3):
        sizes = [
            [len(b.images_NHWC) for b in evaluation.batches(eval_batches(index.val, SIDE, 8, Worker(r, world)))]
            for r in range(world)
        ]
        assert sum(map(sum, sizes)) == 19
    assert list(loader.batches([])) == []
    loader.close()


@pytest.mark.parametrize("kind", ["dali", "torchvision"])
def test_a_consumer_that_stops_early_leaves_nothing_behind(photos: Path, kind: str) -> None:
    index = build_index(photos)
    loader = opened(photos, kind, BASIC)
    started = loader.batches(training(index, BASIC))
    next(started)
    started.close()  # type: ignore[attr-defined]
    plans = training(index, BASIC, epoch=1)
    got = [b.plan.ids_N.tolist() for b in loader.batches(plans)]
    assert got == [p.ids_N.tolist() for p in plans]


@pytest.mark.parametrize("kind", ["dali", "torchvision"])
def test_a_file_that_broke_after_the_check_is_named(photos: Path, tmp_path: Path, kind: str) -> None:
    import shutil

    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    plans = training(build_index(root), BASIC)
    broken = root / plans[0].paths[3]
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DecodeError, match=broken.name):
        list(opened(root, kind, BASIC).batches(plans))


@pytest.mark.parametrize("policy", ["rand", "trivial"])
@pytest.mark.parametrize("op", POLICY_OPS)
def test_each_operation_of_a_policy_is_dalis(photos: Path, policy: PolicyName, op: str) -> None:
    """With either sign, at magnitudes from the first to the last."""
    spec, index = replace(BASIC, policy=policy, rand_ops=1), build_index(photos)
    plan = training(index, spec)[0]
    n = np.arange(len(plan.paths), dtype=np.int32)[:, None]
    views = replace(
        plan.views,
        policy_op_NK=np.full_like(n, POLICY_OPS.index(op)),
        policy_bin_NK=n * (BINS - 1) // len(n),
        policy_sign_NK=n % 2,
    )
    plan = replace(plan, views=views)
    dali, reference = (images(list(opened(photos, kind, spec).batches([plan]))) for kind in ("dali", "torchvision"))
    plain = images(list(opened(photos, "dali", BASIC).batches([plan])))
    assert (dali - reference).abs().mean() < 1.5
    changed = (dali - plain).abs().mean()
    assert changed == 0 if op == "identity" else changed > 1


def test_auto_takes_dali_on_gpus_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert loader_kind(DataConfig(), cuda) == "dali"
    assert loader_kind(DataConfig(), CPU) == "torchvision"
    assert loader_kind(DataConfig(loader="dali"), CPU) == "dali"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert loader_kind(DataConfig(), cuda) == "torchvision"
    with pytest.raises(UserError, match="DALI is not installed"):
        loader_kind(DataConfig(loader="dali"), CPU)


@pytest.mark.parametrize("flip", [False, True])
def test_squares_are_v2s_bit_for_bit(flip: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    for height, width in ((7, 300), (224, 224), (61, 33), (500, 375), (1, 1)):
        image_CHW = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=rng).permute(2, 0, 1)
        crop_CHW = image_CHW[:, : max(1, height - 3), width // 4 :]
        square_HWC = np.empty((56, 56, 3), dtype=np.uint8)
        write_square(square_HWC, crop_CHW, flip)
        expected = v2.resize(crop_CHW, [56, 56], antialias=True)
        expected = v2.horizontal_flip(expected) if flip else expected
        assert np.array_equal(square_HWC, expected.permute(1, 2, 0)), (height, width)
