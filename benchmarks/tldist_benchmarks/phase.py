"""A training phase that a bench keeps alive: tldist's own, begun and stepped by the code that trains."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tldist import dist
from tldist.config import (
    CacheConfig,
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    ModelConfig,
    ModelName,
    OptimConfig,
    RunConfig,
    StrategyConfig,
    StrategyName,
    TrackingConfig,
    TrainConfig,
    UserError,
)
from tldist.train.fit import train_epoch
from tldist.train.inputs.inputs import open_inputs
from tldist.train.metrics import Window
from tldist.train.phase import begin_phase
from tldist.train.resume import FitResult
from tldist.train.run import Run
from tldist_benchmarks.plain import CLIP_NORM, LABEL_SMOOTHING

HEAD, PARTIAL = 1, 2
"""Stages that train, counted from the output: the head; the last stage of the trunk as well."""


@dataclass(frozen=True)
class Training:
    """What a phase trains, and how."""

    model: ModelName
    image_size: int
    batch_size: int
    """Of a step, over all workers."""
    precision: Literal["bf16", "fp32"]
    compile: Literal["on", "off", "graphs"]
    strategy: StrategyName = "full"
    cached: bool = False
    engine: Literal["auto", "ddp", "zero1", "zero2", "zero3"] = "auto"

    def config(self, run_dir: Path) -> RunConfig:
        """The same optimizer, loss and pictures as the plain loop's; a line of metrics at an epoch's end alone."""
        return RunConfig(
            recipe="bench",
            run_dir=str(run_dir),
            model=ModelConfig(name=self.model, weights="none"),
            strategy=StrategyConfig(name=self.strategy, trainable_stages=PARTIAL),
            data=DataConfig(
                root=str(run_dir),
                batch_size=self.batch_size,
                image_size=self.image_size,
                augment="none",
                loader="torchvision",
                threads=1,
            ),
            optim=OptimConfig(schedule="constant", warmup_epochs=0.0, clip_norm=CLIP_NORM),
            train=TrainConfig(precision=self.precision, compile=self.compile, label_smoothing=LABEL_SMOOTHING),
            cache=CacheConfig(features="exact" if self.cached else "off"),
            checkpoint=CheckpointConfig(minutes=0),
            engine=EngineConfig(kind=self.engine),
            tracking=TrackingConfig(wandb="disabled", log_every=10**9),
        )


def check_training(model: ModelName, image_size: int, batch_size: int) -> None:
    """Raise UserError for what cannot be trained."""
    if batch_size < 2:
        raise UserError(f"--batch-size is {batch_size} for a worker: BatchNorm in train mode needs 2 images or more")
    if image_size < 32:
        raise UserError(f"--image-size is {image_size}: the networks need 32 or more")
    if model.startswith("vit") and image_size % 16:
        raise UserError(f"--image-size {image_size} does not divide into 16-pixel patches: use a multiple")


class Phase:
    """A tldist strategy's first phase, kept alive, and stepped by the real loop."""

    def __init__(self, run: Run) -> None:
        self.run, self.result = run, FitResult()
        self.images = len(run.index.train)
        self.live = begin_phase(run, 0, self.result.state)
        if run.config.cache.views and not self.live.inputs.cached:
            raise UserError(f"no room for cached features in {tempfile.gettempdir()}: name another folder by TMPDIR")
        while not self.live.clock.phase.images:  # the clock leaves a phase's first steps out
            self.epoch()

    def epoch(self) -> tuple[Window, float]:
        """One pass over the images: what the run's own clock counted, and the seconds of all of it."""
        before, started = self.live.clock.phase, time.perf_counter()
        train_epoch(self.run, self.live, self.result)  # ends by reading the loss: the device is done
        wall_s, after = time.perf_counter() - started, self.live.clock.phase
        self.result.state.epoch += 1
        return Window(after.images - before.images, after.seconds - before.seconds), wall_s

    def step(self) -> dict[str, float]:
        """Milliseconds of a step over an epoch, begun by all workers together: by the run's own clock, and of this
        process's CPU time, which other processes leave alone."""
        dist.barrier()
        worked = time.process_time()
        window, _ = self.epoch()
        cpu_ms = (time.process_time() - worked) * 1e3 / self.run.steps_per_epoch
        return {"step_ms": window.seconds * 1e3 * self.run.config.data.batch_size / window.images, "cpu_ms": cpu_ms}

    def turn(self, epochs: int = 1) -> dict[str, float]:
        """So many epochs of images in memory."""
        passes = [self.epoch() for _ in range(epochs)]
        window = sum((window for window, _ in passes), Window())
        wall_s = sum(seconds for _, seconds in passes)
        return {"images_per_s": window.images_per_s, "epoch_s_per_image": wall_s / (epochs * self.images)}

    def cached_turn(self, epochs: int = 1) -> dict[str, float]:
        """Fill the cache anew, then so many epochs from it."""
        self.live.inputs.close()
        frozen, _ = self.run.model.cut(self.run.plan.cut(0))
        self.live.inputs = open_inputs(self.run, frozen, self.live.prefix)
        fill_s = self.live.inputs.fill_s
        return {"fill_s": fill_s, "fill_images_per_s": self.images / fill_s, **self.turn(epochs)}

    @contextmanager
    def engine_as(self, engine: Any) -> Iterator[None]:
        """The loop steps `engine` meanwhile, which hands on to the phase's own."""
        own, self.live.engine = self.live.engine, engine
        try:
            yield
        finally:
            self.live.engine = own

    def close(self) -> None:
        """End it as the loop ends a phase."""
        self.live.engine.close()
        self.live.inputs.close()
        self.run.saver.close()
