"""Workers on Ray: Ray Train places them, gives them a process group, and calls `worker.run` with one JSON string."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from tldist import config, dist
from tldist.config import RunConfig, UserError

# Read by Ray at import or start-up, inherited by the workers of a cluster started here; a user's own setting wins.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def train_on_ray(settings: RunConfig, watch: Callable[[Callable[[], Any], TextIO], None]) -> None:
    """Run `settings` on this machine, or on the cluster at RAY_ADDRESS, and wait for its end.

    `watch(start, stream)` calls `start()` and shows progress on `stream`; everything Ray itself prints goes to
    logs/ray.log. Raises what ended the first worker that failed.
    """
    # Ray's own patience with a worker that does not answer: longer than the watchdog's, which knows what it was doing.
    waits = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(_patience_s(settings))}
    for name, value in {**_ENVIRONMENT, **waits}.items():
        os.environ.setdefault(name, value)
    if os.environ.get("RAY_ADDRESS") and _has_token():
        # `ray start` asks for a token where one exists, but a driver offers it only when told to; a cluster
        # without authentication takes a driver that offers one.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    with chatter_to(Path(settings.run_dir) / "logs" / "ray.log") as terminal:
        import ray

        _connect(settings)
        on_interrupt = signal.getsignal(signal.SIGINT)
        try:
            _check_cluster(settings, terminal)
            trainer = _trainer(settings)
            watch(lambda: _fit(trainer), terminal)
        finally:
            ray.shutdown()
            signal.signal(signal.SIGINT, on_interrupt)  # Ray Train's own would stay


def _patience_s(settings: RunConfig) -> int:
    return int(dist.patience(settings.launch.hang_minutes).total_seconds())


def _has_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or Path("~/.ray/auth_token").expanduser().is_file()


def _connect(settings: RunConfig) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(**quiet)
        except ConnectionError as error:
            raise UserError(f"cannot reach the Ray cluster at RAY_ADDRESS={address}: {error}") from error
    else:
        # address="local": a cluster that somebody else left running on this machine is not ours to join.
        ray.init(address="local", num_cpus=settings.launch.workers, include_dashboard=False, **quiet)


def _check_cluster(settings: RunConfig, terminal: TextIO) -> None:
    import ray

    what = "GPU" if _use_gpu() else "CPU"
    in_all, free = (found.get(what, 0) for found in (ray.cluster_resources(), ray.available_resources()))
    workers = settings.launch.workers
    if workers > in_all:
        raise UserError(
            f"--launch.workers {workers}, but the Ray cluster has {in_all:g} {what}s: use fewer or add nodes"
        )
    if workers > free:
        print(
            f"waiting: {free:g} of the Ray cluster's {in_all:g} {what}s are free, {workers} are needed", file=terminal
        )


def _use_gpu() -> bool:
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0 and (
        torch.cuda.is_available() or bool(os.environ.get("RAY_ADDRESS"))
    )


def _trainer(settings: RunConfig) -> Any:
    from ray.train import LoggingConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        _run_worker,
        torch_config=TorchConfig(timeout_s=_patience_s(settings)),
        train_loop_config={"config_json": config.to_json(settings)},
        scaling_config=ScalingConfig(num_workers=settings.launch.workers, use_gpu=_use_gpu()),
        run_config=RayRunConfig(
            name="ray",
            storage_path=str(Path(settings.run_dir) / "logs"),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _run_worker(loop_config: dict[str, str]) -> None:
    from tldist import worker

    worker.run(loop_config["config_json"])


def _fit(trainer: Any) -> None:
    from ray.train.v2.api.exceptions import WorkerGroupError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit()
    except WorkerGroupError as error:
        raise _cause(error) from error
    except SystemExit as error:  # how Ray Train answers Ctrl-C
        raise KeyboardInterrupt from error


def _cause(error: Any) -> Exception:
    """What a worker raised, without Ray's wrapping; a worker that only lost its peers in a collective comes last."""
    causes = []
    for _, failure in sorted(error.worker_failures.items()):
        causes.append(getattr(failure, "cause", None) or getattr(failure, "__cause__", None) or failure)
    causes.sort(key=lambda cause: "all_reduce" in str(cause) or "Connection closed by peer" in str(cause))
    return causes[0] if causes else error


@contextlib.contextmanager
def chatter_to(path: Path) -> Iterator[TextIO]:
    """Send everything written to this process's stdout and stderr, by C++ threads too, to a file.

    Yields a stream on the real stdout for what the user should see.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with path.open("ab") as log, os.fdopen(os.dup(1), "w", buffering=1) as terminal:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield terminal
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, real in zip((1, 2), saved, strict=True):
                os.dup2(real, number)
                os.close(real)
