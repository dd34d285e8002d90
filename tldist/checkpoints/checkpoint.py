"""What a run leaves on disk: weights under torchvision's names, optimizer state by name, and where it stood.

Any engine on any number of workers reads it. A folder `checkpoints/epoch-0003` is what stood after three epochs,
`epoch-0003-step-000017` what stood 17 steps later; `last` and `best` are links to such folders. SHA256SUMS tells a
whole folder from a damaged one (`sha256sum -c` reads it too).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from tldist.config import UserError
from tldist.optim import OptimizerState


@dataclass
class Plateau:
    """How long a figure has not risen."""

    best: float = -1.0
    stale: int = 0
    """Looks since the best."""

    def look(self, value: float, min_delta: float) -> None:
        """Only a rise by more than `min_delta` counts."""
        if value > self.best + min_delta:
            self.best, self.stale = value, 0
        else:
            self.stale += 1


@dataclass
class TrainState:
    """All that is not a pure function of the step: the rest of a run follows from the config and these."""

    epoch: int = 0
    """Epochs finished."""
    step: int = 0
    """Optimizer steps finished, those of an unfinished epoch too: they tell the position in it."""
    val_top1: float = 0.0
    best_val_top1: float = -1.0
    best_epoch: int = 0
    phase: int = 0
    """The phase that runs, and the epoch at which it began."""
    phase_epoch: int = 0
    phase_plateau: Plateau = field(default_factory=Plateau)
    """Validation since the phase began, and since the run began."""
    run_plateau: Plateau = field(default_factory=Plateau)
    optimizer: OptimizerState = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    """The moving average of what trains, by parameter and buffer name; empty without --train.ema."""
    objective: dict[str, Tensor] = field(default_factory=dict)
    """Parameters that the objective itself trains (a discriminator), by name; most have none."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """fp16's loss scale; empty otherwise."""
    workers: dict[str, Tensor] = field(default_factory=dict)
    """Inside an epoch, one row for each worker: what each of them has alone (see LivePhase.own)."""
    skipped_steps: int = 0
    """Steps left out because their gradients were not finite."""
    seconds: float = 0.0
    """Spent in the loop until this epoch's end, and until the best epoch's."""
    seconds_to_best: float = 0.0


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint's contents, out of reach of further training in its phase."""

    name: str
    tensors: dict[str, dict[str, Tensor]]
    """File -> its tensors."""
    texts: dict[str, str]
    """File -> what it says."""

    def apart(self) -> Snapshot:
        """With copies of the tensors that it only refers to, too."""
        copies = {file: {name: t.clone() for name, t in named.items()} for file, named in self.tensors.items()}
        return dataclasses.replace(self, tensors=copies)


def folder_name(epoch: int, position: int = 0) -> str:
    """Of the checkpoint `position` steps after `epoch` epochs."""
    return f"epoch-{epoch:04d}" + (f"-step-{position:06d}" if position else "")


def order(name: str) -> tuple[int, ...]:
    """By time: (epoch,) or (epoch, position)."""
    return tuple(map(int, re.findall(r"\d+", name)))


def _in_order(folder: Path) -> list[Path]:
    return sorted(folder.glob("epoch-*"), key=lambda path: order(path.name))


def snapshot(
    name: str,
    model: dict[str, Tensor],
    live: dict[str, Tensor] | None,
    state: TrainState,
    extra: dict[str, Any],
    fixed: Container[str] = (),
) -> Snapshot:
    """Copy what a checkpoint holds; tensors of `model` named in `fixed` do not change and are only referred to.

    model.safetensors: what is evaluated, under torchvision's names; live.safetensors: what trains on, where that is
    another (a moving average is evaluated); optimizer.safetensors: `parameter/key`; workers.safetensors: what each
    worker has alone, inside an epoch; objective.safetensors: what the objective itself trains; state.json: the rest.
    """
    moments = {f"{name}/{key}": t for name, tensors in state.optimizer.items() for key, t in tensors.items()}
    files = {"model": model, "optimizer": moments}
    more = {"live": live, "workers": state.workers, "objective": state.objective}
    files |= {file: named for file, named in more.items() if named}
    scalars = dataclasses.asdict(dataclasses.replace(state, **{name: {} for name in _TENSORS}))
    for own in _TENSORS:
        del scalars[own]
    tensors = {
        f"{file}.safetensors": {
            name: t.detach().cpu() if name in fixed else t.detach().to("cpu", copy=True) for name, t in named.items()
        }
        for file, named in files.items()
    }
    return Snapshot(name, tensors, {"state.json": json.dumps({**extra, **scalars}, indent=1)})


