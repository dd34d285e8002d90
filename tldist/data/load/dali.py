"""The DALI loader: one pipeline that decodes on the GPU where there is one and on the CPU otherwise.

DALI reads, decodes and transforms; which files and which random numbers comes from the batch plans. Only the crop
box of each JPEG is decoded. Outputs are uint8 NHWC and enter torch through DLPack without a copy.
"""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn as _fn
from nvidia.dali import types as _types
from nvidia.dali.auto_aug import augmentations as _augmentations
from nvidia.dali.auto_aug.core import select, signed_bin
from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite
from nvidia.dali.auto_aug.trivial_augment import get_trivial_augment_wide_suite
from nvidia.dali.pipeline import do_not_convert, pipeline_def
from torch import Tensor

from tldist.data.batches import BatchPlan
from tldist.data.load.bad_images import BadImages, DecodeError
from tldist.data.load.loader import ERASED, IN_FLIGHT, POLICY_FILL, Batch
from tldist.data.presets import BINS, TRIVIAL_TRANSLATE, AugmentSpec, PolicyName
from tldist.data.source.shards import read_bytes

fn: Any = _fn  # its stubs allow no tensors as arguments, which is the point of this pipeline
types: Any = _types
augmentations: Any = _augmentations


@pipeline_def(enable_conditionals=True)
def _pipeline(source: Callable[[], list[Any]], spec: AugmentSpec, size: int, device: str, in_shards: bool) -> Any:
    """uint8 HWC images of `size`, operation by operation as `Views` says; `source` gives what `_inputs` lists."""
    given = _given(source, _input_names(spec, in_shards))
    images = fn.decoders.image_slice(
        given["bytes"] if in_shards else fn.io.file.read(given["path"]),
        start=_half(given["box"], 0),
        shape=_half(given["box"], 2),
        axes=[0, 1],
        device="mixed" if device == "gpu" else "cpu",
        output_type=types.RGB,
    )
    images = fn.resize(images, size=given["resize"], interp_type=types.INTERP_LINEAR, antialias=True)
    if spec.crop_area is None:
        images = fn.slice(images, start=given["crop"], shape=[size, size], axes=[0, 1])
    if spec.flip:
        images = fn.flip(images, horizontal=given["flip"])
    if spec.rotate_deg:
        images = fn.rotate(images, angle=given["angle"], keep_size=True, fill_value=0)
    if spec.colour:
        images = _colour(images, given, device)
    for level in range(spec.policy_ops):
        images = _policy_op(images, given, level, spec.policy, size)
    if spec.blur_sigma:
        images = fn.gaussian_blur(images, window_size=3, sigma=given["blur_sigma"])
    if spec.erase:
        anchor, shape = _half(given["erase"], 0), _half(given["erase"], 2)
        images = fn.erase(images, anchor=anchor, shape=shape, axes=[0, 1], fill_value=ERASED)
    return images


@do_not_convert
def _given(source: Callable[[], list[Any]], names: list[str]) -> dict[str, Any]:
    return dict(zip(names, fn.external_source(source=source, num_outputs=len(names), batch=True), strict=True))


_COLOUR = ("brightness", "contrast", "saturation", "hue")
_POLICY = ("policy_op", "policy_bin", "policy_sign")
_GREY_WEIGHTS = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def _colour(images: Any, given: dict[str, Any], device: str) -> Any:
    """Brightness, contrast around the image's mean grey as PIL has it, saturation, and hue as a turn in YIQ."""
    if device == "gpu":
        # A named argument cannot come from the GPU, where the mean is: DALI's own augmentation writes the formula out.
        images = fn.brightness(images, brightness=given["brightness"])
        images = augmentations.contrast.op(images, given["contrast"])
    else:
        mean = fn.reductions.mean(images, axis_names="HW") * types.Constant(_GREY_WEIGHTS)
        images = fn.brightness_contrast(
            images,
            brightness=given["brightness"],
            contrast=given["contrast"],
            contrast_center=fn.reductions.sum(mean),
        )
    return fn.color_twist(images, saturation=given["saturation"], hue=given["hue"])


def _policy_op(images: Any, given: dict[str, Any], level: int, policy: PolicyName, size: int) -> Any:
    """One operation of the policy on each image, from DALI's library; which one, and how strong, is ours to say."""
    op, magnitude, sign = (given[name][level] for name in _POLICY)
    if policy == "rand":
        suite = get_rand_augment_suite(use_shape=True)
    else:
        suite = get_trivial_augment_wide_suite(max_translate_abs=TRIVIAL_TRANSLATE)
    return select(
        suite,
        op,
        images,
        magnitude_bin=signed_bin(magnitude, sign),
        num_magnitude_bins=BINS,
        shape=(size, size),
        fill_value=POLICY_FILL,
    )


def _half(box: Any, start: int) -> Any:
    """(top, left) or (height, width) of a box."""
    return fn.slice(box, start=[start], shape=[2], axes=[0])


def _input_names(spec: AugmentSpec, in_shards: bool) -> list[str]:
    """What the pipeline of `spec` consumes; DALI refuses inputs that no operation uses."""
    wanted = {
        "crop": spec.crop_area is None,
        "flip": spec.flip > 0,
        "angle": spec.rotate_deg > 0,
        **dict.fromkeys(_COLOUR, spec.colour),
        **dict.fromkeys(_POLICY, spec.policy_ops > 0),
        "blur_sigma": spec.blur_sigma is not None,
        "erase": spec.erase > 0,
    }
    return ["bytes" if in_shards else "path", "box", "resize", *(name for name, used in wanted.items() if used)]


