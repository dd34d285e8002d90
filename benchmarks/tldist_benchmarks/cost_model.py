"""What data-parallel training should cost: the work of one worker, and an all-reduce of what trains.

    step = compute + all-reduce - what of it hides behind the backward pass
    all-reduce = 2 (N-1)/N * bytes / bandwidth + buckets * 2 ceil(log2 N) * latency

The first term is the ring's (Patarasuk and Yuan, 2009, eq. 5): every worker sends and receives 2 (N-1)/N of the bytes.
The second is a tree's, up and down (Thakur, Rabenseifner and Gropp, 2005), because libraries leave the ring where it
would take 2 (N-1) latencies. Bandwidth is what nccl-tests call the bus bandwidth, so measured figures can be put in.
Only what trains is reduced: frozen stages are outside the engine. Not in the model: workers that slow each other down
on one machine, stragglers, data loading.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

BUCKET_BYTES = 25 * 2**20
"""DDP's default."""


@dataclass(frozen=True)
class Work:
    """A worker's part of a step."""

    compute_s: float
    """Forward, backward and optimizer."""
    backward_s: float
    """Of it, the time in which gradients come out of the backward pass."""
    reduced_bytes: float
    """Gradients of what trains."""

    @property
    def buckets(self) -> int:
        """All-reduces of a step."""
        return max(1, math.ceil(self.reduced_bytes / BUCKET_BYTES))


@dataclass(frozen=True)
class Link:
    """What connects the workers."""

    bytes_per_s: float
    latency_s: float
    hides: bool
    """Does an all-reduce run beside the backward pass (a GPU's copy engines and network), or on the cores that it
    needs (gloo, where the workers have all of them)?"""


def all_reduce_s(reduced_bytes: float, buckets: int, workers: int, link: Link) -> float:
    """Seconds until all workers have the sum."""
    if workers == 1:
        return 0.0
    moved, hops = _moved(reduced_bytes, buckets, workers)
    return moved / link.bytes_per_s + hops * link.latency_s


def _moved(reduced_bytes: float, buckets: int, workers: int) -> tuple[float, float]:
    return 2 * (workers - 1) / workers * reduced_bytes, buckets * 2 * math.ceil(math.log2(workers))


def step_s(work: Work, workers: int, link: Link) -> float:
    """Seconds of a step on so many workers, each with as much to do as `work` says."""
    whole = all_reduce_s(work.reduced_bytes, work.buckets, workers, link)
    last = whole / work.buckets  # the last bucket is full when the backward pass is over
    hidden = min(whole - last, work.backward_s) if link.hides else 0.0
    return work.compute_s + whole - hidden


@dataclass(frozen=True)
class AllReduce:
    """One that was measured by itself."""

    reduced_bytes: float
    buckets: int
    workers: int
    seconds: float


def fit_link(measured: Sequence[AllReduce], hides: bool) -> Link:
    """Bandwidth and latency that fit best, errors taken relative to the times (non-negative least squares)."""
    costs = np.array([_moved(m.reduced_bytes, m.buckets, m.workers) for m in measured])
    seconds = np.array([m.seconds for m in measured])
    (per_byte, latency_s), _ = nnls(costs / seconds[:, None], np.ones(len(seconds)))
    return Link(1 / per_byte if per_byte else math.inf, float(latency_s), hides)
