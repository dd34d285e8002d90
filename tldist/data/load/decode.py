"""Encoded bytes to pixels: a whole image, or only the box of it that a crop shows."""

from __future__ import annotations

import functools
import importlib.util
import io
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as v2

from tldist.data.source.shards import Place, read_bytes
from tldist.data.source.verify import FORMATS, orientation, pillow_without_limit, too_large

_JPEG, _WEBP = b"\xff\xd8", b"RIFF"


def read_rgb(place: Place) -> Tensor:
    """A file, or a tar's member, as uint8 RGB (C, H, W), turned as its EXIF tag says."""
    return _decode(read_bytes(place))


def read_box(place: Place, box: Sequence[int]) -> Tensor:
    """The box (top, left, height, width) of `read_rgb`'s image, to the same bits. ValueError where it does not fit.

    nvImgCodec, which DALI brings, transforms only the blocks of a JPEG that the box touches: 0.96 ms for 1.40 (crops
    of photos of ImageNet, CPU time of one Zen 4 core).
    """
    data_B = read_bytes(place)
    if HAS_NVIMGCODEC and bytes(data_B[:2]) == _JPEG and (crop := _jpeg_box(data_B, *box)) is not None:
        return crop
    image = _decode(data_B)
    _check_fit(box, image.shape[1:])
    return v2.crop(image, *box)


def _check_fit(box: Sequence[int], size: Sequence[int]) -> None:
    if box[0] + box[2] > size[0] or box[1] + box[3] > size[1]:
        raise ValueError(f"its size is {list(size)} now")


def _decode(data_B: np.ndarray) -> Tensor:
    """Raises ValueError on damaged bytes."""
    if bytes(data_B[:4]).startswith((_JPEG, _WEBP)):
        try:
            return decode_image(torch.from_numpy(data_B), mode=ImageReadMode.RGB, apply_exif_orientation=True)
        except RuntimeError:
            pass  # a CMYK JPEG
    try:
        return _by_pillow(data_B)
    except Exception as error:  # SyntaxError, struct.error, IndexError...
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def _by_pillow(data_B: np.ndarray) -> Tensor:
    """BMP and TIFF, which torchvision does not read, and PNG: on a damaged one torchvision 0.29 ends the process.

    It costs: PNGs of photos take 1.2 times as long as by torchvision, of 32 x 32 pixels 1.9 times (a Zen 4 core).
    """
    with pillow_without_limit(), Image.open(io.BytesIO(data_B.tobytes()), formats=FORMATS) as image:
        if why := too_large(image):
            raise ValueError(why)
        image.load()  # a PNG may tell its orientation after its pixels
        image.info.pop("transparency", None)  # it is not shown; of a palette's, Pillow would warn
        upright = ImageOps.exif_transpose(image) if orientation(image) > 1 else image
        return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)


HAS_NVIMGCODEC: bool = (
    importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.nvimgcodec") is not None
)


def _jpeg_box(data_B: np.ndarray, top: int, left: int, height: int, width: int) -> Tensor | None:
    """A box of an upright JPEG in RGB, (3, height, width); None where nvImgCodec cannot decode it."""
    codec, decoder = _nvimgcodec(), _thread_decoder()
    try:
        stream = codec.CodeStream(data_B)
    except RuntimeError:
        return None
    long, short = max(top + height, left + width), min(top + height, left + width)
    # It tells the size before turning.
    _check_fit((0, 0, short, long), sorted((stream.height, stream.width)))
    region = codec.Region(top, left, top + height, left + width)
    image = decoder.decode(stream.get_sub_code_stream(0, region))
    return None if image is None else torch.from_numpy(np.asarray(image)).permute(2, 0, 1)


_threads = threading.local()


def _thread_decoder() -> Any:
    """This thread's own: calls to one decoder wait for each other."""
    if not hasattr(_threads, "decoder"):
        codec = _nvimgcodec()
        on_cpu = [codec.Backend(codec.BackendKind.CPU_ONLY)]
        _threads.decoder = codec.Decoder(
            device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=on_cpu
        )
    return _threads.decoder


@functools.cache
def _nvimgcodec() -> Any:
    from nvidia import nvimgcodec

    return nvimgcodec
