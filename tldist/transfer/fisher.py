"""Fisher information: how much each weight matters to a task, for elastic weight consolidation (EWC).

F_i = E_x E_y~p(y|x) (d log p(y|x) / d theta_i)^2, the diagonal (Kirkpatrick et al., 2017, section 2.1), estimated as
the mean over training images of squared gradients of single images. The square of a batch's mean gradient, which some
libraries take for it, is another quantity, and it shrinks as the batch grows.

Labels are drawn from the model by default, because that is what makes F the curvature of the loss at its minimum; with
the data's own labels it is the "empirical Fisher", which is not (Kunstner, Hennig and Balles, 2019).

A file `fisher.safetensors` stands beside the weights that it belongs to, under torchvision's names.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from tldist import dist
from tldist.data.load.loader import Batch
from tldist.models.backbones import StagedModel
from tldist.objectives.ewc import FISHER_FILE, checkpoint_at

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


def about(place: Path) -> dict[str, str]:
    """Tell how the Fisher information of a checkpoint was computed: images, labels, seed."""
    with safe_open(checkpoint_at(place) / FISHER_FILE, framework="pt") as file:
        return file.metadata()
