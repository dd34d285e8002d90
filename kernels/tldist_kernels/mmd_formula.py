"""The parts of MMD's formula that the torch and the Triton implementation share; mmd.py explains the symbols."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)
_SMALLEST_BANDWIDTH = 1e-30
"""Where all rows are equal their mean distance is 0, and 0 / 0 would be NaN."""


class PairWeights(NamedTuple):
    """What k of two different rows counts for, by the batches they come from, and what rows with themselves add."""

    source: float
    target: float
    cross: float
    own: float


def centred(source_ND: torch.Tensor, target_MD: torch.Tensor) -> torch.Tensor:
    """z_TD: both batches as one, less their joint mean (a constant), in float32 (float64 for float64)."""
    z_TD = torch.cat((source_ND, target_MD))
    z_TD = z_TD.to(torch.float64 if z_TD.dtype == torch.float64 else torch.float32)
    return z_TD.sub_(z_TD.detach().mean(0))


def kernel_rates(
    multiples: Sequence[float], bandwidth: torch.Tensor | float | None, norms_T: torch.Tensor
) -> torch.Tensor:
    """rates_U = 1 / (bandwidth * multiple), in the dtype and on the device of the centred rows' squared norms."""
    norms_T = norms_T.detach()
    if bandwidth is None:
        bandwidth = mean_squared_norm_distance(norms_T)
    elif isinstance(bandwidth, torch.Tensor):
        bandwidth = bandwidth.detach().to(norms_T.dtype).reshape(())
    else:
        bandwidth = torch.full((), bandwidth, dtype=norms_T.dtype, device=norms_T.device)
    multiples_U = _tensor_of(tuple(multiples), norms_T.dtype, norms_T.device)
    return (bandwidth.clamp_min(_SMALLEST_BANDWIDTH) * multiples_U).reciprocal()


def pair_weights(N: int, M: int, kernels: int, unbiased: bool) -> PairWeights:
    """The shares of pairs in the means; a row with itself has k = `kernels`, the number of bandwidths."""
    if unbiased:
        return PairWeights(1 / (N * (N - 1)), 1 / (M * (M - 1)), -1 / (N * M), 0.0)
    return PairWeights(1 / N**2, 1 / M**2, -1 / (N * M), kernels / N + kernels / M)


def mean_squared_norm_distance(norms_T: torch.Tensor) -> torch.Tensor:
    """From the squared norms of centred rows."""
    return 2.0 / (norms_T.shape[0] - 1) * norms_T.sum()


@functools.lru_cache(maxsize=64)
def _tensor_of(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Kept, as making one on a GPU waits for the host."""
    return torch.tensor(values, dtype=dtype, device=device)
