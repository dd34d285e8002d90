"""Augmentation as numbers: every random choice is a pure function of (seed, epoch, image), drawn here and only here.

The loaders receive finished numbers (crop box, angle, ...) and carry no generator of their own. So any loader on
any number of workers shows an image the same way, a resumed epoch continues exactly, and DALI can be compared
with torchvision pixel by pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from tldist.data.presets import BINS, POLICY_OPS, AugmentSpec

RESIZE_RATIO = 256 / 224
"""Evaluation resizes the short side to this times the crop, as torchvision's presets do."""


@dataclass(frozen=True)
class Views:
    """How each of N images is to be shown. Boxes are (top, left, height, width) in pixels.

    The image's `box` is cut out, resized to `resize` (height, width), and the network's square is taken at
    `crop` (top, left) of that; the rest applies to the square in the order of the fields.
    """

    box_N4: np.ndarray
    resize_N2: np.ndarray
    crop_N2: np.ndarray
    flip_N: np.ndarray
    angle_N: np.ndarray
    """Degrees, counter-clockwise."""
    brightness_N: np.ndarray
    contrast_N: np.ndarray
    saturation_N: np.ndarray
    """0 where the image is turned grey."""
    hue_N: np.ndarray
    """Degrees."""
    policy_op_NK: np.ndarray
    """The policy's K operations, one after the other: positions in POLICY_OPS."""
    policy_bin_NK: np.ndarray
    """Their magnitudes."""
    policy_sign_NK: np.ndarray
    """1 where the magnitude is negative, for operations that take one."""
    blur_sigma_N: np.ndarray
    erase_N4: np.ndarray
    """Empty boxes where nothing is erased."""

    def __getitem__(self, i: int) -> Views:
        """The i-th image's view, still with a leading dimension of 1; it shares memory."""
        return Views(*(getattr(self, name)[i : i + 1] for name in _FIELDS))

    def take(self, rows: Sequence[int]) -> Views:
        """The views of some images, in the order asked for."""
        return Views(*(getattr(self, name)[rows] for name in _FIELDS))


_FIELDS = tuple(field.name for field in fields(Views))


