"""Triton kernels of `mmd`: tiles of the T x T pairs (T = N + M) live on chip alone, whatever T is.

Forward: a program per tile of the upper triangle forms z_i.z_j over D, the distances, the kernels and their weighted
sum, and writes one number. Torch adds the numbers in a fixed order.

Backward: S (see mmd.py) is wanted for every slice of D at once, and a tile of it costs D multiplications a pair to
make. A program per (row block, slice of D) would make it again for every slice: at D = 2048 and slices of 256, 4.5
times the arithmetic. Hence a program per (row block, column block) makes its tile once, keeps it,
and walks D: what its columns do to its rows goes to a partial gradient of its own, and torch adds the partials. No
atomics, so runs repeat to the bit. There are only as many partials as give the device PROGRAMS programs; further
columns come in further launches, which add to the same partials. So they hold at most 2112 + T rows of D floats.

N = M = 256, D = 2048: forward 0.5 GFLOP, backward 2.1 GFLOP; inputs and gradients 4 to 8 MB, partials 16 MB, all of
which an H100's L2 (50 MB) holds. Tiles are small so that all of its 132 SMs work: 32 x 32 gives 136 tiles forward,
16 x 128 gives 128 backward; wider tiles would save L2 reads (71 MB forward, 300 MB backward, in float32) and leave
SMs idle. From about 1000 rows on, 64 x 64 tiles fill the device forward.
float32 is multiplied as three TF32 products (tf32x3), which keep 21 of its 24 bits; half precision natively, its
products being exact in float32. S stays float32 in both: rounded, it would not cancel where the batches match.
"""

# pyright: reportCallIssue=false, reportIncompatibleMethodOverride=false, reportGeneralTypeIssues=false
# `kernel[grid]` is typed as the kernel itself, without num_warps; once_differentiable hides parameter names;
# static_range is iterable where kernels are compiled alone.

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from tldist_kernels.mmd_formula import PairWeights, centred, kernel_rates, pair_weights

PROGRAMS = 132
"""The SMs of an H100. A constant, so that every device adds in the same order."""
BACKWARD_ROWS = 16
BLOCK_D = 64


@triton.jit
def _load_rows(z_ptr, row, d, T, D: tl.constexpr):
    """z at (row, d), 0 beyond the batch; `row` and `d` broadcast to a tile."""
    return tl.load(z_ptr + row.to(tl.int64) * D + d, mask=(row < T) & (d < D), other=0.0)


