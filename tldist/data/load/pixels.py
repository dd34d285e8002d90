"""The pixel cache: a run decodes each file once, on whichever worker of a machine shows it first.

Kept are uint8 pixels at the size that evaluation resizes to, smaller images as they are. So evaluation shows the same
bits as without the cache, while training is an approximation: its crops are cut from the smaller picture.

The workers of a machine map one file in which every image has a fixed place, because the index knows all sizes. The
file never has a name (a memfd, or a temporary file in the run directory), so a run that is killed at any moment leaves
nothing behind. Its space is taken at the start: a full disk is a sentence then, not a SIGBUS in the third epoch.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import socket
import sys
import tempfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from tldist import dist
from tldist.config import DataConfig
from tldist.data.augment import evaluation_sizes
from tldist.data.load.decode import read_rgb
from tldist.data.load.loader import Read
from tldist.data.load.torchvision_loader import resized
from tldist.data.source.index import Index, Split
from tldist.data.source.shards import Place

NAME = "tldist-pixels"
"""What the memory is called in /proc/PID/maps."""


@dataclass(frozen=True)
class Pixels:
    """What to train from, with or without the cache."""

    index: Index
    """Its sizes are those of the images that `train`, `val` and `target` read: batches must be drawn from this one."""
    train: Read | None = None
    val: Read | None = None
    target: Read | None = None
    notice: str | None = None
    """Why there is no cache though one was asked for."""


def open_pixels(data: DataConfig, index: Index, run_dir: Path, device: torch.device) -> Pixels:
    """The cache that `--data.pixels` asks for. Called by all workers; all of them get one, or none does."""
    if data.pixels == "off":
        return Pixels(index)
    found = {"train": index.train, "val": index.val} | ({"target": index.target} if index.target else {})
    kept = {name: _kept(split, data.image_size) for name, split in found.items()}
    ends = np.cumsum([_num_bytes(split) for split in kept.values()]).tolist()
    buffer_B = _shared_bytes(data.pixels, run_dir, ends[-1], device)
    if isinstance(buffer_B, str):
        mend = "--data.pixels disk" if data.pixels == "memory" else "a --run-dir on another disk"
        text = f"--data.pixels {data.pixels} is off: {buffer_B}. Every epoch decodes all files now: "
        return Pixels(index, notice=f"{text}to change that, use {mend} or a smaller --data.image-size")
    parts = dict(zip(kept, np.split(buffer_B, ends[:-1]), strict=True))
    reads = {name: SplitPixels(found[name], kept[name], part).read for name, part in parts.items()}
    return Pixels(replace(index, **kept), reads["train"], reads["val"], reads.get("target"))


class SplitPixels:
    """The images of one split in shared bytes: first a byte for each that says whether it is there, then all pixels.

    Workers that fill the same place at once write the same bytes.
    """

    def __init__(self, found: Split, kept: Split, buffer_B: np.ndarray) -> None:
        """`found` has the sizes of the files, `kept` those of the pixels."""
        self.found, self.kept = found, kept
        self._filled_N, self._pixels_B = np.split(buffer_B, [len(kept)])
        self._ends_N = _ends(kept)

    def read(self, position: int, place: Place, box: list[int]) -> Tensor:
        """A box as uint8 RGB (C, H, W): a view of the shared pixels, not to be written to. Decodes where it must."""
        height, width = self.kept.sizes_N2[position].tolist()
        end = self._ends_N[position]
        pixels_HWC = self._pixels_B[end - 3 * height * width : end].reshape(height, width, 3)
        if not self._filled_N[position]:
            torch.from_numpy(pixels_HWC).permute(2, 0, 1).copy_(self._decode(position, place))
            self._filled_N[position] = 1  # only now: another worker may be looking
        top, left, height, width = box
        return torch.from_numpy(pixels_HWC[top : top + height, left : left + width].transpose(2, 0, 1))

    def _decode(self, position: int, place: Place) -> Tensor:
        size, found = self.kept.sizes_N2[position].tolist(), self.found.sizes_N2[position].tolist()
        image_CHW = read_rgb(place)
        if list(image_CHW.shape[1:]) != found:
            raise ValueError(f"its size is {list(image_CHW.shape[1:])}, not {found} as when it was checked")
        return resized(image_CHW, size)


def _kept(split: Split, image_size: int) -> Split:
    """The split with the sizes of the pixels that are kept: as evaluation resizes, but never enlarged."""
    sizes_N2 = np.minimum(evaluation_sizes(split.sizes_N2, image_size), split.sizes_N2)
    return replace(split, sizes_N2=sizes_N2.astype(split.sizes_N2.dtype))


def _ends(kept: Split) -> np.ndarray:
    """Where each image's pixels end."""
    return np.cumsum(3 * kept.sizes_N2.prod(axis=1, dtype=np.int64))