def uniforms(seed: int, epoch: int, ids_N: np.ndarray, count: int) -> np.ndarray:
    """(N, count) numbers in [0, 1): a counter-based generator, splitmix64 (Steele et al., 2014) over the key.

    Row i depends on (seed, epoch, ids_N[i]) alone, whatever else is in the batch.
    """
    with np.errstate(over="ignore"):
        key = _mix64(_mix64(np.uint64(seed) + np.uint64(1)) ^ np.uint64(epoch))
        rows = _mix64(key ^ ids_N.astype(np.uint64))
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = _mix64(rows[:, None] + steps[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix64(z: np.ndarray | np.uint64) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = np.asarray(z, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


# Which of an image's random numbers each choice uses; fixed, so that switching one operation moves no other.
_TRIES = 10
_CROP, _ERASE = 0, 32
_FLIP, _ANGLE, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GREY, _BLUR, _ERASE_P = range(64, 73)
_POLICY = 73  # and on: three for each operation


def draw_views(
    spec: AugmentSpec, sizes_N2: np.ndarray, image_size: int, seed: int, epoch: int, ids_N: np.ndarray
) -> Views:
    """The views of N images of `sizes_N2` (height, width) in one epoch."""
    n = len(ids_N)
    u = uniforms(seed, epoch, ids_N, _POLICY + 3 * spec.policy_ops)
    if spec.crop_area is None:
        box, resize, crop = evaluation_crop(sizes_N2, image_size)
    else:
        box = random_boxes(sizes_N2, u[:, _CROP : _CROP + 22], spec.crop_area, spec.crop_ratio)
        resize, crop = np.full((n, 2), image_size), np.zeros((n, 2))
    erase = np.zeros((n, 4))
    if spec.erase:
        squares, of_boxes = np.full((n, 2), image_size), u[:, _ERASE : _ERASE + 22]
        erase = random_boxes(squares, of_boxes, spec.erase_area, spec.erase_ratio, fallback=False)
    saturation = _around_one(u[:, _SATURATION], spec.saturation)
    low, high = spec.blur_sigma or (0.0, 0.0)
    op_NK, bin_NK, sign_NK = np.moveaxis(u[:, _POLICY:].reshape(n, spec.policy_ops, 3), 2, 0)
    return Views(
        box_N4=box.astype(np.int32),
        resize_N2=resize.astype(np.int32),
        crop_N2=crop.astype(np.int32),
        flip_N=(u[:, _FLIP] < spec.flip).astype(np.int32),
        angle_N=(spec.rotate_deg * (2 * u[:, _ANGLE] - 1)).astype(np.float32),
        brightness_N=_around_one(u[:, _BRIGHTNESS], spec.brightness),
        contrast_N=_around_one(u[:, _CONTRAST], spec.contrast),
        saturation_N=np.where(u[:, _GREY] < spec.grey, 0.0, saturation).astype(np.float32),
        hue_N=(360 * spec.hue * (2 * u[:, _HUE] - 1)).astype(np.float32),
        policy_op_NK=(op_NK * len(POLICY_OPS)).astype(np.int32),
        policy_bin_NK=_bins(spec, bin_NK),
        policy_sign_NK=(sign_NK < 0.5).astype(np.int32),
        blur_sigma_N=(low + (high - low) * u[:, _BLUR]).astype(np.float32),
        erase_N4=np.where(u[:, _ERASE_P, None] < spec.erase, erase, 0).astype(np.int32),
    )


def _bins(spec: AugmentSpec, u_NK: np.ndarray) -> np.ndarray:
    """RandAugment has one magnitude, TrivialAugment any."""
    chosen_NK = u_NK * BINS if spec.policy == "trivial" else np.full(u_NK.shape, spec.rand_magnitude)
    return chosen_NK.astype(np.int32)


def _around_one(u_N: np.ndarray, spread: float) -> np.ndarray:
    return (1 + spread * (2 * u_N - 1)).astype(np.float32)


def evaluation_crop(sizes_N2: np.ndarray, image_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whole image, short side to 256/224 of the crop, centre square: torchvision's Resize and CenterCrop."""
    resize = evaluation_sizes(sizes_N2, image_size)
    box = np.concatenate([np.zeros_like(sizes_N2), sizes_N2], axis=1)
    return box, resize, np.round((resize - image_size) / 2)


def short_side(image_size: int) -> int:
    """Pixels to which evaluation resizes an image's short side."""
    return round(image_size * RESIZE_RATIO)


def evaluation_sizes(sizes_N2: np.ndarray, image_size: int) -> np.ndarray:
    """(height, width) that evaluation resizes whole images to; for one that has such a size already, its own."""
    short = short_side(image_size)
    scale = short / sizes_N2.min(axis=1, keepdims=True)
    return np.maximum(np.floor(sizes_N2 * scale + 1e-9), short).astype(np.int64)


def random_boxes(
    sizes_N2: np.ndarray,
    u_NK: np.ndarray,
    area: tuple[float, float],
    ratio: tuple[float, float],
    fallback: bool = True,
) -> np.ndarray:
    """Boxes (top, left, height, width) as torchvision's RandomResizedCrop.get_params draws them.

    Ten tries of (area share, log-uniform aspect ratio) from u_NK's first 20 columns, the first that fits is
    taken, its place is uniform (columns 20, 21). Where none fits: the largest central box with an allowed
    ratio, or (`fallback` off, as RandomErasing does) an empty one.
    """
    heights, widths = sizes_N2[:, :1].astype(np.float64), sizes_N2[:, 1:].astype(np.float64)
    share = area[0] + (area[1] - area[0]) * u_NK[:, :_TRIES]
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + (high - low) * u_NK[:, _TRIES : 2 * _TRIES])
    w = np.round(np.sqrt(share * heights * widths * aspect))
    h = np.round(np.sqrt(share * heights * widths / aspect))
    fits = (w >= 1) & (w <= widths) & (h >= 1) & (h <= heights)
    rows, first = np.arange(len(u_NK)), fits.argmax(axis=1)
    h, w, heights, widths = h[rows, first], w[rows, first], heights[:, 0], widths[:, 0]
    top = np.floor(u_NK[:, 20] * (heights - h + 1))
    left = np.floor(u_NK[:, 21] * (widths - w + 1))
    drawn = np.stack([top, left, h, w], axis=1)
    otherwise = _central_boxes(heights, widths, ratio) if fallback else np.zeros_like(drawn)
    return np.where(fits.any(axis=1)[:, None], drawn, otherwise).astype(np.int64)


def _central_boxes(heights: np.ndarray, widths: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    w = np.minimum(widths, np.round(heights * ratio[1]))
    h = np.minimum(heights, np.round(widths / ratio[0]))
    return np.stack([(heights - h) // 2, (widths - w) // 2, np.maximum(h, 1), np.maximum(w, 1)], axis=1)
