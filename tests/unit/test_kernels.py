"""mix_normalize, mixed_cross_entropy and mmd against loops written from their formulas, and Triton's interpreter."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import kernel_checks
from tests.kernel_checks import DTYPES, IMAGE_SIZES, MEAN, STD, draw_features, draw_images, draw_mixing, option_sets
from tldist_kernels import (
    HAS_TRITON,
    mean_squared_distance,
    mix_normalize,
    mix_normalize_reference,
    mixed_cross_entropy,
    mixed_cross_entropy_reference,
    mmd,
    mmd_reference,
)
from tldist_kernels.mixing import mix_normalize_cpu
from tldist_kernels.mixing_spec import Mixing

ROOT = Path(__file__).parents[2]


def pixel_by_pixel(images_NHWC: torch.Tensor, mixing: Mixing) -> np.ndarray:
    """The formulas, one pixel at a time: x = lambda x_i + (1 - lambda) x_j in the box, then the rest. (N, 3, H, W)."""
    pixels = images_NHWC.numpy().astype(np.float64)
    N, H, W, C = pixels.shape
    out_NCHW = np.empty((N, C, H, W))

    def at(i: int, y: int, x: int) -> np.ndarray:
        flip = mixing.flip_N is not None and bool(mixing.flip_N[i])
        return pixels[i, y, W - 1 - x if flip else x]

    def inside(boxes_N4: torch.Tensor, i: int, y: int, x: int) -> bool:
        top, left, bottom, right = boxes_N4[i].tolist()
        return top <= y < bottom and left <= x < right

    for i, y, x in itertools.product(range(N), range(H), range(W)):
        value = at(i, y, x)
        if mixing.partner_N is not None and mixing.weight_N is not None:
            lam = float(mixing.weight_N[i])
            if mixing.boxes_N4 is None or inside(mixing.boxes_N4, i, y, x):
                value = lam * value + (1 - lam) * at(int(mixing.partner_N[i]), y, x)
        value = (value / 255 - np.array(MEAN)) / np.array(STD)
        if mixing.erase_N4 is not None and inside(mixing.erase_N4, i, y, x):
            value = np.zeros(C)
        out_NCHW[i, :, y, x] = value
    return out_NCHW


@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_mix_normalize_follows_the_formulas(size: tuple[int, int, int]) -> None:
    torch.manual_seed(sum(size))
    images_NHWC, everything = draw_images(*size, "cpu"), draw_mixing(*size, "cpu")
    before = images_NHWC.clone()
    for mixing in option_sets(everything):
        expected = torch.from_numpy(pixel_by_pixel(images_NHWC, mixing))
        for dtype in DTYPES:
            for got in (
                mix_normalize(images_NHWC, MEAN, STD, dtype, **vars(mixing)),
                mix_normalize_reference(images_NHWC, MEAN, STD, dtype, mixing),
            ):
                assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
                torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=2e-6)
    assert torch.equal(images_NHWC, before)


def test_the_cpu_path_works_in_chunks_of_several_images() -> None:
    """Enough images for a last chunk that is not full (four images of 224 px a chunk)."""
    torch.manual_seed(1)
    images_NHWC, everything = draw_images(6, 224, 224, "cpu"), draw_mixing(6, 224, 224, "cpu")
    for mixing in option_sets(everything):
        expected = mix_normalize_reference(images_NHWC, MEAN, STD, torch.float32, mixing)
        got = mix_normalize_cpu(images_NHWC, MEAN, STD, torch.float32, mixing)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


def test_cutmix_pastes_the_partner_and_weighs_labels_by_area() -> None:
    """CutMix (Yun et al., 2019): lambda is one minus the box's share of the image, for pixels and loss alike."""
    images_NHWC = torch.stack((torch.zeros(8, 10, 3), torch.full((8, 10, 3), 255.0))).byte()
    boxes_N4 = torch.tensor([[2, 3, 6, 8], [0, 0, 0, 0]], dtype=torch.int32)
    out_NCHW = mix_normalize(
        images_NHWC,
        (0.0,) * 3,
        (1.0,) * 3,
        torch.float32,
        partner_N=torch.tensor([1, 0]),
        weight_N=torch.zeros(2),
        boxes_N4=boxes_N4,
    )
    share = 4 * 5 / 80
    assert out_NCHW[0].mean().item() == pytest.approx(share)
    assert torch.equal(out_NCHW[0, :, 2:6, 3:8], torch.ones(3, 4, 5)) and torch.all(out_NCHW[1] == 1)
    logits_NC, one = torch.randn(1, 4), torch.ones(1, dtype=torch.int64)
    loss = mixed_cross_entropy(logits_NC, one, 2 * one, torch.tensor([1 - share]))
    log_probs_C = logits_NC.log_softmax(1)[0]
    torch.testing.assert_close(loss[0], -(1 - share) * log_probs_C[1] - share * log_probs_C[2])


