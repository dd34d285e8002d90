"""Get archives, from a folder or over the network, and unpack them without trusting them."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import lzma
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tldist.config import UserError

Report = Callable[[str, int, int], None]
"""Called with (what is going on, done, in all); in all is 0 where it is not known."""

_BLOCK = 1 << 20
_TIMEOUT_S = 60
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError)


@dataclass(frozen=True)
class Archive:
    """A file as published, and the names under which people have it."""

    url: str
    md5: str = ""
    """Of the file; of what a lone .gz holds. Empty: none is published."""
    also: tuple[str, ...] = ()
    """Further file names that are accepted in a folder."""

    @property
    def names(self) -> tuple[str, ...]:
        """File names, the published one first."""
        return (self.url.rsplit("/", 1)[-1], *self.also)


def find(archives: tuple[Archive, ...], folder: Path, flag: str = "--from") -> list[Path]:
    """The file of each archive in `folder`, which `flag` named, or one folder further down.

    Raises:
        UserError: no such folder, or an archive is not in it; the file names looked for are named.
    """
    if not folder.is_dir():
        raise UserError(f"{flag} {folder} is not a folder: give the folder that holds the archive")
    found = [_find_one(archive, folder) for archive in archives]
    if missing := [" or ".join(a.names) for a, path in zip(archives, found, strict=True) if path is None]:
        mend = "put it there or leave --from out" if flag == "--from" else "put it there"
        raise UserError(f"{flag} {folder} does not hold {', '.join(missing)}: {mend}")
    return [path for path in found if path is not None]


def _find_one(archive: Archive, folder: Path) -> Path | None:
    for name in archive.names:
        for path in (folder / name, *sorted(folder.glob(f"*/{name}"))):
            if path.is_file():
                return path
    return None


def download(archive: Archive, folder: Path, report: Report) -> Path:
    """Download into `folder`.

    Raises:
        UserError: the network failed; it names the way around.
    """
    path = folder / archive.names[0]
    request = urllib.request.Request(archive.url, headers={"User-Agent": "tldist"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response, path.open("wb") as file:
            total, done = int(response.headers.get("Content-Length") or 0), 0
            while block := response.read(_BLOCK):
                file.write(block)
                done += len(block)
                report(f"downloading {path.name}", done, total)
        if done < total:
            raise ConnectionError(f"the connection was closed after {done} of {total} bytes")
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot download {archive.url} ({getattr(error, 'reason', '') or error}): "
            f"download it elsewhere and give its folder with --from DIR"
        ) from error
    return path


def check_file(path: Path, md5: str) -> None:
    """Raise UserError unless the file has this checksum."""
    with path.open("rb") as file:
        _check(path, hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest(), md5)


def read_gz(path: Path, md5: str) -> bytes:
    """What a .gz file holds (or the file itself where its name does not end so), checked."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except _DAMAGE as error:
        raise damaged(path, error) from error
    _check(path, hashlib.md5(data, usedforsecurity=False).hexdigest(), md5)
    return data


def _check(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(f"{path} is damaged: its md5 is {found}, expected {expected}: download it again")


def damaged(path: Path, error: Exception) -> UserError:
    """The error to raise for an archive that cannot be read."""
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(f"{path} is damaged ({first_line}): download it again")


def unpack(path: Path, into: Path, report: Report) -> None:
    """Unpack a .zip or any .tar into the folder `into`, and nowhere else.

    Raises:
        UserError: the archive is damaged or wants to write outside of `into`.
    """
    into.mkdir(parents=True)
    try:
        if zipfile.is_zipfile(path):
            _unpack_zip(path, into, report)
        elif tarfile.is_tarfile(path):
            _unpack_tar(path, into, report)
        else:
            raise UserError(f"{path} is neither a zip nor a tar archive: download it again")
    except tarfile.FilterError as error:
        raise UserError(f"{path} is refused, it writes where it should not: {error}") from error
    except _DAMAGE as error:
        raise damaged(path, error) from error


def _unpack_zip(path: Path, into: Path, report: Report) -> None:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for done, member in enumerate(members, start=1):
            # zipfile would quietly drop the '..' and write beside what was meant
            if not (into / member.filename).resolve().is_relative_to(into.resolve()):
                raise UserError(f"{path} is refused, it writes where it should not: {member.filename}")
            archive.extract(member, into)
            report(f"unpacking {path.name}", done, len(members))


def _unpack_tar(path: Path, into: Path, report: Report) -> None:
    with tarfile.open(path) as archive:
        for done, member in enumerate(archive, start=1):
            archive.extract(member, into, filter="data")
            report(f"unpacking {path.name}", done, 0)
