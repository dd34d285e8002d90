"""What the loop adds to a step: accumulation, averages, anchors, plateaus, and weights that come back."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from tldist import config
from tldist.checkpoints import checkpoint
from tldist.checkpoints.checkpoint import Plateau, TrainState
from tldist.checkpoints.saver import NotWritten, Saver
from tldist.config import DataConfig, ModelConfig, OptimConfig, RunConfig, StrategyConfig, TrackingConfig, TrainConfig
from tldist.models import backbones
from tldist.models.backbones import Segment
from tldist.models.batchnorm import set_modes
from tldist.objectives.anchor import AnchorPenalty, Pull
from tldist.plans import Phase, build_plan
from tldist.train import fit, phase, worker
from tldist.train.evaluate import Evaluation
from tldist.train.phase import WeightAverage, freeze


def settings(photos: Path, run_dir: Path, **sections: Any) -> RunConfig:
    base = RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(weights="none"),
        strategy=StrategyConfig(name="full"),
        data=DataConfig(root=str(photos), batch_size=8, image_size=32, augment="none", threads=1),
        optim=OptimConfig(name="sgd", base_lr=5e-3),
        train=TrainConfig(epochs=2, precision="fp32", batchnorm="eval"),
        tracking=TrackingConfig(wandb="disabled", log_every=1),
    )
    return replace(base, **sections)


def train(made: RunConfig) -> dict[str, Any]:
    Path(made.run_dir).mkdir()
    return worker.run(config.to_json(made))


def rows(made: RunConfig, event: str) -> list[dict[str, Any]]:
    lines = (Path(made.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


def weights(made: RunConfig, which: str = "last", file: str = "model") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(made.run_dir) / "checkpoints" / which / f"{file}.safetensors")


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


@pytest.mark.parametrize("parts", [3, 8])
def test_accumulation_equals_the_large_batch(photos: Path, tmp_path: Path, parts: int) -> None:
    """fp32, ten steps, mixed images: every weight within 1e-5; eight images in three parts are 3, 3 and 2."""
    one = settings(photos, tmp_path / "one")
    one = replace(one, data=replace(one.data, mixup=0.4))
    many = replace(one, run_dir=str(tmp_path / "many"), train=replace(one.train, accumulate=parts))
    train(one)
    train(many)
    start = backbones.build(one.model, 2, 32, 0).torchvision_state()
    assert furthest(weights(one), start) > 1e-3
    assert furthest(weights(one), weights(many)) < 1e-5
    losses = [[r["loss"] for r in rows(made, "train")] for made in (one, many)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_accumulation_mixes_at_the_cut_as_the_large_batch(photos: Path, tmp_path: Path) -> None:
    one = settings(photos, tmp_path / "one", strategy=StrategyConfig(name="partial"))
    one = replace(one, data=replace(one.data, mixup=0.4, mix_at="cut"))
    many = replace(one, run_dir=str(tmp_path / "many"), train=replace(one.train, accumulate=4))
    train(one)
    train(many)
    assert furthest(weights(one), weights(many)) < 1e-5


class TestAverage:
    def test_it_is_the_average_that_is_written_down(self) -> None:
        """EMA by hand in double precision over 20 steps, warm-up of the decay included; statistics too."""
        network = Segment({"head": nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))}).double()
        average = WeightAverage(network, 0.9, {})
        expected = {name: t.clone() for name, t in network.state_dict().items()}
        for step in range(20):
            with torch.no_grad():
                for p in network.parameters():
                    p += torch.randn_like(p)
            network(torch.randn(8, 4).double())
            average.update(network, step)
            decay = min(0.9, (1 + step) / (10 + step))
            for name, t in network.state_dict().items():
                if t.is_floating_point():
                    expected[name] = decay * expected[name] + (1 - decay) * t
        for name, t in average.state().items():
            if t.is_floating_point():
                torch.testing.assert_close(t, expected[name], rtol=1e-12, atol=1e-12)
        assert not torch.equal(average.state()["head.0.weight"], network.state_dict()["head.0.weight"])

    def test_a_longer_suffix_takes_over_what_was_averaged(self) -> None:
        head = Segment({"head": nn.Linear(4, 2)})
        both = Segment({"layer4": nn.Linear(4, 4), "head": head.stages["head"]})
        average = WeightAverage(head, 0.9, {})
        with torch.no_grad():
            head.stages["head"].weight.fill_(3.0)  # type: ignore[union-attr]
        average.update(head, 0)
        longer = WeightAverage(both, 0.9, average.state())
        assert torch.equal(longer.state()["head.weight"], average.state()["head.weight"])
        assert torch.equal(longer.state()["layer4.weight"], both.state_dict()["layer4.weight"])

    def test_a_run_evaluates_and_saves_the_average(self, photos: Path, tmp_path: Path) -> None:
        """model.safetensors predicts what was counted; live.safetensors is what an unaveraged run ends with."""
        plain = settings(photos, tmp_path / "plain", strategy=StrategyConfig(name="gradual"))
        averaged = replace(plain, run_dir=str(tmp_path / "averaged"), train=replace(plain.train, ema=0.99))
        train(plain)
        train(averaged)
        assert furthest(weights(averaged, file="live"), weights(plain)) == 0
        assert furthest(weights(averaged), weights(plain)) > 1e-4
        frozen = [name for name in weights(plain) if name.startswith(("conv1", "layer1"))]
        assert frozen
        assert all(torch.equal(weights(averaged)[name], weights(plain)[name]) for name in frozen)
        ends = [[r["val_loss"] for r in rows(made, "eval")] for made in (plain, averaged)]
        assert ends[0] != ends[1]


class TestAnchor:
    def test_value_and_gradient_are_autograds(self) -> None:
        parameters = {name: nn.Parameter(torch.randn(3, 5).double()) for name in "ab"}
        anchors = {name: torch.randn(3, 5).double() for name in "ab"}
        value = AnchorPenalty(parameters, Pull(0.3, anchors))()
        expected = sum((0.15 * (p - anchors[n]).square().sum() for n, p in parameters.items()), torch.zeros(()))
        torch.testing.assert_close(value, expected.float())
        ours = torch.autograd.grad(2 * value, list(parameters.values()))
        theirs = torch.autograd.grad(2 * expected, list(parameters.values()))
        torch.testing.assert_close(ours, theirs)

    def test_a_run_stays_nearer_to_its_source(self, photos: Path, tmp_path: Path) -> None:
        source = tmp_path / "source.safetensors"
        start = backbones.build(ModelConfig(weights="none"), 5, 32, 1).torchvision_state()
        safetensors.torch.save_file(start, source)
        made = settings(photos, tmp_path / "free", model=ModelConfig(weights=str(source)))
        held = replace(made, run_dir=str(tmp_path / "held"), optim=replace(made.optim, l2_sp=5.0))
        train(made)
        train(held)

        def distance(run: RunConfig) -> float:
            names = [n for n, t in start.items() if t.ndim > 1 and not n.startswith("fc.")]
            return sum((weights(run)[n] - start[n]).square().sum().item() for n in names) ** 0.5

        assert 0 < distance(held) < 0.75 * distance(made)


def scores(monkeypatch: pytest.MonkeyPatch, tops: list[float]) -> None:
    """Let validation say these top-1 figures, one an epoch (of 100 images)."""
    told = iter(tops)

    def evaluation(*_: object) -> Evaluation:
        right = round(100 * next(told))
        labels = torch.zeros(100, dtype=torch.long)
        predicted = (torch.arange(100) >= right).long()
        return Evaluation(torch.arange(100), labels, predicted, torch.ones(100), torch.ones(100))

    monkeypatch.setattr(fit, "evaluate_model", evaluation)
    monkeypatch.setattr("tldist.train.resume.predictions", lambda *_: {"classes": [], "samples": []})


def test_gradual_on_a_plateau_unfreezes_when_validation_stands_still(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """patience 2, min_delta 0.01: rises of 0.005 do not count; each phase begins to count anew."""
    scores(monkeypatch, [0.50, 0.60, 0.605, 0.609, 0.59, 0.58, 0.57, 0.70, 0.71, 0.70])
    made = settings(
        photos,
        tmp_path / "run",
        strategy=StrategyConfig(name="gradual", unfreeze="plateau", patience=2),
        train=TrainConfig(epochs=10, precision="fp32", min_delta=0.01),
    )
    summary = train(made)
    assert [(r["epoch"], r["name"]) for r in rows(made, "phase")] == [(0, "head"), (4, "+layer4"), (7, "+layer3")]
    assert [phase["epochs"] for phase in summary["per_phase"]] == [4, 3, 3]
    assert summary["epochs"] == 10
    assert summary["phases"] == 3
    rates = [r["lr"]["head"] for r in rows(made, "train")]
    assert rates[20] < rates[19], "a warm-up begins with the phase"


def test_early_stopping_ends_and_brings_the_best_weights_back(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores(monkeypatch, [0.50, 0.70, 0.60, 0.69, 0.9])
    made = settings(photos, tmp_path / "run", train=TrainConfig(epochs=9, precision="fp32", early_stop=2))
    summary = train(made)
    assert (summary["epochs"], summary["best_epoch"], summary["restored_epoch"]) == (4, 2, 2)
    assert summary["val_top1"] == summary["best_val_top1"] == 0.7
    assert "weights of epoch 2" in rows(made, "notice")[-1]["text"]
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "last").resolve() == (folder / "best").resolve()
    assert (folder / "last").resolve().name == "epoch-0002"
    two = settings(photos, tmp_path / "two", train=TrainConfig(epochs=9, precision="fp32"))
    monkeypatch.setattr(fit, "is_over", lambda _, state: state.epoch >= 2)
    scores(monkeypatch, [0.50, 0.70])
    train(two)
    assert furthest(weights(made), weights(two)) == 0


@pytest.mark.parametrize("start", ["best", "last"])
def test_the_second_phase_starts_from_the_best_or_the_last(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    """Lecture 8.1, either way, moments included."""
    scores(monkeypatch, [0.5, 0.9, 0.6, 0.7])
    begun: dict[str, torch.Tensor] = {}
    carried: list[torch.Tensor] = []
    real = phase.begin_phase

    def watching(run: Any, index: int, state: TrainState, resumed: bool) -> Any:
        if index == 1:
            begun.update({name: t.clone() for name, t in run.model.torchvision_state().items()})
            carried.append(state.optimizer["head.fc.weight"]["momentum_buffer"].clone())
        return real(run, index, state, resumed)

    monkeypatch.setattr(fit, "begin_phase", watching)
    kept: dict[int, dict[str, torch.Tensor]] = {}
    moments: dict[int, torch.Tensor] = {}
    snapshot = checkpoint.snapshot

    def keeping(name: str, model: Any, live: Any, state: TrainState, *rest: Any) -> Any:
        kept[state.epoch] = {name: t.clone() for name, t in model.items()}
        moments[state.epoch] = state.optimizer["head.fc.weight"]["momentum_buffer"].clone()
        return snapshot(name, model, live, state, *rest)

    monkeypatch.setattr(checkpoint, "snapshot", keeping)
    strategy = StrategyConfig(name="two_phase", first_phase=0.75, second_phase_from=start)  # type: ignore[arg-type]
    made = settings(photos, tmp_path / "run", strategy=strategy, train=TrainConfig(epochs=4, precision="fp32"))
    train(made)
    epoch = 2 if start == "best" else 3
    assert furthest(begun, kept[epoch]) == 0
    assert furthest(kept[2], kept[3]) > 0
    assert torch.equal(carried[0], moments[epoch])


@pytest.mark.parametrize("carry", ["carry", "reset"])
def test_moments_are_carried_or_reset_at_a_boundary(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, carry: str
) -> None:
    handed: list[dict[str, Any]] = []
    real = phase.build_engine

    def building(*arguments: Any) -> Any:
        handed.append(dict(arguments[-1]))
        return real(*arguments)

    monkeypatch.setattr(phase, "build_engine", building)
    strategy = StrategyConfig(name="lp_ft", optimizer_state=carry)  # type: ignore[arg-type]
    train(settings(photos, tmp_path / "run", strategy=strategy))
    assert handed[0] == {}
    assert sorted(handed[1]) == (["head.fc.bias", "head.fc.weight"] if carry == "carry" else [])


def test_only_what_trains_moves_when_the_plan_is_no_tail(photos: Path, tmp_path: Path) -> None:
    """First block and head (surgical); then BatchNorm alone: statistics and weights of every layer, nothing else."""
    for rules, moves in {
        "layer1.0=frozen, layer1=1, head=1, *=frozen": ("layer1.1.", "fc."),
        "norm=1, head=1, *=frozen": ("bn", "fc.", "downsample.1"),
    }.items():
        rules = rules.replace("layer1.0=", "layer1.0.*=")
        made = settings(
            photos,
            tmp_path / moves[0],
            strategy=StrategyConfig(name="by_hand", phases=(rules,)),
            train=TrainConfig(epochs=2, precision="fp32", batchnorm="train"),
        )
        train(made)
        start, end = backbones.build(made.model, 2, 32, 0).torchvision_state(), weights(made)
        for name, value in start.items():
            assert torch.equal(end[name], value) != any(part in name for part in moves), name


def test_frozen_batchnorm_inside_a_live_suffix_is_in_eval_mode() -> None:
    model = backbones.build(ModelConfig(weights="none"), 2, 32, 0)
    parameters = backbones.parameter_names(ModelConfig())
    rules = StrategyConfig(name="by_hand", phases=("layer1=1, layer2.*.conv*=1, head=1, *=frozen",))
    (made,) = build_plan(rules, tuple(model.stages), 1, parameters).phases
    freeze(model, made)
    _, network = model.cut(1)
    for policy, live in (("train", True), ("sync", True), ("eval", False)):
        set_modes(network, made, policy)
        found = {n: m.training for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
        assert found["layer1.0.bn1"] == live
        assert not found["layer2.0.bn1"]
        assert not found["layer4.0.bn1"]
    assert isinstance(made, Phase)


def test_a_plateau_counts_only_real_rises() -> None:
    plateau = Plateau()
    for value, stale in [(0.5, 0), (0.505, 1), (0.52, 0), (0.52, 1), (0.1, 2), (0.54, 0)]:
        plateau.look(value, 0.01)
        assert plateau.stale == stale


class TestSaver:
    def contents(self, epoch: int) -> checkpoint.Snapshot:
        weights = {"w": torch.full((2,), float(epoch))}
        return checkpoint.snapshot(checkpoint.folder_name(epoch), weights, None, TrainState(epoch=epoch), {})

    def value(self, folder: Path, name: str) -> float:
        return float(checkpoint.read_weights(folder / name)["w"][0])

    def test_only_the_newest_of_a_name_is_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        written: list[str] = []
        real = checkpoint.save
        monkeypatch.setattr(checkpoint, "save", lambda *a: (written.append(a[2].name), real(*a)))
        saver = Saver(tmp_path)
        for epoch in range(1, 200):
            saver.save(("last", "best") if epoch == 50 else ("last",), self.contents(epoch))
        saver.close()
        assert (self.value(tmp_path, "last"), self.value(tmp_path, "best")) == (199, 50)
        assert len(written) < 100
        assert "epoch-0199" in written

    def test_the_older_is_written_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """`last` must not lead to a state that names a best epoch which is not on the disk yet."""
        written: list[str] = []
        real, saver = checkpoint.save, Saver(tmp_path)
        gate = threading.Event()

        def slow(folder: Path, names: Any, contents: checkpoint.Snapshot, keep: int) -> None:
            gate.wait(10)
            written.append(contents.name)
            real(folder, names, contents, keep)

        monkeypatch.setattr(checkpoint, "save", slow)
        saver.save(("last",), self.contents(1))
        saver.save(("last", "best"), self.contents(2))
        saver.save(("last",), self.contents(3))
        gate.set()
        saver.close()
        assert written == sorted(written)
        assert written[-1] == "epoch-0003"

    def test_later_training_does_not_reach_what_waits(self, tmp_path: Path) -> None:
        weight, saver = torch.ones(3), Saver(tmp_path)
        saver.save(("last",), checkpoint.snapshot("epoch-0001", {"w": weight}, None, TrainState(epoch=1), {}))
        weight.zero_()
        saver.close()
        assert self.value(tmp_path, "last") == 1

    def test_a_failed_write_is_told(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        saver = Saver(tmp_path)
        saver.save(("last",), self.contents(1))
        saver.flush()

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            saver.save(("last", "best"), self.contents(2))
            saver.flush()
            said = str(saver.drain_news())
            assert "epoch-0002 could not be written" in said
            assert "No space left on device; the last whole one is epoch-0001" in said
            assert saver.drain_news() is None
            saver.save(("last",), self.contents(3))
            with pytest.raises(NotWritten, match="No space"):
                saver.flush(must=True)
            assert self.value(tmp_path, "last") == 1
            assert not list(tmp_path.glob(".draft"))
        saver.close()
        assert (self.value(tmp_path, "last"), self.value(tmp_path, "best")) == (3, 2)
        assert saver.drain_news() == "checkpoints are written again"

    def test_what_waits_beyond_its_phase_stays_as_it_was(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The disk is full at the phase's end, and the next phase trains what that one froze."""
        saver, frozen = Saver(tmp_path), torch.ones(3)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            taken = checkpoint.snapshot("epoch-0001", {"w": frozen}, None, TrainState(epoch=1), {}, fixed={"w"})
            saver.save(("last", "best"), taken)
            saver.flush()
        frozen.zero_()
        saver.close()
        assert checkpoint.read_weights(tmp_path / "best")["w"].tolist() == [1, 1, 1]
        assert [path.name for path in tmp_path.glob("epoch-*")] == ["epoch-0001"]


def test_the_state_keeps_no_second_copy_of_what_the_engine_holds(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint gathers the whole optimizer; kept after it, ZeRO's shares would save no memory."""
    kept: list[tuple[int, set[str], set[str]]] = []
    real = fit.end_epoch

    def watching(run: Any, live: Any, result: Any) -> None:
        real(run, live, result)
        trains = {name for name, parameter in live.network.named_parameters() if parameter.requires_grad}
        kept.append((live.index, set(result.state.optimizer), trains))
        assert not result.state.average

    monkeypatch.setattr(fit, "end_epoch", watching)
    strategy = StrategyConfig(name="two_phase", first_phase=0.5)
    train(settings(photos, tmp_path / "run", strategy=strategy, train=TrainConfig(epochs=2, precision="fp32", ema=0.9)))
    assert [index for index, _, _ in kept] == [0, 1]
    assert all(not names & trains for _, names, trains in kept)