def _inputs(plan: BatchPlan, root: Path, encoded: list[np.ndarray]) -> dict[str, Any]:
    """A plan as DALI wants it: paths as bytes (or the images' own), and the types its operations insist on."""
    v = plan.views
    return {
        "bytes": encoded,
        "path": [np.frombuffer(str(root / path).encode(), dtype=np.uint8) for path in plan.paths],
        "box": v.box_N4,
        "resize": v.resize_N2.astype(np.float32),
        "crop": v.crop_N2,
        "flip": v.flip_N,
        "angle": v.angle_N,
        **{name: getattr(v, f"{name}_N") for name in _COLOUR},
        **{name: getattr(v, f"{name}_NK") for name in _POLICY},
        "blur_sigma": v.blur_sigma_N,
        "erase": v.erase_N4.astype(np.float32),
    }


_Reading = tuple[BatchPlan, list[Future[np.ndarray]]]


class DaliLoader:
    """One DALI pipeline that takes plans a few batches ahead of the consumer."""

    def __init__(
        self,
        root: Path,
        spec: AugmentSpec,
        image_size: int,
        max_batch: int,
        threads: int,
        device: torch.device,
        bad: BadImages,
        in_shards: bool = False,
    ) -> None:
        """`in_shards`: the plans' images lie in tars; these are read by threads of our own."""
        self.root, self.device, self.bad = root, device, bad
        self._names = _input_names(spec, in_shards)
        self._readers = ThreadPoolExecutor(threads) if in_shards else None
        on_gpu = device.type == "cuda"
        self._build = partial(
            _pipeline,
            self._next_inputs,
            spec,
            image_size,
            "gpu" if on_gpu else "cpu",
            in_shards,
            batch_size=max_batch,
            num_threads=threads,
            device_id=(device.index or 0) if on_gpu else None,
            prefetch_queue_depth=IN_FLIGHT,
        )
        self._pipeline: Any = None
        self._plans: Iterator[_Reading] = iter(())
        self._waiting: deque[_Reading] = deque()
        self._taken: deque[BatchPlan] = deque()

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[Batch]:
        """In order."""
        plans = iter(plans)
        pipeline = self._start(plans)
        while True:
            try:
                images = self._run(pipeline)
            except Exception as error:
                # DALI neither names the file nor goes on: what it held is given to a new pipeline.
                pipeline = self._start(itertools.chain(self._held_without_bad(error), plans))
                continue
            if images is None:
                break
            plan = self._taken.popleft()
            yield Batch(images, torch.from_numpy(plan.labels_N).to(self.device, non_blocking=True), plan)
        pipeline.reset()
        self._pipeline = pipeline

    def _start(self, plans: Iterable[BatchPlan]) -> Any:
        """A pipeline for these plans: until the last batch is out, it holds some that no other epoch may see."""
        self._waiting, self._taken = deque(), deque()
        self._plans = self._read_ahead(map(self.bad.without_known, plans))
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is None:
            # DALI's own automatic augmentations call names of its that are deprecated, and no filter stops the noise.
            with warnings.catch_warnings(record=True):
                pipeline = self._build()
        return pipeline

    def _held_without_bad(self, error: Exception) -> list[BatchPlan]:
        """The plans that a failed pipeline had taken, the first without its bad images. Raises DecodeError."""
        if isinstance(error, DecodeError) or not self._taken:
            raise error
        suspects = dict.fromkeys(range(len(self._taken[0].paths)), error)
        first = self.bad.without(self.root, self._taken[0], suspects, certain=False)
        return [first, *list(self._taken)[1:], *(plan for plan, _ in self._waiting)]

    def _next_inputs(self) -> list[Any]:
        """Called by DALI whenever it has room for another batch; StopIteration ends the epoch."""
        plan, reads = next(self._plans)
        errors = {i: error for i, read in enumerate(reads) if (error := read.exception()) is not None}
        if errors:
            reads = [reads[i] for i in plan.rows_without(errors)] if len(errors) < len(reads) else []
            plan = self.bad.without(self.root, plan, errors)
        self._taken.append(plan)
        inputs = _inputs(plan, self.root, [read.result() for read in reads])
        return [inputs[name] for name in self._names]

    def _read_ahead(self, plans: Iterable[BatchPlan]) -> Iterator[_Reading]:
        """Each plan, with its images' bytes where they lie in shards: read while earlier batches are shown."""
        if self._readers is None:
            yield from ((plan, []) for plan in plans)
            return
        for plan in plans:
            places = [plan.place(self.root, i) for i in range(len(plan.paths))]
            self._waiting.append((plan, [self._readers.submit(read_bytes, place) for place in places]))
            if len(self._waiting) > IN_FLIGHT:
                yield self._waiting.popleft()
        while self._waiting:
            yield self._waiting.popleft()

    def _run(self, pipeline: Any) -> Tensor | None:
        try:
            # On a GPU: in step with torch's stream, so that the host does not wait for the decoder and DALI does not
            # reuse a batch that torch still reads.
            stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
            (images,) = pipeline.run(stream)
        except StopIteration:
            return None
        return torch.from_dlpack(images.as_tensor())

    def close(self) -> None:
        """Free the pipeline's threads and buffers."""
        self._pipeline = None
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)
