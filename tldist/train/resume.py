"""Where a run stands, written and read back: what an interrupted one goes on with."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tldist import dist
from tldist.checkpoints import checkpoint
from tldist.checkpoints.checkpoint import DamagedCheckpoint, Snapshot, TrainState
from tldist.models.backbones import IMAGE_MEAN, IMAGE_STD
from tldist.train.evaluate import Evaluation, predictions
from tldist.train.metrics import Window, peak_memory_gib
from tldist.train.phase import LivePhase
from tldist.train.run import Run


@dataclass(frozen=True)
class PhaseRecord:
    """What is told of a phase that ended; the window is of all workers, the memory of the largest one."""

    index: int
    epochs: int
    window: Window
    flops_per_image: float
    peak_mem_gib: float
    compile_s: float
    cache_fill_s: float


@dataclass
class FitResult:
    """What the loop leaves behind for the summary and the report."""

    state: TrainState = field(default_factory=TrainState)
    phases: list[PhaseRecord] = field(default_factory=list)
    replica_spread: float = 0.0
    restored_epoch: int | None = None
    """The epoch whose weights the run ended with, where early stopping restored them."""
    resumed_from: str | None = None
    """The checkpoint from which this process went on with an interrupted run."""
    started: float = field(default_factory=time.perf_counter)


def resume(run: Run) -> FitResult:
    """What an earlier process left in the run directory, loaded on every worker; a new start where it left nothing.

    Raises DamagedCheckpoint where it left checkpoints and none is whole.
    """
    last = find_checkpoint(run)
    if last is None:
        return FitResult()
    state, told = checkpoint.read_state(last)
    run.model.load_torchvision_state(checkpoint.read_live(last))
    if run.config.train.ema:
        ours = {theirs: name for name, theirs in run.model.torchvision_names.items()}
        state.average = {ours[name]: tensor for name, tensor in checkpoint.read_weights(last).items()}
    if state.scaler:
        run.numbers.scaler.load_state_dict(state.scaler)
    phases = [PhaseRecord(**{**record, "window": Window(**record["window"])}) for record in told["phases"]]
    run.log.write("notice", text=f"resumed from {last.name}: after epoch {state.epoch}, step {state.step}")
    check_best(run, state)
    return FitResult(state, phases, resumed_from=last.name, started=time.perf_counter() - state.seconds)


def check_best(run: Run, state: TrainState) -> None:
    """Where the checkpoint of the best epoch is lost (damaged, never written), the best of what comes takes its place.

    Better told now than when it is needed, at the end.
    """
    problem = None
    if dist.is_main() and state.best_epoch:
        try:
            if checkpoint.best(run.saver.folder).name != checkpoint.folder_name(state.best_epoch):
                problem = f"the checkpoint of the best epoch, {state.best_epoch}, was not written"
        except DamagedCheckpoint as error:
            problem = str(error)
    if problem := dist.from_main(problem):
        run.log.write("notice", text=f"{problem}: the best of the epochs from here on takes its place")
        state.best_val_top1, state.best_epoch = -1.0, 0


def find_checkpoint(run: Run) -> Path | None:
    """The newest whole checkpoint; the main worker looks for it, says which are damaged, and tells the others."""
    found, failure = None, None
    if dist.is_main():
        try:
            found, damaged = checkpoint.newest(run.saver.folder)
            for sentence in damaged:
                run.log.write("notice", text=f"{sentence}; the one before it is used: {found and found.name}")
        except DamagedCheckpoint as error:
            failure = str(error)
    found, failure = dist.from_main((found, failure))
    if failure:
        raise DamagedCheckpoint(failure)
    return found


def record(live: LivePhase, state: TrainState, peak_mem_gib: float) -> PhaseRecord:
    """What the phase leaves for the summary."""
    return PhaseRecord(
        live.index,
        state.epoch - state.phase_epoch,
        live.clock.phase,
        live.flops.total,
        peak_mem_gib,
        live.compile_s,
        live.inputs.fill_s,
    )


def restore_best(run: Run, state: TrainState) -> None:
    """Weights and optimizer state of the best epoch, on every worker."""
    run.saver.flush(must=True)
    dist.barrier()
    best = checkpoint.best(run.saver.folder)
    run.model.load_torchvision_state(checkpoint.read_weights(best))
    state.optimizer, state.average = checkpoint.read_optimizer(best), {}
    state.objective = checkpoint.read_objective(best)
    dist.barrier()
    run.log.write("notice", text=f"the weights of epoch {state.best_epoch}, the best on validation, are back")


def position(run: Run, state: TrainState) -> int:
    """Steps done of the epoch under way."""
    return state.step - state.epoch * run.steps_per_epoch


def save_checkpoint(
    run: Run, live: LivePhase, result: FitResult, names: Sequence[str], evaluation: Evaluation | None = None
) -> None:
    """Where the run stands, under `names`; with the predictions of its evaluation, where there are any.

    Collective, inside `engine.whole()`. What the engine's shards hold is gathered for the checkpoint alone: were it
    kept, a ZeRO worker would hold the whole optimizer besides its share.
    """
    done = position(run, result.state)
    result.state.seconds = round(time.perf_counter() - result.started, 2)
    saved = replace(with_live(result.state, live), scaler=run.numbers.scaler.state_dict())
    saved.workers = live.own() if done else {}
    run.control.saved()
    if dist.is_main():
        contents = snapshot_of(run, live, result, saved, checkpoint.folder_name(saved.epoch, done))
        if evaluation is not None:
            shown = predictions(evaluation, run.index.val, run.index.classes)
            contents.texts["predictions.json"] = json.dumps(shown)
            contents.texts["calibration.json"] = json.dumps({"temperature": evaluation.temperature})
        run.saver.save(names, contents)


def with_live(state: TrainState, live: LivePhase) -> TrainState:
    """The state with what the phase's engine, average and objective hold now. Collective, inside `engine.whole()`."""
    return replace(
        state,
        optimizer={**state.optimizer, **live.engine.optimizer_state()},
        average={} if live.average is None else live.average.state(),
        objective=live.engine.objective.own_state(),
    )


