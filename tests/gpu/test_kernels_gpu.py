"""The compiled Triton kernels against their references on a CUDA device, at the sizes of real training."""

from __future__ import annotations

import functools

import pytest
import torch

from tests import kernel_checks
from tests.kernel_checks import MEAN, STD, draw_features, draw_images, draw_mixing
from tldist_kernels import HAS_TRITON, mix_normalize, mix_normalize_reference, mixed_cross_entropy, mmd
from tldist_kernels.mixing_spec import Mixing

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


def test_mmd_at_odd_sizes() -> None:
    kernel_checks.check_mmd("cuda", "triton")
    kernel_checks.check_awkward_features("cuda", "triton")
    kernel_checks.check_mmd_in_several_launches("cuda")


def test_mmd_at_real_sizes() -> None:
    kernel_checks.check_mmd("cuda", "auto", ((64, 64, 2048), (256, 256, 2048), (256, 200, 256), (700, 601, 257)))


def test_mmd_of_many_rows_holds_no_matrix_of_pairs() -> None:
    """16,000 rows: all pairs would take 1 GB in float32. The answer is that of the same batches, each given twice."""
    x_ND, y_MD = draw_features(4000, 4000, 40, "cuda", torch.float32)
    op = functools.partial(mmd, bandwidth=80.0)
    expected, grads = kernel_checks.value_and_grads(op, (x_ND, y_MD))
    doubled = [batch_ND.repeat(2, 1) for batch_ND in (x_ND, y_MD)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got, double_grads = kernel_checks.value_and_grads(op, doubled)
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    for double_grad, grad in zip(double_grads, grads, strict=True):
        torch.testing.assert_close(2 * double_grad[:4000], grad, rtol=1e-3, atol=1e-8)


def test_mmd_repeats_to_the_bit_and_waits_for_nothing() -> None:
    batches = draw_features(200, 150, 300, "cuda", torch.bfloat16)
    bandwidth = torch.full((), 600.0, device="cuda")

    def run() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        return kernel_checks.value_and_grads(lambda x, y: mmd(x, y, bandwidth=bandwidth), batches)

    first, first_grads = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again, again_grads = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)
    assert all(torch.equal(one, other) for one, other in zip(first_grads, again_grads, strict=True))


def test_mmd_in_double_takes_the_reference() -> None:
    batches = [batch.requires_grad_() for batch in draw_features(4, 3, 5, "cuda", torch.float64)]
    assert torch.autograd.gradcheck(lambda x, y: mmd(x, y, bandwidth=9.0), batches)


def test_mmd_inside_a_compiled_objective() -> None:
    batches = draw_features(64, 48, 100, "cuda", torch.float32)
    eager, eager_grads = kernel_checks.value_and_grads(mmd, batches)
    compiled, compiled_grads = kernel_checks.value_and_grads(torch.compile(mmd), batches)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=4e-6)
    torch.testing.assert_close(compiled_grads, eager_grads, rtol=1e-4, atol=1e-7)
