"""A contact sheet of what training sees: images as evaluation shows them, as augmentation does, and mixed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tldist.config import DataConfig
from tldist.data.batches import plan_batch
from tldist.data.load.bad_images import BadImages
from tldist.data.load.loader import Loader, Read
from tldist.data.load.torchvision_loader import TorchvisionLoader
from tldist.data.mixing import draw_mix, mixed_targets, step_generator
from tldist.data.presets import AugmentSpec, augment_spec
from tldist.data.source.index import Index
from tldist_kernels import mix_normalize

IMAGES, EPOCHS, MIXED_STEPS = 6, 6, 3
_TILE, _GAP, _LINE = 128, 4, 14


@dataclass(frozen=True)
class _Tile:
    image: Image.Image
    caption: str


def contact_sheet(
    data: DataConfig, index: Index, seed: int, loader: Loader, most: int, bad: BadImages, read: Read | None = None
) -> Image.Image:
    """One row for each of a few training images: as evaluation shows it, then in the first epochs; then mixed batches.

    Args:
        loader: the run's own, for training; `most`: images that it takes at once.
        bad: what becomes of images that cannot be read.
        read: what the loader reads from, where that is no file.
    """
    spec, split = augment_spec(data.augment), index.train
    ids_N = np.unique(np.linspace(0, len(split) - 1, min(IMAGES, most, len(split))).astype(int))
    plans = [plan_batch(split, spec, data.image_size, seed, epoch, ids_N) for epoch in range(EPOCHS)]
    # First, one by one: what `read` keeps is then decoded once, though the epochs below want it side by side.
    one_by_one = TorchvisionLoader(Path(index.root), AugmentSpec(), data.image_size, 1, torch.device("cpu"), bad, read)
    with contextlib.closing(one_by_one):
        (plain,) = one_by_one.batches([plan_batch(split, AugmentSpec(), data.image_size, 0, 0, ids_N)])
    shown = [batch.images_NHWC.cpu() for batch in loader.batches(plans)]
    rows = [
        [_tile(image, index.classes[label]), *(_tile(images[i], f"epoch {e + 1}") for e, images in enumerate(shown))]
        for i, (image, label) in enumerate(zip(plain.images_NHWC, plain.labels_N.tolist(), strict=True))
    ]
    steps = range(MIXED_STEPS if data.mix_at == "input" else 0)
    rows += [row for step in steps if (row := _mixed(data, index, seed, step, shown[0], plain.labels_N))]
    return _drawn(rows)


def _mixed(data: DataConfig, index: Index, seed: int, step: int, images_NHWC: Tensor, labels_N: Tensor) -> list[_Tile]:
    """The images mixed as one worker's step would, with the weights of their labels; empty where mixing is off."""
    mix = draw_mix(data, len(labels_N), step_generator(torch.device("cpu"), seed, step, 0))
    if mix is None:
        return []
    mixed_NCHW = mix_normalize(
        images_NHWC.contiguous(),
        (0.0, 0.0, 0.0),
        (1.0, 1.0, 1.0),
        torch.float32,
        partner_N=mix.partner_N,
        weight_N=mix.weight_N,
        boxes_N4=mix.boxes_N4,
    )
    mixed_NHWC = (255 * mixed_NCHW).round().to(torch.uint8).permute(0, 2, 3, 1)
    targets = mixed_targets(labels_N, mix)
    assert targets.partner_labels_N is not None
    assert targets.weight_N is not None
    told = zip(labels_N.tolist(), targets.partner_labels_N.tolist(), targets.weight_N.tolist(), strict=True)
    captions = [f"{w:.2f} {index.classes[a]} {1 - w:.2f} {index.classes[b]}" for a, b, w in told]
    return [_tile(image, caption) for image, caption in zip(mixed_NHWC, captions, strict=True)]


def _tile(image_HWC: Tensor, caption: str) -> _Tile:
    image = Image.fromarray(image_HWC.numpy()).resize((_TILE, _TILE), Image.Resampling.LANCZOS)
    return _Tile(image, caption)


def _drawn(rows: list[list[_Tile]]) -> Image.Image:
    width, height = _TILE + _GAP, _TILE + _LINE + _GAP
    sheet = Image.new("RGB", (width * max(map(len, rows)) + _GAP, height * len(rows) + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            left, top = _GAP + x * width, _GAP + y * height
            sheet.paste(tile.image, (left, top))
            draw.text((left, top + _TILE), _fitting(tile.caption, font), fill="#1f2933", font=font)
    return sheet


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of the text as a tile is wide."""
    while font.getlength(text) > _TILE:
        text = text[:-2] + "…"
    return text
