"""Known data sets, written as image folders: `train/CLASS/*` and `val/CLASS/*`.

| name | images (train + val) | written as |
|---|---|---|
| hymenoptera | 245 + 153 photos, one of them a GIF that the index will skip | as published |
| mnist | 60,000 + 10,000, 28 x 28 grey | PNG |
| cifar10 | 50,000 + 10,000, 32 x 32 | PNG; JPEG from the JPEG copy |
| digits | 1,438 + 359, 8 x 8 grey, comes with scikit-learn | PNG, 32 x 32 |
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from tldist.config import UserError, nearest
from tldist.data.make.archives import Archive, Report, check_file, damaged, download, find, read_gz, unpack

Writer = Callable[["Dataset", list[Path], Path, Report], None]
"""Called with (the data set, its archives, the folder to make train/ and val/ in, report)."""

_DIGITS = tuple("0123456789")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist"
_CIFAR10_BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "val": ("test_batch",)}
_WRITERS = 4  # encoding tiny PNGs holds the GIL; more than one only hides the latency of network file systems
_CHUNK = 500


@dataclass(frozen=True)
class Dataset:
    """What there is to fetch, and what must have come of it."""

    title: str
    num_train: int
    num_val: int
    write: Writer
    archives: tuple[Archive, ...] = ()


def fetch(name: str, root: Path, source: Path | None = None, report: Report | None = None) -> Path:
    """Write the data set `name` to the folder `root`, whole or not at all; one that is there is kept.

    Args:
        name: a key of `DATASETS`.
        source: a folder that holds the archives (or a folder in it does); None: download them.
        report: called with (what is going on, done, in all).

    Returns:
        `root`, an image folder for `build_index`.

    Raises:
        UserError: unknown name, no network, archive missing, damaged or incomplete, `root` holds something
            else or cannot be written.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set '{name}'{nearest(name, DATASETS)}: use one of {', '.join(DATASETS)}")
    dataset, folder, report = DATASETS[name], Path(os.path.abspath(root)), report or _silent  # noqa: PTH100
    if is_complete(name, folder):
        report(f"{folder} is already there", 1, 1)
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists but is not {_expected(dataset, folder)}: remove it or choose another folder")
    with scratch_beside(folder.parent, name) as scratch:
        archives = _archives(dataset, source, scratch, report)
        new = scratch / name
        dataset.write(dataset, archives, new, report)
        if not _has_all(dataset, new):
            raise UserError(f"what the archives hold is not {_expected(dataset, new)}: download them again")
        _publish(new, folder, lambda: is_complete(name, folder))
    return folder


def is_complete(name: str, root: Path) -> bool:
    """Is the data set at `root`, with all its images?"""
    return _has_all(DATASETS[name], root)


def _silent(what: str, done: int, total: int) -> None:
    pass


def _has_all(dataset: Dataset, folder: Path) -> bool:
    return (_count(folder / "train"), _count(folder / "val")) == (dataset.num_train, dataset.num_val)


def _expected(dataset: Dataset, folder: Path) -> str:
    found = f"{_count(folder / 'train'):,} + {_count(folder / 'val'):,}"
    wanted = f"{dataset.num_train:,} + {dataset.num_val:,}"
    return f"{dataset.title} ({found} files in train + val, expected {wanted})"


def _count(folder: Path) -> int:
    """Files below, hidden ones aside: a file manager that looked in has left its own."""
    return sum(not file.startswith(".") for _, _, files in os.walk(folder) for file in files)


