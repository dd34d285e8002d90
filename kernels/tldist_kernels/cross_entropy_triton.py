"""Triton kernels of `mixed_cross_entropy`: the logits are read once forward, read and written once backward.

Why the backward recomputes: the incoming gradient is known only then. A gradient made in the forward pass
would be written, read back, scaled and written again, four passes over N * C with the forward's read; one
log-sum-exp kept per row makes it three.
C is a compile-time constant, so that loads are as wide as its factors of two allow.
"""

# pyright: reportCallIssue=false, reportIncompatibleMethodOverride=false
# `kernel[grid]` is typed as the kernel itself, without num_warps; once_differentiable hides parameter names.

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

VALUES_PER_PROGRAM = 4096
SHORT_ROWS_VALUES = 1024
"""Rows shorter than half of this share a program: with 10 classes, 32 rows of 16 columns."""
MAX_ROWS_PER_PROGRAM = 32


@triton.jit
def _target_logits(logits_ptr, labels_ptr, row, live, C: tl.constexpr, ROW_STRIDE: tl.constexpr):
    """Each row's logit at its label, NaN where the label is no class: out of range is seen, not read."""
    label = tl.load(labels_ptr + row, mask=live, other=0)
    valid = live & (label >= 0) & (label < C)
    pointer = logits_ptr + row.to(tl.int64) * ROW_STRIDE + label
    return tl.load(pointer, mask=valid, other=float("nan")).to(tl.float32)


