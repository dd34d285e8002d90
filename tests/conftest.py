"""Shared fixtures: small image folders made on the spot, the real data where it is, and gloo ranks."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

LONG = "TLDIST_LONG" in os.environ
"""Is there time for every combination, and for what waits for minutes? (`make long`)"""
long = pytest.mark.skipif(not LONG, reason="takes long: make long")

# No run of the tests may reach a W&B account.
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def write_images(folder: Path, per_class: dict[str, int], seed: int = 0, side: int = 48) -> None:
    """`per_class` small JPEGs for each class; every class has its own colour, so that training can succeed."""
    rng = np.random.default_rng(seed)
    for label, (name, count) in enumerate(per_class.items()):
        (folder / name).mkdir(parents=True)
        colour = np.array([60 + 140 * (label % 2), 200 - 120 * (label // 2 % 2), 120])
        for i in range(count):
            h, w = rng.integers(side, side * 2, 2)
            pixels = np.clip(colour + rng.normal(0, 40, (h, w, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:04d}.jpg", quality=92)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes: 40 training and 19 validation images (19 shares evenly among no workers but one)."""
    root = tmp_path_factory.mktemp("photos")
    write_images(root / "train", {"ants": 20, "bees": 20}, seed=1)
    write_images(root / "val", {"ants": 9, "bees": 10}, seed=2)
    return root


@pytest.fixture(scope="session")
def two_domains(photos: Path) -> Path:
    """`photos` as source and as target, but for the target's 31 training images: fewer than a source epoch shows.

    The folder stands beside `photos`, under this fixture's name.
    """
    root = photos.with_name("two_domains")
    write_images(root / "target" / "train", {"any": 31}, seed=4)
    for link, to in (("source", photos), ("target/val", photos / "val")):
        (root / link).symlink_to(to, target_is_directory=True)
    return root


@pytest.fixture(scope="session")
def trained_run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on `photos`, two epochs at 32 px in fp32 by torchvision's loader: its logits are worth comparing.

    Not to be written to.
    """
    from tldist import config
    from tldist.data.source.index import build_index, save_index
    from tldist.train import worker

    run_dir = tmp_path_factory.mktemp("trained") / "run"
    run_dir.mkdir()
    made = config.RunConfig(
        run_dir=str(run_dir),
        model=config.ModelConfig(weights="none", head="mlp_bn"),
        strategy=config.StrategyConfig(name="full"),
        data=config.DataConfig(root=str(photos), batch_size=8, image_size=32, loader="torchvision"),
        optim=config.OptimConfig(base_lr=1e-3),
        train=config.TrainConfig(epochs=2, precision="fp32"),
        tracking=config.TrackingConfig(wandb="disabled"),
    )
    config.save(made, run_dir / "config.yaml")
    save_index(build_index(photos), run_dir / "index.json")
    worker.run(config.to_json(made))
    return run_dir


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real archives; skips where it is absent."""
    folder = Path(os.environ.get("TLDIST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the real data is not at {folder} (set TLDIST_DATA)")
    return folder


_CONTEXT = multiprocessing.get_context("forkserver")
# The server imports the heavy packages once; each rank is then a cheap fork of a process without threads.
_CONTEXT.set_forkserver_preload(["torch", "torchvision", "tldist.train.worker"])


def _rank_main(
    function: Callable[..., Any], rank: int, world: int, port: int, arguments: tuple[Any, ...], queue: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        queue.put((rank, function(*arguments), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` on `world` ranks of a fresh environment; results by rank.

    The function joins the group itself (tldist.dist.init). Raises AssertionError with the first traceback.
    """
    queue: Any = _CONTEXT.Queue()
    port = _free_port()
    ranks = [
        _CONTEXT.Process(target=_rank_main, args=(function, r, world, port, arguments, queue)) for r in range(world)
    ]
    for process in ranks:
        process.start()
    answers = sorted((queue.get(timeout=800) for _ in ranks), key=lambda answer: answer[0])
    for process in ranks:
        process.join(timeout=30)
    for rank, _, error in answers:
        assert error is None, f"rank {rank} failed:\n{error}"
    return [result for _, result, _ in answers]


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
