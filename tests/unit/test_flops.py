"""FLOPs against figures worked out by hand, and the peaks they are held against."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tldist.config import ModelConfig
from tldist.models import backbones, flops
from tldist.models.backbones import Segment, StagedModel
from tldist.models.flops import StepFlops, count_flops, mfu, peak_flops
from tldist.models.prefix import Prefix

STEM = 2 * 112**2 * 64 * 3 * 7**2
"""The first convolution of a ResNet at 224: its input, the image, needs no gradient."""


def built(name: str, classes: int = 1000) -> StagedModel:
    return backbones.build(ModelConfig(name=name, weights="none"), classes, 224, 0, pretrained=False)  # type: ignore[arg-type]


def cut(model: StagedModel, first: str) -> tuple[Segment, Segment]:
    """The model frozen before stage `first` and cut there."""
    boundary = list(model.stages).index(first)
    prefix, suffix = model.cut(boundary)
    prefix.requires_grad_(False)
    suffix.requires_grad_(True)
    return prefix, suffix


def count(model: StagedModel, first: str) -> StepFlops:
    prefix, suffix = cut(model, first)
    return count_flops(list(prefix.children()), suffix, 224)


# Forward: twice the multiply-adds that torchvision's documentation gives.
@pytest.mark.parametrize(
    ("name", "giga_multiply_adds"),
    [
        ("resnet18", 1.814),
        ("resnet50", 4.089),
        ("efficientnet_b0", 0.386),
        ("convnext_base", 15.355),
        ("vit_b_16", 17.564),
    ],
)
def test_forward_passes_are_the_published_ones(name: str, giga_multiply_adds: float) -> None:
    counted = count(built(name), "head")
    assert (counted.prefix + counted.forward) / 2e9 == pytest.approx(giga_multiply_adds, rel=0.005)


@pytest.mark.parametrize(("name", "total"), [("resnet18", 10.65e9), ("resnet50", 24.30e9)])
def test_training_all_of_a_resnet_costs_three_forward_passes_but_for_the_image_s_gradient(
    name: str, total: float
) -> None:
    counted = count(built(name), "stem")
    assert counted.prefix == 0
    assert counted.backward == 2 * counted.forward - STEM
    assert counted.total == pytest.approx(total, rel=0.002)


# No gradient for the input of layer4: the first convolutions of its two branches, in FLOPs.
@pytest.mark.parametrize(
    ("name", "spared", "total"),
    [
        ("resnet18", 2 * 49 * 512 * 256 * (9 + 1), 5.146e9),
        ("resnet50", 2 * 1024 * (196 * 512 + 49 * 2048), 11.012e9),
    ],
)
def test_a_frozen_prefix_costs_no_gradient_nor_does_the_input_at_the_cut(name: str, spared: int, total: float) -> None:
    model = built(name)
    counted, whole = count(model, "layer4"), count(model, "stem")
    assert counted.prefix + counted.forward == whole.forward
    assert counted.backward == 2 * counted.forward - spared
    assert counted.total == pytest.approx(total, rel=0.001)


def test_feature_extraction_costs_a_forward_pass_and_the_head_s_weight_gradient() -> None:
    counted = count(built("resnet50"), "head")
    assert counted.forward == counted.backward == 2 * 2048 * 1000
    assert counted.total == pytest.approx(8.18e9, rel=0.002)


@pytest.mark.parametrize("name", ["efficientnet_b0", "convnext_base", "vit_b_16"])
def test_depthwise_convolutions_and_attention_are_counted_backwards_too(name: str) -> None:
    counted = count(built(name), next(iter(backbones.stage_names(name))))
    assert counted.backward / counted.forward == pytest.approx(2.0, abs=0.03)


def test_attention_is_in_the_count() -> None:
    vit = built("vit_b_16")
    tokens, width = 197, 768
    block = 2 * tokens * width**2 * 12 + 2 * 2 * tokens**2 * width
    prefix, suffix = cut(vit, "blocks4")
    assert count_flops(list(prefix.children()), suffix, 224).forward == 3 * block + 2 * width * 1000


def test_a_folded_prefix_in_bf16_counts_the_same_and_may_hold_the_pooling() -> None:
    model = built("resnet18")
    prefix, head = cut(model, "head")
    folded = list(Prefix(prefix, torch.bfloat16).network)
    assert count_flops(folded, head, 224) == count_flops(list(prefix.children()), head, 224)


def test_nothing_live_is_touched() -> None:
    class Counting(nn.Dropout):
        calls = 0

        def forward(self, input: Tensor) -> Tensor:
            Counting.calls += 1
            return super().forward(input)

    prefix, suffix = cut(built("resnet18", classes=2), "layer4")
    network = nn.Sequential(suffix, Counting(), nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    network[2].requires_grad_(False)
    kept = {name: t.clone() for name, t in network.state_dict().items()}
    asked = {name: p.requires_grad for name, p in network.named_parameters()}
    random_state = torch.get_rng_state()
    count_flops(list(prefix.children()), network, 224)
    assert Counting.calls == 1
    assert all(module.training for module in network.modules())
    assert all(p.grad is None and p.device.type == "cpu" for p in network.parameters())
    assert {name: p.requires_grad for name, p in network.named_parameters()} == asked
    assert all(torch.equal(t, kept[name]) for name, t in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_network_that_is_all_frozen_has_no_backward_pass() -> None:
    model = built("resnet18").requires_grad_(False)
    assert count_flops([], model, 224).backward == 0


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H100 80GB HBM3", torch.float32, 494.7),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H100 NVL", torch.float16, 835.5),
        ("NVIDIA H200", torch.bfloat16, 989.4),
        ("NVIDIA GH200 480GB", torch.bfloat16, 989.4),
        ("NVIDIA B200", torch.bfloat16, 2250),
        ("NVIDIA GB200", torch.bfloat16, 2500),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A100 80GB PCIe", torch.float32, 156),
        ("NVIDIA A10", torch.bfloat16, 125),
        ("NVIDIA A10G", torch.bfloat16, 70),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("Tesla V100-SXM2-16GB", torch.float16, 125),
        ("Tesla V100-PCIE-32GB", torch.float32, 14),
        ("Tesla T4", torch.float16, 65),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("Tesla T4", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3", torch.float64, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, None),
        ("NVIDIA A10-24Q", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090 D", torch.bfloat16, None),
        ("NVIDIA RTX A4000", torch.bfloat16, None),
        ("NVIDIA T400", torch.float16, None),
        ("AMD Instinct MI300X", torch.bfloat16, None),
    ],
)
def test_gpus_are_known_by_whole_words_of_their_names(
    name: str, dtype: torch.dtype, tflops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    expected = (0.0, "unknown") if tflops is None else (pytest.approx(tflops * 1e12), "table")
    assert peak_flops(torch.device("cuda"), dtype) == expected


@pytest.fixture
def three_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def test_the_cpu_s_peak_is_measured_and_leaves_no_trace(three_threads: None) -> None:
    random_state = torch.get_rng_state()
    peak, source = peak_flops(torch.device("cpu"), torch.float32)
    assert source == "measured"
    assert 1e9 < peak < 1e14
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == 3


def test_the_cpu_s_peak_is_the_sum_over_its_threads(three_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "_one_thread_s_convolution", lambda dtype: {torch.bfloat16: 2e9}[dtype])
    assert peak_flops(torch.device("cpu"), torch.bfloat16) == (6e9, "measured")


def test_a_thread_s_peak_is_its_fastest_convolution(three_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # One look at the clock for the end, then three for each convolution: is there time, start, stop.
    clock = iter([0.0, 0.0, 0.0, 0.05, 0.05, 0.05, 0.06, 0.06, 0.06, 0.1, 1.0])
    monkeypatch.setattr(flops.time, "perf_counter", lambda: next(clock))
    assert flops._one_thread_s_convolution(torch.float32) == pytest.approx(2 * 8 * 196 * 128**2 * 9 / 0.01)


def test_mfu_is_the_needed_over_the_possible() -> None:
    # 8 H100s, ResNet-50, all of it, 2,500 images/s each: 24.3 GFLOP an image of 989.4 TFLOP/s.
    assert mfu(20_000, 24.3e9, 8, 989.4e12) == pytest.approx(0.0614, rel=0.001)
    assert mfu(20_000, 24.3e9, 8, 0.0) is None
