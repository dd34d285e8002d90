"""Fisher information: how much each weight matters to a task, for elastic weight consolidation (EWC).

F_i = E_x E_y~p(y|x) (d log p(y|x) / d theta_i)^2, the diagonal (Kirkpatrick et al., 2017, section 2.1), estimated as
the mean over training images of squared gradients of single images. The square of a batch's mean gradient, which some
libraries take for it, is another quantity, and it shrinks as the batch grows.

Labels are drawn from the model by default, because that is what makes F the curvature of the loss at its minimum; with
the data's own labels it is the "empirical Fisher", which is not (Kunstner, Hennig and Balles, 2019).

A file `fisher.safetensors` stands beside the weights that it belongs to, under torchvision's names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from tldist import checkpoint, dist
from tldist.backbones import HEAD, StagedModel
from tldist.config import UserError
from tldist.data.loader import Batch
from tldist.objectives.anchor import Pull, joined

FILE = "fisher.safetensors"
Labels = Literal["model", "data"]
GRADIENT_BYTES = 2**30
"""Most that the gradients of the images that are computed together may take on a GPU: 23 images of a ResNet-18."""
_LABELS = 0x4C4142454C
"""Sets the drawn labels' random numbers apart from others with the same seed."""


def drawn_labels(logits_NC: Tensor, uniform_N: Tensor) -> Tensor:
    """A label for each image, from the model's own probabilities: where its cumulative sum passes the number drawn."""
    cumulative_NC = logits_NC.double().softmax(dim=1).cumsum(dim=1)
    above_NC = cumulative_NC < uniform_N.to(logits_NC.device, torch.float64)[:, None]
    return above_NC.sum(dim=1).clamp(max=logits_NC.shape[1] - 1)


