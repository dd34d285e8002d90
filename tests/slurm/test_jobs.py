"""Jobs on a real Slurm cluster of two nodes: each run spans both, one worker on each.

The long ones, about time limits, lost nodes and scancel, run with TLDIST_LONG=1 (`make slurm`).
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import NODES, Cluster, cluster, missing
from conftest import long
from submitted import LIMIT_S, ROOT, Submitted

from tldist.checkpoints import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * LIMIT_S), pytest.mark.skipif(bool(missing()), reason=missing())]


def patience(seconds: float) -> float:
    """What takes so long where every process finds a core; more where others keep this machine's cores busy."""
    return seconds * max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


CLIENT = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False)
print("nodes:", len([node for node in ray.nodes() if node["Alive"]]))
"""


@pytest.fixture(scope="module")
def slurm(photos: Path) -> Iterator[Cluster]:
    with cluster() as running:
        shutil.copytree(photos, running.shared / "photos")
        yield running


@dataclass(frozen=True)
class Watched:
    """A run that nothing happened to: its output was followed, and its cluster knocked at, while it trained."""

    run: Submitted
    strangers: list[str]
    followed: str
    seconds_to_stop: float


@pytest.fixture(scope="module")
def watched(slurm: Cluster) -> Watched:
    run = Submitted(slurm, "undisturbed").submit()
    follower = run.follow()
    with run.held(1):
        strangers = [_knock(run, token) for token in ("", "f" * 64, _token_of(run))]
    run.until(lambda: f"run: {run.run_dir}" in run.log(), "its last line")
    seconds_to_stop = run.until_clean(60)
    assert run.until_over() == "COMPLETED", run.log()
    followed, _ = follower.communicate(timeout=60)
    assert follower.returncode == 0
    return Watched(run, strangers, followed, seconds_to_stop)


@pytest.fixture(scope="module")
def undisturbed(watched: Watched) -> Submitted:
    return watched.run


def _token_of(run: Submitted) -> str:
    """As the job's own user finds it on the head's node; and nobody else can."""
    path = run.cluster.run("bash", "-c", "ls -d /tmp/ray-*/token", node="n1").strip()
    modes = run.cluster.run("stat", "-c", "%a", path, str(Path(path).parent), node="n2").split()
    assert modes == ["600", "700"]
    return run.cluster.run("cat", path, node="n1")


def _knock(run: Submitted, token: str) -> str:
    """What a client on the other node hears that offers this token."""
    address = next(
        line.split("'")[1]
        for line in (run.run_dir / "logs" / f"ray-{run.number}-0.log").read_text().splitlines()
        if "ray start --address='" in line
    )
    offered = ("RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN={token}") if token else ("RAY_AUTH_MODE=disabled",)
    words = ("env", *offered, sys.executable, "-c", CLIENT, address)
    return run.cluster.run(*words, node="n2", check=False, seconds=300)


def test_a_run_spans_both_nodes(undisturbed: Submitted) -> None:
    summary = undisturbed.summary()
    assert (summary["world_size"], summary["replica_spread"]) == (2, 0.0)
    assert sorted(undisturbed.hosts()) == ["n1", "n2"]
    assert undisturbed.restarts == 0


def test_nothing_is_left_on_either_node(watched: Watched) -> None:
    assert watched.seconds_to_stop < patience(10)  # 3.5 on quiet cores, 5.3 on ones that another machine slows
    for name in NODES:
        assert "ray-" not in watched.run.cluster.run("ls", "/tmp", node=name)


def test_only_the_jobs_token_opens_its_ray_cluster(watched: Watched) -> None:
    without, wrong, right = watched.strangers
    for refused in (without, wrong):
        assert "nodes:" not in refused
        assert "uthent" in refused or "ConnectionError" in refused, refused
    assert "nodes: 2" in right


def test_what_a_user_sees(watched: Watched) -> None:
    """The commands that submit prints are right; the time to the first step is told; the code is the one submitted."""
    run, followed = watched.run, watched.followed
    lines = dict(line.split(": ", 1) for line in run.said.splitlines())
    assert lines == {
        "job": run.number,
        "run": str(run.run_dir),
        "watch": f"tldist logs {run.run_dir} --follow",
        "cancel": f"scancel {run.number}",
    }
    assert f"run: {run.run_dir}" in followed
    assert "tldist: step 1 was done " in followed
    assert "s in the queue" in followed
    assert "Traceback" not in followed
    listed = run.tldist("runs", str(run.run_dir.parent)).splitlines()
    assert any(line.split()[:2] == ["undisturbed", "done"] for line in listed), listed
    commit = json.loads((run.run_dir / "submit.json").read_text())["commit"]
    assert json.loads((run.run_dir / "environment.json").read_text())["commit"] == commit
    assert (run.run_dir / "code" / "tldist" / "train" / "fit.py").read_bytes() == (
        ROOT / "tldist" / "train" / "fit.py"
    ).read_bytes()
    assert (run.run_dir / "job.sbatch").stat().st_mode & stat.S_IRUSR


def same_end(run: Submitted, undisturbed: Submitted) -> None:
    """After an interruption: the weights of the run that had none, every step logged, one run in W&B."""
    assert run.weights() == undisturbed.weights()
    assert run.summary()["replica_spread"] == 0.0
    assert run.summary()["wandb_run_id"] != undisturbed.summary()["wandb_run_id"]
    names = [path.name for path in (run.run_dir / "wandb").glob("offline-run-*")]
    assert len(names) == 1 + run.restarts
    assert {name.rsplit("-", 1)[1] for name in names} == {run.summary()["wandb_run_id"]}
    last = {row["step"]: row["loss"] for row in run.rows("train")}
    assert last == {row["step"]: row["loss"] for row in undisturbed.rows("train")}


def test_a_preempted_run_comes_back_and_ends_the_same(slurm: Cluster, undisturbed: Submitted) -> None:
    run = Submitted(slurm, "preempted").submit()
    with run.held(7):
        urgent = slurm.run("sbatch", "--parsable", "-phigh", "-N2", "-c2", "-o/dev/null", "--wrap=true").strip()
        run.until_asked_to_save()
    run.until(lambda: slurm.job(urgent)["JobState"] == "COMPLETED", "the urgent job's end")
    assert run.until_over() == "COMPLETED", run.log()
    assert "stopped by SIGUSR1, all saved" in run.log()
    resumed = [row["text"] for row in run.rows("notice") if row["text"].startswith("resumed from ")]
    assert len(resumed) == 1
    assert run.restarts == 1
    same_end(run, undisturbed)


@long
def test_scancel_ends_a_job_within_seconds(slurm: Cluster, undisturbed: Submitted) -> None:
    """Slurm itself would wait 30 s before it kills; the last checkpoint is whole."""
    run = Submitted(slurm, "cancelled").submit("--train.epochs", "1000")
    run.until(lambda: (run.run_dir / "checkpoints" / "last").exists(), "a checkpoint")
    slurm.run("scancel", run.number)
    seconds_to_stop = run.until_clean(60)
    assert run.until_over() == "CANCELLED"
    assert seconds_to_stop < patience(10)
    assert checkpoint.damage(run.run_dir / "checkpoints" / "last") is None
    assert "cancelled" in run.tldist("runs", str(run.run_dir))
    assert run.restarts == 0


def test_a_mistake_is_not_tried_again(slurm: Cluster) -> None:
    """The images are gone when the job starts: one sentence, exit code 2, no second start."""
    shutil.copytree(slurm.shared / "photos", slurm.shared / "gone")
    run = Submitted(slurm, "mistaken")
    slurm.run("scontrol", "update", "PartitionName=main", "State=DOWN")
    try:
        run.submit("--data.root", str(slurm.shared / "gone"))
        shutil.rmtree(slurm.shared / "gone")
    finally:
        slurm.run("scontrol", "update", "PartitionName=main", "State=UP")
    assert run.until_over() == "FAILED"
    assert slurm.job(run.number)["ExitCode"] == "2:0"
    assert run.restarts == 0
    assert "does not exist" in run.log()
    assert "failed" in run.tldist("runs", str(run.run_dir))


@long
def test_a_run_goes_on_after_its_time_limit(slurm: Cluster, undisturbed: Submitted) -> None:
    """The limit is shortened while it trains, to minutes from now, and the notice is longer."""
    run = Submitted(slurm, "limited").submit("--time", "60", "--save-before", "400")
    with run.held(7):
        minutes = 4 + int(time.time() - json.loads((run.run_dir / "submit.json").read_text())["time"]) // 60
        slurm.run("scontrol", "update", f"JobId={run.number}", f"TimeLimit={minutes}")
        run.until_asked_to_save()
    run.until(lambda: run.state != "RUNNING", "its place in the queue")
    slurm.run("scontrol", "update", f"JobId={run.number}", "TimeLimit=60")
    assert run.until_over() == "COMPLETED", run.log()
    same_end(run, undisturbed)


@long
@pytest.mark.parametrize("name", NODES)
def test_a_run_whose_node_is_lost_comes_back(slurm: Cluster, undisturbed: Submitted, name: str) -> None:
    """Slurm's daemon is killed on the node of the head, or on the other one; what it started would go on."""
    run = Submitted(slurm, f"bereft-{name}").submit()
    with run.held(7):
        slurm.kill_slurmd(name)
        run.until(lambda: run.state != "RUNNING", "the end of its first start")
    slurm.start_slurmd(name)
    assert run.until_over() == "COMPLETED", run.log()
    assert run.restarts == 1
    same_end(run, undisturbed)


