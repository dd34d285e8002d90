"""Comparisons of tldist_kernels with its references, shared by the unit tests, the GPU tests and a bare machine.

`PYTHONPATH=kernels python3 tests/kernel_checks.py --device cuda` needs torch, triton and numpy alone; with
`--device cpu` and TRITON_INTERPRET=1 the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from tldist_kernels import Backend, mix_normalize, mix_normalize_reference, mixed_cross_entropy, mmd
from tldist_kernels.mixing_spec import Mixing
from tldist_kernels.mmd_formula import MULTIPLES

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
IMAGE_SIZES = ((1, 5, 7), (3, 8, 16), (7, 6, 12), (2, 33, 50))
"""(N, H, W) whose rows are divisible by 1, 16, 4 and 2 bytes; the last takes several programs an image."""
LOGIT_SIZES = ((1, 10), (7, 10), (3, 1000), (37, 3), (5, 1), (3, 4097))
"""(N, C): several rows a program, one, one class, and a row of two blocks that is odd."""

FEATURE_SIZES = ((1, 1, 1), (2, 3, 1), (7, 5, 17), (33, 50, 130))
"""(N, M, D): one row, one feature, one tile, several tiles (one with both batches in it) and stretches of D."""


def draw_images(N: int, H: int, W: int, device: str) -> torch.Tensor:
    return torch.randint(0, 256, (N, H, W, 3), dtype=torch.uint8).to(device)


def draw_mixing(N: int, H: int, W: int, device: str) -> Mixing:
    """Every option at once, with the corners in it: weights 0 and 1, an empty box and a full one."""
    weight_N = torch.rand(N)
    weight_N[::3] = 0.0
    weight_N[2::5] = 1.0
    boxes_N4, erase_N4 = _draw_boxes(N, H, W), _draw_boxes(N, H, W)
    boxes_N4[-1] = torch.tensor([0, 0, H, W])
    erase_N4[-1] = torch.tensor([H // 2, W // 2, H // 2, W // 2])
    mixing = Mixing(torch.randperm(N), weight_N, boxes_N4, torch.rand(N) < 0.5, erase_N4)
    return Mixing(*(getattr(mixing, name).to(device) for name in vars(mixing)))


def _draw_boxes(N: int, H: int, W: int) -> torch.Tensor:
    y_N2 = torch.randint(0, H + 1, (N, 2)).sort(1).values
    x_N2 = torch.randint(0, W + 1, (N, 2)).sort(1).values
    return torch.stack((y_N2[:, 0], x_N2[:, 0], y_N2[:, 1], x_N2[:, 1]), dim=1).int()


def option_sets(mixing: Mixing) -> Iterator[Mixing]:
    """The options of `mixing` in each of the twelve legal combinations."""
    for mix, flip, erase in itertools.product(("none", "whole", "box"), (False, True), (False, True)):
        chosen = mixing if flip else replace(mixing, flip_N=None)
        chosen = chosen if erase else replace(chosen, erase_N4=None)
        if mix != "box":
            chosen = replace(chosen, boxes_N4=None)
        if mix == "none":
            chosen = replace(chosen, partner_N=None, weight_N=None)
        yield chosen


def check_mix_normalize(
    device: str, backend: Backend, sizes: Iterable[tuple[int, int, int]] = IMAGE_SIZES, exact: bool = False
) -> int:
    """Compare with the reference and count the comparisons. `exact`: to the last bit, bf16 to one.

    Otherwise to one unit in the last place plus 1e-6, since a GPU fuses x * scale + shift.
    """
    count = 0
    for (N, H, W), dtype in itertools.product(sizes, DTYPES):
        images_NHWC, everything = draw_images(N, H, W, device), draw_mixing(N, H, W, device)
        before = images_NHWC.clone()
        for mixing in option_sets(everything):
            got = mix_normalize(images_NHWC, MEAN, STD, dtype, **vars(mixing), backend=backend)
            expected = mix_normalize_reference(images_NHWC, MEAN, STD, dtype, mixing)
            assert got.shape == (N, 3, H, W) and got.dtype == dtype
            assert got.permute(0, 2, 3, 1).is_contiguous(), "the output is channels_last"
            _assert_within_ulp(got, expected, exact, f"{(N, H, W)} {mixing}")
            count += 1
        assert torch.equal(before, images_NHWC), "the input is left alone"
    return count


def _assert_within_ulp(got: torch.Tensor, expected: torch.Tensor, exact: bool, what: str) -> None:
    if exact and got.dtype != torch.bfloat16:
        assert torch.equal(got, expected), what
        return
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.float(), expected.float(), rtol=eps, atol=1e-6, msg=lambda m: f"{what}\n{m}")


def plain_mixed_loss(
    logits_NC: torch.Tensor,
    labels_N: torch.Tensor,
    partner_labels_N: torch.Tensor | None,
    weight_N: torch.Tensor | None,
    label_smoothing: float,
) -> torch.Tensor:
    """The loss from torch.nn.functional.cross_entropy, in float32."""

    def loss(labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits_NC.float(), labels, reduction="none", label_smoothing=label_smoothing)

    if partner_labels_N is None or weight_N is None:
        return loss(labels_N)
    return weight_N * loss(labels_N) + (1 - weight_N) * loss(partner_labels_N)


def check_mixed_cross_entropy(device: str, backend: Backend, sizes: Iterable[tuple[int, int]] = LOGIT_SIZES) -> int:
    """Compare values and gradients with torch.nn.functional.cross_entropy; count the comparisons."""
    count = 0
    for (N, C), dtype in itertools.product(sizes, DTYPES):
        logits_NC = (3 * torch.randn(N, C)).to(device, dtype)
        labels_N, partner_labels_N = torch.randint(0, C, (2, N)).to(device)
        weight_N, grad_N = torch.rand(2, N).to(device)
        for mixed, smoothing in itertools.product((False, True), (0.0, 0.1)):
            mix = (partner_labels_N, weight_N) if mixed else (None, None)
            targets = (labels_N, *mix, smoothing)
            op = functools.partial(mixed_cross_entropy, backend=backend)
            got_N, got_NC = _loss_and_grad(op, logits_NC, targets, grad_N)
            # The truth in float32 throughout: torch would round each of its two losses' gradients to bf16.
            expected_N, expected_NC = _loss_and_grad(plain_mixed_loss, logits_NC.float(), targets, grad_N)
            assert got_N.dtype == torch.float32 and got_NC.dtype == dtype
            torch.testing.assert_close(got_N, expected_N, rtol=1e-5, atol=1e-5)
            rtol = max(torch.finfo(dtype).eps, 1e-5)
            torch.testing.assert_close(got_NC.float(), expected_NC, rtol=rtol, atol=2e-6)
            count += 1
    return count


def _loss_and_grad(
    op: Callable[..., torch.Tensor], logits_NC: torch.Tensor, targets: tuple[Any, ...], grad_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """loss_N of `op(logits, *targets)`, and the gradient of grad_N * loss_N in the logits."""
    leaf_NC = logits_NC.clone().requires_grad_()
    loss_N = op(leaf_NC, *targets)
    (grad_NC,) = torch.autograd.grad(loss_N, leaf_NC, grad_N)
    return loss_N.detach(), grad_NC


def check_awkward_logits(device: str, backend: Backend) -> None:
    """Strided logits and labels, an expanded gradient, masked classes, extreme logits, a label out of range."""
    wide_NC = torch.randn(9, 48, device=device)
    labels_N = torch.randint(0, 20, (18,), device=device)[::2]
    for logits_NC in (wide_NC[:, 3:23], torch.randn(20, 9, device=device).t(), 80 * wide_NC[:, :20]):
        leaf_NC = logits_NC.detach().requires_grad_()
        mixed_cross_entropy(leaf_NC, labels_N, backend=backend).sum().backward()  # an expanded gradient
        other_NC = logits_NC.detach().clone().requires_grad_()
        F.cross_entropy(other_NC, labels_N, reduction="sum").backward()
        torch.testing.assert_close(leaf_NC.grad, other_NC.grad, rtol=1e-5, atol=1e-6)
    masked_NC = torch.randn(2, 5000, device=device)
    masked_NC[:, :4500] = float("-inf")  # a first block without a finite logit
    labels_2 = torch.tensor([4600, 4999], device=device)
    torch.testing.assert_close(
        mixed_cross_entropy(masked_NC, labels_2, backend=backend),
        F.cross_entropy(masked_NC, labels_2, reduction="none"),
    )
    lost = mixed_cross_entropy(wide_NC[:2], torch.tensor([48, -1], device=device), backend=backend)
    assert lost.isnan().all(), "a label that is no class is seen"


def plain_mmd(
    source_ND: torch.Tensor,
    target_MD: torch.Tensor,
    bandwidth: float | None,
    unbiased: bool,
    multiples: Sequence[float],
) -> torch.Tensor:
    """MMD^2 in float64 from its definition: all differences, the kernel's matrices, their means."""
    x_ND, y_MD = source_ND.double(), target_MD.double()

    def squared(a_RD: torch.Tensor, b_CD: torch.Tensor) -> torch.Tensor:
        return (a_RD[:, None] - b_CD).square().sum(-1)

    def kernel(a_RD: torch.Tensor, b_CD: torch.Tensor) -> torch.Tensor:
        squared_RC = squared(a_RD, b_CD)
        return torch.stack([torch.exp(-squared_RC / (base * multiple)) for multiple in multiples]).sum(0)

    def mean_within(a_RD: torch.Tensor) -> torch.Tensor:
        R, k_RR = a_RD.shape[0], kernel(a_RD, a_RD)
        return (k_RR.sum() - k_RR.trace()) / (R * (R - 1)) if unbiased else k_RR.mean()

    z_TD = torch.cat((x_ND, y_MD)).detach()
    T = z_TD.shape[0]
    base = squared(z_TD, z_TD).sum().item() / (T * T - T) if bandwidth is None else bandwidth
    return mean_within(x_ND) + mean_within(y_MD) - 2 * kernel(x_ND, y_MD).mean()


