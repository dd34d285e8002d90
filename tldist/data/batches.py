"""Which images each step shows on each worker: pure functions of (seed, epoch, step), for any number of workers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tldist.data.augment import Views, draw_views
from tldist.data.index import Split
from tldist.data.presets import AugmentSpec


@dataclass(frozen=True)
class BatchPlan:
    """What one worker loads for one step."""

    ids_N: np.ndarray
    """Positions in the split."""
    labels_N: np.ndarray
    paths: tuple[str, ...]
    """Relative to the data root."""
    views: Views


@dataclass(frozen=True)
class Worker:
    """This worker's place among all."""

    rank: int
    world_size: int


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Optimizer steps in a training epoch; the last incomplete batch is left for another epoch's order."""
    return images // batch_size


def epoch_order(images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one training epoch."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(images)


def train_batches(
    split: Split,
    spec: AugmentSpec,
    image_size: int,
    batch_size: int,
    seed: int,
    epoch: int,
    worker: Worker,
    first: int = 0,
) -> Iterator[BatchPlan]:
    """One epoch of this worker's batches, from step `first` on. `batch_size` is over all workers, who share each
    step's images evenly.

    Step s of any number of workers shows the same images, the union of the workers' batches.
    """
    for ids_N in train_ids(len(split.paths), batch_size, seed, epoch, worker, first):
        yield _plan(split, spec, image_size, seed, epoch, ids_N)


def train_ids(
    images: int, batch_size: int, seed: int, epoch: int, worker: Worker, first: int = 0
) -> Iterator[np.ndarray]:
    """This worker's images of each step of one epoch, from step `first` on."""
    order = epoch_order(images, seed, epoch)
    share = batch_size // worker.world_size
    for step in range(first, steps_per_epoch(images, batch_size)):
        start = step * batch_size + worker.rank * share
        yield order[start : start + share]


def fill_batches(
    split: Split, spec: AugmentSpec, image_size: int, batch_size: int, seed: int, epoch: int, worker: Worker
) -> Iterator[BatchPlan]:
    """This worker's part of a split as `epoch` shows it, in its own order, in batches of exactly `batch_size`.

    The last batch is filled up with images that were shown before, so that every batch has the size of a training
    step's and the network computes each image as it would there.
    """
    mine = np.arange(worker.rank, len(split.paths), worker.world_size)
    for i in range(0, len(mine), batch_size):
        yield _plan(split, spec, image_size, seed, epoch, np.take(mine, range(i, i + batch_size), mode="wrap"))


def eval_batches(split: Split, image_size: int, batch_size: int, worker: Worker) -> Iterator[BatchPlan]:
    """This worker's part of a split, each image on exactly one worker, in batches of at most `batch_size`."""
    for ids_N in eval_ids(len(split.paths), batch_size, worker):
        yield _plan(split, AugmentSpec(), image_size, 0, 0, ids_N)


def eval_ids(images: int, batch_size: int, worker: Worker) -> Iterator[np.ndarray]:
    """This worker's images of a split, in batches of at most `batch_size`."""
    mine = np.arange(worker.rank, images, worker.world_size)
    for i in range(math.ceil(len(mine) / batch_size)):
        yield mine[i * batch_size : (i + 1) * batch_size]


def _plan(split: Split, spec: AugmentSpec, image_size: int, seed: int, epoch: int, ids_N: np.ndarray) -> BatchPlan:
    views = draw_views(spec, split.sizes_N2[ids_N], image_size, seed, epoch, ids_N)
    return BatchPlan(ids_N, split.labels_N[ids_N], tuple(split.paths[i] for i in ids_N), views)
