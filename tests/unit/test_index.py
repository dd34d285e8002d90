"""The index: what is accepted, what is skipped and why, what is remembered, the sentences for mistakes."""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from tldist.config import UserError
from tldist.data.source import index as index_module
from tldist.data.source import verify as verify_module
from tldist.data.source.index import Split, build_index, load_index, save_index, subset
from tldist.data.source.verify import cache_path, orientation

DATA = Path(os.environ.get("TLDIST_DATA") or Path(__file__).parents[3] / "shared" / "data")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def hymenoptera(tmp_path_factory: pytest.TempPathFactory) -> Path:
    archive = DATA / "hymenoptera_data.tar"
    if not archive.is_file():
        pytest.skip(f"{archive} is not there (TLDIST_DATA names its folder)")
    folder = tmp_path_factory.mktemp("hymenoptera")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "hymenoptera_data"


def encoded(fmt: str, mode: str = "RGB", **options: Any) -> bytes:
    """40 x 30 pixels of noise: truncating it anywhere loses pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image, buffer = Image.fromarray(noise), io.BytesIO()
    image = image.convert("L").convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def exif(value: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = value
    return tags


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes; three images each in train, two in val."""
    folder = tmp_path / "photos"
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cats", "dogs"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                (folder / split / name / f"{i}.jpg").write_bytes(encoded("JPEG"))
    return folder


def reason_for(root: Path, data: bytes, name: str = "train/cats/odd.jpg") -> str | None:
    """Why a file with these bytes is skipped; None when it is used."""
    (root / name).write_bytes(data)
    found = build_index(root)
    assert (name in found.train.paths) != (name in {item.path for item in found.skipped})
    return next((item.reason for item in found.skipped if item.path == name), None)


# Real photos


def test_hymenoptera_is_indexed_whole_but_for_its_gif(hymenoptera: Path) -> None:
    found = build_index(hymenoptera)
    assert found.classes == ("ants", "bees")
    assert np.bincount(found.train.labels_N).tolist() == [123, 121]
    assert np.bincount(found.val.labels_N).tolist() == [70, 83]
    assert [(s.path, s.reason) for s in found.skipped] == [("train/ants/imageNotFound.gif", "GIF is not supported")]
    i = found.train.paths.index("train/ants/0013035.jpg")
    assert found.train.sizes_N2[i].tolist() == [512, 768]


# What is accepted


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_formats_are_known_by_content_not_by_name(root: Path, fmt: str, mode: str) -> None:
    assert reason_for(root, encoded(fmt, mode), "train/cats/odd.dat") is None


@pytest.mark.parametrize(("fmt", "mode"), [("JPEG", "CMYK"), ("PNG", "P"), ("PNG", "LA"), ("BMP", "1")])
def test_pixel_types_both_loaders_agree_on_are_accepted(root: Path, fmt: str, mode: str) -> None:
    assert reason_for(root, encoded(fmt, mode)) is None


def test_a_jpeg_with_a_second_picture_is_accepted(root: Path) -> None:
    extras = {"save_all": True, "append_images": [Image.new("RGB", (40, 30))]}
    assert reason_for(root, encoded("MPO", **extras)) is None


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(("value", "size"), [(1, [30, 40]), (3, [30, 40]), (6, [40, 30]), (8, [40, 30])])
def test_sizes_are_those_after_the_exif_orientation(root: Path, fmt: str, value: int, size: list[int]) -> None:
    assert reason_for(root, encoded(fmt, exif=exif(value))) is None
    train = build_index(root).train
    assert train.sizes_N2[train.paths.index("train/cats/odd.jpg")].tolist() == size


def test_orientation_ignores_what_dali_ignores() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert Image.open(io.BytesIO(encoded("JPEG", xmp=xmp))).getexif()[0x0112] == 6
    assert orientation(Image.open(io.BytesIO(encoded("JPEG", xmp=xmp)))) == 1
    for odd in (exif(9), exif(0), b"Exif\0\0garbage"):
        assert orientation(Image.open(io.BytesIO(encoded("JPEG", exif=odd)))) == 1


