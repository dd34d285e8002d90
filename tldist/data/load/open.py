"""The choice between the loaders, by configuration, device and what is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from tldist import dist
from tldist.config import DataConfig, UserError
from tldist.data.load.bad_images import BadImages
from tldist.data.load.loader import Loader, Read
from tldist.data.presets import AugmentSpec
from tldist.data.source.shards import is_shards


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
        from tldist.data.load.dali import DaliLoader

        tars = is_shards(root) if in_shards is None else in_shards
        return DaliLoader(root, spec, config.image_size, max_batch, threads, device, bad, tars)
    from tldist.data.load.torchvision_loader import TorchvisionLoader

    return TorchvisionLoader(root, spec, config.image_size, threads, device, bad, read)
