"""Reads W&B's own files back: what a run has stored under RUN_DIR/wandb, to go on with or to upload.

A `.wandb` file is a header of 7 bytes and a LevelDB log of protobuf records. W&B has no reader of its own since 0.30.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_FILE_HEADER, _BLOCK, _RECORD = 7, 32 * 1024, struct.Struct("<IHB")
UNSENT = "unsent"
"""Lies in the folder of an online run until all of it is uploaded."""


@dataclass
class Stored:
    """One process' part of a run."""

    run_id: str = ""
    project: str = ""
    group: str = ""
    tags: list[str] = field(default_factory=list)
    config: Row = field(default_factory=dict)
    summary: Row = field(default_factory=dict)
    history: list[Row] = field(default_factory=list)
    """One row per W&B step, in order."""
    alerts: list[tuple[str, str, str]] = field(default_factory=list)
    """(level, title, text)."""
    artifacts: list[tuple[str, list[str], list[str]]] = field(default_factory=list)
    """(name, aliases, files)."""
    logs: str = ""
    preempting: bool = False
    exit_code: int | None = None
    """None where the file was cut off."""


def parts(run_dir: Path) -> list[Path]:
    """The files of every process that wrote to this run, oldest first."""
    found = (run_dir / "wandb").glob("*run-*/run-*.wandb")
    return sorted(found, key=lambda path: path.parent.name.partition("run-")[2])


def unsent(run_dir: Path) -> list[Path]:
    """Folders of what no server has: kept offline and not uploaded since, or cut off while it was uploaded.

    What was kept offline before a later process went on online is left out: that one uploaded it from metrics.jsonl.
    """
    folders = [file.parent for file in parts(run_dir)]
    online = [i for i, folder in enumerate(folders) if not folder.name.startswith("offline-")]
    offline = folders[online[-1] + 1 :] if online else folders
    left = [folder for folder in offline if not list(folder.glob("*.wandb.synced"))]
    return [*(folders[i] for i in online if (folders[i] / UNSENT).exists()), *left]


def read(path: Path) -> Stored:
    """One file, up to where it was cut off."""
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    stored = Stored()
    for data in _records(path.read_bytes()):
        _take(stored, messages.Record.FromString(data))
    return stored


def _take(stored: Stored, record: Any) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        run = record.run
        stored.run_id, stored.project, stored.group, stored.tags = (
            run.run_id,
            run.project,
            run.run_group,
            list(run.tags),
        )
        stored.config |= _items(run.config.update)
    elif kind == "history":
        stored.history.append(_items(record.history.item))
    elif kind == "alert":
        stored.alerts.append((record.alert.level, record.alert.title, record.alert.text))
    elif kind == "artifact":
        files = [entry.path for entry in record.artifact.manifest.contents]
        stored.artifacts.append((record.artifact.name, sorted(record.artifact.aliases), files))
    elif kind == "output_logger":
        stored.logs += record.output_logger.line
    elif kind == "preempting":
        stored.preempting = True
    elif kind == "exit":
        stored.exit_code = record.exit.exit_code
    elif kind in ("config", "summary"):
        into = stored.config if kind == "config" else stored.summary
        into |= _items(getattr(record, kind).update)


def _items(items: Any) -> Row:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log: blocks of 32 KiB, a record may span several (first, middle, last)."""
    at, gathered = _FILE_HEADER, b""
    while at + _RECORD.size <= len(data):
        if (left := _BLOCK - at % _BLOCK) < _RECORD.size:
            at += left
            continue
        _, length, kind = _RECORD.unpack_from(data, at)
        at += _RECORD.size + length
        if at > len(data):  # the writer was killed here
            return
        gathered += data[at - length : at]
        if kind in (1, 4):  # full, last
            yield gathered
            gathered = b""


def histories(run_dir: Path, run_id: str) -> list[Row]:
    """The history of all parts of one run; empty where their format is not the one known here."""
    rows: list[Row] = []
    with contextlib.suppress(Exception):
        for path in parts(run_dir):
            stored = read(path)
            rows += stored.history if stored.run_id == run_id else []
    return rows
