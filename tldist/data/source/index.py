"""The index of an image folder, or of a folder of tar shards: which files are images, their labels and sizes.

Every file is decoded in full once, because one damaged photo found by a loader in epoch 7 costs a night;
what was found is remembered per file (`verify.py`), so a second run decodes nothing. A file that no run can
use is listed with its reason, never dropped in silence.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tldist.config import UserError, nearest
from tldist.data.source.shards import Members, Row, Shards, is_shards, open_shards
from tldist.data.source.verify import File, Progress, Verdict, num_workers, verdicts, write_atomically

SPLITS = ("train", "val")
IMAGE_SUFFIXES = frozenset(Image.registered_extensions())
_VERSION = 1  # of the file that `save_index` writes
_LAYOUT = "train/CLASS/*.jpg and val/CLASS/*.jpg"
CLUTTER = frozenset({"Thumbs.db", "ehthumbs.db", "desktop.ini"})  # what Windows hides without a leading dot


@dataclass(frozen=True, eq=False)
class Split:
    """The usable images of `train/` or `val/`, in the order of their paths; of shards as they are stored. The arrays
    are read-only."""

    paths: tuple[str, ...]
    """Relative to the root, with forward slashes; of a shard's member `train-000003.tar/ants/0013035.jpg`."""
    labels_N: np.ndarray
    """int64: position of each image's class in `Index.classes`."""
    sizes_N2: np.ndarray
    """int32 (height, width) in pixels, after the EXIF orientation is applied."""
    members: Members | None = None
    """Where the images lie in shards; None where `paths` are files."""

    def __post_init__(self) -> None:
        self.labels_N.flags.writeable = False
        self.sizes_N2.flags.writeable = False

    def __len__(self) -> int:
        return len(self.paths)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Split)
            and self.paths == other.paths
            and np.array_equal(self.labels_N, other.labels_N)
            and np.array_equal(self.sizes_N2, other.sizes_N2)
            and self.members == other.members
        )

    def take(self, ids_N: np.ndarray) -> Split:
        """Some of the images, in the order asked for."""
        members = self.members and self.members.take(ids_N)
        return Split(tuple(self.paths[i] for i in ids_N), self.labels_N[ids_N], self.sizes_N2[ids_N], members)


@dataclass(frozen=True)
class Skipped:
    """A file that no run can use."""

    path: str
    """Relative to the root."""
    reason: str
    """In plain words: `GIF is not supported`, `empty file`, `hidden file`."""

    @property
    def is_bad_image(self) -> bool:
        """Was it meant to be an image? Hidden files, and others by content and name (`notes.txt`), were not."""
        if self.reason in ("hidden file", "hidden folder", "not in a class folder"):
            return False
        return self.reason not in ("not an image", "empty file") or Path(self.path).suffix.lower() in IMAGE_SUFFIXES


@dataclass(frozen=True)
class Index:
    """An image folder, verified."""

    root: str
    """Absolute."""
    classes: tuple[str, ...]
    """The class folders of `train/`, sorted, or the classes of shards; a label is a position in here."""
    train: Split
    val: Split
    skipped: tuple[Skipped, ...]
    """By path."""
    fingerprint: str
    """SHA-256 over the class names and each usable image's path, label and size in bytes.
    Two runs with the same fingerprint saw the same data."""
    target: Split | None = None
    """A second domain that training shows; its labels are all -1 (`domains.py`)."""


@dataclass(frozen=True)
class _Listing:
    """What a class folder, or a split, holds."""

    files: list[File] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def build_index(root: str | Path, classes: Sequence[str] = (), progress: Progress | None = None) -> Index:
    """Scan and verify `root/train/CLASS/**` and `root/val/CLASS/**`, or the shards `root/train-*.tar` and
    `root/val-*.tar`; anything else there is left alone.

    Args:
        root: the folder; give the configured string itself, because `Path("")` would pass for `.`.
        classes: use only these class folders; empty: all.
        progress: called now and then while files are being verified.

    Raises:
        UserError: no such folder, no class folders, a class without a usable image, a class of val that train
            does not have, an unknown name in `classes`, fewer than two classes, an unreadable folder; a shard that is
            damaged, missing, or not what it was when it was written.
    """
    folder = root_folder(root)
    if is_shards(folder):
        with ThreadPoolExecutor(num_workers()) as pool:
            return _index_of_shards(folder, classes, open_shards(folder, pool, progress))
    chosen = choose_classes(folder, classes, *(class_folders(folder, split) for split in SPLITS))
    with ThreadPoolExecutor(num_workers()) as pool:
        listings = {split: list_split(pool, folder, split, chosen) for split in SPLITS}
        files = [file for listing in listings.values() for file in listing.files]
        found = verdicts(pool, folder, files, partial=bool(classes), progress=progress)
    return _assemble(folder, chosen, listings, found)


