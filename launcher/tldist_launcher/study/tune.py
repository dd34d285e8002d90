"""A study's trials on Ray Tune: which configuration is tried next, where, and which is given up early.

Tune's own state is not what a study is resumed from. A trial's run directory is: one that holds a summary is finished,
any other goes on from its last checkpoint; a search hands what its finished trials came to back to Optuna and to ASHA.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from tldist import dist
from tldist.config import UserError
from tldist.guard import control
from tldist.study.log import EVERY_EPOCH, METRICS, PRUNED, TRIAL, Trial, came_to, state_of, tried
from tldist.tracking.runlog import Row, parse, read
from tldist.tracking.wording import number, whole
from tldist.train.launch import is_running
from tldist_launcher.study.file import Axis, Job, Study
from tldist_launcher.study.trial import POLL_S, SAID_WHY, STOPPED, TrialProcess, write_json

ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails has no metric
    "TUNE_RESULT_DIR": "",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class Place:
    """What a trial gets, and how many run at once."""

    cores: float
    gpus: float
    at_once: int


def place_for(at_once: int, gpus_per_trial: float | None) -> Place:
    """Shares of the cluster's GPUs, or of its cores where it has none; 0 at once: as many as there is room for.

    Raises UserError where there is no room.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    share = gpus_per_trial if gpus_per_trial is not None else float(gpus > 0)
    if share and not gpus:
        raise UserError(f"--gpus-per-trial {share:g}, and Ray sees no GPU here: leave it out to share the cores")
    room = int(sum(int(node.get("GPU", 0.0)) * int(1 / share + 1e-9) for node in nodes) if share else cores)
    if at_once > room:
        what = f"shares of {share:g} GPU" if share else "cores"
        raise UserError(f"--workers {at_once}, but there are {room} {what}: use fewer")
    at_once = at_once or room
    each = min(cores / at_once, max(node.get("CPU", 0.0) for node in nodes))
    return Place(float(int(each)) if each >= 1 else math.floor(100 * each) / 100, share, at_once)


class TrialRun(tune.Trainable):
    """What Ray starts for a trial: watches its process, and tells Tune of its validations one by one."""

    def setup(self, config: dict[str, Any], study: Study, place: Place) -> None:  # type: ignore[override]
        """Called by Tune before the first trial that this Ray worker runs."""
        self.study, self.place = study, place
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Called by Tune before each other trial."""
        self.cleanup()
        self._begin(new_config)
        return True

    def _begin(self, chosen: dict[str, Any]) -> None:
        self.process: TrialProcess | None = None
        self.last: Row = {}
        if control.stop_reason(self.study.folder):
            return  # Tune has not looked yet
        self.job = job_of(self.study, chosen)
        run_dir = Path(self.job.settings.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        if state_of(run_dir) != "finished":
            write_json(run_dir / TRIAL, _told(self.job, self.place))
        # LOCAL_WORLD_SIZE is what `dist.local_workers` divides this machine's cores by.
        sharing = str(max(1, round(dist.cores() / self.place.cores)))
        self.rows = eval_rows(run_dir)
        self.process = TrialProcess(self.job, {"LOCAL_WORLD_SIZE": sharing})

    def step(self) -> dict[str, Any]:
        """Wait for the next validation; `done` with the last one, when all is written.

        Raises RuntimeError where the process died without a word; Tune starts the trial again.
        """
        if self.process is None:
            return {**self._metrics(), "done": True}
        while True:
            ended = self.process.exit_code  # asked before looking: rows written until then are seen
            row = next(self.rows)
            if row is not None:
                self.last = row
                if (whole(row, "epoch") or 0) < self.job.settings.train.epochs:
                    return {**self._metrics(), "done": False}
            elif ended is not None:
                if ended not in (0, STOPPED, SAID_WHY):
                    raise RuntimeError(f"the process of {self.job.name} ended with code {ended}")
                if ended == SAID_WHY:
                    self.last = {}  # however well it did before it failed
                return {**self._metrics(), "done": True}
            elif control.stop_reason(self.study.folder):
                self.process.ask_to_stop()
            time.sleep(POLL_S if row is None else 0)

    def cleanup(self) -> None:
        """Tune has enough of this trial: save and stop."""
        if self.process is not None:
            self.process.stop()

    def _metrics(self) -> dict[str, float]:
        return {name: math.nan if (v := number(self.last, name)) is None else v for name in EVERY_EPOCH}


def job_of(study: Study, chosen: dict[str, Any]) -> Job:
    """What Tune's config stands for."""
    if "job" in chosen:
        return study.job(**chosen["job"])
    return study.job({axis.name: chosen[axis.name] for axis in study.axes}, study.seeds[0], "search")


def eval_rows(run_dir: Path) -> Iterator[Row | None]:
    """The rows of a run's validations, one per epoch, as they are written; None where there is no new one yet."""
    path, offset, epoch = run_dir / "metrics.jsonl", 0, 0
    while True:
        news = b""
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(offset)
            news = file.read()
        news = news[: news.rfind(b"\n") + 1]
        offset += len(news)
        for row in map(parse, news.splitlines()):
            # A resumed run may validate an epoch again.
            if row is not None and row.get("event") == "eval" and (whole(row, "epoch") or 0) > epoch:
                epoch = whole(row, "epoch") or 0
                yield row
        yield None


