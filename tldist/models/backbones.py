"""Backbones, torchvision's and a few small ones, as an ordered sequence of stages that can be cut at any boundary.

A stage is named (`stem`, `layer1`, ..., `head`) and its name is the first part of every parameter name inside
tldist: `layer4.0.conv1.weight`. Files hold torchvision's own names; `StagedModel` keeps the translation.
"""

from __future__ import annotations

import itertools
import urllib.error
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from tldist.config import ModelConfig, UserError, nearest
from tldist.models.digit_nets import DigitNet

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
HEAD = "head"
NORMALISATION = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


class Segment(nn.Module):
    """Consecutive stages, run in order; empty is the identity. Parameter names begin with the stage's name."""

    def __init__(self, stages: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, stage in stages.items():
            self.add_module(name, stage)

    @property
    def stages(self) -> dict[str, nn.Module]:
        """The stages by name, in order."""
        return dict(self.named_children())

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, tap: str) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, tap: str = "") -> Tensor | tuple[Tensor, Tensor]:
        """The last stage's output; with `tap` also that of the stage of this name."""
        tapped = x
        for name, stage in self.named_children():
            x = stage(x)
            if name == tap:
                tapped = x
        return (x, tapped) if tap else x


class StagedModel(Segment):
    """A backbone and its head: images_NCHW -> logits_NC."""

    def __init__(self, stages: Mapping[str, nn.Module], net: nn.Module) -> None:
        super().__init__(stages)
        theirs = {id(t): name for name, t in net.state_dict(keep_vars=True).items()}
        self.torchvision_names = {name: theirs[id(t)] for name, t in self.state_dict(keep_vars=True).items()}

    def cut(self, boundary: int) -> tuple[Segment, Segment]:
        """(prefix, suffix): the stages before `boundary`, and from it on; both share this model's parameters.

        Pooling at the entry of the suffix has nothing to learn and belongs to the prefix: what lies at the cut is
        then (N, 512) for a ResNet-18's head, not (N, 512, 7, 7).
        """
        items = list(self.stages.items())
        before, after = items[:boundary], items[boundary:]
        if before and after and isinstance(stage := after[0][1], nn.Sequential):
            modules = list(stage.named_children())
            fixed = list(itertools.takewhile(lambda item: isinstance(item[1], _FIXED), modules))
            if fixed:
                name = after[0][0]
                before = [*before, (f"{name}_input", nn.Sequential(OrderedDict(fixed)))]
                after = [(name, nn.Sequential(OrderedDict(modules[len(fixed) :]))), *after[1:]]
        return Segment(OrderedDict(before)), Segment(OrderedDict(after))

    def torchvision_state(self) -> dict[str, Tensor]:
        """Parameters and buffers under torchvision's names."""
        return {self.torchvision_names[name]: t for name, t in self.state_dict().items()}

    def load_torchvision_state(self, state: Mapping[str, Tensor]) -> None:
        """Load a complete state under torchvision's names; a missing or extra name is an error."""
        self.load_state_dict({ours: state[theirs] for ours, theirs in self.torchvision_names.items()})


class _ClassToken(nn.Module):
    """tokens_NLD -> the class token_ND."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


_FIXED = (nn.AdaptiveAvgPool2d, nn.Flatten, _ClassToken)
"""Modules at a head's entry without parameters, buffers or randomness."""


