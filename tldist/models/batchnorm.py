"""BatchNorm's policies: layers in train mode, statistics that moved, statistics over all workers, or of each domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tldist import dist
from tldist.models.backbones import Segment
from tldist.plans import Phase

foreach: Any = torch  # whose stubs lack the operations over lists of tensors
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


@torch.no_grad()
def put_back(statistics: Sequence[Tensor], kept: Tensor, where: Tensor) -> None:
    """Where the flag is 1.0, give statistics their earlier values (`flat` of them); no host sync.

    A step that is left out because its gradients were not finite may have moved them to NaN, for good.
    """
    values = torch.where(where > 0, kept, flat(statistics))
    foreach._foreach_copy_(list(statistics), list(values.split([s.numel() for s in statistics])))


def flat(statistics: Sequence[Tensor]) -> Tensor:
    """A copy of all, one after the other."""
    return torch.cat([statistic.reshape(-1) for statistic in statistics])


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


def synchronise(network: nn.Module, device: torch.device) -> None:
    """Let every BatchNorm2d of `network` see all workers' batches; parameters and buffers stay the same objects."""
    kind = nn.SyncBatchNorm if device.type == "cuda" else WorkerBatchNorm
    _convert(network, (nn.BatchNorm2d,), kind)


def unsynchronise(network: nn.Module) -> None:
    """The reverse: plain BatchNorm2d, which folds into convolutions."""
    _convert(network, (nn.SyncBatchNorm, WorkerBatchNorm, DomainBatchNorm2d), nn.BatchNorm2d)


class _OfDomain(BatchNorm):
    """In training, each half of the batch is normalised by its own statistics; those of the second, the target's, are
    kept, and evaluation uses them (as in domain-specific BatchNorm: Chang et al., 2019, but with shared weights)."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        source, target = input.chunk(2)
        source = nn.functional.batch_norm(source, None, None, self.weight, self.bias, training=True, eps=self.eps)
        return torch.cat([source, super().forward(target)])


class DomainBatchNorm1d(_OfDomain, nn.BatchNorm1d):
    """BatchNorm1d for batches of source and target images."""


class DomainBatchNorm2d(_OfDomain, nn.BatchNorm2d):
    """BatchNorm2d for batches of source and target images."""


def part_by_domain(network: nn.Module) -> None:
    """Let every BatchNorm of `network` normalise the two domains of a batch apart; the parameters stay the same."""
    _convert(network, (nn.BatchNorm1d,), DomainBatchNorm1d)
    _convert(network, (nn.BatchNorm2d,), DomainBatchNorm2d)


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
