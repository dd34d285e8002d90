"""Start a run: check what can be checked, make the run directory, start the workers, watch, and say how it ended.

A run of one worker trains in this process. `StartOnRay`, which the launcher passes in, starts any other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.util
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tldist import config, dist
from tldist.config import RunConfig, TrainingFailed, UserError
from tldist.data.load.open import loader_kind
from tldist.data.source.index import Index, load_index, save_index
from tldist.guard import control
from tldist.guard.control import Stopped
from tldist.guard.watchdog import forget, hung
from tldist.models import backbones
from tldist.objectives.ewc import checkpoint_at
from tldist.rules import validate, validate_device
from tldist.tracking.console import Console, follow
from tldist.tracking.progress import bar
from tldist.train import worker

StartOnRay = Callable[[RunConfig, Callable[[Callable[[], Any], Any], None]], object]
"""(config, watch): start the workers on Ray, and call `watch(start, stream)` around the wait for their end."""


def launch(settings: RunConfig, quiet: bool = False, on_ray: StartOnRay | None = None) -> Path:
    """Run to the end and return the run directory.

    Raises UserError, TrainingFailed with the reason, or Stopped where a signal asked for it.
    """
    settings = absolute(settings)
    index = preflight(settings)
    run_dir = make_run_dir(settings)
    settings = dataclasses.replace(settings, run_dir=str(run_dir))
    config.save(settings, run_dir / "config.yaml")
    save_index(index, run_dir / "index.json")
    with only_one(run_dir):
        try:
            return _to_the_end(settings, run_dir, quiet, on_ray)
        except UserError:
            if not (run_dir / "checkpoints").exists():
                undo(run_dir)  # nothing was done in it, and the corrected command may name it again
            raise


def resume(settings: RunConfig, run_dir: Path, quiet: bool = False, on_ray: StartOnRay | None = None) -> Path:
    """Go on with an interrupted run in its directory, from its last checkpoint, or begin one that was only submitted.

    `settings` are those of its config.yaml. Raises UserError where the images are not those it began with.
    """
    if (run_dir / "summary.json").exists():
        raise UserError(f"{run_dir} has reached its end: nothing is left to resume")
    settings = absolute(settings)
    index = preflight(settings)
    path = run_dir / "index.json"
    if path.exists() and load_index(path).fingerprint != index.fingerprint:
        raise UserError(
            f"the images under {settings.data.root} are not those that {run_dir} began with: bring them back, or "
            "start a new run"
        )
    with only_one(run_dir):
        if not path.exists():
            save_index(index, path)
        return _to_the_end(settings, run_dir, quiet, on_ray)


@contextlib.contextmanager
def only_one(run_dir: Path) -> Iterator[None]:
    """Two processes that write one run directory would spoil it.

    A Slurm job that comes back waits for what is left of its last start on a node that Slurm has lost sight of.
    """
    deadline = time.monotonic() + (LEFTOVER_S if os.environ.get("SLURM_RESTART_COUNT") else 0)
    with (run_dir / "logs" / "lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise UserError(f"another process is running {run_dir}: wait for its end, or stop it") from error
                time.sleep(1)
        yield


def is_running(run_dir: Path) -> bool:
    """Does a process hold this run directory?"""
    try:
        with (run_dir / "logs" / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


LEFTOVER_S = 300.0
"""How long a lost node's processes, and a network file system's locks, may outlive it."""


def _to_the_end(settings: RunConfig, run_dir: Path, quiet: bool, on_ray: StartOnRay | None) -> Path:
    control.forget_stop(run_dir)
    forget(run_dir)
    try:
        with control.stopping_on_signals(run_dir):
            _start(settings, run_dir, quiet, on_ray)
    except SystemExit:  # Ray's own answer to SIGTERM, should its handler be in place
        control.ask_to_stop(run_dir, signal.SIGTERM.name)
    except (UserError, Stopped, TrainingFailed):
        raise
    except Exception as error:
        if sentence := hung(run_dir):
            raise TrainingFailed(sentence) from error
        reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
        raise TrainingFailed(f"{type(error).__name__}: {reason} (traceback in {run_dir / 'logs'})") from error
    if not (run_dir / "summary.json").exists():
        reason = control.stop_reason(run_dir) or "a request"
        raise Stopped(f"stopped by {reason}, all saved: go on with `tldist train --resume {run_dir}`")
    return run_dir


def absolute(settings: RunConfig) -> RunConfig:
    """Paths as every worker understands them, wherever it runs."""
    root, weights, features = settings.data.root, settings.model.weights, settings.cache.dir
    if features:
        features = _absolute(features)
    if root:
        root = _absolute(root)
    if Path(weights).expanduser().is_dir():
        weights = str(checkpoint_at(Path(weights).expanduser().absolute()) / "model.safetensors")
    elif Path(weights).expanduser().is_file():
        weights = _absolute(weights)
    tasks = tuple(_absolute(task) for task in settings.optim.ewc_from)
    return dataclasses.replace(
        settings,
        data=dataclasses.replace(settings.data, root=root),
        model=dataclasses.replace(settings.model, weights=weights),
        cache=dataclasses.replace(settings.cache, dir=features),
        optim=dataclasses.replace(settings.optim, ewc_from=tasks),
    )


def _absolute(path: str) -> str:
    return os.path.abspath(Path(path).expanduser())  # noqa: PTH100 - resolve() would follow links


def _start(settings: RunConfig, run_dir: Path, quiet: bool, on_ray: StartOnRay | None) -> None:
    if launch_kind(settings) == "local":
        _watched(lambda: worker.run(config.to_json(settings)), run_dir, quiet)
        return
    if on_ray is None:
        raise UserError(
            "only the launcher starts workers on Ray: use `tldist train`, or launch.kind local with 1 worker"
        )

    def watch(start: Callable[[], Any], stream: Any) -> None:
        with control.stopping_on_signals(run_dir):  # should Ray have put its own handlers in their place
            _watched(start, run_dir, quiet, stream)

    on_ray(settings, watch)


def launch_kind(settings: RunConfig) -> str:
    """What `auto` stands for."""
    if settings.launch.kind != "auto":
        return settings.launch.kind
    return "ray" if settings.launch.most > 1 or os.environ.get("RAY_ADDRESS") else "local"


def preflight(settings: RunConfig) -> Index:
    """Find the user's mistakes in seconds, before workers are started: machine, plan, data, weights."""
    validate(settings)
    check_device(settings)
    _check_workers(settings)
    _check_ray(settings)
    _check_deepspeed(settings)
    loader_kind(settings.data, dist.local_device())
    plan = worker.plan_of(settings)
    with bar("looking at images") as progress:
        index = worker.data_index(settings, progress)
    if plan.pretrained:
        model = backbones.build(settings.model, len(index.classes), settings.data.image_size, settings.seed)
        worker.pull_of(settings.optim, model)
    return index