@triton.jit
def _squared_distances(
    z_ptr,
    norms_ptr,
    row,
    column,
    T,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(ROWS, COLUMNS) of ||z_row - z_column||^2."""
    gram = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        rows = _load_rows(z_ptr, row[:, None], d[None, :], T, D)
        columns = _load_rows(z_ptr, column[None, :], d[:, None], T, D)
        gram = tl.dot(rows, columns, gram, input_precision="tf32x3")
    row_norms = tl.load(norms_ptr + row, mask=row < T, other=0.0)
    column_norms = tl.load(norms_ptr + column, mask=column < T, other=0.0)
    return tl.maximum(row_norms[:, None] + column_norms[None, :] - 2.0 * gram, 0.0)


@triton.jit
def _pair_weights(row, column, N, T, source_weight, target_weight, cross_weight):
    """(ROWS, COLUMNS) of the pairs' shares: 0 beyond the batch and for a row with itself."""
    row = row[:, None]
    column = column[None, :]
    within = tl.where(row < N, source_weight, target_weight)
    weights = tl.where((row < N) == (column < N), within, cross_weight)
    return tl.where((row < T) & (column < T) & (row != column), weights, 0.0)


@triton.jit
def _forward_kernel(
    partials_ptr,
    z_ptr,
    norms_ptr,
    rates_ptr,
    N,
    T,
    source_weight,
    target_weight,
    cross_weight,
    D: tl.constexpr,
    KERNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_block = tl.program_id(0)
    column_block = tl.program_id(1)
    partials_ptr += row_block * tl.num_programs(1) + column_block
    if column_block < row_block:
        tl.store(partials_ptr, 0.0)
        return
    row = row_block * BLOCK + tl.arange(0, BLOCK)
    column = column_block * BLOCK + tl.arange(0, BLOCK)
    squared = _squared_distances(z_ptr, norms_ptr, row, column, T, D, BLOCK, BLOCK, BLOCK_D)
    k = tl.zeros((BLOCK, BLOCK), tl.float32)
    for u in tl.static_range(KERNELS):
        k += tl.exp(-tl.load(rates_ptr + u) * squared)
    k *= _pair_weights(row, column, N, T, source_weight, target_weight, cross_weight)
    times = tl.where(column_block > row_block, 2.0, 1.0)  # for the tile below the diagonal
    tl.store(partials_ptr, times * tl.sum(k))


@triton.jit
def _backward_kernel(
    partials_ptr,
    grad_loss_ptr,
    z_ptr,
    norms_ptr,
    rates_ptr,
    first_block,
    N,
    T,
    source_weight,
    target_weight,
    cross_weight,
    D: tl.constexpr,
    KERNELS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = (first_block + tl.program_id(1)) * COLUMNS + tl.arange(0, COLUMNS)
    squared = _squared_distances(z_ptr, norms_ptr, row, column, T, D, ROWS, COLUMNS, BLOCK_D)
    slope = tl.zeros((ROWS, COLUMNS), tl.float32)
    for u in tl.static_range(KERNELS):
        rate = tl.load(rates_ptr + u)
        slope += rate * tl.exp(-rate * squared)
    # Minus S, so that the products below add to what a row has already.
    pull = slope * _pair_weights(row, column, N, T, source_weight, target_weight, cross_weight)
    pull *= 4.0 * tl.load(grad_loss_ptr).to(tl.float32)
    drag = tl.sum(-pull, axis=1)
    row = row[:, None]
    out_ptr = partials_ptr + (tl.program_id(1).to(tl.int64) * T + row) * D
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)[None, :]
        grad = _load_rows(z_ptr, row, d, T, D).to(tl.float32) * tl.expand_dims(drag, 1)
        if ACCUMULATE:
            grad += tl.load(out_ptr + d, mask=(row < T) & (d < D), other=0.0)
        others = _load_rows(z_ptr, column[:, None], d, T, D).to(tl.float32)
        grad = tl.dot(pull, others, grad, input_precision="tf32x3")
        tl.store(out_ptr + d, grad, mask=(row < T) & (d < D))


class MMD(torch.autograd.Function):
    """apply(source_ND, target_MD, multiples, bandwidth, unbiased) -> MMD^2, float32."""

    @staticmethod
    def forward(
        ctx: Any,
        source_ND: torch.Tensor,
        target_MD: torch.Tensor,
        multiples: tuple[float, ...],
        bandwidth: torch.Tensor | float | None,
        unbiased: bool,
    ) -> torch.Tensor:
        N, M = source_ND.shape[0], target_MD.shape[0]
        z_TD = centred(source_ND, target_MD).to(source_ND.dtype)
        norms_T = z_TD.float().square().sum(1)  # of the rounded rows, whose products are exact
        if z_TD.is_cpu:
            z_TD = z_TD.float()  # Triton's interpreter multiplies bfloat16 as the integers that hold it
        rates_U = kernel_rates(multiples, bandwidth, norms_T)
        weights = pair_weights(N, M, len(multiples), unbiased)
        ctx.save_for_backward(z_TD, norms_T, rates_U)
        ctx.weights, ctx.N, ctx.dtype = weights, N, source_ND.dtype
        return _launch_forward(z_TD, norms_T, rates_U, N, weights).sum() + weights.own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_loss,) = grad_outputs
        z_TD, norms_T, rates_U = ctx.saved_tensors
        partials_PTD = _launch_backward(grad_loss, z_TD, norms_T, rates_U, ctx.N, ctx.weights)
        grad_TD = partials_PTD.sum(0).to(ctx.dtype)
        return grad_TD[: ctx.N], grad_TD[ctx.N :], None, None, None


def _launch_forward(
    z_TD: torch.Tensor, norms_T: torch.Tensor, rates_U: torch.Tensor, N: int, weights: PairWeights
) -> torch.Tensor:
    """partials_BB: float32, the sum over each tile of the upper triangle (and its mirror image), 0 below."""
    T, D = z_TD.shape
    block = _forward_block(T)
    blocks = triton.cdiv(T, block)
    partials_BB = torch.empty((blocks, blocks), dtype=torch.float32, device=z_TD.device)
    with _device_of(z_TD):
        _forward_kernel[(blocks, blocks)](
            partials_BB,
            z_TD,
            norms_T,
            rates_U,
            N,
            T,
            *weights[:3],
            D=D,
            KERNELS=rates_U.shape[0],
            BLOCK=block,
            BLOCK_D=_block_d(D),
            num_warps=4,
        )
    return partials_BB


def _launch_backward(
    grad_loss: torch.Tensor,
    z_TD: torch.Tensor,
    norms_T: torch.Tensor,
    rates_U: torch.Tensor,
    N: int,
    weights: PairWeights,
) -> torch.Tensor:
    """partials_PTD: float32; their sum is the gradient of the joined batch."""
    T, D = z_TD.shape
    columns, parts = _backward_split(T)
    partials_PTD = torch.empty((parts, T, D), dtype=torch.float32, device=z_TD.device)
    column_blocks = triton.cdiv(T, columns)
    for first_block in range(0, column_blocks, parts):
        grid = (triton.cdiv(T, BACKWARD_ROWS), min(parts, column_blocks - first_block))
        with _device_of(z_TD):
            _backward_kernel[grid](
                partials_PTD,
                grad_loss,
                z_TD,
                norms_T,
                rates_U,
                first_block,
                N,
                T,
                *weights[:3],
                D=D,
                KERNELS=rates_U.shape[0],
                ACCUMULATE=first_block > 0,
                ROWS=BACKWARD_ROWS,
                COLUMNS=columns,
                BLOCK_D=_block_d(D),
                num_warps=8 if columns == 128 else 4,  # of float32, 4 would spill
            )
    return partials_PTD


def _forward_block(T: int) -> int:
    """Rows and columns of a forward tile: 64 where their upper triangle still gives PROGRAMS tiles."""
    blocks = triton.cdiv(T, 64)
    return 64 if blocks * (blocks + 1) // 2 >= PROGRAMS else 32


def _backward_split(T: int) -> tuple[int, int]:
    """(columns of a tile, column blocks of a launch): the widest tiles that still give PROGRAMS programs."""
    wanted = triton.cdiv(PROGRAMS, triton.cdiv(T, BACKWARD_ROWS))
    columns = max(32, min(128, triton.next_power_of_2(triton.cdiv(T, wanted))))
    return columns, min(wanted, triton.cdiv(T, columns))


def _block_d(D: int) -> int:
    """Features at a time: at least the 16 that a matrix instruction wants."""
    return max(16, min(BLOCK_D, triton.next_power_of_2(D)))


def _device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
