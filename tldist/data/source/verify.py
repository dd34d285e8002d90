"""Verify image files by decoding them in full, once, and remember what was found.

Accepted is what DALI 2.4 (on the CPU) and Pillow 13 were seen to decode to the same RGB pixels: JPEG (also
CMYK, and MPO, the JPEG with a second picture that phones write), PNG, WebP, BMP and TIFF; one picture per
file, 8 bits per channel.
16-bit grey is out: DALI scales it to 8 bits where Pillow clips it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageFile, UnidentifiedImageError

Progress = Callable[[int, int], None]
"""Called with (files verified, files in all)."""

Verdict = tuple[int, int] | str
"""(height, width) in pixels, upright, of a usable image; or why the file is not one."""


class File(NamedTuple):
    """A file of the image folder, as listed."""

    path: str
    """Relative to the root."""
    label: int
    num_bytes: int
    mtime_ns: int


VERSION = 2
"""Of what is remembered; count up when the rules below change."""
MAX_WORKERS = 32  # beyond it Pillow's Python part (0.05 ms a file, under the GIL) is the limit, not decoding
_CHUNK = 64  # files per task: given out one by one, two threads were no faster than one

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_MODES = frozenset({"RGB", "RGBA", "L", "LA", "P", "1", "CMYK"})
_TIFF_MODES = frozenset({"RGB", "RGBA", "L", "P", "CMYK"})  # DALI refuses 1-bit TIFFs and misreads grey with alpha
_MAX_PIXELS = 2**28  # 0.8 GB as RGB: a 20,000 x 10,000 panorama passes, a bomb of 100,000 x 100,000 does not
_UNREAD = "cannot be read: "  # a trouble of the moment (permissions, I/O): never remembered
_TRUNCATED = "truncated: the end of the file is missing"
_ORIENTATION_TAG = 0x0112

_FOREIGN = (
    (0, b"GIF8", "GIF"),
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftyphev", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (4, b"jP  \r\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (4, b"JXL \r\n", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"8BPS", "PSD"),
    (0, b"%PDF", "PDF"),
    (0, b"DDS ", "DDS"),
    (0, b"\x00\x00\x01\x00", "ICO"),
    (0, b"P5", "PPM"),
    (0, b"P6", "PPM"),
)
"""(offset, bytes, name) of formats that people do have in image folders and that tldist does not read."""
_OURS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*", b"RIFF")


# One file


def verify(path: str, data: bytes | None = None) -> Verdict:
    """Decode the file (or `data`, where it is part of one) in full. Safe in threads; strict only inside
    `strict_pillow()`."""
    try:
        with Image.open(path if data is None else io.BytesIO(data), formats=FORMATS) as image:
            return _refusal(image) or _decoded_size(image, path, data)
    except UnidentifiedImageError:
        return _unidentified(path, data)
    except MemoryError:
        return _UNREAD + "out of memory"
    except Exception as error:  # on damaged bytes Pillow raises SyntaxError, struct.error, ValueError, IndexError...
        return _in_words(error)


def refusal(path: str) -> str:
    """Why `verify` would refuse a file, as far as its header tells; empty where it is to be decoded."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return _refusal(image)
    except UnidentifiedImageError:
        return _unidentified(path, None)
    except Exception as error:
        return _in_words(error)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8, as DALI reads it.

    `Image.getexif` and `ImageOps.exif_transpose` also believe an XMP packet, which DALI does not read.
    A TIFF is turned by Pillow when it is loaded, and says 1.
    """
    data = image.info.get("exif")
    if not data:
        return 1
    exif = Image.Exif()
    try:
        exif.load(data)
        value = exif.get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF beside sound pixels: DALI reads it as upright, and so do we
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _refusal(image: Image.Image) -> str:
    """Why this image is refused though its header is sound; empty when it is welcome."""
    if why := too_large(image):
        return why
    num_frames = getattr(image, "n_frames", 1)
    if num_frames > 1 and image.format != "MPO":
        return f"{num_frames} pictures in one {image.format} are not supported"
    if image.mode not in (_TIFF_MODES if image.format == "TIFF" else _MODES):
        return f"{image.format} pixels of type {image.mode} are not supported: convert it to 8-bit RGB"
    return ""


def too_large(image: Image.Image) -> str:
    """Why an image of which the header is read has too many pixels; empty where it has not."""
    if image.width * image.height <= _MAX_PIXELS:
        return ""
    return f"too large: {image.width} x {image.height} pixels (at most {_MAX_PIXELS // 10**6} million)"


def _decoded_size(image: Image.Image, path: str, data: bytes | None) -> Verdict:
    image.load()
    if image.format == "PNG":
        # Where all pixels are there Pillow is content; DALI also wants checksums to be right, and an end.
        with Image.open(path if data is None else io.BytesIO(data), formats=FORMATS) as again:
            again.verify()
    width, height = image.size
    return (width, height) if orientation(image) >= 5 else (height, width)


def _unidentified(path: str, data: bytes | None) -> str:
    try:
        with Path(path).open("rb") if data is None else io.BytesIO(data) as file:
            head = file.read(32)
    except OSError as error:
        return _in_words(error)
    for offset, magic, name in _FOREIGN:
        if head.startswith(magic, offset):
            return f"{name} is not supported"
    return "damaged: its header cannot be read" if head.startswith(_OURS) else "not an image"


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return _UNREAD + (error.strerror or str(error))
    text = " ".join(str(error).split()) or type(error).__name__
    return _TRUNCATED if "truncated" in text.lower() else f"damaged: {text}"


@contextlib.contextmanager
def strict_pillow() -> Iterator[None]:
    """Set Pillow's process-wide switches while files are verified.

    Truncated files fail, the limit against bombs is ours, and warnings (of EXIF, palettes, bombs) stay off
    the screen: what matters of them becomes a reason.
    """
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    Image.init()  # all plugins at once, here: not in 32 threads
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with pillow_without_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


class _PillowLimit:
    """Pillow's limit against bombs, a switch of the process: how many of our threads want it off, and what it was."""

    lock = threading.Lock()
    users = 0
    before: int | None = None