def _check_ray(settings: RunConfig) -> None:
    if launch_kind(settings) == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError("Ray is not installed: pip install 'ray[train]', or use --launch.workers 1 --launch.kind local")


def _check_deepspeed(settings: RunConfig) -> None:
    kind = settings.engine.kind
    if kind.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"--engine.kind {kind} needs DeepSpeed, and it is not installed: pip install deepspeed")


def check_device(settings: RunConfig) -> None:
    """Raise UserError for what this machine's devices cannot do, unless another cluster's machines are to run it."""
    if not os.environ.get("RAY_ADDRESS"):
        validate_device(settings, "cuda" if torch.cuda.device_count() else "cpu")


def _check_workers(settings: RunConfig) -> None:
    if os.environ.get("RAY_ADDRESS"):
        return  # the cluster's machines decide, see tldist_launcher.start.ray and the workers
    gpus, cores = torch.cuda.device_count(), dist.cores()
    places, what = (gpus, "GPUs") if gpus else (cores, "cores")
    if settings.launch.least > places:
        raise UserError(
            f"--launch.workers {settings.launch.workers}, but this machine has {places} {what}: use at most {places}, "
            "or set RAY_ADDRESS to a larger cluster"
        )


def named_run_dir(settings: RunConfig) -> Path:
    """Where the run would go if it began now."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = settings.run_dir or f"runs/{settings.recipe}-{settings.strategy.name}-{stamp}"
    return Path(os.path.abspath(Path(name).expanduser()))  # noqa: PTH100 - resolve() would follow links


def make_run_dir(settings: RunConfig) -> Path:
    """The run directory, fresh: --run-dir, or runs/RECIPE-STRATEGY-TIME."""
    run_dir = named_run_dir(settings)
    try:
        if any((run_dir / name).exists() for name in _OWN_FILES):
            raise UserError(f"{run_dir} already holds a run: choose another --run-dir")
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").touch()
    except OSError as error:
        raise UserError(
            f"cannot write the run directory {run_dir}: {error.strerror}; choose another --run-dir"
        ) from error
    return run_dir


_OWN_FILES = ("config.yaml", "index.json", "metrics.jsonl", "job.sbatch")


def undo(run_dir: Path) -> None:
    """Remove what `launch` and a worker that never began wrote; anything else in the folder is not ours."""
    for name in _OWN_FILES:
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / "logs", ignore_errors=True)
    with contextlib.suppress(OSError):
        run_dir.rmdir()


def _watched(start: Callable[[], Any], run_dir: Path, quiet: bool, stream: Any = None) -> None:
    """Call `start` while a thread shows what it writes to metrics.jsonl."""
    if quiet:
        start()
        return
    over = threading.Event()
    with Console(stream=stream) as console:
        path = run_dir / "metrics.jsonl"
        seen = path.stat().st_size if path.exists() else 0
        following = {"args": (path, console, lambda: not over.is_set()), "kwargs": {"offset": seen}}
        watcher = threading.Thread(target=follow, daemon=True, **following)
        watcher.start()
        try:
            start()
        finally:
            over.set()
            watcher.join(timeout=10)
