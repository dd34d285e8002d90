"""Export of every backbone, proven on real photos: train a head, export, predict, and compare in four ways.

    .venv/bin/python tests/proofs/backbones.py PHOTOS WORK [--size 224] [--only resnet18,vit_b_16] [--preprocessing]

PHOTOS is the folder of ants and bees; it takes minutes to an hour. Pre-trained weights need a download, so backbones
start from random ones, with BatchNorm's statistics from real photos: without them logits are near 0, and torchvision's
ViT even starts with a head of zeros, for which any file is equal. The head is trained by `tldist train`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnxruntime
import safetensors.torch
import torch
from PIL import Image, ImageOps
from torch import nn

from tldist import backbones
from tldist.config import ModelConfig, ModelName
from tldist.data.decode import read_rgb
from tldist.data.torchvision_loader import evaluation_square
from tldist_kernels import mix_normalize
from tldist_launcher.cli import main


def warmed_weights(name: ModelName, photos: Path, size: int, out: Path) -> None:
    """Random weights, and BatchNorm's statistics of 32 photos."""
    model = backbones.build(ModelConfig(name=name, weights="none"), 2, size, 0, pretrained=False).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over all batches
    paths = sorted((photos / "train").rglob("*.jpg"))[::7][:32]
    for i in range(0, len(paths), 8):
        squares = torch.stack([evaluation_square(read_rgb(path), size).permute(1, 2, 0) for path in paths[i : i + 8]])
        with torch.no_grad():
            model(mix_normalize(squares, backbones.IMAGE_MEAN, backbones.IMAGE_STD, torch.float32))
    safetensors.torch.save_file({k: t.contiguous() for k, t in model.torchvision_state().items()}, out)


def command(*words: str) -> str:
    """Run one command in this process; what it printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(list(words)) == 0, said.getvalue()
    return said.getvalue()


def plain_python(model: Path, photos: list[Path], batch_size: int = 8) -> np.ndarray:
    """Probabilities by onnxruntime, numpy and Pillow alone, as docs/predict.md shows."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    size, short = int(about["image_size"]), int(about["resize_short_side"])
    mean, std = (np.array(json.loads(about[key]), np.float32) for key in ("mean", "std"))
    takes_pixels = session.get_inputs()[0].name == "images"

    def pixels(path: Path) -> np.ndarray:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        scale = short / min(image.size)
        image = image.resize([max(int(side * scale + 1e-9), short) for side in image.size], Image.Resampling.BILINEAR)
        left, top = (round((side - size) / 2) for side in image.size)
        return np.asarray(image.crop((left, top, left + size, top + size)))

    found = []
    for i in range(0, len(photos), batch_size):
        batch = np.stack([pixels(path) for path in photos[i : i + batch_size]])
        if not takes_pixels:
            batch = ((batch.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
        found.append(session.run(["probabilities"], {session.get_inputs()[0].name: batch})[0])
    return np.concatenate(found)


def table_of(told: str, classes: list[str]) -> np.ndarray:
    """`tldist predict --json` as confidences_NC."""
    rows = json.loads(told)["predictions"]
    told_N = [{one["class"]: one["confidence"] for one in row["top"]} for row in rows]
    return np.array([[told[name] for name in classes] for told in told_N])


def prove(name: ModelName, photos: Path, work: Path, size: int, preprocessing: bool) -> dict[str, Any]:
    """One backbone, from weights to four ways of predicting the validation photos."""
    run, weights = work / name, work / f"{name}.safetensors"
    if not (run / "summary.json").exists():
        warmed_weights(name, photos, size, weights)
        command(
            *("train", "hymenoptera", "--data.root", str(photos), "--run-dir", str(run), "--model.name", name),
            *("--model.weights", str(weights), "--data.image-size", str(size), "--data.augment", "none"),
            *("--data.batch-size", "16", "--train.epochs", "8", "--train.precision", "fp32", "--optim.base-lr", "0.1"),
            *("--cache.features", "exact", "--train.compile", "off", "--tracking.wandb", "disabled"),
            *("--data.loader", "torchvision", "--data.train-images-per-class", "40"),
        )
    started, file = time.perf_counter(), run / "model.onnx"
    flags = ["--with-preprocessing"] if preprocessing else []
    said = command("export", str(run), "--format", "onnx", "--out", str(file), "--batch-size", "8", *flags)
    seconds = time.perf_counter() - started
    paths, classes = sorted((photos / "val").rglob("*.jpg")), ["ants", "bees"]
    of_run, of_file = (
        table_of(command("predict", str(place), str(photos / "val"), "--json", "--batch-size", "8"), classes)
        for place in (run, file)
    )
    of_python = plain_python(file, paths)
    top1 = [found.argmax(axis=1) for found in (of_run, of_file, of_python)]
    return {
        "backbone": name,
        "export said": said.splitlines()[0],
        "MiB": round(file.stat().st_size / 2**20, 1),
        "export and proof s": round(seconds),
        "classes predicted": np.bincount(top1[0], minlength=2).tolist(),
        "predict FILE - predict RUN": float(abs(of_file - of_run).max()),
        "plain Python - predict RUN": float(abs(of_python - of_run).max()),
        "same top-1 (FILE, Python)": [int((found == top1[0]).sum()) for found in top1[1:]],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--only", default="")
    parser.add_argument("--preprocessing", action="store_true")
    given = parser.parse_args()
    given.work.mkdir(exist_ok=True)
    for backbone in get_args(ModelName):
        if not given.only or backbone in given.only.split(","):
            row = prove(backbone, given.photos, given.work, given.size, given.preprocessing)
            print(json.dumps(row), flush=True)
