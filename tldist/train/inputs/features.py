"""The feature cache: what the frozen prefix computed for each image and view, kept on disk, read by every worker.

Each worker computes its share of the images and writes a shard; all workers map all shards into memory, so that an
epoch may come in any order. Features are stored channels last, in the prefix's dtype, as the prefix returned them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tldist import dist

RESIDENT_BYTES = 2 * 2**30
"""Features up to this size are held in the device's memory: those of a head alone for a million images of 2 kB."""


@dataclass(frozen=True)
class Layout:
    """What a set of features looks like on disk: (views, images, *shape) numbers, dealt out to the shards by image."""

    images: int
    views: int
    shape: tuple[int, ...]
    """Of one image's features, channels last."""
    dtype: str
    shards: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one image's features."""
        return int(np.prod(self.shape)) * self.torch_dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return self.images * self.views * self.row_bytes

    @property
    def torch_dtype(self) -> torch.dtype:
        """As a torch dtype."""
        return getattr(torch, self.dtype)

    def images_in(self, shard: int) -> int:
        """Images of a shard: those whose number leaves the remainder `shard`."""
        return len(range(shard, self.images, self.shards))


class Features:
    """(view, image) -> features, through memory-mapped shards or a copy in the device's memory."""

    def __init__(self, folder: Path, name: str, layout: Layout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self._shards = [_map(folder / f"{name}-{i}", layout, i) for i in range(layout.shards)]
        self.resident = layout.nbytes <= RESIDENT_BYTES
        self._all = self._load().to(device) if self.resident else None

    def rows(self, view: int, ids_N: Tensor) -> Tensor:
        """Features of the images in one view, as the prefix returned them (4-d ones in channels_last memory).

        `ids_N` is on the device where the features are `resident`, else on the host; so are the features.
        """
        rows = self._all[view].index_select(0, ids_N) if self._all is not None else self._gather(view, ids_N)
        return rows.permute(0, 3, 1, 2) if rows.ndim == 4 else rows

    def _load(self) -> Tensor:
        ids = torch.arange(self.layout.images)
        return torch.stack([self._gather(view, ids) for view in range(self.layout.views)])

    def _gather(self, view: int, ids_N: Tensor) -> Tensor:
        shards = self.layout.shards
        if shards == 1:
            return self._shards[0][view].index_select(0, ids_N)
        found = torch.empty(len(ids_N), *self.layout.shape, dtype=self.layout.torch_dtype)
        for i, shard in enumerate(self._shards):
            mine = (ids_N % shards == i).nonzero().squeeze(1)
            found[mine] = shard[view].index_select(0, ids_N[mine] // shards)
        return found


class FeatureWriter:
    """This worker's shard of one set of features."""

    def __init__(self, folder: Path, name: str, layout: Layout) -> None:
        """Raises OSError where the disk has no room; nothing fails later for that reason."""
        self._shards = layout.shards
        path, size = folder / f"{name}-{dist.rank()}", layout.views * layout.images_in(dist.rank()) * layout.row_bytes
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        self._path = path
        self._rows = _map(path, layout, dist.rank(), writable=True)
        self._written = np.zeros((layout.views, layout.images_in(dist.rank())), dtype=bool)

    def write(self, view: int, ids_N: np.ndarray, features: Tensor) -> None:
        """Keep what the prefix returned for these images, all of them this worker's."""
        rows = features.permute(0, 2, 3, 1) if features.ndim == 4 else features
        self._written[view, ids_N // self._shards] = True
        self._rows[view].index_copy_(0, torch.from_numpy(ids_N // self._shards), rows.cpu())

    def note_missing(self) -> None:
        """Remember images that were never written: they could not be read."""
        missing = np.flatnonzero(~self._written.all(axis=0)) * self._shards + dist.rank()
        if len(missing):
            self._path.with_suffix(".missing.json").write_text(json.dumps(missing.tolist()))


def read_missing(folder: Path, name: str) -> frozenset[int]:
    """Images of which a complete folder has no features."""
    return frozenset(i for path in folder.glob(f"{name}-*.missing.json") for i in json.loads(path.read_text()))


def _map(path: Path, layout: Layout, shard: int, writable: bool = False) -> Tensor:
    """A shard as a (views, images, *shape) tensor over the file's pages."""
    shape = (layout.views, layout.images_in(shard), *layout.shape)
    if 0 in shape:
        return torch.empty(shape, dtype=layout.torch_dtype)
    # "c", private pages that are never written: torch warns of arrays that are read-only.
    raw = np.memmap(path, dtype=np.uint8, mode="r+" if writable else "c")
    return torch.from_numpy(raw).view(layout.torch_dtype).view(shape)


def shape_of(features: Tensor) -> tuple[int, ...]:
    """One image's features as they are stored: channels last."""
    one = features[0].permute(1, 2, 0) if features.ndim == 4 else features[0]
    return tuple(one.shape)


def is_complete(folder: Path) -> bool:
    """Was everything in `folder` written to its end?"""
    return (folder / "layouts.json").is_file()


def read_layouts(folder: Path) -> dict[str, Layout]:
    """The sets of features in a complete folder, by name."""
    found = json.loads((folder / "layouts.json").read_text())
    return {name: Layout(**{**fields, "shape": tuple(fields["shape"])}) for name, fields in found.items()}


def complete(draft: Path, folder: Path, layouts: dict[str, Layout]) -> None:
    """Give a finished draft its name, in one step; another run may have been faster with the same features."""
    (draft / "layouts.json").write_text(json.dumps({name: asdict(layout) for name, layout in layouts.items()}))
    try:
        draft.rename(folder)
    except OSError:
        if not is_complete(folder):
            raise
        shutil.rmtree(draft, ignore_errors=True)


def room_for(folder: Path, gib: float) -> int:
    """Bytes that features may take in `folder`: `gib`, or half of what is free."""
    return int(gib * 2**30) if gib else shutil.disk_usage(folder).free // 2


Item = TypeVar("Item")


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Hand items on while the next is being read by another thread."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
