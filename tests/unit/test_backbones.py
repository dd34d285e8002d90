"""Stages, cuts, folding and weights of every backbone."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from tldist.config import ModelConfig, ModelName, UserError
from tldist.models import backbones
from tldist.models.backbones import StagedModel
from tldist.models.digit_nets import DigitNet
from tldist.models.prefix import Prefix, fold_batchnorm

MODELS = get_args(ModelName)
SIDE = 64


def lively(name: ModelName) -> StagedModel:
    """A backbone whose BatchNorm has seen data and whose head is not zero, so that equality means something."""
    model = backbones.build(ModelConfig(name=name, weights="none"), 5, SIDE, seed=1)
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Close to what training leaves behind: per-channel scale and shift that differ from the identity.
            module.running_mean.normal_(0, 0.2)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_cutting_and_folding_change_nothing(name: ModelName) -> None:
    """At every boundary: suffix(prefix(x)) is the uncut model's output, bit for bit; folded, within rounding."""
    model, x = lively(name), torch.randn(2, 3, SIDE, SIDE)
    whole = model(x)
    assert whole.std() > 1e-6
    assert tuple(model.stages) == backbones.stage_names(name)
    for boundary in range(len(model.stages) + 1):
        prefix, suffix = model.cut(boundary)
        assert torch.equal(suffix(prefix(x)), whole)
        if boundary in (1, len(model.stages) - 1):
            folded = suffix(Prefix(prefix, torch.float32)(x))
            torch.testing.assert_close(folded, whole, rtol=1e-3, atol=1e-4 * whole.abs().max().item())


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "efficientnet_b0", "dann_mnist_bn"])
@torch.no_grad()
def test_folding_removes_every_batchnorm_and_leaves_the_original(name: ModelName) -> None:
    model = lively(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 3, SIDE, SIDE)
    for stage in list(model.children())[:-1]:
        folded = fold_batchnorm(stage)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        torch.testing.assert_close(folded(x), stage(x), rtol=1e-3, atol=1e-4 * stage(x).abs().max().item())
        x = stage(x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def original(name: ModelName) -> nn.Module:
    """The network as others know it: torchvision's, or the small one of its own."""
    if name.startswith("dann"):
        return DigitNet(SIDE, batchnorm=name.endswith("_bn"), num_classes=5)
    extra = {"image_size": SIDE} if name.startswith("vit") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=5, **extra)


@pytest.mark.parametrize("name", MODELS)
def test_names_round_trip(name: ModelName) -> None:
    """A saved state loads into the original network and computes the same."""
    model, net = lively(name), original(name).eval()
    net.load_state_dict(model.torchvision_state())
    x = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        assert torch.equal(net(x), model(x))
    other = backbones.build(ModelConfig(name=name, weights="none"), 5, SIDE, seed=2)
    other.load_torchvision_state(model.torchvision_state())
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "convnext_base", "vit_b_16", "dann_mnist"])
def test_an_exported_batch_may_have_any_size(name: ModelName) -> None:
    size = 28 if name == "dann_mnist" else 32
    model = backbones.build(ModelConfig(name=name, weights="none"), 3, size, 0, pretrained=False).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (torch.zeros(2, 3, size, size),), dynamic_shapes=({0: batch},))
    assert program.module()(torch.zeros(5, 3, size, size)).shape == (5, 3)


@pytest.mark.parametrize(("head", "parameters"), [("linear", 512 * 5 + 5), ("mlp", 512 * 256 + 256 + 256 * 5 + 5)])
def test_heads_of_the_lecture(head: str, parameters: int) -> None:
    model = backbones.build(ModelConfig(weights="none", head=head), 5, SIDE, 0)  # type: ignore[arg-type]
    assert sum(p.numel() for p in model.stages["head"].parameters()) == parameters


def test_the_lectures_own_count() -> None:
    """Lecture 3.1 prints 529,162 of 23,528,522; the errata's figures are the right ones."""
    model = backbones.build(ModelConfig(name="resnet50", weights="none", head="mlp"), 10, SIDE, 0)
    assert sum(p.numel() for p in model.stages["head"].parameters()) == 527_114
    assert sum(p.numel() for p in model.parameters()) == 24_035_146


def test_the_seed_alone_decides_the_head() -> None:
    torch.manual_seed(5)
    a = backbones.build(ModelConfig(weights="none"), 5, SIDE, seed=3)
    state = torch.get_rng_state()
    b = backbones.build(ModelConfig(weights="none"), 5, SIDE, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_file(tmp_path: Path, suffix: str) -> None:
    """A source model with other classes: the trunk is loaded, the head is new."""
    source = torchvision.models.resnet18(weights=None, num_classes=7)
    path = tmp_path / f"source{suffix}"
    state = source.state_dict()
    safetensors.torch.save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    model = backbones.build(ModelConfig(weights=str(path)), 3, SIDE, 0)
    loaded = model.torchvision_state()
    assert loaded["fc.weight"].shape == (3, 512)
    assert all(torch.equal(loaded[k], v) for k, v in state.items() if not k.startswith("fc."))


def test_torchvision_weights_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real download path, with the file already where torchvision looks first."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    source = torchvision.models.resnet18(weights=None)
    torch.save(source.state_dict(), folder / weights.url.rsplit("/", 1)[1])
    model = backbones.build(ModelConfig(weights="IMAGENET1K_V1"), 3, SIDE, 0)
    assert torch.equal(model.torchvision_state()["conv1.weight"], source.conv1.weight)


def test_vit_positions_are_interpolated(tmp_path: Path) -> None:
    path = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(torchvision.models.vit_b_16(weights=None, image_size=96).state_dict(), path)
    model = backbones.build(ModelConfig(name="vit_b_16", weights=str(path)), 3, SIDE, 0)
    assert model(torch.randn(1, 3, SIDE, SIDE)).shape == (1, 3)


def _broken(tmp_path: Path, kind: str) -> str:
    path = tmp_path / f"{kind}.safetensors"
    state = torchvision.models.resnet18(weights=None).state_dict()
    if kind == "other":
        state = torchvision.models.resnet50(weights=None).state_dict()
    elif kind == "missing":
        del state["layer3.0.conv1.weight"]
    elif kind == "extra":
        state["layer5.weight"] = torch.zeros(1)
    if kind == "garbage":
        path.write_bytes(b"not a tensor file")
    elif kind != "absent":
        safetensors.torch.save_file(state, path)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("other", "are not resnet18's"),
        ("missing", "'layer3.0.conv1.weight' is missing"),
        ("extra", "they also hold 'layer5.weight'"),
        ("garbage", "cannot read the weights file"),
        ("absent", "there is no weights file"),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, kind: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        backbones.build(ModelConfig(weights=_broken(tmp_path, kind)), 3, SIDE, 0)


def test_unknown_weights_name() -> None:
    with pytest.raises(UserError, match=r"no weights 'IMAGENET1K_V7'.*did you mean 'IMAGENET1K_V1'"):
        backbones.build(ModelConfig(weights="IMAGENET1K_V7"), 3, SIDE, 0)


def test_pickled_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "ran"),)  # type: ignore[return-value]

    path = tmp_path / "evil.pth"
    torch.save({"w": Evil()}, path)
    with pytest.raises(UserError, match="cannot read"):
        backbones.build(ModelConfig(weights=str(path)), 3, SIDE, 0)
    assert not (tmp_path / "ran").exists()
