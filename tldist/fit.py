"""The loop: phases, epochs, steps. It runs every strategy on every engine and knows none of them by name."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tldist import checkpoint, dist
from tldist.backbones import IMAGE_MEAN, IMAGE_STD, Segment, StagedModel
from tldist.checkpoint import TrainState
from tldist.config import RunConfig
from tldist.data.augment import PRESETS
from tldist.data.batches import Worker, eval_batches, steps_per_epoch, train_batches
from tldist.data.index import Index
from tldist.data.loader import Batch, Loader
from tldist.data.mixing import Mix, draw_mix, mixed_targets, step_generator
from tldist.engine import Engine, Numerics, build_engine
from tldist.evaluate import Evaluation, evaluate
from tldist.metrics import ThroughputClock, TrainMeter, Window, peak_memory_gib
from tldist.objectives.supervised import Supervised
from tldist.optim import schedule_factor
from tldist.plan import Phase, Plan
from tldist.prefix import Prefix
from tldist.tracking.events import EventLog
from tldist_kernels import mix_normalize


@dataclass(frozen=True)
class Run:
    """The parts of a run, as `worker.run` builds them."""

    config: RunConfig
    plan: Plan
    model: StagedModel
    index: Index
    train_loader: Loader
    eval_loader: Loader
    numbers: Numerics
    log: EventLog
    run_dir: Path

    @property
    def worker(self) -> Worker:
        """This worker's place among all."""
        return Worker(dist.rank(), dist.world_size())

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return steps_per_epoch(len(self.index.train.paths), self.config.data.batch_size)


@dataclass
class LivePhase:
    """What exists while one phase runs: the cut model, its engine, its clock."""

    index: int
    phase: Phase
    prefix: Prefix
    network: Segment
    engine: Engine
    clock: ThroughputClock
    meter: TrainMeter

    def logits(self, images_NCHW: Tensor) -> Tensor:
        """The whole model, for evaluation."""
        return self.network(self.prefix(images_NCHW))


@dataclass
class FitResult:
    """What the loop leaves behind for the summary and the report."""

    state: TrainState = field(default_factory=TrainState)
    windows: list[Window] = field(default_factory=list)
    best: Evaluation | None = None
    replica_spread: float = 0.0


def fit(run: Run) -> FitResult:
    """Run the plan from its first phase to its last."""
    result = FitResult()
    for index in range(len(run.plan.phases)):
        run_phase(run, index, result)
    return result


def run_phase(run: Run, index: int, result: FitResult) -> None:
    """One phase, from its cut to its last epoch; what it held is freed on return, but for what `result` keeps."""
    live = begin_phase(run, index, result)
    for _ in range(live.phase.epochs):
        train_epoch(run, live, result.state)
        end_epoch(run, live, result)
    live.engine.close()
    result.windows.append(live.clock.phase)


def begin_phase(run: Run, index: int, result: FitResult) -> LivePhase:
    """Cut the model, build a new engine around the live suffix, and carry optimizer state over by name."""
    phase = run.plan.phases[index]
    freeze(run.model, phase)
    result.replica_spread = dist.replica_spread(run.model.state_dict())
    frozen, network = run.model.cut(run.plan.cut(index))
    prefix = Prefix(frozen, run.numbers.dtype)
    objective = Supervised(network, run.config.train.label_smoothing)
    engine = build_engine(run.config.engine, objective, phase, run.config.optim, run.numbers)
    engine.load_optimizer_state(result.state.optimizer)
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    run.log.write(
        "phase",
        phase=index,
        name=phase.name,
        epoch=result.state.epoch,
        step=result.state.step,
        trainable_params=trainable,
    )
    device = run.numbers.device
    return LivePhase(index, phase, prefix, network, engine, ThroughputClock(device), TrainMeter(device))


def freeze(model: StagedModel, phase: Phase) -> None:
    """Gradients for the phase's stages and no others; only ever called between engines."""
    for name, stage in model.stages.items():
        stage.requires_grad_(name in phase.trainable)


def set_modes(network: Segment, phase: Phase, batchnorm: str) -> None:
    """Train mode for stages that train; frozen ones are in eval mode, as is BatchNorm where the plan says so."""
    for name, stage in network.stages.items():
        stage.train(name in phase.trainable)
        if batchnorm == "eval":
            for module in stage.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()


def moved_statistics(network: Segment) -> list[Tensor]:
    """Running means and variances of the BatchNorm layers in train mode: each worker's saw other images."""
    return [
        statistic
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        for statistic in (module.running_mean, module.running_var)
        if statistic is not None
    ]


