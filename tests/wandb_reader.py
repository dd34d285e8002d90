"""Reads a `.wandb` file back: what a run would upload. W&B has no reader of its own since 0.30."""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FILE_HEADER, _BLOCK, _RECORD = 7, 32 * 1024, struct.Struct("<IHB")


@dataclass
class Stored:
    """One run as stored: `history` holds a dict per step, in order."""

    run_id: str = ""
    project: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def read(run_dir: Path) -> list[Stored]:
    """Every run under RUN_DIR/wandb, oldest first."""
    return [_read(path) for path in sorted((run_dir / "wandb").glob("*run-*/run-*.wandb"))]


def _read(path: Path) -> Stored:
    records: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    stored = Stored()
    for data in _records(path.read_bytes()):
        record = records.Record.FromString(data)
        if record.HasField("run"):
            stored.run_id, stored.project, stored.tags = record.run.run_id, record.run.project, list(record.run.tags)
            stored.config |= _items(record.run.config.update)
        stored.config |= _items(record.config.update)
        stored.summary |= _items(record.summary.update)
        if record.HasField("history"):
            stored.history.append(_items(record.history.item))
    return stored


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log: blocks of 32 KiB, a record may span several (first, middle, last)."""
    at, parts = _FILE_HEADER, b""
    while at + _RECORD.size <= len(data):
        if (left := _BLOCK - at % _BLOCK) < _RECORD.size:
            at += left
            continue
        _, length, kind = _RECORD.unpack_from(data, at)
        parts += data[at + _RECORD.size : at + _RECORD.size + length]
        at += _RECORD.size + length
        if kind in (1, 4):  # full, last
            yield parts
            parts = b""
