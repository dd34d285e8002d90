"""Cross-entropy with mixed targets and label smoothing, per sample.

Mixup and CutMix train on weight * CE(z, a) + (1 - weight) * CE(z, b) (Zhang et al., ICLR 2018, section 2;
Yun et al., ICCV 2019, eq. 2), and label smoothing (Szegedy et al., CVPR 2016, section 7) spreads `s` of each
target evenly. Both terms share one log-sum-exp, so with C classes and logits z there is a closed form:

    loss     = lse(z) - (1 - s) * (weight * z[a] + (1 - weight) * z[b]) - s * mean(z)
    dloss/dz = softmax(z) - (1 - s) * (weight * onehot(a) + (1 - weight) * onehot(b)) - s / C

No (N, C) tensor of soft targets is ever made.
"""

import torch
import torch.nn.functional as F

from tldist_kernels.backend import Backend, use_triton

MAX_CLASSES_TRITON = 65_536
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def mixed_cross_entropy(
    logits_NC: torch.Tensor,
    labels_N: torch.Tensor,
    partner_labels_N: torch.Tensor | None = None,
    weight_N: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    *,
    backend: Backend = "auto",
) -> torch.Tensor:
    """weight * CE(logits, labels) + (1 - weight) * CE(logits, partner labels); plain CE without the last two.

    logits_NC: float32, float16 or bfloat16 (sums in float32), or float64 (torch reference).
    labels_N, partner_labels_N: int64 in [0, C).  weight_N: the share of `labels_N`, treated as a constant.
    label_smoothing: in [0, 1], as in torch.nn.functional.cross_entropy.
    Returns loss_N, not reduced: float32 (float64 for float64 logits), differentiable once in the logits.
    A label out of range is an error on the CPU; on CUDA it gives a NaN loss, so that nothing waits for it.
    Raises ValueError for wrong shapes, dtypes or devices.
    """
    _check(logits_NC, labels_N, partner_labels_N, weight_N, label_smoothing)
    fits = logits_NC.dtype in _TRITON_DTYPES and 0 < logits_NC.shape[1] <= MAX_CLASSES_TRITON
    if fits and logits_NC.shape[0] > 0 and use_triton(logits_NC, backend):
        # Imported at the first launch: Triton is optional, and costs half a second to import.
        from tldist_kernels.cross_entropy_triton import MixedCrossEntropy

        loss_N = MixedCrossEntropy.apply(logits_NC, labels_N, partner_labels_N, weight_N, label_smoothing)
        assert isinstance(loss_N, torch.Tensor)
        return loss_N
    return mixed_cross_entropy_reference(logits_NC, labels_N, partner_labels_N, weight_N, label_smoothing)


def mixed_cross_entropy_reference(
    logits_NC: torch.Tensor,
    labels_N: torch.Tensor,
    partner_labels_N: torch.Tensor | None = None,
    weight_N: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """`mixed_cross_entropy` in torch operations, with one log-softmax for both labels."""
    compute_dtype = torch.float64 if logits_NC.dtype == torch.float64 else torch.float32
    log_probs_NC = F.log_softmax(logits_NC, dim=1, dtype=compute_dtype)
    if partner_labels_N is None or weight_N is None:
        target_N = log_probs_NC.gather(1, labels_N[:, None]).squeeze(1)
    else:
        labels_N2 = torch.stack((labels_N, partner_labels_N), dim=1)
        weight_N = weight_N.detach().to(compute_dtype)
        weights_N2 = torch.stack((weight_N, 1.0 - weight_N), dim=1)
        target_N = (log_probs_NC.gather(1, labels_N2) * weights_N2).sum(1)
    if label_smoothing == 0.0:
        return -target_N
    return -(1.0 - label_smoothing) * target_N - label_smoothing * log_probs_NC.mean(1)


def _check(
    logits_NC: torch.Tensor,
    labels_N: torch.Tensor,
    partner_labels_N: torch.Tensor | None,
    weight_N: torch.Tensor | None,
    label_smoothing: float,
) -> None:
    if logits_NC.ndim != 2 or not logits_NC.is_floating_point():
        raise ValueError(f"logits_NC must be a float (N, C), got {logits_NC.dtype} {tuple(logits_NC.shape)}")
    if (partner_labels_N is None) != (weight_N is None):
        raise ValueError("partner_labels_N and weight_N go together: give both or neither")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
    shape = (logits_NC.shape[0],)
    for name, tensor in (
        ("labels_N", labels_N),
        ("partner_labels_N", partner_labels_N),
        ("weight_N", weight_N),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != logits_NC.device:
            raise ValueError(f"{name} is on {tensor.device}, the logits on {logits_NC.device}")
        if name != "weight_N" and tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {tensor.dtype}")
