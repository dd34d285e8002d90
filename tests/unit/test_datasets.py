"""Known data sets: from every form of their archives to image folders, and what is said when that fails."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tldist.config import UserError
from tldist.data.make import datasets
from tldist.data.make.archives import Archive, unpack
from tldist.data.make.datasets import DATASETS, fetch, is_complete

DATA = Path(os.environ.get("TLDIST_DATA") or Path(__file__).parents[3] / "shared" / "data")


@pytest.fixture
def shared() -> Path:
    if not (DATA / "hymenoptera_data.tar").is_file():
        pytest.skip(f"no data in {DATA} (TLDIST_DATA names the folder)")
    return DATA


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def expect(monkeypatch: pytest.MonkeyPatch, name: str, num_train: int, num_val: int, *md5s: str) -> None:
    """Let a data set be small, with these checksums."""
    archives = DATASETS[name].archives
    if md5s:
        archives = tuple(replace(a, md5=m) for a, m in zip(archives, md5s, strict=True))
    small = replace(DATASETS[name], num_train=num_train, num_val=num_val, archives=archives)
    monkeypatch.setitem(DATASETS, name, small)


# hymenoptera

INSECTS = {f"{split}/{name}/{i}.jpg": 1 for split in ("train", "val") for name in ("ants", "bees") for i in (0, 1)}


def zip_of(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, name)
    return path


def tar_of(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # pyright: ignore[reportArgumentType, reportCallIssue]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_hymenoptera_from_its_real_archive(shared: Path, tmp_path: Path) -> None:
    folder = fetch("hymenoptera", tmp_path / "hymenoptera", shared)
    assert folder == tmp_path / "hymenoptera"
    counts = {f"{s}/{c}": len(list((folder / s / c).iterdir())) for s in ("train", "val") for c in ("ants", "bees")}
    assert counts == {"train/ants": 124, "train/bees": 121, "val/ants": 70, "val/bees": 83}
    assert [path.name for path in tmp_path.iterdir()] == ["hymenoptera"]


def test_hymenoptera_from_a_zip(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect(monkeypatch, "hymenoptera", 4, 4)
    zip_of(source / "hymenoptera_data.zip", [f"hymenoptera_data/{name}" for name in INSECTS])
    assert files_below(fetch("hymenoptera", tmp_path / "hymenoptera", source)) == sorted(INSECTS)


def test_the_archive_may_lie_one_folder_down(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect(monkeypatch, "hymenoptera", 4, 4)
    (source / "downloads").mkdir()
    zip_of(source / "downloads/hymenoptera_data.zip", list(INSECTS))
    assert is_complete("hymenoptera", fetch("hymenoptera", tmp_path / "hymenoptera", source))


def test_what_is_complete_is_kept(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect(monkeypatch, "hymenoptera", 4, 4)
    zip_of(source / "hymenoptera_data.zip", list(INSECTS))
    folder = fetch("hymenoptera", tmp_path / "hymenoptera", source)
    inode, told = folder.stat().st_ino, []
    (source / "hymenoptera_data.zip").unlink()
    (folder / "train/ants/.DS_Store").touch()
    assert (
        fetch("hymenoptera", tmp_path / "hymenoptera", source, lambda what, *_: told.append(what)).stat().st_ino
        == inode
    )
    assert told == [f"{folder} is already there"]


def test_what_is_there_but_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits/mine.txt").write_text("precious")
    with pytest.raises(UserError, match=r"digits exists but is not the digits .* expected 1,438 \+ 359\): remove it"):
        fetch("digits", tmp_path / "digits")
    assert files_below(tmp_path) == ["digits/mine.txt"]


def test_an_archive_with_too_few_images_leaves_nothing(source: Path, tmp_path: Path) -> None:
    zip_of(source / "hymenoptera_data.zip", list(INSECTS))
    with pytest.raises(UserError, match=r"not the ants and bees .*\(4 \+ 4 files in train \+ val, expected 245"):
        fetch("hymenoptera", tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


# mnist


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


def small_mnist() -> tuple[dict[str, bytes], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (30, 28, 28), dtype=np.uint8), np.arange(30, dtype=np.uint8) % 10
    return (
        {
            "train-images-idx3-ubyte": idx(images[:20]),
            "train-labels-idx1-ubyte": idx(labels[:20]),
            "t10k-images-idx3-ubyte": idx(images[20:]),
            "t10k-labels-idx1-ubyte": idx(labels[20:]),
        },
        images,
        labels,
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_mnist_becomes_pngs_pixel_for_pixel(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    files, images, labels = small_mnist()
    expect(monkeypatch, "mnist", 20, 10, *map(md5, files.values()))
    (source / "mnist").mkdir()
    for name, data in files.items():
        (source / "mnist" / f"{name}{'.gz' * zipped}").write_bytes(gzip.compress(data) if zipped else data)
    folder = fetch("mnist", tmp_path / "mnist", source)
    for i in range(30):
        split, number = ("train", i) if i < 20 else ("val", i - 20)
        written = Image.open(folder / split / str(labels[i]) / f"{number:05d}.png")
        assert (written.mode, np.array_equal(np.asarray(written), images[i])) == ("L", True)


def test_the_real_mnist_has_the_published_checksums(shared: Path) -> None:
    for archive in DATASETS["mnist"].archives[2:]:
        data = datasets.read_gz(shared / "mnist" / archive.names[0], archive.md5)
        assert len(datasets.idx_array(data)) == 10_000


def test_a_wrong_checksum_is_an_error(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, _, _ = small_mnist()
    expect(monkeypatch, "mnist", 20, 10)
    for name, data in files.items():
        (source / f"{name}.gz").write_bytes(gzip.compress(data))
    with pytest.raises(UserError, match=r"ubyte.gz is damaged: its md5 is .*, expected 6bbc9ace.*: download it again"):
        fetch("mnist", tmp_path / "mnist", source)


# cifar10


PurePython: Any = pickle._Pickler  # pyright: ignore[reportAttributeAccessIssue]


class Python2Pickler(PurePython):
    """Writes as the Python 2 that made CIFAR-10: str and bytes as BINSTRING, numpy by its old name."""

    dispatch: ClassVar[dict[Any, Any]] = dict(PurePython.dispatch)

    def save_bytes(self, data: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)

    def save_text(self, text: str) -> None:
        self.save_bytes(text.encode("latin1"))

    def save_global(self, obj: Any, name: str | None = None) -> None:
        module = obj.__module__.replace("_core", "core")
        self.write(pickle.GLOBAL + f"{module}\n{name or obj.__name__}\n".encode())

    dispatch |= {bytes: save_bytes, str: save_text, type: save_global, type(np.dot): save_global}
    dispatch[type(np.zeros(0).__reduce__()[0])] = save_global


def python2_pickle(value: object) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def cifar10_batch(start: int) -> tuple[np.ndarray, dict[bytes, object]]:
    """Two images of the classes `start` and `start + 1`, as they look and as they are pickled."""
    images_NHWC = np.random.default_rng(start).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    data = np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2)).reshape(2, 3072)
    return images_NHWC, {
        b"data": data,
        b"labels": [start, start + 1],
        b"filenames": [b"../../x.png", b"y.png"],
    }


CIFAR10_NAMES = ("test_batch", "data_batch_4", "data_batch_1", "data_batch_2", "data_batch_3", "data_batch_5")


def cifar10_archive(folder: Path, names: tuple[str, ...], dumps: Callable[[object], bytes]) -> str:
    """Write the archive, batches out of order as in the real one; returns its md5."""
    members = {
        f"cifar-10-batches-py/{name}": dumps(cifar10_batch(int(name[-1]) if name[-1].isdigit() else 8)[1])
        for name in names
    }
    path = tar_of(folder / "cifar-10-python.tar.gz", members | {"cifar-10-batches-py/readme.html": b"x"}, "w:gz")
    return md5(path.read_bytes())


@pytest.mark.parametrize("dumps", [python2_pickle, lambda value: pickle.dumps(value, protocol=3)])
def test_cifar10_from_its_pickles_pixel_for_pixel(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dumps: Callable[[object], bytes]
) -> None:
    expect(monkeypatch, "cifar10", 10, 2, cifar10_archive(source, CIFAR10_NAMES, dumps))
    folder = fetch("cifar10", tmp_path / "cifar10", source)
    images, _ = cifar10_batch(3)  # the third batch: images 4 and 5, a cat and a deer
    for i, place in enumerate(("train/cat/00004.png", "train/deer/00005.png")):
        assert np.array_equal(np.asarray(Image.open(folder / place)), images[i])
    images, _ = cifar10_batch(8)
    assert np.array_equal(np.asarray(Image.open(folder / "val/truck/00001.png")), images[1])
    assert len(list((folder / "val").iterdir())) == 10


def test_cifar10_from_jpegs(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect(monkeypatch, "cifar10", 2, 1)
    names = ("train/cat/0000.jpg", "train/dog/0000.jpg", "test/cat/0000.jpg")
    tar_of(source / "cifar10_jpeg.tar.xz", {f"cifar10/{name}": b"x" for name in names}, "w:xz")
    found = files_below(fetch("cifar10", tmp_path / "cifar10", source))
    assert found == ["train/cat/0000.jpg", "train/dog/0000.jpg", "val/cat/0000.jpg"]


def test_a_pickle_that_calls_something_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "pwned",)

    expect(
        monkeypatch,
        "cifar10",
        10,
        2,
        cifar10_archive(source, CIFAR10_NAMES, lambda _: pickle.dumps(Evil(), 2)),
    )
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz is damaged \(it wants to call "):
        fetch("cifar10", tmp_path / "cifar10", source)
    assert not (tmp_path / "pwned").exists()


def test_a_cifar10_archive_lacking_a_batch_is_an_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect(monkeypatch, "cifar10", 10, 2, cifar10_archive(source, CIFAR10_NAMES[:-1], python2_pickle))
    with pytest.raises(UserError, match="is incomplete, it lacks data_batch_5: download it again"):
        fetch("cifar10", tmp_path / "cifar10", source)


def test_a_changed_cifar10_archive_is_an_error(source: Path, tmp_path: Path) -> None:
    cifar10_archive(source, CIFAR10_NAMES, python2_pickle)
    with pytest.raises(UserError, match=r"is damaged: its md5 is .*, expected c58f3010"):
        fetch("cifar10", tmp_path / "cifar10", source)


# digits


def test_digits_are_complete_stratified_and_the_same_every_time(tmp_path: Path) -> None:
    folder = fetch("digits", tmp_path / "a")
    counts = {s: [len(list((folder / s / str(d)).iterdir())) for d in range(10)] for s in ("train", "val")}
    assert (sum(counts["train"]), sum(counts["val"])) == (1438, 359)
    shares = [v / (t + v) for t, v in zip(counts["train"], counts["val"], strict=True)]
    assert max(abs(share - 0.2) for share in shares) < 0.003
    again = fetch("digits", tmp_path / "b")
    assert files_below(folder) == files_below(again)
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in files_below(folder))


def test_digits_keep_their_pixels_and_labels(tmp_path: Path) -> None:
    digits: Any = load_digits()
    folder = fetch("digits", tmp_path / "digits")
    for name in files_below(folder)[::100]:
        image = Image.open(folder / name)
        assert (image.size, image.mode) == ((32, 32), "L")
        small = np.asarray(image.resize((8, 8), Image.Resampling.BOX)) * (16 / 255)
        distances = np.abs(digits.images - small).mean(axis=(1, 2))
        assert distances.min() < 1.5  # of 16; bicubic overshoots, and the next digit is twice as far
        assert digits.target[distances.argmin()] == int(name.split("/")[1])


# Downloads, mistakes, archives that lie


def test_a_download_is_checked_and_reported(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zip_of(source / "hymenoptera_data.zip", list(INSECTS))
    small = replace(DATASETS["hymenoptera"], num_train=4, num_val=4, archives=(Archive(path.as_uri()),))
    monkeypatch.setitem(DATASETS, "hymenoptera", small)
    told: list[tuple[str, int, int]] = []
    folder = fetch("hymenoptera", tmp_path / "out", report=lambda *what: told.append(what))
    size = path.stat().st_size
    assert told[0] == ("downloading hymenoptera_data.zip", size, size)
    assert told[-1] == ("unpacking hymenoptera_data.zip", 8, 8)
    assert files_below(tmp_path / "out") == sorted(INSECTS)
    assert folder.stat().st_mode & 0o055 == 0o055  # the scratch folder is private, the data set is not


def test_no_network_names_the_way_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = Archive("http://127.0.0.1:9/hymenoptera_data.zip")  # the discard port: nobody listens
    monkeypatch.setitem(DATASETS, "hymenoptera", replace(DATASETS["hymenoptera"], archives=(nowhere,)))
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(UserError, match=r"cannot download http.*refused\): download it elsewhere .* --from DIR"):
        fetch("hymenoptera", tmp_path / "hymenoptera")
    assert list(tmp_path.iterdir()) == []


def test_a_download_cut_short_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(io.BytesIO):
        headers: ClassVar[dict[str, str]] = {"Content-Length": "1000"}

    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Short(b"x" * 10))
    with pytest.raises(UserError, match=r"cannot download .*closed after 10 of 1000 bytes"):
        fetch("hymenoptera", tmp_path / "hymenoptera")


def test_mistakes_are_named_with_their_mend(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown data set 'minst' \(did you mean 'mnist'\?\): use one of hymen"):
        fetch("minst", tmp_path / "minst")
    with pytest.raises(UserError, match=r"does not hold hymenoptera_data.zip or hymenoptera_data.tar: put it there"):
        fetch("hymenoptera", tmp_path / "hymenoptera", source)
    (source / "train-images-idx3-ubyte.gz").touch()
    with pytest.raises(UserError, match=r"does not hold train-labels-idx1-ubyte.gz or train-labels.*, t10k-images"):
        fetch("mnist", tmp_path / "mnist", source)
    with pytest.raises(UserError, match=r"--from .*/absent is not a folder"):
        fetch("mnist", tmp_path / "mnist", tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*file: File exists: choose another folder"):
        fetch("digits", tmp_path / "file/sub")


@pytest.mark.parametrize("name", ["hymenoptera_data.zip", "hymenoptera_data.tar"])
@pytest.mark.parametrize("data", [b"", b"<html>not found</html>"])
def test_what_is_no_archive_is_an_error(source: Path, tmp_path: Path, name: str, data: bytes) -> None:
    (source / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} is neither a zip nor a tar archive: download it again"):
        fetch("hymenoptera", tmp_path / "hymenoptera", source)


def test_a_tar_cut_short_is_an_error(source: Path, tmp_path: Path) -> None:
    whole = tar_of(tmp_path / "a.tar.gz", {name: os.urandom(1000) for name in INSECTS}, "w:gz").read_bytes()
    (source / "hymenoptera_data.tar").write_bytes(whole[:-2000])
    with pytest.raises(UserError, match=r"hymenoptera_data.tar is damaged \(.*end.*\): download it again"):
        fetch("hymenoptera", tmp_path / "hymenoptera", source)


@pytest.mark.parametrize("evil", ["../escaped.txt", "a/../../escaped.txt"])
def test_archives_cannot_write_elsewhere(tmp_path: Path, evil: str) -> None:
    packed = (zip_of(tmp_path / "a.zip", [evil]), tar_of(tmp_path / "a.tar", {evil: b"x"}))
    for path in packed:
        with pytest.raises(UserError, match=r"is refused, it writes where it should not: .*escaped.txt"):
            unpack(path, tmp_path / f"into-{path.suffix}", lambda *_: None)
    assert not list(tmp_path.rglob("escaped.txt"))