def squared_gradients(network: nn.Module, images_NCHW: Tensor, labels_N: Tensor, chunk: int = 0) -> dict[str, Tensor]:
    """The sum over images of the squared gradient of -log p(label|image), by parameter name.

    `network` must be in eval mode: with BatchNorm in train mode an image's loss depends on the others of its batch,
    and there is no gradient of a single image. `chunk` images are computed together (0: as many as memory allows).
    """
    assert not any(module.training for module in network.modules())
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    buffers = dict(network.named_buffers())

    def loss(parameters: dict[str, Tensor], image_CHW: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(network, (parameters, buffers), (image_CHW[None],))
        return F.cross_entropy(logits, label[None])

    gradient = grad(loss)
    of_each = vmap(gradient, in_dims=(None, 0, 0), randomness="error")
    chunk = chunk or images_together(parameters.values(), images_NCHW.device)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for images, labels in zip(images_NCHW.split(chunk), labels_N.split(chunk), strict=True):
        if chunk == 1:
            for name, g in gradient(parameters, images[0], labels[0]).items():
                total[name].addcmul_(g, g)
        else:
            for name, g_N in of_each(parameters, images, labels).items():
                total[name] += g_N.square_().sum(0)
    return total


def images_together(parameters: Iterable[Tensor], device: torch.device) -> int:
    """How many images' gradients to hold at once.

    One on a CPU: vmap turns a convolution's gradient into a grouped convolution, which took 1.2 to 1.5 times as long
    on two Zen 5 cores as one image after the other (ResNet-18, 32 and 96 px).
    """
    if device.type == "cpu":
        return 1
    return max(1, GRADIENT_BYTES // sum(p.numel() * p.element_size() for p in parameters))


def fisher(
    network: StagedModel,
    batches: Iterable[tuple[Tensor, Batch]],
    images: int,
    labels: Labels = "model",
    seed: int = 0,
    chunk: int = 0,
) -> tuple[dict[str, Tensor], int]:
    """F by torchvision's names, and the number of images it is the mean over; equal on all workers.

    Args:
        network: in eval mode, fp32.
        batches: (images_NCHW, batch) of this worker's part of the split.
        images: how many the split has, over all workers.
        seed: of the labels drawn; an image's label does not depend on the number of workers.
    """
    uniform = np.random.Generator(np.random.Philox(key=[seed, _LABELS])).random(images)
    names = [name for name, _ in network.named_parameters()]
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in network.named_parameters()}
    count = 0
    for images_NCHW, batch in batches:
        labels_N = batch.labels_N
        if labels == "model":
            with torch.no_grad():
                labels_N = drawn_labels(network(images_NCHW), torch.from_numpy(uniform[batch.ids_N]))
        for name, squares in squared_gradients(network, images_NCHW, labels_N, chunk).items():
            sums[name] += squares
        count += len(images_NCHW)
    flat = torch.cat([*(sums[name].reshape(-1) for name in names), sums[names[0]].new_tensor([count])])
    dist.all_sum(flat)  # one, of all weights and the count
    means = (flat[:-1] / flat[-1]).float().split([sums[name].numel() for name in names])
    found = {name: mean.view(sums[name].shape) for name, mean in zip(names, means, strict=True)}
    return {network.torchvision_names[name]: mean for name, mean in found.items()}, int(flat[-1])


def of(place: Path) -> Path:
    """The checkpoint that a path stands for: itself, or of a run directory the best. Raises UserError."""
    if (place / "state.json").is_file():
        return place.resolve()
    best = place / "checkpoints" / "best"
    if not (best / "state.json").is_file():
        raise UserError(f"{place} is neither a run directory with a checkpoint nor a checkpoint: train it first")
    return best.resolve()


def read(place: Path) -> dict[str, Tensor]:
    """The Fisher information of a checkpoint, by torchvision's names. Raises UserError where there is none."""
    found = of(place)
    if (reason := checkpoint.damage(found)) is not None:
        raise UserError(f"the checkpoint {found} is damaged: {reason}")
    information = checkpoint.read_added(found, FILE)
    if information is None:
        raise UserError(f"{place} has no Fisher information yet: compute it with `tldist fisher {place}`")
    return information


def about(place: Path) -> dict[str, str]:
    """How a file of `read` was computed: images, labels, seed."""
    with safe_open(of(place) / FILE, framework="pt") as file:
        return file.metadata()


def ewc(strength: float, tasks: Sequence[str], model: StagedModel) -> Pull:
    """What holds the weights of earlier tasks. The head is new, and none of theirs.

    `model` is as training starts. Raises UserError where a task has no Fisher information, or is of another backbone,
    or where the model's weights are not what any of them ended with.
    """
    held = {n: p for n, p in model.named_parameters() if n.split(".", 1)[0] != HEAD}
    names = {name: model.torchvision_names[name] for name in held}
    pulls, starts_there = [], False
    for task in tasks:
        information, weights = read(Path(task)), checkpoint.read_weights(of(Path(task)))
        for ours, theirs in names.items():
            if theirs not in weights or weights[theirs].shape != held[ours].shape:
                raise UserError(f"--optim.ewc-from {task} is a run of another backbone: it has no such '{theirs}'")
        anchors = {ours: weights[theirs].to(held[ours].device) for ours, theirs in names.items()}
        starts_there |= all(torch.equal(anchors[name], p) for name, p in held.items())
        importances = {ours: information[theirs].to(held[ours].device) for ours, theirs in names.items()}
        pulls.append(Pull(strength, anchors, importances))
    if not starts_there:
        raise UserError(
            "--optim.ewc holds weights where an earlier task left them, and this run starts elsewhere: name the last "
            f"of them in --model.weights too ({tasks[-1]})"
        )
    return _as(joined(pulls), held)


def _as(pull: Pull, held: dict[str, nn.Parameter]) -> Pull:
    """In the parameters' own memory format: operations over lists of tensors are one kernel only where all agree."""
    anchors = {name: torch.empty_like(held[name]).copy_(t) for name, t in pull.anchors.items()}
    importances = {name: torch.empty_like(held[name]).copy_(t) for name, t in pull.importances.items()}
    return Pull(pull.strength, anchors, importances, pull.constants)
