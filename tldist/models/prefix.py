"""The frozen prefix: eval mode, BatchNorm folded into the convolutions, no autograd, outside every engine."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from tldist.models.backbones import Segment
from tldist.models.batchnorm import unsynchronise


class Prefix:
    """images_NCHW -> features, through a folded copy of frozen stages in `dtype` and channels_last.

    The model's own stages stay as they are, bit for bit, BatchNorm statistics included. An empty prefix
    returns its input.
    """

    def __init__(self, segment: Segment, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.network = nn.Sequential(*(_cast(fold_batchnorm(stage), dtype) for stage in segment.children()))
        self._compiled: Callable[[Tensor], Tensor] = self.network
        self._shape: torch.Size | None = None

    @torch.no_grad()
    def __call__(self, images_NCHW: Tensor) -> Tensor:
        if self.is_empty:
            return images_NCHW
        x = images_NCHW.to(self.dtype)
        network = self._compiled if x.shape == self._shape else self.network
        # The stages are in `dtype` already; a caller's autocast would compute LayerNorm otherwise in evaluation.
        with torch.autocast(x.device.type, enabled=False):
            return network(x)

    @property
    def is_empty(self) -> bool:
        """Is nothing frozen before the first stage that trains?"""
        return len(self.network) == 0

    @property
    def is_compiled(self) -> bool:
        """Was `compile` called?"""
        return self._shape is not None

    def compile(self, example_NCHW: Tensor) -> float:
        """Compile for inputs shaped as the example; others (an epoch's last batch) run as before.

        Returns the seconds it took.
        """
        started = time.perf_counter()
        compiled = torch.compile(self.network, dynamic=False)
        with torch.no_grad(), torch.autocast(example_NCHW.device.type, enabled=False):
            compiled(example_NCHW.to(self.dtype))
        self._compiled, self._shape = compiled, example_NCHW.shape
        return time.perf_counter() - started


def _cast(stage: nn.Module, dtype: torch.dtype) -> nn.Module:
    # The memory format of parameters alone decides a convolution's layout; 4-d weights only.
    return stage.to(dtype=dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fold_batchnorm(stage: nn.Module) -> nn.Module:
    """A copy of `stage` in eval mode, each BatchNorm behind a convolution folded into it.

    w' = w * gamma / sqrt(var + eps), b' = (b - mean) * gamma / sqrt(var + eps) + beta. Stages without BatchNorm
    are copied only, so custom stages need not be traceable.
    """
    frozen = copy.deepcopy(stage).eval().requires_grad_(False)
    unsynchronise(frozen)
    if not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules()):
        return frozen
    return fuse(frozen, inplace=True).eval().requires_grad_(False)
