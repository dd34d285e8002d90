"""MNIST-M: MNIST's digits blended with patches of photos, |patch - digit| in each channel (Ganin et al., JMLR 2016).

Written are both domains, as shards of lossless PNGs: `source/` holds the digits as they are, `target/` the blended
ones, each with the splits of the original. A digit lies in the middle of 32 x 32 pixels, as in the published MNIST-M,
so that `--data.image-size 28` shows its 28 x 28 pixels as they are.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tldist.config import UserError
from tldist.data.augment import uniforms
from tldist.data.load.decode import read_rgb
from tldist.data.make.archives import Report, find, read_gz, unpack
from tldist.data.make.datasets import DATASETS, idx_array, scratch_beside
from tldist.data.make.sharding import write_arrays
from tldist.data.source.index import IMAGE_SUFFIXES

SIDE = 32
_DIGITS = tuple("0123456789")


def make_mnist_m(mnist: Path, photos: Path, root: Path, seed: int = 0, report: Report | None = None) -> Path:
    """Write `root/source` (MNIST) and `root/target` (MNIST-M), whole or not at all; the same arguments, the same bytes.

    Args:
        mnist: a folder with MNIST's four idx files, or with their .gz; their checksums are compared.
        photos: a folder of photos, or a tar or zip of them (the published MNIST-M used BSDS500).
        seed: draws each image's photo and patch.
        report: called with (what is going on, done, in all).

    Raises:
        UserError: files are missing or damaged, no photo is large enough, `root` is not empty or cannot be written.
    """
    root, report = root.absolute(), report or (lambda *_: None)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} is not empty: name a new or an empty folder for MNIST and MNIST-M")
    splits = read_mnist(mnist)
    with scratch_beside(root.parent, root.name) as scratch:
        backgrounds = read_photos(photos, scratch, report)
        new = scratch / "new"
        for domain in ("source", "target"):
            images = {name: digits_NHW for name, (digits_NHW, _) in splits.items()}
            if domain == "target":
                images = {
                    name: blend(digits_NHW, backgrounds, seed, number)
                    for number, (name, digits_NHW) in enumerate(images.items())
                }
            labels = {name: labels_N for name, (_, labels_N) in splits.items()}
            write_arrays(images, labels, _DIGITS, new / domain, lambda *n, d=domain: report(f"writing {d}", *n))
        if root.exists():
            root.rmdir()
        new.rename(root)
    return root


def read_mnist(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Split -> (digits_NHW, labels_N), uint8, each digit in the middle of SIDE x SIDE. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"--mnist {folder} is not a folder: give the one that holds MNIST's idx files")
    archives = DATASETS["mnist"].archives
    paths = find(archives, folder, "--mnist")
    files = [read_gz(path, archive.md5) for path, archive in zip(paths, archives, strict=True)]
    train, train_labels, val, val_labels = map(idx_array, files)
    margin = (SIDE - train.shape[1]) // 2
    pad = ((0, 0), (margin, margin), (margin, margin))
    return {"train": (np.pad(train, pad), train_labels), "val": (np.pad(val, pad), val_labels)}


def read_photos(place: Path, scratch: Path, report: Report) -> list[np.ndarray]:
    """uint8 (H, W, 3) of every photo in a folder or an archive, in the order of their paths. Raises UserError."""
    if place.is_file():
        if not tarfile.is_tarfile(place) and place.suffix != ".zip":
            raise UserError(f"--photos {place} is neither a folder nor a tar or zip of photos")
        unpack(place, scratch / "photos", report)
        place = scratch / "photos"
    if not place.is_dir():
        raise UserError(f"--photos {place} does not exist: give a folder of photos, or a tar of them")
    paths = sorted(p for p in place.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    found = []
    for done, path in enumerate(paths):
        report("reading photos", done, len(paths))
        try:
            found.append(read_rgb(path).permute(1, 2, 0).numpy())
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{path} cannot be read as a photo ({error}): mend or remove it") from error
    large = [photo for photo in found if min(photo.shape[:2]) >= SIDE]
    if not large:
        raise UserError(f"--photos {place} holds no photo of {SIDE} x {SIDE} pixels or more: give some (BSDS500, say)")
    return large


def blend(digits_NHW: np.ndarray, photos: Sequence[np.ndarray], seed: int, split: int) -> np.ndarray:
    """uint8 (N, H, W, 3): |patch - digit|, the photo and the patch's place uniform, a function of (seed, split, i)."""
    n, height, width = digits_NHW.shape
    u_N3 = uniforms(seed, split, np.arange(n), 3)
    blended = np.empty((n, height, width, 3), dtype=np.uint8)
    for i, (which, down, right) in enumerate(u_N3):
        photo = photos[int(which * len(photos))]
        top = int(down * (photo.shape[0] - height + 1))
        left = int(right * (photo.shape[1] - width + 1))
        patch = photo[top : top + height, left : left + width].astype(np.int16)
        blended[i] = np.abs(patch - digits_NHW[i, :, :, None])
    return blended