def test_mix_normalize_takes_an_empty_batch() -> None:
    out_NCHW = mix_normalize(torch.empty(0, 4, 4, 3, dtype=torch.uint8), MEAN, STD, torch.float16)
    assert out_NCHW.shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partner_N": torch.zeros(2, dtype=torch.int64)}, "go together"),
        ({"boxes_N4": torch.zeros(2, 4, dtype=torch.int32)}, "needs partner_N"),
        ({"erase_N4": torch.zeros(2, 3, dtype=torch.int32)}, "shape"),
        ({"erase_N4": torch.zeros(2, 4)}, "dtype"),
        ({"flip_N": torch.zeros(2, dtype=torch.uint8)}, "bool"),
        ({"images_NHWC": torch.zeros(2, 4, 4, 3)}, "uint8"),
        ({"images_NHWC": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, "H, W, 3"),
        ({"images_NHWC": torch.zeros(2, 4, 8, 3, dtype=torch.uint8)[:, :, ::2]}, "contiguous"),
        ({"dtype": torch.float64}, "float32, float16 or bfloat16"),
        ({"mean_3": (0.5,)}, "mean_3"),
    ],
)
def test_mix_normalize_says_what_is_wrong(changes: dict, message: str) -> None:
    good = {
        "images_NHWC": torch.zeros(2, 4, 4, 3, dtype=torch.uint8),
        "mean_3": MEAN,
        "std_3": STD,
        "dtype": torch.float32,
    }
    with pytest.raises(ValueError, match=message):
        mix_normalize(**(good | changes))


def test_mixed_cross_entropy_equals_torchs() -> None:
    torch.manual_seed(0)
    assert kernel_checks.check_mixed_cross_entropy("cpu", "torch") == 72


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("mixed", [False, True])
def test_mixed_cross_entropys_gradient(smoothing: float, mixed: bool) -> None:
    torch.manual_seed(0)
    logits_NC = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    labels_N, partner_labels_N = torch.randint(0, 7, (2, 5))
    mix = (partner_labels_N, torch.rand(5, dtype=torch.float64)) if mixed else (None, None)

    def loss_of(logits_NC: torch.Tensor) -> torch.Tensor:
        return mixed_cross_entropy_reference(logits_NC, labels_N, *mix, smoothing)

    assert torch.autograd.gradcheck(loss_of, (logits_NC,))


def test_mixed_cross_entropy_sees_a_label_that_is_no_class() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        mixed_cross_entropy(torch.randn(2, 3), torch.tensor([0, 3]))


def test_mixed_cross_entropy_says_what_is_wrong() -> None:
    logits_NC, labels_N = torch.randn(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="go together"):
        mixed_cross_entropy(logits_NC, labels_N, labels_N)
    with pytest.raises(ValueError, match="int64"):
        mixed_cross_entropy(logits_NC, labels_N.int())
    with pytest.raises(ValueError, match="label_smoothing"):
        mixed_cross_entropy(logits_NC, labels_N, label_smoothing=1.5)
    with pytest.raises(ValueError, match="shape"):
        mixed_cross_entropy(logits_NC, labels_N[:1])


def test_mmd_follows_its_definition() -> None:
    torch.manual_seed(0)
    assert kernel_checks.check_mmd("cpu", "torch") == 42
    kernel_checks.check_awkward_features("cpu", "torch")


