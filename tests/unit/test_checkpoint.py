"""Checkpoints: complete, atomic, and no more of them than have a name."""

from __future__ import annotations

import errno
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tldist.checkpoints import checkpoint
from tldist.checkpoints.checkpoint import DamagedCheckpoint, TrainState


def save(folder: Path, epoch: int, names: tuple[str, ...], keep: int = 1) -> None:
    moments = {"head.fc.weight": {"exp_avg": torch.full((2, 3), float(epoch)), "step": torch.tensor(4.0)}}
    state = TrainState(epoch=epoch, step=epoch * 5, optimizer=moments)
    weights = {"fc.weight": torch.full((2, 3), epoch)}
    contents = checkpoint.snapshot(checkpoint.folder_name(epoch), weights, None, state, {"model": "resnet18"})
    checkpoint.save(folder, names, contents, keep=keep)


def value(folder: Path, name: str) -> float:
    return float(safetensors.torch.load_file(folder / name / "model.safetensors")["fc.weight"][0, 0])


def test_names_point_at_what_was_saved(tmp_path: Path) -> None:
    for epoch, names in [(1, ("last", "best")), (2, ("last",)), (3, ("last", "best")), (4, ("last",))]:
        save(tmp_path, epoch, names)
    assert (value(tmp_path, "last"), value(tmp_path, "best")) == (4, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "epoch-0003", "epoch-0004", "last"]
    state = json.loads((tmp_path / "best" / "state.json").read_text())
    assert (state["epoch"], state["step"], state["model"]) == (3, 15, "resnet18")
    moments = safetensors.torch.load_file(tmp_path / "last" / "optimizer.safetensors")
    assert sorted(moments) == ["head.fc.weight/exp_avg", "head.fc.weight/step"]


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for epoch in range(1, 6):
        save(tmp_path, epoch, ("last", "best") if epoch == 2 else ("last",), keep=2)
    assert sorted(p.name for p in tmp_path.glob("epoch-*")) == ["epoch-0002", "epoch-0004", "epoch-0005"]


def test_names_are_in_the_order_of_time() -> None:
    times = [(3, 0), (3, 1), (3, 99), (3, 100), (4, 0), (10, 0), (10, 7), (10, 1_000_000), (12_345, 0), (100_000, 0)]
    names = [checkpoint.folder_name(*at) for at in times]
    assert names == sorted(names, key=checkpoint.order)


def cut_short(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"]


class TestDamage:
    @pytest.mark.parametrize("file", FILES)
    @pytest.mark.parametrize("harm", [cut_short, flip, Path.unlink])
    def test_any_harm_is_seen_and_the_one_before_it_used(
        self, tmp_path: Path, file: str, harm: Callable[[Path], None]
    ) -> None:
        for epoch in (1, 2):
            save(tmp_path, epoch, ("last", "best"), keep=2)
        assert checkpoint.damage(tmp_path / "last") is None
        harm(tmp_path / "epoch-0002" / file)
        assert checkpoint.damage(tmp_path / "last") is not None
        with pytest.raises(DamagedCheckpoint, match="epoch-0002"):
            checkpoint.best(tmp_path)
        found, said = checkpoint.newest(tmp_path)
        assert found == tmp_path / "epoch-0001"
        assert len(said) == 1
        assert "epoch-0002 is damaged" in said[0]
        assert value(tmp_path, "last") == 1
        assert (tmp_path / "damaged-epoch-0002").is_dir()
        assert checkpoint.newest(tmp_path) == (found, [])

    def test_sums_cut_at_a_line(self, tmp_path: Path) -> None:
        save(tmp_path, 1, ("last",))
        sums = tmp_path / "last" / "SHA256SUMS"
        sums.write_text("".join(sums.read_text().splitlines(keepends=True)[:1]))
        assert "does not know" in str(checkpoint.damage(tmp_path / "last"))

    def test_sums_that_are_not_what_was_written(self, tmp_path: Path) -> None:
        """Cut at any length, or any bit of it another: also its last newline, and one that becomes a vertical tab."""
        save(tmp_path, 1, ("last",))
        sums = tmp_path / "last" / "SHA256SUMS"
        whole = sums.read_bytes()
        flips = [bytearray(whole) for _ in range(8 * len(whole))]
        for place, content in enumerate(flips):
            content[place // 8] ^= 1 << place % 8
        for content in (*(whole[:length] for length in range(len(whole))), *flips):
            sums.write_bytes(content)
            assert checkpoint.damage(tmp_path / "last") is not None, content
        sums.write_bytes(whole)
        assert checkpoint.damage(tmp_path / "last") is None

    def test_none_is_whole(self, tmp_path: Path) -> None:
        """No silent start from the beginning, also when asked again."""
        save(tmp_path, 1, ("last",))
        flip(tmp_path / "last" / "state.json")
        for _ in range(2):
            with pytest.raises(DamagedCheckpoint, match="is whole"):
                checkpoint.newest(tmp_path)

    def test_a_disk_that_does_not_answer_has_lost_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for epoch in (1, 2):
            save(tmp_path, epoch, ("last",), keep=2)

        def stale(_: Path) -> str:
            raise OSError(errno.ESTALE, "Stale file handle")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_sha256", stale)
            with pytest.raises(OSError, match="Stale"):
                checkpoint.newest(tmp_path)
        assert checkpoint.newest(tmp_path) == (tmp_path / "epoch-0002", [])

    def test_what_a_killed_process_left_is_swept(self, tmp_path: Path) -> None:
        save(tmp_path, 1, ("last",))
        for left in (".draft-77", ".old-epoch-0001"):
            (tmp_path / left).mkdir()
            (tmp_path / left / "part").write_text("x")
        save(tmp_path, 2, ("last",))
        checkpoint.newest(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch-0002", "last"]

    def test_nothing_there(self, tmp_path: Path) -> None:
        assert checkpoint.newest(tmp_path / "checkpoints") == (None, [])

    def test_sha256sum_reads_the_sums(self, tmp_path: Path) -> None:
        save(tmp_path, 1, ("last",))
        told = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "last", capture_output=True, text=True)
        assert told.returncode == 0
        assert told.stdout.count("OK") == 3


def test_the_best_gets_its_name_back(tmp_path: Path) -> None:
    """Killed when the checkpoint of a new best epoch was written and not yet named."""
    save(tmp_path, 1, ("last", "best"), keep=2)
    contents = checkpoint.snapshot("epoch-0002", {}, None, TrainState(epoch=2, best_epoch=2), {})
    checkpoint.save(tmp_path, (), contents, keep=2)
    assert checkpoint.newest(tmp_path) == (tmp_path / "epoch-0002", [])
    assert {name: (tmp_path / name).resolve().name for name in ("last", "best")} == dict.fromkeys(
        ("last", "best"), "epoch-0002"
    )


@pytest.mark.parametrize("call", ["safetensors.torch.save_file", "os.fsync", "pathlib.Path.symlink_to"])
def test_a_save_that_dies_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    save(tmp_path, 1, ("last", "best"))

    def die(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(call, die)
        for _ in range(3):  # the saver tries again
            with pytest.raises(OSError, match="no space"):
                save(tmp_path, 2, ("last", "best"))
    assert (value(tmp_path, "last"), value(tmp_path, "best")) == (1, 1)
    save(tmp_path, 2, ("last", "best"))
    assert (value(tmp_path, "last"), value(tmp_path, "best")) == (2, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "epoch-0002", "last"]