def check_mmd(device: str, backend: Backend, sizes: Iterable[tuple[int, int, int]] = FEATURE_SIZES) -> int:
    """Compare values and gradients with the definition in float64; count the comparisons."""
    count = 0
    for (N, M, D), dtype, unbiased in itertools.product(sizes, DTYPES, (False, True)):
        if unbiased and min(N, M) == 1:
            continue
        batches = draw_features(N, M, D, device, dtype)
        for multiples, bandwidth in ((MULTIPLES, None), ((0.5, 3.0), 1.5 * D)):
            options = {"multiples": multiples, "bandwidth": bandwidth, "unbiased": unbiased}
            got, grads = value_and_grads(functools.partial(mmd, **options, backend=backend), batches)
            doubles = [batch.double() for batch in batches]
            expected, expected_grads = value_and_grads(functools.partial(plain_mmd, **options), doubles)
            assert got.dtype == torch.float32 and all(grad.dtype == dtype for grad in grads)
            _assert_near(got, expected, grads, expected_grads, rounding=_rounding(dtype, D))
            count += 1
    return count


def draw_features(N: int, M: int, D: int, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Two batches of different mean and spread, far from the origin."""
    return [(torch.randn(N, D) + 1.5).to(device, dtype), (1.3 * torch.randn(M, D) + 1.8).to(device, dtype)]


def _rounding(dtype: torch.dtype, D: int) -> float:
    """How far rounding each centred feature may move a relative distance: its errors average over D features."""
    return 1e-5 if dtype == torch.float32 else 2.0 * torch.finfo(dtype).eps / D**0.5


def value_and_grads(
    op: Callable[..., torch.Tensor], batches: Iterable[torch.Tensor]
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    leaves = [batch.detach().requires_grad_() for batch in batches]
    loss = op(*leaves)
    return loss.detach(), torch.autograd.grad(3.0 * loss, leaves)


def _assert_near(
    got: torch.Tensor,
    expected: torch.Tensor,
    grads: Iterable[torch.Tensor],
    expected_grads: tuple[torch.Tensor, ...],
    rounding: float,
) -> None:
    """Gradients to the last place of their dtype, and to a share of the largest, since sums of them cancel."""
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=rounding)
    largest = max(grad.abs().max().item() for grad in expected_grads)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        eps = torch.finfo(grad.dtype).eps
        torch.testing.assert_close(grad.double(), expected_grad, rtol=eps, atol=max(rounding, eps) * largest + 1e-7)


def check_awkward_features(device: str, backend: Backend) -> None:
    """Strides, batches that change places, a batch against itself, equal rows, a tensor bandwidth, one frozen batch."""
    wide_ND = torch.randn(12, 48, device=device)
    x_ND, y_MD = wide_ND[:5, 3:23], torch.randn(20, 9, device=device).t()
    own = functools.partial(mmd, backend=backend)
    got, grads = value_and_grads(own, (x_ND, y_MD))
    plain = functools.partial(plain_mmd, bandwidth=None, unbiased=False, multiples=MULTIPLES)
    expected, expected_grads = value_and_grads(plain, (x_ND.double(), y_MD.double()))
    _assert_near(got, expected, grads, expected_grads, rounding=1e-5)
    swapped, (y_grad_MD, x_grad_ND) = value_and_grads(own, (y_MD, x_ND))
    _assert_near(swapped, expected, (x_grad_ND, y_grad_MD), expected_grads, rounding=1e-5)

    zero, grads = value_and_grads(own, (wide_ND, wide_ND))
    assert abs(zero.item()) < 4e-6 and all(grad.abs().max() < 1e-6 for grad in grads), "a batch is at 0 from itself"
    point_ND = torch.full((3, 7), 0.5, device=device)
    alike, grads = value_and_grads(own, (point_ND, point_ND[:2]))
    assert abs(alike.item()) < 4e-6 and not any(grad.any() for grad in grads), "equal rows neither divide by 0 nor pull"

    bandwidth = torch.tensor([7.0], device=device, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(own(x_ND, y_MD, bandwidth=bandwidth), own(x_ND, y_MD, bandwidth=7.0))
    leaf_ND = x_ND.detach().requires_grad_()
    (grad_ND,) = torch.autograd.grad(own(leaf_ND, y_MD), leaf_ND)
    torch.testing.assert_close(grad_ND.double(), expected_grads[0] / 3.0, rtol=1e-5, atol=1e-7)


def check_mmd_in_several_launches(device: str) -> None:
    """Columns that a first launch of the backward does not reach, on a device said to be small."""
    from tldist_kernels import mmd_triton

    with mock.patch.object(mmd_triton, "PROGRAMS", 1):
        assert mmd_triton._backward_split(135) == (128, 1)
        check_mmd(device, "triton", ((70, 65, 3),))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    device = parser.parse_args().device
    torch.manual_seed(0)
    start = time.perf_counter()
    mixes = check_mix_normalize(device, "triton", exact=device == "cpu")
    losses = check_mixed_cross_entropy(device, "triton")
    check_awkward_logits(device, "triton")
    distances = check_mmd(device, "triton")
    check_awkward_features(device, "triton")
    check_mmd_in_several_launches(device)
    if device == "cuda":
        mixes += check_mix_normalize(device, "auto", ((256, 224, 224), (65, 223, 225), (128, 192, 160)))
        losses += check_mixed_cross_entropy(device, "auto", ((1024, 1000), (4096, 1000), (1001, 21841), (33, 65536)))
        distances += check_mmd(device, "auto", ((64, 64, 2048), (256, 256, 2048), (700, 601, 257)))
    counts = f"{mixes} comparisons of images, {losses} of losses and {distances} of MMDs"
    print(f"{counts} passed in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