@pytest.mark.parametrize("op", [mmd, mmd_reference])
@pytest.mark.parametrize("unbiased", [False, True])
def test_mmds_gradient(op: Callable[..., torch.Tensor], unbiased: bool) -> None:
    """With the bandwidth held, as the gradient takes it to be; left to the batches, it is the same gradient."""
    torch.manual_seed(0)
    x_ND, y_MD = (batch.requires_grad_() for batch in draw_features(4, 3, 5, "cpu", torch.float64))
    bandwidth = mean_squared_distance(x_ND, y_MD)
    torch.testing.assert_close(bandwidth, torch.pdist(torch.cat((x_ND, y_MD))).square().mean())
    assert not bandwidth.requires_grad
    held = functools.partial(op, bandwidth=bandwidth, unbiased=unbiased)
    assert torch.autograd.gradcheck(held, (x_ND, y_MD))
    free = torch.autograd.grad(op(x_ND, y_MD, unbiased=unbiased), (x_ND, y_MD))
    torch.testing.assert_close(free, torch.autograd.grad(held(x_ND, y_MD), (x_ND, y_MD)))


@pytest.mark.parametrize("op", [mmd, mmd_reference])
def test_mmd_survives_a_far_origin_and_autocast(op: Callable[..., torch.Tensor]) -> None:
    """At 1000 from the origin, squares of the features leave float32 no digit of a distance, unless centred."""
    torch.manual_seed(0)
    x_ND, y_MD = (batch.round(decimals=2) for batch in draw_features(9, 8, 6, "cpu", torch.float64))
    expected, expected_grads = kernel_checks.value_and_grads(op, (x_ND, y_MD))
    far = [(batch + 1000.0).float().requires_grad_() for batch in (x_ND, y_MD)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = op(*far)
    grads = torch.autograd.grad(3.0 * got, far)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("op", [mmd, mmd_reference])
def test_mmd_compiles_to_one_graph(op: Callable[..., torch.Tensor]) -> None:
    torch.manual_seed(0)
    batches = draw_features(9, 7, 5, "cpu", torch.float32)
    expected = kernel_checks.value_and_grads(op, batches)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(kernel_checks.value_and_grads(compiled, batches), expected)


def test_unbiased_mmd_is_zero_on_average_where_the_distributions_are_one() -> None:
    """300 draws of 8 rows from one Gaussian: the biased mean is far above 0, the unbiased within noise of it."""
    torch.manual_seed(0)
    draws = torch.randn(300, 2, 8, 4)
    unbiased = torch.stack([mmd(x_ND, y_MD, unbiased=True) for x_ND, y_MD in draws])
    biased = torch.stack([mmd(x_ND, y_MD) for x_ND, y_MD in draws])
    noise = unbiased.std() / len(draws) ** 0.5
    assert abs(unbiased.mean()) < 4 * noise < 0.1 * biased.mean()
    assert biased.min() > 0 > unbiased.min()


@pytest.mark.parametrize(
    ("source_shape", "target_shape", "options", "message"),
    [
        ((4,), (4, 3), {}, "rows, D"),
        ((4, 3), (4, 2), {}, "3 and 2 features"),
        ((0, 3), (4, 3), {}, "too small"),
        ((4, 0), (4, 0), {}, "too small"),
        ((4, 3), (1, 3), {"unbiased": True}, "too small"),
        ((4, 3), (4, 3), {"multiples": ()}, "at least one"),
        ((4, 3), (4, 3), {"multiples": (1.0, 0.0)}, "positive"),
        ((4, 3), (4, 3), {"bandwidth": -1.0}, "bandwidth must be positive"),
        ((4, 3), (4, 3), {"bandwidth": torch.ones(2)}, "one value"),
        ((4, 3), (4, 3), {"bandwidth": torch.ones((), device="meta")}, "on meta"),
    ],
)
def test_mmd_says_what_is_wrong(source_shape: tuple, target_shape: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mmd(torch.randn(source_shape), torch.randn(target_shape), **options)


def test_mmd_wants_one_dtype_and_one_device() -> None:
    features_ND = torch.randn(4, 3)
    for other_ND in (features_ND.double(), features_ND.to("meta")):
        with pytest.raises(ValueError, match="source_ND is"):
            mmd(features_ND, other_ND)
    with pytest.raises(ValueError, match="int64"):
        mmd(features_ND.long(), features_ND.long())


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_the_triton_kernels_agree_under_the_interpreter() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it decorates, and would keep it for all tests."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "kernels")}
    command = [sys.executable, str(ROOT / "tests" / "kernel_checks.py"), "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "passed" in done.stdout