@triton.jit
def _forward_kernel(
    loss_ptr,
    lse_ptr,
    logits_ptr,
    labels_ptr,
    partner_ptr,
    weight_ptr,
    smoothing,
    N,
    C: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < N
    row_start = row.to(tl.int64)[:, None] * ROW_STRIDE
    # Online softmax (Milakov and Gimelshein, 2018): `total` is the sum of exp(z - peak) so far.
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    logit_sum = tl.zeros((ROWS,), tl.float32)
    for first in range(0, C, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, :]
        mask = live[:, None] & (column < C)
        logits = tl.load(logits_ptr + row_start + column, mask=mask, other=float("-inf")).to(tl.float32)
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        # A row of -inf so far (masked classes) would subtract inf from inf.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        peak = new_peak
        if HAS_SMOOTHING:
            logit_sum += tl.sum(tl.where(mask, logits, 0.0), axis=1)
    lse = peak + tl.log(total)

    target = _target_logits(logits_ptr, labels_ptr, row, live, C, ROW_STRIDE)
    if partner_ptr is not None:
        weight = tl.load(weight_ptr + row, mask=live, other=0.0).to(tl.float32)
        other = _target_logits(logits_ptr, partner_ptr, row, live, C, ROW_STRIDE)
        target = target * weight + other * (1.0 - weight)
    loss = lse - (1.0 - smoothing) * target
    if HAS_SMOOTHING:
        loss -= smoothing * (logit_sum / C)
    tl.store(loss_ptr + row, loss, mask=live)
    tl.store(lse_ptr + row, lse, mask=live)


@triton.jit
def _backward_kernel(
    grad_logits_ptr,
    grad_loss_ptr,
    grad_loss_stride,
    lse_ptr,
    logits_ptr,
    labels_ptr,
    partner_ptr,
    weight_ptr,
    smoothing,
    N,
    C: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    PROGRAMS_PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // PROGRAMS_PER_ROW * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(0) % PROGRAMS_PER_ROW) * BLOCK + tl.arange(0, BLOCK)[None, :]
    live = row < N
    mask = live & (column < C)
    wide_row = row.to(tl.int64)
    logits = tl.load(logits_ptr + wide_row * ROW_STRIDE + column, mask=mask, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + row, mask=live, other=0.0)
    grad_loss = tl.load(grad_loss_ptr + row * grad_loss_stride, mask=live, other=0.0).to(tl.float32)
    label = tl.load(labels_ptr + row, mask=live, other=0).to(tl.int32)
    confidence = (1.0 - smoothing) * grad_loss
    grad = tl.exp(logits - lse) * grad_loss - smoothing / C * grad_loss
    if partner_ptr is None:
        grad = tl.where(column == label, grad - confidence, grad)
    else:
        weight = tl.load(weight_ptr + row, mask=live, other=0.0).to(tl.float32)
        partner = tl.load(partner_ptr + row, mask=live, other=0).to(tl.int32)
        grad = tl.where(column == label, grad - confidence * weight, grad)
        grad = tl.where(column == partner, grad - confidence * (1.0 - weight), grad)
    tl.store(grad_logits_ptr + wide_row * C + column, grad.to(grad_logits_ptr.dtype.element_ty), mask=mask)


class MixedCrossEntropy(torch.autograd.Function):
    """apply(logits_NC, labels_N, partner_labels_N, weight_N, label_smoothing) -> loss_N, float32."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_NC: torch.Tensor,
        labels_N: torch.Tensor,
        partner_labels_N: torch.Tensor | None,
        weight_N: torch.Tensor | None,
        label_smoothing: float,
    ) -> torch.Tensor:
        if logits_NC.stride(1) != 1:
            logits_NC = logits_NC.contiguous()
        labels_N = labels_N.contiguous()
        partner_labels_N, weight_N = _contiguous(partner_labels_N), _contiguous(weight_N)
        loss_N, lse_N = _launch_forward(logits_NC, labels_N, partner_labels_N, weight_N, label_smoothing)
        ctx.save_for_backward(logits_NC, lse_N, labels_N, partner_labels_N, weight_N)
        ctx.label_smoothing = label_smoothing
        return loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_loss_N,) = grad_outputs
        logits_NC, lse_N, labels_N, partner_labels_N, weight_N = ctx.saved_tensors
        grad_NC = _launch_backward(
            grad_loss_N, lse_N, logits_NC, labels_N, partner_labels_N, weight_N, ctx.label_smoothing
        )
        return grad_NC, None, None, None, None


def _launch_forward(
    logits_NC: torch.Tensor,
    labels_N: torch.Tensor,
    partner_labels_N: torch.Tensor | None,
    weight_N: torch.Tensor | None,
    label_smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss_N, lse_N), both float32."""
    N, C = logits_NC.shape
    loss_N = torch.empty(N, dtype=torch.float32, device=logits_NC.device)
    lse_N = torch.empty_like(loss_N)
    rows, block = _tile(C)
    with _device_of(logits_NC):
        _forward_kernel[(triton.cdiv(N, rows),)](
            loss_N,
            lse_N,
            logits_NC,
            labels_N,
            partner_labels_N,
            weight_N,
            label_smoothing,
            N,
            C=C,
            ROW_STRIDE=logits_NC.stride(0),
            HAS_SMOOTHING=label_smoothing > 0.0,
            ROWS=rows,
            BLOCK=block,
            num_warps=_num_warps(rows * block),
        )
    return loss_N, lse_N


def _launch_backward(
    grad_loss_N: torch.Tensor,
    lse_N: torch.Tensor,
    logits_NC: torch.Tensor,
    labels_N: torch.Tensor,
    partner_labels_N: torch.Tensor | None,
    weight_N: torch.Tensor | None,
    label_smoothing: float,
) -> torch.Tensor:
    """grad_logits_NC, contiguous, in the dtype of the logits. `grad_loss_N` may be expanded (stride 0)."""
    N, C = logits_NC.shape
    grad_NC = torch.empty((N, C), dtype=logits_NC.dtype, device=logits_NC.device)
    rows, block = _tile(C)
    programs_per_row = triton.cdiv(C, block)
    with _device_of(logits_NC):
        _backward_kernel[(triton.cdiv(N, rows) * programs_per_row,)](
            grad_NC,
            grad_loss_N,
            grad_loss_N.stride(0),
            lse_N,
            logits_NC,
            labels_N,
            partner_labels_N,
            weight_N,
            label_smoothing,
            N,
            C=C,
            ROW_STRIDE=logits_NC.stride(0),
            PROGRAMS_PER_ROW=programs_per_row,
            ROWS=rows,
            BLOCK=block,
            num_warps=_num_warps(rows * block),
        )
    return grad_NC


def _tile(C: int) -> tuple[int, int]:
    """(rows, columns) of one program, powers of two: several short rows, one, or a stretch of a long one."""
    block = min(triton.next_power_of_2(C), VALUES_PER_PROGRAM)
    rows = max(1, min(MAX_ROWS_PER_PROGRAM, SHORT_ROWS_VALUES // block))
    return rows, block


def _num_warps(values: int) -> int:
    """16 values a thread at most, so that a tile stays in registers."""
    return max(1, min(8, values // 512))


def _device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()
