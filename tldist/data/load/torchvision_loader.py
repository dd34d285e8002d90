"""The torchvision loader: decoding and v2 in threads; the faster one on CPUs, and what DALI is compared with."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from tldist.data.augment import Views, evaluation_crop
from tldist.data.batches import BatchPlan
from tldist.data.load.bad_images import BadImages
from tldist.data.load.decode import read_box
from tldist.data.load.loader import ERASED, IN_FLIGHT, POLICY_FILL, Batch, Read
from tldist.data.presets import BINS, POLICY_OPS, SIGNED_OPS, AugmentSpec, PolicyName, magnitude_range

PARTS_PER_THREAD = 4
"""Tasks for each thread that a batch is cut into: enough to keep them busy, few to hand out and wait for."""

_Errors = dict[int, BaseException]


class TorchvisionLoader:
    """A pool of threads, a few images a task; decoding and resizing release the GIL.

    `read` gives the images (default: decodes the files); plans must be drawn for the sizes it gives.
    """

    def __init__(
        self,
        root: Path,
        spec: AugmentSpec,
        image_size: int,
        threads: int,
        device: torch.device,
        bad: BadImages,
        read: Read | None = None,
    ) -> None:
        self.root, self.spec, self.image_size, self.device = root, spec, image_size, device
        self.bad, self.threads, self.only_crops = bad, threads, spec.only_crops
        self.read: Read = read or (lambda _, place, box: read_box(place, box))
        # Each image is one thread's work; nested intra-op threads would only fight over the cores.
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """In order."""
        waiting: deque[tuple[BatchPlan, Tensor, list[Future[_Errors]]]] = deque()
        plans = map(self.bad.without_known, plans)
        for plan in itertools.islice(plans, IN_FLIGHT):
            waiting.append(self._schedule(plan))
        while waiting:
            plan, images = self._finished(*waiting.popleft())
            for ahead in itertools.islice(plans, 1):
                waiting.append(self._schedule(ahead))
            labels = torch.from_numpy(plan.labels_N).to(self.device, non_blocking=True)
            yield Batch(images.to(self.device, non_blocking=True), labels, plan)

    def _schedule(self, plan: BatchPlan) -> tuple[BatchPlan, Tensor, list[Future[_Errors]]]:
        n, parts = len(plan.paths), min(len(plan.paths), PARTS_PER_THREAD * self.threads)
        shape = (n, self.image_size, self.image_size, 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        rows = [range(n * part // parts, n * (part + 1) // parts) for part in range(parts)]
        return plan, images, [self.pool.submit(self._load, plan, of_part, images) for of_part in rows]

    def _load(self, plan: BatchPlan, rows: Iterable[int], images_NHWC: Tensor) -> _Errors:
        errors: _Errors = {}
        ids_N, boxes_N4, squares_NHWC = plan.ids_N.tolist(), plan.views.box_N4.tolist(), images_NHWC.numpy()
        for i in rows:
            try:
                crop_CHW = self.read(ids_N[i], plan.place(self.root, i), boxes_N4[i])
                if self.only_crops:
                    write_square(squares_NHWC[i], crop_CHW, bool(plan.views.flip_N[i]))
                else:
                    images_NHWC[i] = show(crop_CHW, plan.views[i], self.spec, self.image_size).permute(1, 2, 0)
            except Exception as error:  # whatever a decoder raises on damaged bytes
                errors[i] = error
        return errors

    def _finished(self, plan: BatchPlan, images: Tensor, tasks: list[Future[_Errors]]) -> tuple[BatchPlan, Tensor]:
        """The batch when all of its images are there, without those that could not be read."""
        errors = {i: error for task in tasks for i, error in task.result().items()}
        if not errors:
            return plan, images
        return self.bad.without(self.root, plan, errors), images[plan.rows_without(errors)]

    def close(self) -> None:
        """Stop the threads."""
        self.pool.shutdown(cancel_futures=True)


def show(crop_CHW: Tensor, view: Views, spec: AugmentSpec, size: int) -> Tensor:
    """One image, cut to its view's box, as the rest of the view says: uint8 (3, size, size)."""
    flip = bool(view.flip_N[0])
    if spec.crop_area is None:
        top, left = view.crop_N2[0].tolist()
        image = resized(crop_CHW, view.resize_N2[0].tolist())[:, top : top + size, left : left + size]
        image = v2.horizontal_flip(image) if flip else image
    else:
        square_HWC = np.empty((size, size, 3), dtype=np.uint8)
        write_square(square_HWC, crop_CHW, flip)
        image = torch.from_numpy(square_HWC).permute(2, 0, 1)
    if spec.rotate_deg:
        image = v2.rotate(image, float(view.angle_N[0]), interpolation=InterpolationMode.BILINEAR)
    if spec.colour:
        image = _colour(image, view)
    for level in range(spec.policy_ops):
        image = _policy_op(image, view, level, spec.policy, size)
    if spec.blur_sigma:
        image = v2.gaussian_blur(image, kernel_size=[3, 3], sigma=[float(view.blur_sigma_N[0])])
    if view.erase_N4[0].any():
        fill = torch.tensor(ERASED, dtype=torch.uint8)[:, None, None]
        image = v2.erase(image, *view.erase_N4[0].tolist(), v=fill)
    return image


