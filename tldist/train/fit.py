"""The loop: phases, epochs, steps. It runs every strategy on every engine and knows none of them by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from tldist import dist
from tldist.checkpoints import checkpoint
from tldist.checkpoints.checkpoint import TrainState
from tldist.checkpoints.saver import NotWritten
from tldist.data.mixing import draw_mix, mix_features, mixed_targets, step_generator
from tldist.guard import control
from tldist.guard.control import Diverged, Stopped
from tldist.models.batchnorm import flat, put_back
from tldist.models.flops import mfu
from tldist.objectives.base import Targets
from tldist.optim import schedule_factor
from tldist.plans import Phase
from tldist.train.evaluate import Evaluation, evaluate
from tldist.train.metrics import ThroughputClock, Window, peak_memory_gib
from tldist.train.phase import LivePhase, begin_phase
from tldist.train.resume import FitResult, hand_over, position, record, restore_best, resume, save_checkpoint
from tldist.train.run import Run

Item = TypeVar("Item")


def fit(run: Run) -> FitResult:
    """Run the plan from its first phase, or from where an earlier process was interrupted, to its last."""
    result = resume(run)
    resumed_phase = result.state.phase if result.resumed_from is not None else None
    for index, phase in enumerate(run.plan.phases):
        ran = resumed_phase is not None and index < resumed_phase
        ended = index == resumed_phase and is_phase_over(run, phase, result.state)
        if not (ran or ended or is_over(run, result.state)):
            run_phase(run, index, result, resumed=index == resumed_phase)
    if run.config.train.early_stop and 0 < result.state.best_epoch < result.state.epoch:
        restore_best(run, result.state)
        if dist.is_main():
            checkpoint.point(run.saver.folder, ["last"], checkpoint.folder_name(result.state.best_epoch))
        result.restored_epoch, result.state.val_top1 = result.state.best_epoch, result.state.best_val_top1
    return result


def is_over(run: Run, state: TrainState) -> bool:
    """All epochs are done, or validation has stood still for as long as early stopping waits."""
    patience = run.config.train.early_stop
    return state.epoch >= run.plan.epochs or 0 < patience <= state.run_plateau.stale


def is_phase_over(run: Run, phase: Phase, state: TrainState) -> bool:
    """The phase has had its epochs, or stands on a plateau that ends it. Equal on all workers: so is what it reads."""
    had_its_epochs = state.epoch - state.phase_epoch >= phase.epochs
    return had_its_epochs or 0 < phase.patience <= state.phase_plateau.stale or is_over(run, state)


def run_phase(run: Run, index: int, result: FitResult, resumed: bool = False) -> None:
    """One phase, from its cut to its last epoch; what it held is freed on return, but for what `result` keeps."""
    state = result.state
    if not resumed and run.plan.phases[index].start == "best" and 0 < state.best_epoch < state.epoch:
        restore_best(run, state)
    run.watchdog.beat("preparing the phase", state.step)
    live = begin_phase(run, index, state, resumed)
    run.watchdog.beat("comparing the replicas")
    with live.engine.whole():
        announce_phase(run, live, state)
    if resumed and result.phases and result.phases[-1].index == index:
        live.clock.phase = result.phases.pop().window  # what an earlier process measured of it
    while not is_phase_over(run, live.phase, state):
        train_epoch(run, live, result)
        with live.engine.whole():
            end_epoch(run, live, result)
    run.watchdog.beat("writing the phase's last checkpoint")
    run.saver.flush()
    tell_news(run)
    run.watchdog.beat("closing the phase")
    if index + 1 < len(run.plan.phases):
        with live.engine.whole():
            hand_over(state, live)
    live.engine.close()
    live.inputs.close()
    if live.is_compiled or live.prefix.is_compiled:
        torch.compiler.reset()  # else it keeps what a phase compiled, and compiles no more after eight
    peak = dist.largest(peak_memory_gib(run.numbers.device), run.numbers.device)
    result.phases.append(record(live, state, peak))


def announce_phase(run: Run, live: LivePhase, state: TrainState) -> None:
    """Prove that the replicas agree, and say what begins."""
    dist.replica_spread(run.model.state_dict())
    run.log.write(
        "phase",
        phase=live.index,
        name=live.phase.name,
        epoch=state.epoch,
        step=state.step,
        trainable_params=sum(p.numel() for p in live.network.parameters() if p.requires_grad),
        gflops_per_image=live.flops.total / 1e9,
        compile_s=round(live.compile_s, 2),
        cache_fill_s=round(live.inputs.fill_s, 2),
        is_cached=live.inputs.cached,
    )


def train_epoch(run: Run, live: LivePhase, result: FitResult) -> None:
    """One pass over the training images, or what is left of it after an interruption. Raises Stopped and Diverged."""
    config, state, steps = run.config, result.state, run.steps_per_epoch
    done = position(run, state)
    live.train_mode(config.train.batchnorm)
    if state.workers:
        live.take_own(state.workers)
        state.workers = {}
    run.control.begin()
    live.clock.start()
    run.watchdog.beat("waiting for data", state.step)
    with live.threads(run.pass_size):
        for epoch_step, batch in enumerate(_timed(live.inputs.train(state.epoch, done), live.clock), start=done + 1):
            run.watchdog.beat("computing")
            train_step(run, live, state.step, batch, factor_at(run, live, state, state.step))
            state.step += 1
            live.clock.step(run.images_per_step)
            if epoch_step % config.tracking.log_every == 0 or epoch_step == steps:
                log_training(run, live, state, epoch_step)
            obey(run, live, result, is_last=epoch_step == steps)
            run.watchdog.beat("waiting for data", state.step)


def obey(run: Run, live: LivePhase, result: FitResult, is_last: bool) -> None:
    """Between two steps: save or stop where it is time to; every worker at the same step."""
    checkpoints, state = run.config.checkpoint, result.state
    orders = run.control.after_step(live.meter.most_skipped, now=is_last)
    if orders.most_skipped >= run.config.train.max_skipped:
        raise Diverged(
            f"the gradients of {orders.most_skipped} steps in a row, up to step {state.step}, were not finite; none of "
            f"these steps was taken, and {run.saver.folder} holds the weights from before: lower --optim.base-lr, "
            "or look at the images"
        )
    due = orders.save or (checkpoints.steps > 0 and state.step % checkpoints.steps == 0)
    if orders.stop or (due and not is_last):  # an epoch's end is saved anyway
        run.watchdog.beat("saving")
        live.clock.stop()
        with live.engine.whole():
            save_checkpoint(run, live, result, ("last",))
        live.clock.start()
    if orders.stop:
        stop(run, state)


def stop(run: Run, state: TrainState) -> None:
    """Raise Stopped when all is on the disk, on every worker; NotWritten where it cannot be, and there is need to end.

    No worker ends before the main one has written: launchers kill a group of which one has ended.
    """
    run.saver.flush()
    problem, reason = dist.from_main((run.saver.problem, control.stop_reason(run.run_dir)))
    if not problem:
        raise Stopped(f"stopped after step {state.step}, and saved")
    if reason != control.MORE_PLACES:
        raise NotWritten(problem)
    if dist.is_main():
        control.forget_stop(run.run_dir, control.MORE_PLACES)


def factor_at(run: Run, live: LivePhase, state: TrainState, step: int) -> float:
    """The schedule's factor at a step of this phase."""
    return schedule_factor(run.config.optim, run.plan, live.index, step, run.steps_per_epoch, state.phase_epoch)


