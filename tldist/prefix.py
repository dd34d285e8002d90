"""The frozen prefix: eval mode, BatchNorm folded into the convolutions, no autograd, outside every engine."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from tldist.backbones import Segment


class Prefix:
    """images_NCHW -> features, through a folded copy of frozen stages in `dtype` and channels_last.

    The model's own stages stay as they are, bit for bit, BatchNorm statistics included. An empty prefix
    returns its input.
    """

    def __init__(self, segment: Segment, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.stages = [_cast(fold_batchnorm(stage), dtype) for stage in segment.children()]

    @torch.no_grad()
    def __call__(self, images_NCHW: Tensor) -> Tensor:
        if not self.stages:
            return images_NCHW
        x = images_NCHW.to(self.dtype)
        # The stages are in `dtype` already; a caller's autocast would compute LayerNorm otherwise in evaluation.
        with torch.autocast(x.device.type, enabled=False):
            for stage in self.stages:
                x = stage(x)
        return x


def _cast(stage: nn.Module, dtype: torch.dtype) -> nn.Module:
    # The memory format of parameters alone decides a convolution's layout; 4-d weights only.
    return stage.to(dtype=dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fold_batchnorm(stage: nn.Module) -> nn.Module:
    """A copy of `stage` in eval mode, each BatchNorm behind a convolution folded into it.

    w' = w * gamma / sqrt(var + eps), b' = (b - mean) * gamma / sqrt(var + eps) + beta. Stages without BatchNorm
    are copied only, so custom stages need not be traceable.
    """
    frozen = copy.deepcopy(stage).eval().requires_grad_(False)
    if not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules()):
        return frozen
    return fuse(frozen, inplace=True).eval().requires_grad_(False)
