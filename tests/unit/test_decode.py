"""Decoding a box alone gives the bits of the whole image's box, whatever kind of file it is."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as v2

from tldist.data.load import decode
from tldist.data.load.decode import read_box, read_rgb
from tldist.data.source.verify import refusal, strict_pillow


def picture() -> Image.Image:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    return small.resize((161, 123), Image.Resampling.BICUBIC)


def turned(orientation: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f"turned {o}": ("RGB", "jpg", turned(o)) for o in range(1, 9)},
    **{f"subsampling {s}": ("RGB", "jpg", {"subsampling": s}) for s in range(3)},
    "progressive": ("RGB", "jpg", {"progressive": True}),
    "restart markers": ("RGB", "jpg", {"restart_marker_blocks": 2}),
    "grey": ("L", "jpg", {}),
    "CMYK": ("CMYK", "jpg", {}),
    "PNG": ("RGB", "png", {}),
    "PNG, turned": ("RGB", "png", turned(6)),
    "PNG with alpha": ("RGBA", "png", {}),
    "PNG with a palette": ("P", "png", {"transparency": bytes(range(256))}),
    "WebP": ("RGB", "webp", {"lossless": True}),
    "BMP": ("RGB", "bmp", {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_has_the_bits_of_the_whole_image(tmp_path: Path, kind: str) -> None:
    mode, suffix, options = KINDS[kind]
    path = tmp_path / f"image.{suffix}"
    picture().convert(mode).save(path, **options)
    whole = read_rgb(path)
    height, width = whole.shape[1:]
    assert (height, width) == (
        (161, 123) if kind in ("turned 5", "turned 6", "turned 7", "turned 8", "PNG, turned") else (123, 161)
    )
    rng = np.random.default_rng(1)
    boxes = [(0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, 1, 1)]
    for top, left in rng.integers(0, (height, width), (20, 2)).tolist():
        boxes.append((top, left, int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1))))
    for box in boxes:
        assert torch.equal(read_box(path, box), v2.crop(whole, *box)), box


def test_jpegs_are_decoded_by_the_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above compares whole images with themselves."""
    assert decode.HAS_NVIMGCODEC
    picture().save(path := tmp_path / "image.jpg")
    expected = v2.crop(read_rgb(path), 8, 9, 30, 40)
    monkeypatch.setattr(decode, "_decode", lambda data: pytest.fail("decoded in full"))
    assert torch.equal(read_box(path, (8, 9, 30, 40)), expected)
    monkeypatch.undo()
    monkeypatch.setattr(decode, "HAS_NVIMGCODEC", False)
    assert torch.equal(read_box(path, (8, 9, 30, 40)), expected)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_box_outside_of_the_image_is_an_error(tmp_path: Path, suffix: str) -> None:
    """The file was replaced by another one since its size was noted."""
    picture().save(path := tmp_path / f"image.{suffix}")
    for box in ((100, 0, 100, 10), (0, 150, 10, 100)):
        with pytest.raises(ValueError, match="its size is"):
            read_box(path, box)


def test_what_cannot_be_decoded_is_an_error(tmp_path: Path) -> None:
    picture().save(path := tmp_path / "image.jpg")
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], data[:2] + b"\0" * 500, b"", b"GIF89a"):
        path.write_bytes(broken)
        with pytest.raises((RuntimeError, OSError, ValueError)):
            read_box(path, (100, 100, 20, 50))


def test_what_verification_accepts_is_decoded_however_large(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    Image.new("1", (15_000, 12_500), 1).save(path := tmp_path / "large.bmp")  # Pillow's own limit is at 179 million
    with strict_pillow():
        assert not refusal(str(path))
    assert read_box(path, (12_000, 14_000, 2, 3)).tolist() == [[[255] * 3] * 2] * 3
    assert not recwarn.list


def test_what_verification_calls_too_large_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture().save(path := tmp_path / "image.png")
    monkeypatch.setattr("tldist.data.source.verify._MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match="too large: 161 x 123 pixels"):
        read_rgb(path)


def test_threads_decode_side_by_side(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.jpg" for i in range(8)]
    for i, path in enumerate(paths):
        picture().rotate(40 * i).save(path)
    expected = [v2.crop(read_rgb(path), 10, 20, 60, 70) for path in paths]
    wrong: list[Path] = []

    def work() -> None:
        for _ in range(10):
            read = zip(paths, expected, strict=True)
            wrong.extend(path for path, crop in read if not torch.equal(read_box(path, (10, 20, 60, 70)), crop))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
