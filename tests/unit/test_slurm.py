"""The batch scripts, and what `tldist submit` makes of them: bash that parses, short enough to read."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tldist import config
from tldist.config import UserError
from tldist_launcher.cli import main
from tldist_launcher.slurm.submit import array_numbers, parse_submit, render, script, seconds_of
from tldist_launcher.start.arguments import flag_types
from tldist_launcher.study.command import open_folder, resolved
from tldist_launcher.study.file import read_file

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").iterdir())
RUN = ["folder", "--model.weights", "none", "--data.batch-size", "32"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""
    text = path.read_text()
    assert len(text.splitlines()) < 60
    assert set(re.findall(r"--(?:launch|data|train|strategy|run)[.a-z-]+", text)) <= set(flag_types())


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck: apt-get install shellcheck")
def test_shellcheck_has_nothing_to_say() -> None:
    words = ["shellcheck", "--external-sources", *(f"slurm/{path.name}" for path in SCRIPTS)]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout == ""


def test_these_are_there() -> None:
    names = ["bench.sbatch", "cluster.sh", "node.sh", "study.sbatch", "train.sbatch"]
    assert [path.name for path in SCRIPTS] == names
    assert [path.name for path in sorted((ROOT / "launcher/tldist_launcher/templates").iterdir())] == names


def dry_run(photos: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["submit", *RUN, "--data.root", str(photos), "--run-dir", "/shared/runs/a", "--dry-run", *words]) == 0
    return capsys.readouterr().out


def sbatch_options(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


def variables(text: str) -> dict[str, str]:
    """As bash reads the settings, which stand before the first line that does something."""
    settings = text.split("set -uo pipefail\n")[1].split("\nlogs=")[0]
    names = ("run_dir", "scripts", "bin", "code", "places", "requeues", "container", "study")
    ask = "\n".join(f'printf "%s\\n" {name}="${{{name}[*]}}"' for name in names)
    told = subprocess.run(["bash", "-c", f"{settings}\n{ask}"], capture_output=True, text=True, check=True).stdout
    return dict(line.split("=", 1) for line in told.splitlines())


def test_four_nodes_of_eight_gpus(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--nodes 4 --gpus-per-node 8 --cpus-per-node 96 --time 4:00:00 --partition gpu --account us --qos high"
    more = ["--constraint", "h100&ib", "--sbatch=--exclusive --comment='my job'"]
    text = dry_run(photos, capsys, *words.split(), *more)
    assert sbatch_options(text) == [
        "--job-name=folder-partial",
        "--nodes=4",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--cpus-per-task=96",
        "--time=4:00:00",
        "--signal=B:USR1@300",
        "--requeue",
        "--open-mode=append",
        "--output=/shared/runs/a/logs/slurm-%j.log",
        "--chdir=/shared/runs/a/code",
        "--partition=gpu",
        "--account=us",
        "--qos=high",
        "--constraint='h100&ib'",
        "--exclusive",
        "'--comment=my job'",
    ]
    told = variables(text)
    assert (told["run_dir"], told["places"], told["requeues"], told["container"]) == ("/shared/runs/a", "8", "20", "")
    assert told["code"] == "/shared/runs/a/code"
    assert told["scripts"] == "/shared/runs/a/code/tldist_launcher/templates"
    assert (Path(told["bin"]) / "python").exists()
    assert text.splitlines()[1].startswith("# tldist submit folder --model.weights none")
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_no_node_is_left_with_one_core(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which is what sbatch gives where nothing is said."""
    assert "--cpus-per-task=32" in sbatch_options(dry_run(photos, capsys, "--gpus-per-node", "4"))
    assert "--exclusive" in sbatch_options(dry_run(photos, capsys))
    asked = sbatch_options(dry_run(photos, capsys, "--cpus-per-node", "6"))
    assert "--cpus-per-task=6" in asked
    assert "--exclusive" not in asked


