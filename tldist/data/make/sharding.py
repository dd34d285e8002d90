"""Write an image folder as tar shards, its images in random order, re-encoded once to a smaller size if asked for."""

from __future__ import annotations

import io
import itertools
import os
import shutil
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.io import encode_jpeg, encode_png

from tldist.config import UserError
from tldist.data.load.decode import read_rgb
from tldist.data.load.torchvision_loader import resized
from tldist.data.source.index import SPLITS, Index, Split
from tldist.data.source.shards import CLASSES, MANIFEST, UNFINISHED, Row, is_shards, is_unfinished, manifest, read_bytes
from tldist.data.source.verify import Progress, num_workers

IMAGES_PER_SHARD = 1000
"""A shard of ImageNet's photos is 110 MB then: large enough to be read in one go, and many enough for any cluster."""
ARRAYS_PER_SHARD = 10_000
"""Of small pictures, which are a few kilobytes each."""
SEED = 0
QUALITY = 90
"""Of the JPEGs that images are re-encoded to."""
_SIGNATURES = ((b"\x89PNG", "png"), (b"RIFF", "webp"), (b"BM", "bmp"), (b"II*\0", "tif"), (b"MM\0*", "tif"))
_PER_THREAD = 4  # images read ahead of the one that is being written


@dataclass(frozen=True)
class Written:
    """What became of an image folder."""

    images: int
    shards: int
    bytes_before: int
    """Of the image files alone."""
    bytes_after: int
    """Of all shards."""


class Encoded(NamedTuple):
    """An image as it goes into a shard."""

    data: bytes
    size: tuple[int, int]
    bytes_before: int


def check_folders(root: Path, out: Path) -> None:
    """Raise UserError unless the images of `root` may be written to `out` as shards."""
    if is_shards(root):
        raise UserError(f"{root} holds shards already: give the image folder that they were made of")
    inside, outside = out.resolve(), root.resolve()
    if inside.is_relative_to(outside):
        raise UserError(f"{out} is inside the image folder {root}: write the shards somewhere else")
    if is_unfinished(out):
        raise UserError(f"{out} holds what an interrupted `tldist data shard` left: delete it, or name another folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: name a new or an empty folder for the shards")


def write_shards(
    index: Index,
    out: Path,
    size: int = 0,
    images_per_shard: int = IMAGES_PER_SHARD,
    seed: int = SEED,
    progress: Progress | None = None,
) -> Written:
    """Write the index's images to `out` as train-*.tar and val-*.tar; the same arguments give the same bytes.

    Args:
        size: re-encode images whose short side is longer to this many pixels there, upright; 0: copy all files.
        seed: of the order, which mixes the classes.
        progress: called now and then with (images written, images in all).

    Raises:
        UserError: `out` cannot be used, its disk is full, an image changed since it was verified. Nothing is left.
    """
    check_folders(Path(index.root), out)
    existed = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        # From here to the end, whoever looks at the folder is told that it is not finished.
        _replace(out / MANIFEST, UNFINISHED)
        return _write(index, out, size, images_per_shard, seed, progress)
    except BaseException as error:
        _remove(out, existed)
        if isinstance(error, OSError):
            reason = f"{error.strerror or error}"
            raise UserError(
                f"cannot write the shards to {out} ({reason}), and nothing of them was kept: "
                "make room, or name another folder"
            ) from error
        raise


