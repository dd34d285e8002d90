"""Fused ops of the training step: Triton kernels beside torch references. Imports torch and triton alone."""

from tldist_kernels.backend import HAS_TRITON, Backend
from tldist_kernels.cross_entropy import mixed_cross_entropy, mixed_cross_entropy_reference
from tldist_kernels.mixing import mix_normalize, mix_normalize_reference

__all__ = [
    "HAS_TRITON",
    "Backend",
    "mix_normalize",
    "mix_normalize_reference",
    "mixed_cross_entropy",
    "mixed_cross_entropy_reference",
]