def subset(split: Split, per_class: int, seed: int, classes: Sequence[str] = ()) -> Split:
    """`per_class` images of each class (0: all of them), in the order of their paths.

    A class's draw depends on `seed`, its label and its own images only; 10 images are among the 20 drawn.
    `classes` names the labels in messages (default: the folders').

    Raises:
        UserError: a class has fewer images.
    """
    if per_class == 0:
        return split
    kept = []
    for label in np.unique(split.labels_N):
        positions = np.flatnonzero(split.labels_N == label)
        if len(positions) < per_class:
            name = classes[label] if classes else split.paths[positions[0]].split("/")[1]
            raise UserError(
                f"--data.train-images-per-class is {per_class}, but class '{name}' has "
                f"{len(positions)} usable images: give {len(positions)} or less"
            )
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, int(label)])))
        kept.append(rng.permutation(positions)[:per_class])
    return split.take(np.sort(np.concatenate(kept)))


def with_train_subset(index: Index, per_class: int, seed: int) -> Index:
    """The index with `subset` applied to its training split (0: unchanged), and a fingerprint of its own."""
    if per_class == 0:
        return index
    train = subset(index.train, per_class, seed, index.classes)
    digest = hashlib.sha256("\n".join((index.fingerprint, *train.paths)).encode()).hexdigest()
    return replace(index, train=train, fingerprint=digest)


def save_index(index: Index, path: Path) -> None:
    """Write one JSON file, atomically."""
    splits = {name: _as_json(split) for name, split in zip(SPLITS, (index.train, index.val), strict=True)}
    splits |= {} if index.target is None else {"target": _as_json(index.target)}
    skipped = [[item.path, item.reason] for item in index.skipped]
    head = {
        "version": _VERSION,
        "root": index.root,
        "classes": index.classes,
        "fingerprint": index.fingerprint,
    }
    write_atomically(path, json.dumps(head | splits | {"skipped": skipped}))


def load_index(path: Path) -> Index:
    """Read what `save_index` wrote.

    Raises:
        UserError: the file is missing, damaged, or of another version.
    """
    try:
        data = json.loads(path.read_text())
        if data["version"] != _VERSION:
            raise ValueError(f"version {data['version']}, this tldist reads {_VERSION}")
        return Index(
            data["root"],
            tuple(data["classes"]),
            _split_from(data["train"]),
            _split_from(data["val"]),
            tuple(Skipped(*item) for item in data["skipped"]),
            data["fingerprint"],
            _split_from(data["target"]) if "target" in data else None,
        )
    except OSError as error:
        raise UserError(f"cannot read the index {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or not an index ({error}): delete it and build it again") from error


def _as_json(split: Split) -> dict[str, Any]:
    data = {"paths": split.paths, "labels": split.labels_N.tolist(), "sizes": split.sizes_N2.tolist()}
    if split.members is not None:
        data |= {"shards": split.members.shards, "extents": split.members.extents_N3.tolist()}
    return data


def _split_from(data: dict[str, Any]) -> Split:
    paths, labels_N = tuple(data["paths"]), np.array(data["labels"], dtype=np.int64)
    sizes_N2 = np.array(data["sizes"], dtype=np.int32).reshape(-1, 2)
    members = None
    if "shards" in data:
        members = Members(tuple(data["shards"]), np.array(data["extents"], dtype=np.int64).reshape(-1, 3))
    if not len(paths) == len(labels_N) == len(sizes_N2) == len(paths if members is None else members.extents_N3):
        raise ValueError("paths, labels and sizes differ in number")
    return Split(paths, labels_N, sizes_N2, members)


# From the files' verdicts to the index


def _assemble(root: str, classes: tuple[str, ...], listings: dict[str, _Listing], found: dict[str, Verdict]) -> Index:
    skipped = [item for listing in listings.values() for item in listing.skipped]
    skipped += [Skipped(path, verdict) for path, verdict in found.items() if isinstance(verdict, str)]
    skipped.sort(key=lambda item: item.path)
    digest = hashlib.sha256("\0".join(classes).encode())
    splits = {}
    for name, listing in listings.items():
        files = sorted(file for file in listing.files if not isinstance(found[file.path], str))
        check_each_class(f"{root}/{name}", classes, {file.label for file in files}, skipped)
        digest.update("".join(f"\n{f.path}\0{f.label}\0{f.num_bytes}" for f in files).encode())
        splits[name] = split_of_files(files, found)
    return Index(root, classes, splits["train"], splits["val"], tuple(skipped), digest.hexdigest())


