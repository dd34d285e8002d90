"""`tldist data fetch`, `check`, `preview`, `shard` and `make`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from tldist.config import UserError, nearest
from tldist.data.load.bad_images import BadImages
from tldist.data.load.open import open_loader
from tldist.data.make.datasets import DATASETS, fetch
from tldist.data.make.mnist_m import make_mnist_m
from tldist.data.make.sharding import IMAGES_PER_SHARD, QUALITY, SEED, check_folders, write_shards
from tldist.data.presets import augment_spec
from tldist.data.source.index import Index, build_index
from tldist.data.source.shards import check_bytes, is_shards
from tldist.tracking.progress import bar
from tldist.train.preview import IMAGES, contact_sheet
from tldist_launcher.start.arguments import at_least, parse_flags, parse_run, take_flags


def fetch_command(words: Sequence[str]) -> int:
    """`fetch NAME --root DIR [--from DIR]`."""
    if not words or words[0].startswith("-"):
        raise UserError(f"name a data set: tldist data fetch NAME --root DIR, one of {', '.join(DATASETS)}")
    name = words[0]
    if name not in DATASETS:
        raise UserError(f"there is no data set '{name}'{nearest(name, DATASETS)}: choose from {', '.join(DATASETS)}")
    flags = parse_flags(words[1:], {"--root": "", "--from": ""}, "data fetch")
    if not flags["--root"]:
        raise UserError("say where to write the images: --root DIR")
    source = Path(flags["--from"]).expanduser() if flags["--from"] else None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task(f"fetching {name}", total=None)
        folder = fetch(
            name,
            Path(flags["--root"]).expanduser(),
            source,
            lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None),
        )
    print(f"data: {folder}")
    return 0


def check_command(words: Sequence[str]) -> int:
    """`check ROOT`: what training would see, and every file it would skip."""
    if len(words) != 1 or words[0].startswith("-"):
        raise UserError("name one folder: tldist data check ROOT")
    with bar("looking at images") as progress:
        index = build_index(Path(words[0]).expanduser(), progress=progress)
    if is_shards(index.root):
        with bar("comparing checksums") as progress:
            check_bytes(index.root, progress)
    _print_index(index)
    return 0


def shard_command(words: Sequence[str]) -> int:
    """`shard ROOT OUT [--size PIXELS] [--images-per-shard N] [--seed N]`: an image folder as tar shards."""
    known = {"--size": "0", "--images-per-shard": str(IMAGES_PER_SHARD), "--seed": str(SEED)}
    flags, folders = take_flags(words, known)
    if unknown := [word for word in folders if word.startswith("-")]:
        hint = nearest(unknown[0].partition("=")[0], known)
        raise UserError(f"tldist data shard has no flag {unknown[0]}{hint}: it takes {', '.join(known)}")
    if len(folders) != 2:
        raise UserError("name two folders, of the images and for the shards: tldist data shard ROOT OUT")
    size, per_shard, seed = (at_least(flag, flags[flag], low) for flag, low in zip(known, (0, 1, 0), strict=True))
    root, out = (Path(folder).expanduser() for folder in folders)
    check_folders(root, out)  # before every image is looked at
    with bar("looking at images") as progress:
        index = build_index(root, progress=progress)
    _print_skipped(index)
    with bar("writing shards") as progress:
        written = write_shards(index, out, size, per_shard, seed, progress)
    before, after = written.bytes_before / 2**30, written.bytes_after / 2**30
    print(f"{out}: {written.images:,} images in {written.shards:,} shards, {after:.3f} GiB ({before:.3f} GiB before)")
    return 0


def preview_command(words: Sequence[str]) -> int:
    """`preview ROOT [--out FILE] [--seed N] [--FLAG VALUE ...]`: the flags are those of --data, without the `data.`."""
    own, rest = take_flags(words, {"--out": "preview.jpg", "--seed": "0"})
    if not rest or rest[0].startswith("-"):
        raise UserError("name one folder: tldist data preview ROOT")
    root, *flags = rest
    flags = [f"--data.{word[2:]}" if word.startswith("--") else word for word in flags]
    settings = parse_run(["folder", "--data.root", root, "--seed", own["--seed"], *flags], "data preview")
    data, out = settings.data, Path(own["--out"]).expanduser()
    if not out.parent.is_dir() or out.suffix.lower() not in (".jpg", ".png"):
        raise UserError(f"--out {out} must be a .jpg or .png file in a folder that exists")
    with bar("looking at images") as progress:
        index = build_index(root, data.classes, progress)
    bad = BadImages(data.on_bad_image == "skip")
    loader = open_loader(data, augment_spec(data.augment), IMAGES, torch.device("cpu"), bad=bad)
    contact_sheet(data, index, settings.seed, loader, IMAGES, bad).save(out)
    loader.close()
    print(f"preview: {out}")
    return 0


def make_command(words: Sequence[str]) -> int:
    """`make mnist-m --mnist DIR --photos DIR --root OUT [--seed N]`: MNIST and MNIST-M from MNIST and photos."""
    if not words or words[0] != "mnist-m":
        raise UserError("name what to make: tldist data make mnist-m --mnist DIR --photos DIR --root OUT")
    flags = parse_flags(words[1:], {"--mnist": "", "--photos": "", "--root": "", "--seed": "0"}, "data make mnist-m")
    if missing := [flag for flag, value in flags.items() if not value]:
        raise UserError(f"tldist data make mnist-m also needs {missing[0]}: it takes {', '.join(flags)}")
    mnist, photos, out = (Path(flags[flag]).expanduser() for flag in ("--mnist", "--photos", "--root"))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("reading MNIST", total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        root = make_mnist_m(mnist, photos, out, at_least("--seed", flags["--seed"], 0), report)
    for domain in ("source", "target"):
        print(f"{domain}: {root / domain}, fingerprint {build_index(root / domain).fingerprint}")
    return 0


def _print_index(index: Index) -> None:
    names = ", ".join(index.classes[:10]) + (", ..." if len(index.classes) > 10 else "")
    print(f"{index.root}: {len(index.classes)} classes ({names})")
    for name, split in (("train", index.train), ("val", index.val)):
        short = split.sizes_N2.min(axis=1)
        print(f"{name}: {len(split.paths):,} images, short side {short.min()} to {short.max()} px")
    _print_skipped(index)
    print(f"fingerprint: {index.fingerprint}")


def _print_skipped(index: Index) -> None:
    print(f"skipped: {len(index.skipped)}")
    for skipped in index.skipped:
        print(f"  {skipped.path}: {skipped.reason}")
    if bad := sum(item.is_bad_image for item in index.skipped):
        print(f"bad images: {bad}: training stops at these, or goes on without them with --data.on-bad-image skip")


HELP = f"""\
  fetch NAME --root DIR [--from DIR]
      Write a published data set as an image folder: {", ".join(DATASETS)}.
      --from: a folder that holds its archives already.
  check ROOT
      What training would see in an image folder, or in shards, and every file that it would skip. Of shards that
      tldist wrote, every image is compared with its checksum.
  preview ROOT [--augment lecture] [--mixup A] [--cutmix A] [--out preview.jpg] [--seed N]
      A contact sheet of what training would see: a few images, how each looks in the first epochs, and how batches are
      mixed. It takes every flag of --data, without the `data.`.
  shard ROOT OUT [--size PIXELS] [--images-per-shard N] [--seed N]
      Write the image folder ROOT to OUT as tar shards (train-000000.tar, ...) that --data.root takes and the
      webdataset library reads: few large files, for a million images or a network file system.
      --size: scale images whose short side is longer down to so many pixels there, as JPEGs of quality {QUALITY},
          upright; smaller ones are copied as they are. Without it all files are.
      --images-per-shard: at most so many in each tar (default {IMAGES_PER_SHARD}).
      --seed: of the random order in which they are stored (default {SEED}).
  make mnist-m --mnist DIR --photos DIR --root OUT [--seed N]
      MNIST as OUT/source and MNIST-M as OUT/target, in shards: |patch of a photo - digit| in each channel, both splits,
      the same bytes for the same seed, with checksums (`tldist data check OUT/target`).
      --mnist: a folder with MNIST's four idx files; --photos: a folder or a tar of photos (published: BSDS500)."""
