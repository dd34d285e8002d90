"""Temperature scaling: the best temperature is found, in any cut of the images, and nothing spoils it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import run_ranks
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tldist import dist
from tldist.engine import numerics
from tldist.train import calibration
from tldist.train.calibration import HIGHEST, LOWEST
from tldist.train.evaluate import evaluate
from tldist.trained.scores import BATCH, scores


def fit_temperature(logits: Tensor, labels: Tensor, batch: int = BATCH) -> float:
    batches = list(zip(logits.split(batch), labels.split(batch), strict=True))
    return calibration.fit_temperature(batches, logits.device)


def drawn(temperature: float, images: int = 4000, classes: int = 7) -> tuple[Tensor, Tensor]:
    """Logits, and labels that are as probable as softmax(logits / temperature) says."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(images, classes, generator=generator)
    labels = torch.multinomial((logits / temperature).softmax(dim=1), 1, generator=generator)[:, 0]
    return logits, labels


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_of_the_labels_is_found(temperature: float) -> None:
    logits, labels = drawn(temperature)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.1)
    losses = [F.cross_entropy(logits / (found * by), labels).item() for by in (0.97, 1.0, 1.03)]
    assert losses[1] == min(losses)


def test_calibration_is_better_with_it() -> None:
    logits, labels = drawn(4.0)
    told = scores(logits, labels, tuple("abcdefg"), fit_temperature(logits, labels))
    assert told.ece > 0.3
    assert told.ece_calibrated < 0.03
    assert told.loss_calibrated < told.loss
    assert told.best_temperature == told.temperature


def test_a_network_that_is_always_right_is_not_sure_beyond_measure() -> None:
    logits = 2 * F.one_hot(torch.arange(20) % 2).float()
    found = fit_temperature(logits, torch.arange(20) % 2)
    confidence = (logits / found).softmax(dim=1).max()
    assert float(confidence) == pytest.approx(1 - 0.5 / 21, abs=1e-4)  # 20 of 21 images, and half of the last


def test_limits() -> None:
    right = torch.arange(50) % 2
    wrong = 1 - right
    assert fit_temperature(10 * F.one_hot(right).float(), wrong) == pytest.approx(HIGHEST, rel=1e-3)
    assert fit_temperature(0.01 * F.one_hot(right).float(), right) == pytest.approx(LOWEST, rel=1e-3)
    assert fit_temperature(torch.full((4, 2), math.nan), torch.zeros(4, dtype=torch.long)) == 1.0
    assert fit_temperature(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)) > 0


def _shared_fit() -> float:
    """Rank 0 has all but 100 of the images, rank 1 these."""
    dist.init(torch.device("cpu"))
    logits, labels = drawn(2.0)
    mine = slice(0, 3900) if dist.rank() == 0 else slice(3900, 4000)
    found = fit_temperature(logits[mine], labels[mine])
    dist.close()
    return found


def test_workers_agree_with_one_process() -> None:
    found = run_ranks(_shared_fit, 2)
    assert found[0] == found[1]
    assert found[0] == pytest.approx(fit_temperature(*drawn(2.0)), rel=1e-9)


def test_scores() -> None:
    """Six classes by hand: the last has no images."""
    labels = torch.tensor([0, 0, 1, 2, 3, 4])
    logits = 5.0 * F.one_hot(torch.tensor([0, 1, 1, 2, 3, 4]), 6)
    logits[1, 0] = 4.0
    told = scores(logits, labels, tuple("abcdef"), None)
    assert told.top1 == pytest.approx(5 / 6)
    assert told.top5 == 1.0
    assert told.mean_recall == pytest.approx((0.5 + 4) / 5)
    assert told.classes[0].recall == 0.5
    assert told.classes[1].precision == 0.5
    assert (told.classes[5].images, told.classes[5].recall, told.classes[5].precision) == (0, None, None)
    assert told.ece == told.ece_calibrated
    assert scores(logits[:, :5], labels, tuple("abcde"), None).top5 is None


class LargestDouble(TorchDispatchMode):
    """Elements of the largest fp64 tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float64:
            self.elements = max(self.elements, out.numel())
        return out


def test_no_more_than_a_batch_of_logits_is_cast_and_the_cut_changes_nothing() -> None:
    """Of 50,000 images and 21,841 classes all would be 9 GB, and a Newton's step makes several of that."""
    logits, labels = drawn(2.0)
    with LargestDouble() as made:
        found = fit_temperature(logits, labels, batch=100)
    assert made.elements == 100 * 7
    assert found == pytest.approx(fit_temperature(logits, labels, batch=4000), rel=1e-9)


def test_an_evaluation_casts_batch_by_batch() -> None:
    logits, labels = drawn(2.0, images=640, classes=70)
    batches = [SimpleNamespace(ids_N=ids.numpy(), labels_N=labels[ids]) for ids in torch.arange(640).split(16)]
    with LargestDouble() as made:
        found = evaluate(lambda batch: logits[batch.ids_N], batches, 640, numerics("fp32", torch.device("cpu")))
    assert made.elements <= 640 * 5  # a row of five numbers for each image
    assert found.temperature == pytest.approx(fit_temperature(logits, labels), rel=1e-9)
