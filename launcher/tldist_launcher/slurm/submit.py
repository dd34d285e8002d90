"""`tldist submit`: a run's or a study's directory, made beforehand, and a job from a script that a person can read."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tldist import config
from tldist.config import RunConfig, UserError
from tldist.data.source.index import root_folder
from tldist.rules import validate, validate_device
from tldist.study.log import STUDY
from tldist.tracking.environment import environment
from tldist.train import worker
from tldist.train.launch import absolute, make_run_dir, named_run_dir
from tldist_launcher.slurm import study_job
from tldist_launcher.start.arguments import as_number, parse_run, take_flags
from tldist_launcher.study.file import Study, write_file

FLAGS = {
    "--nodes": ("1", "nodes"),
    "--gpus-per-node": ("0", "GPUs of each, and as many workers; 0: one worker that has the node's cores"),
    "--cpus-per-node": ("", "cores of each (default: 8 for each GPU; without GPUs whole nodes, --exclusive)"),
    "--mem": ("", "memory of each, 64G for instance; 0: all of it (default: what the cluster gives)"),
    "--time": ("", "limit, as Slurm reads it: 4:00:00 or 2-12 (default: the partition's)"),
    "--partition": ("", "sbatch's own, and so are the next three"),
    "--account": ("", ""),
    "--qos": ("", ""),
    "--constraint": ("", ""),
    "--sbatch": ("", "more options for it, in one word: --sbatch='--exclusive --reservation=mine'"),
    "--job-name": ("", "default: RECIPE-STRATEGY"),
    "--container": ("", "an image for srun --container-image (pyxis and enroot)"),
    "--container-mounts": ("", "more folders for it, FROM:TO,...; data, weights and the run directory are there"),
    "--array": ("", "0-4, say: five runs, each with its number as its --seed"),
    "--study": (
        "",
        "in place of RECIPE, a study's file or name: one job for all of it; also the flags of tldist study",
    ),
    "--requeues": ("20", "back into the queue at most so often, after a time limit or a preemption"),
    "--save-before": ("300", "seconds between the signal to save and the time limit"),
}
"""Flag -> default, what it means."""

CORES_PER_GPU = 8
"""Where nothing else is asked for, as in slurm/: sbatch itself would give a node's workers one core in all."""

SWITCHES = {
    "--dry-run": "print the script, and do nothing",
    "--follow": "show the run's output until it ends",
}

HELP = "\n".join(
    [
        "Flags of the job; all others are those of tldist train:",
        *(f"  {flag:<20}{text}" for flag, (_, text) in FLAGS.items()),
        *(f"  {flag:<20}{text}" for flag, text in SWITCHES.items()),
    ]
)


