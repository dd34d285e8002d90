"""Tar shards: the folder's pixels through both loaders, an order that reads them nearly in sequence, honest errors."""

from __future__ import annotations

import errno
import functools
import gzip
import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import write_images
from PIL import Image

from tldist import config
from tldist.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    StrategyConfig,
    TrackingConfig,
    TrainConfig,
    UserError,
)
from tldist.data.batches import BatchPlan, Worker, eval_batches, num_lanes, shard_order, train_batches, train_ids
from tldist.data.load.bad_images import DecodeError
from tldist.data.load.decode import read_rgb
from tldist.data.load.open import open_loader
from tldist.data.load.pixels import open_pixels
from tldist.data.make import sharding
from tldist.data.make.sharding import write_shards
from tldist.data.presets import PRESETS, AugmentSpec
from tldist.data.source import shards
from tldist.data.source.index import Index, Split, build_index, load_index, save_index, with_train_subset
from tldist.data.source.shards import MANIFEST, Members, read_path
from tldist.report import run_page as report
from tldist.train import fit, worker
from tldist_launcher.cli import main

CPU = torch.device("cpu")
SIDE = 40
BASIC = PRESETS["basic"]
PER_SHARD = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of two classes: large and small, turned by EXIF, a PNG, names that need care, and a file to skip."""
    root, rng, turned = tmp_path_factory.mktemp("folder"), np.random.default_rng(0), Image.Exif()
    turned[0x0112] = 6
    for where in ("train/ants", "train/bees/2024", "val/ants", "val/bees"):
        (root / where).mkdir(parents=True)
        for i, (h, w) in enumerate([(150, 201), (97, 61), (46, 90), (30, 80), (64, 64), (133, 70)]):
            photo = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
            photo.save(root / where / f"{i}.jpg")
            photo.save(root / where / f"{i}.turned.JPG", exif=turned)
        photo = Image.fromarray(rng.integers(0, 256, (120, 70, 3), dtype=np.uint8))
        photo.save(root / where / "0.png")
    (root / "train" / "ants" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    return root


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder as shards, its files as they are."""
    out = tmp_path_factory.mktemp("packed") / "shards"
    write_shards(build_index(folder), out, images_per_shard=PER_SHARD)
    return out


def copied(root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(root, tmp_path / "copy"))


def key(path: str) -> str:
    """What a file and its copy in a shard have in common: train/ants/0_turned."""
    split, rest = path.split("/", 1)
    stem = rest.rpartition(".")[0].replace(".", "_")
    return f"{split.partition('-')[0]}/{stem.removesuffix('-2')}{Path(path).suffix.lower()}"


def same_images(folder: Split, packed: Split) -> np.ndarray:
    """Position in the folder's split -> the image's position in the shards'."""
    place = {key(path): i for i, path in enumerate(packed.paths)}
    return np.array([place[key(path)] for path in folder.paths])


def shown(root: Path, kind: str, plans: list[BatchPlan], spec: AugmentSpec = BASIC, read: Any = None) -> torch.Tensor:
    settings = DataConfig(root=str(root), image_size=SIDE, threads=2, loader=kind)  # type: ignore[arg-type]
    loader = open_loader(settings, spec, 8, CPU, read)
    try:
        return torch.cat([batch.images_NHWC for batch in loader.batches(plans)])
    finally:
        loader.close()


# Folder -> shards -> the same


def test_shards_hold_what_the_folder_holds(folder: Path, packed: Path) -> None:
    files, tars = build_index(folder), build_index(packed)
    assert tars.classes == files.classes
    assert [item.path for item in files.skipped] == ["train/ants/cut.jpg"]
    assert tars.skipped == ()
    for before, after in ((files.train, tars.train), (files.val, tars.val)):
        order = same_images(before, after)
        assert sorted(order) == list(range(len(before))) == list(range(26))
        assert len(set(after.paths)) == len(after)
        assert np.array_equal(after.take(order).labels_N, before.labels_N)
        assert np.array_equal(after.take(order).sizes_N2, before.sizes_N2)
        for i, path in zip(order, before.paths, strict=True):
            assert after.members is not None
            bits = shards.read_bytes(after.members.place(packed, int(i))).tobytes()
            assert bits == (folder / path).read_bytes() == read_path(packed / after.paths[i])
    assert "train-000000.tar" in tars.train.paths[0]


