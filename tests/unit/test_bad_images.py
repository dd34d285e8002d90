"""A zoo of images that cannot be used, under both policies, on both loaders: the same ones named, the same counts."""

from __future__ import annotations

import io
import json
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import write_images
from tldist import config
from tldist.config import DataConfig, ModelConfig, RunConfig, TrackingConfig, TrainConfig, UserError
from tldist.data.batches import Worker, eval_batches
from tldist.data.load.bad_images import BadImages, DecodeError
from tldist.data.load.dali import DaliLoader
from tldist.data.presets import AugmentSpec
from tldist.data.source.index import build_index, load_index, save_index
from tldist.train import worker
from tldist_launcher.cli import main

LOADERS = ("dali", "torchvision")
GOOD = {"train": 16, "val": 6}


def encoded(fmt: str, mode: str = "RGB", size: tuple[int, int] = (60, 50), **options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image, buffer = Image.fromarray(noise).convert("L" if mode == "I;16" else mode), io.BytesIO()
    (image.convert("I").convert(mode) if mode == "I;16" else image).save(buffer, fmt, **options)
    return buffer.getvalue()


def png_damaged(where: str) -> bytes:
    """In the second of its pieces (IDAT): its name, its pixels, or its checksum alone."""
    data = bytearray(encoded("PNG", size=(300, 300)))
    name = data.index(b"IDAT", data.index(b"IDAT") + 4)
    end = name + 4 + int.from_bytes(data[name - 4 : name], "big")
    if where == "name":
        data[name : name + 4] = b"\0\1\2\3"
    elif where == "pixels":
        data[name + 100 : name + 1100] = bytes(1000)
        data[end : end + 4] = zlib.crc32(data[name:end]).to_bytes(4, "big")
    else:
        data[end : end + 4] = bytes(4)
    return bytes(data)


USABLE = {
    "cmyk.jpg": encoded("JPEG", "CMYK"),
    "grey.jpg": encoded("JPEG", "L"),
    "png-in-disguise.jpg": encoded("PNG"),
    "panorama.jpg": encoded("JPEG", size=(20_000, 40)),
    "palette.png": encoded("PNG", "P"),
}
BAD = {
    "truncated.jpg": encoded("JPEG", quality=95)[:-1000],
    "beheaded.jpg": encoded("JPEG")[100:],
    "empty.jpg": b"",
    "text.jpg": b"no image at all",
    "sixteen-bit.png": encoded("PNG", "I;16"),
    **{f"damaged-{where}.png": png_damaged(where) for where in ("name", "pixels", "checksum")},
    "animated.gif": encoded("GIF", save_all=True, append_images=[Image.new("RGB", (60, 50))]),
}


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    root = tmp_path / "zoo"
    write_images(root / "train", {"cats": 8, "dogs": 8}, seed=1)
    write_images(root / "val", {"cats": 3, "dogs": 3}, seed=2)
    for name, data in {**USABLE, **BAD}.items():
        (root / "train" / "cats" / name).write_bytes(data)
        (root / "val" / "dogs" / name).write_bytes(data)
    return root


def settings(root: Path, run_dir: Path, loader: str, policy: str) -> RunConfig:
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(weights="none"),
        data=DataConfig(
            root=str(root),
            batch_size=4,
            image_size=32,
            threads=2,
            loader=loader,  # type: ignore[arg-type]
            on_bad_image=policy,  # type: ignore[arg-type]
        ),
        train=TrainConfig(epochs=2, precision="fp32"),
        tracking=TrackingConfig(wandb="disabled"),
    )


def trained(root: Path, run_dir: Path, loader: str, policy: str) -> tuple[dict[str, Any], Counter[str]]:
    """The summary, and how often each image was named."""
    run_dir.mkdir(exist_ok=True)
    summary = worker.run(config.to_json(settings(root, run_dir, loader, policy)))
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    told = [row["text"] for row in rows if row["event"] == "notice" and row["text"].startswith("skipped ")]
    return summary, Counter(text.split()[1].removesuffix(":") for text in told)


