"""Comparisons of tldist_kernels with its references, shared by the unit tests, the GPU tests and a bare machine.

`PYTHONPATH=kernels python3 tests/kernel_checks.py --device cuda` needs torch, triton and numpy alone; with
`--device cpu` and TRITON_INTERPRET=1 the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from tldist_kernels import Backend, mix_normalize, mix_normalize_reference, mixed_cross_entropy
from tldist_kernels.mixing import Mixing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
IMAGE_SIZES = ((1, 5, 7), (3, 8, 16), (7, 6, 12), (2, 33, 50))
"""(N, H, W) whose rows are divisible by 1, 16, 4 and 2 bytes; the last takes several programs an image."""
LOGIT_SIZES = ((1, 10), (7, 10), (3, 1000), (37, 3), (5, 1), (3, 4097))
"""(N, C): several rows a program, one, one class, and a row of two blocks that is odd."""


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    device = parser.parse_args().device
    torch.manual_seed(0)
    start = time.perf_counter()
    mixes = check_mix_normalize(device, "triton", exact=device == "cpu")
    losses = check_mixed_cross_entropy(device, "triton")
    check_awkward_logits(device, "triton")
    if device == "cuda":
        mixes += check_mix_normalize(device, "auto", ((256, 224, 224), (65, 223, 225), (128, 192, 160)))
        losses += check_mixed_cross_entropy(device, "auto", ((1024, 1000), (4096, 1000), (1001, 21841), (33, 65536)))
    print(f"{mixes} comparisons of images and {losses} of losses passed in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
