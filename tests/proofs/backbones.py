"""Export of every backbone, proven on real photos, and predicted in three ways.

    .venv/bin/python tests/proofs/backbones.py PHOTOS WORK [--size 96] [--only resnet18,vit_b_16] [--preprocessing]

PHOTOS is the folder of ants and bees; minutes for all seven. Pre-trained weights need a download, so backbones start
from random ones, with BatchNorm's statistics from all photos: without them logits are near 0, and torchvision's ViT
even starts with a head of zeros, for which any file is equal. EfficientNet's blocks add a third of what they compute:
at full strength the 55 blocks of a random B7 make 3e-3 of a rounding error. The head is a logistic regression on 80
training photos.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnxruntime
import torch
import torchvision
from PIL import Image, ImageOps
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torchvision.models.efficientnet import MBConv

from tldist.config import ModelConfig, ModelName
from tldist.data.load.decode import read_rgb
from tldist.data.load.torchvision_loader import evaluation_square
from tldist.data.source.index import build_index
from tldist.models import backbones
from tldist.trained.export import export
from tldist.trained.exported import open_exported
from tldist.trained.model import Card, Judged, Trained
from tldist.trained.predict import Prediction, predict
from tldist_kernels import mix_normalize

CLASSES = ("ants", "bees")


def shown(paths: list[Path], size: int) -> Tensor:
    """Normalised images_NCHW, as evaluation shows them."""
    squares = torch.stack([evaluation_square(read_rgb(path), size).permute(1, 2, 0) for path in paths])
    return mix_normalize(squares, backbones.IMAGE_MEAN, backbones.IMAGE_STD, torch.float32)


@torch.no_grad()
def trained_on(photos: Path, name: ModelName, size: int) -> Trained:
    """Random weights, BatchNorm's statistics of all photos, and a head that was fitted to 80."""
    model = backbones.build(ModelConfig(name=name, weights="none"), 2, size, 0, pretrained=False).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over all batches
        if isinstance(module, MBConv) and module.use_res_connect:
            *_, norm = (part for part in module.block.modules() if isinstance(part, nn.BatchNorm2d))
            nn.init.constant_(norm.weight, 1 / 3)
    paths = [path for kind in CLASSES for path in sorted((photos / "train" / kind).glob("*.jpg"))[:40]]
    batches = [shown(paths[i::10], size) for i in range(10)]
    if name.startswith(("resnet", "efficientnet")):
        everything = sorted(path for split in ("train", "val") for path in (photos / split).glob("*/*.jpg"))
        for i in range(10):
            model(shown(everything[i::10], size))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            # Channels of a random network that hardly vary: an image that does move one, or that the statistics have
            # not seen, gets a logit of 68 and more, and ten thousand times the rounding errors of the others.
            module.running_var.clamp_(min=1e-3)
    model.eval()
    *_, last = (module for module in model.modules() if isinstance(module, nn.Linear))
    taken: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, x: taken.append(x[0]))
    for batch in batches:
        model(batch)
    hook.remove()
    labels = np.concatenate([[CLASSES.index(path.parent.name) for path in paths[i::10]] for i in range(10)])
    fitted = LogisticRegression(C=0.1, max_iter=300).fit(torch.cat(taken).numpy(), labels)
    half = torch.from_numpy(np.concatenate([fitted.coef_[0], fitted.intercept_])).float() / 2
    last.weight.copy_(torch.stack([-half[:-1], half[:-1]]))
    last.bias.copy_(torch.stack([-half[-1], half[-1]]))
    mean, std = backbones.IMAGE_MEAN, backbones.IMAGE_STD
    card = Card(name, "linear", CLASSES, size, mean, std, 1.5, "", 0, 0.0)
    return Trained(card, model.requires_grad_(False))


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


def confidences(found: Iterable[Prediction]) -> np.ndarray:
    """Of each class, in the order of CLASSES."""
    return np.array([[dict(prediction.top)[name] for name in CLASSES] for prediction in found])


def prove(name: ModelName, photos: Path, work: Path, size: int, preprocessing: bool) -> dict[str, Any]:
    """One backbone: the file, its proof, and three ways of predicting the validation photos."""
    index = build_index(photos)
    judged, trained, file = Judged(photos, index.val), trained_on(photos, name, size), work / f"{name}.onnx"
    started = time.perf_counter(), time.process_time()
    parity = export(trained, judged, file, "onnx", preprocessing, batch_size=8)
    seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    paths = [photos / path for path in index.val.paths]
    of_run = confidences(predict(trained.classifier(torch.device("cpu")), paths, batch_size=8))
    of_file = confidences(predict(open_exported(file), paths, batch_size=8))
    of_python = plain_python(file, paths)
    top1 = [found.argmax(axis=1) for found in (of_run, of_file, of_python)]
    return {
        "backbone": name,
        **dataclasses.asdict(parity),
        "right": int((top1[0] == index.val.labels_N).sum()),
        "predicted": np.bincount(top1[0], minlength=2).tolist(),
        "MiB": round(file.stat().st_size / 2**20, 1),
        "seconds": [round(value) for value in seconds],
        "predict FILE - predict RUN": float(abs(of_file - of_run).max()),
        "plain Python - predict RUN": float(abs(of_python - of_run).max()),
        "same top-1 (FILE, Python)": [int((found == top1[0]).sum()) for found in top1[1:]],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--only", default="")
    parser.add_argument("--preprocessing", action="store_true")
    given = parser.parse_args()
    given.work.mkdir(exist_ok=True)
    for backbone in get_args(ModelName):
        if backbone in (given.only.split(",") if given.only else torchvision.models.list_models()):
            row = prove(backbone, given.photos, given.work, given.size, given.preprocessing)
            print(json.dumps(row), flush=True)