def test_skip_trains_on_all_others_and_names_each_once(zoo: Path, tmp_path: Path) -> None:
    runs = [trained(zoo, tmp_path / loader, loader, "skip") for loader in LOADERS]
    for summary, told in runs:
        assert summary["train_images"] == GOOD["train"] + len(USABLE)
        assert summary["val_images"] == GOOD["val"] + len(USABLE)
        assert summary["skipped_images"] == 2 * len(BAD)
        assert told == Counter([f"{place}/{name}" for name in BAD for place in ("train/cats", "val/dogs")])


@pytest.mark.parametrize("loader", LOADERS)
def test_error_stops_before_anything_is_trained(zoo: Path, tmp_path: Path, loader: str) -> None:
    (run_dir := tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=f"{2 * len(BAD)} of the images under .* the first train/cats/animated.gif"):
        worker.run(config.to_json(settings(zoo, run_dir, loader, "error")))
    assert not (run_dir / "checkpoints").exists()


def test_the_command_line_says_so_in_one_sentence(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "folder", "--data.root", str(zoo), "--run-dir", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "--data.on-bad-image skip" in told
    assert "Traceback" not in told
    assert not (tmp_path / "run").exists()
    assert main(["data", "check", str(zoo)]) == 0
    listed = capsys.readouterr().out
    assert all(f"{place}/{name}: " in listed for name in BAD for place in ("train/cats", "val/dogs"))
    assert f"bad images: {2 * len(BAD)}" in listed


def broken_later(root: Path, run_dir: Path) -> tuple[Path, ...]:
    """A run directory whose index was made while all was well; then one image of each split lost its end, and a PNG
    was damaged further down."""
    for path in (path for path in root.rglob("*") if path.name in BAD):
        path.unlink()
    (png := root / "train" / "dogs" / "later.png").write_bytes(encoded("PNG", size=(300, 300)))
    run_dir.mkdir()
    save_index(build_index(root), run_dir / "index.json")
    paths = root / "train" / "dogs" / "0003.jpg", root / "val" / "cats" / "0001.jpg"
    for path in paths:
        path.write_bytes(path.read_bytes()[:300])
    png.write_bytes(png_damaged("pixels"))
    return *paths, png


@pytest.mark.parametrize("loader", LOADERS)
def test_what_breaks_later_is_left_out_under_skip(zoo: Path, tmp_path: Path, loader: str) -> None:
    run_dir = tmp_path / "run"
    paths = broken_later(zoo, run_dir)
    summary, told = trained(zoo, run_dir, loader, "skip")
    assert summary["skipped_images"] == 3
    assert told == Counter(str(path.relative_to(zoo)) for path in paths)
    shown = json.loads((run_dir / "predictions.json").read_text())["samples"]
    assert len(shown) == GOOD["val"] + len(USABLE) - 1


@pytest.mark.parametrize("loader", LOADERS)
def test_what_breaks_later_is_named_under_error(zoo: Path, tmp_path: Path, loader: str) -> None:
    broken_later(zoo, tmp_path / "run")
    with pytest.raises(DecodeError, match=r"train/dogs/(0003\.jpg|later\.png)"):
        trained(zoo, tmp_path / "run", loader, "error")


def test_whatever_class_of_error_dali_raises_the_bad_image_is_left_out(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its operators also raise ValueError, IndexError and TypeError."""
    bad = {str(path.relative_to(zoo)) for path in broken_later(zoo, tmp_path / "run")}
    run = DaliLoader._run

    def other_class(self: DaliLoader, pipeline: Any) -> Any:
        try:
            return run(self, pipeline)
        except RuntimeError as error:
            raise IndexError(str(error)) from error

    monkeypatch.setattr(DaliLoader, "_run", other_class)
    split, met = load_index(tmp_path / "run" / "index.json").train, BadImages(skip=True)
    loader = DaliLoader(zoo, AugmentSpec(), 32, 4, 1, torch.device("cpu"), met)
    shown = sum(len(batch.ids_N) for batch in loader.batches(eval_batches(split, 32, 4, Worker(0, 1))))
    loader.close()
    assert met.reasons.keys() == bad & set(split.paths)
    assert shown == len(split) - len(met.reasons)
