"""What the machine's convolutions reach at best: the yardstick of a bench's rates, taken in the same rounds."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from tldist_benchmarks.harness import synchronize

SHAPES = ((3, 256, 28, 32), (3, 512, 14, 64), (1, 1024, 14, 128))
"""Kernel, channels in and out, side and images of convolutions large enough to hide their own start: 30 to 59 GFLOP."""
GPU_IMAGES = 16
"""A GPU gets this many times the images."""
SECONDS = 0.3
"""How long each shape runs in a turn."""


@dataclass(frozen=True)
class _Convolution:
    x: Tensor
    weight: Tensor

    @property
    def flops(self) -> float:
        """Of one call. Nothing is padded: products with padding are counted by everybody and computed by few."""
        side = self.x.shape[2] - self.weight.shape[2] + 1
        return 2.0 * len(self.x) * side**2 * self.weight.numel()

    def __call__(self) -> Tensor:
        return conv2d(self.x, self.weight)


class Ceiling:
    """FLOP/s of the best of a few large convolutions, over all threads (or one GPU), channels last in `dtype`."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        more = GPU_IMAGES if device.type == "cuda" else 1
        self.convolutions = [
            _Convolution(
                _random((images * more, channels, side, side), dtype, device),
                _random((channels, channels, kernel, kernel), dtype, device),
            )
            for kernel, channels, side, images in SHAPES
        ]

    @torch.no_grad()
    def turn(self) -> dict[str, float]:
        """The best shape's mean rate: means, because what it is held against are means."""
        return {"tflops_per_s": max(self._rate(convolution) for convolution in self.convolutions) / 1e12}

    def _rate(self, convolution: _Convolution) -> float:
        calls_at_once = 20 if self.device.type == "cuda" else 1
        convolution()
        synchronize(self.device)
        calls, started = 0, time.perf_counter()
        while time.perf_counter() - started < SECONDS:
            for _ in range(calls_at_once):
                convolution()
            synchronize(self.device)
            calls += calls_at_once
        return calls * convolution.flops / (time.perf_counter() - started)


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).to(memory_format=torch.channels_last)
