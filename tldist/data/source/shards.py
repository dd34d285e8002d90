"""Tar shards in WebDataset's layout as a source of images: KEY.jpg beside KEY.cls, read by offset, never unpacked.

A folder that `tldist data shard` wrote says in one JSON file where every image lies; of other people's shards the
headers are scanned and the images decoded once, and both are remembered while a tar's size and time are the same.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import posixpath
import re
import tarfile
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tldist.config import UserError
from tldist.data.source.verify import (
    File,
    Progress,
    Verdict,
    cache_path,
    num_workers,
    recall,
    remember,
    verdicts,
    verify,
)

MANIFEST = "shards.json"
"""Written last: without it, or while it says `finished: false`, what `tldist data shard` wrote is not used."""
CLASSES = "classes.txt"
"""Class names, one per line, for shards without a manifest."""
EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")
_VERSION = 1  # of the manifest, and of the remembered headers
_MOST_OPEN = 256  # tars: a worker reads from a few dozen at a time, and a process may often open no more than 1024
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")  # WebDataset's: the name up to its first dot


class Member(NamedTuple):
    """Bytes inside a tar, to be read as if they were a file."""

    tar: str
    offset: int
    num_bytes: int


Place = Path | Member
"""Where an image's encoded bytes are."""


@dataclass(frozen=True, eq=False)
class Members:
    """Where the images of a split, or of a batch, lie in its shards. The array is read-only."""

    shards: tuple[str, ...]
    """File names in the root."""
    extents_N3: np.ndarray
    """int64 (position in `shards`, offset in bytes, number of bytes)."""

    def __post_init__(self) -> None:
        self.extents_N3.flags.writeable = False

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Members)
            and self.shards == other.shards
            and np.array_equal(self.extents_N3, other.extents_N3)
        )

    @property
    def shards_N(self) -> np.ndarray:
        """Each image's position in `shards`."""
        return self.extents_N3[:, 0]

    def take(self, ids_N: np.ndarray) -> Members:
        """Those of some images, in the order asked for."""
        return Members(self.shards, self.extents_N3[ids_N])

    def place(self, root: Path, i: int) -> Member:
        """Where image `i` is."""
        shard, offset, num_bytes = self.extents_N3[i].tolist()
        return Member(f"{root}/{self.shards[shard]}", offset, num_bytes)


# Bytes


def read_bytes(place: Place) -> np.ndarray:
    """The uint8 bytes of a file, or of a tar's member. Safe in threads. Raises OSError, also for a tar too short."""
    if isinstance(place, Path):
        return np.fromfile(place, dtype=np.uint8)
    opened = _opened(place.tar)  # held until the bytes are here: another thread may make the cache forget it
    data = os.pread(opened.descriptor, place.num_bytes, place.offset)
    if len(data) < place.num_bytes:
        raise OSError(0, f"{Path(place.tar).name} ends before it")
    return np.frombuffer(bytearray(data), dtype=np.uint8)  # writable, which torch insists on


def verify_place(place: Place) -> Verdict:
    """`verify` of a file, or of a tar's member."""
    if isinstance(place, Path):
        return verify(str(place))
    try:
        return verify(place.tar, read_bytes(place).tobytes())
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def read_path(path: Path) -> bytes:
    """The bytes of `root/train/ants/1.jpg`, or of `root/train-000000.tar/ants/1.jpg`, which is no file. For a few
    pictures: it scans the tar's headers. Raises OSError, or UserError for a damaged tar."""
    tar = next((parent for parent in path.parents if parent.suffix == ".tar" and parent.is_file()), None)
    if tar is None:
        return path.read_bytes()
    member = _members_of(tar, tar.stat().st_mtime_ns).get(path.relative_to(tar).as_posix())
    if member is None:
        raise FileNotFoundError(f"{path.relative_to(tar)} is not in {tar}")
    return read_bytes(member).tobytes()


class _Opened:
    """An open file, closed when it is forgotten and no thread reads from it any more."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)


@functools.lru_cache(maxsize=_MOST_OPEN)
def _opened(path: str) -> _Opened:
    return _Opened(path)


@functools.lru_cache(maxsize=32)
def _members_of(tar: Path, _mtime_ns: int) -> dict[str, Member]:
    return {name: Member(str(tar), offset, num_bytes) for name, offset, num_bytes in headers(tar)}


# A folder of shards


class Row(NamedTuple):
    """An image in a shard."""

    name: str
    """Of the member: ants/0013035.jpg."""
    offset: int
    num_bytes: int
    label: int
    height: int
    width: int
    crc32: int = 0
    """Of its bytes, as we wrote them."""


@dataclass(frozen=True)
class Shards:
    """What a folder of shards holds."""

    classes: dict[int, str]
    """Name of each class by the number that the shards use for it, in the order of these numbers."""
    shards: dict[str, list[Row]]
    """Usable images by the tar's file name, sorted, each in the order of the file."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """(tar/member, reason)."""

    def of(self, split: str) -> dict[str, list[Row]]:
        """The shards of `train` or `val`."""
        return {name: rows for name, rows in self.shards.items() if name.startswith(f"{split}-")}


