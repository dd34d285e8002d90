"""Workers on Ray: Ray Train places them, gives them a process group, and calls `worker.run` with one JSON string.

When workers are lost, a new group goes on from the run's last checkpoint, with as many as there are places for. Ray
Train's own restarts are not used: they take a mistake in the data for a lost worker, and know of no checkpoint but
those that were reported to them (and a report that returned may not be committed yet).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

from tldist import config, dist
from tldist.config import LaunchConfig, RunConfig, TrainingFailed, UserError
from tldist.guard import control
from tldist.guard.watchdog import hung
from tldist.tracking.events import EventLog

# Read by Ray at import or start-up, inherited by the workers of a cluster started here; a user's own setting wins.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "45",
    "RAY_worker_niceness": "0",  # 15 by default: training would wait for whatever else runs here
}

PLACES_WAIT_S = 300
"""How long a run that lost a node waits for enough places to go on."""


class Work(NamedTuple):
    """What each worker calls: a function below the launcher, with one string."""

    module: str
    function: str
    argument: str


def train_on_ray(
    settings: RunConfig, watch: Callable[[Callable[[], Any], TextIO], None], work: Work | None = None
) -> None:
    """Run `settings`, or other `work` in its run directory, on this machine, or on the cluster at RAY_ADDRESS, and wait
    for its end.

    `watch(start, stream)` calls `start()` and shows progress on `stream`; everything Ray itself prints goes to
    logs/ray.log. Raises what ended the first worker that failed.
    """
    # Ray's own patience with a worker that does not answer: longer than the watchdog's, which knows what it was doing.
    waits = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(_patience_s(settings))}
    cores = min(settings.launch.most, dist.cores())
    with on_ray(Path(settings.run_dir) / "logs" / "ray.log", cores, waits) as terminal:
        _check_cluster(settings)
        watch(lambda: _fit_with_restarts(settings, terminal, work), terminal)


@contextlib.contextmanager
def on_ray(log: Path, cores: int, environment: Mapping[str, str]) -> Iterator[TextIO]:
    """Connected to the cluster at RAY_ADDRESS, or to one made here with so many cores; what Ray prints goes to `log`.

    Yields a stream on the real stdout. `environment` is for Ray and its workers; a user's own setting wins.
    """
    for name, value in {**_ENVIRONMENT, **environment}.items():
        os.environ.setdefault(name, value)
    if os.environ.get("RAY_ADDRESS") and _has_token():
        # `ray start` asks for a token where one exists, but a driver offers it only when told to; a cluster
        # without authentication takes a driver that offers one.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    with chatter_to(log) as terminal:
        import ray

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with _keeping_our_handlers(), _children_without(signal.SIGUSR1):
            _connect(cores)
        _set_again(before, signal.SIGTERM)
        try:
            yield terminal
        finally:
            ray.shutdown()
            _set_again(before, signal.SIGINT)  # Ray Train's own would stay


def _patience_s(settings: RunConfig) -> int:
    return int(dist.patience(settings.launch.hang_minutes).total_seconds())


@contextlib.contextmanager
def _children_without(number: signal.Signals) -> Iterator[None]:
    """Processes that are started in the block never receive this signal, whose default is to end them.

    A cluster may send it to all processes of a job, and those of Ray must live until the workers have saved. One that
    comes meanwhile is received at the block's end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _set_again(handlers: dict[signal.Signals, Any], number: signal.Signals) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, handlers[number])


def _has_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or Path("~/.ray/auth_token").expanduser().is_file()


@contextlib.contextmanager
def _keeping_our_handlers() -> Iterator[None]:
    """Ray's own SIGTERM handler raises SystemExit, and while Ray starts that can be lost: the run would go on."""
    from ray._private import utils

    theirs = getattr(utils, "set_sigterm_handler", None)
    utils.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        if theirs is not None:
            utils.set_sigterm_handler = theirs


def _connect(cores: int) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(**quiet)
        except ConnectionError as error:
            raise UserError(f"cannot reach the Ray cluster at RAY_ADDRESS={address}: {error}") from error
    else:
        # address="local": a cluster that somebody else left running on this machine is not ours to join.
        ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)