def test_in_a_container(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own Python, the source that was submitted, and every folder that the run needs under its own name."""
    image = ["--container", "nvcr.io#nvidia/pytorch:25.10-py3", "--container-mounts", "/scratch:/scratch"]
    told = variables(dry_run(photos, capsys, *image))
    assert told["bin"] == ""
    assert told["container"].split() == [
        "--container-image=nvcr.io#nvidia/pytorch:25.10-py3",
        f"--container-mounts=/shared/runs/a:/shared/runs/a,{photos}:{photos},/tmp:/tmp,/scratch:/scratch",
        "--container-workdir=/shared/runs/a/code",
    ]


def test_a_container_sees_the_earlier_tasks_of_ewc(photos: Path) -> None:
    job, _ = parse_submit([*RUN, "--data.root", str(photos), "--container", "image"])
    optim = replace(job.settings.optim, ewc=1.0, ewc_from=("/runs/first", "/runs/second"))
    text = script(replace(job, settings=replace(job.settings, optim=optim)), Path("/shared/a"))
    assert ",/runs/first:/runs/first,/runs/second:/runs/second" in variables(text)["container"]


def test_an_array_is_a_run_for_each_seed(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = dry_run(photos, capsys, "--array", "0-8:4%2")
    assert "--array=0-8:4%2" in sbatch_options(text)
    assert "--output=/shared/runs/a/seed-%a/logs/slurm-%A_%a.log" in sbatch_options(text)
    assert 'run_dir=/shared/runs/a/seed-"$SLURM_ARRAY_TASK_ID"' in text


def test_awkward_names_stay_whole(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "it's 50% $HOME"
    text = dry_run(photos, capsys, "--run-dir", str(run_dir), "--job-name", "a b")
    assert variables(text)["run_dir"] == str(run_dir)
    assert "--job-name='a b'" in sbatch_options(text)
    assert any("50%% " in option for option in sbatch_options(text))
    assert not run_dir.exists()


def test_workers_follow_from_the_allocation(photos: Path) -> None:
    def workers(*words: str) -> tuple[int | str, int]:
        job, _ = parse_submit([*RUN, "--data.root", str(photos), *words])
        return job.settings.launch.workers, job.places

    assert workers("--nodes", "2") == (2, 1)
    assert workers("--nodes", "4", "--gpus-per-node", "8") == (32, 8)
    assert workers("--nodes", "2", "--launch.workers", "8") == (8, 4)
    assert workers("--nodes", "4", "--gpus-per-node", "8", "--launch.workers", "16:32") == ("16:32", 8)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nodes", "none"], "--nodes 'none' is not a whole number"),
        (["--nodes", "0"], "--nodes is 0: give 1 or more"),
        (["--node", "2"], "no flag --node (did you mean '--nodes'?)"),
        (["--gpus-per-node", "-1"], "give 0 or more"),
        (["--nodes", "3"], "cannot be shared evenly by 3 workers"),
        (["--time", "soon"], "--time 'soon' is no time limit"),
        (["--time", "5"], "--time 5 leaves no minute before the signal to save"),
        (["--array", "0-"], "--array '0-' is no list of numbers"),
        (["--array", "0-3", "--follow"], "leave one out"),
        (["--gpus-per-node", "2", "--launch.workers", "4"], "on 1 nodes of 2 GPUs: use at most 2"),
        (["--gpus-per-node", "0", "--train.precision", "fp16"], "fp16 needs a GPU"),
        (["--data.root", "/no/such/folder"], "does not exist"),
        (["--strategy.name", "gradul"], "did you mean 'gradual'?"),
        (["--resume", "runs/a"], "goes on with `sbatch RUN_DIR/job.sbatch`"),
        (["--job-name", "a\nb"], "holds a control character"),
        (["--time"], "--time needs a value"),
    ],
)
def test_mistakes_are_found_before_anything_is_submitted(photos: Path, words: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_submit([*RUN, "--data.root", str(photos), *words])
    assert says in str(caught.value)


def test_without_slurm_it_says_so(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", *RUN, "--data.root", str(photos), "--run-dir", str(tmp_path / "run")]) == 2
    assert "there is no sbatch here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for runs, where sbatch takes every job as number 7."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 7\n")
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    return tmp_path / "my runs"


def test_what_is_printed_can_be_typed(photos: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(name: str, *words: str) -> list[list[str]]:
        run_dir = ["--run-dir", str(sbatch / name)]
        assert main(["submit", *RUN, "--data.root", str(photos), *run_dir, *words]) == 0
        return [shlex.split(line)[1:] for line in capsys.readouterr().out.splitlines()][2:]

    assert said("a") == [["tldist", "logs", str(sbatch / "a"), "--follow"], ["scancel", "7"]]
    assert said("b", "--array", "0-1") == [["tldist", "runs", str(sbatch / "b")], ["scancel", "7"]]


def test_a_full_disk_is_told_and_leaves_nothing(
    photos: Path, sbatch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    assert main(["submit", *RUN, "--data.root", str(photos), "--run-dir", str(sbatch / "run")]) == 2
    assert f"cannot write to {sbatch / 'run'}: [Errno 28] No space left on device; make room" in capsys.readouterr().err
    assert not (sbatch / "run").exists()


STUDY = """
recipe: folder
flags: {model.weights: none, data.batch_size: 32}
grid:
  strategy.name: [full, partial]
  images:
    ours: {data.root: ours}
    others: {data.root: others}
seeds: 5
"""


@pytest.fixture
def study(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study's file, whose paths are relative to the folder that one is in."""
    (tmp_path / "here").mkdir()
    for name in ("ours", "others"):
        (tmp_path / "here" / name).symlink_to(photos)
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "which.yaml").write_text(STUDY)
    return tmp_path / "which.yaml"


