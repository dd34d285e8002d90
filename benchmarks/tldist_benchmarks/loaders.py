"""How fast pictures come: tldist's loaders, the usual ones, and the decoder that all of them wait for.

`tldist bench loaders --data FOLDER`, or `python -m tldist_benchmarks.loaders`; docs/benchmarks.md says what runs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from tldist import dist
from tldist.config import DataConfig, UserError
from tldist.data.batches import Worker, train_batches
from tldist.data.load.loader import Read
from tldist.data.load.open import open_loader
from tldist.data.load.pixels import open_pixels
from tldist.data.make.sharding import encode
from tldist.data.presets import PRESETS
from tldist.data.source.index import Index, Split
from tldist.data.source.verify import num_workers, strict_pillow, verify
from tldist.models.backbones import IMAGE_MEAN, IMAGE_STD
from tldist.report import plots
from tldist.train.inputs.inputs import to_input
from tldist.train.worker import keep_freed_memory
from tldist_benchmarks import harness, page, results
from tldist_benchmarks.harness import Measured, Series, Turn, synchronize
from tldist_benchmarks.results import Result, View, shown

DTYPE = torch.bfloat16
SMALL_PX = 256
OURS = ("dali", "torchvision")
TARGETS = {"best_vs_lecture": 1.7, "jpeg256_vs_lecture": 3.5, "pixels_vs_lecture": 10.0}
"""At least so much on two CPU cores, on the 500 photos of ImageNet's usual size."""


@dataclass(frozen=True)
class Settings:
    """The flags of `tldist bench loaders`."""

    data: str = ""
    """Folder of JPEG photos, searched in full."""
    image_size: int = 224
    batch_size: int = 32
    rounds: int = 7
    json: str = ""
    """Also write rows, ratios and the environment to this file."""
    out: str = "benchmarks/results"
    """Folder for the CSV and the chart."""


# The usual loaders


class Photos(Dataset[tuple[Tensor, int]]):
    """`kind` pil: as the lecture reads and transforms; v2: decode_jpeg and v2 transforms on uint8."""

    def __init__(self, paths: Sequence[str], size: int, kind: Literal["pil", "v2"]) -> None:
        self.paths, self.kind = paths, kind
        self.transform: Any
        if kind == "pil":
            crop_and_flip = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
            to_float = [transforms.ToTensor(), transforms.Normalize(IMAGE_MEAN, IMAGE_STD)]
            self.transform = transforms.Compose([*crop_and_flip, *to_float])
        else:
            crop_and_flip = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
            to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGE_MEAN, IMAGE_STD)]
            self.transform = v2.Compose([*crop_and_flip, *to_float])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if self.kind == "v2":
            return self.transform(decode_jpeg(read_file(self.paths[i]), ImageReadMode.RGB)), 0
        with Image.open(self.paths[i]) as opened:
            return self.transform(opened.convert("RGB")), 0


def usual(split: Split, root: Path, settings: Settings, kind: Literal["pil", "v2"]) -> Turn:
    """A DataLoader with as many worker processes as there are cores; they live from the first turn on."""
    photos = Photos([str(root / path) for path in split.paths], settings.image_size, kind)
    loader = DataLoader(
        photos,
        settings.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=dist.cores(),
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="spawn",
    )
    return lambda: timed((images for images, _ in loader), dist.local_device())


# tldist's loaders


def ours(data: DataConfig, split: Split, settings: Settings, device: torch.device, read: Read | None = None) -> Turn:
    """The training loader and what follows it on the device: normalised, cast, as the network takes it."""
    spec, epochs = PRESETS["basic"], iter(range(10**9))
    loader = open_loader(data, spec, settings.batch_size, device, read)

    def epoch() -> Iterator[Tensor]:
        side, batch = settings.image_size, settings.batch_size
        plans = train_batches(split, spec, side, batch, 0, next(epochs), Worker(0, 1))
        return (to_input(batch.images_NHWC, DTYPE) for batch in loader.batches(plans))

    return lambda: timed(epoch(), device)


