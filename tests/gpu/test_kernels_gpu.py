"""The compiled Triton kernels against their references on a CUDA device, at the sizes of real training."""

from __future__ import annotations

import pytest
import torch

from tests import kernel_checks
from tests.kernel_checks import MEAN, STD, draw_images, draw_mixing
from tldist_kernels import HAS_TRITON, mix_normalize, mix_normalize_reference, mixed_cross_entropy
from tldist_kernels.mixing import Mixing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and HAS_TRITON), reason="needs CUDA and Triton"),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_mix_normalize_at_odd_sizes() -> None:
    kernel_checks.check_mix_normalize("cuda", "triton")


def test_mix_normalize_at_real_sizes() -> None:
    kernel_checks.check_mix_normalize("cuda", "auto", ((256, 224, 224), (65, 223, 225), (128, 192, 160)))


def test_mix_normalize_beyond_two_to_the_31_values() -> None:
    """14,300 images of 224 px; the last eight are mixed among themselves, so they can be checked alone."""
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free device memory")
    N, H, W, last = 14_300, 224, 224, 8
    images_NHWC = torch.zeros(N, H, W, 3, dtype=torch.uint8, device="cuda")
    images_NHWC[-last:] = draw_images(last, H, W, "cuda")
    tail = draw_mixing(last, H, W, "cuda")

    def padded(tensor: torch.Tensor | None) -> torch.Tensor:
        assert tensor is not None
        whole = torch.zeros(N, *tensor.shape[1:], dtype=tensor.dtype, device="cuda")
        whole[-last:] = tensor
        return whole

    whole = Mixing(*(padded(getattr(tail, name)) for name in vars(tail)))
    assert whole.partner_N is not None
    whole.partner_N[-last:] += N - last
    got = mix_normalize(images_NHWC, MEAN, STD, torch.bfloat16, **vars(whole))[-last:]
    expected = mix_normalize_reference(images_NHWC[-last:], MEAN, STD, torch.bfloat16, tail)
    torch.testing.assert_close(got.float(), expected.float(), rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)


def test_mix_normalize_of_a_misaligned_batch() -> None:
    """A view that starts at an odd address: the wide loads must give way."""
    flat = torch.randint(0, 256, (4 * 16 * 16 * 3 + 1,), dtype=torch.uint8, device="cuda")
    images_NHWC = flat[1:].view(4, 16, 16, 3)
    mixing = draw_mixing(4, 16, 16, "cuda")
    got = mix_normalize(images_NHWC, MEAN, STD, torch.float32, **vars(mixing))
    expected = mix_normalize_reference(images_NHWC, MEAN, STD, torch.float32, mixing)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_mix_normalize_does_not_wait_for_the_host() -> None:
    images_NHWC, mixing = draw_images(8, 32, 32, "cuda"), draw_mixing(8, 32, 32, "cuda")
    mix_normalize(images_NHWC, MEAN, STD, torch.bfloat16, **vars(mixing))
    torch.cuda.set_sync_debug_mode("error")
    try:
        mix_normalize(images_NHWC, MEAN, STD, torch.bfloat16, **vars(mixing))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_mixed_cross_entropy_at_odd_sizes() -> None:
    kernel_checks.check_mixed_cross_entropy("cuda", "triton")


def test_mixed_cross_entropy_at_real_sizes() -> None:
    sizes = ((1024, 1000), (4096, 1000), (1001, 21_841), (33, 65_536))
    kernel_checks.check_mixed_cross_entropy("cuda", "auto", sizes)


def test_mixed_cross_entropy_of_awkward_logits() -> None:
    kernel_checks.check_awkward_logits("cuda", "triton")


def test_mixed_cross_entropy_beyond_two_to_the_31_values() -> None:
    """33,000 rows of 65,536 bf16 logits, 4.3 GB; the last rows are checked alone."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free device memory")
    N, C, last = 33_000, 65_536, 4
    logits_NC = torch.zeros(N, C, dtype=torch.bfloat16, device="cuda")
    logits_NC[-last:] = torch.randn(last, C, device="cuda")
    tail_NC = logits_NC[-last:].clone().requires_grad_()
    labels_N = torch.randint(0, C, (N,), device="cuda")
    logits_NC.requires_grad_()
    mixed_cross_entropy(logits_NC, labels_N).sum().backward()
    kernel_checks.plain_mixed_loss(tail_NC, labels_N[-last:], None, None, 0.0).sum().backward()
    assert logits_NC.grad is not None and tail_NC.grad is not None
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(logits_NC.grad[-last:], tail_NC.grad, rtol=eps, atol=1e-6)


def test_mixed_cross_entropy_in_double_takes_the_reference() -> None:
    logits_NC = torch.randn(4, 6, dtype=torch.float64, device="cuda", requires_grad=True)
    labels_N = torch.randint(0, 6, (4,), device="cuda")
    assert torch.autograd.gradcheck(lambda z: mixed_cross_entropy(z, labels_N), (logits_NC,))


def test_mixed_cross_entropy_inside_a_compiled_objective() -> None:
    logits_NC = torch.randn(64, 100, device="cuda", requires_grad=True)
    labels_N, partner_labels_N = torch.randint(0, 100, (2, 64), device="cuda")
    weight_N = torch.rand(64, device="cuda")

    def objective(logits_NC: torch.Tensor) -> torch.Tensor:
        return mixed_cross_entropy(logits_NC, labels_N, partner_labels_N, weight_N, 0.1).mean()

    (eager,) = torch.autograd.grad(objective(logits_NC), logits_NC)
    (compiled,) = torch.autograd.grad(torch.compile(objective)(logits_NC), logits_NC)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)