def hand_over(state: TrainState, live: LivePhase) -> None:
    """Keep what an ending phase leaves to the next one, which takes it again. Collective, inside `engine.whole()`."""
    left = with_live(state, live)
    state.optimizer, state.average, state.objective = left.optimizer, left.average, left.objective


def snapshot_of(run: Run, live: LivePhase, result: FitResult, state: TrainState, name: str) -> Snapshot:
    """A copy of all that the run would need to go on from here."""
    model = run.model.torchvision_state()
    averaged = {run.model.torchvision_names[name]: tensor for name, tensor in state.average.items()}
    evaluated, trains_on = {**model, **averaged}, model if averaged else None
    so_far = record(live, state, peak_memory_gib(run.numbers.device))
    told = {**describe_model(run), "phases": [asdict(phase) for phase in (*result.phases, so_far)]}
    return checkpoint.snapshot(name, evaluated, trains_on, state, told, frozen_names(run, live))


def frozen_names(run: Run, live: LivePhase) -> set[str]:
    """torchvision's names of what this phase cannot change: the stages before its cut."""
    frozen = run.plan.stages[: run.plan.cut(live.index)]
    return {theirs for ours, theirs in run.model.torchvision_names.items() if ours.split(".", 1)[0] in frozen}


def describe_model(run: Run) -> dict[str, Any]:
    """What a reader of a checkpoint must know to rebuild the model."""
    model, data = run.config.model, run.config.data
    return {
        "model": model.name,
        "head": model.head,
        "classes": list(run.index.classes),
        "image_size": data.image_size,
        "mean": IMAGE_MEAN,
        "std": IMAGE_STD,
    }