@contextmanager
def scratch_beside(root: Path, name: str) -> Iterator[Path]:
    """A folder beside the target, so that the last step is a rename; gone afterwards."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=root, prefix=f".{name}-"))
    except OSError as error:
        raise UserError(f"cannot write to {root}: {error.strerror}: choose another folder") from error
    try:
        yield scratch
    except OSError as error:  # the network's have become UserErrors already
        raise UserError(f"cannot write {name} to {root}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _archives(dataset: Dataset, source: Path | None, scratch: Path, report: Report) -> list[Path]:
    if source is not None and dataset.archives:
        return find(dataset.archives, source)
    return [download(archive, scratch, report) for archive in dataset.archives]


def _publish(new: Path, folder: Path, somebody_did: Callable[[], bool]) -> None:
    try:
        new.rename(folder)
    except OSError:
        if not somebody_did():  # a second fetch at the same time was faster
            raise


# The writers


def _write_hymenoptera(dataset: Dataset, archives: list[Path], out: Path, report: Report) -> None:
    _lift(archives[0], out, {"train": "train", "val": "val"}, report)


def _write_mnist(dataset: Dataset, archives: list[Path], out: Path, report: Report) -> None:
    files = [read_gz(path, archive.md5) for path, archive in zip(archives, dataset.archives, strict=True)]
    arrays = [idx_array(data) for data in files]
    for split, images_NHW, labels_N in (("train", *arrays[:2]), ("val", *arrays[2:])):
        _write_pngs(out / split, images_NHW, labels_N, _DIGITS, report)


def _write_cifar10(dataset: Dataset, archives: list[Path], out: Path, report: Report) -> None:
    (path,), (archive,) = archives, dataset.archives
    if path.name != archive.names[0]:
        return _lift(path, out, {"train": "train", "test": "val"}, report)
    check_file(path, archive.md5)
    batches = _cifar10_batches(path)
    for split, names in _CIFAR10_BATCHES.items():
        images_NHWC = np.concatenate([batches[name][0] for name in names])
        labels_N = np.concatenate([batches[name][1] for name in names])
        _write_pngs(out / split, images_NHWC, labels_N, _CIFAR10, report)
    return None


def _write_digits(dataset: Dataset, archives: list[Path], out: Path, report: Report) -> None:
    from sklearn.datasets import load_digits  # takes a second to import

    digits: Any = load_digits()
    images_NHW = np.stack([_enlarge(image_HW) for image_HW in digits.images])
    val_N = _stratified(digits.target, share=0.2, seed=0)
    for split, chosen in (("train", ~val_N), ("val", val_N)):
        _write_pngs(out / split, images_NHW[chosen], digits.target[chosen], _DIGITS, report)


def _enlarge(image_HW: np.ndarray) -> np.ndarray:
    """8 x 8 of 0..16 to 32 x 32 of 0..255.

    Bicubic: the block edges that `nearest` makes would be the strongest edges of the picture, and edges are
    what a pre-trained stem looks for.
    """
    grey = Image.fromarray(np.round(image_HW * (255 / 16)).astype(np.uint8))
    return np.asarray(grey.resize((32, 32), Image.Resampling.BICUBIC))


def _stratified(labels_N: np.ndarray, share: float, seed: int) -> np.ndarray:
    """bool (N,): `share` of each class, rounded."""
    rng = np.random.Generator(np.random.Philox(seed))
    chosen = np.zeros(len(labels_N), dtype=bool)
    for label in np.unique(labels_N):
        positions = rng.permutation(np.flatnonzero(labels_N == label))
        chosen[positions[: round(share * len(positions))]] = True
    return chosen


def _lift(archive: Path, out: Path, splits: dict[str, str], report: Report) -> None:
    """Unpack, and move the folders of `splits` (at the top or one folder down) to `out`, renamed."""
    unpacked = out.parent / "unpacked"
    unpack(archive, unpacked, report)
    for folder in (unpacked, *sorted(path for path in unpacked.iterdir() if path.is_dir())):
        if all((folder / old).is_dir() for old in splits):
            out.mkdir()
            for old, new in splits.items():
                (folder / old).rename(out / new)
            return
    raise UserError(f"{archive} holds no folders {' and '.join(splits)}: download it again")


def _write_pngs(
    folder: Path, images: np.ndarray, labels_N: np.ndarray, classes: tuple[str, ...], report: Report
) -> None:
    """uint8 (N, H, W) grey or (N, H, W, 3) as `folder/CLASS/00042.png`, numbered as in the original."""
    paths = [f"{folder}/{classes[label]}/{i:05d}.png" for i, label in enumerate(labels_N)]
    for name in classes:
        (folder / name).mkdir(parents=True)

    def write(start: int) -> int:
        stop = min(start + _CHUNK, len(images))
        for i in range(start, stop):
            Image.fromarray(images[i]).save(paths[i], compress_level=1)
        return stop

    with ThreadPoolExecutor(_WRITERS) as pool:
        for done in pool.map(write, range(0, len(images), _CHUNK)):
            report(f"writing {folder.name}", done, len(images))


# The original formats


def idx_array(data: bytes) -> np.ndarray:
    """An idx file: two zeros, 8 for uint8, the number of dimensions, each as big-endian int32, the bytes."""
    shape = struct.unpack_from(f">{data[3]}i", data, 4)
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that can make containers, numbers, bytes and numpy arrays, and call nothing else."""

    reconstruct: ClassVar[Any] = np.zeros(1).__reduce__()[0]
    allowed: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """The few names that arrays are pickled with."""
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}")
        return self.allowed[module, name]


def _cifar10_batches(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """uint8 (N, 32, 32, 3) images and int64 (N,) labels of each batch of the Python archive, by its name."""
    wanted = {name for names in _CIFAR10_BATCHES.values() for name in names}
    batches = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name, file = Path(member.name).name, archive.extractfile(member)
                if name in wanted and file is not None:
                    batches[name] = _cifar10_batch(file.read())
    except (tarfile.TarError, pickle.UnpicklingError, EOFError, OSError, KeyError, ValueError) as error:
        raise damaged(path, error) from error
    if missing := sorted(wanted - batches.keys()):
        raise UserError(f"{path} is incomplete, it lacks {', '.join(missing)}: download it again")
    return batches


def _cifar10_batch(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    batch = _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
    images_NCHW = batch[b"data"].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(images_NCHW.transpose(0, 2, 3, 1)), np.array(batch[b"labels"], dtype=np.int64)


# The registry


def _mnist_archive(name: str, md5: str) -> Archive:
    return Archive(f"{_MNIST_URL}/{name}.gz", md5, also=(name,))


DATASETS: dict[str, Dataset] = {
    "hymenoptera": Dataset(
        "the ants and bees of the PyTorch tutorial",
        245,
        153,
        _write_hymenoptera,
        (Archive("https://download.pytorch.org/tutorial/hymenoptera_data.zip", also=("hymenoptera_data.tar",)),),
    ),
    "mnist": Dataset(
        "MNIST",
        60_000,
        10_000,
        _write_mnist,
        (
            _mnist_archive("train-images-idx3-ubyte", "6bbc9ace898e44ae57da46a324031adb"),
            _mnist_archive("train-labels-idx1-ubyte", "a25bea736e30d166cdddb491f175f624"),
            _mnist_archive("t10k-images-idx3-ubyte", "2646ac647ad5339dbf082846283269ea"),
            _mnist_archive("t10k-labels-idx1-ubyte", "27ae3e4e09519cfbb04c329615203637"),
        ),
    ),
    "cifar10": Dataset(
        "CIFAR-10",
        50_000,
        10_000,
        _write_cifar10,
        (
            Archive(
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                "c58f30108f718f92721af3b95e74349a",
                also=("cifar10_jpeg.tar.xz",),
            ),
        ),
    ),
    "digits": Dataset("the digits of scikit-learn", 1438, 359, _write_digits),
}
"""By name. Downloads fetch each archive's published form; `also` are forms that only a folder can hold."""
