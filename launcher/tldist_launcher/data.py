"""`tldist data fetch` and `tldist data check`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from tldist.config import UserError, nearest
from tldist.data.datasets import DATASETS, fetch
from tldist.data.index import Index, build_index
from tldist_launcher.arguments import parse_flags


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
    columns = (TextColumn("looking at images"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("check", total=None)
        index = build_index(Path(words[0]).expanduser(), progress=lambda n, of: bar.update(task, completed=n, total=of))
    _print_index(index)
    return 0


def _print_index(index: Index) -> None:
    names = ", ".join(index.classes[:10]) + (", ..." if len(index.classes) > 10 else "")
    print(f"{index.root}: {len(index.classes)} classes ({names})")
    for name, split in (("train", index.train), ("val", index.val)):
        short = split.sizes_N2.min(axis=1)
        print(f"{name}: {len(split.paths):,} images, short side {short.min()} to {short.max()} px")
    print(f"skipped: {len(index.skipped)}")
    for skipped in index.skipped:
        print(f"  {skipped.path}: {skipped.reason}")
    print(f"fingerprint: {index.fingerprint}")