def pixels(data: DataConfig, index: Index, settings: Settings, folder: Path, device: torch.device) -> dict[str, Turn]:
    """The pixel cache: an epoch that fills a new one, and one from a cache that an earlier round has filled."""
    data = replace(data, pixels="memory", loader="torchvision")

    def opened() -> Turn:
        found = open_pixels(data, index, folder, device)
        if found.notice:
            raise UserError(found.notice)
        return ours(data, found.index.train, settings, device, found.train)

    return {"pixels_first": lambda: opened()(), "pixels": opened()}


def decoding(split: Split, root: Path) -> Turn:
    """Nothing but libjpeg-turbo, a thread per core, on bytes that are in memory."""
    encoded = [read_file(str(root / path)) for path in split.paths]
    pool = ThreadPoolExecutor(dist.cores(), initializer=torch.set_num_threads, initargs=(1,))

    def decode(data_B: Tensor) -> int:
        return len(decode_jpeg(data_B, ImageReadMode.RGB)) > 0  # the pixels go at once

    def turn() -> dict[str, float]:
        started = time.perf_counter()
        images = sum(pool.map(decode, encoded))
        return {"images_per_s": images / (time.perf_counter() - started)}

    return turn


def timed(batches: Iterator[Tensor], device: torch.device) -> dict[str, float]:
    """One epoch, from asking for the first batch to having the last one."""
    started, images = time.perf_counter(), 0
    for batch in batches:
        images += len(batch)
    synchronize(device)
    return {"images_per_s": images / (time.perf_counter() - started)}


# The bench


def photos(folder: str) -> tuple[Path, Split]:
    """All JPEGs under a folder that can be used. Raises UserError."""
    root = Path(folder).expanduser().absolute()
    if not folder or not root.is_dir():
        raise UserError(f"--data '{folder}' is not a folder: give one with JPEG photos")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    with strict_pillow(), ThreadPoolExecutor(num_workers()) as pool:
        verdicts = list(pool.map(lambda path: verify(str(path)), paths))
    sizes = {str(path.relative_to(root)): found for path, found in zip(paths, verdicts, strict=True)}
    usable = {path: size for path, size in sizes.items() if not isinstance(size, str)}
    if len(usable) < 64:
        raise UserError(f"--data {root} holds {len(usable)} usable JPEGs: give a folder with 64 or more")
    return root, _split(usable)


def _split(sizes: dict[str, tuple[int, int]]) -> Split:
    labels_N = np.zeros(len(sizes), dtype=np.int64)
    return Split(tuple(sizes), labels_N, np.array(list(sizes.values()), dtype=np.int32))


def shrunk(root: Path, split: Split, folder: Path) -> Split:
    """The photos as `tldist data shard --size` re-encodes them, in `folder`."""
    with ThreadPoolExecutor(num_workers()) as pool:
        made = list(pool.map(lambda i: encode(str(root), split, i, SMALL_PX), range(len(split))))
    for i, image in enumerate(made):
        (folder / f"{i:06d}.jpg").write_bytes(image.data)
    return _split({f"{i:06d}.jpg": image.size for i, image in enumerate(made)})


def facts_of(root: Path, split: Split) -> dict[str, Any]:
    """What tells one folder of photos from another: speeds on two of them are not compared."""
    num_bytes = [(root / path).stat().st_size for path in split.paths]
    return {"photos": len(split), "photo_kb": round(sum(num_bytes) / len(num_bytes) / 1000, 1)}


def variants(root: Path, split: Split, settings: Settings, folder: Path, device: torch.device) -> dict[str, Turn]:
    """Every loader on the photos as they are, and as JPEGs of 256 pixels; the pixel cache; the decoder alone."""
    (small := folder / "small").mkdir()
    found: dict[str, Turn] = {}
    for place, of, name in ((root, split, ""), (small, shrunk(root, split, small), f"_{SMALL_PX}")):
        data = DataConfig(root=str(place), image_size=settings.image_size, batch_size=settings.batch_size)
        found[f"lecture{name}"] = usual(of, place, settings, "pil")
        found[f"dataloader_v2{name}"] = usual(of, place, settings, "v2")
        for kind in OURS:
            found[kind + name] = ours(replace(data, loader=kind), of, settings, device)
        if device.type == "cuda":
            found[f"dali_cpu{name}"] = ours(replace(data, loader="dali"), of, settings, torch.device("cpu"))
        found[f"decode_limit{name}"] = decoding(of, place)
    data = DataConfig(root=str(root), image_size=settings.image_size, batch_size=settings.batch_size)
    none = replace(split, paths=(), labels_N=split.labels_N[:0], sizes_N2=split.sizes_N2[:0])
    return found | pixels(data, Index(str(root), ("a", "b"), split, none, (), ""), settings, folder, device)


