"""Ranks and collectives: every function is also right in a single process without a process group."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as td

TIMEOUT = timedelta(minutes=30)
"""How long a collective waits, at least."""


def is_initialized() -> bool:
    """Is there a process group?"""
    return td.is_available() and td.is_initialized()


def rank() -> int:
    """This worker's number, 0 in a single process."""
    return td.get_rank() if is_initialized() else 0


def world_size() -> int:
    """How many workers there are, 1 in a single process."""
    return td.get_world_size() if is_initialized() else 1


def is_main() -> bool:
    """Is this the worker that writes files?"""
    return rank() == 0


def patience(hang_minutes: float) -> timedelta:
    """How long a collective waits: longer than the watchdog, which knows for whom (tldist/guard/watchdog.py)."""
    return max(TIMEOUT, timedelta(minutes=2 * hang_minutes))


def init(device: torch.device, hang_minutes: float = 0.0) -> bool:
    """Join the process group that torchrun's variables describe, unless one exists (Ray makes its own).

    Returns whether this call made the group, so that its maker also destroys it.
    """
    if is_initialized() or "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    td.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience(hang_minutes))
    return True


def join_alone(device: torch.device) -> bool:
    """A process group of one, for an engine that wants one, where there is none. Returns whether this call made it."""
    if is_initialized():
        return False
    backend, store = "nccl" if device.type == "cuda" else "gloo", td.HashStore()  # type: ignore[attr-defined]
    td.init_process_group(backend, store=store, rank=0, world_size=1)
    return True


def close() -> None:
    """Leave the process group."""
    if is_initialized():
        td.destroy_process_group()


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_workers() -> int:
    """Workers on this machine, as torchrun and Ray tell them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_device() -> torch.device:
    """The GPU of this worker (LOCAL_RANK), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def node() -> str:
    """This machine's name; under Slurm the node's."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def nodes() -> list[str]:
    """The machine of each worker, by rank. Collective."""
    found = [node()] * world_size()
    if world_size() > 1:
        td.all_gather_object(found, node())
    return found


def barrier() -> None:
    """Wait for all workers."""
    if world_size() > 1:
        td.barrier()


def all_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over workers, in place, of a tensor on the workers' device."""
    if world_size() > 1:
        td.all_reduce(values)
    return values


@torch.no_grad()
def average_(tensors: Sequence[torch.Tensor]) -> None:
    """Replace fp32 tensors by their mean over workers, in one all-reduce.

    Only for values that differ: three equal numbers summed and divided by three may not be the number again.
    """
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    td.all_reduce(flat)
    flat /= world_size()
    for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


_LOST_PEER = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "remote peer",
)


def is_lost_peer(error: BaseException) -> bool:
    """Did a collective fail because another worker is gone? Backends say it in exceptions of their own or in words."""
    return isinstance(error, td.DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST_PEER)
    )


class ReplicasDiverged(RuntimeError):  # noqa: N818 - it states a fact of the run
    """The workers no longer hold the same weights; training on would be silently wrong."""


def _fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """A 64-bit sum over the tensor's bits, weighted by position so that moved values count too."""
    as_int = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(-1).view(as_int).to(torch.int64)
    places = torch.arange(1, 2 * bits.numel() + 1, 2, device=bits.device)
    return (bits * places).sum()


@torch.no_grad()
def replica_spread(tensors: Mapping[str, torch.Tensor]) -> float:
    """Largest difference between workers over all named tensors: 0.0 when they agree in every bit.

    Fingerprints are compared first (8 bytes a tensor), so agreement costs one small all-reduce.
    Raises ReplicasDiverged with the first differing name and its spread.
    """
    if world_size() == 1 or not tensors:
        return 0.0
    prints = torch.stack([_fingerprint(t) for t in tensors.values()])
    low, high = prints.clone(), prints.clone()
    td.all_reduce(low, op=td.ReduceOp.MIN)
    td.all_reduce(high, op=td.ReduceOp.MAX)
    different = [name for name, same in zip(tensors, (low == high).tolist(), strict=True) if not same]
    if not different:
        return 0.0
    name = different[0]
    low_t, high_t = tensors[name].double(), tensors[name].double()
    td.all_reduce(low_t, op=td.ReduceOp.MIN)
    td.all_reduce(high_t, op=td.ReduceOp.MAX)
    spread = (high_t - low_t).max().item()
    raise ReplicasDiverged(
        f"the workers' copies of '{name}' differ by up to {spread:.3g} ({len(different)} of {len(tensors)} tensors "
        "differ): the run stops here, its last checkpoint was written before"
    )


def from_main(value: Any) -> Any:
    """The main worker's value, on every worker."""
    if world_size() == 1:
        return value
    told = [value]
    td.broadcast_object_list(told)
    return told[0]


def any_worker(condition: bool, device: torch.device) -> bool:
    """Is it so on at least one worker? The same answer on all."""
    return largest(float(condition), device) > 0


def largest(value: float, device: torch.device) -> float:
    """The largest of all workers' values."""
    return float(gather_rows(torch.tensor([[value]], dtype=torch.float64, device=device)).max())


def all_rows(rows_NK: torch.Tensor) -> torch.Tensor:
    """All workers' rows, one below the other, on every worker; each has as many. Does not wait for the device."""
    if world_size() == 1:
        return rows_NK
    rows_NK = rows_NK.contiguous()
    parts = [torch.empty_like(rows_NK) for _ in range(world_size())]
    td.all_gather(parts, rows_NK)
    return torch.cat(parts)


def gather_rows(rows_NK: torch.Tensor) -> torch.Tensor:
    """All workers' rows, one below the other, on every worker; the numbers of rows may differ."""
    if world_size() == 1:
        return rows_NK
    counts = torch.zeros(world_size(), dtype=torch.int64, device=rows_NK.device)
    counts[rank()] = len(rows_NK)
    td.all_reduce(counts)
    longest = int(counts.max())
    padded = rows_NK.new_zeros(longest, rows_NK.shape[1])
    padded[: len(rows_NK)] = rows_NK
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    td.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts.tolist(), strict=True)])
