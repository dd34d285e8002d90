"""Where a phase's inputs come from: images through the loaders and the frozen prefix, or features kept of both.

`train` and `val` yield batches with `labels_N` and `ids_N`; `inputs` makes of a batch what is mixed and cut into
passes, `encode` makes of that the features at the cut.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tldist import dist
from tldist.data.batches import eval_batches, eval_ids, fill_batches, target_batches, train_batches, train_ids
from tldist.data.load.loader import Batch
from tldist.data.load.open import loader_kind
from tldist.data.mixing import Mix
from tldist.data.presets import augment_spec
from tldist.models.backbones import IMAGE_MEAN, IMAGE_STD, Segment
from tldist.models.prefix import Prefix
from tldist.train.inputs import features
from tldist.train.inputs.features import Features, FeatureWriter, Layout
from tldist.train.run import Run
from tldist_kernels import mix_normalize


class Inputs(Protocol):
    """One phase's images or features."""

    cached: bool
    fill_s: float
    """Seconds it took to fill a cache."""

    def train(self, epoch: int, first: int = 0) -> Iterator[Any]:
        """This worker's batches of one epoch, one for each step from `first` on."""
        ...

    def val(self) -> Iterator[Any]:
        """This worker's part of the validation split, each image once."""
        ...

    def inputs(self, batch: Any, mix: Mix | None = None) -> Tensor:
        """The batch, mixed where mixing is of images."""
        ...

    def encode(self, inputs: Tensor) -> Tensor:
        """Inputs -> features at the cut."""
        ...

    def close(self) -> None:
        """Remove what only this phase could use."""
        ...