def split_of_files(files: list[File], found: dict[str, Verdict]) -> Split:
    return Split(
        tuple(file.path for file in files),
        np.array([file.label for file in files], dtype=np.int64),
        np.array([found[file.path] for file in files], dtype=np.int32).reshape(-1, 2),
    )


def check_each_class(folder: str, classes: tuple[str, ...], present: set[int], skipped: list[Skipped]) -> None:
    split = Path(folder).name
    for label, name in enumerate(classes):
        if label in present or not Path(folder, name).is_dir():
            continue
        here = [item for item in skipped if item.path.startswith(f"{split}/{name}/")]
        what = f"{len(here)} skipped, first: {here[0].path}: {here[0].reason}" if here else "the folder is empty"
        raise UserError(
            f"class '{name}' in {split} has no usable image ({what}): "
            f"add images to {folder}/{name} or remove the folder"
        )


# From shards to the index


def _index_of_shards(root: str, wanted: Sequence[str], found: Shards) -> Index:
    names, digests = found.classes, []
    val = {row.label for rows in found.of("val").values() for row in rows}
    classes = choose_classes(root, wanted, list(names.values()), [names.get(n, str(n)) for n in sorted(val)])
    labels = {number: classes.index(name) for number, name in names.items() if name in classes}
    splits = {}
    for split in SPLITS:
        shards = {shard: [row for row in rows if row.label in labels] for shard, rows in found.of(split).items()}
        splits[split] = split_of_shards(shards, labels)
        digests += [f"\n{shard}/{r.name}\0{labels[r.label]}\0{r.num_bytes}" for shard in shards for r in shards[shard]]
    present = set(splits["train"].labels_N.tolist())
    if missing := [name for label, name in enumerate(classes) if label not in present]:
        raise UserError(
            f"class '{missing[0]}' has no usable image in the training shards of {root}: add some, or name the classes "
            "to use with --data.classes"
        )
    digest = hashlib.sha256("\0".join(classes).encode() + "".join(digests).encode()).hexdigest()
    skipped = tuple(Skipped(path, reason) for path, reason in sorted(found.skipped))
    return Index(root, classes, splits["train"], splits["val"], skipped, digest)


def split_of_shards(shards: dict[str, list[Row]], labels: dict[int, int]) -> Split:
    rows = [row for listed in shards.values() for row in listed]
    extents = [(i, row.offset, row.num_bytes) for i, listed in enumerate(shards.values()) for row in listed]
    return Split(
        tuple(f"{shard}/{row.name}" for shard, listed in shards.items() for row in listed),
        np.array([labels[row.label] for row in rows], dtype=np.int64),
        np.array([(row.height, row.width) for row in rows], dtype=np.int32).reshape(-1, 2),
        Members(tuple(shards), np.array(extents, dtype=np.int64).reshape(-1, 3)),
    )


# The folder


def root_folder(root: str | Path) -> str:
    """The folder of images, as an absolute path. Raises UserError where there is none."""
    if not str(root):
        raise UserError(f"--data.root is missing: give the folder that holds {_LAYOUT}")
    folder = Path(os.path.abspath(Path(root).expanduser()))  # noqa: PTH100 - resolve() would follow links
    if folder.is_file():
        raise UserError(f"--data.root {folder} is a file: unpack it and give the folder that holds {_LAYOUT}")
    if not folder.is_dir():
        hint = _nearest_sibling(folder)
        raise UserError(f"--data.root {folder} does not exist{hint}: give the folder that holds {_LAYOUT}")
    return str(folder)


def _nearest_sibling(folder: Path) -> str:
    with contextlib.suppress(OSError):
        return nearest(folder.name, [entry.name for entry in folder.parent.iterdir() if entry.is_dir()])
    return ""


