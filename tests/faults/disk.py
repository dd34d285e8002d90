"""A small disk, and something that fills it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path


class Ballast:
    """Something else that fills the disk in `folder` but for some bytes, at once and whenever room comes."""

    def __init__(self, folder: Path, room: int) -> None:
        self.path, self.room, self.closed_at = folder / "ballast", room, float("inf")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._fill, daemon=True)

    def __enter__(self) -> Ballast:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Room again."""
        if not self._over.is_set():
            self._over.set()
            self._thread.join()
            self.path.unlink()
            self.closed_at = time.time()

    def _fill(self) -> None:
        with self.path.open("wb") as file:
            while not self._over.wait(0.01):
                disk = os.statvfs(self.path)
                more = disk.f_bavail * disk.f_bsize - self.room
                if more > 0:
                    with contextlib.suppress(OSError):
                        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size + more)


@contextlib.contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """A file system of its own, in memory. Raises PermissionError for who may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tldist-faults", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise PermissionError(f"a small disk needs root to mount it: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)
        with contextlib.suppress(OSError):
            folder.rmdir()
