"""The Triton kernel of `mix_normalize`: a memory-bound pass over the batch seen as flat bytes.

An H100 moves about 3 TB/s and issues about 30 T scalar instructions a second, so at 3 bytes moved per value
(uint8 in, bf16 out) about 30 instructions per value are free and integer division is not. Hence:
- A program owns GROUPS x VEC consecutive bytes of one image. VEC divides a row, so a group lies in one row:
  its row, box tests and load masks are worked out once for 8 values, and its 8-byte load and 16-byte store
  stay whole.
- The channel of value v of a group is (group's channel + v) % 3: three rotated constants per group, and a
  choice between them that is known when the kernel is compiled.
- H and W are compile-time constants: divisions become multiplications and alignment is known. One compile a
  size.
- Loads are masked per group: the partner outside the box, and image i where nothing of it remains, are not
  read.
Instructions per value in sm_90 code (Triton 3.9): 8 unmixed, 13 Mixup, 21 CutMix, 7 to 14 more with flips.
"""

# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false
# `kernel[grid]` is typed as the kernel itself, without num_warps; branches on None arguments are static.

import contextlib

import torch
import triton
import triton.language as tl

from tldist_kernels.mixing_spec import Mixing

VALUES_PER_PROGRAM = 2048
NUM_WARPS = 4


@triton.jit
def _load(image_ptr, flipped, offset, mirrored, mask):
    """uint8 values at `offset`, or at `mirrored` for a flipped image: a branch, so the former stays wide.

    The byte loads of a mirrored group share cache lines, which L1 had better keep. Besides, the branches must
    differ in more than the address: MLIR merges those that do not, and then both load bytes (Triton 3.9).
    """
    if flipped:
        values = tl.load(image_ptr + mirrored, mask=mask, other=0, eviction_policy="evict_last")
    else:
        values = tl.load(image_ptr + offset, mask=mask, other=0)
    return values


@triton.jit
def _mix_normalize_kernel(
    out_ptr,
    images_ptr,
    partner_ptr,
    weight_ptr,
    boxes_ptr,
    flip_ptr,
    erase_ptr,
    scale_0,
    scale_1,
    scale_2,
    shift_0,
    shift_1,
    shift_2,
    ROW_BYTES: tl.constexpr,
    IMAGE_BYTES: tl.constexpr,
    PROGRAMS_PER_IMAGE: tl.constexpr,
    GROUPS: tl.constexpr,
    VEC: tl.constexpr,
):
    image = tl.program_id(0) // PROGRAMS_PER_IMAGE
    part = tl.program_id(0) % PROGRAMS_PER_IMAGE
    # int64 from here on: N * H * W * C passes 2^31 at 14,266 images of 224 px.
    image_start = image.to(tl.int64) * IMAGE_BYTES

    start = ((part * GROUPS + tl.arange(0, GROUPS)) * VEC)[:, None]  # (GROUPS, 1): first byte of each group
    lane = tl.arange(0, VEC)[None, :]  # (1, VEC)
    offset = start + lane
    live = start < IMAGE_BYTES
    row = start // ROW_BYTES
    column_start = start - row * ROW_BYTES  # in bytes: 3 * x + channel
    column = column_start + lane
    first_channel = start % 3  # a row is a whole number of pixels

    mirrored = offset
    flipped = False
    if flip_ptr is not None:
        flipped = tl.load(flip_ptr + image) != 0
        # Channel c of pixel x comes from pixel W - 1 - x: byte 3 * (W - 1 - x) + c of the row, which is
        # (ROW_BYTES - 3) - column + 2 * c. With c = (first + lane) % 3 that is one of three numbers per group
        # less the lane, and in int64 the lane becomes the load's immediate offset: 3 addresses for 8 loads.
        mirrored_a = (start - 2 * column_start + (ROW_BYTES - 3) + 2 * first_channel).to(tl.int64)
        mirrored_b = mirrored_a + tl.where(first_channel == 2, -4, 2)
        mirrored_c = mirrored_a + tl.where(first_channel == 0, 4, -2)
        mirrored = tl.where(lane % 3 == 0, mirrored_a, tl.where(lane % 3 == 1, mirrored_b, mirrored_c))
        mirrored -= lane.to(tl.int64)

    wants_own = live
    if erase_ptr is not None:
        erase_top = tl.load(erase_ptr + image * 4).to(tl.int32)
        erase_left = tl.load(erase_ptr + image * 4 + 1).to(tl.int32) * 3
        erase_bottom = tl.load(erase_ptr + image * 4 + 2).to(tl.int32)
        erase_right = tl.load(erase_ptr + image * 4 + 3).to(tl.int32) * 3
        in_erase_rows = (row >= erase_top) & (row < erase_bottom)
        erased = in_erase_rows & (column_start >= erase_left) & (column_start + VEC <= erase_right)
        wants_own = wants_own & (erased == 0)

    if partner_ptr is None:
        value = _load(images_ptr + image_start, flipped, offset, mirrored, wants_own).to(tl.float32)
    else:
        partner = tl.load(partner_ptr + image).to(tl.int64)
        weight = tl.load(weight_ptr + image).to(tl.float32)
        partner_flipped = False
        if flip_ptr is not None:
            partner_flipped = tl.load(flip_ptr + partner) != 0
        # An image whose weight is 1 has no use for its partner, one whose weight is 0 none for its own pixels
        # in the box. Said through bounds, since Triton's interpreter splats a scalar `weight != 1.0` wrongly.
        if boxes_ptr is None:
            wants_partner = wants_own & (start < tl.where(weight != 1.0, IMAGE_BYTES, 0))
            wants_own = wants_own & (start < tl.where(weight != 0.0, IMAGE_BYTES, 0))
        else:
            top = tl.load(boxes_ptr + image * 4).to(tl.int32)
            left = tl.load(boxes_ptr + image * 4 + 1).to(tl.int32) * 3
            bottom = tl.load(boxes_ptr + image * 4 + 2).to(tl.int32)
            right = tl.load(boxes_ptr + image * 4 + 3).to(tl.int32) * 3
            in_rows = (row >= top) & (row < bottom)
            touched = (column_start + VEC > left) & (column_start < tl.where(weight != 1.0, right, 0))
            hidden = (column_start >= left) & (column_start + VEC <= tl.where(weight != 0.0, 0, right))
            wants_partner = wants_own & in_rows & touched
            wants_own = wants_own & ((in_rows & hidden) == 0)
        own = _load(images_ptr + image_start, flipped, offset, mirrored, wants_own).to(tl.float32)
        partner_start = partner * IMAGE_BYTES
        other = _load(images_ptr + partner_start, partner_flipped, offset, mirrored, wants_partner)
        value = own * weight + other.to(tl.float32) * (1.0 - weight)
        if boxes_ptr is not None:
            value = tl.where(in_rows & (column >= left) & (column < right), value, own)

    # Constants of channels first, first + 1, first + 2 (mod 3) of the group; the compiler knows lane % 3.
    is_0 = first_channel == 0
    is_1 = first_channel == 1
    scale_a = tl.where(is_0, scale_0, tl.where(is_1, scale_1, scale_2))
    scale_b = tl.where(is_0, scale_1, tl.where(is_1, scale_2, scale_0))
    scale_c = tl.where(is_0, scale_2, tl.where(is_1, scale_0, scale_1))
    shift_a = tl.where(is_0, shift_0, tl.where(is_1, shift_1, shift_2))
    shift_b = tl.where(is_0, shift_1, tl.where(is_1, shift_2, shift_0))
    shift_c = tl.where(is_0, shift_2, tl.where(is_1, shift_0, shift_1))
    scale = tl.where(lane % 3 == 0, scale_a, tl.where(lane % 3 == 1, scale_b, scale_c))
    shift = tl.where(lane % 3 == 0, shift_a, tl.where(lane % 3 == 1, shift_b, shift_c))
    result = value * scale + shift
    if erase_ptr is not None:
        result = tl.where(in_erase_rows & (column >= erase_left) & (column < erase_right), 0.0, result)
    tl.store(out_ptr + image_start + offset, result.to(out_ptr.dtype.element_ty), mask=live)


