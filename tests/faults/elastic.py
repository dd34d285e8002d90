"""Elastic: one of two nodes is lost inside an epoch, and another one comes later: 2, 1, 2 workers in one run."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

from checks import each_image_once, figures, nothing_left
from faults import Trial, must_end, run_trial
from nodes import QUICK, Node, cluster, environment
from runs import Bench, Run

EPOCHS = 24
"""Long enough for a node to be lost, to be missed, and for another one to come and to be noticed."""


def try_elastic(data: Path, weights: str, folder: Path, seed: str, number: int) -> Trial:
    """One trial, on a cluster of its own."""
    trial = Trial(number, random.Random(f"{seed} elastic {number}"))
    environment_ = {**environment(folder / "observed"), **QUICK}
    with cluster(environment_, cpus=1) as head:
        nodes = [Node(environment_, 1, head.address)]
        run = Bench(data, weights, folder, head.address, EPOCHS).run(f"elastic-{number}")
        try:
            run_trial(run, trial, lambda: _shrinks_and_grows(run, trial, nodes, environment_))
        finally:
            for node in nodes:
                node.kill()
    return trial


def _shrinks_and_grows(run: Run, trial: Trial, nodes: list[Node], environment: dict[str, str]) -> Iterator[str]:
    time.sleep(3)  # for the second node to join: a run that starts earlier begins with one worker
    run.start(workers="1:2")
    lost_at, alone = trial.random.randint(8, 30), trial.random.randint(1, 20)
    run.until(lambda: run.done() >= lost_at)
    time.sleep(trial.random.uniform(0, 0.5))
    trial.moment = f"after step {run.done()}"
    trial.happened("a node is lost")
    nodes[0].kill()
    run.until(lambda: sum(note["world"] == 1 for note in run.seen().steps) >= alone)
    nodes.append(Node(environment, 1, nodes[0].address))
    trial.moment += f", another one comes {alone} steps later"
    yield from must_end(run, 0)
    worlds = [row["world_size"] for row in run.rows("run")]
    if worlds != [2, 1, 2]:
        yield f"it ran with {worlds} workers, not with 2, 1, 2"
    trial.training_again_s, trial.steps_redone = figures(run, trial.fault_at)
    yield from each_image_once(run, run.bench.epochs)
    if any(row["replica_spread"] != 0 for row in run.rows("eval")):
        yield "the replicas drifted apart"
    if [row["epoch"] for row in run.rows("eval")][-1] != run.bench.epochs:
        yield "the last epoch was not evaluated"
    yield from nothing_left(run)
