"""The contact sheet shows what training sees: the loader's own pictures, mixed as a step mixes them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tldist.config import DataConfig
from tldist.data.batches import plan_batch
from tldist.data.load.bad_images import BadImages, DecodeError
from tldist.data.load.open import open_loader
from tldist.data.mixing import draw_mix, mixed_targets, step_generator
from tldist.data.presets import augment_spec
from tldist.data.source.index import Index, build_index
from tldist.train import preview
from tldist.train.preview import EPOCHS, IMAGES, MIXED_STEPS, contact_sheet
from tldist_launcher.cli import main

CPU = torch.device("cpu")


def sheet(data: DataConfig, seed: int = 0, index: Index | None = None) -> Image.Image:
    bad = BadImages(data.on_bad_image == "skip")
    loader = open_loader(data, augment_spec(data.augment), IMAGES, CPU, bad=bad)
    made = contact_sheet(data, index or build_index(data.root), seed, loader, IMAGES, bad)
    loader.close()
    return made


def tile(image: Image.Image, row: int, column: int) -> np.ndarray:
    left = preview._GAP + column * (preview._TILE + preview._GAP)
    top = preview._GAP + row * (preview._TILE + preview._LINE + preview._GAP)
    return np.asarray(image.crop((left, top, left + preview._TILE, top + preview._TILE)))


@pytest.mark.parametrize("kind", ["dali", "torchvision"])
def test_the_rows_are_the_loaders_pictures_of_the_first_epochs(photos: Path, kind: str) -> None:
    data = DataConfig(root=str(photos), image_size=preview._TILE, augment="lecture", loader=kind)  # type: ignore[arg-type]
    made = sheet(data)
    assert made.width == preview._GAP + (1 + EPOCHS) * (preview._TILE + preview._GAP)
    index, spec = build_index(photos), augment_spec("lecture")
    ids_N = np.unique(np.linspace(0, len(index.train) - 1, IMAGES).astype(int))
    loader = open_loader(data, spec, IMAGES, CPU)
    for epoch in (0, EPOCHS - 1):
        plan = plan_batch(index.train, spec, data.image_size, 0, epoch, ids_N)
        (batch,) = loader.batches([plan])
        for row in range(IMAGES):
            assert np.array_equal(tile(made, row, 1 + epoch), batch.images_NHWC[row].numpy())
    loader.close()


def test_mixed_rows_are_those_of_the_steps_with_their_labels_weights(photos: Path) -> None:
    data = DataConfig(root=str(photos), image_size=preview._TILE, augment="none", cutmix=1.0)
    made = sheet(data, seed=3)
    index = build_index(photos)
    ids_N = np.unique(np.linspace(0, len(index.train) - 1, IMAGES).astype(int))
    labels_N = torch.from_numpy(index.train.labels_N[ids_N])
    for step in range(MIXED_STEPS):
        mix = draw_mix(data, IMAGES, step_generator(CPU, 3, step, 0))
        assert mix is not None
        weight_N = mixed_targets(labels_N, mix).weight_N
        assert weight_N is not None
        for i in range(IMAGES):
            own, shown = tile(made, i, 1), tile(made, IMAGES + step, i)
            partner = tile(made, int(mix.partner_N[i]), 1)
            from_own, from_partner = (shown == own).all(-1), (shown == partner).all(-1)
            assert (from_own | from_partner).all()
            if mix.partner_N[i] != i:
                assert from_own.mean() == pytest.approx(weight_N[i].item(), abs=0.02)


@pytest.mark.parametrize("kind", ["dali", "torchvision"])
def test_an_image_that_broke_after_the_check_is_named_or_left_out(photos: Path, tmp_path: Path, kind: str) -> None:
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    index = build_index(root)
    first = root / index.train.paths[0]
    first.write_bytes(bytes(first.stat().st_size))
    data = DataConfig(root=str(root), image_size=preview._TILE, loader=kind)  # type: ignore[arg-type]
    with pytest.raises(DecodeError, match=index.train.paths[0]):
        sheet(data, index=index)
    made = sheet(replace(data, on_bad_image="skip"), index=index)
    for column in range(1 + EPOCHS):
        assert np.array_equal(tile(made, 0, column), tile(made, 1, column)), "the next image is shown in its place"


def test_the_command_writes_a_picture(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sheet.png"
    words = ["data", "preview", str(photos), "--augment", "randaugment", "--mixup", "0.2", "--image-size", "32"]
    assert main([*words, "--out", str(out)]) == 0
    with Image.open(out) as opened:
        assert opened.height > IMAGES * preview._TILE
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "name one folder"),
        (["ROOT", "--out", "sheet.gif"], "must be a .jpg or .png"),
        (["ROOT", "--augment", "lectur"], "lecture"),
        (["/nowhere"], "/nowhere"),
    ],
)
def test_a_mistake_is_one_sentence(
    photos: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "preview", *(str(photos) if word == "ROOT" else word for word in words)]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert "Traceback" not in told
