"""What `mix_normalize` is asked to do: the options of a batch, and normalisation as one multiplication and addition."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Mixing:
    """What happens to each image of a batch of N; every field may be None. Boxes are half-open, in pixels.

    partner_N: int, the image j mixed into image i.       weight_N: float32 in [0, 1], the share of image i.
    boxes_N4:  int32 (top, left, bottom, right); None mixes the whole image.
    flip_N:    bool, mirror left to right before mixing.  erase_N4: int32 like boxes_N4, set to 0 at the end.
    """

    partner_N: torch.Tensor | None = None
    weight_N: torch.Tensor | None = None
    boxes_N4: torch.Tensor | None = None
    flip_N: torch.Tensor | None = None
    erase_N4: torch.Tensor | None = None

    def check(self, images_NHWC: torch.Tensor) -> None:
        """ValueError where a field does not fit the batch. Values are not read: that would stall a GPU."""
        N = images_NHWC.shape[0]
        if (self.partner_N is None) != (self.weight_N is None):
            raise ValueError("partner_N and weight_N go together: give both or neither")
        if self.boxes_N4 is not None and self.partner_N is None:
            raise ValueError("boxes_N4 says where to mix, so it needs partner_N and weight_N")
        for name, shape in (
            ("partner_N", (N,)),
            ("weight_N", (N,)),
            ("boxes_N4", (N, 4)),
            ("flip_N", (N,)),
            ("erase_N4", (N, 4)),
        ):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
            if tensor.device != images_NHWC.device:
                raise ValueError(f"{name} is on {tensor.device}, the images on {images_NHWC.device}")
            if tensor.is_floating_point() != (name == "weight_N"):
                raise ValueError(f"{name} has dtype {tensor.dtype}; only weight_N is a float")
        if self.flip_N is not None and self.flip_N.dtype != torch.bool:
            raise ValueError(f"flip_N must be bool, got {self.flip_N.dtype}")


def affine(mean_3: Sequence[float], std_3: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(scale_3, shift_3) with (x / 255 - mean) / std = x * scale + shift."""
    scale_3 = tuple(1.0 / (255.0 * std) for std in std_3)
    shift_3 = tuple(-mean / std for mean, std in zip(mean_3, std_3, strict=True))
    return scale_3, shift_3


@functools.lru_cache(maxsize=64)
def affine_row(
    mean_3: tuple[float, ...], std_3: tuple[float, ...], pixels: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """`affine` as float32 tensors of 3 * pixels values; kept, as making one on a GPU waits for the host."""
    scale_3, shift_3 = affine(mean_3, std_3)
    scale_row = torch.tensor(scale_3 * pixels, dtype=torch.float32, device=device)
    return scale_row, torch.tensor(shift_3 * pixels, dtype=torch.float32, device=device)