def _timed(batches: Iterator[Item], clock: ThroughputClock) -> Iterator[Item]:
    """Hand batches on, telling the clock how long each kept the step waiting."""
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        clock.waited(time.perf_counter() - asked)
        if batch is None:
            return
        yield batch


def train_step(run: Run, live: LivePhase, step: int, batch: Any, factor: float) -> None:
    """Mix, encode, forward, backward, step at `factor` of the peak rates; nothing here waits for the device.

    All randomness of the step (mixing, dropout) is seeded from (seed, step, rank).
    """
    data, inputs = run.config.data, live.inputs
    generator = step_generator(run.numbers.device, run.config.seed, step, run.worker.rank)
    seed_default_generators(generator)
    kept = flat(live.moving) if live.moving else None
    live.begin_step()
    mix = draw_mix(data, len(batch.labels_N), generator)
    targets = mixed_targets(batch.labels_N, mix, step / run.total_steps)
    if mix is not None and data.mix_at == "cut":
        passes(run, live, mix_features(inputs.encode(inputs.inputs(batch)), mix), targets, lambda x: x)
    else:
        passes(run, live, inputs.inputs(batch, mix), targets, inputs.encode)
    stepped = live.engine.step(factor)
    live.meter.stepped(*stepped)
    if kept is not None:
        put_back(live.moving, kept, stepped.skipped)
    if live.average is not None:
        with live.engine.whole():
            live.average.update(live.network, step)


def seed_default_generators(generator: torch.Generator) -> None:
    """What dropout draws from, on the host and on the step's device.

    `torch.manual_seed` would also queue a call, with a formatted stack trace, for every kind of device that is not
    in use: half a millisecond a step on two Zen 5 cores, and a list that grows with the run.
    """
    torch.default_generator.manual_seed(generator.initial_seed())
    if generator.device.type == "cuda":
        torch.cuda.manual_seed(generator.initial_seed())


