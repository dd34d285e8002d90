"""Images that are in memory already, so that a bench measures training and no decoding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tldist.config import RunConfig
from tldist.data.batches import BatchPlan
from tldist.data.load.loader import Batch
from tldist.data.source.index import Index, Split, save_index
from tldist.models.backbones import IMAGE_MEAN, IMAGE_STD
from tldist.tracking.events import EventLog
from tldist.train import worker
from tldist.train.run import Run
from tldist_kernels import mix_normalize

CLASSES = 10


@dataclass(frozen=True)
class Pool:
    """Noise on the device: what an image shows does not change how long a step takes."""

    images_NHWC: Tensor
    labels_N: Tensor

    def batches(self, count: int, size: int, memory_format: torch.memory_format) -> list[tuple[Tensor, Tensor]]:
        """The first images as a plain loop would get them from its loader: fp32, normalised, NCHW."""
        shown = count * size
        return [
            (_plain(images_NHWC, memory_format), labels_N)
            for images_NHWC, labels_N in zip(
                self.images_NHWC[:shown].split(size), self.labels_N[:shown].split(size), strict=True
            )
        ]


def _plain(images_NHWC: Tensor, memory_format: torch.memory_format) -> Tensor:
    return mix_normalize(images_NHWC, IMAGE_MEAN, IMAGE_STD, torch.float32).contiguous(memory_format=memory_format)


def draw_pool(images: int, side: int, device: torch.device) -> Pool:
    """The same for every variant."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8, generator=generator)
    return Pool(pixels.to(device), torch.randint(0, CLASSES, (images,), generator=generator).to(device))


class PoolLoader:
    """Answers plans from the pool, whose images come again where a run has more; all of an image is shown, whatever
    the plan's views are."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """In order."""
        for plan in plans:
            ids_N = torch.from_numpy(plan.ids_N % len(self.pool.labels_N))
            ids_N = ids_N.to(self.pool.labels_N.device, non_blocking=True)
            yield Batch(self.pool.images_NHWC.index_select(0, ids_N), self.pool.labels_N.index_select(0, ids_N), plan)

    def close(self) -> None:
        """Nothing is held."""


def build_run(settings: RunConfig, pool: Pool, images: int, device: torch.device) -> Run:
    """The run that a worker would build, over so many `images` of the pool; nothing is written but its index."""
    save_index(_index(pool, images), Path(settings.run_dir) / "index.json")
    run = worker.build(settings, device, EventLog(None))
    run.train_loader.close()
    run.eval_loader.close()
    loader = PoolLoader(pool)
    return replace(run, train_loader=loader, eval_loader=loader)


def _index(pool: Pool, images: int) -> Index:
    """All for training; a validation split would only make the caches' fill longer."""
    names = tuple(f"class{i}" for i in range(CLASSES))
    labels_N = np.resize(pool.labels_N.cpu().numpy(), images)
    sizes_N2 = np.full((images, 2), pool.images_NHWC.shape[1], dtype=np.int32)
    train = Split(tuple(f"train/{names[c]}/{i}.jpg" for i, c in enumerate(labels_N)), labels_N, sizes_N2)
    none = Split((), np.empty(0, dtype=np.int64), np.empty((0, 2), dtype=np.int32))
    return Index("pool", names, train, none, (), f"pool of {images}")
