"""`tldist study`: many runs as one experiment, compared on equal terms.

The study's directory is all there is to it: started again, the same command goes on with what is not finished.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tldist import config, dist
from tldist.config import TrainingFailed, UserError
from tldist.guard import control
from tldist.guard.control import Stopped
from tldist.rules import validate
from tldist.study.log import (
    FAILED,
    METRICS,
    STUDY,
    TRIAL,
    StudyLog,
    Trial,
    came_to,
    read_study,
    read_trial,
    state_of,
    tried,
)
from tldist.study.page import conclusions, table_of, write_study
from tldist.tracking import wording
from tldist.tracking.console import print_whole
from tldist.train.launch import absolute, check_device, only_one, preflight
from tldist.train.worker import plan_of
from tldist_launcher.start.arguments import MAY_CHANGE, as_number, take_flags
from tldist_launcher.start.ray import on_ray
from tldist_launcher.study.file import OWN, Axis, Job, Study, find_study, named_studies, read_file

HELP = f"""Named studies: {", ".join(named_studies())}. A file of yours: docs/studies.md.

  --workers N          trials at once (default: as many as there are GPUs, or cores)
  --gpus-per-trial F   the share of a GPU that a trial gets (default 1, where there are GPUs)
  --dir DIR            the study's directory (default studies/NAME); what is finished there is not run again
  --seeds 5 | 0,1,2    the replicates, over the file's
  --section.flag VALUE any flag of `tldist train`, for all trials; one that the study varies is then fixed"""

BUDGET_SPENT = "the budget of hours"
LOOK_S = 0.5
SEARCHED = "searched.json"


def study_command(words: Sequence[str]) -> int:
    """Run the study, write its tables and report, print what came out. Raises UserError, Stopped, TrainingFailed."""
    own, rest = take_flags(words, dict.fromkeys(OWN, ""))
    if not rest or rest[0].startswith("-"):
        raise UserError(f"name a study: tldist study FILE.yaml, or one of {', '.join(named_studies())}")
    at_once = as_number("--workers", own["--workers"] or "0", int)
    share = as_number("--gpus-per-trial", own["--gpus-per-trial"], float) if own["--gpus-per-trial"] else None
    if at_once < 0 or (share is not None and not 0 <= share <= 1):
        raise UserError("--workers is the number of trials at once, --gpus-per-trial a share from 0 to 1: one GPU each")
    path = find_study(rest.pop(0))
    folder = Path(own["--dir"] or f"studies/{path.stem}").expanduser().absolute()
    study = resolved(read_file(path, rest, folder, own["--seeds"]))
    check(study)
    open_folder(study)
    with only_one(folder):
        control.forget_stop(folder)
        try:
            with control.stopping_on_signals(folder), _alarm(study):
                _run(study, at_once, share)
        except UserError:
            raise
        except Exception as error:
            reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
            raise TrainingFailed(
                f"{type(error).__name__}: {reason} (more in {folder / 'logs'}); what is done is kept, and the same "
                "command goes on"
            ) from error
    return conclude(study)


def resolved(study: Study) -> Study:
    """With paths as every machine understands them."""

    def whole_paths(values: dict[str, Any]) -> dict[str, Any]:
        base = study.base
        if "data.root" in values:
            base = replace(base, data=replace(base.data, root=str(values["data.root"])))
        if "model.weights" in values:
            base = replace(base, model=replace(base.model, weights=str(values["model.weights"])))
        base = absolute(base)
        paths = {"data.root": base.data.root, "model.weights": base.model.weights}
        return {name: paths.get(name, value) for name, value in values.items()}

    axes = tuple(
        replace(axis, choices={label: whole_paths(values) for label, values in axis.choices.items()})
        for axis in study.axes
    )
    return replace(study, base=absolute(study.base), axes=axes)


def check(study: Study) -> None:
    """Find the mistakes of all trials before the first one starts. Raises UserError, naming the trial."""
    looked_at = set()
    for job in examples(study) if study.is_search else study.grid():
        settings = job.settings
        try:
            validate(settings)
            plan_of(settings)
            check_device(settings)
            if (settings.model, settings.data) not in looked_at:
                looked_at.add((settings.model, settings.data))
                preflight(settings)
        except UserError as error:
            raise UserError(f"{', '.join(job.labels.values())}: {error}") from error


def examples(study: Study) -> Iterator[Job]:
    """Of a search: the ends of every axis, with the first choice on the others."""

    def ends(axis: Axis) -> list[Any]:
        if axis.span is None:
            return list(axis.choices)
        low, high = axis.span.low, axis.span.high
        return [int(low), int(high)] if axis.span.whole else [low, high]

    first = {axis.name: ends(axis)[0] for axis in study.axes}
    for axis in study.axes:
        for end in ends(axis):
            yield study.job({**first, axis.name: end}, study.seeds[0], "search")


def open_folder(study: Study) -> None:
    """Make the study's directory, or see that what is there is this study, run with the same settings."""
    folder = study.folder
    told = folder / STUDY
    if folder.exists() and not told.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something else than a study: choose another --dir")
    if told.exists():
        _refuse_others(study, json.loads(told.read_text()))
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        (folder / "trials").mkdir(exist_ok=True)
        told.write_text(json.dumps(describe(study), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --dir") from error


def _refuse_others(study: Study, told: dict[str, Any]) -> None:
    """Results of other settings in one table would compare nothing. Raises UserError."""
    folder, axes = study.folder, told.get("axes", {})
    if list(axes) != [axis.name for axis in study.axes]:
        raise UserError(f"{folder} holds a study of {', '.join(axes)}: choose another --dir")
    if told.get("is_search") != study.is_search:
        raise UserError(f"{folder} holds a {'grid' if study.is_search else 'search'}: choose another --dir")
    for trial in read_study(folder).trials:
        if not all(axis.holds(trial.exact.get(axis.name)) for axis in study.axes):
            if not study.is_search:
                continue  # a value that the file no longer names: no trial of now could be this one
            raise UserError(
                f"{folder / 'trials' / trial.name} was begun with what the search no longer holds: choose another "
                "--dir, or widen it again"
            )
        seed = study.seeds[0] if trial.stage == "search" else trial.seed
        job = study.job(trial.exact, seed, trial.stage)
        if job.name != trial.name or not same_run(job):
            raise UserError(
                f"{folder / 'trials' / trial.name} was begun with other settings: choose another --dir, or take the "
                "flag back"
            )


def describe(study: Study) -> dict[str, Any]:
    """What study.json tells."""
    base = study.base
    return {
        "name": study.name,
        "title": study.title,
        "recipe": base.recipe,
        "metric": study.metric,
        "is_search": study.is_search,
        "axes": {axis.name: list(axis.choices) for axis in study.axes},
        "seeds": list(study.seeds),
        "budget": vars(study.budget),
    }


@contextlib.contextmanager
def _alarm(study: Study) -> Iterator[None]:
    """Ask the study to stop when its hours are over."""
    timer = threading.Timer(3600 * study.budget.hours, control.ask_to_stop, (study.folder, BUDGET_SPENT))
    timer.daemon = True
    if study.budget.hours:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _run(study: Study, at_once: int, share: float | None) -> None:
    """All that is not finished, until it is, or until the study is asked to stop."""
    if not (study.is_search and kept(study) is None) and not left(study):
        return
    from tldist_launcher.study import tune  # imports Ray, which reads its environment then

    with on_ray(study.folder / "logs" / "ray.log", dist.cores(), tune.ENVIRONMENT) as terminal:
        place = tune.place_for(at_once, share)
        console = Console(file=terminal, highlight=False, soft_wrap=True)
        console.print(_beginning(study, place))
        if study.is_search and kept(study) is None:
            past = _searched(study)
            total = study.budget.trials - len(tried(past))
            _watched(lambda: tune.run_search(study, past, place), study, console, total, "search")
            if not control.stop_reason(study.folder):
                close_search(study)
        if not control.stop_reason(study.folder) and (jobs := left(study)):
            stage = "kept" if study.is_search else "grid"
            _watched(lambda: tune.run_jobs(study, jobs, place), study, console, len(jobs), stage)


def same_run(job: Job) -> bool:
    """Was the trial in the job's directory begun with the settings that it would be run with now?"""
    path = Path(job.settings.run_dir) / "config.yaml"
    if not path.exists() or not path.stat().st_size:
        return True
    before, now = config.to_dict(config.load(path)), config.to_dict(absolute(job.settings))
    return all(before[key] == now[key] for key in now if f"--{key}" not in MAY_CHANGE)


def left(study: Study) -> list[Job]:
    """Trials that are known and not finished."""
    jobs = (kept(study) or []) if study.is_search else study.grid()
    return [job for job in jobs if state_of(Path(job.settings.run_dir)) != "finished"]


def outstanding(study: Study) -> int:
    """How many trials are still to run; of a search also those that are not known yet."""
    if study.is_search and kept(study) is None:
        budget = study.budget
        return max(0, budget.trials - len(tried(_searched(study)))) + budget.keep * (len(study.seeds) - 1)
    return len(left(study))


def _searched(study: Study) -> list[Trial]:
    return [trial for trial in read_study(study.folder).trials if trial.stage == "search"]


def close_search(study: Study) -> None:
    """Choose what is kept, once and for all; not while there is nothing to choose from."""
    found = [(trial, came_to(trial, study.metric)) for trial in _searched(study) if trial.state == "finished"]
    whole = [(trial, value) for trial, value in found if value is not None]
    if not whole:
        return
    sign = -1 if METRICS[study.metric].lower_is_better else 1
    best = [trial for trial, _ in sorted(whole, key=lambda pair: (-sign * pair[1], pair[0].name))][: study.budget.keep]
    told = {"trials": study.budget.trials, "kept": [trial.exact for trial in best]}
    (study.folder / SEARCHED).write_text(json.dumps(told, indent=1) + "\n")


def kept(study: Study) -> list[Job] | None:
    """The best configurations of a search with the seeds it did not use: they are judged on runs that did not choose
    them. None while the search goes on."""
    path = study.folder / SEARCHED
    told: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"trials": 0}
    if told["trials"] < study.budget.trials:
        return None
    return [study.job(choices, seed, "kept") for seed in study.seeds[1:] for choices in told["kept"]]


def _beginning(study: Study, place: Any) -> str:
    done = sum(state_of(path) == "finished" for path in (study.folder / "trials").glob("*"))
    had = f"{place.gpus:g} GPU and " if place.gpus else ""
    each = f"{had}{place.cores:g} core{'' if place.cores == 1 else 's'} each"
    return f"{study.title}: {place.at_once} at once, {each}" + (f"; {done} trials were done before" if done else "")


def _watched(run: Callable[[], Any], study: Study, console: Console, total: int, stage: str) -> None:
    """Call `run`, which runs `total` trials, in a thread while this one tells which ended, and receives signals.

    Tune puts handlers of its own in the place of ours, but only in the main thread.
    """
    raised: list[BaseException] = []

    def target() -> None:
        try:
            run()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=target, daemon=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(stage, total=total)
        seen: dict[str, int] = {}
        news(study, seen)
        thread.start()
        is_over = False
        while not is_over:
            is_over = not thread.is_alive()
            for trial in news(study, seen):
                progress.console.print(_line(trial, study))
                progress.advance(task)
            thread.join(timeout=LOOK_S)
    if raised:
        raise raised[0]


_FOR_GOOD = 0


def news(study: Study, seen: dict[str, int]) -> list[Trial]:
    """Trials that have come to an end since the last call, which is remembered in `seen`: by name when each failed, or
    0. One that failed may be run again, and come to another end."""
    found = []
    for path in sorted(path.parent for path in (study.folder / "trials").glob(f"*/{TRIAL}")):
        if seen.get(path.name) == _FOR_GOOD or (ended := _ended(path)) in (None, seen.get(path.name)):
            continue
        seen[path.name] = ended
        found.append(read_trial(path))
    return found


def _ended(run_dir: Path) -> int | None:
    """When it failed, in nanoseconds; 0 where it ended otherwise; None where it did not."""
    state = state_of(run_dir)
    if state != "failed":
        return None if state == "interrupted" else _FOR_GOOD
    with contextlib.suppress(FileNotFoundError):  # it begins again at this moment
        return (run_dir / FAILED).stat().st_mtime_ns


def _line(trial: Trial, study: Study) -> str:
    metric = METRICS[study.metric]
    if trial.state == "failed":
        return f"{trial.name}: failed: {trial.why}"
    value = f"{metric.heading} {metric.written(trial.values.get(study.metric))}"
    early = f", given up after epoch {len(trial.curve)}" if trial.state == "pruned" else ""
    return f"{trial.name}: {value}, {wording.duration(trial.values.get('seconds'))}{early}"


def conclude(study: Study) -> int:
    """Tables, report, and how it ended."""
    log, still = read_study(study.folder), outstanding(study)
    stopped = control.stop_reason(study.folder)
    if log.judged:
        report = write_study(study.folder)
        _print(log)
        print(f"report: {report}")
    print(f"study: {study.folder}")
    if stopped and still:
        told = f"stopped by {stopped}, all saved, {still} trials are left: the same command goes on"
        if stopped != BUDGET_SPENT:
            raise Stopped(told)
        print(told)
        return 0  # 75 would make Slurm start it again, for as many hours
    if still:
        raise TrainingFailed(f"{_what_failed(study, log.trials)}; the same command tries again")
    return 0


def _what_failed(study: Study, trials: Sequence[Trial]) -> str:
    """Why something is left though nobody stopped the study. A search's failures are results once something is kept."""
    names = [job.name for job in left(study)]
    is_open = study.is_search and kept(study) is None
    failed = [trial for trial in trials if trial.state == "failed" and (is_open or trial.name in names)]
    if failed:
        return f"{len(failed)} trials failed, the first {failed[0].name}: {failed[0].why}"
    return f"{names[0]} did not end" if names else f"no trial of the search came to a {study.metric}"


def _print(log: StudyLog) -> None:
    table = Table(title=str(log.told.get("title", "")))
    heading, *rows = table_of(log)
    for i, column in enumerate(heading):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    print_whole(table)
    for sentence in conclusions(log):
        print(sentence)
