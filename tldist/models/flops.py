"""How much arithmetic a step needs, how much the device can do, and which share of that a run reached.

One multiply-add is two FLOPs. Only what the model needs is counted (convolutions, matrix products, attention):
the backward pass of frozen layers is not, and neither is anything an engine or a kernel computes twice.
"""

from __future__ import annotations

import copy
import math
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

MEASURE_S = 0.2
"""How long the CPU's peak is measured."""

T = TypeVar("T")


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one training step, per image."""

    prefix: float
    """Forward pass of the frozen prefix; 0.0 where its outputs come from a cache."""
    forward: float
    """Forward pass of the live network."""
    backward: float
    """Gradients of what trains, and of what lies between that and the loss."""

    @property
    def total(self) -> float:
        """All of the step."""
        return self.prefix + self.forward + self.backward


def count_flops(prefix_stages: Sequence[nn.Module], network: nn.Module, image_size: int) -> StepFlops:
    """What a step over images_N3HW of side `image_size` costs, with gradients for what `requires_grad` in `network`.

    Takes modules as they are before `torch.compile`. Runs copies of them on the meta device, in eval mode: no
    weight, gradient, mode or random state is touched and no memory needed. 0.1 to 0.6 s.
    """
    frozen = [_on_meta(stage).requires_grad_(False) for stage in prefix_stages]
    live = _on_meta(network)
    # The fused attention kernels compute their forward pass again in the backward pass; the model needs it once
    # (PaLM, appendix B, leaves rematerialisation out of MFU).
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        features, prefix = _counted(lambda: _run(frozen, torch.empty(1, 3, image_size, image_size, device="meta")))
        output, forward = _counted(lambda: live(features))
        _, backward = _counted(output.sum().backward) if output.requires_grad else (None, 0.0)
    return StepFlops(prefix, forward, backward)


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy in eval mode (no dropout, so no random numbers) and fp32, whose tensors have a shape but no memory."""
    memo: dict[int, Any] = {id(p): nn.Parameter(_shape_of(p), p.requires_grad) for p in module.parameters()}
    memo |= {id(b): _shape_of(b) for b in module.buffers()}
    return copy.deepcopy(module, memo).eval()


def _shape_of(tensor: Tensor) -> Tensor:
    # One type for all: the prefix may be stored in bf16, the network in fp32, and the count is the same.
    return torch.empty_like(tensor, device="meta", dtype=torch.float32 if tensor.is_floating_point() else None)


def _run(stages: Sequence[nn.Module], x: Tensor) -> Tensor:
    for stage in stages:
        x = stage(x)
    return x


def _counted(work: Callable[[], T]) -> tuple[T, float]:
    """What `work` returns, and its FLOPs."""
    own = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        result = work()
    return result, float(counter.get_total_flops())


def _convolution_backward(
    grad_out_shape: Sequence[int], x_shape: Sequence[int], w_shape: Sequence[int], *rest: Any, **_: Any
) -> int:
    """The gradients of the input and of the weight cost as much as the forward pass each, where they are wanted.

    In place of torch's formula, which forgets the groups in the gradient of the weight (pytorch/pytorch#183405): it
    counts 20 times too much for an EfficientNet.
    """
    transposed, output_mask = rest[4], rest[7]  # behind bias, stride, padding, dilation; output padding, groups
    positions = math.prod((x_shape if transposed else grad_out_shape)[2:])
    forward = 2 * grad_out_shape[0] * positions * math.prod(w_shape)
    return forward * (bool(output_mask[0]) + bool(output_mask[1]))


@dataclass(frozen=True)
class _Gpu:
    """Dense peaks in TFLOP/s with fp32 accumulation, by data sheet; None where there is no hardware for the type."""

    words: tuple[str, ...]
    """What the device's name holds, as whole words."""
    bf16: float | None
    fp16: float | None
    fp32: float
    """TF32 from Ampere on: torch lets cuDNN's convolutions use it unless told otherwise."""