@contextlib.contextmanager
def pillow_without_limit() -> Iterator[None]:
    """Switch Pillow's own limit against bombs off, which is lower than ours, until the last thread inside leaves."""
    with _PillowLimit.lock:
        if _PillowLimit.users == 0:
            _PillowLimit.before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _PillowLimit.users += 1
    try:
        yield
    finally:
        with _PillowLimit.lock:
            _PillowLimit.users -= 1
            if _PillowLimit.users == 0:
                Image.MAX_IMAGE_PIXELS = _PillowLimit.before


# All files


def num_workers() -> int:
    """Threads to verify with: the cores this job may use, which under Slurm are not all the node has."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    return min(MAX_WORKERS, cores)


def verdicts(
    pool: ThreadPoolExecutor,
    root: str,
    files: list[File],
    partial: bool,
    progress: Progress | None,
    look: Callable[[File], Verdict] | None = None,
) -> dict[str, Verdict]:
    """The verdict on each file, by path: remembered where size and mtime are the same, else by decoding.

    `partial`: `files` are not the whole folder, so what is remembered of other files stays.
    `look`: decodes one that is no file of its own.
    """
    cache = cache_path(root)
    old = recall(cache, VERSION)
    look = look or (lambda file: verify(f"{root}/{file.path}"))
    found = {file.path: known for file in files if (known := _known(old, file)) is not None}
    unknown = [file for file in files if file.path not in found]
    try:
        for more in _verify_all(pool, unknown, look):
            found |= more
            if progress:
                progress(len(found), len(files))
    finally:  # also when interrupted: twenty minutes of decoding are not done twice
        if unknown or (len(old) != len(files) and not partial):
            remember(cache, VERSION, (old if partial else {}) | _entries(files, found))
    return found


def _verify_all(
    pool: ThreadPoolExecutor, files: list[File], look: Callable[[File], Verdict]
) -> Iterator[dict[str, Verdict]]:
    size = max(1, min(_CHUNK, len(files) // (4 * num_workers())))
    chunks = [files[start : start + size] for start in range(0, len(files), size)]

    def verify_chunk(chunk: list[File]) -> dict[str, Verdict]:
        return {f.path: look(f) if f.num_bytes else "empty file" for f in chunk}

    with strict_pillow():
        try:
            yield from pool.map(verify_chunk, chunks)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C must not wait for a million files
            raise


# What is remembered: path -> [bytes, mtime_ns, verdict] as JSON


def cache_path(root: str) -> Path | None:
    """Where verdicts on the files of `root` are kept; None for a user without a home (in a container)."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return base / "tldist" / "index" / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:32]}.json"


def recall(cache: Path | None, version: int) -> dict[str, Any]:
    """What `remember` wrote; empty where there is no cache or it is damaged."""
    if cache is None:
        return {}
    try:
        data = json.loads(cache.read_text())
        return data["files"] if data["version"] == version and isinstance(data["files"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _known(old: dict[str, Any], file: File) -> Verdict | None:
    match old.get(file.path):
        case [file.num_bytes, file.mtime_ns, str(reason)]:
            return reason
        case [file.num_bytes, file.mtime_ns, [int(height), int(width)]]:
            return height, width
    return None


def _entries(files: list[File], found: dict[str, Verdict]) -> dict[str, Any]:
    verdict_of = [(file, found[file.path]) for file in files if file.path in found]
    return {
        file.path: (file.num_bytes, file.mtime_ns, verdict)
        for file, verdict in verdict_of
        if not (isinstance(verdict, str) and verdict.startswith(_UNREAD))
    }


def remember(cache: Path | None, version: int, files: dict[str, Any]) -> None:
    """Keep something about each file for the next run."""
    if cache is None:
        return
    with contextlib.suppress(OSError):  # a read-only home costs a second verification, not the run
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, json.dumps({"version": version, "files": files}))


def write_atomically(path: Path, text: str) -> None:
    """Through a sibling with a name of its own, so that several writers at once leave one whole file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