class _Embed(nn.Module):
    """ViT's patches, class token and positions: images_NCHW -> tokens_NLD."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.conv_proj = vit.conv_proj
        self.class_token = vit.class_token
        self.pos_embedding = vit.encoder.pos_embedding
        self.dropout = vit.encoder.dropout

    def forward(self, x: Tensor) -> Tensor:
        patches = self.conv_proj(x).flatten(2).transpose(1, 2)
        # By shape: torch.export would fix len(x) at its example's.
        token = self.class_token.expand(x.shape[0], -1, -1).to(patches.dtype)
        return self.dropout(torch.cat([token, patches], dim=1) + self.pos_embedding)


def _resnet(net: Any) -> dict[str, nn.Module]:
    stem = nn.Sequential(OrderedDict(conv1=net.conv1, bn1=net.bn1, relu=net.relu, maxpool=net.maxpool))
    head = nn.Sequential(OrderedDict(avgpool=net.avgpool, flatten=nn.Flatten(1), fc=net.fc))
    layers = {name: getattr(net, name) for name in ("layer1", "layer2", "layer3", "layer4")}
    return {"stem": stem, **layers, HEAD: head}


def _efficientnet(net: Any) -> dict[str, nn.Module]:
    # One stage per resolution, as in a ResNet: strides 2, 4, 8, 16, 32.
    groups = {"stem": (0, 1), "blocks2": (2,), "blocks3": (3,), "blocks4": (4, 5), "blocks5": (6, 7, 8)}
    head = nn.Sequential(OrderedDict(avgpool=net.avgpool, flatten=nn.Flatten(1), classifier=net.classifier))
    return {**_feature_groups(net, groups), HEAD: head}


def _convnext(net: Any) -> dict[str, nn.Module]:
    groups = {"stem": (0,), "layer1": (1,), "layer2": (2, 3), "layer3": (4, 5), "layer4": (6, 7)}
    head = nn.Sequential(OrderedDict(avgpool=net.avgpool, classifier=net.classifier))
    return {**_feature_groups(net, groups), HEAD: head}


def _feature_groups(net: Any, groups: Mapping[str, Sequence[int]]) -> dict[str, nn.Module]:
    return {
        name: nn.Sequential(OrderedDict((str(i), net.features[i]) for i in indexes)) for name, indexes in groups.items()
    }


def _vit(net: Any) -> dict[str, nn.Module]:
    layers = list(net.encoder.layers.children())
    blocks = {
        f"blocks{i // 3 + 1}": nn.Sequential(OrderedDict((str(j), layers[j]) for j in range(i, i + 3)))
        for i in range(0, len(layers), 3)
    }
    # torchvision normalises all tokens and then takes the first; one token alone is the same, 197 times cheaper.
    head = nn.Sequential(OrderedDict(token=_ClassToken(), ln=net.encoder.ln, heads=net.heads))
    return {"embed": _Embed(net), **blocks, HEAD: head}


def _digits(net: Any) -> dict[str, nn.Module]:
    return {**net.stage_modules(), HEAD: nn.Sequential(OrderedDict(fc5=net.fc5))}


_STAGES: dict[str, Callable[[Any], dict[str, nn.Module]]] = {
    "resnet18": _resnet,
    "resnet50": _resnet,
    "efficientnet_b0": _efficientnet,
    "efficientnet_b4": _efficientnet,
    "efficientnet_b7": _efficientnet,
    "convnext_base": _convnext,
    "vit_b_16": _vit,
    "dann_mnist": _digits,
    "dann_mnist_bn": _digits,
}
# Where torchvision keeps the final linear layer: (owner module, name inside it).
_CLASSIFIER = {
    "resnet": ("", "fc"),
    "efficientnet": ("classifier", "1"),
    "convnext": ("classifier", "2"),
    "vit": ("heads", "head"),
    "dann": ("", "fc5"),
}
_STAGE_NAMES = {
    "resnet": ("stem", "layer1", "layer2", "layer3", "layer4", HEAD),
    "efficientnet": ("stem", "blocks2", "blocks3", "blocks4", "blocks5", HEAD),
    "convnext": ("stem", "layer1", "layer2", "layer3", "layer4", HEAD),
    "vit": ("embed", "blocks1", "blocks2", "blocks3", "blocks4", HEAD),
    "dann": ("conv1", "conv2", "fc3", "fc4", HEAD),
}


def _family(name: str) -> str:
    return next(family for family in _CLASSIFIER if name.startswith(family))


def stage_names(name: str) -> tuple[str, ...]:
    """The stages of a backbone from input to output, without building it."""
    return _STAGE_NAMES[_family(name)]


def parameter_names(config: ModelConfig) -> dict[str, bool]:
    """The model's parameters in network order, and whether a normalisation layer owns each; builds no weights."""
    with torch.device("meta"):
        model = build(config, num_classes=2, image_size=224, seed=0, pretrained=False)
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name, _ in model.named_parameters()}
    return {name: isinstance(owner, NORMALISATION) for name, owner in owners.items()}