# NVIDIA's data sheets and white papers; from Ampere on they print the sparse figures, which are twice the dense ones.
# The most specific words come first; H100 and H200 alone are the SXM boards (`NVIDIA H100 80GB HBM3`).
_GPUS = (
    _Gpu(("GB200",), 2500, 2500, 1250),
    _Gpu(("B200",), 2250, 2250, 1125),
    _Gpu(("H200", "NVL"), 835.5, 835.5, 417.5),
    _Gpu(("H200",), 989.4, 989.4, 494.7),
    _Gpu(("GH200",), 989.4, 989.4, 494.7),
    _Gpu(("H100", "PCIe"), 756, 756, 378),
    _Gpu(("H100", "NVL"), 835.5, 835.5, 417.5),
    _Gpu(("H100",), 989.4, 989.4, 494.7),
    _Gpu(("A100",), 312, 312, 156),
    _Gpu(("A40",), 149.7, 149.7, 74.8),
    _Gpu(("A30",), 165, 165, 82),
    _Gpu(("A10",), 125, 125, 62.5),
    _Gpu(("A10G",), 70, 70, 35),
    _Gpu(("L40S",), 362, 362, 183),
    _Gpu(("L40",), 181, 181, 90.5),
    _Gpu(("L4",), 121, 121, 60),
    _Gpu(("V100", "PCIE"), None, 112, 14),
    _Gpu(("V100",), None, 125, 15.7),
    _Gpu(("V100S",), None, 130, 16.4),
    _Gpu(("T4",), None, 65, 8.1),
    _Gpu(("RTX", "A6000"), 154.8, 154.8, 77.4),
    _Gpu(("RTX", "5090"), 209.5, 209.5, 104.8),
    _Gpu(("RTX", "4090"), 165.2, 165.2, 82.6),
    _Gpu(("RTX", "3090"), 71, 71, 35.6),
)
_OTHER_CHIP = re.compile(r"\b(MIG|LAPTOP|TI|D|\d+[ABCQ])\b", re.IGNORECASE)
"""Words that make of a known name a slice of that GPU (MIG, and vGPU's `A10-24Q`) or another chip."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Dense peak FLOP/s of one worker's `device` in `dtype`, and where the figure is from.

    "table": the data sheet of a GPU known by its name. "measured": on the CPU, with this process's threads.
    (0.0, "unknown"): any other GPU. Takes `MEASURE_S` on the CPU, which leaves torch's threads and random state alone.
    """
    if device.type == "cpu":
        return _measured_convolution(dtype), "measured"
    peak = _from_table(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
    return (peak * 1e12, "table") if peak else (0.0, "unknown")


def _from_table(name: str, dtype: torch.dtype) -> float | None:
    """TFLOP/s of a GPU as torch names it (`NVIDIA A100-SXM4-80GB`, say), or None."""
    if _OTHER_CHIP.search(name):
        return None
    found = set(re.split(r"[ -]", name.upper()))
    gpu = next((gpu for gpu in _GPUS if {word.upper() for word in gpu.words} <= found), None)
    if gpu is None:
        return None
    return {torch.bfloat16: gpu.bf16, torch.float16: gpu.fp16, torch.float32: gpu.fp32}.get(dtype)


def _measured_convolution(dtype: torch.dtype) -> float:
    """FLOP/s of 3x3 convolutions on this process's threads, one on each and each thread's fastest.

    One convolution over all threads would wait for the slowest of them: beside another process on the same cores
    it took up to 40 times as long (two Zen cores), while a thread of its own finds a millisecond for itself.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(_one_thread_s_convolution, [dtype] * threads))
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _one_thread_s_convolution(dtype: torch.dtype) -> float:
    """FLOP/s; leaves torch set to one thread."""
    torch.set_num_threads(1)
    images, channels, side = 8, 128, 14
    x = torch.ones(images, channels, side, side, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.ones(channels, channels, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    best, ends = math.inf, time.perf_counter() + MEASURE_S
    while time.perf_counter() < ends:
        started = time.perf_counter()
        nn.functional.conv2d(x, weight, padding=1)
        best = min(best, time.perf_counter() - started)
    return 2 * images * side**2 * weight.numel() / best


def mfu(images_per_s: float, flops_per_image: float, workers: int, peak: float) -> float | None:
    """Model FLOPs utilisation, a share: what the model needs over what `workers` devices of `peak` FLOP/s could do.

    `images_per_s` is of all workers. None where the peak is unknown. Chowdhery et al. (2022), PaLM, appendix B.
    """
    return images_per_s * flops_per_image / (workers * peak) if peak > 0 else None