_TENSORS = ("optimizer", "average", "workers", "objective")


def save(folder: Path, names: Sequence[str], contents: Snapshot, keep: int) -> None:
    """Write one checkpoint, point `folder/NAME` at it for each name, and remove all but the last `keep` and the named.

    It is written under another name and renamed when it is whole and on the disk; a name is a link that is replaced
    in one step. So a reader sees the old checkpoint or the new one, whenever the process dies. Raises OSError, and
    leaves no part of it, where the disk is full.
    """
    draft, whole = folder / f".draft-{os.getpid()}", folder / contents.name
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        _write(draft, contents)
        if whole.exists():  # saved twice, or damaged
            _set_aside(whole)
        draft.rename(whole)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    point(folder, names, whole.name, keep)


def _write(folder: Path, contents: Snapshot) -> None:
    for file, tensors in contents.tensors.items():
        safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, folder / file)
    for file, text in contents.texts.items():
        (folder / file).write_text(text)
    sums = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    for path in (*folder.iterdir(), folder):
        _sync(path)


SUMS = "SHA256SUMS"
ADDED = ("fisher.safetensors",)
"""Files that a whole checkpoint may gain later; one that SHA256SUMS does not know was not finished."""


def add(checkpoint: Path, name: str, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write one of `ADDED` beside the weights, `about` in its header, and then its checksum, each in one step."""
    draft = checkpoint.parent / f".draft-{os.getpid()}-{name}"
    try:
        safetensors.torch.save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, draft, about)
        _sync(draft)
        digest = _sha256(draft)
        draft.replace(checkpoint / name)
        lines = [line for line in (checkpoint / SUMS).read_text().splitlines() if line.split("  ", 1)[1] != name]
        draft.write_text("".join(f"{line}\n" for line in sorted([*lines, f"{digest}  {name}"], key=_named)))
        _sync(draft)
        draft.replace(checkpoint / SUMS)
        _sync(checkpoint)
    finally:
        draft.unlink(missing_ok=True)


def _named(line: str) -> str:
    return line.split("  ", 1)[1]


def read_added(checkpoint: Path, name: str) -> dict[str, Tensor] | None:
    """What `add` wrote under this name; None where it did not come to an end."""
    known = {_named(line) for line in (checkpoint / SUMS).read_text().splitlines()}
    return safetensors.torch.load_file(checkpoint / name) if name in known else None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None where every file is as it was written.

    Raises OSError where that cannot be told: a disk that does not answer has not lost anything yet.
    """
    try:
        *lines, rest = (checkpoint / SUMS).read_bytes().decode().split("\n")  # splitlines() also takes other characters
        if rest:
            return f"{SUMS} was cut short"
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        for path in sorted(checkpoint.iterdir()):
            if path.name not in (SUMS, *ADDED) and path.name not in sums:
                return f"{SUMS} does not know {path.name}"
        for name, digest in sums.items():
            if _sha256(checkpoint / name) != digest:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except ValueError:
        return f"{SUMS} is not what was written"
    return None if {"state.json", "model.safetensors"} <= sums.keys() else f"{SUMS} was cut short"


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint (None: there is none at all) and a sentence on each damaged one that is newer.

    A damaged one is set aside under another name, so that it is never taken for the newest again. Raises
    DamagedCheckpoint where none is whole.
    """
    said: list[str] = []
    for left in (*folder.glob(".draft-*"), *folder.glob(".old-*")):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    for found in reversed(_in_order(folder)):
        reason = damage(found)
        if reason is None:
            if (folder / "last").resolve() != found.resolve():
                point(folder, ["last"], found.name)
            _name_the_best(folder, found)
            return found, said
        said.append(f"the checkpoint {found.name} is damaged: {reason}")
        aside = folder / f"damaged-{found.name}"
        shutil.rmtree(aside, ignore_errors=True)
        found.rename(aside)
    if said or list(folder.glob("damaged-*")):
        raise DamagedCheckpoint(
            f"no checkpoint in {folder} is whole, {'; '.join(said) or 'see damaged-*'}: start a new run"
        )
    return None, []


def _name_the_best(folder: Path, found: Path) -> None:
    """The process may have been killed between a checkpoint's writing and its naming."""
    name = folder_name(json.loads((found / "state.json").read_text())["best_epoch"])
    if (folder / name).is_dir() and (folder / "best").resolve().name != name:
        point(folder, ["best"], name)


class DamagedCheckpoint(UserError):  # noqa: N818 - it states a fact of the disk
    """A checkpoint that is needed is not what was written."""


def best(folder: Path) -> Path:
    """The checkpoint of the best epoch. Raises DamagedCheckpoint."""
    found = (folder / "best").resolve()
    reason = damage(found)
    if reason is not None:
        raise DamagedCheckpoint(f"the checkpoint of the best epoch, {found}, is damaged: {reason}")
    return found


def point(folder: Path, names: Sequence[str], target: str, keep: int = 0) -> None:
    """Let each name lead to `folder/target`, in one step; with `keep`, remove older checkpoints that have no name."""
    for name in names:
        link = folder / f".{name}"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        link.replace(folder / name)
    _sync(folder)
    if keep:
        _remove_older(folder, keep)


def digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of each file of a whole checkpoint."""
    lines = (checkpoint / SUMS).read_text().splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """What was evaluated, under torchvision's names."""
    return safetensors.torch.load_file(checkpoint / "model.safetensors")


def read_live(checkpoint: Path) -> dict[str, Tensor]:
    """What trains on, under torchvision's names: what was evaluated, unless that was an average."""
    live = checkpoint / "live.safetensors"
    return safetensors.torch.load_file(live) if live.exists() else read_weights(checkpoint)


def read_state(checkpoint: Path) -> tuple[TrainState, dict[str, Any]]:
    """Where a run stood, without its average, and what else was told there (the model's description, ...)."""
    told = json.loads((checkpoint / "state.json").read_text())
    own = {f.name: told.pop(f.name) for f in dataclasses.fields(TrainState) if f.name in told}
    own |= {name: Plateau(**own[name]) for name in ("phase_plateau", "run_plateau")}
    rows, objective = _read(checkpoint / "workers.safetensors"), read_objective(checkpoint)
    return TrainState(**own, optimizer=read_optimizer(checkpoint), workers=rows, objective=objective), told


def read_objective(checkpoint: Path) -> dict[str, Tensor]:
    """What the objective itself trained, by name."""
    return _read(checkpoint / "objective.safetensors")


def _read(file: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(file) if file.exists() else {}


def read_optimizer(checkpoint: Path) -> OptimizerState:
    """The optimizer's state by parameter name."""
    found: OptimizerState = {}
    for place, tensor in safetensors.torch.load_file(checkpoint / "optimizer.safetensors").items():
        name, _, key = place.rpartition("/")
        found.setdefault(name, {})[key] = tensor.clone()  # out of the file, which may be removed while training goes on
    return found


def _remove_older(folder: Path, keep: int) -> None:
    named = {path.resolve().name for path in folder.iterdir() if path.is_symlink()}
    for path in _in_order(folder)[:-keep]:
        if path.name not in named:
            with contextlib.suppress(OSError):
                _set_aside(path)
    for old in folder.glob(".old-*"):
        shutil.rmtree(old, ignore_errors=True)


def _set_aside(path: Path) -> None:
    """Under a name that is no checkpoint's, to be removed: a kill halfway must not leave half of one."""
    old = path.with_name(f".old-{path.name}")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Onto the disk: a file's bytes, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
