"""The pixel cache between processes: shared on one machine, agreed on between machines, gone with the run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import run_ranks

from tldist import dist
from tldist.config import DataConfig
from tldist.data.batches import Worker, train_batches
from tldist.data.load import pixels as cache
from tldist.data.load.decode import read_rgb
from tldist.data.load.open import open_loader
from tldist.data.load.pixels import NAME, Pixels, open_pixels
from tldist.data.presets import PRESETS
from tldist.data.source.index import build_index

CPU = torch.device("cpu")


def decode_counter() -> list[str]:
    """From now on, the files that this process's caches decode."""
    seen: list[str] = []
    cache.read_rgb = lambda path: seen.append(str(path)) or read_rgb(path)  # type: ignore[assignment]
    return seen


def epochs(data: DataConfig, made: Pixels, count: int) -> int:
    """Train on nothing for some epochs; returns a sum over the pixels seen."""
    loader, total = open_loader(data, PRESETS["basic"], 8, CPU, made.train), 0
    for epoch in range(count):
        worker = Worker(dist.rank(), dist.world_size())
        for batch in loader.batches(train_batches(made.index.train, PRESETS["basic"], 32, 8, 0, epoch, worker)):
            total += int(batch.images_NHWC.sum())
        dist.barrier()  # as the end of an epoch has
    loader.close()
    return total


def _share(
    root: str, run_dir: str, kind: Literal["memory", "disk"], rooms: tuple[int, ...]
) -> tuple[list[str], str | None]:
    """Two epochs on this rank; what it decoded, and the notice. `rooms`: each rank is a machine with so much memory."""
    dist.init(CPU)
    if rooms:
        os.environ["LOCAL_RANK"] = "0"
        name, room = f"node{dist.rank()}", rooms[dist.rank()]
        socket.gethostname = lambda: name
        cache.available_memory = lambda: room  # type: ignore[assignment]
    seen, data = decode_counter(), DataConfig(root=root, image_size=32, batch_size=8, threads=1, pixels=kind)
    made = open_pixels(data, build_index(root), Path(run_dir), CPU)
    epochs(data, made, 2)
    dist.close()
    return seen, made.notice


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_two_workers_share_one_file(photos: Path, tmp_path: Path, kind: str) -> None:
    (first, _), (second, _) = run_ranks(_share, 2, str(photos), str(tmp_path), kind, ())
    assert len(first) == len(second) == 20
    assert len({*first, *second}) == 40
    assert not list(tmp_path.iterdir())


def test_each_machine_has_a_file_of_its_own(photos: Path, tmp_path: Path) -> None:
    answers = run_ranks(_share, 2, str(photos), str(tmp_path), "memory", (2**30, 2**30))
    assert all(20 < len(seen) <= 40 and notice is None for seen, notice in answers)


def test_without_room_on_one_machine_none_uses_it(photos: Path, tmp_path: Path) -> None:
    answers = run_ranks(_share, 2, str(photos), str(tmp_path), "memory", (2**30, 0))
    (first, why_first), (second, why_second) = answers
    assert first == second == []
    assert "is off: another worker could not get its 0.00 GiB." in str(why_first)
    assert "may use 0.00 GiB" in str(why_second)


def _until_killed(root: str, run_dir: str, kind: Literal["memory", "disk"], told: Connection) -> None:
    data = DataConfig(root=root, image_size=32, batch_size=8, threads=1, pixels=kind)
    made = open_pixels(data, build_index(root), Path(run_dir), CPU)
    told.send(epochs(data, made, 1))
    signal.pause()


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_killed_run_leaves_nothing(photos: Path, tmp_path: Path, kind: Any) -> None:
    """Because the cache has no name even while the run is alive."""
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe()
    process = context.Process(target=_until_killed, args=(str(photos), str(tmp_path), kind, there))
    process.start()
    assert here.recv() > 0
    lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    shared = [line.split(maxsplit=5)[5] for line in lines if " rw-s " in line]
    assert any(name.startswith(f"/memfd:{NAME}" if kind == "memory" else str(tmp_path)) for name in shared)
    assert all(name.endswith("(deleted)") for name in shared)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not list(tmp_path.iterdir())
