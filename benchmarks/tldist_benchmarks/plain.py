"""What tldist is compared with: the training loop of the lecture (8.1, step 4) around torchvision's own model."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import torchvision
from torch import Tensor, nn

from tldist.config import ModelConfig, ModelName, OptimConfig
from tldist.models import backbones
from tldist_benchmarks.harness import synchronize
from tldist_benchmarks.pool import CLASSES, Pool, draw_pool

LABEL_SMOOTHING, CLIP_NORM = 0.1, 1.0
"""The lecture's, and tldist's defaults."""


class PlainLoop:
    """zero_grad, forward, loss, backward, clip, step, loss.item(): in train mode, as the lecture writes it."""

    def __init__(
        self, model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], autocast: torch.dtype | None
    ) -> None:
        self.model, self.batches, self.autocast = model, batches, autocast
        self.device = batches[0][0].device
        self.criterion = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
        trained = [p for p in model.parameters() if p.requires_grad]
        optim = OptimConfig()
        self.optimizer = torch.optim.AdamW(trained, lr=optim.base_lr, weight_decay=optim.weight_decay)

    def epoch(self) -> float:
        """One pass over the batches; returns the seconds."""
        synchronize(self.device)
        started = time.perf_counter()
        self.model.train()
        running_loss = 0.0
        for images, labels in self.batches:
            running_loss += self._step(images, labels) * len(images)
        synchronize(self.device)
        return time.perf_counter() - started

    def _step(self, images: Tensor, labels: Tensor) -> float:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            loss = self.criterion(self.model(images), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=CLIP_NORM)
        self.optimizer.step()
        return loss.item()


@dataclass(frozen=True)
class PlainSpec:
    """What a plain loop trains, and on what."""

    model: ModelName
    image_size: int
    trained_stages: int
    steps: int
    batch_size: int
    channels_last: bool
    autocast: torch.dtype | None

    def loop(self, pool: Pool) -> PlainLoop:
        """The loop over the pool's first images, on the pool's device."""
        memory = torch.channels_last if self.channels_last else torch.contiguous_format
        model = plain_model(self.model, self.image_size, self.trained_stages).to(pool.labels_N.device)
        model.to(memory_format=memory)  # type: ignore[call-overload]
        return PlainLoop(model, pool.batches(self.steps, self.batch_size, memory), self.autocast)


class PlainProcess:
    """A plain loop in a process of its own, as a script would run it: with the memory allocator's own settings."""

    def __init__(self, spec: PlainSpec) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tldist_benchmarks.plain"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, spec, torch.get_num_threads()), daemon=True)
        self._process.start()
        theirs.close()

    def epoch(self) -> float:
        """One pass over the batches; returns the seconds."""
        self._pipe.send("epoch")
        return self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(timeout=10)


def _serve(pipe: Connection, spec: PlainSpec, threads: int) -> None:
    torch.set_num_threads(threads)
    loop = spec.loop(draw_pool(spec.steps * spec.batch_size, spec.image_size, torch.device("cpu")))
    with contextlib.suppress(EOFError):
        while pipe.recv():
            pipe.send(loop.epoch())


def plain_model(name: ModelName, image_size: int, trained_stages: int) -> nn.Module:
    """torchvision's model, frozen but for its last stages by `requires_grad=False` alone."""
    extra = {"image_size": image_size} if name.startswith("vit") else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **extra)
    trained = _trained_names(name, trained_stages)
    for theirs, parameter in model.named_parameters():
        parameter.requires_grad_(theirs in trained)
    return model


def _trained_names(name: ModelName, trained_stages: int) -> set[str]:
    """torchvision's names of what the last stages hold."""
    with torch.device("meta"):
        staged = backbones.build(
            ModelConfig(name=name, weights="none"), CLASSES, image_size=224, seed=0, pretrained=False
        )
    last = backbones.stage_names(name)[-trained_stages:]
    return {theirs for ours, theirs in staged.torchvision_names.items() if ours.split(".", 1)[0] in last}