def test_the_tars_are_what_webdataset_reads(packed: Path) -> None:
    index = build_index(packed)
    for tar in sorted(packed.glob("*.tar")):
        with tarfile.open(tar) as archive:
            names = archive.getnames()
        assert len(names) % 2 == 0
        assert len(names) <= 2 * PER_SHARD
        for image, label in zip(names[::2], names[1::2], strict=True):
            stem, _, extension = image.rpartition(".")
            assert (label, "." in stem, extension in ("jpg", "png")) == (f"{stem}.cls", False, True)
            text = read_path(tar / label).decode()
            assert index.classes[int(text)] == image.split("/")[0]
    labels = index.train.labels_N
    assert 5 < np.count_nonzero(np.diff(labels)) < len(labels) - 1  # the classes are mixed


def test_the_same_seed_writes_the_same_bytes(folder: Path, packed: Path, tmp_path: Path) -> None:
    index = build_index(folder)
    write_shards(index, tmp_path / "again", images_per_shard=PER_SHARD)
    for path in packed.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    write_shards(index, tmp_path / "other", images_per_shard=PER_SHARD, seed=1)
    assert build_index(tmp_path / "other").train.paths != build_index(packed).train.paths


@pytest.mark.parametrize("kind", ["dali", "torchvision"])
def test_both_loaders_show_the_folder_s_pixels(folder: Path, packed: Path, kind: str) -> None:
    files, tars = build_index(folder), build_index(packed)
    order = same_images(files.train, tars.train)
    plans = list(train_batches(files.train, BASIC, SIDE, 8, 0, 0, Worker(0, 1)))
    assert tars.train.members is not None
    moved = [replace(plan, members=tars.train.members.take(order[plan.ids_N])) for plan in plans]
    expected = shown(folder, kind, plans)
    assert len(expected) == 24
    assert torch.equal(shown(packed, kind, moved), expected)
    assert not torch.equal(shown(packed, kind, moved[::-1]), expected)


