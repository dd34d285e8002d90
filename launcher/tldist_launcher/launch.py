"""Start a run: check what can be checked, make the run directory, start the workers, watch, and say how it ended."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tldist import backbones, config, worker
from tldist.config import RunConfig, TrainingFailed, UserError
from tldist.data.index import build_index
from tldist.data.loader import loader_kind
from tldist.engine.base import numerics
from tldist.plan import build_plan
from tldist.tracking.console import Console, follow


def launch(settings: RunConfig, quiet: bool = False) -> Path:
    """Run to the end and return the run directory. Raises UserError, or TrainingFailed with the reason."""
    preflight(settings)
    settings = dataclasses.replace(settings, run_dir=str(make_run_dir(settings)))
    run_dir = Path(settings.run_dir)
    config.save(settings, run_dir / "config.yaml")
    try:
        _start(settings, run_dir, quiet)
    except UserError:
        raise
    except Exception as error:
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
        raise TrainingFailed(f"{type(error).__name__}: {reason} (traceback in {run_dir / 'logs'})") from error
    return run_dir


def _start(settings: RunConfig, run_dir: Path, quiet: bool) -> None:
    if launch_kind(settings) == "local":
        _watched(lambda: worker.run(config.to_json(settings)), run_dir, quiet)
    else:
        from tldist_launcher.ray import train_on_ray

        train_on_ray(settings, lambda start, stream: _watched(start, run_dir, quiet, stream))


def launch_kind(settings: RunConfig) -> str:
    """What `auto` stands for."""
    if settings.launch.kind != "auto":
        return settings.launch.kind
    return "ray" if settings.launch.workers > 1 or os.environ.get("RAY_ADDRESS") else "local"


def preflight(settings: RunConfig) -> None:
    """Find the user's mistakes in seconds, before workers are started: data, weights, plan, machine."""
    settings.validate()
    _check_machine(settings)
    loader_kind(settings.data)
    build_plan(settings.strategy, backbones.stage_names(settings.model.name), settings.train.epochs)
    index = build_index(settings.data.root, settings.data.classes)
    if not settings.data.train_images_per_class:
        worker.check_batch(settings, index)
    if settings.strategy.name != "scratch":
        backbones.build(settings.model, len(index.classes), settings.data.image_size, settings.seed)


def _check_machine(settings: RunConfig) -> None:
    gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    numerics(settings.train.precision, torch.device("cuda" if gpus else "cpu"))
    if os.environ.get("RAY_ADDRESS"):
        return  # the cluster decides, see tldist_launcher.ray
    places, what = (gpus, "GPUs") if gpus else (cores, "cores")
    if settings.launch.workers > places:
        raise UserError(
            f"--launch.workers {settings.launch.workers}, but this machine has {places} {what}: use at most {places}, "
            "or set RAY_ADDRESS to a larger cluster"
        )


def make_run_dir(settings: RunConfig) -> Path:
    """The run directory, fresh: --run-dir, or runs/RECIPE-STRATEGY-TIME."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = settings.run_dir or f"runs/{settings.recipe}-{settings.strategy.name}-{stamp}"
    run_dir = Path(name).expanduser().absolute()
    try:
        if (run_dir / "metrics.jsonl").exists():
            raise UserError(f"{run_dir} already holds a run: choose another --run-dir")
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").touch()
    except OSError as error:
        raise UserError(
            f"cannot write the run directory {run_dir}: {error.strerror}; choose another --run-dir"
        ) from error
    return run_dir


def _watched(start: Callable[[], Any], run_dir: Path, quiet: bool, stream: Any = None) -> None:
    """Call `start` while a thread shows what it writes to metrics.jsonl."""
    if quiet:
        start()
        return
    over = threading.Event()
    with Console(stream=stream) as console:
        path = run_dir / "metrics.jsonl"
        watcher = threading.Thread(target=follow, args=(path, console, lambda: not over.is_set()), daemon=True)
        watcher.start()
        try:
            start()
        finally:
            over.set()
            watcher.join(timeout=10)