@dataclass(frozen=True)
class Job:
    """What to submit: the allocation's flags, and the run or the study."""

    flags: Mapping[str, str]
    settings: RunConfig
    """Of a study, what its trials start from."""
    command: Sequence[str]
    study: Study | None = None
    study_words: Sequence[str] = ()
    """How `tldist study` is to share out the cluster."""

    @property
    def name(self) -> str:
        """In the queue, where no other is given."""
        return f"study-{self.study.name}" if self.study else f"{self.settings.recipe}-{self.settings.strategy.name}"

    @property
    def run_dir(self) -> Path:
        """Where the run would go if it began now, or the study's directory."""
        return self.study.folder if self.study else named_run_dir(self.settings)

    @property
    def trained(self) -> list[RunConfig]:
        """The run, or a study's trials."""
        return [trial.settings for trial in study_job.trials_of(self.study)] if self.study else [self.settings]

    @property
    def nodes(self) -> int:
        """Of the allocation."""
        return int(self.flags["--nodes"])

    @property
    def places(self) -> int:
        """Workers on each node, at most."""
        return -(-self.settings.launch.most // self.nodes)

    @property
    def seeds(self) -> list[int]:
        """Of the array's runs; empty where it is none."""
        return array_numbers(self.flags["--array"])


def submit(words: Sequence[str]) -> int:
    """`tldist submit RECIPE [flags]`; returns the exit code."""
    job, switches = parse_submit(words)
    if "--dry-run" in switches:
        print(script(job, job.run_dir), end="")
        return 0
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here: submit from the cluster's login node, or look with --dry-run")
    is_new = not (job.study and job.study.folder.exists())
    run_dir = study_job.make_folder(job.study) if job.study else make_run_dir(job.settings)
    facts = {"time": time.time(), "command": ["tldist", "submit", *job.command], **environment()}
    try:
        _fill(job, run_dir, facts)
        number = _sbatch(run_dir)
    except BaseException as error:
        if is_new:
            _clear(run_dir)
        if isinstance(error, OSError):
            raise UserError(f"cannot write to {run_dir}: {_why(error)}; make room, or choose another folder") from error
        raise
    for seed, folder in _folders(job, run_dir).items():
        _note_submission(folder, number if seed is None else f"{number}_{seed}", facts)
    print(_submitted(job, number, run_dir), flush=True)
    if "--follow" not in switches:
        return 0
    from tldist_launcher.slurm.runs import follow_run

    return follow_run(run_dir)


def _why(error: OSError) -> str:
    """A tree that was copied in part tells each file's reason."""
    return error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror or str(error)


def parse_submit(words: Sequence[str]) -> tuple[Job, set[str]]:
    """The job and the switches. Raises UserError for whatever can be known before the job runs."""
    switches = {word for word in words if word in SWITCHES}
    flags, rest = take_flags([word for word in words if word not in SWITCHES], {f: d for f, (d, _) in FLAGS.items()})
    if any(word.split("=")[0] == "--resume" for word in rest):
        raise UserError("a submitted run goes on with `sbatch RUN_DIR/job.sbatch`; submit starts a new one")
    _check_flags(flags)
    if flags["--array"] and "--follow" in switches:
        raise UserError("--follow shows one run, and --array starts several: leave one out")
    job = _study_job(flags, rest, words) if flags["--study"] else _run_job(flags, rest, words)
    return job, switches


def _run_job(flags: Mapping[str, str], rest: Sequence[str], words: Sequence[str]) -> Job:
    settings = absolute(parse_run(rest, "submit", [*FLAGS, *SWITCHES]))
    if not any(word.split("=")[0].replace("_", "-") == "--launch.workers" for word in rest):
        workers = int(flags["--nodes"]) * max(1, int(flags["--gpus-per-node"]))
        settings = dataclasses.replace(settings, launch=dataclasses.replace(settings.launch, workers=workers))
    job = Job(flags, settings, words)
    gpus = int(flags["--gpus-per-node"])
    if gpus and job.places > gpus:
        raise UserError(
            f"--launch.workers {settings.launch.workers} on {job.nodes} nodes of {gpus} GPUs: use at most "
            f"{job.nodes * gpus}"
        )
    _check_run(settings, flags)
    return job


def _study_job(flags: Mapping[str, str], rest: Sequence[str], words: Sequence[str]) -> Job:
    if flags["--array"]:
        raise UserError("a study is one job, which runs all its seeds: leave out --array, or --study")
    study, sharing = study_job.read(flags["--study"], rest, lambda settings: _check_run(settings, flags))
    return Job(flags, study.base, words, study, sharing)


def _submitted(job: Job, number: str, run_dir: Path) -> str:
    """Where it is, and the commands that watch and cancel it."""
    path = shlex.quote(str(run_dir))
    watch = f"tldist runs {path}" if job.seeds else f"tldist logs {path} --follow"
    return f"job: {number}\nrun: {run_dir}\nwatch: {watch}\ncancel: scancel {number}"


def _check_flags(flags: Mapping[str, str]) -> None:
    for flag, value in flags.items():
        if any(ord(character) < 32 for character in value):
            raise UserError(f"{flag} holds a control character: write it in one line")
    least = {"--nodes": 1, "--gpus-per-node": 0, "--requeues": 0, "--save-before": 0, "--cpus-per-node": 1}
    for flag, smallest in least.items():
        if flags[flag] and as_number(flag, flags[flag], int) < smallest:
            raise UserError(f"{flag} is {flags[flag]}: give {smallest} or more")
    limit, notice = seconds_of(flags["--time"]), int(flags["--save-before"])
    if limit is not None and limit < notice + 60:
        raise UserError(
            f"--time {flags['--time']} leaves no minute before the signal to save, {notice} s before its end: "
            "give more time, or less --save-before"
        )
    array_numbers(flags["--array"])


def _check_run(settings: RunConfig, flags: Mapping[str, str]) -> None:
    validate(settings)
    validate_device(settings, "cuda" if int(flags["--gpus-per-node"]) else "cpu")
    root_folder(settings.data.root)
    worker.plan_of(settings)


def seconds_of(limit: str) -> int | None:
    """A time limit as Slurm reads it (MINUTES, M:S, H:M:S, D-H, D-H:M, D-H:M:S); None where there is none."""
    if limit in ("", "0", "UNLIMITED", "INFINITE"):
        return None
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if found is None:
        raise UserError(f"--time '{limit}' is no time limit: write 4:00:00, or 2-12 for two and a half days")
    days, *rest = (None if part is None else int(part) for part in found.groups())
    numbers = [part for part in rest if part is not None]
    units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1)
    return (days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def array_numbers(array: str) -> list[int]:
    """`0-4`, `1,3,7`, `0-9:3`, each with `%2` for two at a time -> the numbers."""
    if not array:
        return []
    parts = array.partition("%")[0].split(",")
    found = [re.fullmatch(r"(\d+)(?:-(\d+)(?::([1-9]\d*))?)?", part) for part in parts]
    if not all(found) or not re.fullmatch(r"[^%]*(%[1-9]\d*)?", array):
        raise UserError(f"--array '{array}' is no list of numbers: write 0-4, or 0-9%2 for two at a time")
    ranges = [(int(m[1]), int(m[2] or m[1]), int(m[3] or 1)) for m in found if m]
    return sorted({number for low, high, step in ranges for number in range(low, high + 1, step)})


TEMPLATES = files("tldist_launcher") / "templates"
"""The scripts of the repository's slurm/: a link there, files in an installed package."""


def script(job: Job, run_dir: Path) -> str:
    """The batch script: slurm/train.sbatch with this job's values."""
    flags, code, gpus = job.flags, run_dir / "code", int(job.flags["--gpus-per-node"])
    whole_nodes = ["--exclusive"] if not gpus and not flags["--cpus-per-node"] else []
    logs = str(run_dir).replace("%", "%%") + ("/seed-%a/logs/slurm-%A_%a.log" if job.seeds else "/logs/slurm-%j.log")
    directives = {
        "job-name": flags["--job-name"] or job.name,
        "nodes": str(job.nodes),
        "gpus-per-node": str(gpus) if gpus else "",
        "cpus-per-task": flags["--cpus-per-node"] or (str(CORES_PER_GPU * gpus) if gpus else ""),
        "signal": f"B:USR1@{flags['--save-before']}",
        "output": logs,
        # Ray puts the folder that a driver runs in before all others on its workers' import path.
        "chdir": str(code),
        **{name: flags[f"--{name}"] for name in ("time", "mem", "partition", "account", "qos", "constraint", "array")},
    }
    settings = {
        "run_dir": shlex.quote(str(run_dir)) + ('/seed-"$SLURM_ARRAY_TASK_ID"' if job.seeds else ""),
        "scripts": shlex.quote(str(code / "tldist_launcher" / "templates")),
        "bin": "" if flags["--container"] else shlex.quote(str(Path(sys.executable).parent)),
        "code": shlex.quote(str(code)),
        # Trials share a node's cores; so many are Ray's to give.
        "places": "${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" if job.study else str(job.places),
        "requeues": flags["--requeues"],
        "container": f"({shlex.join(_container(job, run_dir))})",
        "study": f"({shlex.join([str(code / job.study.file_name), *job.study_words]) if job.study else ''})",
    }
    more = whole_nodes + shlex.split(flags["--sbatch"])
    text = render((TEMPLATES / "train.sbatch").read_text(), directives, settings, more)
    first, _, rest = text.partition("\n")
    return f"{first}\n# {shlex.join(['tldist', 'submit', *job.command])}\n{rest}"


def render(text: str, directives: Mapping[str, str], settings: Mapping[str, str], more: Sequence[str] = ()) -> str:
    """A template with other #SBATCH options (an empty one: none) and other values of its variables."""
    lines, left, unset = [], dict(directives), dict(settings)
    for line in text.splitlines():
        option = re.match(r"#SBATCH --([a-z-]+)", line)
        variable = re.match(r"([a-z_]+)=\S+( +# .*)?$", line)
        if option and option[1] in directives:
            if value := left.pop(option[1]):
                lines.append(_directive(option[1], value))
        elif variable and variable[1] in unset:
            lines.append(f"{variable[1]}={unset.pop(variable[1])}{variable[2] or ''}")
        else:
            lines.append(line)
    if unset:
        raise ValueError(f"the template sets no {', '.join(unset)}")
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    added = [_directive(name, value) for name, value in left.items() if value] + [
        f"#SBATCH {shlex.quote(word)}" for word in more
    ]
    return "\n".join([*lines[: last + 1], *added, *lines[last + 1 :], ""])


def _directive(name: str, value: str) -> str:
    return f"#SBATCH --{name}={shlex.quote(value)}"


def _container(job: Job, run_dir: Path) -> list[str]:
    image = job.flags["--container"]
    if not image:
        return []
    folders: list[Path | str] = [run_dir]
    for settings in job.trained:
        weights = Path(settings.model.weights)
        folders += [settings.data.root, settings.cache.dir, weights.parent if weights.is_file() else ""]
        folders += settings.optim.ewc_from
    folders.append(os.environ.get("RAY_TMPDIR", "/tmp"))
    mounts = [f"{folder}:{folder}" for folder in dict.fromkeys(map(str, folders)) if folder]
    mounts += [job.flags["--container-mounts"]] if job.flags["--container-mounts"] else []
    return [
        f"--container-image={image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={run_dir}/code",
    ]


def _folders(job: Job, run_dir: Path) -> dict[int | None, Path]:
    """Seed -> run directory; None where the job is one run."""
    return {seed: run_dir / f"seed-{seed}" for seed in job.seeds} if job.seeds else {None: run_dir}


def _fill(job: Job, run_dir: Path, facts: Mapping[str, Any]) -> None:
    """Configuration, source and script: what is changed afterwards does not reach a job that waits in the queue."""
    for name in ("tldist", "tldist_kernels", "tldist_launcher", "tldist_benchmarks"):
        if (spec := find_spec(name)) is not None and spec.submodule_search_locations:
            source = Path(next(iter(spec.submodule_search_locations)))
            shutil.copytree(source, run_dir / "code" / name, ignore=shutil.ignore_patterns("__pycache__"))
    (run_dir / "code" / "COMMIT").write_text(facts["commit"] or "")
    (run_dir / "job.sbatch").write_text(script(job, run_dir))
    if job.study:
        write_file(job.study, run_dir / "code" / job.study.file_name)
    else:
        _configure(job, run_dir, facts)


def _configure(job: Job, run_dir: Path, facts: Mapping[str, Any]) -> None:
    for seed, folder in _folders(job, run_dir).items():
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        settings = dataclasses.replace(job.settings, run_dir=str(folder))
        config.save(settings if seed is None else _of_array(settings, seed, run_dir.name), folder / "config.yaml")
        _note_submission(folder, None, facts)
    if job.seeds:
        (run_dir / "config.yaml").unlink()  # the runs are below it


def _of_array(settings: RunConfig, seed: int, name: str) -> RunConfig:
    """One run of several, which are a group in W&B."""
    group = settings.tracking.group or os.environ.get("WANDB_RUN_GROUP") or name
    tracking = dataclasses.replace(settings.tracking, group=group)
    return dataclasses.replace(settings, seed=seed, tracking=tracking)


def _clear(run_dir: Path) -> None:
    """Nothing was submitted: remove what `_fill` wrote, and the folder where nothing else is in it."""
    for name in ("code", "logs", "trials"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    for name in ("config.yaml", "submit.json", "job.sbatch", STUDY):
        (run_dir / name).unlink(missing_ok=True)
    for folder in run_dir.glob("seed-*"):
        shutil.rmtree(folder, ignore_errors=True)
    if not any(run_dir.iterdir()):
        run_dir.rmdir()


def _sbatch(run_dir: Path) -> str:
    """The job's number. Raises UserError with Slurm's own words."""
    done = subprocess.run(["sbatch", "--parsable", str(run_dir / "job.sbatch")], capture_output=True, text=True)
    if done.returncode != 0:
        said = " ".join(done.stderr.replace("sbatch: error: ", "").split())
        raise UserError(f"Slurm refused the job: {said}")
    return done.stdout.strip().split(";")[0]


def _note_submission(folder: Path, job: str | None, facts: Mapping[str, Any]) -> None:
    """submit.json: which job the run is, since when, and of what code."""
    draft = folder / ".submit.json"  # the job may be reading it already
    draft.write_text(json.dumps({"job": job, **facts}, indent=1))
    draft.replace(folder / "submit.json")