def choose_classes(root: str, wanted: Sequence[str], train: list[str], val: list[str]) -> tuple[str, ...]:
    """The classes of train to use, in their order, once they and those of val make sense together."""
    for name in wanted:
        if name not in train:
            raise UserError(f"--data.classes: {root}/train has no class '{name}'{nearest(name, train)}")
    for name in val:
        if name not in train:
            hint = nearest(name, train)
            raise UserError(f"{root} has class '{name}' in val, not in train{hint}: rename or remove it there")
    classes = tuple(name for name in train if not wanted or name in wanted)
    if len(classes) == 1:
        where = "--data.classes leaves" if wanted else f"{root}/train has"
        raise UserError(f"{where} one class ('{classes[0]}'): a classifier needs at least two")
    if set(classes).isdisjoint(val):
        raise UserError(f"{root}/val has none of the classes {', '.join(classes)}: add images to evaluate on")
    return classes


def class_folders(root: str, split: str) -> list[str]:
    if not Path(root, split).is_dir():
        raise UserError(f"{root} has no {split}/ folder{_where_else(root)}: arrange it as {_LAYOUT}")
    names = sorted(entry.name for entry in _entries(f"{root}/{split}") if not _stray(entry))
    if not names:
        raise UserError(f"{root}/{split} has no class folders: arrange {root} as {_LAYOUT}")
    return names


def _where_else(root: str) -> str:
    """A hint: it may be one folder further down, as after unpacking an archive, or have another name."""
    names = sorted(entry.name for entry in _entries(root) if not _stray(entry))
    for name in names:
        if all(Path(root, name, split).is_dir() for split in SPLITS):
            return f" (did you mean '{root}/{name}'?)"
    return f" (found: {', '.join(names[:5])})" if names else ""


def list_split(pool: ThreadPoolExecutor, root: str, split: str, classes: tuple[str, ...]) -> _Listing:
    entries = _entries(f"{root}/{split}")
    listing = _Listing(skipped=[Skipped(f"{split}/{e.name}", why) for e in entries if (why := _stray(e))])
    there = {entry.name for entry in entries}
    # A class per task: on a network file system stat takes up to a millisecond, and many can wait at once.
    jobs = [(f"{split}/{name}", label) for label, name in enumerate(classes) if name in there]
    for found in pool.map(lambda job: list_class(root, *job), jobs):
        listing.files.extend(found.files)
        listing.skipped.extend(found.skipped)
    return listing


def list_class(root: str, folder: str, label: int) -> _Listing:
    listing, folders = _Listing(), [folder]
    while folders:
        here = folders.pop()
        for entry in _entries(f"{root}/{here}"):
            path = f"{here}/{entry.name}"
            if reason := _obstacle(entry):
                listing.skipped.append(Skipped(path, reason))
            elif entry.is_dir():
                folders.append(path)
            else:
                _add_file(listing, entry, path, label)
    return listing


def _add_file(listing: _Listing, entry: os.DirEntry[str], path: str, label: int) -> None:
    try:
        stat = entry.stat()
    except OSError as error:  # gone since it was listed, or a network file system lost it
        listing.skipped.append(Skipped(path, f"cannot be read: {error.strerror}"))
    else:
        listing.files.append(File(path, label, stat.st_size, stat.st_mtime_ns))


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [_readable(entry) for entry in entries]
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror or error}") from error


def _readable(entry: os.DirEntry[str]) -> os.DirEntry[str]:
    """The entry, unless its name is not UTF-8: no loader, log or JSON file could name it."""
    try:
        entry.name.encode()
    except UnicodeEncodeError as error:
        folder, shown = entry.path[: -len(entry.name)], ascii(entry.name)
        raise UserError(f"{folder} holds a name that is not UTF-8 ({shown}): rename it") from error
    return entry


def _stray(entry: os.DirEntry[str]) -> str:
    """Why an entry beside the class folders is not used; empty for the class folders."""
    return _hidden(entry) or ("" if entry.is_dir() else "not in a class folder")


def _hidden(entry: os.DirEntry[str]) -> str:
    if entry.name.startswith(".") or entry.name in CLUTTER:
        return "hidden folder" if entry.is_dir() else "hidden file"
    return ""


def _obstacle(entry: os.DirEntry[str]) -> str:
    """Why an entry in a class folder is not even opened; empty for files and folders."""
    if hidden := _hidden(entry):
        return hidden
    if entry.is_symlink() and entry.is_dir():
        target, here = Path(entry.path).resolve(), Path(entry.path).parent.resolve()
        return "link to a folder that holds it" if here.is_relative_to(target) else ""
    if entry.is_dir() or entry.is_file():
        return ""
    return "broken link" if entry.is_symlink() else "not a file"  # a pipe, say: reading one would hang
