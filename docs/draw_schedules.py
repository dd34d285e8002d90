"""Draws docs/figures/schedules.png: every schedule across phase boundaries and across a resume.

The first process evaluates each curve up to the checkpoint. A second one receives the config and a TrainState's
epoch, step and phase_epoch as text, knows nothing else, and evaluates the rest:

    python docs/draw_schedules.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tldist import config
from tldist.config import ModelConfig, OptimConfig, RunConfig, StrategyConfig, TrainConfig
from tldist.optim import schedule_factor
from tldist.report import plots
from tldist.train.worker import plan_of

STEPS_PER_EPOCH = 20
RESUMED_EPOCH = 8
SCHEDULES = ("constant", "cosine", "cosine_restarts", "onecycle")
PLANS = {
    "by_hand in three phases: a curve over each": StrategyConfig(
        name="by_hand", phases=("4: head=1, *=frozen", "6: layer4=0.1, head=1, *=frozen", "*=0.1")
    ),
    "gradual: one curve over the whole plan": StrategyConfig(name="gradual", epochs_per_stage=5),
}
Curve = list[tuple[float, float]]


def settings(schedule: str, strategy: StrategyConfig) -> RunConfig:
    """Fifteen epochs; gradual by five leaves three phases."""
    optim = OptimConfig(schedule=schedule, warmup_epochs=0.5)  # type: ignore[arg-type]
    return RunConfig(model=ModelConfig("resnet18"), strategy=strategy, optim=optim, train=TrainConfig(epochs=15))


def curve(run: RunConfig, state: dict[str, int], until: int) -> Curve:
    """(epoch, share of the peak) of each step from `state` on, as the loop would go on from it."""
    plan, points = plan_of(run), []
    index = state["phase"]
    epoch, step, phase_epoch = state["epoch"], state["step"], state["phase_epoch"]
    while epoch < until:
        if epoch - phase_epoch >= plan.phases[index].epochs:
            index, phase_epoch = index + 1, epoch
        for _ in range(STEPS_PER_EPOCH):
            factor = schedule_factor(run.optim, plan, index, step, STEPS_PER_EPOCH, phase_epoch)
            points.append((step / STEPS_PER_EPOCH, factor))
            step += 1
        epoch += 1
    return points


def resumed(run: RunConfig) -> Curve:
    """The rest of the curve, from another process."""
    first = phase_starts(run)[1]
    state = {"phase": 1, "epoch": RESUMED_EPOCH, "step": RESUMED_EPOCH * STEPS_PER_EPOCH, "phase_epoch": first}
    told = json.dumps({"config": config.to_json(run), "state": state})
    answer = subprocess.run(
        [sys.executable, __file__, "resume"], input=told, capture_output=True, text=True, check=True
    )
    return [(x, y) for x, y in json.loads(answer.stdout)]


def phase_starts(run: RunConfig) -> list[int]:
    """The epoch at which each phase begins."""
    plan = plan_of(run)
    return [plan.first_epoch(index) for index in range(len(plan.phases))]


def panel(axes: Axes, schedule: str, strategy: StrategyConfig, last: bool) -> None:
    """One schedule over one plan: solid to the checkpoint, dashed in another colour from the second process."""
    run = settings(schedule, strategy)
    before = curve(run, {"phase": 0, "epoch": 0, "step": 0, "phase_epoch": 0}, RESUMED_EPOCH)
    after = resumed(run)
    axes.plot(*zip(*before, strict=True), color=plots.PALETTE[0], label="until the checkpoint")
    axes.plot(
        *zip(*after, strict=True),
        color=plots.PALETTE[1],
        linestyle=(0, (2.2, 1.1)),
        label="resumed in a second process",
    )
    axes.plot(*after[0], "o", color=plots.PALETTE[1], markersize=6, label="the first step after the resume")
    for start in phase_starts(run)[1:]:
        axes.axvline(start, color=plots.MUTED, linewidth=1, linestyle=":")
    axes.set(xlim=(0, run.train.epochs), ylim=(0, 1.08), xticks=range(0, run.train.epochs + 1, 5), yticks=(0, 0.5, 1))
    axes.tick_params(labelbottom=last)


def draw() -> Figure:
    """A row for each schedule, a column for each plan."""
    figure = Figure(figsize=(10, 7.6), layout="constrained")
    rows = figure.subplots(len(SCHEDULES), len(PLANS), sharex=True, sharey=True)
    for row, schedule in zip(rows, SCHEDULES, strict=True):
        for axes, (title, strategy) in zip(row, PLANS.items(), strict=True):
            panel(axes, schedule, strategy, last=schedule == SCHEDULES[-1])
            if schedule == SCHEDULES[0]:
                axes.set_title(title, pad=18)
                name_phases(axes, settings(schedule, strategy))
            if schedule == SCHEDULES[-1]:
                axes.set_xlabel("epoch")
        row[0].set_ylabel(f"{schedule}\nshare of the peak", color=plots.INK)
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def name_phases(axes: Axes, run: RunConfig) -> None:
    """What trains, above the stretch in which it does."""
    names = ("head", "+ layer4", "+ the rest" if run.strategy.name == "by_hand" else "+ layer3")
    for name, start in zip(names, phase_starts(run), strict=True):
        axes.annotate(
            name, (start, 1.08), xytext=(3, 3), textcoords="offset points", fontsize=9, color=plots.MUTED, ha="left"
        )


def main() -> None:
    """Draw, or, as the second process, answer with the rest of a curve."""
    if sys.argv[1:] == ["resume"]:
        given: dict[str, Any] = json.load(sys.stdin)
        run = config.from_json(given["config"])
        print(json.dumps(curve(run, given["state"], run.train.epochs)))
        return
    with mpl.rc_context(cast("Any", {**mpl.rcParamsDefault, **plots.STYLE})):
        plots.png(draw(), Path(__file__).parent / "figures" / "schedules.png")


if __name__ == "__main__":
    main()