def test_a_long_panorama_is_accepted_and_a_bomb_is_not(
    root: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own limit, far below both
    panorama = io.BytesIO()
    Image.new("L", (20_000, 200)).save(panorama, "JPEG")
    assert reason_for(root, panorama.getvalue()) is None
    bomb = bytearray(encoded("PNG"))
    bomb[16:24] = (10**5).to_bytes(4, "big") * 2  # width and height in the header, which its CRC follows
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    assert reason_for(root, bytes(bomb)) == "too large: 100000 x 100000 pixels (at most 268 million)"
    assert not recwarn.list
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_images_may_lie_any_number_of_folders_down(root: Path) -> None:
    deep = root / "train/cats/2024/may"
    deep.mkdir(parents=True)
    (deep / "a.jpg").write_bytes(encoded("JPEG"))
    train = build_index(root).train
    assert train.labels_N[train.paths.index("train/cats/2024/may/a.jpg")] == 0


# What is skipped


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"a text that somebody named .jpg", "not an image"),
        (encoded("GIF"), "GIF is not supported"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC is not supported"),
        (encoded("JPEG")[:20], "damaged: its header cannot be read"),
        (encoded("JPEG", quality=95)[:-300], "truncated: the end of the file is missing"),
        (encoded("PNG")[:500], "truncated: the end of the file is missing"),
        (encoded("PNG")[:-12], "truncated: the end of the file is missing"),
        (encoded("BMP")[:-100], "truncated: the end of the file is missing"),
        (encoded("TIFF")[:-500], "truncated: the end of the file is missing"),
        (encoded("PNG", "I;16"), "PNG pixels of type I;16 are not supported: convert it to 8-bit RGB"),
        (encoded("TIFF", "1"), "TIFF pixels of type 1 are not supported: convert it to 8-bit RGB"),
    ],
)
def test_what_no_loader_can_use_is_skipped_with_its_reason(root: Path, data: bytes, reason: str) -> None:
    assert reason_for(root, data) == reason


@pytest.mark.parametrize("fmt", ["PNG", "WEBP", "TIFF"])
def test_animations_are_skipped(root: Path, fmt: str) -> None:
    extras = {"save_all": True, "append_images": [Image.new("RGB", (40, 30))]}
    assert reason_for(root, encoded(fmt, **extras)) == f"2 pictures in one {fmt} are not supported"


