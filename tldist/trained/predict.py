"""What a model says of files: decoded in threads, judged in batches; a file that cannot be read is named, and the rest
still judged."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tldist import dist
from tldist.data.load.decode import read_rgb
from tldist.data.load.loader import IN_FLIGHT
from tldist.data.load.torchvision_loader import evaluation_square
from tldist.data.source.files import obstacle
from tldist.data.source.verify import refusal, strict_pillow, verify
from tldist.trained.model import Classifier


@dataclass(frozen=True)
class Prediction:
    """Of one file."""

    path: Path
    top: tuple[tuple[str, float], ...] = ()
    """(class, calibrated confidence), the most probable first."""
    problem: str = ""
    """Why nothing was predicted; empty where something was."""


def predict(
    classifier: Classifier, paths: Sequence[Path], top: int = 3, batch_size: int = 32, threads: int = 0
) -> Iterator[Prediction]:
    """One for each path, in order, while later files are being decoded.

    `threads`: that decode; 0: one for each core. What training takes counts as an image
    (data/source/verify.py).
    """
    card = classifier.card
    groups = (paths[i : i + batch_size] for i in range(0, len(paths), batch_size))
    # Each image is one thread's work; nested intra-op threads would only fight over the cores.
    pool = ThreadPoolExecutor(threads or dist.cores(), initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[list[tuple[Path, Future[Tensor | str]]]] = deque()
    with strict_pillow(), pool:
        try:
            while True:
                for group in itertools.islice(groups, IN_FLIGHT - len(waiting)):
                    waiting.append([(path, pool.submit(load_square, path, card.image_size)) for path in group])
                if not waiting:
                    return
                yield from _judged(classifier, [(path, task.result()) for path, task in waiting.popleft()], top)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def load_square(path: Path, size: int) -> Tensor | str:
    """A file as evaluation shows it, uint8 (size, size, 3); or why it cannot be. Only inside `strict_pillow()`."""
    if problem := obstacle(path) or refusal(str(path)):
        return problem
    try:
        return evaluation_square(read_rgb(path), size).permute(1, 2, 0)
    except Exception as error:  # whatever a decoder raises on damaged bytes; the rest of the files is still wanted
        verdict = verify(str(path))
        return verdict if isinstance(verdict, str) else f"cannot be decoded: {' '.join(str(error).split())[:200]}"


def _judged(classifier: Classifier, loaded: Sequence[tuple[Path, Tensor | str]], top: int) -> Iterator[Prediction]:
    squares = [square for _, square in loaded if isinstance(square, Tensor)]
    found = iter(_tops(classifier, squares, top) if squares else ())
    for path, square in loaded:
        yield Prediction(path, problem=square) if isinstance(square, str) else Prediction(path, next(found))


def _tops(classifier: Classifier, squares: Sequence[Tensor], top: int) -> Iterator[tuple[tuple[str, float], ...]]:
    card = classifier.card
    images_NHWC = torch.stack(list(squares))
    if classifier.device.type == "cuda":
        images_NHWC = images_NHWC.pin_memory().to(classifier.device, non_blocking=True)
    confidences_NC = card.confidences(classifier.logits(images_NHWC))
    values_NK, places_NK = confidences_NC.topk(min(top, len(card.classes)), dim=1)
    for values, places in zip(values_NK.tolist(), places_NK.tolist(), strict=True):
        yield tuple((card.classes[place], value) for place, value in zip(places, values, strict=True))