def is_shards(root: str | Path) -> bool:
    """Is this a folder of shards? One that also has a `train/` is an image folder, unless we wrote a manifest."""
    folder = Path(root)
    return (folder / MANIFEST).is_file() or (not (folder / "train").is_dir() and any(folder.glob("train-*.tar")))


def open_shards(root: str, pool: ThreadPoolExecutor, progress: Progress | None = None) -> Shards:
    """Every image in a folder of shards. Reads no tar where there is a manifest.

    Raises:
        UserError: the manifest is damaged or unfinished, a tar is missing, damaged or not what it was, a label has
            no class.
    """
    _opened.cache_clear()  # a tar may have been replaced since
    if (Path(root) / MANIFEST).is_file():
        return _from_manifest(Path(root))
    return _from_headers(root, pool, progress)


def check_bytes(root: str, progress: Progress | None = None) -> None:
    """Read every image of shards that have a manifest, and compare its checksum. Others are always looked at in full.

    Raises:
        UserError: naming the first image whose bytes are not those that were written.
    """
    if not (Path(root) / MANIFEST).is_file():
        return
    shards = _from_manifest(Path(root)).shards
    done, total = 0, sum(map(len, shards.values()))
    with ThreadPoolExecutor(num_workers()) as pool:
        found = pool.map(_first_wrong, (f"{root}/{name}" for name in shards), shards.values())
        for (name, rows), wrong in zip(shards.items(), found, strict=True):
            if wrong is not None:
                pool.shutdown(wait=False, cancel_futures=True)
                raise UserError(
                    f"{root}/{name} is damaged: {wrong.name} in it is not what was written: copy it anew or write the "
                    "shards again with `tldist data shard`"
                )
            done += len(rows)
            if progress:
                progress(done, total)


def _first_wrong(tar: str, rows: list[Row]) -> Row | None:
    """The first image whose bytes are not as they were written."""
    try:
        for row in rows:
            if zlib.crc32(read_bytes(Member(tar, row.offset, row.num_bytes)).tobytes()) != row.crc32:
                return row
    except OSError as error:
        raise UserError(f"cannot read {tar} ({error.strerror}): copy it anew") from error
    return None


def manifest(classes: tuple[str, ...], shards: dict[str, list[Row]], sizes: dict[str, int]) -> str:
    """The text of a finished manifest; `sizes`: bytes of each tar."""
    listed = {name: {"num_bytes": sizes[name], "images": rows} for name, rows in shards.items()}
    body = {"classes": list(classes), "shards": listed}
    return json.dumps({"version": _VERSION, "finished": True, "fingerprint": _digest(body), **body})


UNFINISHED = json.dumps({"version": _VERSION, "finished": False})
"""The manifest while shards are being written."""


def is_unfinished(root: Path) -> bool:
    """Did `tldist data shard` not reach its end here?"""
    try:
        return not json.loads((root / MANIFEST).read_text())["finished"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _from_manifest(root: Path) -> Shards:
    path, again = root / MANIFEST, "write the shards again with `tldist data shard`"
    try:
        data = json.loads(path.read_text())
        if data["version"] != _VERSION:
            raise UserError(f"{path} is of version {data['version']}, this tldist reads {_VERSION}: {again}")
        if not data["finished"]:
            raise UserError(f"{root} was left unfinished by an interrupted `tldist data shard`: delete it and {again}")
        if data["fingerprint"] != _digest({"classes": data["classes"], "shards": data["shards"]}):
            raise KeyError("fingerprint")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {again}") from error
    for name, shard in data["shards"].items():
        _check_size(root / name, shard["num_bytes"], again)
    rows = {name: [Row(*row) for row in shard["images"]] for name, shard in data["shards"].items()}
    return Shards(dict(enumerate(data["classes"])), rows)


def _check_size(tar: Path, expected: int, again: str) -> None:
    found = _stat(tar, f"copy it here or {again}").st_size
    if found != expected:
        what = "cut off" if found < expected else "changed"
        raise UserError(f"{tar} is {what}: it has {found} bytes, not {expected} as written: copy it anew or {again}")


def _stat(tar: Path, mend: str) -> os.stat_result:
    try:
        return tar.stat()
    except OSError as error:
        raise UserError(f"cannot read {tar} ({error.strerror}): {mend}") from error


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# Other people's shards


class _Listed(NamedTuple):
    """An image by a tar's headers; `label` says in words why it is none that can be used."""

    name: str
    offset: int
    num_bytes: int
    label: int | str


def headers(tar: Path) -> list[tuple[str, int, int]]:
    """(name, offset, bytes) of each file in a tar. Raises UserError where it is damaged, cut off, or none."""
    try:
        with tarfile.open(tar, "r:") as archive:
            found = [(posixpath.normpath(m.name), m.offset_data, m.size) for m in archive if m.isreg()]
            end = archive.offset
        with tar.open("rb") as file:
            file.seek(end)
            # tarfile takes a header that it cannot read for the end.
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {end}")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{tar} is damaged, cut off or no plain tar ({error}): copy or write it again") from error
    for name, *_ in found:
        if name != name.encode(errors="replace").decode():
            raise UserError(f"{tar} holds a name that is not UTF-8 ({name!a}): write it again with another")
    return found