def evaluation_resized(image_CHW: Tensor, size: int) -> Tensor:
    """A whole image, resized as evaluation does for a square of `size`."""
    _, resize_N2, _ = evaluation_crop(np.array([image_CHW.shape[1:]]), size)
    return resized(image_CHW, resize_N2[0].tolist())


def evaluation_square(image_CHW: Tensor, size: int) -> Tensor:
    """As `show` shows it in evaluation, for an image of which nothing was known: uint8 (3, size, size)."""
    _, _, crop_N2 = evaluation_crop(np.array([image_CHW.shape[1:]]), size)
    top, left = crop_N2[0].astype(int).tolist()
    return v2.crop(evaluation_resized(image_CHW, size), top, left, size, size)


def write_square(square_HWC: np.ndarray, crop_CHW: Tensor, flip: bool) -> None:
    """An image resized with antialiasing to fill a square, mirrored where `flip` is: v2's bits, in two calls to torch.

    Each gives the interpreter's lock away, and beside other threads may wait long to have it back; views of NumPy's
    keep it.
    """
    crop_HWC = crop_CHW.numpy().transpose(1, 2, 0)
    # torch mirrors pixels of three bytes quickly, NumPy does not.
    packed_HWC = torch.from_numpy(crop_HWC).flip(1).numpy() if flip else np.ascontiguousarray(crop_HWC)
    # What torch.nn.functional.interpolate calls, but that it has no `out`.
    torch._C._nn._upsample_bilinear2d_aa(  # pyright: ignore[reportAttributeAccessIssue]
        _as_1CHW(packed_HWC), square_HWC.shape[:2], False, out=_as_1CHW(square_HWC)
    )


def _as_1CHW(pixels_HWC: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels_HWC[None].transpose(0, 3, 1, 2))


def resized(image_CHW: Tensor, size: list[int]) -> Tensor:
    """An image resized with antialiasing to (height, width).

    It is packed first: torch resizes packed channels-last pixels three times as fast as a view, to the same bits. One
    of this size already is itself.
    """
    if list(image_CHW.shape[1:]) == size:
        return image_CHW
    return v2.resize(image_CHW.permute(1, 2, 0).contiguous().permute(2, 0, 1), size, antialias=True)


_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]], dtype=torch.float64)
_FROM_YIQ = torch.linalg.inv(_TO_YIQ)


