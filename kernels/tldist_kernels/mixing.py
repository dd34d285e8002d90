"""Mixup, CutMix, horizontal flip, normalisation, random erasing and the cast, from uint8 pixels in one pass.

Mixup (Zhang et al., ICLR 2018, eq. 1):    x = lambda x_i + (1 - lambda) x_j
CutMix (Yun et al., ICCV 2019, eq. 1):     x = M * x_i + (1 - M) * x_j, M = 0 inside a box, 1 outside it
Both are one rule here: inside a box the pixel is `weight * x_i + (1 - weight) * x_j`, outside it stays x_i.
Mixup is the whole image with weight lambda, CutMix a box with weight 0.
Random erasing (Zhong et al., AAAI 2020) writes 0 after normalisation, which is the data set's mean colour.

Three implementations agree: the Triton kernel (CUDA), `mix_normalize_reference` (batch-wide torch operations,
the definition) and `mix_normalize_cpu` (the same in pieces that stay in cache, for training on CPUs).
"""

from collections.abc import Sequence

import torch

from tldist_kernels.backend import Backend, one_thread, use_triton
from tldist_kernels.mixing_spec import Mixing, affine, affine_row

OUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_CPU_CHUNK_ELEMENTS = 600_000
"""Elements converted at a time on the CPU: 2.4 MB of fp32 scratch (four images of 224 px).
Zen 5, 2 threads, batch 32, bf16 out: 0.94 ms one image at a time, 0.75 ms four, 2.4 ms all at once."""