def train_epoch(run: Run, live: LivePhase, state: TrainState) -> None:
    """One pass over the training images."""
    config, steps = run.config, run.steps_per_epoch
    set_modes(live.network, live.phase, config.train.batchnorm)
    plans = train_batches(
        run.index.train,
        PRESETS[config.data.augment],
        config.data.image_size,
        config.data.batch_size,
        config.seed,
        state.epoch,
        run.worker,
    )
    live.clock.start()
    for epoch_step, batch in enumerate(_timed(run.train_loader.batches(plans), live.clock), start=1):
        train_step(run, live, state.step, batch)
        state.step += 1
        live.clock.step(config.data.batch_size)
        if epoch_step % config.tracking.log_every == 0 or epoch_step == steps:
            log_training(run, live, state, epoch_step)


def _timed(batches: Iterator[Batch], clock: ThroughputClock) -> Iterator[Batch]:
    """Hand batches on, telling the clock how long each kept the step waiting."""
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        clock.waited(time.perf_counter() - asked)
        if batch is None:
            return
        yield batch


def train_step(run: Run, live: LivePhase, step: int, batch: Batch) -> None:
    """Mix, normalise, prefix, forward, backward, step; nothing here waits for the device.

    All randomness of the step (mixing, dropout) is seeded from (seed, step, rank).
    """
    generator = step_generator(run.numbers.device, run.config.seed, step, run.worker.rank)
    torch.manual_seed(generator.initial_seed())
    mix = draw_mix(run.config.data, len(batch.labels_N), generator)
    targets = mixed_targets(batch.labels_N, mix)
    features = live.prefix(to_input(batch.images_NHWC, run.numbers.dtype, mix))
    output = live.engine.forward_backward(features, targets)
    live.engine.step(schedule_factor(run.config.optim, run.plan, live.index, step, run.steps_per_epoch))
    live.meter.update(output, targets)


def to_input(images_NHWC: Tensor, dtype: torch.dtype, mix: Mix | None = None) -> Tensor:
    """uint8 NHWC -> the network's input: normalised, mixed, channels_last NCHW in `dtype`."""
    if mix is None:
        return mix_normalize(images_NHWC, IMAGE_MEAN, IMAGE_STD, dtype)
    return mix_normalize(
        images_NHWC,
        IMAGE_MEAN,
        IMAGE_STD,
        dtype,
        partner_N=mix.partner_N,
        weight_N=mix.weight_N,
        boxes_N4=mix.boxes_N4,
    )


def log_training(run: Run, live: LivePhase, state: TrainState, epoch_step: int) -> None:
    """One line of metrics: one all-reduce, one copy to the host. Memory is this worker's; the summary has all."""
    loss, top1 = live.meter.read()
    window = live.clock.stop()
    factor = schedule_factor(run.config.optim, run.plan, live.index, state.step - 1, run.steps_per_epoch)
    run.log.write(
        "train",
        step=state.step,
        epoch=state.epoch,
        epoch_step=epoch_step,
        phase=live.index,
        loss=loss,
        top1=top1,
        lr={stage: run.config.optim.base_lr * m * factor for stage, m in live.phase.multiples},
        images_per_s=round(window.images_per_s, 1),
        data_wait_share=round(window.data_wait_share, 4),
        peak_mem_gib=round(peak_memory_gib(run.numbers.device), 3),
    )
    live.clock.start()


def end_epoch(run: Run, live: LivePhase, result: FitResult) -> None:
    """Agree on BatchNorm statistics, prove that replicas agree, evaluate, save."""
    state = result.state
    state.epoch += 1
    dist.average_(moved_statistics(live.network))
    result.replica_spread = dist.replica_spread(run.model.state_dict())
    evaluation = evaluate_model(run, live)
    state.val_top1 = evaluation.top1
    is_best = state.val_top1 > state.best_val_top1
    if is_best:
        state.best_val_top1, state.best_epoch, result.best = state.val_top1, state.epoch, evaluation
    state.optimizer = {**state.optimizer, **live.engine.optimizer_state()}
    save_checkpoints(run, state, is_best)
    run.log.write(
        "eval",
        epoch=state.epoch,
        step=state.step,
        phase=live.index,
        val_loss=evaluation.loss,
        val_top1=state.val_top1,
        best_val_top1=state.best_val_top1,
        replica_spread=result.replica_spread,
    )


def evaluate_model(run: Run, live: LivePhase) -> Evaluation:
    """The whole model on the validation split, each image once."""
    live.network.eval()
    split = run.index.val
    share = run.config.data.batch_size // run.worker.world_size
    plans = eval_batches(split, run.config.data.image_size, share, run.worker)
    batches = run.eval_loader.batches(plans)
    return evaluate(live.logits, batches, lambda x: to_input(x, run.numbers.dtype), len(split.paths), run.numbers)


def save_checkpoints(run: Run, state: TrainState, is_best: bool) -> None:
    """checkpoints/last, and checkpoints/best when this epoch is the best so far."""
    if not dist.is_main():
        return
    names = ("last", "best") if is_best else ("last",)
    folder = run.run_dir / "checkpoints"
    checkpoint.save(folder, names, run.model.torchvision_state(), state, describe_model(run))


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