def build(config: ModelConfig, num_classes: int, image_size: int, seed: int, pretrained: bool = True) -> StagedModel:
    """The backbone with its weights and a new head for `num_classes`.

    The head (and, without weights, the backbone) is initialised from `seed` alone, so that every worker and
    every strategy starts from the same values. Raises UserError for weights that do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = _net(config.name, image_size)
        if pretrained and config.weights != "none":
            _load_backbone(net, config, image_size)
        owner, leaf = _classifier_place(net, config.name)
        setattr(owner, leaf, _new_head(config.head, _in_features(net, config.name), num_classes))
    return StagedModel(_STAGES[config.name](net), net)


def _net(name: str, image_size: int) -> nn.Module:
    if name.startswith("dann"):
        return DigitNet(image_size, batchnorm=name.endswith("_bn"))
    extra = {"image_size": image_size} if name.startswith("vit") else {}
    return torchvision.models.get_model(name, weights=None, **extra)


def _classifier_place(net: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, leaf = _CLASSIFIER[_family(name)]
    return net.get_submodule(owner), leaf


def _in_features(net: nn.Module, name: str) -> int:
    owner, leaf = _classifier_place(net, name)
    return int(getattr(owner, leaf).in_features)


def _new_head(kind: str, in_features: int, num_classes: int) -> nn.Module:
    """linear; or lecture 3.1 (mlp) and 8.1 (mlp_bn)."""
    if kind == "linear":
        return nn.Linear(in_features, num_classes)
    if kind == "mlp":
        return nn.Sequential(nn.Linear(in_features, 256), nn.ReLU(), nn.Dropout(0.3), nn.Linear(256, num_classes))
    return nn.Sequential(
        nn.Linear(in_features, 512),
        nn.BatchNorm1d(512),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(512, num_classes),
    )


def _load_backbone(net: nn.Module, config: ModelConfig, image_size: int) -> None:
    """Load everything but the classifier, and insist that all of it fits."""
    state = read_weights(config)
    if config.name.startswith("vit") and "encoder.pos_embedding" in state:
        state = interpolate_embeddings(image_size, 16, OrderedDict(state))
    owner, leaf = _CLASSIFIER[_family(config.name)]
    classifier = f"{owner}.{leaf}." if owner else f"{leaf}."
    state = {name: t for name, t in state.items() if not name.startswith(classifier)}
    wanted = {name: t for name, t in net.state_dict().items() if not name.startswith(classifier)}
    for name, tensor in wanted.items():
        # Files written before BatchNorm counted its batches lack the counter; torchvision's loader allows that too.
        if name not in state and not name.endswith("num_batches_tracked"):
            raise UserError(f"the weights {config.weights} are not {config.name}'s: '{name}' is missing in them")
        if name in state and state[name].shape != tensor.shape:
            raise UserError(
                f"the weights {config.weights} are not {config.name}'s: '{name}' has shape "
                f"{tuple(state[name].shape)} there and {tuple(tensor.shape)} here"
            )
    if extra := sorted(set(state) - set(wanted)):
        raise UserError(f"the weights {config.weights} are not {config.name}'s: they also hold '{extra[0]}'")
    net.load_state_dict(state, strict=False)


def read_weights(config: ModelConfig) -> dict[str, Tensor]:
    """A state dict under torchvision's names, from a file or from torchvision (downloaded once, hash checked)."""
    path = Path(config.weights).expanduser()
    if path.suffix in {".safetensors", ".pth", ".pt"} or path.is_file():
        return _read_file(path)
    if config.name.startswith("dann"):
        raise UserError(f"there are no published weights of {config.name}: give --model.weights a file, or none")
    enum = torchvision.models.get_model_weights(config.name)
    known = [name for name in enum.__members__ if name != "DEFAULT"]
    if config.weights != "default" and config.weights not in known:
        raise UserError(
            f"there are no weights '{config.weights}' for {config.name}{nearest(config.weights, known)}: use "
            f"{', '.join(known)}, default, none, or a .safetensors or .pth file"
        )
    weights = enum["DEFAULT" if config.weights == "default" else config.weights]
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (urllib.error.URLError, OSError) as error:
        raise UserError(
            f"cannot download {weights.url}: {error}; put the file into {torch.hub.get_dir()}/checkpoints, "
            "or pass --model.weights FILE or none"
        ) from error
    except Exception as error:  # a download that was cut short, or another file under its name
        file = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[1]
        raise UserError(f"the weights file {file} is damaged: delete it, and it is downloaded again") from error


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"there is no weights file {path}: check --model.weights")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot read the weights file {path}: {reason}") from error
    for key in ("state_dict", "model"):
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{path} does not hold a dict of tensors: save model.state_dict() there")
    return {name.removeprefix("module."): t for name, t in state.items()}
