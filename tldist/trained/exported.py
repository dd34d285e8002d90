"""Model files that `tldist export` wrote, read back: what they say of themselves, and what they compute."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tldist import dist
from tldist.config import UserError
from tldist.trained.model import Card
from tldist_kernels import mix_normalize

CARD = "tldist"
"""The key under which a file holds its card as JSON."""
INPUT, IMAGES = "image", "images"
"""Name of the input: normalised float32 NCHW, or uint8 NHWC where the preprocessing is inside."""
OUTPUTS = ("logits", "probabilities")
SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}

Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Exported:
    """A file's model, on the CPU."""

    device = torch.device("cpu")

    def __init__(self, card: Card, inside: bool, run: Run) -> None:
        """`inside`: the preprocessing is part of the file. `run`: the input -> (logits, probabilities)."""
        self.card, self.inside, self._run = card, inside, run

    def outputs(self, images_NHWC: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 squares -> (logits_NC, probabilities_NC) as the file computes them."""
        card = self.card
        x = images_NHWC if self.inside else mix_normalize(images_NHWC, card.mean, card.std, torch.float32).contiguous()
        logits, probabilities = self._run(x.numpy())
        return torch.from_numpy(logits), torch.from_numpy(probabilities)

    def logits(self, images_NHWC: Tensor) -> Tensor:
        """As `Classifier` wants them."""
        return self.outputs(images_NHWC)[0]


def open_exported(path: Path) -> Exported:
    """Raises UserError for a file that `tldist export` did not write, or without the packages that read it."""
    if not path.is_file():
        raise UserError(f"there is no file {path}: give a model that `tldist export` wrote, or a run directory")
    try:
        return _open_onnx(path) if path.suffix == SUFFIXES["onnx"] else _open_torch_export(path)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} does not say what it is (mean, std, size, class names): give a file that `tldist export` wrote"
        ) from error


def need(*packages: str) -> None:
    """Raises UserError, with what to install, unless all are there."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(f"ONNX files need what is not installed here: pip install {' '.join(missing)}")


def _open_onnx(path: Path) -> Exported:
    need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = dist.cores()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes, one for each cause
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from error
    card = Card.from_json(session.get_modelmeta().custom_metadata_map[CARD])
    (name,) = (entry.name for entry in session.get_inputs())

    def run(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, probabilities = session.run(list(OUTPUTS), {name: x})
        return np.asarray(logits), np.asarray(probabilities)

    return Exported(card, name == IMAGES, run)


def _open_torch_export(path: Path) -> Exported:
    texts = {CARD: "", IMAGES: ""}
    try:
        program = torch.export.load(path, extra_files=texts).module()
    except Exception as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from error

    @torch.no_grad()
    def run(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, probabilities = program(torch.from_numpy(x))
        return logits.numpy(), probabilities.numpy()

    return Exported(Card.from_json(_text(texts[CARD])), _text(texts[IMAGES]) == "inside", run)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
