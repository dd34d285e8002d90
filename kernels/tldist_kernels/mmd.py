"""Squared maximum mean discrepancy (MMD) of two feature batches, under a sum of RBF kernels.

MMD^2 = ||mean phi(x) - mean phi(y)||^2 in the kernel's feature space (Gretton et al., JMLR 2012):

    k(x, y)          = sum_u exp(-||x - y||^2 / (bandwidth * multiple_u))
    biased (eq. 5^2) = mean_ij k(x_i, x_j) + mean_ij k(y_i, y_j) - 2 mean_ij k(x_i, y_j)
    unbiased (eq. 3) = the same, with i != j in the first two means; it may be negative

Several bandwidths, their sum and their centre, the mean squared distance within the joined batch, are those of DAN
(Long et al., ICML 2015) as it is published in code: loss weights found with it carry over. The mean over the
kernels is this divided by their number.

With z the joined batch of T = N + M rows and W_ij the pair's share in the means, both batches have one gradient:

    grad_i = sum_j S_ij (z_i - z_j)
    S_ij   = -4 W_ij sum_u exp(-||z_i - z_j||^2 / b_u) / b_u,  b_u = bandwidth * multiple_u

Everywhere z is centred first: no distance changes, and ||z_i||^2 + ||z_j||^2 - 2 z_i.z_j cancels less. A row's
distance to itself is 0 by definition, not by subtraction.
"""

# pyright: reportIncompatibleMethodOverride=false
# once_differentiable hides parameter names.

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from tldist_kernels.backend import Backend, use_triton
from tldist_kernels.mmd_formula import (
    MULTIPLES,
    PairWeights,
    centred,
    kernel_rates,
    mean_squared_norm_distance,
    pair_weights,
)

_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def mmd(
    source_ND: torch.Tensor,
    target_MD: torch.Tensor,
    *,
    multiples: Sequence[float] = MULTIPLES,
    bandwidth: torch.Tensor | float | None = None,
    unbiased: bool = False,
    backend: Backend = "auto",
) -> torch.Tensor:
    """MMD^2 of two batches of features, whose sizes may differ; the module's docstring has the formulas.

    source_ND, target_MD: float32, float16 or bfloat16 (sums in float32), or float64 (never Triton).
    multiples: of the bandwidth, one kernel each.
    bandwidth: a constant; None is `mean_squared_distance` of these batches. A tensor (one value, on the features'
        device) is not waited for: workers that share a loss must agree on one.
    unbiased: recommended for training; needs two rows of each batch.
    Returns a scalar, float32 (float64 for float64 features), differentiable once in both batches.
    In Triton half-precision features are rounded once more, after centring, to their own dtype.
    Raises ValueError for wrong shapes, dtypes or devices.
    """
    _check(source_ND, target_MD, multiples, bandwidth, unbiased)
    if source_ND.dtype in _TRITON_DTYPES and use_triton(source_ND, backend):
        # Imported at the first launch: Triton is optional, and costs half a second to import.
        from tldist_kernels.mmd_triton import MMD

        loss = MMD.apply(source_ND, target_MD, tuple(multiples), bandwidth, unbiased)
        assert isinstance(loss, torch.Tensor)
        return loss
    if source_ND.is_cpu:
        return mmd_cpu(source_ND, target_MD, multiples=multiples, bandwidth=bandwidth, unbiased=unbiased)
    return mmd_reference(source_ND, target_MD, multiples=multiples, bandwidth=bandwidth, unbiased=unbiased)


def mean_squared_distance(source_ND: torch.Tensor, target_MD: torch.Tensor) -> torch.Tensor:
    """The mean of ||z_i - z_j||^2 over the pairs i != j of the joined batch, without a gradient.

    sum_ij ||z_i - z_j||^2 = 2 T sum_i ||z_i||^2 - 2 ||sum_i z_i||^2, whose last term is 0 once z is centred.
    """
    return mean_squared_norm_distance(centred(source_ND.detach(), target_MD.detach()).square().sum(1))


def mmd_reference(
    source_ND: torch.Tensor,
    target_MD: torch.Tensor,
    *,
    multiples: Sequence[float] = MULTIPLES,
    bandwidth: torch.Tensor | float | None = None,
    unbiased: bool = False,
) -> torch.Tensor:
    """`mmd` in torch operations on any device, with its distances from one matrix product."""
    N, M = source_ND.shape[0], target_MD.shape[0]
    with _without_autocast(source_ND):
        z_TD = centred(source_ND, target_MD)
        gram_TT = z_TD @ z_TD.t()
    norms_T = gram_TT.diagonal()
    rates_U = kernel_rates(multiples, bandwidth, norms_T)
    squared_TT = (norms_T[:, None] + norms_T - 2.0 * gram_TT).clamp_min(0.0)
    itself_TT = torch.eye(N + M, dtype=torch.bool, device=z_TD.device)
    squared_TT = squared_TT.masked_fill(itself_TT, float("inf"))  # k = 0: `own` counts these pairs
    k_TT = torch.stack([torch.exp(-rate * squared_TT) for rate in rates_U.unbind()]).sum(0)
    return _weighted_sum(k_TT, N, pair_weights(N, M, len(multiples), unbiased))