def mix_normalize(
    images_NHWC: torch.Tensor,
    mean_3: Sequence[float],
    std_3: Sequence[float],
    dtype: torch.dtype,
    *,
    partner_N: torch.Tensor | None = None,
    weight_N: torch.Tensor | None = None,
    boxes_N4: torch.Tensor | None = None,
    flip_N: torch.Tensor | None = None,
    erase_N4: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Flip, mix, normalise as (x / 255 - mean) / std, erase and cast a batch; `Mixing` explains the options.

    images_NHWC: contiguous uint8, C = 3; never written to.  mean_3, std_3: of pixels scaled to [0, 1].
    Returns (N, 3, H, W) of `dtype` (float32, float16 or bfloat16) in channels_last memory.
    On CUDA each pixel needed is read once and written once and nothing waits for the host; a partner_N out of
    range is undefined behaviour there. Raises ValueError for a wrong shape, dtype or device.
    """
    mixing = Mixing(partner_N, weight_N, boxes_N4, flip_N, erase_N4)
    _check_images(images_NHWC, dtype)
    mixing.check(images_NHWC)
    mean, std = _triple(mean_3, "mean_3"), _triple(std_3, "std_3")
    if images_NHWC.numel() == 0:
        return torch.empty_like(images_NHWC, dtype=dtype).permute(0, 3, 1, 2)
    if use_triton(images_NHWC, backend):
        # Imported at the first launch: Triton is optional, and costs half a second to import.
        from tldist_kernels.mixing_triton import launch_mix_normalize

        return launch_mix_normalize(images_NHWC, *affine(mean, std), dtype, mixing)
    if images_NHWC.is_cpu:
        return mix_normalize_cpu(images_NHWC, mean, std, dtype, mixing)
    return mix_normalize_reference(images_NHWC, mean, std, dtype, mixing)


def mix_normalize_reference(
    images_NHWC: torch.Tensor,
    mean_3: Sequence[float],
    std_3: Sequence[float],
    dtype: torch.dtype,
    mixing: Mixing,
) -> torch.Tensor:
    """`mix_normalize` in whole-batch torch operations on any device: what the others are tested against."""
    scale_3, shift_3 = affine_row(tuple(mean_3), tuple(std_3), 1, images_NHWC.device)
    return mix_affine(images_NHWC, scale_3, shift_3, dtype, mixing)


def mix_affine(
    images_NHWC: torch.Tensor, scale_3: torch.Tensor, shift_3: torch.Tensor, dtype: torch.dtype, mixing: Mixing
) -> torch.Tensor:
    """The reference, given float32 tensors on the images' device: a pure function of tensors, for torch.compile."""
    flipped_NHWC = images_NHWC
    if mixing.flip_N is not None:
        flipped_NHWC = torch.where(mixing.flip_N[:, None, None, None], images_NHWC.flip(2), images_NHWC)
    mixed_NHWC = flipped_NHWC.float()
    if mixing.partner_N is not None and mixing.weight_N is not None:
        weight_N111 = mixing.weight_N.float()[:, None, None, None]
        partner_NHWC = flipped_NHWC[mixing.partner_N].float()
        blend_NHWC = mixed_NHWC * weight_N111 + partner_NHWC * (1.0 - weight_N111)
        if mixing.boxes_N4 is None:
            mixed_NHWC = blend_NHWC
        else:
            mixed_NHWC = torch.where(_inside(mixing.boxes_N4, images_NHWC), blend_NHWC, mixed_NHWC)
    normalized_NHWC = mixed_NHWC * scale_3 + shift_3
    if mixing.erase_N4 is not None:
        normalized_NHWC = normalized_NHWC.masked_fill(_inside(mixing.erase_N4, images_NHWC), 0.0)
    return normalized_NHWC.to(dtype).permute(0, 3, 1, 2)


def _inside(boxes_N4: torch.Tensor, images_NHWC: torch.Tensor) -> torch.Tensor:
    """(N, H, W, 1) bool: the pixel lies in its image's box."""
    _, H, W, _ = images_NHWC.shape
    top, left, bottom, right = boxes_N4[:, :, None, None].unbind(1)
    y_H1 = torch.arange(H, device=boxes_N4.device)[:, None]
    x_W = torch.arange(W, device=boxes_N4.device)
    return ((y_H1 >= top) & (y_H1 < bottom) & (x_W >= left) & (x_W < right))[..., None]


@one_thread()
def mix_normalize_cpu(
    images_NHWC: torch.Tensor,
    mean_3: Sequence[float],
    std_3: Sequence[float],
    dtype: torch.dtype,
    mixing: Mixing,
) -> torch.Tensor:
    """`mix_normalize` on the CPU: fp32 in a scratch that stays in cache, boxes cropped, on one thread.

    Two threads take 1.2 ms where one takes 1.4, but wait for each other at every chunk: beside a loader's threads, or
    another process, up to 500 ms (OpenMP spins; two Zen 4 cores).

    Zen 5, CPU ms of one thread, batch 32 of 224 px to bf16: unmixed 1.4, Mixup 2.6, CutMix 2.1; the reference takes
    6.5, 29 and 34, compiled 4.4, 5.5 and 7.2. Calls cost 2 to 8 us an image, too much only below about 50 px.
    """
    N, H, W, C = images_NHWC.shape
    # One scale per byte of a row, not per channel: broadcasting over an inner dimension of 3 is 2.6x slower.
    scale_row, shift_row = affine_row(tuple(mean_3), tuple(std_3), W, images_NHWC.device)
    chunk = max(1, min(N, _CPU_CHUNK_ELEMENTS // (H * W * C)))
    out_NHWC = torch.empty(N, H, W, C, dtype=dtype)
    scratch_NHWC = torch.empty(chunk, H, W, C)
    blend = _BlendOnHost(images_NHWC, mixing)
    for start in range(0, N, chunk):
        stop = min(start + chunk, N)
        mixed_nHWC = scratch_NHWC[: stop - start]
        if mixing.flip_N is None:
            mixed_nHWC.copy_(images_NHWC[start:stop])
        for i in range(start, stop) if blend.needed else ():
            blend.write(i, mixed_nHWC[i - start])
        rows_nHR = mixed_nHWC.view(-1, H, W * C)
        out_nHR = out_NHWC[start:stop].view(-1, H, W * C)
        if dtype == torch.float32:
            torch.addcmul(shift_row, rows_nHR, scale_row, out=out_nHR)
        else:
            out_nHR.copy_(torch.addcmul(shift_row, rows_nHR, scale_row, out=rows_nHR))
    if mixing.erase_N4 is not None:
        for i, (top, left, bottom, right) in enumerate(mixing.erase_N4.clamp(min=0).tolist()):
            out_NHWC[i, top:bottom, left:right] = 0.0
    return out_NHWC.permute(0, 3, 1, 2)


class _BlendOnHost:
    """The flips and the mix of `mix_normalize_cpu`, image by image, with its numbers read only once."""

    def __init__(self, images_NHWC: torch.Tensor, mixing: Mixing) -> None:
        N, H, W, _ = images_NHWC.shape
        self.images_NHWC = images_NHWC
        self.needed = mixing.partner_N is not None or mixing.flip_N is not None
        self.flip = [False] * N if mixing.flip_N is None else mixing.flip_N.tolist()
        self.has_flips = mixing.flip_N is not None
        self.partner = None if mixing.partner_N is None else mixing.partner_N.tolist()
        self.weight = [1.0] * N if mixing.weight_N is None else mixing.weight_N.float().tolist()
        self.boxes = [[0, 0, H, W]] * N if mixing.boxes_N4 is None else mixing.boxes_N4.clamp(min=0).tolist()

    def write(self, i: int, mixed_HWC: torch.Tensor) -> None:
        """Finish image i in `mixed_HWC` (float32), which already holds it unless the batch has flips."""
        if self.has_flips:
            mixed_HWC.copy_(self._oriented(i))
        if self.partner is None or self.weight[i] == 1.0:
            return
        top, left, bottom, right = self.boxes[i]
        region_hwC = mixed_HWC[top:bottom, left:right]
        partner_hwC = self._oriented(self.partner[i], top, left, bottom, right)
        if self.weight[i] == 0.0:
            region_hwC.copy_(partner_hwC)
        else:
            region_hwC.lerp_(partner_hwC.float(), 1.0 - self.weight[i])

    def _oriented(
        self, i: int, top: int = 0, left: int = 0, bottom: int | None = None, right: int | None = None
    ) -> torch.Tensor:
        """A crop of image i (uint8) as it looks after its own flip."""
        image_HWC = self.images_NHWC[i, top:bottom]
        if not self.flip[i]:
            return image_HWC[:, left:right]
        W = image_HWC.shape[1]
        right = W if right is None else min(right, W)
        return image_HWC[:, max(W - right, 0) : max(W - left, 0)].flip(1)


def _check_images(images_NHWC: torch.Tensor, dtype: torch.dtype) -> None:
    if images_NHWC.ndim != 4 or images_NHWC.shape[-1] != 3:
        raise ValueError(f"images_NHWC must be (N, H, W, 3), got {tuple(images_NHWC.shape)}")
    if images_NHWC.dtype != torch.uint8:
        raise ValueError(f"images_NHWC must be uint8, got {images_NHWC.dtype}")
    if not images_NHWC.is_contiguous():
        raise ValueError("images_NHWC must be contiguous; call .contiguous() where the copy is wanted")
    if dtype not in OUT_DTYPES:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")


def _triple(values: Sequence[float], name: str) -> tuple[float, float, float]:
    if len(values) != 3:
        raise ValueError(f"{name} must hold one number per colour channel, got {len(values)}")
    first, second, third = (float(value) for value in values)
    return first, second, third
