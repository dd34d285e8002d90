"""A run's best model as a file for other programs, proven on real images to compute the same.

What a file holds: the network in fp32 with a dynamic batch, calibrated probabilities beside the logits, and a
description of itself: class names, and how an image becomes an input. What it was proven on is never random numbers:
the run's own validation photos, read from disk.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tldist
from tldist.data.augment import short_side
from tldist.data.load.decode import read_rgb
from tldist.data.load.loader import Batch
from tldist.data.load.torchvision_loader import evaluation_resized
from tldist.trained.exported import CARD, IMAGES, INPUT, OUTPUTS, Exported, need, open_exported
from tldist.trained.model import Card, Judged, Trained
from tldist_kernels import mix_normalize
from tldist_kernels.mixing import affine

OPSET = 18
"""ONNX's operator set: 18 is of December 2022, and ONNX Runtime 1.14 and later read it."""
TOLERANCE = 1e-3
"""Largest difference of a logit between torch and the file, both in fp32."""
PROOF_IMAGES = 1000
"""Most validation images that the proof looks at, evenly spread over the split."""

Progress = Callable[[int, int], None]
"""Called with (images compared, images in all)."""


class NotTheSame(RuntimeError):  # noqa: N818 - it states a fact of the file
    """An exported file does not compute what the model does, and was deleted."""


@dataclass(frozen=True)
class Parity:
    """torch's plain model against the file, over `images`."""

    images: int
    largest_difference: float
    """Of a logit."""
    largest_logit: float
    """What that is to be seen against."""
    equal_top1: int
    """Images with the same most probable class. Where every logit differs by d at most, another class can only win
    where the two best are within 2d of each other: a tie."""


class Deployed(nn.Module):
    """What a file computes: normalised float32 images_NCHW -> (logits_NC, calibrated probabilities_NC).

    `preprocess`: uint8 RGB images_NHWC instead, of any height and width from the network's on, all of a batch the
    same; their centre is cut out as evaluation does, then scaled and normalised.
    """

    scale_3: Tensor
    shift_3: Tensor

    def __init__(self, trained: Trained, preprocess: bool) -> None:
        super().__init__()
        card = trained.card
        scale, shift = affine(card.mean, card.std)
        self.register_buffer("scale_3", torch.tensor(scale), persistent=False)
        self.register_buffer("shift_3", torch.tensor(shift), persistent=False)
        self.network, self.preprocess, self.size = trained.model, preprocess, card.image_size
        self.temperature = card.temperature or 1.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both in fp32."""
        logits = self.network(self._normalised(x) if self.preprocess else x)
        return logits, (logits / self.temperature).softmax(dim=1)

    def _normalised(self, images_NHWC: Tensor) -> Tensor:
        # Rows by index, not a slice: a slice's guards would forbid that height and width stay open.
        rows = torch.arange(self.size) + _centre(images_NHWC.shape[1] - self.size)
        columns = torch.arange(self.size) + _centre(images_NHWC.shape[2] - self.size)
        square = images_NHWC.index_select(1, rows).index_select(2, columns)
        return (square.float() * self.scale_3 + self.shift_3).permute(0, 3, 1, 2)


def _centre(rest: Any) -> Any:
    """round(rest / 2), halves to the even number as `data.augment.evaluation_crop` rounds, in whole numbers."""
    half = rest // 2
    return half + (rest % 2) * (half % 2)


def export(
    trained: Trained,
    judged: Judged,
    out: Path,
    kind: str,
    preprocess: bool = False,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Parity:
    """Write `out` (kind: `onnx` or `torch_export`) and prove it; what stood there before stays until that is done.

    Args:
        judged: the images to compare on.
        preprocess: the file takes uint8 pixels.

    Raises:
        NotTheSame: a logit differs by more than TOLERANCE, or is not finite, or the file does not run; nothing is left
            behind.
        UserError: packages are missing.
    """
    if kind == "onnx":
        need("onnx", "onnxscript", "onnxruntime")
    judged = judged.spread(PROOF_IMAGES)
    draft = out.with_name(f".{out.stem}-{os.getpid()}{out.suffix}")
    try:
        _write(trained, draft, kind, preprocess)
        file = open_exported(draft)
        parity = compare(trained, file, judged, batch_size, progress)
        other = 1 if batch_size > 1 else 2  # all of `judged` may come in batches of one size
        again = compare(trained, file, judged.spread(other), other)
        parity = replace(parity, largest_difference=max(parity.largest_difference, again.largest_difference))
        judge(parity)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)
    return parity


def _write(trained: Trained, path: Path, kind: str, preprocess: bool) -> None:
    module = Deployed(trained, preprocess).eval()
    size, batch = trained.card.image_size, torch.export.Dim("batch", min=1, max=65535)
    shape, open_dims = (2, 3, size, size), {0: batch}
    if preprocess:
        height, width = (torch.export.Dim(name, min=size, max=65535) for name in ("height", "width"))
        shape, open_dims = (2, size + 5, size + 9, 3), {0: batch, 1: height, 2: width}
    example = torch.zeros(shape, dtype=torch.uint8 if preprocess else torch.float32)
    with _quiet():
        if kind == "torch_export":
            program = torch.export.export(module, (example,), dynamic_shapes=(open_dims,))
            about = description(trained.card, preprocess) | {IMAGES: "inside" if preprocess else "outside"}
            torch.export.save(program, path, extra_files=about)
            return
        written: Any = torch.onnx.export(
            module,
            (example,),
            dynamic_shapes=(open_dims,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[IMAGES if preprocess else INPUT],
            output_names=list(OUTPUTS),
            verbose=False,
        )
        written.model.metadata_props.update(description(trained.card, preprocess) | {"opset": str(OPSET)})
        written.save(path, external_data=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def description(card: Card, preprocess: bool) -> dict[str, str]:
    """A file's metadata: what a person would look for by its name, and the card for `open_exported`."""
    steps = preprocessing(card)
    inside = list(INSIDE) if preprocess else []
    told: dict[str, Any] = {
        "class_names": card.classes,
        "image_size": card.image_size,
        "mean": card.mean,
        "std": card.std,
        "resize_short_side": short_side(card.image_size),
        "interpolation": "bilinear, antialiased",
        "crop": "centre",
        "temperature": card.temperature,
        "preprocessing": steps,
        "preprocessing_inside": inside,
        "backbone": card.model,
        "weights_sha256": card.weights_sha256,
        "tldist_version": tldist.__version__,
    }
    return {CARD: card.to_json()} | {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in told.items()
    }


