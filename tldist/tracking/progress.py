"""Progress bars on stderr, so that what a command prints can go into a file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


@contextlib.contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """One on a terminal, nothing elsewhere; gives the function that moves it to (done, in all)."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn())
    # rich would lead stdout to its own console, also where that is a file.
    both = sys.stdout.isatty()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=both
    ) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