def _colour(image_CHW: Tensor, view: Views) -> Tensor:
    """Brightness, contrast around the image's mean grey as PIL has it, saturation, and hue as a turn in YIQ.

    Hue is DALI's: linear, so all four are two multiplications. torchvision's own, in HSV, takes 20 times as long.
    """
    brightness, contrast = float(view.brightness_N[0]), float(view.contrast_N[0])
    pixels_CP = image_CHW.reshape(3, -1).float()
    grey = float(_TO_YIQ[0] @ pixels_CP.mean(dim=1).double())
    pixels_CP = (pixels_CP * (brightness * contrast) + brightness * (1 - contrast) * grey).round_().clamp_(0, 255)
    angle = math.radians(float(view.hue_N[0]))
    cos, sin = float(view.saturation_N[0]) * math.cos(angle), float(view.saturation_N[0]) * math.sin(angle)
    turn = torch.tensor([[1, 0, 0], [0, cos, sin], [0, -sin, cos]], dtype=torch.float64)
    matrix = (_FROM_YIQ @ turn @ _TO_YIQ).float()
    return (matrix @ pixels_CP).round_().clamp_(0, 255).to(torch.uint8).view_as(image_CHW)


def _policy_op(image: Tensor, view: Views, level: int, policy: PolicyName, size: int) -> Tensor:
    """One operation of the policy with the magnitude that DALI's library would give it."""
    op = POLICY_OPS[int(view.policy_op_NK[0, level])]
    first, last = magnitude_range(policy, op, size)
    magnitude = first + (last - first) * int(view.policy_bin_NK[0, level]) / (BINS - 1)
    if op in SIGNED_OPS and view.policy_sign_NK[0, level]:
        magnitude = -magnitude
    return _POLICY[op](image, magnitude)


def _warp(image: Tensor, shift: tuple[float, float] = (0, 0), shear: tuple[float, float] = (0, 0)) -> Tensor:
    """Shifted by pixels, sheared by slopes around the upper left corner."""
    return v2.affine(
        image,
        angle=0.0,
        translate=list(shift),
        scale=1.0,
        shear=[-math.degrees(math.atan(slope)) for slope in shear],
        interpolation=InterpolationMode.BILINEAR,
        fill=[float(POLICY_FILL)] * 3,
        center=[0, 0],
    )


def _equalize(channel_HW: Tensor) -> Tensor:
    """OpenCV's formula, as DALI's; Pillow's and torchvision's gives pictures that are 4 levels off."""
    below = torch.bincount(channel_HW.flatten().int(), minlength=256).cumsum(0)
    first = below[below > 0][0]
    if first == channel_HW.numel():
        return channel_HW
    levels = (below - first) * (255 / (channel_HW.numel() - first))
    return levels.round().clamp(0, 255).to(torch.uint8)[channel_HW.int()]


_POLICY: dict[str, Callable[[Tensor, float], Tensor]] = {
    "translate_x": lambda image, pixels: _warp(image, shift=(pixels, 0)),
    "translate_y": lambda image, pixels: _warp(image, shift=(0, pixels)),
    "shear_x": lambda image, slope: _warp(image, shear=(slope, 0)),
    "shear_y": lambda image, slope: _warp(image, shear=(0, slope)),
    "rotate": lambda image, angle: v2.rotate(
        image, angle, interpolation=InterpolationMode.BILINEAR, fill=[float(POLICY_FILL)] * 3
    ),
    "brightness": lambda image, more: v2.adjust_brightness(image, 1 + more),
    "contrast": lambda image, more: v2.adjust_contrast(image, 1 + more),
    "color": lambda image, more: v2.adjust_saturation(image, 1 + more),
    "sharpness": lambda image, more: v2.adjust_sharpness(image, 1 + more),
    "posterize": lambda image, bits: v2.posterize(image, round(bits)),
    "solarize": lambda image, threshold: torch.where(image < threshold, image, 255 - image),
    "equalize": lambda image, _: torch.stack([_equalize(channel) for channel in image]),
    "auto_contrast": lambda image, _: v2.autocontrast(image),
    "identity": lambda image, _: image,
}
