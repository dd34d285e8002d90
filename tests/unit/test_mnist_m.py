"""MNIST-M: |patch - digit|, the same bytes each time, and what is wrong with what was given."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tldist.config import UserError
from tldist.data.load.decode import read_rgb
from tldist.data.make import mnist_m
from tldist.data.make.mnist_m import SIDE, blend, make_mnist_m, read_mnist
from tldist.data.source.domains import build_domains
from tldist.data.source.index import build_index
from tldist.data.source.shards import check_bytes
from tldist_launcher.cli import main


@pytest.fixture(scope="module")
def digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Stands for MNIST: 40 and 20 pictures of its size, which has no small form."""
    rng = np.random.default_rng(0)
    made = {}
    for name, n in (("train", 40), ("val", 20)):
        images_NHW = np.zeros((n, SIDE, SIDE), dtype=np.uint8)
        images_NHW[:, 6:26, 6:26] = rng.integers(0, 256, (n, 20, 20))
        made[name] = images_NHW, np.arange(n, dtype=np.uint8) % 10
    return made


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(1)
    for i, size in enumerate([(50, 70, 3), (40, 33, 3), (20, 90, 3)]):  # the last is too small for a patch
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, digits: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    monkeypatch.setattr(mnist_m, "read_mnist", lambda folder: digits)


def test_every_pixel_is_a_difference(digits: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Some patch of some photo lies behind each digit, the same in all channels; and none is used for all."""
    rng = np.random.default_rng(2)
    photos = [rng.integers(0, 256, (40, 45, 3)), rng.integers(0, 256, (33, 32, 3))]
    digits_NHW, _ = digits["train"]
    blended = blend(digits_NHW, photos, 0, 0)
    found = set()
    for digit_HW, image_HWC in zip(digits_NHW.astype(int), blended, strict=True):
        places = [
            (which, top, left)
            for which, photo in enumerate(photos)
            for top in range(photo.shape[0] - SIDE + 1)
            for left in range(photo.shape[1] - SIDE + 1)
            if np.array_equal(
                np.abs(photo[top : top + SIDE, left : left + SIDE] - digit_HW[:, :, None]), image_HWC.astype(int)
            )
        ]
        assert len(places) == 1
        found.add(places[0])
    assert {which for which, _, _ in found} == {0, 1}
    assert len(found) > 20
    assert np.array_equal(blend(digits_NHW, photos, 0, 0), blended)
    assert not np.array_equal(blend(digits_NHW, photos, 1, 0), blended)
    assert not np.array_equal(blend(digits_NHW, photos, 0, 1), blended)


def bytes_of(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_same_bytes_from_a_folder_and_from_a_tar(small: None, photos: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        for path in sorted(photos.iterdir(), reverse=True):
            archive.add(path, f"data/{path.name}")
    one = make_mnist_m(tmp_path, photos, tmp_path / "one")
    two = make_mnist_m(tmp_path, tmp_path / "photos.tar", tmp_path / "two")
    other = make_mnist_m(tmp_path, photos, tmp_path / "other", seed=1)
    assert bytes_of(one) == bytes_of(two)
    assert bytes_of(one / "source") == bytes_of(other / "source")
    assert bytes_of(one / "target") != bytes_of(other / "target")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other", "photos.tar", "two"]


def test_nothing_is_lost_and_damage_is_found(
    small: None, photos: Path, tmp_path: Path, digits: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    root = make_mnist_m(tmp_path, photos, tmp_path / "made")
    index = build_domains(root, ("source", "target"))
    assert index.target is not None
    assert (len(index.train), len(index.target), len(index.val)) == (40, 40, 20)
    assert index.classes == tuple("0123456789")
    for split, expected in ((index.train, "source"), (index.target, "target")):
        assert split.members is not None
        for i in range(0, 40, 7):
            number = int(split.paths[i].rsplit("/", 1)[1].removesuffix(".png"))
            shown = read_rgb(split.members.place(root, i)).permute(1, 2, 0).numpy()
            digit_HW = digits["train"][0][number]
            grey = np.repeat(digit_HW[:, :, None], 3, axis=2)
            assert np.array_equal(shown, grey) == (expected == "source")
            assert int(split.paths[i].split("/")[2]) == number % 10
    tar = root / "target" / "val-000000.tar"
    check_bytes(str(root / "target"))
    damaged = bytearray(tar.read_bytes())
    damaged[600] ^= 1
    tar.write_bytes(bytes(damaged))
    with pytest.raises(UserError, match="is not what was written"):
        check_bytes(str(root / "target"))


def test_what_is_wrong(small: None, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    with pytest.raises(UserError, match="full is not empty"):
        make_mnist_m(tmp_path, photos, tmp_path / "full")
    with pytest.raises(UserError, match="nowhere does not exist"):
        make_mnist_m(tmp_path, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="holds no photo of 32 x 32 pixels"):
        make_mnist_m(tmp_path, tmp_path / "full", tmp_path / "out")
    (tmp_path / "full" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match=r"broken.png cannot be read"):
        make_mnist_m(tmp_path, tmp_path / "full", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mnist_itself(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--mnist .* does not hold train-images-idx3-ubyte.gz"):
        read_mnist(tmp_path)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{name}-ubyte.gz").write_bytes(gzip.compress(b"other"))
    with pytest.raises(UserError, match="its md5 is"):
        read_mnist(tmp_path)


def test_the_real_one(shared_data: Path) -> None:
    splits = read_mnist(shared_data / "mnist")
    assert [images.shape for images, _ in splits.values()] == [(60_000, 32, 32), (10_000, 32, 32)]
    assert splits["train"][0][:, :2].max() == 0
    assert splits["val"][1][:5].tolist() == [7, 2, 1, 0, 4]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["make"], "name what to make"),
        (["make", "mnist-m", "--mnist", "here", "--root", "out"], "also needs --photos"),
        (["make", "mnist-m", "--fotos", "x"], "has no flag --fotos"),
    ],
)
def test_the_command_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *words]) == 2
    assert says in capsys.readouterr().err


def test_made_by_the_command_line(
    small: None, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made"
    assert main(["data", "make", "mnist-m", "--mnist", str(tmp_path), "--photos", str(photos), "--root", str(out)]) == 0
    said = capsys.readouterr().out
    assert all(build_index(out / domain).fingerprint in said for domain in ("source", "target"))