def ratios(measured: Measured) -> dict[str, Series]:
    """Round by round; `best` is whichever of tldist's two loaders is the faster."""
    speed = {name: metrics["images_per_s"] for name, metrics in measured.items()}
    best, small = (max(OURS, key=lambda kind: speed[kind + size].median) + size for size in ("", f"_{SMALL_PX}"))
    over = {
        "best_vs_lecture": (best, "lecture"),
        "dali_vs_torchvision": OURS,
        "jpeg256_vs_lecture": (small, "lecture"),
        "jpeg256_vs_lecture_256": (small, f"lecture_{SMALL_PX}"),
        "pixels_first_vs_lecture": ("pixels_first", "lecture"),
        "pixels_vs_lecture": ("pixels", "lecture"),
        "share_of_decode_limit": (best, "decode_limit"),
        "share_of_decode_limit_256": (small, f"decode_limit_{SMALL_PX}"),
    }
    return {name: speed[a].over(speed[b]) for name, (a, b) in over.items()}


def rows(measured: Measured, cores: int) -> list[dict[str, Any]]:
    """One row a variant, fastest last."""
    lecture = measured["lecture"]["images_per_s"]
    found = [
        {
            "bench": "loaders",
            "variant": name,
            "images_per_s": (speed := metrics["images_per_s"]).median,
            "images_per_s_p20": speed.percentile(0.2),
            "images_per_s_p80": speed.percentile(0.8),
            "per_core": speed.median / cores,
            "times_lecture": speed.over(lecture).median,
        }
        for name, metrics in measured.items()
    ]
    return sorted(found, key=lambda row: row["images_per_s"])


def table(same: Mapping[str, Any], found: list[dict[str, Any]]) -> Table:
    """Rates, slowest first."""
    title = "loaders: {image_size} px, batch {batch_size}, {cores} cores".format_map(same)
    made = results.table(title, "variant", ("images/s", "p20..p80", "per core", "x lecture"))
    for row in found:
        spread = f"{shown(row['images_per_s_p20'])}..{shown(row['images_per_s_p80'])}"
        made.add_row(
            row["variant"], *(shown(row["images_per_s"]), spread, shown(row["per_core"])), shown(row["times_lecture"])
        )
    return made


def view(result: Result) -> View:
    """Rates and ratios, and bars."""
    found = rows(result.variants, int(result.same["cores"]))
    speeds = {row["variant"]: row["times_lecture"] for row in found}
    chart = plots.bars("images/s, times the lecture's DataLoader", speeds, shown)
    return View((table(result.same, found), results.ratio_table(result.ratios, TARGETS)), chart)


def run(settings: Settings) -> None:
    """Measure, print, write. Raises UserError."""
    device = dist.local_device()
    keep_freed_memory()  # as a run's worker does; the usual loaders work in processes of their own
    with tempfile.TemporaryDirectory(prefix="tldist-bench-") as folder, harness.worker_threads():
        root, split = photos(settings.data)
        turns = variants(root, split, settings, Path(folder), device)
        measured = harness.take_turns(turns, settings.rounds, harness.show)
        measured = {**measured, results.RATIOS: ratios(measured)}
        dtype = str(DTYPE).removeprefix("torch.")
        told = facts_of(root, split)
        result, path = results.write("loaders", settings, harness.facts(device), measured, dtype=dtype, **told)
        results.write_json(settings.json, result, rows(result.variants, dist.cores()))
        page.show(result, view(result), path)


def bench(words: Sequence[str]) -> int:
    """The command. Raises UserError."""
    return harness.command(words, Settings, "loaders", __doc__ or "", run)


if __name__ == "__main__":
    harness.main(bench)