def _check_cluster(settings: RunConfig) -> None:
    import ray

    what, wanted = _place(), settings.launch
    in_all = ray.cluster_resources().get(what, 0)
    if wanted.least > in_all:
        raise UserError(
            f"--launch.workers {wanted.workers}, but the Ray cluster has {in_all:g} {what}s: use fewer or add nodes"
        )


def _place() -> str:
    """What a worker takes one of."""
    return "GPU" if _use_gpu() else "CPU"


def _use_gpu() -> bool:
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0 and (
        torch.cuda.is_available() or bool(os.environ.get("RAY_ADDRESS"))
    )


def _trainer(settings: RunConfig, workers: int, attempt: int, work: Work | None) -> Any:
    from ray.train import FailureConfig, LoggingConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        _run_worker,
        torch_config=TorchConfig(timeout_s=_patience_s(settings)),
        train_loop_config=(work or Work("tldist.train.worker", "run", config.to_json(settings)))._asdict(),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=_use_gpu()),
        run_config=RayRunConfig(
            name=f"ray-{os.getpid()}-{attempt}",  # under a name it knows, Ray Train would go on with what it recorded
            storage_path=str(Path(settings.run_dir) / "logs" / "ray"),
            logging_config=LoggingConfig(log_level="ERROR"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )


def _fit_with_restarts(settings: RunConfig, terminal: TextIO, work: Work | None = None) -> None:
    """Fit, until the run is done, stopped, or failed by something that another start would not mend."""
    run_dir, wanted, restarts = Path(settings.run_dir), settings.launch, Restarts(settings)
    for attempt in itertools.count():
        control.forget_stop(run_dir, control.MORE_PLACES)  # now they are taken
        workers = _wait_for_places(settings, wanted, terminal)
        if workers == 0:
            return
        try:
            with _growing(settings, wanted, workers):
                _fit(_trainer(settings, workers, attempt, work))
        except WorkersLost as lost:
            restarts.count(lost)
            if lost.never_began and workers > wanted.least:  # places that add up, but do not fit a worker each
                wanted = dataclasses.replace(wanted, workers=f"{wanted.least}:{workers - 1}")
            continue
        if (run_dir / "summary.json").exists() or control.stop_reason(run_dir) != control.MORE_PLACES:
            return


class Restarts:
    """Counts starts that came to nothing, says why there is another one, and ends what would go on for ever."""

    def __init__(self, settings: RunConfig) -> None:
        self.run_dir, self.most = Path(settings.run_dir), settings.launch.restarts
        self.fruitless, self.before = 0, ""

    def count(self, lost: WorkersLost) -> None:
        """Raises TrainingFailed where another start would be one too many."""
        if sentence := hung(self.run_dir):  # it might hang again, at a cluster's cost
            raise TrainingFailed(sentence) from lost
        standing, earlier = _standing(self.run_dir), self.before
        self.before, self.fruitless = standing, self.fruitless + 1 if standing == earlier else 1
        if self.fruitless > self.most:
            raise TrainingFailed(
                f"{lost}, {self.fruitless} times since the last checkpoint ({standing or 'none'}): look for the reason "
                f"in {self.run_dir / 'logs'}, then go on with `tldist train --resume {self.run_dir}`"
            ) from lost
        _tell(self.run_dir, f"{lost}: starting again from {standing or 'the beginning'}")


class WorkersLost(RuntimeError):  # noqa: N818 - it states a fact of the run
    """Workers are gone without having raised anything."""

    never_began = False


def _standing(run_dir: Path) -> str:
    last = run_dir / "checkpoints" / "last"
    return last.resolve().name if last.exists() else ""


def _tell(run_dir: Path, text: str) -> None:
    """A line in the run's own log, which no worker writes at this moment."""
    log = EventLog(run_dir / "metrics.jsonl")
    log.write("notice", text=text)
    log.close()


def workers_for(places: int, wanted: LaunchConfig, batch_size: int) -> int:
    """The most workers for so many places that share a step's images evenly; 0: too few places."""
    counts = range(min(wanted.most, places), wanted.least - 1, -1)
    return next((n for n in counts if batch_size % n == 0), 0)


def _wait_for_places(settings: RunConfig, wanted: LaunchConfig, terminal: TextIO) -> int:
    """How many workers to start; 0: asked to stop. Places of workers that ended, or died, come free with a delay."""
    import ray

    what, run_dir, batch = _place(), Path(settings.run_dir), settings.data.batch_size
    started, told = time.monotonic(), False
    while control.stop_reason(run_dir) is None:
        free, in_all = (int(found.get(what, 0)) for found in (ray.available_resources(), ray.cluster_resources()))
        workers, hoped_for = (workers_for(places, wanted, batch) for places in (free, in_all))
        waited = time.monotonic() - started
        if workers and (workers == hoped_for or waited > SETTLE_S):
            return workers
        if waited > SETTLE_S and not told:
            told = True
            print(f"waiting: {free} {what}s are free, {wanted.least} are needed", file=terminal)
        if hoped_for == 0 and waited > PLACES_WAIT_S:
            raise TrainingFailed(
                f"{in_all} {what}s are left, and --launch.workers {settings.launch.workers} needs more: go on with "
                f"`tldist train --resume {run_dir}` when there are"
            )
        time.sleep(0.2)
    return 0


SETTLE_S = 5.0
"""How long to hope for more places before starting with fewer."""


@contextlib.contextmanager
def _growing(settings: RunConfig, wanted: LaunchConfig, workers: int) -> Iterator[None]:
    """While the block runs: when there are places for more workers than it has, ask it to save and stop."""
    over = threading.Event()
    grower = threading.Thread(target=_grow, args=(settings, wanted, workers, over), daemon=True)
    if workers < wanted.most:
        grower.start()
    try:
        yield
    finally:
        over.set()
        if grower.is_alive():
            grower.join(timeout=SETTLE_S)


def _grow(settings: RunConfig, wanted: LaunchConfig, workers: int, over: threading.Event) -> None:
    import ray

    what, run_dir, batch = _place(), Path(settings.run_dir), settings.data.batch_size
    metrics, seen = run_dir / "metrics.jsonl", 0
    silent = metrics.stat().st_size if metrics.exists() else 0
    while not over.wait(SETTLE_S):
        if not metrics.exists() or metrics.stat().st_size == silent:
            continue  # until the workers have begun, the places that they will take look free
        places = int(ray.available_resources().get(what, 0)) + workers
        in_all = int(ray.cluster_resources().get(what, 0))
        seen = seen + 1 if workers_for(min(places, in_all), wanted, batch) > workers else 0
        if seen == 2 and not over.is_set():
            control.ask_to_stop(run_dir, control.MORE_PLACES)
            return


def _run_worker(loop_config: dict[str, str]) -> None:
    work = Work(**loop_config)
    getattr(importlib.import_module(work.module), work.function)(work.argument)


def _fit(trainer: Any) -> None:
    """Raises what a worker raised, or WorkersLost."""
    from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit()
    except WorkerGroupError as error:
        raise _cause(error) from error
    except PreemptionError as error:
        raise WorkersLost("a node was taken away") from error
    except ControllerError as error:
        lost = WorkersLost(f"the workers did not start ({type(error.controller_failure).__name__})")
        lost.never_began = True
        raise lost from error
    except SystemExit as error:  # how Ray Train answers Ctrl-C
        raise KeyboardInterrupt from error


def _cause(error: Any) -> Exception:
    """What a worker raised, without Ray's wrapping; WorkersLost where none raised anything but that a peer was gone."""
    gone: list[int] = []
    said = ""
    for rank, failure in sorted(error.worker_failures.items()):
        cause = getattr(failure, "cause", None) or getattr(failure, "__cause__", None) or failure
        if _is_death(failure) or _is_death(cause):
            gone.append(rank)
        elif not dist.is_lost_peer(cause):
            return cause
        else:
            said = f" ({' '.join(str(cause).split())[:200]})"
    return WorkersLost(f"worker {', '.join(map(str, gone))} died" if gone else f"a worker was lost{said}")


def _is_death(failure: Any) -> bool:
    from ray.exceptions import RayActorError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

    return isinstance(failure, RayActorError | WorkerHealthCheckFailedError | WorkerHealthCheckTimeoutError)


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
