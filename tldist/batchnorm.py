"""BatchNorm: layers in train mode, statistics that moved, statistics over all workers, and a faster one for CPUs."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tldist import dist
from tldist.backbones import Segment
from tldist.plan import Phase

BatchNorm = nn.modules.batchnorm._BatchNorm


def set_modes(network: Segment, phase: Phase, policy: str) -> None:
    """Train mode for stages that train; frozen ones are in eval mode, and so is BatchNorm that does not train itself.

    `policy` is `--train.batchnorm`: under eval every BatchNorm keeps the source's statistics.
    """
    for name, stage in network.stages.items():
        stage.train(name in phase.stages)
        for module in stage.modules():
            if isinstance(module, BatchNorm) and (policy == "eval" or not _trains(module)):
                module.eval()


def _trains(module: BatchNorm) -> bool:
    return any(p.requires_grad for p in module.parameters())


def moved_statistics(network: nn.Module) -> list[Tensor]:
    """Running means and variances of the BatchNorm layers in train mode: each worker's saw other images."""
    return [
        statistic
        for module in network.modules()
        if isinstance(module, BatchNorm) and module.training
        for statistic in (module.running_mean, module.running_var)
        if statistic is not None
    ]


class _WorkerSum(torch.autograd.Function):
    """Sum over workers. Each worker's loss depends on every worker's summand, so gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return dist.all_sum(values.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return dist.all_sum(gradients[0].clone())


class WorkerBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the workers' batches together, on devices that torch's SyncBatchNorm does not know (CPUs).

    The statistics' sums are reduced in double precision, and so are their gradients. Shares are of equal size.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or dist.world_size() == 1:
            return super().forward(input)
        dims, n = (0, 2, 3), input.numel() // input.shape[1] * dist.world_size()
        wide = input.double()
        mean, square = _WorkerSum.apply(torch.stack([wide.sum(dims), (wide * wide).sum(dims)]) / n)
        variance = square - mean * mean
        self._track(mean.detach(), variance.detach() * (n / max(n - 1, 1)))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return (wide * scale[:, None, None] + shift[:, None, None]).to(input.dtype)

    def _track(self, mean: Tensor, unbiased: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)


class CompiledBatchNorm(nn.BatchNorm2d):
    """BatchNorm of bf16 features on CPUs, forward and backward compiled to as few passes as they need.

    torch's own takes about a quarter of a ResNet-50's training step there; these take half of its time (two Zen 5
    cores, docs/results.md). One compilation serves all shapes.
    """

    def forward(self, input: Tensor) -> Tensor:
        fits = input.dtype == torch.bfloat16 and input.is_contiguous(memory_format=torch.channels_last)
        if not (self.training and fits and self.momentum is not None):
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        output, mean, variance = _Normalise.apply(input, self.weight, self.bias, self.running_mean, self.eps)  # type: ignore[misc]
        n = input.numel() // input.shape[1]
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (n / max(n - 1, 1)), self.momentum)
        return output


class _Normalise(torch.autograd.Function):
    """(x_NCHW, weight_C, bias_C, about_C, eps) -> y_NCHW, mean_C, variance_C; Ioffe and Szegedy (2015), algorithm 1."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, about: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        N, C, H, W = x.shape
        with torch.autocast("cpu", enabled=False):  # whose state would be a reason to compile again
            y, mean, variance, scale = _compiled()[0](x.permute(0, 2, 3, 1).reshape(-1, C), weight, bias, about, eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.mark_non_differentiable(mean, variance)
        return y.view(N, H, W, C).permute(0, 3, 1, 2), mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        N, C, H, W = x.shape
        rows = (t.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1) for t in (gradients[0], x))
        dx, dweight, dbias = _compiled()[1](*(t.reshape(-1, C) for t in rows), weight, mean, scale)
        return dx.view(N, H, W, C).permute(0, 3, 1, 2), dweight, dbias, None, None


def _normalise(x_MC: Tensor, weight: Tensor, bias: Tensor, about: Tensor, eps: float) -> tuple[Tensor, ...]:
    # One pass for both moments, taken about the running mean: far from zero E[x^2] - E[x]^2 would cancel.
    x = x_MC.float()
    moved = x - about
    offset = moved.mean(0)
    variance = ((moved * moved).mean(0) - offset * offset).clamp_min(0)
    mean, scale = about + offset, torch.rsqrt(variance + eps)
    return ((x - mean) * (scale * weight) + bias).to(x_MC.dtype), mean, variance, scale


def _normalise_backward(
    dy_MC: Tensor, x_MC: Tensor, weight: Tensor, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dy, normal = dy_MC.float(), (x_MC.float() - mean) * scale
    dbias, dweight = dy.sum(0), (dy * normal).sum(0)
    dx = (weight * scale) * (dy - dbias / len(dy) - normal * (dweight / len(dy)))
    return dx.to(x_MC.dtype), dweight, dbias


@functools.cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    return torch.compile(_normalise, dynamic=True), torch.compile(_normalise_backward, dynamic=True)


def compile_batchnorm(network: nn.Module) -> float:
    """Let every BatchNorm2d of `network` be a CompiledBatchNorm; returns the seconds that compiling took."""
    started = time.perf_counter()
    _convert(network, (nn.BatchNorm2d,), CompiledBatchNorm)
    for channels, side in ((64, 8), (96, 6)):  # two shapes, lest one be taken for the only one
        layer = CompiledBatchNorm(channels).train()
        x = torch.zeros(2, channels, side, side, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        layer(x.requires_grad_()).sum().backward()
    return time.perf_counter() - started


def synchronise(network: nn.Module, device: torch.device) -> None:
    """Let every BatchNorm2d of `network` see all workers' batches; parameters and buffers stay the same objects."""
    kind = nn.SyncBatchNorm if device.type == "cuda" else WorkerBatchNorm
    _convert(network, (nn.BatchNorm2d, CompiledBatchNorm), kind)


def make_plain(network: nn.Module) -> None:
    """The reverse of `synchronise` and `compile_batchnorm`: torch's BatchNorm2d, which folds into convolutions."""
    _convert(network, (nn.SyncBatchNorm, WorkerBatchNorm, CompiledBatchNorm), nn.BatchNorm2d)


def _convert(network: nn.Module, old: tuple[type[BatchNorm], ...], new: type[BatchNorm]) -> None:
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) in old:
                parent.add_module(name, _as(new, layer))


def _as(kind: type[BatchNorm], layer: nn.Module) -> BatchNorm:
    assert isinstance(layer, BatchNorm)
    made = kind(layer.num_features, layer.eps, layer.momentum, device="meta")
    made._parameters, made._buffers = layer._parameters, layer._buffers
    return made.train(layer.training)