def _told(job: Job, place: Place) -> Row:
    return {
        "choices": job.labels,
        "exact": job.choices,
        "seed": job.seed,
        "stage": job.stage,
        "cores": place.cores,
        "gpus": place.gpus,
    }


def run_jobs(study: Study, jobs: list[Job], place: Place) -> None:
    """Run these trials, as many at once as there is room for."""
    told = [{"choices": job.choices, "seed": job.seed, "stage": job.stage} for job in jobs]
    if told:
        _fit(study, place, {"job": tune.grid_search(told)}, tune.TuneConfig())


def run_search(study: Study, past: list[Trial], place: Place) -> None:
    """Try configurations until the budget's number is reached; `past` are the search's trials so far."""
    ended = tried(past)
    if len(ended) >= study.budget.trials:
        return
    tune_config = tune.TuneConfig(
        search_alg=optuna_of(study, past), scheduler=_Asha(study, ended), num_samples=study.budget.trials - len(ended)
    )
    _fit(study, place, None, tune_config)


class _WhenAsked(tune.Stopper):
    """Ends all trials, and leaves those that have not begun, when the study is asked to stop."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return control.stop_reason(self.folder) is not None


def _fit(study: Study, place: Place, space: dict[str, Any] | None, tune_config: tune.TuneConfig) -> None:
    """Let Tune run until nothing is left, or the study is asked to stop and its trials have saved."""
    _tuner(study, place, space, tune_config).fit()
    # Tune gives trials that it ends five seconds, which a checkpoint may not have enough of; they go on without it.
    while control.stop_reason(study.folder) and any(map(is_running, (study.folder / "trials").iterdir())):
        time.sleep(POLL_S)


def _tuner(study: Study, place: Place, space: dict[str, Any] | None, tune_config: tune.TuneConfig) -> tune.Tuner:
    tune_config.max_concurrent_trials = place.at_once
    tune_config.reuse_actors = True  # a trial has a process of its own all the same
    trainable = tune.with_parameters(TrialRun, study=study, place=place)
    return tune.Tuner(
        tune.with_resources(trainable, {"cpu": place.cores, "gpu": place.gpus}),
        param_space=space,
        tune_config=tune_config,
        run_config=tune.RunConfig(
            stop=_WhenAsked(study.folder),
            name=f"tune-{os.getpid()}-{time.time_ns()}",
            storage_path=str(study.folder / "logs" / "tune"),
            failure_config=tune.FailureConfig(max_failures=study.base.launch.restarts),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the run directory has its own
            verbose=0,
        ),
    )


def _mode(study: Study) -> str:
    return "min" if METRICS[study.metric].lower_is_better else "max"


class _Optuna(OptunaSearch):
    """To which a trial that came to nothing is a poor result, as one that was pruned before its first value.

    Left alone, it would forget one whose last value is none, and might suggest its like again.
    """

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        value = math.nan if result is None else result.get(self.metric, math.nan)
        super().on_trial_complete(trial_id, result if math.isfinite(value) else None, error)


def optuna_of(study: Study, past: list[Trial]) -> OptunaSearch:
    """TPE that knows what past trials came to; those that are to be tried again are suggested first."""
    ended = tried(past)
    unfinished = [trial.exact for trial in past if trial not in ended]
    searcher = _Optuna(
        {axis.name: _distribution(axis) for axis in study.axes},
        metric=study.metric,
        mode=_mode(study),
        points_to_evaluate=unfinished,
        seed=len(past),  # the same seed again would suggest the same again
    )
    for trial in ended:
        value = came_to(trial, study.metric)
        searcher.add_evaluated_point(trial.exact, value or 0.0, pruned=value is None)
    return searcher


def _distribution(axis: Axis) -> Any:
    import optuna.distributions as of

    if axis.span is None:
        return of.CategoricalDistribution(list(axis.choices))
    if axis.span.whole:
        return of.IntDistribution(int(axis.span.low), int(axis.span.high), log=axis.span.log)
    return of.FloatDistribution(axis.span.low, axis.span.high, log=axis.span.log)


class _Asha(AsyncHyperBandScheduler):
    """ASHA (Li et al., 2020) that remembers trials which ended before it began, and marks those that it ends."""

    def __init__(self, study: Study, past: list[Trial]) -> None:
        epochs = study.base.train.epochs
        super().__init__(
            metric=study.metric,
            mode=_mode(study),
            max_t=epochs,
            grace_period=min(study.budget.grace_epochs, epochs),
            stop_last_trials=False,
        )
        self.study = study
        for trial in past:
            self._remember(trial)

    def _remember(self, trial: Trial) -> None:
        stand_in = SimpleNamespace(trial_id=trial.name)
        self.on_trial_add(None, stand_in)  # type: ignore[arg-type]
        for row in read(self.study.folder / "trials" / trial.name).evals:
            value = number(row, self.study.metric)
            told = {"training_iteration": whole(row, "epoch"), self.study.metric: math.nan if value is None else value}
            super().on_trial_result(None, stand_in, told)  # type: ignore[arg-type]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Called at each validation of a trial."""
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            run_dir = Path(job_of(self.study, trial.config).settings.run_dir)
            write_json(run_dir / PRUNED, {"epoch": result["training_iteration"]})
            control.ask_to_stop(run_dir, "study")
        return decision