def test_a_study_is_one_job(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the cores of whole nodes to share out, and all that its trials read."""
    words = (
        "--nodes 2 --gpus-per-node 4 --workers 4 --gpus-per-trial 0.5 --cache.dir cached --container image --dry-run"
    )
    assert main(["submit", "--study", str(study), *words.split()]) == 0
    text, here = capsys.readouterr().out, Path.cwd()
    told = variables(text)
    assert told["run_dir"] == f"{here}/studies/which"
    assert told["study"] == f"{here}/studies/which/code/which.yaml --workers 4 --gpus-per-trial 0.5"
    mounts = told["container"].split()[1].partition("=")[2].split(",")
    assert {f"{here}/{name}:{here}/{name}" for name in ("ours", "others", "cached")} < set(mounts)
    assert "places=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE} " in text
    assert {"--job-name=study-which", "--nodes=2", "--cpus-per-task=32"} <= set(sbatch_options(text))
    assert not (here / "studies").exists()


def test_a_study_is_submitted_as_it_was_read(study: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once more, too, but not while a job is at it; what Slurm refuses leaves what was there."""
    words = ["submit", "--study", str(study), "--dir", str(sbatch), "--data.image-size", "64"]
    assert main([*words, "--array", "0-1"]) == 2
    (sbatch.parent / "bin" / "squeue").write_text("#!/bin/sh\n")
    (sbatch.parent / "bin" / "squeue").chmod(0o755)
    assert main(words) == 0
    assert (sbatch / "code" / "tldist" / "train" / "fit.py").exists()
    again = read_file(sbatch / "code" / "which.yaml", [], sbatch)
    assert again == resolved(read_file(study, ["--data.image-size", "64"], sbatch))
    open_folder(again)  # the job finds the study that was submitted
    assert again.axes[1].choices["others"] == {"data.root": str(Path.cwd() / "others")}
    (sbatch / "trials" / "mine").touch()
    assert main(words) == 0
    (sbatch.parent / "bin" / "squeue").write_text("#!/bin/sh\necho '7|7|PENDING|Priority'\n")
    assert main(words) == 2
    assert "job 7 is at" in capsys.readouterr().err
    (sbatch.parent / "bin" / "squeue").write_text("#!/bin/sh\n")
    (sbatch.parent / "bin" / "sbatch").write_text("#!/bin/sh\nexit 1\n")
    assert main(words) == 2
    assert (sbatch / "trials" / "mine").exists()
    assert main([*words[:4], str(sbatch.parent / "new"), *words[5:]]) == 2
    assert not (sbatch.parent / "new").exists()


def test_the_runs_of_an_array_are_a_group(photos: Path, sbatch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def groups(name: str, *words: str) -> set[str]:
        words = ("--array", "0-1", "--run-dir", str(sbatch / name), *words)
        assert main(["submit", *RUN, "--data.root", str(photos), *words]) == 0
        return {config.load(path).tracking.group for path in (sbatch / name).glob("seed-*/config.yaml")}

    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    assert groups("a") == {"a"}
    assert groups("b", "--tracking.group", "mine") == {"mine"}
    monkeypatch.setenv("WANDB_RUN_GROUP", "ours")
    assert groups("c") == {"ours"}


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("", None), ("UNLIMITED", None), ("90", 5400), ("1:30", 90), ("4:00:00", 14400), ("2-12", 216000),
        ("1-2:30", 95400), ("1-0:0:1", 86401),
    ],
)  # fmt: skip
def test_time_limits_as_slurm_reads_them(limit: str, seconds: int | None) -> None:
    assert seconds_of(limit) == seconds


def test_arrays_as_slurm_reads_them() -> None:
    assert array_numbers("0-3") == [0, 1, 2, 3]
    assert array_numbers("1,3,7-8%2") == [1, 3, 7, 8]
    assert array_numbers("0-9:4") == [0, 4, 8]


def test_a_template_that_lacks_a_setting_is_an_error() -> None:
    with pytest.raises(ValueError, match="sets no places"):
        render("#!/bin/bash\n#SBATCH --nodes=1\n", {}, {"places": "1"})


def test_the_script_sets_everything_that_is_submitted(photos: Path) -> None:
    job, _ = parse_submit([*RUN, "--data.root", str(photos)])
    assert "$SLURM_SUBMIT_DIR" not in script(job, Path("/shared/a")).split("\nlogs=")[0].split("set -uo")[1]