def mmd_cpu(
    source_ND: torch.Tensor,
    target_MD: torch.Tensor,
    *,
    multiples: Sequence[float] = MULTIPLES,
    bandwidth: torch.Tensor | float | None = None,
    unbiased: bool = False,
) -> torch.Tensor:
    """`mmd` on the CPU: S is made in the forward pass, so that the backward is one matrix product and not two.

    Zen 5, CPU ms of one thread, forward and backward in float32, D = 2048, N = M = 64, 128, 256: 2.0, 6.3, 21; the
    reference takes 3.3, 11.5, 37, and all differences at once, (T, T, D), 364, 1396, 5873.
    """
    loss = _MMDOnHost.apply(source_ND, target_MD, tuple(multiples), bandwidth, unbiased)
    assert isinstance(loss, torch.Tensor)
    return loss


class _MMDOnHost(torch.autograd.Function):
    """apply(source_ND, target_MD, multiples, bandwidth, unbiased) -> MMD^2."""

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
        with _without_autocast(source_ND):
            z_TD = centred(source_ND, target_MD)
            squared_TT = _gram(z_TD, N)
        norms_T = squared_TT.diagonal().clone()
        rates_U = kernel_rates(multiples, bandwidth, norms_T)
        squared_TT.mul_(-2.0).add_(norms_T[:, None]).add_(norms_T).clamp_min_(0.0).fill_diagonal_(float("inf"))
        k_TT, slope_TT = _kernels_and_slopes(squared_TT, multiples, rates_U)
        weights = pair_weights(N, M, len(multiples), unbiased)
        ctx.save_for_backward(z_TD, slope_TT)
        ctx.weights, ctx.N, ctx.dtype = weights, N, source_ND.dtype
        return _weighted_sum(k_TT, N, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_loss,) = grad_outputs
        z_TD, slope_TT = ctx.saved_tensors
        pull_TT = slope_TT * (4.0 * grad_loss)  # -S
        N, weights = ctx.N, ctx.weights
        pull_TT[:N, :N] *= weights.source
        pull_TT[N:, N:] *= weights.target
        pull_TT[:N, N:] *= weights.cross
        pull_TT[N:, :N] *= weights.cross
        pull_TT.diagonal().copy_(-pull_TT.sum(1))
        with _without_autocast(z_TD):
            grad_TD = (pull_TT @ z_TD).to(ctx.dtype)
        return grad_TD[:N], grad_TD[N:], None, None, None


def _gram(z_TD: torch.Tensor, N: int) -> torch.Tensor:
    """z @ z.t(), with one of the two quadrants between the batches copied from the other."""
    gram_TT = z_TD.new_empty(z_TD.shape[0], z_TD.shape[0])
    gram_TT[:N] = z_TD[:N] @ z_TD.t()
    gram_TT[N:, N:] = z_TD[N:] @ z_TD[N:].t()
    gram_TT[N:, :N] = gram_TT[:N, N:].t()
    return gram_TT


def _kernels_and_slopes(
    squared_TT: torch.Tensor, multiples: tuple[float, ...], rates_U: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum_u exp(-rate_u d), sum_u rate_u exp(-rate_u d)); at half a bandwidth the exponential is squared."""
    k_TT, slope_TT, term_TT = (torch.zeros_like(squared_TT) for _ in range(3))
    previous = 0.0
    for multiple, rate in sorted(zip(multiples, rates_U.unbind(), strict=True), key=lambda pair: -pair[0]):
        if multiple == previous / 2:
            term_TT.square_()
        else:
            torch.mul(squared_TT, -rate, out=term_TT).exp_()
        k_TT += term_TT
        slope_TT.addcmul_(term_TT, rate)
        previous = multiple
    return k_TT, slope_TT


def _weighted_sum(k_TT: torch.Tensor, N: int, weights: PairWeights) -> torch.Tensor:
    """MMD^2 from k of all pairs, 0 on the diagonal."""
    within = weights.source * k_TT[:N, :N].sum() + weights.target * k_TT[N:, N:].sum()
    return within + 2.0 * weights.cross * k_TT[:N, N:].sum() + weights.own


def _without_autocast(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Autocast would round the features and the distances, both, to half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def _check(
    source_ND: torch.Tensor,
    target_MD: torch.Tensor,
    multiples: Sequence[float],
    bandwidth: torch.Tensor | float | None,
    unbiased: bool,
) -> None:
    for name, tensor in (("source_ND", source_ND), ("target_MD", target_MD)):
        if tensor.ndim != 2 or tensor.dtype not in (*_TRITON_DTYPES, torch.float64):
            raise ValueError(f"{name} must be a float (rows, D), got {tensor.dtype} {tuple(tensor.shape)}")
        if tensor.shape[0] < 1 + unbiased or tensor.shape[1] == 0:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, too small for unbiased={unbiased}")
    if source_ND.shape[1] != target_MD.shape[1]:
        raise ValueError(f"the batches have {source_ND.shape[1]} and {target_MD.shape[1]} features")
    if (source_ND.dtype, source_ND.device) != (target_MD.dtype, target_MD.device):
        raise ValueError(
            f"source_ND is {source_ND.dtype} on {source_ND.device}, target_MD {target_MD.dtype} on {target_MD.device}"
        )
    if not multiples or min(multiples) <= 0.0:
        raise ValueError(f"multiples must be positive, and at least one, got {tuple(multiples)}")
    if isinstance(bandwidth, torch.Tensor):
        if bandwidth.numel() != 1 or bandwidth.device != source_ND.device:
            raise ValueError(
                f"bandwidth must be one value on {source_ND.device}, got {tuple(bandwidth.shape)} on {bandwidth.device}"
            )
    elif bandwidth is not None and not bandwidth > 0.0:
        raise ValueError(f"bandwidth must be positive, got {bandwidth}")
