"""Exact evaluation: every image once, on any number of workers, and proof of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_confusion_matrix

from tldist import dist
from tldist.data.source.index import Split
from tldist.engine.base import Numerics
from tldist.train.calibration import fit_temperature


@dataclass(frozen=True)
class Evaluation:
    """Per image, in the split's order; equal on all workers."""

    ids_N: Tensor
    """Positions in the split: all of them, but for images that could not be read."""
    labels_N: Tensor
    predicted_N: Tensor
    confidence_N: Tensor
    loss_N: Tensor
    temperature: float = 1.0
    """Under which the confidences fit these images best (calibration.py)."""

    @property
    def right_N(self) -> Tensor:
        """Which images' most probable class is their label."""
        return self.predicted_N == self.labels_N

    @property
    def top1(self) -> float:
        """Share of images whose most probable class is their label."""
        return self.right_N.double().mean().item()

    @property
    def loss(self) -> float:
        """Mean cross-entropy, without label smoothing."""
        return self.loss_N.mean().item()


@torch.no_grad()
def evaluate(
    logits_of: Callable[[Any], Tensor],
    batches: Iterable[Any],
    images: int,
    numbers: Numerics,
    may_miss: bool = False,
) -> Evaluation:
    """`batches` have `labels_N` and `ids_N`; `logits_of` makes logits_NC of one, by a network in eval mode.

    Raises RuntimeError unless the workers together saw each of the split's `images` exactly once (`may_miss`: at most
    once, and at least one).
    """
    rows = [torch.zeros(0, 5, dtype=torch.float64, device=numbers.device)]
    seen: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        with numbers.autocast():
            logits = logits_of(batch).float()
        confidence, predicted = logits.softmax(dim=1).max(dim=1)
        loss = F.cross_entropy(logits, batch.labels_N, reduction="none")
        ids = torch.from_numpy(batch.ids_N).to(logits.device, non_blocking=True)
        columns = [t.double() for t in (ids, batch.labels_N, predicted, confidence, loss)]
        rows.append(torch.stack(columns, dim=1))
        seen.append((logits, batch.labels_N))
    gathered = dist.gather_rows(torch.cat(rows)).cpu()
    gathered = gathered[gathered[:, 0].argsort()]
    ids = gathered[:, 0].long()
    expected = ids.unique() if may_miss and len(ids) else torch.arange(images)
    if not torch.equal(ids, expected):
        raise RuntimeError(f"evaluation saw {len(gathered)} images, not each of the {images} exactly once")
    _, labels, predicted, confidence, loss = gathered.unbind(1)
    temperature = fit_temperature(seen, numbers.device)
    return Evaluation(ids, labels.long(), predicted.long(), confidence, loss, temperature)


def predictions(evaluation: Evaluation, split: Split, classes: tuple[str, ...], samples: int = 24) -> dict[str, Any]:
    """Confusion matrix (row: label, column: prediction), and images to look at: worst mistakes, then hits."""
    c = len(classes)
    confusion = multiclass_confusion_matrix(evaluation.predicted_N, evaluation.labels_N, num_classes=c)
    wrong = evaluation.predicted_N != evaluation.labels_N
    score = evaluation.confidence_N + wrong.double()  # every mistake before every hit, the surest first
    worst = score.argsort(descending=True, stable=True)
    mistakes = worst[: int(wrong.sum())][: samples * 2 // 3].tolist()
    hits = worst[int(wrong.sum()) :][: samples - len(mistakes)].tolist()
    return {
        "classes": list(classes),
        "confusion_CC": confusion.tolist(),
        "samples": [
            {
                "path": split.paths[int(evaluation.ids_N[i])],
                "label": int(evaluation.labels_N[i]),
                "predicted": int(evaluation.predicted_N[i]),
                "confidence": round(float(evaluation.confidence_N[i]), 4),
            }
            for i in mistakes + hits
        ],
    }
