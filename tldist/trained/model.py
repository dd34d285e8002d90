"""What a run left for use: its best model, what a user must know of it, and the images it was judged by."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tldist import config, dist
from tldist.checkpoints import checkpoint
from tldist.config import ModelConfig, UserError
from tldist.data.batches import Worker, eval_batches
from tldist.data.load.bad_images import BadImages
from tldist.data.load.loader import Batch
from tldist.data.load.torchvision_loader import TorchvisionLoader
from tldist.data.presets import AugmentSpec
from tldist.data.source.index import Split, build_index, load_index
from tldist.models import backbones
from tldist.models.backbones import StagedModel
from tldist.models.prefix import Prefix
from tldist_kernels import mix_normalize


@dataclass(frozen=True)
class Card:
    """What a user of a model must know; it travels inside exported files."""

    model: str
    """torchvision's name of the backbone."""
    head: str
    classes: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    """Of pixels scaled to [0, 1], as `std`."""
    std: tuple[float, ...]
    temperature: float | None
    """Confidences are softmax(logits / temperature); None: nothing was fitted."""
    weights_sha256: str
    """Of model.safetensors."""
    epoch: int
    val_top1: float

    def to_json(self) -> str:
        """For `from_json`."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Card:
        """Raises ValueError, KeyError or TypeError for anything but a card."""
        told = json.loads(text)
        return cls(**{**told, **{name: tuple(told[name]) for name in ("classes", "mean", "std")}})

    def confidences(self, logits_NC: Tensor) -> Tensor:
        """Calibrated probabilities."""
        return (logits_NC / (self.temperature or 1.0)).softmax(dim=1)


class Classifier(Protocol):
    """A model in whatever form."""

    @property
    def card(self) -> Card:
        """What it is."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it wants its images."""
        ...

    def logits(self, images_NHWC: Tensor) -> Tensor:
        """uint8 squares of `card.image_size` on `device` -> float32 logits_NC, on the host."""
        ...


@dataclass(frozen=True)
class Trained:
    """The best model of a run, in eval mode, in fp32, as its checkpoint has it."""

    card: Card
    model: StagedModel

    def classifier(self, device: torch.device) -> Classifier:
        """For speed: BatchNorm folded, channels_last."""
        return _Folded(self, device)


class _Folded:
    def __init__(self, trained: Trained, device: torch.device) -> None:
        self.card, self.device = trained.card, device
        self._network = Prefix(trained.model.to(device), torch.float32)

    @torch.no_grad()
    def logits(self, images_NHWC: Tensor) -> Tensor:
        """On the host."""
        x = mix_normalize(images_NHWC, self.card.mean, self.card.std, torch.float32)
        return self._network(x).cpu()


def open_run(run_dir: Path) -> Trained:
    """The best model of a run.

    Raises UserError where `run_dir` is no run with a checkpoint, DamagedCheckpoint where a file is not what was
    written.
    """
    if not (run_dir / "checkpoints" / "best").exists():
        hint = "it has no checkpoint yet" if (run_dir / "config.yaml").exists() else "it has no checkpoints/best"
        raise UserError(f"{run_dir} is no run with a model ({hint}): give the folder that a run printed as `run:`")
    folder = checkpoint.best(run_dir / "checkpoints")
    card = _card_of(folder)
    described = ModelConfig(name=card.model, weights="none", head=card.head)  # type: ignore[arg-type]
    model = backbones.build(described, len(card.classes), card.image_size, seed=0, pretrained=False)
    model.load_torchvision_state(checkpoint.read_weights(folder))
    return Trained(card, model.eval().requires_grad_(False))


def _card_of(folder: Path) -> Card:
    told = json.loads((folder / "state.json").read_text())
    calibration = folder / "calibration.json"
    fitted: dict[str, Any] = json.loads(calibration.read_text()) if calibration.exists() else {}
    return Card(
        told["model"],
        told["head"],
        tuple(told["classes"]),
        told["image_size"],
        tuple(told["mean"]),
        tuple(told["std"]),
        fitted.get("temperature"),
        checkpoint.digests(folder)["model.safetensors"],
        told["epoch"],
        told["val_top1"],
    )


@dataclass(frozen=True)
class Judged:
    """Images with labels that are positions in `Card.classes`."""

    root: Path
    split: Split
    skip_bad: bool = False
    """Go on without images that cannot be read."""

    def batches(self, card: Card, batch_size: int, device: torch.device) -> Iterator[Batch]:
        """As evaluation shows them, each once. Raises DecodeError for an image that cannot be read."""
        loader = TorchvisionLoader(
            self.root, AugmentSpec(), card.image_size, dist.cores(), device, BadImages(self.skip_bad)
        )
        try:
            yield from loader.batches(eval_batches(self.split, card.image_size, batch_size, Worker(0, 1)))
        finally:
            loader.close()

    def spread(self, images: int) -> Judged:
        """At most so many, evenly spread over the split."""
        if len(self.split) <= images:
            return self
        return dataclasses.replace(self, split=self.split.take(np.linspace(0, len(self.split) - 1, images).astype(int)))


def validation_images(run_dir: Path, card: Card, root: str = "") -> Judged:
    """The validation split that the run used; with `root`, that of other data with classes of the model.

    Raises UserError.
    """
    if root:
        index = build_index(root)
    else:
        index = load_index(run_dir / "index.json")
        if not Path(index.root).is_dir():
            raise UserError(f"the images of {run_dir} are no longer at {index.root}: say where with --data.root")
    if unknown := [name for name in index.classes if name not in card.classes]:
        raise UserError(
            f"class '{unknown[0]}' of {index.root} is none of the model's ({_named(card.classes)}): give data with its "
            "classes"
        )
    position_C = np.array([card.classes.index(name) for name in index.classes])
    split = dataclasses.replace(index.val, labels_N=position_C[index.val.labels_N])
    return Judged(Path(index.root), split, config.load(run_dir / "config.yaml").data.on_bad_image == "skip")


def _named(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