def _from_headers(root: str, pool: ThreadPoolExecutor, progress: Progress | None) -> Shards:
    tars = sorted(path for split in ("train", "val") for path in Path(root).glob(f"{split}-*.tar"))
    if not any(tar.name.startswith("val-") for tar in tars):
        raise UserError(f"{root} has train-*.tar but no val-*.tar: add shards to evaluate on")
    listed, times = _list_tars(root, tars, pool)
    where = {f"{tar}/{m.name}": Member(f"{root}/{tar}", m.offset, m.num_bytes) for tar in listed for m in listed[tar]}
    files = [
        File(f"{tar}/{m.name}", m.label, m.num_bytes, times[tar])
        for tar in listed
        for m in listed[tar]
        if isinstance(m.label, int)
    ]
    found = verdicts(pool, root, files, False, progress, lambda file: verify_place(where[file.path]))
    rows, skipped = {}, []
    for tar, images in listed.items():
        rows[tar] = [
            Row(m.name, m.offset, m.num_bytes, m.label, *size)
            for m in images
            if isinstance(m.label, int) and not isinstance(size := found[f"{tar}/{m.name}"], str)
        ]
        reasons = [(f"{tar}/{m.name}", found.get(f"{tar}/{m.name}", m.label)) for m in images]
        skipped += [(path, reason) for path, reason in reasons if isinstance(reason, str)]
    return Shards(_class_names(root, rows), rows, skipped)


def _class_names(root: str, shards: dict[str, list[Row]]) -> dict[int, str]:
    """Of `classes.txt`, else the numbers in train's `.cls` files themselves."""
    path = Path(root) / CLASSES
    if not path.is_file():
        train = (row.label for name, rows in shards.items() if name.startswith("train-") for row in rows)
        return {number: str(number) for number in sorted(set(train))}
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} names class '{twice}' twice: give every class a name of its own")
    for name, rows in shards.items():
        if high := [row for row in rows if row.label >= len(names)]:
            raise UserError(
                f"{name} has class {high[0].label} ({high[0].name}), and {path} names {len(names)} classes, from 0 on: "
                "add the missing lines"
            )
    return dict(enumerate(names))


def _list_tars(
    root: str, tars: list[Path], pool: ThreadPoolExecutor
) -> tuple[dict[str, list[_Listed]], dict[str, int]]:
    """Images by the name of their tar, scanned or remembered; and each tar's mtime_ns."""
    base = cache_path(root)
    cache = base and base.with_suffix(".tars.json")
    old = recall(cache, _VERSION)
    stats = {tar.name: _stat(tar, "copy it here, or remove it") for tar in tars}
    known = {
        name: [_Listed(*image) for image in old[name][2]]
        for name, stat in stats.items()
        if name in old and old[name][:2] == [stat.st_size, stat.st_mtime_ns]
    }
    unknown = [tar for tar in tars if tar.name not in known]
    scanned = dict(zip((tar.name for tar in unknown), pool.map(_list_tar, unknown), strict=True))
    listed = {tar.name: known.get(tar.name) or scanned.get(tar.name, []) for tar in tars}
    if scanned or len(old) != len(tars):
        remember(cache, _VERSION, {n: (stats[n].st_size, stats[n].st_mtime_ns, listed[n]) for n in listed})
    return listed, {name: stat.st_mtime_ns for name, stat in stats.items()}


def _list_tar(tar: Path) -> list[_Listed]:
    """The images of a tar in the order of the file, each with the label of the `.cls` file with the same key."""
    keyed = [(match[1], match[2].lower(), entry) for entry in headers(tar) if (match := _KEY.fullmatch(entry[0]))]
    labels = {key: _label(Member(str(tar), *entry[1:])) for key, extension, entry in keyed if extension == "cls"}
    images = {key: entry for key, extension, entry in keyed if extension in EXTENSIONS}
    found = [_Listed(*entry, labels.get(key, "no .cls file gives its class")) for key, entry in images.items()]
    lonely = [entry for key, extension, entry in keyed if extension == "cls" and key not in images]
    return found + [_Listed(*entry, f"no image beside it ({', '.join(EXTENSIONS)})") for entry in lonely]


def _label(cls: Member) -> int | str:
    text = read_bytes(cls._replace(num_bytes=min(cls.num_bytes, 100))).tobytes().decode(errors="replace").strip()
    return int(text) if text.isascii() and text.isdigit() else f"its .cls file says '{text}', not a class's number"