INSIDE = ("crop", "scale", "normalise", "layout")
"""Steps that `preprocess` puts into the file; the others need an image's bytes, or differ from image to image."""


def preprocessing(card: Card) -> dict[str, str]:
    """From a file on disk to the network's input: step -> what is done, in order."""
    size = card.image_size
    return {
        "decode": "8-bit RGB, turned upright by its EXIF orientation",
        "resize": f"short side to {short_side(size)} px, long side in proportion, rounded down; bilinear, antialiased, "
        "rounded to 8 bits",
        "crop": f"{size} x {size} px in the centre: top = round((height - {size}) / 2), halves to the even number",
        "scale": "divide by 255",
        "normalise": f"subtract mean {list(card.mean)}, divide by std {list(card.std)}",
        "layout": "NHWC to NCHW, float32",
    }


@torch.no_grad()
def compare(
    trained: Trained, file: Exported, judged: Judged, batch_size: int, progress: Progress | None = None
) -> Parity:
    """Over all of `judged`, in batches of `batch_size` and a smaller last one: on the CPU, both in fp32.

    A file that holds the preprocessing gets the pixels before it: resized, not yet cropped.
    """
    card, model = trained.card, trained.model.cpu()
    images, difference, logit, equal = 0, 0.0, 0.0, 0
    for batch in judged.batches(card, batch_size, torch.device("cpu")):
        wanted = model(mix_normalize(batch.images_NHWC, card.mean, card.std, torch.float32))
        found, probabilities = _outputs(file, judged, batch)
        gaps = [(found - wanted).abs().max(), (probabilities - card.confidences(wanted)).abs().max()]
        # NaN must not get lost in a maximum.
        difference = max(difference, *(float(gap) if gap.isfinite() else float("inf") for gap in gaps))
        logit = max(logit, float(wanted.abs().max()))
        equal += int((found.argmax(dim=1) == wanted.argmax(dim=1)).sum())
        images += len(wanted)
        if progress:
            progress(images, len(judged.split))
    return Parity(images, difference, logit, equal)


def _outputs(file: Exported, judged: Judged, batch: Batch) -> tuple[Tensor, Tensor]:
    if not file.inside:
        return _run(file, batch.images_NHWC)
    by_shape: dict[torch.Size, list[tuple[int, Tensor]]] = {}
    for i in range(len(batch.plan.paths)):
        image = evaluation_resized(read_rgb(batch.plan.place(judged.root, i)), file.card.image_size)
        by_shape.setdefault(image.shape, []).append((i, image.permute(1, 2, 0)))
    logits, probabilities = torch.empty(2, len(batch.plan.paths), len(file.card.classes)).unbind()
    for images in by_shape.values():
        rows = [i for i, _ in images]
        logits[rows], probabilities[rows] = _run(file, torch.stack([image for _, image in images]))
    return logits, probabilities


def _run(file: Exported, images_NHWC: Tensor) -> tuple[Tensor, Tensor]:
    try:
        return file.outputs(images_NHWC)
    except MemoryError:
        raise
    except Exception as error:  # onnxruntime's own classes; a program's, which knows other shapes
        raise NotTheSame(f"the file does not run, and was deleted: {' '.join(str(error).split())[:200]}") from error


def judge(parity: Parity) -> None:
    """Raises NotTheSame unless the file was proven."""
    if not parity.images:
        raise NotTheSame("there was no validation image to compare on, so nothing is proven: the file was deleted")
    if not parity.largest_difference <= TOLERANCE:
        raise NotTheSame(
            f"the file does not compute what the model does, and was deleted: over {parity.images} validation images "
            f"the largest difference is {parity.largest_difference:.2g} (allowed: {TOLERANCE:g}), "
            f"{parity.equal_top1} have the same top-1"
        )
