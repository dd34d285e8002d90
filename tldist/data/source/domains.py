"""The index of two data sets in one folder: `source/`, which is labelled, and `target/`, on which a run is evaluated.

Each is an image folder or a folder of shards, as `index.py` reads them. Of the target's training images no label is
read: they may lie in `target/train/` without class folders, and where they do not, their order is that of their file
names, which does not tell the class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tldist.config import UserError, nearest
from tldist.data.source.index import (
    Index,
    Skipped,
    Split,
    check_each_class,
    choose_classes,
    class_folders,
    list_class,
    list_split,
    root_folder,
    split_of_files,
    split_of_shards,
)
from tldist.data.source.shards import Shards, is_shards, open_shards
from tldist.data.source.verify import File, Progress, Verdict, num_workers, verdicts

UNLABELLED = -1
_LAYOUT = "source/train/CLASS/*.jpg, target/train/*.jpg and target/val/CLASS/*.jpg"


@dataclass(frozen=True)
class _Part:
    """One split of one domain."""

    split: Split
    sizes: list[int]
    """Bytes of each image."""
    skipped: list[Skipped]


def build_domains(
    root: str | Path, shown: Sequence[str], classes: Sequence[str] = (), progress: Progress | None = None
) -> Index:
    """The training images of the domain `shown[0]` with their labels, those of `shown[1]` (if there is one) without,
    and the target's validation images.

    Args:
        classes: use only these of the labelled domain's classes; the unlabelled images are used all.
        progress: called now and then while files are being verified.

    Raises:
        UserError: a domain, a split or a class is missing, or as `build_index` does.
    """
    folder = root_folder(root)
    if missing := [name for name in ("source", "target") if not Path(folder, name).is_dir()]:
        raise UserError(f"{folder} has no folder {missing[0]}/: for two domains arrange it as {_LAYOUT}")
    with ThreadPoolExecutor(num_workers()) as pool:
        homes = {name: _Home(f"{folder}/{name}", pool, progress) for name in ("source", "target")}
        labelled, target = homes[shown[0]], homes["target"]
        chosen = _choose(labelled, target, classes)
        parts = [labelled.labelled("train", chosen), target.labelled("val", chosen)]
        parts += [homes[name].unlabelled() for name in shown[1:]]
    digest = hashlib.sha256("\0".join(chosen).encode())
    for part in parts:
        rows = zip(part.split.paths, part.split.labels_N.tolist(), part.sizes, strict=True)
        digest.update("".join(f"\n{path}\0{label}\0{size}" for path, label, size in rows).encode())
    skipped = tuple(sorted((item for part in parts for item in part.skipped), key=lambda item: item.path))
    train, val, *more = (part.split for part in parts)
    return Index(folder, chosen, train, val, skipped, digest.hexdigest(), more[0] if more else None)


def _choose(labelled: _Home, target: _Home, wanted: Sequence[str]) -> tuple[str, ...]:
    train, val = labelled.classes("train"), target.classes("val")
    for name in val:
        if name not in train:
            hint = nearest(name, train)
            raise UserError(f"{target.root}/val has class '{name}', {labelled.root}/train does not{hint}: rename it")
    return choose_classes(labelled.root, wanted, train, val)


class _Home:
    """The folder of one domain."""

    def __init__(self, root: str, pool: ThreadPoolExecutor, progress: Progress | None) -> None:
        self.root, self.pool, self.progress = root, pool, progress
        self.name = Path(root).name
        self.shards: Shards | None = open_shards(root, pool, progress) if is_shards(root) else None

    def classes(self, split: str) -> list[str]:
        """The class names that a split has."""
        if self.shards is None:
            return class_folders(self.root, split)
        present = {row.label for rows in self.shards.of(split).values() for row in rows}
        return [name for number, name in self.shards.classes.items() if number in present]

    def labelled(self, split: str, classes: tuple[str, ...]) -> _Part:
        """The images of `classes`."""
        if self.shards is not None:
            names = self.shards.classes.items()
            return self._of_shards(split, {number: classes.index(name) for number, name in names if name in classes})
        listing = list_split(self.pool, self.root, split, classes)
        files, skipped, found = self._verified(listing.files, listing.skipped)
        check_each_class(f"{self.root}/{split}", classes, {file.label for file in files}, skipped)
        return self._of_files(sorted(files), skipped, found)

    def unlabelled(self) -> _Part:
        """All training images, wherever they lie in `train/`."""
        if self.shards is not None:
            return self._of_shards("train", dict.fromkeys(self.shards.classes, UNLABELLED))
        if not Path(self.root, "train").is_dir():
            raise UserError(f"{self.root} has no train/ folder: put its images there; they need no class folders")
        listing = list_class(self.root, "train", UNLABELLED)
        files, skipped, found = self._verified(listing.files, listing.skipped)
        if not files:
            raise UserError(f"{self.root}/train holds no usable image: put the unlabelled images there")
        files.sort(key=lambda file: (Path(file.path).name, file.path))
        return self._of_files(files, skipped, found)

    def _verified(
        self, files: list[File], skipped: list[Skipped]
    ) -> tuple[list[File], list[Skipped], dict[str, Verdict]]:
        found = verdicts(self.pool, self.root, files, True, self.progress)
        bad = [Skipped(file.path, verdict) for file in files if isinstance(verdict := found[file.path], str)]
        return [file for file in files if not isinstance(found[file.path], str)], [*skipped, *bad], found

    def _of_files(self, files: list[File], skipped: list[Skipped], found: dict[str, Verdict]) -> _Part:
        return self._part(split_of_files(files, found), [file.num_bytes for file in files], skipped)

    def _of_shards(self, split: str, labels: dict[int, int]) -> _Part:
        assert self.shards is not None
        of_split = self.shards.of(split)
        kept = {shard: [row for row in rows if row.label in labels] for shard, rows in of_split.items()}
        if not any(kept.values()):
            raise UserError(f"{self.root} has no usable image in shards {split}-*.tar: add some")
        skipped = [Skipped(*item) for item in self.shards.skipped if item[0].split("/", 1)[0] in of_split]
        sizes = [row.num_bytes for rows in kept.values() for row in rows]
        return self._part(split_of_shards(kept, labels), sizes, skipped)

    def _part(self, split: Split, sizes: list[int], skipped: list[Skipped]) -> _Part:
        """With paths relative to the folder of both domains."""
        members = split.members and replace(
            split.members, shards=tuple(f"{self.name}/{shard}" for shard in split.members.shards)
        )
        paths = tuple(f"{self.name}/{path}" for path in split.paths)
        return _Part(
            replace(split, paths=paths, members=members),
            sizes,
            [Skipped(f"{self.name}/{item.path}", item.reason) for item in skipped],
        )
