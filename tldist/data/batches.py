"""Which images each step shows on each worker: pure functions of (seed, epoch, step), for any number of workers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tldist.config import DataConfig
from tldist.data.augment import Views, draw_views
from tldist.data.presets import AugmentSpec
from tldist.data.source.index import Split
from tldist.data.source.shards import Members, Place

MOST_LANES = 64
"""Places in the shards from which one step reads: enough for as many workers to have shards of their own, and few
enough for one worker to read them all at once, each nearly sequentially."""


@dataclass(frozen=True)
class BatchPlan:
    """What one worker loads for one step."""

    ids_N: np.ndarray
    """Positions in the split."""
    labels_N: np.ndarray
    paths: tuple[str, ...]
    """Relative to the data root."""
    views: Views
    members: Members | None = None
    """Where the images lie in shards; None where `paths` are files."""
    may_shrink: bool = False
    """May images be left out, as in evaluation? Training needs batches of equal size on all workers."""

    def take(self, rows: Sequence[int]) -> BatchPlan:
        """Some of the images, in the order asked for."""
        ids_N = np.array(rows, dtype=np.int64)
        return replace(
            self,
            ids_N=self.ids_N[ids_N],
            labels_N=self.labels_N[ids_N],
            paths=tuple(self.paths[i] for i in rows),
            views=self.views.take(rows),
            members=self.members and self.members.take(ids_N),
        )

    def rows_without(self, bad: Collection[int]) -> list[int]:
        """The rows to show where some cannot be: left out, or (where the size must stay) the next good one twice."""
        n = len(self.paths)
        if self.may_shrink:
            return [i for i in range(n) if i not in bad]
        return [next(j % n for j in range(i, i + n) if j % n not in bad) for i in range(n)]

    def without(self, bad: Collection[int]) -> BatchPlan:
        """The batch without the images at these positions, of which there are fewer than all."""
        return self.take(self.rows_without(bad)) if bad else self

    def place(self, root: Path, i: int) -> Place:
        """Where image `i` of the batch is read."""
        return root / self.paths[i] if self.members is None else self.members.place(root, i)


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


def shard_order(shards_N: np.ndarray, batch_size: int, seed: int, epoch: int, window: int) -> np.ndarray:
    """The order of one training epoch of images in shards, without those left for another epoch.

    The shards come in a random order, each begun at a random image, and that sequence is cut into contiguous lanes of
    equal length. A step shows the next images of every lane, lane by lane: so consecutive parts of a batch, which are
    the workers', come from shards of their own wherever the workers share the lanes evenly, and every lane is read
    from its beginning to its end. Inside its lane an image moves less than `window // lanes` places (0 where that is
    1 or less), so from where it would be in the sequence of the whole epoch by less than `window` and a batch.

    Args:
        shards_N: each image's shard; the images of a shard are consecutive.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    _, starts_S, counts_S = np.unique(shards_N, return_index=True, return_counts=True)
    shards = [
        np.roll(np.arange(start, start + count), -int(turn * count))
        for start, count, turn in zip(starts_S, counts_S, rng.random(len(counts_S)), strict=True)
    ]
    sequence = np.concatenate([shards[i] for i in rng.permutation(len(shards))])
    lanes, steps = num_lanes(len(shards), batch_size), steps_per_epoch(len(sequence), batch_size)
    lanes_LN = sequence[: steps * batch_size].reshape(lanes, -1)
    keys_LN = np.arange(lanes_LN.shape[1]) + rng.random(lanes_LN.shape) * (window // lanes)
    shuffled_LN = np.take_along_axis(lanes_LN, keys_LN.argsort(axis=1), axis=1)
    return shuffled_LN.reshape(lanes, steps, batch_size // lanes).swapaxes(0, 1).reshape(-1)


def num_lanes(shards: int, batch_size: int) -> int:
    """The largest divisor of `batch_size` that is at most the number of shards, and at most `MOST_LANES`."""
    return next(lanes for lanes in range(min(shards, batch_size, MOST_LANES), 0, -1) if batch_size % lanes == 0)


def train_batches(
    split: Split,
    spec: AugmentSpec,
    image_size: int,
    batch_size: int,
    seed: int,
    epoch: int,
    worker: Worker,
    first: int = 0,
    window: int = DataConfig.shuffle_window,
) -> Iterator[BatchPlan]:
    """One epoch of this worker's batches, from step `first` on. `batch_size` is over all workers, who share each
    step's images evenly.

    Step s of any number of workers shows the same images, the union of the workers' batches. `window` is
    `shard_order`'s; a split of files is shuffled in full.
    """
    for ids_N in train_ids(split, batch_size, seed, epoch, worker, first, window):
        yield plan_batch(split, spec, image_size, seed, epoch, ids_N)


def train_ids(
    split: Split,
    batch_size: int,
    seed: int,
    epoch: int,
    worker: Worker,
    first: int = 0,
    window: int = DataConfig.shuffle_window,
) -> Iterator[np.ndarray]:
    """This worker's images of each step of one epoch, from step `first` on."""
    if split.members is None:
        order = epoch_order(len(split), seed, epoch)
    else:
        order = shard_order(split.members.shards_N, batch_size, seed, epoch, window)
    share = batch_size // worker.world_size
    for step in range(first, steps_per_epoch(len(split), batch_size)):
        start = step * batch_size + worker.rank * share
        yield order[start : start + share]


def target_batches(
    split: Split,
    spec: AugmentSpec,
    image_size: int,
    batch_size: int,
    seed: int,
    steps: range,
    worker: Worker,
    window: int = DataConfig.shuffle_window,
) -> Iterator[BatchPlan]:
    """This worker's batches of a second domain, for `steps` of the run (from 0, over all epochs).

    It has epochs of its own length, and an order of its own: MNIST and MNIST-M hold the same digits in the same order,
    and the same permutation of both would pair each digit with itself.
    """
    own_seed = int(np.random.SeedSequence([seed, 1]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    of_epoch, step = steps_per_epoch(len(split), batch_size), steps.start
    while step < steps.stop:
        epoch, first = divmod(step, of_epoch)
        plans = train_batches(split, spec, image_size, batch_size, own_seed, epoch, worker, first, window)
        for plan in itertools.islice(plans, steps.stop - step):
            step += 1
            yield plan


def fill_batches(
    split: Split, spec: AugmentSpec, image_size: int, batch_size: int, seed: int, epoch: int, worker: Worker
) -> Iterator[BatchPlan]:
    """This worker's part of a split as `epoch` shows it, in its own order, in batches of exactly `batch_size`.

    The last batch is filled up with images that were shown before, so that every batch has the size of a training
    step's and the network computes each image as it would there.
    """
    mine = np.arange(worker.rank, len(split.paths), worker.world_size)
    for i in range(0, len(mine), batch_size):
        yield plan_batch(split, spec, image_size, seed, epoch, np.take(mine, range(i, i + batch_size), mode="wrap"))


def eval_batches(split: Split, image_size: int, batch_size: int, worker: Worker) -> Iterator[BatchPlan]:
    """This worker's part of a split, each image on exactly one worker, in batches of at most `batch_size`."""
    for ids_N in eval_ids(len(split.paths), batch_size, worker):
        yield replace(plan_batch(split, AugmentSpec(), image_size, 0, 0, ids_N), may_shrink=True)


def eval_ids(images: int, batch_size: int, worker: Worker) -> Iterator[np.ndarray]:
    """This worker's images of a split, in batches of at most `batch_size`."""
    mine = np.arange(worker.rank, images, worker.world_size)
    for i in range(math.ceil(len(mine) / batch_size)):
        yield mine[i * batch_size : (i + 1) * batch_size]


def plan_batch(split: Split, spec: AugmentSpec, image_size: int, seed: int, epoch: int, ids_N: np.ndarray) -> BatchPlan:
    """The images `ids_N` of a split as `epoch` shows them."""
    views = draw_views(spec, split.sizes_N2[ids_N], image_size, seed, epoch, ids_N)
    members = split.members and split.members.take(ids_N)
    return BatchPlan(ids_N, split.labels_N[ids_N], tuple(split.paths[i] for i in ids_N), views, members)