def test_many_threads_read_while_tars_are_opened_and_forgotten(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors are shared, and closed when the cache is full: never under a reader, and none is left open."""
    monkeypatch.setattr(shards, "_opened", functools.lru_cache(maxsize=1)(shards._Opened))
    members, before = build_index(packed).train.members, len(list(Path("/proc/self/fd").iterdir()))
    assert members is not None
    places = [members.place(packed, i) for i in range(26)]
    expected = [zlib.crc32(shards.read_bytes(place).tobytes()) for place in places]
    ids = np.random.default_rng(0).integers(0, 26, 4000).tolist()
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda i: zlib.crc32(shards.read_bytes(places[i]).tobytes()), ids))
    assert found == [expected[i] for i in ids]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


def test_a_smaller_copy(folder: Path, tmp_path: Path) -> None:
    """Short sides of 64, upright, and nearly the pixels of scaling; what is small already keeps its bytes."""
    files = build_index(folder)
    written = write_shards(files, tmp_path / "out", size=64)
    tars = build_index(tmp_path / "out")
    assert (written.images, written.shards) == (52, 2)
    assert written.bytes_after == sum(tar.stat().st_size for tar in (tmp_path / "out").glob("*.tar"))
    assert written.bytes_before == sum((folder / path).stat().st_size for path in files.train.paths + files.val.paths)
    place = {key(path).rpartition(".")[0]: i for i, path in enumerate(tars.train.paths) if "-2." not in path}
    large = 0
    for (height, width), path in zip(files.train.sizes_N2.tolist(), files.train.paths, strict=True):
        if path.endswith("0.png"):
            continue  # its key is 0-2
        i, members = place[key(path).rpartition(".")[0]], tars.train.members
        assert members is not None
        size, member = tars.train.sizes_N2[i].tolist(), members.place(tmp_path / "out", i)
        if min(height, width) <= 64:
            assert size == [height, width]
            assert shards.read_bytes(member).tobytes() == (folder / path).read_bytes()
            continue
        large += 1
        assert size == [round(64 * height / min(height, width)), round(64 * width / min(height, width))]
        with Image.open(io.BytesIO(shards.read_bytes(member).tobytes())) as image:
            assert (image.format, image.getexif().get(0x0112), [image.height, image.width]) == ("JPEG", None, size)
        original = read_rgb(folder / path)[None].float()
        scaled = torch.nn.functional.interpolate(original, size, mode="bilinear", antialias=True)[0]
        assert (read_rgb(member).float() - scaled).abs().mean() < 12  # of noise, as a JPEG of half the colour
    assert large == 8


def test_the_index_is_saved_and_cut_down_like_a_folder_s(folder: Path, packed: Path, tmp_path: Path) -> None:
    index = build_index(packed)
    save_index(index, tmp_path / "index.json")
    assert load_index(tmp_path / "index.json") == index
    few = with_train_subset(index, 3, seed=0)
    assert few.train.labels_N.tolist().count(0) == few.train.labels_N.tolist().count(1) == 3
    assert few.fingerprint != index.fingerprint
    save_index(few, tmp_path / "few.json")
    plans = list(train_batches(load_index(tmp_path / "few.json").train, BASIC, SIDE, 6, 0, 0, Worker(0, 1)))
    assert len(shown(packed, "torchvision", plans)) == 6
    with pytest.raises(UserError, match=r"class 'ants' has 13 usable images"):
        with_train_subset(index, 14, seed=0)
    with pytest.raises(UserError, match=r"no class 'ant' \(did you mean 'ants'\?\)"):
        build_index(packed, ("ant", "bees"))
    with pytest.raises(UserError, match="leaves one class"):
        build_index(packed, ("bees",))


def test_the_pixel_cache_keeps_shards_too(packed: Path, tmp_path: Path) -> None:
    settings = DataConfig(root=str(packed), image_size=SIDE, threads=2, pixels="memory", batch_size=8)
    index = build_index(packed)
    made = open_pixels(settings, index, tmp_path, CPU)
    assert made.notice is None
    plans = list(eval_batches(made.index.val, SIDE, 8, Worker(0, 1)))
    expected = shown(packed, "torchvision", list(eval_batches(index.val, SIDE, 8, Worker(0, 1))), AugmentSpec())
    for _ in ("filling", "reading"):
        assert torch.equal(shown(packed, "torchvision", plans, AugmentSpec(), made.val), expected)


# The order


def split_of(sizes: list[int]) -> Split:
    """Images that exist on paper, in shards of these sizes."""
    shards_N = np.repeat(np.arange(len(sizes)), sizes)
    names = tuple(f"train-{shard:06d}.tar/{i}.jpg" for i, shard in enumerate(shards_N))
    extents = np.stack([shards_N, np.zeros_like(shards_N), np.ones_like(shards_N)], axis=1)
    members = Members(tuple(f"train-{i:06d}.tar" for i in range(len(sizes))), extents)
    return Split(names, shards_N % 2, np.full((len(names), 2), 50, dtype=np.int32), members)


def epoch_of(split: Split, batch: int, world: int, epoch: int = 0, seed: int = 0, window: int = 20) -> np.ndarray:
    """(steps, workers, share) images."""
    steps = [list(train_ids(split, batch, seed, epoch, Worker(rank, world), window=window)) for rank in range(world)]
    return np.array(steps).swapaxes(0, 1)


UNEVEN = [7, 30, 1, 22, 40, 9, 16, 30, 33]


@pytest.mark.parametrize("window", [0, 1, 20, 10_000])
def test_an_epoch_shows_each_image_once_whatever_the_workers(window: int) -> None:
    split = split_of(UNEVEN)
    alone = epoch_of(split, 16, 1, window=window)
    assert alone.shape == (188 // 16, 1, 16)
    assert len(np.unique(alone)) == alone.size >= 188 - 15
    for world in (2, 4, 8):
        assert np.array_equal(epoch_of(split, 16, world, window=window).reshape(alone.shape), alone)
    assert np.array_equal(list(train_ids(split, 16, 0, 0, Worker(0, 1), 5, window)), alone[5:, 0])


def test_epochs_differ_and_a_seed_repeats_them() -> None:
    split = split_of([20] * 8)
    first = epoch_of(split, 16, 2)
    assert np.array_equal(epoch_of(split, 16, 2), first)
    for other in (epoch_of(split, 16, 2, epoch=1), epoch_of(split, 16, 2, seed=1)):
        assert np.mean(other == first) < 0.2
    # Whoever shares a step with image 0 is another each time, and so is who is left out.
    steps = [next(set(step.flat) for step in epoch_of(split, 16, 1, epoch=e) if 0 in step) for e in range(20)]
    assert len(set().union(*steps)) > 100
    uneven = split_of(UNEVEN)
    left = [set(range(188)) - set(epoch_of(uneven, 16, 1, epoch=e).flat) for e in range(60)]
    assert all(len(images) == 188 % 16 for images in left)
    assert len(set().union(*left)) > 150


@pytest.mark.parametrize("window", [0, 24, 80])
def test_no_image_moves_further_than_the_window(window: int) -> None:
    """In its lane, so in the sequence of all lanes by less than that and a batch."""
    sizes, batch, lanes = [50] * 8, 16, 8
    ordered = shard_order(np.repeat(np.arange(8), sizes), batch, 3, 5, window).reshape(-1, lanes, batch // lanes)
    stored = shard_order(np.repeat(np.arange(8), sizes), batch, 3, 5, 0).reshape(-1, lanes, batch // lanes)
    furthest = 0
    for lane in range(lanes):
        now, before = ordered[:, lane].reshape(-1), stored[:, lane].reshape(-1)
        assert set(now) == set(before)
        furthest = max(furthest, np.abs(np.argsort(now)[np.argsort(np.argsort(before))] - np.arange(50)).max())
        # Without a window a shard is read from a random image to its end, and then from its beginning.
        assert set(np.diff(before)) <= {1, -49}
    assert furthest <= max(window // lanes - 1, 0)
    assert (furthest > 0) == (window > lanes)


def test_workers_read_shards_of_their_own() -> None:
    split = split_of([20] * 8)
    for world in (2, 4, 8):
        by_rank = epoch_of(split, 16, world, window=10_000).swapaxes(0, 1).reshape(world, -1) // 20
        mine = [set(row.tolist()) for row in by_rank]
        assert sum(map(len, mine)) == len(set.union(*mine)) == 8
    # Where nothing divides, neighbours share the shards at their borders.
    uneven = epoch_of(split_of(UNEVEN), 16, 4, window=10_000).swapaxes(0, 1).reshape(4, -1)
    shard_of = np.repeat(np.arange(9), UNEVEN)
    assert sum(len(np.unique(shard_of[row])) for row in uneven) <= 9 + 2 * 3 + 2


def test_an_image_folder_is_shuffled_in_full_as_ever() -> None:
    """Whatever the window: runs of earlier versions go on with the same bits."""
    files = replace(split_of([20] * 8), members=None)
    full = np.random.Generator(np.random.Philox(key=[0, 3])).permutation(160)
    assert np.array_equal(epoch_of(files, 16, 4, epoch=3, window=2).reshape(-1), full)


def test_lanes() -> None:
    assert [num_lanes(s, b) for s, b in ((1, 32), (5, 32), (9, 48), (1281, 256), (100, 96), (3, 7))] == [
        1, 4, 8, 64, 48, 1,
    ]  # fmt: skip


# Other people's shards


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def jpeg(seed: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (50 + seed, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    root = tmp_path / "foreign"
    root.mkdir()
    for split in ("train", "val"):
        sound = {f"./a/{i:03d}.{ext}": data for i in range(8) for ext, data in _sample(i, 3 + 4 * (i % 2)).items()}
        odd = {
            "cut.jpg": jpeg(1)[:300], "cut.cls": b"3", "lost.jpg": jpeg(2), "word.jpg": jpeg(3), "word.cls": b"cat",
            "alone.cls": b"3", "meta.json": b"{}", "README": b"hello", "p.seg.png": jpeg(9, "PNG"),
            "q.PNG": jpeg(4, "PNG"), "q.cls": b"7\n",
        }  # fmt: skip
        write_tar(root / f"{split}-0000.tar", sound)
        write_tar(
            root / f"{split}-0001.tar", odd | {"p.seg.png": jpeg(9, "PNG"), "q.PNG": jpeg(4, "PNG"), "q.cls": b"7\n"}
        )
    return root


def _sample(i: int, label: int) -> dict[str, bytes]:
    return {
        "json": b"{}",
        "cls": str(label).encode(),
        "jpeg" if i % 3 else "webp": jpeg(i, "JPEG" if i % 3 else "WEBP"),
    }


def test_foreign_shards_are_read_and_their_faults_listed(foreign: Path) -> None:
    index = build_index(foreign)
    assert index.classes == ("3", "7")
    assert index.train.paths[0] == "train-0000.tar/a/000.webp"
    assert len(index.train) == len(index.val) == 9
    assert index.train.labels_N.tolist() == [0, 1] * 4 + [1]
    assert index.train.sizes_N2[:, 0].tolist() == [*range(50, 58), 54]
    assert {item.path.split("/")[1]: item.reason for item in index.skipped if item.path.startswith("train")} == {
        "cut.jpg": "truncated: the end of the file is missing",
        "lost.jpg": "no .cls file gives its class",
        "word.jpg": "its .cls file says 'cat', not a class's number",
        "alone.cls": "no image beside it (jpg, jpeg, png, webp, bmp, tif, tiff)",
    }
    plans = list(eval_batches(index.val, SIDE, 8, Worker(0, 1)))
    for kind in ("dali", "torchvision"):
        assert shown(foreign, kind, plans, AugmentSpec()).shape == (9, SIDE, SIDE, 3)


def test_class_names_of_foreign_shards(foreign: Path) -> None:
    names = foreign / "classes.txt"
    names.write_text("\n".join("abcdefgh"))
    assert build_index(foreign, ("h", "d")).classes == ("d", "h")
    with pytest.raises(UserError, match="class 'a' has no usable image in the training shards"):
        build_index(foreign)
    names.write_text("a\nb\n")
    with pytest.raises(UserError, match=r"train-0000.tar has class 3 .* names 2 classes, from 0 on"):
        build_index(foreign)
    names.write_text("a\na\n")
    with pytest.raises(UserError, match="names class 'a' twice"):
        build_index(foreign)


def test_foreign_shards_are_scanned_once(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_index(foreign)
    monkeypatch.setattr(shards, "headers", lambda _: pytest.fail("scanned again"))
    monkeypatch.setattr(shards, "verify", lambda *_: pytest.fail("decoded again"))
    assert build_index(foreign) == first
    monkeypatch.undo()
    write_tar(foreign / "train-0000.tar", {"x.jpg": jpeg(20), "x.cls": b"3"})
    assert build_index(foreign).train.sizes_N2[:, 0].tolist() == [70, 54]


@pytest.mark.parametrize("damage", ["empty", "cut off", "no header", "compressed"])
def test_a_damaged_foreign_tar(foreign: Path, damage: str) -> None:
    tar = foreign / "train-0000.tar"
    whole = tar.read_bytes()
    header = whole.index(b"./a/003.cls")
    data = {
        "empty": b"",
        "cut off": whole[: header + 600],
        "no header": whole[:header] + b"x" * 512 + whole[header + 512 :],
        "compressed": gzip.compress(whole),
    }
    tar.write_bytes(data[damage])
    with pytest.raises(UserError, match=r"train-0000.tar is damaged, cut off or no plain tar"):
        build_index(foreign)


def test_foreign_shards_need_both_splits(foreign: Path) -> None:
    for tar in foreign.glob("val-*"):
        tar.unlink()
    with pytest.raises(UserError, match=r"has train-\*.tar but no val-\*.tar"):
        build_index(foreign)


# What goes wrong


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda tar: os.truncate(tar, tar.stat().st_size - 512), "is cut off: it has"),
        (lambda tar: tar.write_bytes(tar.read_bytes() + b"more"), "is changed: it has"),
        (lambda tar: tar.unlink(), r"cannot read .*train-000001.tar \(No such file"),
        (lambda tar: (tar.parent / MANIFEST).write_text("{"), "is damaged: write the shards again"),
        (
            lambda tar: (tar.parent / MANIFEST).write_text((tar.parent / MANIFEST).read_text().replace("ants", "bugs")),
            "is damaged: write the shards again",
        ),
        (lambda tar: (tar.parent / MANIFEST).write_text('{"version": 9}'), "is of version 9"),
    ],
)
def test_shards_that_are_not_as_written(
    packed: Path, tmp_path: Path, break_it: Callable[[Path], Any], says: str
) -> None:
    root = copied(packed, tmp_path)
    assert build_index(root).train == build_index(packed).train
    break_it(root / "train-000001.tar")
    with pytest.raises(UserError, match=says):
        build_index(root)


@pytest.mark.parametrize("kind", ["dali", "torchvision"])
@pytest.mark.parametrize("damage", ["cut off", "overwritten"])
def test_a_tar_that_changes_during_the_run_is_named(packed: Path, tmp_path: Path, kind: str, damage: str) -> None:
    root = copied(packed, tmp_path)
    plans = list(eval_batches(build_index(root).train, SIDE, 8, Worker(0, 1)))
    members = plans[1].members
    assert members is not None
    tar, offset, num_bytes = members.place(root, 3)
    with open(tar, "r+b") as file:  # noqa: PTH123
        if damage == "cut off":
            file.truncate(offset + num_bytes // 2)
        else:
            file.seek(offset)
            file.write(b"\0" * num_bytes)
    says = f"{Path(tar).name} ends before it" if damage == "cut off" else "not an image"
    with pytest.raises(DecodeError, match=rf"{plans[1].paths[3]} \(.*{says}"):
        shown(root, kind, plans, AugmentSpec())


def test_an_interrupted_writing_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    index, out = build_index(folder), tmp_path / "out"

    def interrupt(done: int, _: int) -> None:
        with pytest.raises(UserError, match="left unfinished by an interrupted"):
            build_index(out)  # as any other process sees it meanwhile
        if done == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(index, out, images_per_shard=PER_SHARD, progress=interrupt)
    assert not out.exists()
    out.mkdir()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sharding._Tar, "add", full)
        assert main(["data", "shard", str(folder), str(out)]) == 2
    assert f"cannot write the shards to {out} (No space left on device)" in capsys.readouterr().err
    assert list(out.iterdir()) == []
    write_shards(index, out)  # the same folder can be used then


def _write_until_killed(index: Index, out: Path) -> None:
    def kill(done: int, _: int) -> None:
        if done == 30:
            os.kill(os.getpid(), signal.SIGKILL)

    write_shards(index, out, images_per_shard=PER_SHARD, progress=kill)


def test_a_killed_writing_leaves_nothing_that_could_be_used(folder: Path, tmp_path: Path) -> None:
    index, out = build_index(folder), tmp_path / "out"
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_write_until_killed, args=(index, out))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (out / "train-000001.tar").exists()
    with pytest.raises(UserError, match="left unfinished by an interrupted"):
        build_index(out)
    with pytest.raises(UserError, match="holds what an interrupted"):
        write_shards(index, out)


# The command line


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["data", "shard", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tldist: ")
    assert error.count("\n") == 1
    return error


def test_shard_on_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "out"
    assert main(["data", "shard", str(folder), str(out), "--size", "64", "--images-per-shard=10"]) == 0
    text = capsys.readouterr().out
    assert "skipped: 1\n  train/ants/cut.jpg: " in text
    assert f"{out}: 52 images in 6 shards, 0.000 GiB (0.000 GiB before)" in text
    assert main(["data", "check", str(out)]) == 0
    assert "train: 26 images" in capsys.readouterr().out
    assert said([str(out), str(tmp_path / "x")], capsys).count("holds shards already") == 1


def test_check_finds_one_wrong_bit(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = copied(packed, tmp_path)
    assert main(["data", "check", str(root)]) == 0
    row = json.loads((root / MANIFEST).read_text())["shards"]["val-000002.tar"]["images"][1]
    with (root / "val-000002.tar").open("r+b") as file:
        file.seek(row[1] + row[2] // 2)
        byte = file.read(1)[0]
        file.seek(row[1] + row[2] // 2)
        file.write(bytes([byte ^ 1]))
    assert main(["data", "check", str(root)]) == 2
    assert f"val-000002.tar is damaged: {row[0]} in it is not what was written" in capsys.readouterr().err


def test_mistakes_on_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    root, out = str(folder), str(tmp_path / "out")
    for words, says in (
        ([root], "name two folders"),
        ([root, out, "--sise", "3"], "no flag --sise (did you mean '--size'?)"),
        ([root, out, "--size", "small"], "--size 'small' is not a whole number"),
        ([root, out, "--size", "-1"], "--size is -1: give 0 or more"),
        ([root, out, "--images-per-shard", "0"], "--images-per-shard is 0: give 1 or more"),
        (["/no/such", out], "does not exist"),
        ([root, str(tmp_path / "full")], "is not empty: name a new or an empty folder"),
        ([root, str(tmp_path / "full" / "file")], "is not empty"),
        ([root, str(tmp_path / "full" / "file" / "x")], "cannot write the shards to"),
        ([root, str(folder / "shards")], "is inside the image folder"),
    ):
        assert says in said(words, capsys)
    assert not Path(out).exists()


# Training


@pytest.fixture(scope="module")
def photos_in_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    write_images(root / "train", {"ants": 20, "bees": 20}, seed=1)
    write_images(root / "val", {"ants": 9, "bees": 10}, seed=2)
    write_shards(build_index(root), root / ".." / f"{root.name}-shards", images_per_shard=6)
    return root.parent / f"{root.name}-shards"


def settings(root: Path, run_dir: Path, weights: str) -> RunConfig:
    run_dir.mkdir()
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(weights=weights),
        strategy=StrategyConfig(name="full"),
        data=DataConfig(root=str(root), batch_size=8, image_size=32, threads=1, shuffle_window=16),
        train=TrainConfig(epochs=2, precision="fp32"),
        tracking=TrackingConfig(wandb="disabled", log_every=2),
        checkpoint=CheckpointConfig(steps=1),
    )


def test_training_on_shards_and_resuming_inside_an_epoch(
    photos_in_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tldist.models import backbones

    source = str(tmp_path / "weights.safetensors")
    safetensors.torch.save_file(backbones.build(ModelConfig(weights="none"), 5, 32, 3).torchvision_state(), source)
    whole, broken = (settings(photos_in_shards, tmp_path / name, source) for name in ("whole", "broken"))
    summary = worker.run(config.to_json(whole))
    assert (summary["train_images"], summary["val_images"], summary["epochs"]) == (40, 19, 2)
    assert 0.5 < summary["best_val_top1"] <= 1
    real = fit.train_step

    def interrupted(run: Any, live: Any, step: int, *rest: Any) -> None:
        if step == 7:
            raise KeyboardInterrupt
        real(run, live, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fit, "train_step", interrupted)
        worker.run(config.to_json(broken))
    assert worker.run(config.to_json(broken))["resumed_from"] == "epoch-0001-step-000002"
    last = [
        safetensors.torch.load_file(Path(made.run_dir) / "checkpoints" / "last" / "model.safetensors")
        for made in (whole, broken)
    ]
    assert all(torch.equal(last[0][name], tensor) for name, tensor in last[1].items())
    # The page shows pictures from the shards.
    shown = json.loads((tmp_path / "whole" / "predictions.json").read_text())["samples"]
    assert shown[0]["path"].startswith("val-00000")
    page = (tmp_path / "whole" / "report.html").read_text()
    contact_sheet = 1
    assert page.count('src="data:image/jpeg;base64,/9j/') == contact_sheet + min(len(shown), report.MOST_SAMPLES)


def test_the_launcher_notices_other_shards(photos_in_shards: Path, tmp_path: Path) -> None:
    """What `--resume` compares."""
    assert build_index(photos_in_shards).fingerprint == build_index(copied(photos_in_shards, tmp_path)).fingerprint
    assert build_index(photos_in_shards, ("ants", "bees")).fingerprint == build_index(photos_in_shards).fingerprint