def passes(run: Run, live: LivePhase, x: Tensor, targets: Targets, encode: Callable[[Tensor], Tensor]) -> None:
    """The step's images through the network, in as many parts as gradients accumulate over.

    Where the step shows two domains, the images of one lie behind those of the other, and a part has rows of both.
    """
    n = len(targets.labels_N)
    parts, domains = -(-n // run.pass_size), x.split(n)
    for i in range(parts):  # of nearly equal size: BatchNorm should not see the rest alone
        part = slice(i * n // parts, (i + 1) * n // parts)
        of_part = targets if parts == 1 else targets.part(part)
        output = live.engine.forward_backward(
            encode(_rows(domains, part)), of_part, len(of_part.labels_N) / n, reduce=i == parts - 1
        )
        live.meter.update(output, of_part)


def _rows(domains: Sequence[Tensor], part: slice) -> Tensor:
    """The same rows of every domain."""
    return domains[0][part] if len(domains) == 1 else torch.cat([images[part] for images in domains])


def log_training(run: Run, live: LivePhase, state: TrainState, epoch_step: int) -> None:
    """One line of metrics: one all-reduce, one copy to the host. Memory is this worker's; the summary has all."""
    tell_news(run)
    window = live.clock.stop()
    read = live.meter.drain((window.images_per_s / run.worker.world_size, window.data_wait_share))
    factor = factor_at(run, live, state, state.step - 1)
    run.log.write(
        "train",
        step=state.step,
        epoch=state.epoch,
        epoch_step=epoch_step,
        phase=live.index,
        loss=read.loss,
        top1=read.top1,
        grad_norm=read.grad_norm,
        grad_norm_max=read.grad_norm_max,
        lr={stage: run.config.optim.base_lr * m * factor for stage, m in live.phase.stages.items()},
        images_per_s=round(window.images_per_s, 1),
        data_wait_share=round(window.data_wait_share, 4),
        **by_worker(read.by_worker),
        **speed(run, window, live.flops.total),
        peak_mem_gib=round(peak_memory_gib(run.numbers.device), 3),
    )
    live.clock.start()


def by_worker(rows: list[list[float]]) -> dict[str, list[float]]:
    """Each worker's images/s and data wait, where there are several: for one that waits, all wait."""
    if len(rows) == 1:
        return {}
    rates, waits = zip(*rows, strict=True)
    return {
        "worker_images_per_s": [round(rate, 1) for rate in rates],
        "worker_data_wait_share": [round(wait, 4) for wait in waits],
    }


def speed(run: Run, window: Window, flops_per_image: float) -> dict[str, float | None]:
    """Arithmetic done for the model by all workers in a second, and its share of what their devices could do."""
    share = mfu(window.images_per_s, flops_per_image, run.worker.world_size, run.peak[0])
    tflops = window.images_per_s * flops_per_image / 1e12
    return {"tflops_per_s": round(tflops, 4), "mfu": None if share is None else round(share, 4)}


def tell_news(run: Run) -> None:
    """What the thread that writes checkpoints has to say, and images that could not be read."""
    if news := run.saver.drain_news():
        run.log.write("notice", text=news)
    for path, reason in run.bad_images.drain_news().items():
        run.log.write("notice", text=f"skipped {path}: {reason} (it was sound when it was checked)")


def end_epoch(run: Run, live: LivePhase, result: FitResult) -> None:
    """Agree on BatchNorm statistics, prove that replicas agree, evaluate, save."""
    state = result.state
    state.epoch += 1
    state.skipped_steps += live.meter.drain_skipped()
    run.watchdog.beat("comparing the replicas")
    live.agree_on_statistics()
    averages = {} if live.average is None else live.average.state()
    averages = {f"average of {name}": tensor for name, tensor in averages.items()}
    own = {f"objective's {name}": tensor for name, tensor in live.engine.objective.own_state().items()}
    result.replica_spread = dist.replica_spread({**run.model.state_dict(), **averages, **own})
    evaluation = evaluate_model(run, live)
    run.watchdog.beat("saving")
    state.val_top1 = evaluation.top1
    for plateau in (state.phase_plateau, state.run_plateau):
        plateau.look(state.val_top1, run.config.train.min_delta)
    if state.val_top1 > state.best_val_top1:
        state.best_val_top1, state.best_epoch = state.val_top1, state.epoch
        state.seconds_to_best = round(time.perf_counter() - result.started, 2)
        save_checkpoint(run, live, result, ("last", "best"), evaluation)
    else:
        save_checkpoint(run, live, result, ("last",))
    run.log.write(
        "eval",
        epoch=state.epoch,
        step=state.step,
        phase=live.index,
        val_loss=evaluation.loss,
        val_top1=state.val_top1,
        best_val_top1=state.best_val_top1,
        replica_spread=result.replica_spread,
        skipped_steps=state.skipped_steps,
    )


def evaluate_model(run: Run, live: LivePhase) -> Evaluation:
    """The whole model on the validation split, each image once."""
    live.evaluated().eval()
    inputs = live.inputs
    batches = run.watchdog.along(inputs.val(), "evaluating", then="joining the evaluations")

    def logits(batch: Any) -> Tensor:
        return live.logits(inputs.encode(inputs.inputs(batch)))

    with live.threads(run.pass_size):
        return evaluate(logits, batches, len(run.index.val.paths), run.numbers, run.config.data.on_bad_image == "skip")
