"""The feature cache: exact means equal in every bit, views mean the views of the epochs, and nothing is left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tldist import config
from tldist.config import (
    CacheConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    StrategyConfig,
    TrackingConfig,
    TrainConfig,
    UserError,
)
from tldist.data.batches import Worker, fill_batches, train_ids
from tldist.data.presets import PRESETS, AugmentSpec
from tldist.data.source.index import build_index
from tldist.rules import validate
from tldist.train import worker
from tldist.train.inputs import features, inputs
from tldist.train.inputs.features import Features, FeatureWriter, Layout

CPU = torch.device("cpu")


def settings(photos: Path, run_dir: Path, features: str = "exact", augment: Any = "none", **sections: Any) -> RunConfig:
    made = RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(weights="none"),
        strategy=StrategyConfig(name="feature_extraction"),
        data=DataConfig(root=str(photos), batch_size=8, image_size=32, augment=augment, threads=1),
        optim=OptimConfig(base_lr=1e-2),
        train=TrainConfig(epochs=3, precision="fp32"),
        cache=CacheConfig(features=features),
        tracking=TrackingConfig(wandb="disabled", log_every=1),
    )
    return replace(made, **sections)


def train(made: RunConfig) -> dict[str, Any]:
    Path(made.run_dir).mkdir()
    return worker.run(config.to_json(made))


def rows(made: RunConfig, event: str) -> list[dict[str, Any]]:
    lines = (Path(made.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


def notices(made: RunConfig) -> str:
    return "\n".join(row["text"] for row in rows(made, "notice"))


def weights(made: RunConfig) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(made.run_dir) / "checkpoints" / "last" / "model.safetensors")


def same_run(one: RunConfig, other: RunConfig) -> None:
    assert [r["loss"] for r in rows(one, "train")] == [r["loss"] for r in rows(other, "train")]
    assert [r["val_loss"] for r in rows(one, "eval")] == [r["val_loss"] for r in rows(other, "eval")]
    for name, value in weights(one).items():
        assert torch.equal(value, weights(other)[name]), name


@pytest.mark.parametrize("strategy", ["feature_extraction", "partial", "two_phase"])
def test_exact_is_bit_for_bit_the_uncached_run(photos: Path, tmp_path: Path, strategy: str) -> None:
    """Losses, validation losses and all weights, over three epochs; batches, order and images as without a cache."""
    section = {"strategy": StrategyConfig(name=strategy)}  # type: ignore[arg-type]
    off = settings(photos, tmp_path / "off", "off", **section)
    exact = settings(photos, tmp_path / "exact", "exact", **section)
    train(off)
    summary = train(exact)
    same_run(off, exact)
    assert summary["per_phase"][0]["cache_fill_s"] > 0
    assert "features of 59 images kept (exact)" in notices(exact)
    assert not (tmp_path / "exact" / "features").exists(), "the cut moved or the run ended"


def test_neither_decoding_nor_the_prefix_runs_once_the_cache_is_full(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefix sees each image once; what a step is said to cost is the head's arithmetic alone."""
    seen: list[int] = []
    encode = inputs.ImageInputs.encode

    def counting(self: inputs.ImageInputs, x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return encode(self, x)

    monkeypatch.setattr(inputs.ImageInputs, "encode", counting)
    summary = train(settings(photos, tmp_path / "run"))
    assert sum(seen) == 40 + 19
    # Forward and the weight's gradient: 2 * 512 * 2 each.
    assert summary["per_phase"][0]["gflops_per_image"] == pytest.approx(2 * 2 * 512 * 2 / 1e9, rel=1e-3)


def test_enough_views_are_the_uncached_augmented_run(photos: Path, tmp_path: Path) -> None:
    """Three views for three epochs: nothing is approximated. Two views: the third epoch shows the first again."""
    off = settings(photos, tmp_path / "off", "off", augment="lecture")
    three = settings(photos, tmp_path / "three", "views:3", augment="lecture")
    two = settings(photos, tmp_path / "two", "views:2", augment="lecture")
    for made in (off, three, two):
        train(made)
    same_run(off, three)
    losses = [[r["loss"] for r in rows(made, "train")] for made in (off, two)]
    assert losses[0][:10] == losses[1][:10]
    assert losses[0][10:] != losses[1][10:]
    assert "3 augmented views, an approximation" in notices(three)


def test_the_decision_is_told_when_features_do_not_fit(photos: Path, tmp_path: Path) -> None:
    small = settings(photos, tmp_path / "run", cache=CacheConfig(features="exact", gib=1e-6))
    off = settings(photos, tmp_path / "off", "off")
    train(small)
    train(off)
    assert "there is no room (0.00 GiB allowed" in notices(small)
    assert "raise --cache.gib" in notices(small)
    same_run(small, off)


def test_a_full_disk_is_found_before_anything_is_computed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    made = settings(photos, tmp_path / "run")
    summary = train(made)
    assert summary["epochs"] == 3
    assert "No space left on device" in notices(made)
    assert not list((tmp_path / "run" / "features").glob("*"))


def test_nothing_frozen_nothing_kept(photos: Path, tmp_path: Path) -> None:
    made = settings(photos, tmp_path / "run", strategy=StrategyConfig(name="full"))
    train(made)
    assert "nothing is frozen" in notices(made)


def test_a_folder_of_the_users_serves_later_runs_that_compute_the_same(photos: Path, tmp_path: Path) -> None:
    """Another seed has another head and order, but the same features; another size or model does not."""
    cache = CacheConfig(features="exact", dir=str(tmp_path / "kept"))
    runs = {
        "first": settings(photos, tmp_path / "first", cache=cache),
        "again": replace(settings(photos, tmp_path / "again", cache=cache), seed=1),
    }
    for made in runs.values():
        # Without weights, a seed would change the trunk.
        path = tmp_path / "source.safetensors"
        if not path.exists():
            from tldist.models import backbones

            safetensors.torch.save_file(backbones.build(made.model, 5, 32, 0).torchvision_state(), path)
        train(replace(made, model=replace(made.model, weights=str(path))))
    (key,) = [p for p in (tmp_path / "kept").iterdir() if p.is_dir()]
    assert features.is_complete(key)
    first, again = (rows(made, "phase")[0]["cache_fill_s"] for made in runs.values())
    assert again < first / 2
    other = settings(photos, tmp_path / "other", cache=cache)
    train(replace(other, data=replace(other.data, image_size=48)))
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_manifold_mixup_mixes_at_the_cut(photos: Path, tmp_path: Path) -> None:
    """Cached and uncached runs mix alike; without mixing the losses are others."""
    mixed = DataConfig(
        root=str(photos), batch_size=8, image_size=32, augment="none", threads=1, mixup=0.4, mix_at="cut"
    )
    off = settings(photos, tmp_path / "off", "off", data=mixed)
    cached = settings(photos, tmp_path / "cached", data=mixed)
    plain = settings(photos, tmp_path / "plain")
    for made in (off, cached, plain):
        train(made)
    same_run(off, cached)
    assert [r["loss"] for r in rows(plain, "train")] != [r["loss"] for r in rows(cached, "train")]


@pytest.mark.parametrize(
    ("cache", "data", "says"),
    [
        ("exact", {"augment": "basic"}, "needs the same picture in every epoch"),
        ("exact", {"augment": "none", "mixup": 0.2}, "--data.mix-at cut"),
        ("views:3", {"cutmix": 1.0}, "--data.mix-at cut"),
        ("views:0", {}, "give off, exact or views:K"),
        ("all", {}, "give off, exact or views:K"),
        ("off", {"mix_at": "cut", "cutmix": 1.0}, "CutMix pastes boxes of pixels"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_the_reason(cache: str, data: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        validate(RunConfig(cache=CacheConfig(features=cache), data=DataConfig(**data)))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 5)])
def test_rows_come_back_from_any_number_of_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int, resident: bool, shape: tuple[int, ...]
) -> None:
    """bf16, two views, ten images, in an order of their own; 4-d rows in channels_last memory."""
    layout = Layout(10, 2, shape, "bfloat16", shards)
    stored = torch.randn(2, 10, *shape).bfloat16()
    for shard in range(shards):
        monkeypatch.setattr("tldist.dist.rank", lambda shard=shard: shard)
        writer = FeatureWriter(tmp_path, "train", layout)
        mine = torch.arange(shard, 10, shards)
        for view in range(2):
            given = stored[view][mine]
            writer.write(view, mine.numpy(), given.permute(0, 3, 1, 2) if len(shape) == 3 else given)
    if not resident:
        monkeypatch.setattr("tldist.train.inputs.features.RESIDENT_BYTES", 0)
    kept = Features(tmp_path, "train", layout, CPU)
    assert kept.resident == resident
    ids = torch.tensor([7, 0, 9, 3])
    for view in range(2):
        found, expected = kept.rows(view, ids), stored[view][ids]
        if len(shape) == 3:
            assert found.is_contiguous(memory_format=torch.channels_last)
            found = found.permute(0, 2, 3, 1)
        assert torch.equal(found, expected)


def test_large_features_are_read_ahead_from_disk(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    off = settings(photos, tmp_path / "off", "off", strategy=StrategyConfig(name="partial"))
    train(off)
    monkeypatch.setattr("tldist.train.inputs.features.RESIDENT_BYTES", 0)
    disk = settings(photos, tmp_path / "disk", strategy=StrategyConfig(name="partial"))
    train(disk)
    same_run(off, disk)


def test_fill_batches_cover_a_split_in_batches_of_one_size(photos: Path) -> None:
    split = build_index(photos).train
    for world in (1, 3):
        seen = []
        for rank in range(world):
            plans = list(fill_batches(split, AugmentSpec(), 32, 7, 0, 0, Worker(rank, world)))
            assert {len(plan.ids_N) for plan in plans} == {7}
            assert all(i % world == rank for plan in plans for i in plan.ids_N)
            seen += [i for plan in plans for i in plan.ids_N]
        assert set(seen) == set(range(40))


def test_a_fill_shows_the_views_of_its_epoch(photos: Path) -> None:
    split, spec = build_index(photos).train, PRESETS["lecture"]
    (filled,) = fill_batches(split, spec, 32, 40, 0, 2, Worker(0, 1))
    from tldist.data.batches import train_batches

    (trained,) = train_batches(split, spec, 32, 40, 0, 2, Worker(0, 1))
    for position, image in enumerate(trained.ids_N):
        assert (trained.views.box_N4[position] == filled.views.box_N4[list(filled.ids_N).index(image)]).all()
    (ids,) = train_ids(split, 40, 0, 2, Worker(0, 1))
    assert (ids == trained.ids_N).all()


def test_a_fill_that_fails_leaves_nothing(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a photo vanished")

    monkeypatch.setattr(FeatureWriter, "write", fail)
    made = settings(photos, tmp_path / "run", cache=CacheConfig(features="exact", dir=str(tmp_path / "kept")))
    with pytest.raises(RuntimeError, match="vanished"):
        train(made)
    assert not list((tmp_path / "kept").iterdir())
