"""Images that the index had accepted and that cannot be read any more: an error, or left out, named and counted."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from tldist.data.batches import BatchPlan
from tldist.data.source.shards import verify_place
from tldist.data.source.verify import strict_pillow


class DecodeError(RuntimeError):
    """Files that the index had accepted cannot be read any more."""


class BadImages:
    """What the loaders of one worker met, and under `skip` what those of all workers did, also in earlier processes.

    Under `skip` a training batch shows its next image twice in place of a bad one, and an evaluation batch is shorter.
    A batch without a single image that can be read is an error: it is the storage that is bad then.
    """

    def __init__(self, skip: bool = False, folder: Path | None = None, rank: int = 0) -> None:
        """`folder` holds a file for each worker of the run; None: nothing is kept."""
        self.skip = skip
        self._folder, self._rank = folder, rank
        self.reasons: dict[str, str] = {}
        self._told: set[str] = set()
        if skip:
            self.look()

    def look(self) -> None:
        """Learn what the other workers, or earlier processes, met."""
        for path in sorted(self._folder.glob("bad-images-rank*.jsonl")) if self._folder else ():
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # half a line: its writer is at it, or was killed
                    self.reasons |= json.loads(line)

    def drain_news(self) -> dict[str, str]:
        """Path -> reason of what was not told yet, by any worker."""
        self.look()
        new = {path: reason for path, reason in self.reasons.items() if path not in self._told}
        self._told |= new.keys()
        return new

    def without_known(self, plan: BatchPlan) -> BatchPlan:
        """The plan without images that are known to be bad."""
        known = {i for i, path in enumerate(plan.paths) if path in self.reasons} if self.reasons else set()
        return plan.without(known) if len(known) < len(plan.paths) else plan

    def without(
        self, root: Path, plan: BatchPlan, suspects: Mapping[int, BaseException], certain: bool = True
    ) -> BatchPlan:
        """The plan without those of its images, given by position, that cannot be read.

        Args:
            certain: all suspects failed; else some of them did, and each is looked at.

        Raises:
            DecodeError: not under `skip`; or nothing is found, or nothing is left.
        """
        with strict_pillow():
            found = {i: _problem(root, plan, i) for i in suspects}
        bad = {i: why or _brief(suspects[i]) for i, why in found.items() if why or certain}
        if not self.skip or not bad or len(bad) == len(plan.paths):
            raise _error(root, plan, bad, suspects)
        self._keep({plan.paths[i]: why for i, why in bad.items() if plan.paths[i] not in self.reasons})
        return plan.without(bad.keys())

    def _keep(self, more: dict[str, str]) -> None:
        self.reasons |= more
        if self._folder and more:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"bad-images-rank{self._rank}.jsonl").open("a") as file:
                file.writelines(json.dumps({path: why}) + "\n" for path, why in more.items())


def _problem(root: Path, plan: BatchPlan, i: int) -> str:
    """Why image `i` cannot be shown as planned; empty where it can."""
    verdict = verify_place(plan.place(root, i))
    if isinstance(verdict, str):
        return verdict
    top, left, height, width = plan.views.box_N4[i].tolist()
    fits = top + height <= verdict[0] and left + width <= verdict[1]
    return "" if fits else f"its size is {list(verdict)} now"


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _error(root: Path, plan: BatchPlan, bad: dict[int, str], suspects: Mapping[int, BaseException]) -> DecodeError:
    named = ", ".join(f"{plan.paths[i]} ({why})" for i, why in list(bad.items())[:5])
    one_of = ", ".join(plan.paths[i] for i in suspects)
    what = named or f"one of {one_of} ({_brief(next(iter(suspects.values())))})"
    mend = "go on without such images with --data.on-bad-image skip, or start the run again"
    if len(bad) == len(plan.paths) > 0:
        mend = "nothing else was left of a batch, so look at the storage, then resume the run"
    return DecodeError(f"cannot decode {what} under {root}: files changed since they were checked; {mend}")