def write_arrays(
    images: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    classes: tuple[str, ...],
    out: Path,
    progress: Progress | None = None,
    seed: int = SEED,
) -> None:
    """Write pixels as lossless PNGs into shards: by split, uint8 (N, H, W) grey or (N, H, W, 3), and their labels.

    The same arguments give the same bytes. Raises OSError where the disk is full.
    """
    out.mkdir(parents=True)
    total, done = sum(map(len, images.values())), itertools.count(1)
    rows: dict[str, list[Row]] = {}
    with ThreadPoolExecutor(num_workers()) as pool:
        for number, (name, pixels) in enumerate(images.items()):
            order = _order(len(pixels), seed, number)
            ready = _in_order(pool, lambda i, pixels=pixels: _png(pixels[i]), order)
            for shard, ids_N in enumerate(np.array_split(order, -(-len(order) // ARRAYS_PER_SHARD))):
                tar = f"{name}-{shard:06d}.tar"
                rows[tar] = []
                with _Tar(out / tar) as written:
                    for i, encoded in zip(ids_N.tolist(), ready):  # noqa: B905 - `ready` goes on in the next shard
                        key = f"{classes[labels[name][i]]}/{i:05d}"
                        rows[tar].append(written.add(key, encoded, int(labels[name][i])))
                        if progress:
                            progress(next(done), total)
    sizes = {tar: (out / tar).stat().st_size for tar in rows}
    (out / CLASSES).write_text("".join(f"{name}\n" for name in classes))
    _replace(out / MANIFEST, manifest(classes, rows, sizes))


def _png(pixels: np.ndarray) -> Encoded:
    image_CHW = torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)
    png_B = encode_png(image_CHW, compression_level=1).numpy().tobytes()
    return Encoded(png_B, pixels.shape[:2], pixels.nbytes)


def _remove(out: Path, existed: bool) -> None:
    for path in out.glob("*") if existed else ():
        path.unlink(missing_ok=True)
    if not existed:
        shutil.rmtree(out, ignore_errors=True)


def _write(index: Index, out: Path, size: int, images_per_shard: int, seed: int, progress: Progress | None) -> Written:
    total, done, before = len(index.train) + len(index.val), itertools.count(1), 0
    rows: dict[str, list[Row]] = {}
    with ThreadPoolExecutor(num_workers(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for number, (name, split) in enumerate(zip(SPLITS, (index.train, index.val), strict=True)):
            keys = _keys(split.paths)
            shards = np.array_split(_order(len(split), seed, number), -(-len(split) // images_per_shard))
            ready = _in_order(pool, lambda i, split=split: encode(index.root, split, i, size), np.concatenate(shards))
            for shard, ids_N in enumerate(shards):
                tar = f"{name}-{shard:06d}.tar"
                rows[tar] = []
                with _Tar(out / tar) as written:
                    for i, encoded in zip(ids_N.tolist(), ready):  # noqa: B905 - `ready` goes on in the next shard
                        rows[tar].append(written.add(keys[i], encoded, int(split.labels_N[i])))
                        before += encoded.bytes_before
                        if progress:
                            progress(next(done), total)
    sizes = {tar: (out / tar).stat().st_size for tar in rows}
    (out / CLASSES).write_text("".join(f"{name}\n" for name in index.classes))
    _replace(out / MANIFEST, manifest(index.classes, rows, sizes))
    return Written(total, len(rows), before, sum(sizes.values()))


def _replace(path: Path, text: str) -> None:
    """Write a file in one step, readable by whoever may read the shards."""
    draft = path.with_name(f".{path.name}")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _order(images: int, seed: int, split: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, split]))).permutation(images)


def _keys(paths: Iterable[str]) -> list[str]:
    """WebDataset's key of each image, unique: its path from the class folder on, without dots: `ants/0013035`."""
    keys: dict[str, None] = {}
    for path in paths:
        stem = path.partition("/")[2]
        stem = stem.removesuffix(Path(stem).suffix).replace(".", "_")
        copies = itertools.chain((stem,), (f"{stem}-{i}" for i in itertools.count(2)))
        keys[next(key for key in copies if key not in keys)] = None
    return list(keys)


# One image


def encode(root: str, split: Split, i: int, size: int) -> Encoded:
    """The bytes that go into a shard: the file's own, or those of a smaller JPEG."""
    path, (height, width) = Path(root) / split.paths[i], split.sizes_N2[i].tolist()
    try:
        data = read_bytes(path)
        if not size or min(height, width) <= size:
            return Encoded(data.tobytes(), (height, width), len(data))
        image_CHW = read_rgb(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} changed while the shards were being written ({error}): start again") from error
    if tuple(image_CHW.shape[1:]) != (height, width):
        raise UserError(f"{path} changed while the shards were being written: start again")
    scale = size / min(height, width)
    small = max(size, round(height * scale)), max(size, round(width * scale))
    small_CHW = resized(image_CHW, list(small))
    jpeg_B: Tensor = encode_jpeg(small_CHW, quality=QUALITY)  # type: ignore[assignment]
    return Encoded(jpeg_B.numpy().tobytes(), small, len(data))


def _in_order(pool: ThreadPoolExecutor, make: Callable[[int], Encoded], ids_N: np.ndarray) -> Iterator[Encoded]:
    """What `make` gives of each, made by the pool's threads a few ahead."""
    waiting: deque[Future[Encoded]] = deque()
    try:
        for i in ids_N.tolist():
            waiting.append(pool.submit(make, i))
            if len(waiting) > _PER_THREAD * num_workers():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


class _Tar:
    """One shard that is being written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.GNU_FORMAT)  # noqa: SIM115

    def __enter__(self) -> _Tar:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """On the disk when this returns, unless an error is on its way."""
        with self._file:
            if kind is None:
                self._tar.close()
                self._file.flush()
                os.fsync(self._file.fileno())

    def add(self, key: str, image: Encoded, label: int) -> Row:
        """Append KEY.jpg (or what it is) and KEY.cls."""
        name = f"{key}.{_extension(image.data)}"
        offset = self._append(name, image.data)
        self._append(f"{key}.cls", str(label).encode())
        return Row(name, offset, len(image.data), label, *image.size, crc32=zlib.crc32(image.data))

    def _append(self, name: str, data: bytes) -> int:
        """Returns the offset of the data, which are padded to whole blocks."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))
        return self._tar.offset + -len(data) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE


def _extension(data: bytes) -> str:
    return next((name for signature, name in _SIGNATURES if data.startswith(signature)), "jpg")