def _num_bytes(kept: Split) -> int:
    return len(kept) + int(_ends(kept)[-1]) if len(kept) else 0


# One file for the workers of a machine


def _shared_bytes(kind: str, run_dir: Path, num_bytes: int, device: torch.device) -> np.ndarray | str:
    """Zeroed bytes that all workers of a machine see, or why there are none.

    The file has no name, so the others open it through /proc, by its owner's process and descriptor. Either every
    machine of the run has room or none uses the cache: what an image looks like must not depend on the worker.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0")) if dist.is_initialized() else 0
    file, buffer_B, problem = None, None, f"another worker could not get its {_gib(num_bytes)}"
    try:
        if local_rank == 0:
            file = _reserve(kind, run_dir, num_bytes)
    except OSError as error:
        problem = error.strerror or str(error)
    owner = _find_owner(file, device)
    try:
        if owner is not None:
            buffer_B = _map("/proc/{}/fd/{}".format(*owner), num_bytes)
    except OSError as error:
        problem = f"a worker could not open it: {error.strerror}"
    # Also a barrier: the owner keeps the file until everyone has it.
    failed = dist.largest(float(buffer_B is None), device)
    if file is not None:
        file.close()
    return problem if failed or buffer_B is None else buffer_B


def _reserve(kind: str, run_dir: Path, num_bytes: int) -> IO[bytes]:
    """An open file without a name, its space taken. Raises OSError with the reason in words."""
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "it needs Linux")
    in_memory = kind == "memory"
    room = available_memory() // 2 if in_memory else shutil.disk_usage(run_dir).free
    there_is = f"may use {_gib(room)}, half of what is available" if in_memory else f"{run_dir} has {_gib(room)}"
    too_much = f"it needs {_gib(num_bytes)} and {there_is}"
    # Taking more memory than there is would not fail: the kernel would kill a process.
    if num_bytes > room:
        raise OSError(errno.ENOSPC, too_much)
    file = os.fdopen(os.memfd_create(NAME), "r+b") if in_memory else tempfile.TemporaryFile(dir=run_dir)  # noqa: SIM115
    try:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        file.close()
        raise OSError(error.errno, f"{too_much} ({error.strerror})") from error
    return file


def _find_owner(file: IO[bytes] | None, device: torch.device) -> list[int] | None:
    """(process, descriptor) of this machine's file; None where it has none."""
    machine = zlib.crc32(socket.gethostname().encode())
    mine = [machine, os.getpid(), -1 if file is None else file.fileno()]
    rows = dist.gather_rows(torch.tensor([mine], dtype=torch.int64, device=device)).tolist()
    return next(([pid, descriptor] for where, pid, descriptor in rows if where == machine and descriptor >= 0), None)


def _map(path: str, num_bytes: int) -> np.ndarray:
    with open(path, "r+b") as file:  # noqa: PTH123 - a link of /proc
        return np.frombuffer(mmap.mmap(file.fileno(), num_bytes), dtype=np.uint8)


def available_memory(system: Path = Path("/")) -> int:
    """Bytes that this process's control groups, and the machine, can still give; cached files can be dropped."""
    meminfo = _numbers(system / "proc/meminfo")
    room = [meminfo["MemAvailable:"] * 1024]
    groups = system / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, group = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2, version 1
            mount = system / "sys/fs/cgroup" / controllers
            inner = mount / group.lstrip("/")
            room += [free for folder in (inner, *inner.parents) if (free := _group_room(folder)) is not None]
    return max(0, min(room))


def _group_room(folder: Path) -> int | None:
    """What a control group's memory limit leaves; None without a limit."""
    for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            most, used = (folder / limit).read_text(), int((folder / usage).read_text())
            stat = _numbers(folder / "memory.stat")
        except OSError:
            continue
        cached = sum(stat.get(f"total_{key}", stat.get(key, 0)) for key in ("inactive_file", "active_file"))
        return None if most.strip() == "max" else int(most) - used + cached
    return None


def _numbers(path: Path) -> dict[str, int]:
    """The lines of `name number` in a file of the kernel's."""
    words = [line.split() for line in path.read_text().splitlines()]
    return {word[0]: int(word[1]) for word in words if len(word) > 1}


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
