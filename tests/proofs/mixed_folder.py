"""`tldist predict` on 1,000 mixed files against a loop of one image at a time, interleaved.

    .venv/bin/python tests/proofs/mixed_folder.py PHOTOS RUN [--rounds 5]

PHOTOS: a folder of JPEGs. The loop is what people write: Pillow, torchvision's transforms, one image, one forward pass;
it uses as many cores as torch does by itself.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from torchvision import transforms

from tldist import dist
from tldist.data.augment import short_side
from tldist.data.source.files import find_files
from tldist.trained.model import Trained, open_run
from tldist.trained.predict import Prediction, predict

PARTS = {"jpg": 600, "png": 200, "gif": 40, "txt": 40, "cut": 40, "empty": 40, "folder": 14, "link": 13, "pipe": 13}


def fill(folder: Path, photos: list[Path]) -> None:
    """1,000 files of all kinds, in random order of names."""
    kinds = [kind for kind, count in PARTS.items() for _ in range(count)]
    random.Random(0).shuffle(kinds)
    for i, kind in enumerate(kinds):
        source, stem = photos[i % len(photos)], folder / f"{i:04d}"
        if kind in ("jpg", "cut"):
            data = source.read_bytes()
            stem.with_suffix(".jpg").write_bytes(data if kind == "jpg" else data[: len(data) // 2])
        elif kind in ("png", "gif"):
            Image.open(source).convert("RGB").save(stem.with_suffix(f".{kind}"))
        elif kind == "txt":
            stem.with_suffix(".txt").write_text("no image " * 50)
        elif kind == "empty":
            stem.with_suffix(".jpg").touch()
        elif kind == "folder":
            stem.with_suffix(".jpg").mkdir()
        elif kind == "link":
            stem.with_suffix(".jpg").symlink_to(folder / "nowhere")
        else:
            os.mkfifo(stem.with_suffix(".jpg"))


@torch.no_grad()
def one_at_a_time(trained: Trained, paths: list[Path]) -> int:
    """The plain loop; images predicted. It has to be told not to open pipes, or it would hang."""
    card = trained.card
    transform = transforms.Compose(
        [
            transforms.Resize(short_side(card.image_size)),
            transforms.CenterCrop(card.image_size),
            transforms.ToTensor(),
            transforms.Normalize(card.mean, card.std),
        ]
    )
    good = 0
    for path in paths:
        if path.is_fifo():
            continue
        try:
            image = Image.open(path).convert("RGB")
        except (OSError, SyntaxError):
            continue
        trained.model(torch.as_tensor(transform(image))[None]).softmax(dim=1).max(dim=1)
        good += 1
    return good


def ours(trained: Trained, paths: list[Path]) -> list[Prediction]:
    """As `tldist predict` does it."""
    return list(predict(trained.classifier(torch.device("cpu")), paths))


def run(photos: Path, run_dir: Path, rounds: int) -> None:
    torch.set_num_threads(dist.cores())
    with tempfile.TemporaryDirectory() as name:
        folder, trained = Path(name), open_run(run_dir)
        fill(folder, sorted(photos.rglob("*.jpg")))
        paths = find_files([name])
        assert len(paths) == sum(PARTS.values())
        found = ours(trained, paths)
        one_at_a_time(trained, paths[:50])
        print(Counter(prediction.problem or "predicted" for prediction in found))
        seconds: dict[str, list[float]] = {"loop": [], "predict": []}
        for _ in range(rounds):
            for what, work in (("loop", one_at_a_time), ("predict", ours)):
                started = time.perf_counter()
                work(trained, paths)
                seconds[what].append(time.perf_counter() - started)
            print({what: round(taken[-1], 2) for what, taken in seconds.items()}, flush=True)
        ratios = [loop / mine for loop, mine in zip(*seconds.values(), strict=True)]
        medians = {what: round(statistics.median(taken), 2) for what, taken in seconds.items()}
        print(f"medians {medians}, ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    run(given.photos, given.run, given.rounds)
