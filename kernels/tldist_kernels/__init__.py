"""Fused ops of the training step: Triton kernels beside torch references. Imports torch and triton alone."""

from tldist_kernels.backend import HAS_TRITON, Backend
from tldist_kernels.cross_entropy import mixed_cross_entropy, mixed_cross_entropy_reference
from tldist_kernels.mixing import mix_normalize, mix_normalize_reference
from tldist_kernels.mmd import mean_squared_distance, mmd, mmd_reference

__all__ = [
    "HAS_TRITON",
    "Backend",
    "mean_squared_distance",
    "mix_normalize",
    "mix_normalize_reference",
    "mixed_cross_entropy",
    "mixed_cross_entropy_reference",
    "mmd",
    "mmd_reference",
]