class ImageInputs:
    """Decode, then normalise and mix on the device, then the prefix, in every step."""

    cached = False
    fill_s = 0.0

    def __init__(self, run: Run, prefix: Prefix) -> None:
        self.run, self.prefix = run, prefix

    def train(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Through the training loader."""
        config = self.run.config
        return self.run.train_loader.batches(
            train_batches(
                self.run.index.train,
                augment_spec(config.data.augment),
                config.data.image_size,
                config.data.batch_size,
                config.seed,
                epoch,
                self.run.worker,
                first,
                config.data.shuffle_window,
            )
        )

    def val(self) -> Iterator[Batch]:
        """Through the evaluation loader."""
        run = self.run
        plans = eval_batches(run.index.val, run.config.data.image_size, run.pass_size, run.worker)
        return run.eval_loader.batches(plans)

    def inputs(self, batch: Batch, mix: Mix | None = None) -> Tensor:
        """Normalised images_NCHW."""
        return to_input(batch.images_NHWC, self.run.numbers.dtype, mix)

    def encode(self, inputs: Tensor) -> Tensor:
        """The frozen prefix."""
        return self.prefix(inputs)

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class Pair:
    """A batch of the source and one of the target, as large; only the source's labels are looked at."""

    source: Batch
    target: Batch

    @property
    def labels_N(self) -> Tensor:
        """The source's."""
        return self.source.labels_N

    @property
    def ids_N(self) -> np.ndarray:
        """The source's."""
        return self.source.ids_N


class PairedInputs(ImageInputs):
    """Source and target side by side in training, each in an order of its own; the target alone in evaluation."""

    def train(self, epoch: int, first: int = 0) -> Iterator[Any]:
        """An epoch is the source's; the target goes on where the last epoch left it."""
        run, config = self.run, self.run.config
        assert run.index.target is not None
        assert run.target_loader is not None
        target = target_batches(
            run.index.target,
            augment_spec(config.data.augment),
            config.data.image_size,
            config.data.batch_size,
            config.seed,
            range(epoch * run.steps_per_epoch + first, (epoch + 1) * run.steps_per_epoch),
            run.worker,
            config.data.shuffle_window,
        )
        return map(Pair, super().train(epoch, first), run.target_loader.batches(target))

    def inputs(self, batch: Any, mix: Mix | None = None) -> Tensor:
        """Normalised images_NCHW, the target's behind the source's, which alone are mixed."""
        if not isinstance(batch, Pair):
            return super().inputs(batch, mix)
        return torch.cat([super().inputs(batch.source, mix), super().inputs(batch.target)])


def to_input(images_NHWC: Tensor, dtype: torch.dtype, mix: Mix | None = None) -> Tensor:
    """uint8 NHWC -> the network's input: normalised, mixed, channels_last NCHW in `dtype`."""
    if mix is None:
        return mix_normalize(images_NHWC, IMAGE_MEAN, IMAGE_STD, dtype)
    return mix_normalize(
        images_NHWC,
        IMAGE_MEAN,
        IMAGE_STD,
        dtype,
        partner_N=mix.partner_N,
        weight_N=mix.weight_N,
        boxes_N4=mix.boxes_N4,
    )


@dataclass(frozen=True)
class FeatureBatch:
    """What the prefix made of a batch earlier."""

    features: Tensor
    labels_N: Tensor
    ids_N: np.ndarray


class CachedInputs:
    """Features from the cache: neither decoding nor the prefix runs, in training and in evaluation."""

    cached = True

    def __init__(self, run: Run, folder: Path, fill_s: float) -> None:
        self.run, self.folder, self.fill_s = run, folder, fill_s
        device, layouts = run.numbers.device, features.read_layouts(folder)
        self.splits = {name: Features(folder, name, layout, device) for name, layout in layouts.items()}
        self.missing = {name: features.read_missing(folder, name) for name in layouts}
        labels = {"train": run.index.train.labels_N, "val": run.index.val.labels_N}
        self.labels = {name: torch.tensor(labels_N, device=device) for name, labels_N in labels.items()}

    def train(self, epoch: int, first: int = 0) -> Iterator[FeatureBatch]:
        """The view of epoch e is that of epoch e mod K."""
        data, config = self.run.config.data, self.run.config
        ids = train_ids(
            self.run.index.train, data.batch_size, config.seed, epoch, self.run.worker, first, data.shuffle_window
        )
        lost = self.missing["train"]
        ids = (np.array([self._instead(i) for i in ids_N]) if lost else ids_N for ids_N in ids)
        return self._batches("train", epoch % config.cache.views, list(ids))

    def val(self) -> Iterator[FeatureBatch]:
        """As the uncached evaluation."""
        run, lost = self.run, list(self.missing["val"])
        ids = eval_ids(len(run.index.val), run.pass_size, run.worker)
        return self._batches("val", 0, [ids_N[~np.isin(ids_N, lost)] for ids_N in ids] if lost else list(ids))

    def _instead(self, i: int) -> int:
        """The image to train on in place of one that could not be read: the next that could."""
        images = len(self.run.index.train)
        return next(j % images for j in range(i, i + images) if j % images not in self.missing["train"])

    def inputs(self, batch: FeatureBatch, mix: Mix | None = None) -> Tensor:
        """The features as they are."""
        return batch.features

    def encode(self, inputs: Tensor) -> Tensor:
        """They are features already."""
        return inputs

    def close(self) -> None:
        """Another cut needs other features; only a folder of the user's keeps them."""
        dist.barrier()
        if dist.is_main() and not self.run.config.cache.dir:
            shutil.rmtree(self.folder.parent, ignore_errors=True)

    def _batches(self, name: str, view: int, ids: Sequence[np.ndarray]) -> Iterator[FeatureBatch]:
        if self.splits[name].resident:
            return self._from_memory(name, view, ids)
        return features.ahead(self._from_disk(name, view, ids))

    def _from_memory(self, name: str, view: int, ids: Sequence[np.ndarray]) -> Iterator[FeatureBatch]:
        if not ids:
            return
        # One copy to the device for the whole epoch.
        rows = torch.from_numpy(np.concatenate(ids)).to(self.labels[name].device)
        for ids_N, rows_N in zip(ids, rows.split([len(ids_N) for ids_N in ids]), strict=True):
            kept = self.splits[name].rows(view, rows_N)
            yield FeatureBatch(kept, self.labels[name].index_select(0, rows_N), ids_N)

    def _from_disk(self, name: str, view: int, ids: Sequence[np.ndarray]) -> Iterator[FeatureBatch]:
        device = self.labels[name].device
        for ids_N in ids:
            rows_N = torch.from_numpy(ids_N)
            kept = self.splits[name].rows(view, rows_N)
            if device.type == "cuda":
                kept = kept.pin_memory().to(device, non_blocking=True)
            yield FeatureBatch(kept, self.labels[name][rows_N.to(device)], ids_N)


def open_inputs(run: Run, frozen: Segment, prefix: Prefix) -> Inputs:
    """Features where the config wants them kept, something is frozen, and they fit; else images."""
    images = ImageInputs(run, prefix) if run.index.target is None else PairedInputs(run, prefix)
    if not run.config.cache.views:
        return images
    if prefix.is_empty:
        run.log.write("notice", text="nothing is frozen before the first stage that trains: no features to keep")
        return images
    layouts = _layouts(run, prefix)
    parent = _parent(run)
    folder = parent / _key(run, frozen, prefix, layouts)
    started = time.perf_counter()
    # One answer for all: another run may finish the same folder while the workers look.
    missing = dist.any_worker(not features.is_complete(folder), run.numbers.device)
    if missing and not _fill(run, images, folder, layouts):
        return images
    cached = CachedInputs(run, folder, time.perf_counter() - started)
    _announce(run, cached, layouts)
    return cached


def _parent(run: Run) -> Path:
    given = run.config.cache.dir
    parent = Path(given).expanduser().absolute() if given else run.run_dir / "features"
    parent.mkdir(parents=True, exist_ok=True)
    return parent


def _layouts(run: Run, prefix: Prefix) -> dict[str, Layout]:
    """What would be kept of both splits; the features' shape from one black image."""
    side, workers = run.config.data.image_size, run.worker.world_size
    black = torch.zeros(1, side, side, 3, dtype=torch.uint8, device=run.numbers.device)
    example = prefix(to_input(black, run.numbers.dtype))
    shape, dtype = features.shape_of(example), str(example.dtype).removeprefix("torch.")
    return {
        "train": Layout(len(run.index.train), run.config.cache.views, shape, dtype, workers),
        "val": Layout(len(run.index.val), 1, shape, dtype, workers),
    }


def _key(run: Run, frozen: Segment, prefix: Prefix, layouts: dict[str, Layout]) -> str:
    """A name that changes with anything the features depend on: images, views, transform, weights, cut, arithmetic."""
    weights = hashlib.sha256()
    for name, tensor in frozen.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    data, spec, device = run.config.data, augment_spec(run.config.data.augment), run.numbers.device
    told = {
        "images": run.index.fingerprint,
        "views": run.config.cache.views,
        "seed": None if spec.deterministic else run.config.seed,
        "transform": [data.image_size, dataclasses.asdict(spec), loader_kind(data, device), data.pixels != "off"],
        "model": [run.config.model.name, list(frozen.stages), weights.hexdigest()],
        "layout": [layouts["train"].shape, layouts["train"].dtype],
        "arithmetic": [torch.__version__, device.type, prefix.is_compiled, run.pass_size],
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:20]


def _fill(run: Run, images: ImageInputs, folder: Path, layouts: dict[str, Layout]) -> bool:
    """Compute everything once, each worker its part; False, with a line that says why, where there is no room."""
    device, need = run.numbers.device, sum(layout.nbytes for layout in layouts.values())
    room = features.room_for(folder.parent, run.config.cache.gib)
    # All workers of the run agree on the draft's name; another run with the same features has another.
    draft = folder.with_name(f"{folder.name}.{hashlib.sha256(str(run.run_dir).encode()).hexdigest()[:8]}.draft")
    if dist.any_worker(need > room, device):
        return _no_room(run, need, f"{room / 2**30:.2f} GiB allowed in {folder.parent}")
    if dist.is_main():
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
    dist.barrier()
    writers: dict[str, FeatureWriter] = {}
    failed = ""
    try:
        writers = {name: FeatureWriter(draft, name, layout) for name, layout in layouts.items()}
    except OSError as error:
        failed = str(error.strerror)
    if dist.any_worker(bool(failed), device):
        if dist.is_main():
            shutil.rmtree(draft, ignore_errors=True)
        return _no_room(run, need, failed or "another worker's disk is full")
    try:
        _write_all(run, images, writers)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    del writers
    dist.barrier()
    if dist.is_main():
        features.complete(draft, folder, layouts)
    dist.barrier()
    return True


def _write_all(run: Run, images: ImageInputs, writers: dict[str, FeatureWriter]) -> None:
    config, index = run.config, run.index
    spec, side = augment_spec(config.data.augment), config.data.image_size
    for view in range(config.cache.views):
        plans = fill_batches(index.train, spec, side, run.pass_size, config.seed, view, run.worker)
        _write(run, images, writers["train"], view, run.train_loader.batches(plans))
    _write(run, images, writers["val"], 0, images.val())
    for writer in writers.values():
        writer.note_missing()


def _write(run: Run, images: ImageInputs, writer: FeatureWriter, view: int, batches: Iterator[Batch]) -> None:
    for batch in run.watchdog.along(batches, "keeping features", "having kept features"):
        writer.write(view, batch.ids_N, images.encode(images.inputs(batch)))


def _no_room(run: Run, need: int, reason: str) -> bool:
    run.log.write(
        "notice",
        text=f"the features would take {need / 2**30:.2f} GiB, and there is no room ({reason}): they are computed in "
        "every epoch; raise --cache.gib, keep fewer views, or name another --cache.dir",
    )
    return False


def _announce(run: Run, cached: CachedInputs, layouts: dict[str, Layout]) -> None:
    views = run.config.cache.views
    size = sum(layout.nbytes for layout in layouts.values())
    what = "exact" if run.config.cache.features == "exact" else f"{views} augmented views, an approximation"
    run.log.write(
        "notice",
        text=f"features of {len(run.index.train) + len(run.index.val)} images kept ({what}): {size / 2**20:.1f} MiB "
        f"in {cached.fill_s:.1f} s; from here neither decoding nor the frozen prefix runs",
    )