@long
def test_two_jobs_share_nodes(slurm: Cluster, undisturbed: Submitted) -> None:
    """Each has its own ports, folders and token, and the end of one leaves the other alone."""
    short, other = (Submitted(slurm, name) for name in ("short", "other"))
    other.submit("--train.epochs", "12")
    short.submit()
    assert short.until_over() == "COMPLETED", short.log()
    time.sleep(2)
    assert other.state == "RUNNING"
    assert other.until_over() == "COMPLETED", other.log()
    assert short.weights() == undisturbed.weights()


@long
def test_an_array_is_a_run_for_each_seed(slurm: Cluster, undisturbed: Submitted) -> None:
    array = Submitted(slurm, "array").submit("--nodes", "1", "--array", "0-1", "--train.epochs", "1")
    runs = [array.run_dir / f"seed-{seed}" for seed in (0, 1)]
    array.until(lambda: all((run / "summary.json").exists() for run in runs), "both runs")
    first, second = ((run / "checkpoints/last/model.safetensors").read_bytes() for run in runs)
    assert first != second


@long
def test_a_preempted_study_comes_back_and_finishes_the_rest(slurm: Cluster) -> None:
    """Two trials at once on two nodes; those that were finished before it was stopped are not run again."""
    file, run = slurm.shared / "rates.yaml", Submitted(slurm, "study")
    grid = {"optim.base_lr": [0.1, 0.01]}
    flags = {"data.root": str(slurm.shared / "photos"), "model.weights": "none", "data.image_size": 32}
    flags |= {"data.batch_size": 8, "train.epochs": 3, "tracking.wandb": "disabled"}
    file.write_text(json.dumps({"recipe": "folder", "flags": flags, "grid": grid, "seeds": 3}))
    run.tldist("submit", "--study", str(file), "--dir", str(run.run_dir), "--nodes", "2", "--cpus-per-node", "1")
    trials = run.run_dir / "trials"
    run.until(lambda: any(trials.glob("*/summary.json")), "a trial's end")
    urgent = slurm.run("sbatch", "--parsable", "-phigh", "-N2", "-c2", "-o/dev/null", "--wrap=true").strip()
    run.until(lambda: slurm.job(urgent)["JobState"] == "COMPLETED", "the urgent job's end")
    before = {path: path.stat().st_mtime for path in trials.glob("*/summary.json")}
    assert run.until_over() == "COMPLETED", run.log()
    assert "stopped by SIGUSR1, all saved" in run.log()
    assert run.restarts == 1
    assert len(list(trials.glob("*/summary.json"))) == 6 > len(before)
    assert {path: path.stat().st_mtime for path in before} == before
    assert "0.1" in (run.run_dir / "table.md").read_text()
    assert run.tldist("logs", str(run.run_dir), "--follow")


def test_what_slurm_refuses_leaves_nothing(slurm: Cluster) -> None:
    run = Submitted(slurm, "refused")
    with pytest.raises(AssertionError, match="Slurm refused the job"):
        run.submit("--partition", "nonsense")
    assert not run.run_dir.exists()
