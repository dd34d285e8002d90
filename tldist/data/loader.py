"""The loader protocol, and the choice between its implementations."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tldist import dist
from tldist.config import DataConfig, UserError
from tldist.data.bad_images import BadImages
from tldist.data.batches import BatchPlan
from tldist.data.presets import AugmentSpec
from tldist.data.shards import Place, is_shards

IN_FLIGHT = 3
"""Batches being prepared while one is used: enough to ride over a slow image, little memory."""
ERASED = (124, 116, 104)
"""Erased pixels take ImageNet's mean colour, which is 0 after normalisation."""
POLICY_FILL = 128
"""What a policy's shifts and turns leave empty, as in DALI's library."""

Read = Callable[[int, Place, list[int]], Tensor]
"""(position in the split, file or tar's member, box) -> that box (top, left, height, width) of its image, upright, as
uint8 RGB (C, height, width)."""


@dataclass(frozen=True)
class Batch:
    """images_NHWC: uint8 on the worker's device; labels_N: int64 there; plan: what is shown."""

    images_NHWC: Tensor
    labels_N: Tensor
    plan: BatchPlan

    @property
    def ids_N(self) -> np.ndarray:
        """Positions in the split."""
        return self.plan.ids_N


class Loader(Protocol):
    """Turns plans into batches, in order, working ahead of the consumer."""

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """What becomes of images that cannot be read is for `BadImages` to say: a batch's plan is what it shows."""
        ...

    def close(self) -> None:
        """Stop threads and free buffers."""
        ...


def loader_kind(config: DataConfig, device: torch.device) -> str:
    """The kind that `auto` stands for. Raises UserError where DALI is asked for and absent.

    DALI's gain is the GPU's decoder. On CPUs torchvision's resizing and a decoder that works on the crop alone are
    faster: `tldist bench loaders`, docs/results.md.
    """
    has_dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if config.loader == "dali" and not has_dali:
        raise UserError(
            "--data.loader dali, but NVIDIA DALI is not installed: install nvidia-dali-cuda130, or use auto"
        )
    if config.loader == "auto":
        return "dali" if has_dali and device.type == "cuda" else "torchvision"
    return config.loader


def threads_per_worker(config: DataConfig) -> int:
    """`--data.threads`, or this machine's cores shared among its workers."""
    return config.threads or max(1, dist.cores() // dist.local_workers())


def open_loader(
    config: DataConfig,
    spec: AugmentSpec,
    max_batch: int,
    device: torch.device,
    read: Read | None = None,
    bad: BadImages | None = None,
    in_shards: bool | None = None,
) -> Loader:
    """The configured loader; its plans must come from `spec`, in batches of at most `max_batch`.

    Where `read` gives the images, it is torchvision's: DALI decodes files itself. `bad` says what becomes of images
    that cannot be read (default: an error). `in_shards`: do the plans' images lie in tars (default: does the root
    hold shards)?
    """
    bad = bad or BadImages()
    root, threads = Path(config.root).expanduser().absolute(), threads_per_worker(config)
    if read is None and loader_kind(config, device) == "dali":
        from tldist.data.dali import DaliLoader

        tars = is_shards(root) if in_shards is None else in_shards
        return DaliLoader(root, spec, config.image_size, max_batch, threads, device, bad, tars)
    from tldist.data.torchvision_loader import TorchvisionLoader

    return TorchvisionLoader(root, spec, config.image_size, threads, device, bad, read)
