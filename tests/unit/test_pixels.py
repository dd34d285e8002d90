"""The pixel cache: the same evaluation, one decoding a run, and nothing left behind."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as v2

from tldist import config
from tldist.config import DataConfig, ModelConfig, RunConfig, TrackingConfig, TrainConfig
from tldist.data.augment import draw_views, evaluation_sizes
from tldist.data.batches import BatchPlan, Worker, eval_batches, train_batches
from tldist.data.load import pixels as cache
from tldist.data.load.bad_images import BadImages, DecodeError
from tldist.data.load.decode import read_rgb
from tldist.data.load.loader import Read
from tldist.data.load.open import open_loader
from tldist.data.load.pixels import NAME, Pixels, available_memory, open_pixels
from tldist.data.load.torchvision_loader import TorchvisionLoader
from tldist.data.presets import PRESETS, AugmentSpec
from tldist.data.source.index import Index, build_index
from tldist.train import worker

CPU = torch.device("cpu")
SIDE = 40
SHORT = 46  # round(40 * 256 / 224)
BASIC = PRESETS["basic"]
Kind = Literal["off", "memory", "disk"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large and small photos, some turned by EXIF, a PNG, and a CMYK JPEG that Pillow decodes."""
    root, rng = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    turned = Image.Exif()
    turned[0x0112] = 6
    for folder in ("train/ants", "train/bees", "val/ants", "val/bees"):
        (root / folder).mkdir(parents=True)
        for i, (h, w) in enumerate([(150, 201), (97, 61), (SHORT, 90), (30, 80), (200, 33), (333, 127), (47, 48)]):
            photo = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
            photo.save(root / folder / f"{i}.jpg")
            photo.save(root / folder / f"{i}-turned.jpg", exif=turned)
        photo = Image.fromarray(rng.integers(0, 256, (120, 70, 3), dtype=np.uint8))
        photo.convert("CMYK").save(root / folder / "cmyk.jpg")
        photo.save(root / folder / "portable.png")
    return root


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the cache decoded each file."""
    seen: Counter[str] = Counter()

    def counting(path: Path) -> torch.Tensor:
        seen[path.name] += 1
        return read_rgb(path)

    monkeypatch.setattr(cache, "read_rgb", counting)
    return seen


def settings(root: Path, kind: Kind = "memory") -> DataConfig:
    return DataConfig(root=str(root), image_size=SIDE, threads=2, pixels=kind, batch_size=8)


def shown(root: Path, plans: list[BatchPlan], spec: AugmentSpec, read: Read | None) -> torch.Tensor:
    loader = TorchvisionLoader(root, spec, SIDE, 2, CPU, BadImages(), read)
    try:
        return torch.cat([batch.images_NHWC for batch in loader.batches(plans)])
    finally:
        loader.close()


def training(index: Index, epoch: int = 0) -> list[BatchPlan]:
    return list(train_batches(index.train, BASIC, SIDE, 8, 0, epoch, Worker(0, 1)))


def evaluation(index: Index) -> list[BatchPlan]:
    return list(eval_batches(index.val, SIDE, 8, Worker(0, 1)))


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_evaluation_shows_the_same_bits(mixed: Path, tmp_path: Path, kind: Kind) -> None:
    index = build_index(mixed)
    made = open_pixels(settings(mixed, kind), index, tmp_path, CPU)
    expected = shown(mixed, evaluation(index), AugmentSpec(), None)
    for _ in ("filling", "reading"):
        assert torch.equal(shown(mixed, evaluation(made.index), AugmentSpec(), made.val), expected)
    assert made.index.fingerprint == index.fingerprint
    assert made.index.val.paths == index.val.paths


def test_what_is_kept_is_shrunk_and_never_enlarged(mixed: Path, tmp_path: Path) -> None:
    index = build_index(mixed)
    made = open_pixels(settings(mixed), index, tmp_path, CPU)
    before, after = index.train.sizes_N2, made.index.train.sizes_N2
    large = before.min(axis=1) > SHORT
    assert 0 < large.sum() < len(large)
    assert (after[large].min(axis=1) == SHORT).all()
    assert np.array_equal(after[~large], before[~large])
    np.testing.assert_allclose(after[large].max(1) / SHORT, before[large].max(1) / before[large].min(1), rtol=1 / SHORT)
    assert made.train is not None
    for i, path in enumerate(index.train.paths):
        image = made.train(i, mixed / path, [0, 0, *after[i].tolist()])
        assert list(image.shape[1:]) == after[i].tolist()
        assert image.permute(1, 2, 0).is_contiguous()  # what torch resizes fastest


def test_a_kept_size_is_what_evaluation_resizes_to() -> None:
    sides = np.random.default_rng(0).integers(1, 3000, (20_000, 2)).astype(np.int32)
    for image_size in (1, 32, 96, 224, 600):
        once = np.minimum(evaluation_sizes(sides, image_size), sides)
        assert np.array_equal(evaluation_sizes(once, image_size), evaluation_sizes(sides, image_size))


def test_crops_are_drawn_on_what_is_kept(mixed: Path, tmp_path: Path) -> None:
    made = open_pixels(settings(mixed), build_index(mixed), tmp_path, CPU)
    plans = training(made.index)
    for plan in plans:
        views = draw_views(BASIC, made.index.train.sizes_N2[plan.ids_N], SIDE, 0, 0, plan.ids_N)
        assert np.array_equal(plan.views.box_N4, views.box_N4)
        box, size = plan.views.box_N4, made.index.train.sizes_N2[plan.ids_N]
        assert (box[:, :2] + box[:, 2:] <= size).all()
    assert made.train is not None
    boxes = [[0, 0, *size] for size in made.index.train.sizes_N2.tolist()]
    kept = [made.train(i, mixed / path, boxes[i]).clone() for i, path in enumerate(made.index.train.paths)]
    from_copies = shown(mixed, plans, BASIC, lambda position, _, box: v2.crop(kept[position], *box))
    assert torch.equal(shown(mixed, plans, BASIC, made.train), from_copies)
    assert not torch.equal(shown(mixed, training(made.index, epoch=1), BASIC, made.train), from_copies)


def test_each_file_is_decoded_once(photos: Path, tmp_path: Path, decoded: Counter[str]) -> None:
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    made = open_pixels(settings(root), build_index(root), tmp_path, CPU)
    first = shown(root, training(made.index), BASIC, made.train)
    assert decoded.total() == 40
    shutil.rmtree(root)
    shown(root, training(made.index, epoch=1), BASIC, made.train)
    assert torch.equal(shown(root, training(made.index), BASIC, made.train), first)
    assert decoded.total() == 40


@pytest.mark.parametrize("damage", ["truncated", "another size"])
def test_a_file_that_changed_after_the_check_is_named(photos: Path, tmp_path: Path, damage: str) -> None:
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    made = open_pixels(settings(root), build_index(root), tmp_path, CPU)
    plans = training(made.index)
    broken = root / plans[0].paths[3]
    if damage == "truncated":
        broken.write_bytes(broken.read_bytes()[:200])
    else:
        Image.new("RGB", (40, 41)).save(broken)
    with pytest.raises(DecodeError, match=broken.name):
        shown(root, plans, BASIC, made.train)


def test_the_loader_reads_from_it_whatever_the_kind(photos: Path, tmp_path: Path, decoded: Counter[str]) -> None:
    data = replace(settings(photos), loader="dali")
    made = open_pixels(data, build_index(photos), tmp_path, CPU)
    loader = open_loader(data, BASIC, 8, CPU, made.train)
    assert len(list(loader.batches(training(made.index)))) == 5
    loader.close()
    assert decoded.total() == 40
    uncached = open_pixels(replace(data, pixels="off"), build_index(photos), tmp_path, CPU)
    assert (uncached.train, uncached.val, uncached.notice) == (None, None, None)


def without_room(root: Path, kind: Kind, tmp_path: Path) -> str:
    index = build_index(root)
    made = open_pixels(settings(root, kind), index, tmp_path, CPU)
    assert made == Pixels(index, notice=made.notice)
    assert made.notice is not None
    return made.notice


def test_where_it_does_not_fit_a_sentence_says_so(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = build_index(photos)
    needed = 59 + 3 * sum(int(cache._kept(split, SIDE).sizes_N2.prod(1).sum()) for split in (index.train, index.val))
    monkeypatch.setattr(cache, "_gib", lambda num_bytes: f"{num_bytes} B")
    monkeypatch.setattr(cache, "available_memory", lambda: 2 * needed - 2)
    assert without_room(photos, "memory", tmp_path) == (
        f"--data.pixels memory is off: it needs {needed} B and may use {needed - 1} B, half of what is available. "
        "Every epoch decodes all files now: to change that, use --data.pixels disk or a smaller --data.image-size"
    )
    monkeypatch.setattr(cache, "available_memory", lambda: 2 * needed)
    assert open_pixels(settings(photos), index, tmp_path, CPU).notice is None
    usage = shutil.disk_usage(tmp_path)._replace(free=7)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert f"it needs {needed} B and {tmp_path} has 7 B." in without_room(photos, "disk", tmp_path)


def test_a_quota_and_another_system_are_sentences_too(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = descriptors()
    assert "(Disk quota exceeded)" in without_room(photos, "disk", tmp_path)
    assert descriptors() == before
    monkeypatch.setattr("sys.platform", "darwin")
    assert "is off: it needs Linux." in without_room(photos, "memory", tmp_path)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_control_groups_limit_what_is_available(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", "MemTotal:  900 kB\nMemAvailable:  800 kB\nHugePages_Total: 0\n")
    assert available_memory(tmp_path) == 800 * 1024
    # Version 2, as Slurm uses it: the job is limited, the task below it is not.
    write("proc/self/cgroup", "5:devices:/\n0::/job/task\n")
    for folder, limit in (("job", "5000"), ("job/task", "max")):
        write(f"sys/fs/cgroup/{folder}/memory.max", limit + "\n")
        write(f"sys/fs/cgroup/{folder}/memory.current", "3000\n")
        write(f"sys/fs/cgroup/{folder}/memory.stat", "anon 1\ninactive_file 400\nactive_file 30\n")
    assert available_memory(tmp_path) == 2430
    write("proc/self/cgroup", "4:memory:/job\n")
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "4000\n")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "3000\n")
    write("sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 400\ntotal_active_file 30\n")
    assert available_memory(tmp_path) == 1430


@pytest.fixture
def run_settings(photos: Path, tmp_path: Path) -> Iterator[RunConfig]:
    yield RunConfig(
        run_dir=str(tmp_path),
        model=ModelConfig(weights="none"),
        data=replace(settings(photos), image_size=32),
        train=TrainConfig(epochs=2),
        tracking=TrackingConfig(wandb="disabled"),
    )


def test_a_whole_run_decodes_once_and_gives_its_memory_back(run_settings: RunConfig, decoded: Counter[str]) -> None:
    assert worker.run(config.to_json(run_settings))["epochs"] == 2
    assert decoded.total() == 40 + 19
    gc.collect()
    assert NAME not in Path("/proc/self/maps").read_text()


def test_a_run_without_room_trains_on_and_says_so(
    run_settings: RunConfig, decoded: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "available_memory", lambda: 0)
    assert worker.run(config.to_json(run_settings))["epochs"] == 2
    assert decoded.total() == 0
    rows = map(json.loads, (Path(run_settings.run_dir) / "metrics.jsonl").read_text().splitlines())
    assert [row["text"] for row in rows if "pixels" in row.get("text", "")] == [
        open_pixels(run_settings.data, build_index(run_settings.data.root), Path(run_settings.run_dir), CPU).notice
    ]
