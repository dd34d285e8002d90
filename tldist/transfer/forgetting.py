"""Finished runs read back: their Fisher information, and what a later run's network still knows of their task.

A task is told by its run: images, classes, trunk and head. After another run has changed the trunk, the task's own
head is put on it again and its validation images are shown (task-incremental learning: at inference it is known which
task an image belongs to; van de Ven and Tolias, 2019).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tldist import config, dist
from tldist.checkpoints import checkpoint
from tldist.config import RunConfig, UserError
from tldist.data.batches import Worker, eval_batches
from tldist.data.load.loader import Batch
from tldist.data.load.open import open_loader
from tldist.data.presets import AugmentSpec
from tldist.data.source.index import Index, Split, load_index
from tldist.engine.base import numerics
from tldist.models import backbones
from tldist.models.backbones import HEAD, StagedModel
from tldist.objectives.ewc import FISHER_FILE, checkpoint_at, read_fisher
from tldist.train.evaluate import Evaluation, evaluate
from tldist.train.inputs.inputs import to_input
from tldist.transfer import fisher


@dataclass(frozen=True)
class Task:
    """A run that left a checkpoint; its network is in eval mode."""

    checkpoint: Path
    settings: RunConfig
    index: Index
    model: StagedModel

    def loaded(self, split: Split) -> Iterator[Batch]:
        """This worker's part of a split as evaluation shows it, each image once."""
        data, device = self.settings.data, next(self.model.parameters()).device
        worker = Worker(dist.rank(), dist.world_size())
        share = max(1, data.batch_size // worker.world_size)
        loader = open_loader(data, AugmentSpec(), share, device, in_shards=split.members is not None)
        try:
            yield from loader.batches(eval_batches(split, data.image_size, share, worker))
        finally:
            loader.close()

    def batches(self, split: Split) -> Iterator[tuple[Tensor, Batch]]:
        """The same with what the network takes: (images_NCHW in fp32, batch)."""
        for batch in self.loaded(split):
            yield to_input(batch.images_NHWC, torch.float32), batch

    def evaluate(self, model: StagedModel) -> Evaluation:
        """What a network, in eval mode, makes of the task's validation images, in fp32."""

        def logits(batch: Batch) -> Tensor:
            return model(to_input(batch.images_NHWC, torch.float32))

        numbers = numerics("fp32", next(model.parameters()).device)
        return evaluate(logits, self.loaded(self.index.val), len(self.index.val), numbers)


def read_task(place: Path, device: torch.device) -> Task:
    """A run directory (its best checkpoint) or a checkpoint in one. Raises UserError."""
    found = checkpoint_at(place)
    run_dir = found.parents[1]
    if (reason := checkpoint.damage(found)) is not None:
        raise UserError(f"the checkpoint {found} is damaged: {reason}")
    if not (run_dir / "config.yaml").is_file() or not (run_dir / "index.json").is_file():
        raise UserError(f"{found} is not in its run directory, whose config.yaml and index.json say what it was for")
    settings, index = config.load(run_dir / "config.yaml"), load_index(run_dir / "index.json")
    if not Path(settings.data.root).is_dir():
        raise UserError(f"the images of {run_dir} are no longer at {settings.data.root}: bring them back")
    model = backbones.build(
        settings.model, len(index.classes), settings.data.image_size, settings.seed, pretrained=False
    )
    model.load_torchvision_state(checkpoint.read_weights(found))
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Task(found, settings, index, model.eval())


# Fisher information


@dataclass(frozen=True)
class FisherJob:
    """What `compute` is asked for; it crosses to the workers as JSON."""

    place: str
    labels: fisher.Labels = "model"
    images: int = 0
    """How many training images to take, drawn by the run's seed; 0: all."""


def compute(job_json: str) -> None:
    """On each worker: the Fisher information of a checkpoint, written beside its weights by the main one."""
    job = FisherJob(**json.loads(job_json))
    torch.set_num_threads(max(1, dist.cores() // dist.local_workers()))
    device = dist.local_device()
    made_group = dist.init(device)
    try:
        task = read_task(Path(job.place), device)
        split = some(task.index.train, job.images, task.settings.seed)
        found, images = fisher.fisher(task.model, task.batches(split), len(split), job.labels, task.settings.seed)
        if dist.is_main():
            about = {"images": str(images), "labels": job.labels, "seed": str(task.settings.seed)}
            checkpoint.add(task.checkpoint, FISHER_FILE, found, about)
        dist.barrier()
    finally:
        if made_group:
            dist.close()


def some(split: Split, images: int, seed: int) -> Split:
    """So many of the images, drawn by the seed, in their order; 0, or more than there are: all."""
    if not 0 < images < len(split):
        return split
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, images])))
    return split.take(np.sort(rng.permutation(len(split))[:images]))


def shares(task: Task) -> dict[str, float]:
    """Each stage's part of the whole Fisher information (of its trace)."""
    information = read_fisher(task.checkpoint)
    of_stage = dict.fromkeys(task.model.stages, 0.0)
    for ours, theirs in task.model.torchvision_names.items():
        if theirs in information:
            of_stage[ours.split(".", 1)[0]] += float(information[theirs].double().sum())
    whole = sum(of_stage.values()) or 1.0
    return {stage: value / whole for stage, value in of_stage.items()}


# What is left


@dataclass(frozen=True)
class Kept:
    """Top-1 on an earlier task's validation images: as that task was left, and with the later run's trunk."""

    task: str
    val_images: int
    then: float
    now: float


def kept(later: Path, earlier: Path, device: torch.device) -> Kept:
    """What the network of `later` still knows of `earlier`. Raises UserError where the backbones differ."""
    task = read_task(earlier, device)
    then = task.evaluate(task.model).top1
    weights = checkpoint.read_weights(checkpoint_at(later))
    own = task.model.torchvision_state()
    for ours, theirs in task.model.torchvision_names.items():
        if ours.split(".", 1)[0] == HEAD:
            continue
        if theirs not in weights or weights[theirs].shape != own[theirs].shape:
            raise UserError(f"{later} and {earlier} are runs of different backbones: '{theirs}' does not fit")
        own[theirs] = weights[theirs]
    task.model.load_torchvision_state(own)
    return Kept(str(earlier), len(task.index.val), then, task.evaluate(task.model).top1)


def settings_for(place: Path, workers: str) -> RunConfig:
    """The config of a run directory, as far as its workers on Ray need it for `compute`. Raises UserError."""
    run_dir = checkpoint_at(place).parents[1]
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{place} is not in its run directory, whose config.yaml says what it was for")
    settings = config.load(run_dir / "config.yaml")
    return replace(settings, run_dir=str(run_dir), launch=config.LaunchConfig(workers=workers))
