"""Elastic weight consolidation (Kirkpatrick et al., 2017): what holds the weights that earlier tasks need.

`tldist.transfer.fisher` computes a finished run's Fisher information; training only reads it, here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tldist.checkpoints import checkpoint
from tldist.config import UserError
from tldist.models.backbones import HEAD, StagedModel
from tldist.objectives.anchor import Pull, joined

FISHER_FILE = "fisher.safetensors"
"""The file beside a checkpoint's weights, under torchvision's names."""


def checkpoint_at(place: Path) -> Path:
    """Return the checkpoint that a path names: the folder itself, or a run directory's best. Raises UserError."""
    if (place / "state.json").is_file():
        return place.resolve()
    best = place / "checkpoints" / "best"
    if not (best / "state.json").is_file():
        raise UserError(f"{place} is neither a run directory with a checkpoint nor a checkpoint: train it first")
    return best.resolve()


def read_fisher(place: Path) -> dict[str, Tensor]:
    """Read a checkpoint's Fisher information, by torchvision's names. Raises UserError if it has none."""
    whole = checkpoint_at(place)
    if (reason := checkpoint.damage(whole)) is not None:
        raise UserError(f"the checkpoint {whole} is damaged: {reason}")
    information = checkpoint.read_added(whole, FISHER_FILE)
    if information is None:
        raise UserError(f"{place} has no Fisher information yet: compute it with `tldist fisher {place}`")
    return information


def ewc(strength: float, tasks: Sequence[str], model: StagedModel) -> Pull:
    """What holds the weights of earlier tasks. The head is new, and none of theirs.

    `model` is as training starts. Raises UserError where a task has no Fisher information, or is of another backbone,
    or where the model's weights are not what any of them ended with.
    """
    held = {n: p for n, p in model.named_parameters() if n.split(".", 1)[0] != HEAD}
    names = {name: model.torchvision_names[name] for name in held}
    pulls, starts_there = [], False
    for task in tasks:
        information, weights = read_fisher(Path(task)), checkpoint.read_weights(checkpoint_at(Path(task)))
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
