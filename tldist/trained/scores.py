"""How good a finished model is, and how much its confidences are worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)

from tldist.train.calibration import fit_temperature
from tldist.trained.model import Classifier, Judged

BATCH = 1024
"""Images whose logits are looked at together in fp64."""
BINS = 15
"""Of the expected calibration error, as in Guo et al. (2017)."""


@dataclass(frozen=True)
class ClassScore:
    """One class; None where it has no images, or was never predicted."""

    name: str
    images: int
    predicted: int
    """Images taken for it."""
    recall: float | None
    precision: float | None


@dataclass(frozen=True)
class Scores:
    """Over all images; calibration as the temperature leaves it."""

    images: int
    top1: float
    top5: float | None
    """None with five classes or fewer, where it is 1."""
    mean_recall: float
    """Over the classes that have images."""
    loss: float
    loss_calibrated: float
    """Mean cross-entropy, without and with the model's temperature."""
    ece: float
    ece_calibrated: float
    """Expected calibration error (Guo et al., 2017, eq. 3): how far confidence and accuracy lie apart, on average."""
    temperature: float | None
    best_temperature: float
    """The one that fits these images best."""
    classes: tuple[ClassScore, ...]


def logits_and_labels(
    classifier: Classifier, judged: Judged, batch_size: int, progress: Callable[[int, int], None] | None = None
) -> tuple[Tensor, Tensor]:
    """logits_NC and labels_N of all images that can be read."""
    logits, labels = [], []
    for batch in judged.batches(classifier.card, batch_size, classifier.device):
        logits.append(classifier.logits(batch.images_NHWC))
        labels.append(batch.labels_N.cpu())
        if progress:
            progress(sum(map(len, labels)), len(judged.split))
    return torch.cat(logits), torch.cat(labels)


def scores(logits_NC: Tensor, labels_N: Tensor, classes: tuple[str, ...], temperature: float | None) -> Scores:
    """Of a model with `classes`, whose confidences are softmax(logits / temperature)."""
    c = len(classes)
    before, after = logits_NC, logits_NC / (temperature or 1.0)
    confusion_CC = multiclass_confusion_matrix(logits_NC.argmax(dim=1), labels_N, num_classes=c)
    each = tuple(_class_score(name, i, confusion_CC) for i, name in enumerate(classes))
    recalls = [score.recall for score in each if score.recall is not None]
    return Scores(
        images=len(labels_N),
        top1=(logits_NC.argmax(dim=1) == labels_N).double().mean().item(),
        top5=multiclass_accuracy(logits_NC, labels_N, num_classes=c, top_k=5, average="micro").item()
        if c > 5
        else None,
        mean_recall=sum(recalls) / len(recalls),
        loss=F.cross_entropy(before, labels_N).item(),
        loss_calibrated=F.cross_entropy(after, labels_N).item(),
        ece=_ece(before, labels_N),
        ece_calibrated=_ece(after, labels_N),
        temperature=temperature,
        best_temperature=fit_temperature(
            list(zip(logits_NC.split(BATCH), labels_N.split(BATCH), strict=True)), logits_NC.device
        ),
        classes=each,
    )


def _ece(logits_NC: Tensor, labels_N: Tensor) -> float:
    c = logits_NC.shape[1]
    return multiclass_calibration_error(
        logits_NC.softmax(dim=1), labels_N, num_classes=c, n_bins=BINS, norm="l1"
    ).item()


def _class_score(name: str, i: int, confusion_CC: Tensor) -> ClassScore:
    right, images, predicted = (int(n) for n in (confusion_CC[i, i], confusion_CC[i].sum(), confusion_CC[:, i].sum()))
    return ClassScore(
        name, images, predicted, right / images if images else None, right / predicted if predicted else None
    )
