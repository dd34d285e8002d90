"""The files that a list of paths names: files, folders with all that is in them, and patterns."""

from __future__ import annotations

import contextlib
import glob
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from tldist.config import UserError, nearest
from tldist.data.source.index import CLUTTER, IMAGE_SUFFIXES


def find_files(words: Sequence[str]) -> list[Path]:
    """Each file once, those of a folder by path. Hidden files in folders are left out; whatever else lies there is
    listed, images or not, and links to folders are followed. A folder that cannot be read is listed itself.

    Raises UserError for a path that does not exist, a pattern that fits nothing, and where nothing is found at all.
    """
    found: dict[Path, None] = {}
    for word in words:
        found |= dict.fromkeys(path for start in _starts(word) for path in _under(start))
    if not found:
        raise UserError(f"there is no file in {', '.join(words)}")
    return list(found)


def _starts(word: str) -> list[Path]:
    path = Path(word).expanduser()
    if os.path.lexists(path):
        return [path]
    if glob.has_magic(word):
        if matches := sorted(glob.glob(str(path), recursive=True)):  # noqa: PTH207 - pathlib's takes no absolute one
            return [Path(match) for match in matches]
        raise UserError(f"no file fits {word}")
    beside: list[str] = []
    with contextlib.suppress(OSError):
        beside = [entry.name for entry in path.parent.iterdir()]
    hint = nearest(path.name, beside)
    raise UserError(f"there is no file or folder {word}{hint}")


def _under(start: Path) -> Iterator[Path]:
    if not os.path.isdir(start):  # noqa: PTH112 - False also where it cannot be known
        yield start
        return
    seen, closed = set(), []
    for folder, folders, names in os.walk(start, onerror=closed.append, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder that was walked, perhaps the one that holds it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _hidden(name))
        # A folder `x.jpg` without anything in it was meant to be an image.
        empty = [name for name in folders if _looks_like_image(name) and _is_empty(Path(folder, name))]
        yield from (Path(folder, name) for name in sorted([*names, *empty]) if not _hidden(name))
    yield from (Path(error.filename) for error in closed)


def _is_empty(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return not any(entries)
    except OSError:
        return False  # the walk will say so


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in CLUTTER


def _looks_like_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def obstacle(path: Path) -> str:
    """Why a path is not even opened (a pipe would never end); empty for a file with something in it."""
    try:
        told = path.stat()
    except FileNotFoundError:
        return "broken link" if path.is_symlink() else "not there"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if stat.S_ISDIR(told.st_mode):
        return _closed(path) or "a folder, not an image"
    if not stat.S_ISREG(told.st_mode):
        return "not a file"
    return "" if told.st_size else "empty file"


def _closed(folder: Path) -> str:
    try:
        os.scandir(folder).close()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return ""