def test_truncated_files_are_found_even_where_pillow_was_told_to_accept_them(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert str(reason_for(root, encoded("JPEG", quality=95)[:-300])).startswith("truncated")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_clutter_is_named_not_dropped(root: Path) -> None:
    for name in (
        ".DS_Store",
        "train/.DS_Store",
        "train/cats/._0.jpg",
        "train/cats/Thumbs.db",
        "val/notes.txt",
    ):
        (root / name).write_bytes(b"x")
    (root / "train/.ipynb_checkpoints").mkdir()
    (root / "train/cats/gone.jpg").symlink_to(root / "nowhere.jpg")
    (root / "train/cats/again").symlink_to(root / "train")
    os.mkfifo(root / "train/cats/pipe.jpg")
    assert {(s.path, s.reason) for s in build_index(root).skipped} == {
        ("train/.DS_Store", "hidden file"),
        ("train/.ipynb_checkpoints", "hidden folder"),
        ("train/cats/._0.jpg", "hidden file"),
        ("train/cats/Thumbs.db", "hidden file"),
        ("train/cats/again", "link to a folder that holds it"),
        ("train/cats/gone.jpg", "broken link"),
        ("train/cats/pipe.jpg", "not a file"),
        ("val/notes.txt", "not in a class folder"),
    }


# The index itself


def test_paths_are_sorted_and_labels_follow_the_class_folders(root: Path) -> None:
    found = build_index(root)
    assert found.root == str(root)
    assert found.classes == ("cats", "dogs")
    assert found.train.paths == tuple(f"train/{c}/{i}.jpg" for c in ("cats", "dogs") for i in range(3))
    assert found.train.labels_N.tolist() == [0, 0, 0, 1, 1, 1]
    assert (found.train.labels_N.dtype, found.train.sizes_N2.dtype) == (np.int64, np.int32)
    assert len(found.val) == 4
    with pytest.raises(ValueError, match="read-only"):
        found.train.labels_N[0] = 1


def test_a_train_class_may_be_missing_in_val(root: Path) -> None:
    for path in (root / "val/cats").iterdir():
        path.unlink()
    (root / "val/cats").rmdir()
    assert set(build_index(root).val.labels_N.tolist()) == {1}


def test_classes_choose_and_renumber(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "birds").mkdir()
        (root / split / "birds/0.png").write_bytes(encoded("PNG"))
    found = build_index(root, classes=("dogs", "birds"))
    assert found.classes == ("birds", "dogs")
    assert found.train.labels_N.tolist() == [0, 1, 1, 1]
    assert build_index(root).fingerprint != found.fingerprint


def test_the_fingerprint_is_of_the_content_not_of_the_place(root: Path) -> None:
    before = build_index(root).fingerprint
    moved = root.rename(root.with_name("elsewhere"))
    assert build_index(moved).fingerprint == before
    (moved / "train/cats/0.jpg").write_bytes(encoded("JPEG", quality=30))
    assert build_index(moved).fingerprint != before


def test_an_index_survives_its_file(root: Path, tmp_path: Path) -> None:
    (root / "train/cats/bad.jpg").write_bytes(b"")
    found = build_index(root)
    save_index(found, tmp_path / "index.json")
    assert load_index(tmp_path / "index.json") == found
    assert not list(tmp_path.glob(".index*"))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": 99}'])
def test_a_damaged_index_file_is_an_error_with_its_mend(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(UserError, match=r"index.json is damaged or not an index .*: delete it and build it again"):
        load_index(tmp_path / "index.json")
    with pytest.raises(UserError, match=r"cannot read the index .*: No such file"):
        load_index(tmp_path / "absent.json")


# What is remembered


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were really decoded."""
    names: list[str] = []
    real = verify_module.verify

    def counting(path: str) -> verify_module.Verdict:
        names.append(Path(path).name)
        return real(path)

    monkeypatch.setattr(verify_module, "verify", counting)
    return names


def test_a_second_build_decodes_nothing(root: Path, decoded: list[str]) -> None:
    (root / "train/cats/bad.jpg").write_bytes(b"not an image")
    first = build_index(root)
    assert len(decoded) == 11
    decoded.clear()
    assert build_index(root) == first
    assert decoded == []


def test_only_changed_and_new_files_are_verified_again(root: Path, decoded: list[str]) -> None:
    build_index(root)
    decoded.clear()
    changed = root / "train/cats/1.jpg"
    size, before = changed.stat().st_size, changed.stat().st_mtime_ns
    changed.write_bytes(b"x" * size)
    os.utime(changed, ns=(before + 1, before + 1))  # same size, a nanosecond later
    (root / "val/dogs/new.png").write_bytes(encoded("PNG"))
    found = build_index(root)
    assert sorted(decoded) == ["1.jpg", "new.png"]
    assert [s.path for s in found.skipped] == ["train/cats/1.jpg"]


def test_a_build_of_some_classes_keeps_what_is_known_of_the_others(root: Path, decoded: list[str]) -> None:
    for split in ("train", "val"):
        (root / split / "birds").mkdir()
        (root / split / "birds/0.png").write_bytes(encoded("PNG"))
    build_index(root)
    (root / "train/cats/0.jpg").write_bytes(encoded("JPEG", quality=30))
    build_index(root, classes=("cats", "dogs"))
    decoded.clear()
    build_index(root)
    assert decoded == []


@pytest.mark.parametrize("text", ["", "[]", '{"version": 1, "files": 3}', '{"version": 1, "files": {"a": []}}'])
def test_a_damaged_cache_costs_time_only(root: Path, decoded: list[str], text: str) -> None:
    first = build_index(root)
    cache = cache_path(str(root))
    assert cache is not None
    cache.write_text(text)
    assert build_index(root) == first
    assert len(decoded) == 20


def test_a_cache_folder_that_cannot_be_written_is_gone_without(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # nobody, root included, can make a folder in it
    assert len(build_index(root).train) == 6


def test_a_file_that_could_not_be_read_is_tried_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Image.open

    def refuse(path: str, **options: Any) -> Image.Image:
        if path.endswith("train/cats/0.jpg"):
            raise PermissionError(13, "Permission denied")
        return real(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Image, "open", refuse)
        skipped = build_index(root).skipped
    assert [(s.path, s.reason) for s in skipped] == [("train/cats/0.jpg", "cannot be read: Permission denied")]
    assert build_index(root).skipped == ()


def test_an_interrupted_build_keeps_what_it_found(root: Path, decoded: list[str]) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(root, progress=interrupt)
    decoded.clear()
    assert len(build_index(root).train) == 6
    assert len(decoded) == 7


def test_progress_ends_at_all_files(root: Path) -> None:
    told: list[tuple[int, int]] = []
    build_index(root, progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1] == (10, 10)


# A few images of each class


def test_subset_is_a_function_of_the_seed() -> None:
    n = 60
    labels = np.repeat(np.arange(3), 20)
    names = tuple(f"train/{'abc'[label]}/{i:02d}.jpg" for i, label in enumerate(labels))
    split = Split(names, labels, np.arange(2 * n, dtype=np.int32).reshape(n, 2))
    five = subset(split, 5, seed=1)
    assert np.bincount(five.labels_N).tolist() == [5, 5, 5]
    assert five.paths == tuple(sorted(five.paths))
    assert five == subset(split, 5, seed=1) != subset(split, 5, seed=2)
    assert set(five.paths) < set(subset(split, 9, seed=1).paths)
    assert [names.index(path) for path in five.paths] == (five.sizes_N2[:, 0] // 2).tolist()
    assert subset(split, 20, seed=1) == split == subset(split, 0, seed=1)
    with pytest.raises(UserError, match="per-class is 21, but class 'a' has 20 usable images: give 20 or less"):
        subset(split, 21, seed=1)


# The sentences


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def spoil(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"no")


def drop(folder: Path) -> None:
    empty(folder)
    folder.rmdir()


def rename(old: Path, new: str) -> None:
    old.rename(old.with_name(new))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda r: rename(r, "photos2"),
            r"photos does not exist \(did you mean 'photos2'\?\): give the folder",
        ),
        (
            lambda r: rename(r / "val", "test"),
            r"photos has no val/ folder \(found: test, train\): arrange it as",
        ),
        (lambda r: rename(r / "train", "x"), r"photos has no train/ folder \(found: val, x\): arrange it as"),
        (lambda r: [drop(d) for d in (r / "train").iterdir()], r"photos/train has no class folders: arrange"),
        (lambda r: [drop(d) for d in (r / "val").iterdir()], r"photos/val has no class folders: arrange"),
        (
            lambda r: spoil(r / "train/cats"),
            r"class 'cats' in train has no usable image \(3 skipped, first: train/cats/0.jpg: not an image\)",
        ),
        (
            lambda r: empty(r / "val/dogs"),
            r"class 'dogs' in val has no usable image \(the folder is empty\): add images to .*/val/dogs",
        ),
        (
            lambda r: rename(r / "val/dogs", "dog"),
            r"photos has class 'dog' in val, not in train \(did you mean 'dogs'\?\): rename",
        ),
        (
            lambda r: [drop(r / split / "dogs") for split in ("train", "val")],
            r"photos/train has one class \('cats'\): a classifier needs at least two",
        ),
    ],
)
def test_mistakes_in_the_folder_are_named_with_their_mend(
    root: Path, change: Callable[[Path], object], sentence: str
) -> None:
    change(root)
    with pytest.raises(UserError, match=sentence):
        build_index(root)


def test_mistakes_in_the_root_are_named_with_their_mend(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--data.root is missing: give the folder that holds train/CLASS/\*.jpg"):
        build_index("")
    with pytest.raises(UserError, match=f"has no train/ folder .did you mean '{root}'"):
        build_index(root.parent)
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"photos.zip is a file: unpack it"):
        build_index(tmp_path / "photos.zip")
    with pytest.raises(UserError, match=r"/nowhere/at/all does not exist: give"):
        build_index("/nowhere/at/all")


def test_mistakes_in_the_chosen_classes_are_named_with_their_mend(root: Path) -> None:
    with pytest.raises(UserError, match=r"photos/train has no class 'dgos' \(did you mean 'dogs'\?\)"):
        build_index(root, classes=("cats", "dgos"))
    with pytest.raises(UserError, match=r"--data.classes leaves one class \('cats'\)"):
        build_index(root, classes=("cats", "cats"))
    for name in ("ants", "bees"):
        (root / "train" / name).mkdir()
        (root / "train" / name / "0.jpg").write_bytes(encoded("JPEG"))
    with pytest.raises(UserError, match=r"photos/val has none of the classes ants, bees: add images"):
        build_index(root, classes=("ants", "bees"))


def test_a_folder_that_may_not_be_read_is_an_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def refuse(folder: str) -> object:  # chmod does not stop root, who runs many containers
        if folder.endswith("train/dogs"):
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(index_module.os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot read the folder .*/train/dogs: Permission denied"):
        build_index(root)


def test_a_name_that_is_not_utf8_is_an_error(root: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(root / "train/cats") + b"/caf\xe9.jpg")).write_bytes(encoded("JPEG"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(UserError, match=r"train/cats/ holds a name that is not UTF-8 \('caf\\udce9.jpg'\): rename it"):
        build_index(root)