def launch_mix_normalize(
    images_NHWC: torch.Tensor,
    scale_3: tuple[float, ...],
    shift_3: tuple[float, ...],
    dtype: torch.dtype,
    mixing: Mixing,
    *,
    values_per_program: int = VALUES_PER_PROGRAM,
    num_warps: int = NUM_WARPS,
) -> torch.Tensor:
    """`mix_normalize` on checked arguments, where pixel * scale + shift normalises."""
    N, H, W, C = images_NHWC.shape
    image_bytes = H * W * C
    if image_bytes >= 2**31 - values_per_program:
        raise ValueError(f"an image of {H} x {W} px passes the kernel's 2 GiB per image")
    out_NHWC = torch.empty((N, H, W, C), dtype=dtype, device=images_NHWC.device)
    # As many values as fill a 16-byte store, as long as they stay in one row: 8 for bf16 where 8 divides W.
    vec = _largest_power_of_two_divisor(W * C, limit=16 // out_NHWC.element_size())
    groups = triton.next_power_of_2(min(values_per_program, image_bytes) // vec)
    programs_per_image = triton.cdiv(image_bytes, groups * vec)
    with torch.cuda.device(images_NHWC.device) if images_NHWC.is_cuda else contextlib.nullcontext():
        _mix_normalize_kernel[(N * programs_per_image,)](
            out_NHWC,
            images_NHWC,
            _contiguous(mixing.partner_N),
            _contiguous(mixing.weight_N),
            _contiguous(mixing.boxes_N4),
            None if mixing.flip_N is None else mixing.flip_N.contiguous().view(torch.uint8),
            _contiguous(mixing.erase_N4),
            *scale_3,
            *shift_3,
            ROW_BYTES=W * C,
            IMAGE_BYTES=image_bytes,
            PROGRAMS_PER_IMAGE=programs_per_image,
            GROUPS=groups,
            VEC=vec,
            num_warps=num_warps,
        )
    return out_NHWC.permute(0, 3, 1, 2)


def _largest_power_of_two_divisor(number: int, limit: int) -> int:
    """The largest power of two that divides `number`, at most `limit` (itself a power of two)."""
    return min(number & -number, limit)


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()
