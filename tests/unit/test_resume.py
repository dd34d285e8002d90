"""An interrupted run ends as one that was not: the same weights, bit for bit, whatever it was doing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tldist import config
from tldist.checkpoints import checkpoint
from tldist.config import (
    CacheConfig,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    StrategyConfig,
    TrackingConfig,
    TrainConfig,
    UserError,
)
from tldist.guard import control
from tldist.train import fit, worker
from tldist.train.evaluate import Evaluation
from tldist.train.launch import only_one
from tldist_launcher.start.arguments import parse_resume
from tldist_launcher.start.launch import resume

pytestmark = pytest.mark.usefixtures("two_domains")

CASES: dict[str, dict[str, Any]] = {
    "gradual, everything moves": {
        "strategy": StrategyConfig(name="gradual"),
        "data": {"mixup": 0.4, "cutmix": 1.0, "augment": "lecture"},
        "train": TrainConfig(epochs=4, ema=0.9, accumulate=2),
        "optim": OptimConfig(schedule="onecycle"),
    },
    "on a plateau": {
        "strategy": StrategyConfig(name="gradual", unfreeze="plateau", patience=1),
        "train": TrainConfig(epochs=4, precision="fp32", min_delta=0.2),
        "optim": OptimConfig(name="sgd", base_lr=1e-2, schedule="cosine_restarts"),
    },
    "from the best, moments reset": {
        "strategy": StrategyConfig(
            name="two_phase", first_phase=0.5, second_phase_from="best", optimizer_state="reset"
        ),
        "data": {"loader": "torchvision"},
        "train": TrainConfig(epochs=4, precision="fp32"),
    },
    "cached features, early stopping, torchvision": {
        "strategy": StrategyConfig(name="partial"),
        "data": {"augment": "none", "loader": "torchvision"},
        "cache": CacheConfig(features="exact"),
        "train": TrainConfig(epochs=4, precision="fp32", early_stop=2),
        "optim": OptimConfig(l2_sp=0.1),
    },
    "two domains, a discriminator": {
        "strategy": StrategyConfig(name="dann", discriminator_units=16),
        "data": {"loader": "torchvision", "root": "../two_domains"},
        "train": TrainConfig(epochs=3, precision="fp32", batchnorm="domain", early_stop=2),
    },
}

STEPS_PER_EPOCH = 5


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tldist.models import backbones

    path = tmp_path_factory.mktemp("source") / "weights.safetensors"
    safetensors.torch.save_file(backbones.build(ModelConfig(weights="none"), 5, 32, 3).torchvision_state(), path)
    return str(path)


def settings(photos: Path, run_dir: Path, source: str, case: dict[str, Any]) -> RunConfig:
    data = {"root": ".", "batch_size": 8, "image_size": 32, "threads": 1, **case.get("data", {})}
    data["root"] = str(photos / data["root"])
    run_dir.mkdir()
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(weights=source),
        data=DataConfig(**data),
        tracking=TrackingConfig(wandb="disabled", log_every=2),
        **{key: value for key, value in case.items() if key != "data"},
    )


def weights(made: RunConfig) -> dict[str, torch.Tensor]:
    folder = Path(made.run_dir) / "checkpoints" / "last"
    return {
        f"{file.name} {name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(file).items()
    }


def rows(made: RunConfig, event: str) -> list[dict[str, Any]]:
    lines = (Path(made.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


def same(one: RunConfig, other: RunConfig) -> None:
    assert weights(one).keys() == weights(other).keys()
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(other)[name]), name


@pytest.mark.parametrize("name", CASES)
def test_an_interrupted_run_ends_with_the_same_bits(
    photos: Path, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Stopped before every third step: inside epochs, between them, in every phase. The weights, moments, average, the
    summary and the logged losses are those of the run that saved at epochs' ends only."""
    whole = settings(photos, tmp_path / "whole", source, CASES[name])
    broken = settings(photos, tmp_path / "broken", source, CASES[name])
    broken = replace(broken, checkpoint=CheckpointConfig(steps=1))
    expected = worker.run(config.to_json(whole))
    real = fit.train_step
    steps = expected["epochs"] * STEPS_PER_EPOCH

    for before in range(1, steps, 3):

        def interrupted(run: Any, live: Any, step: int, *rest: Any, stop: int = before) -> None:
            if step == stop:
                raise KeyboardInterrupt
            real(run, live, step, *rest)

        monkeypatch.setattr(fit, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            worker.run(config.to_json(broken))
    monkeypatch.setattr(fit, "train_step", real)
    summary = worker.run(config.to_json(broken))
    same(whole, broken)
    last = range(1, steps, 3)[-1]
    assert summary["resumed_from"] == checkpoint.folder_name(*divmod(last, STEPS_PER_EPOCH))
    predicted = [json.loads((Path(made.run_dir) / "predictions.json").read_text()) for made in (whole, broken)]
    assert predicted[0] == predicted[1]
    kept = ("epochs", "val_top1", "best_val_top1", "best_epoch", "phases", "restored_epoch")
    assert {key: summary[key] for key in kept} == {key: expected[key] for key in kept}
    assert [phase["epochs"] for phase in summary["per_phase"]] == [phase["epochs"] for phase in expected["per_phase"]]
    losses = [{r["step"]: r["loss"] for r in rows(made, "train")} for made in (whole, broken)]
    assert losses[0] == losses[1]


def test_asked_to_stop_it_saves_and_says_so(photos: Path, tmp_path: Path, source: str) -> None:
    """At every look, down to one step in each process; the run ends with the same bits."""
    case = {**CASES["on a plateau"], "train": TrainConfig(epochs=1, precision="fp32")}
    whole, broken = (settings(photos, tmp_path / name, source, case) for name in ("whole", "broken"))
    worker.run(config.to_json(whole))
    for step in range(1, STEPS_PER_EPOCH + 1):
        control.ask_to_stop(Path(broken.run_dir), "SIGTERM")
        assert worker.run(config.to_json(broken)) == {"stopped": f"stopped after step {step}, and saved"}
        assert not (Path(broken.run_dir) / "summary.json").exists()
    control.forget_stop(Path(broken.run_dir))
    assert worker.run(config.to_json(broken))["epochs"] == 1
    same(whole, broken)


def test_an_old_checkpoint_is_followed_by_another_in_time(photos: Path, tmp_path: Path, source: str) -> None:
    made = settings(photos, tmp_path / "run", source, {"train": TrainConfig(epochs=1, precision="fp32")})
    made = replace(made, checkpoint=CheckpointConfig(minutes=1e-6, keep=50))
    worker.run(config.to_json(made))
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("epoch-*"))
    assert kept[0] == "epoch-0000-step-000001"
    assert kept[-1] == "epoch-0001"


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(photos: Path, tmp_path: Path, source: str) -> None:
    case = {**CASES["on a plateau"], "train": TrainConfig(epochs=2, precision="fp32")}
    whole, broken = (settings(photos, tmp_path / name, source, case) for name in ("whole", "broken"))
    worker.run(config.to_json(whole))
    broken = replace(broken, checkpoint=CheckpointConfig(steps=2, keep=3))
    worker.run(config.to_json(broken))
    folder = Path(broken.run_dir) / "checkpoints"
    (Path(broken.run_dir) / "summary.json").unlink()
    file = folder / "last" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    summary = worker.run(config.to_json(broken))
    assert "epoch-0001" <= summary["resumed_from"] < "epoch-0002"
    said = [row["text"] for row in rows(broken, "notice")]
    assert any("epoch-0002 is damaged: optimizer.safetensors is not what was written" in text for text in said)
    same(whole, broken)


def test_a_lost_best_is_told_at_once_and_the_run_ends(
    photos: Path, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the end of training, when it would be needed."""
    top1 = [0.9]
    monkeypatch.setattr(Evaluation, "top1", property(lambda _: top1[0]))
    made = settings(photos, tmp_path / "run", source, {"train": TrainConfig(epochs=2, precision="fp32")})
    worker.run(config.to_json(made))
    folder = Path(made.run_dir) / "checkpoints"
    longer = replace(made, train=replace(made.train, epochs=3), checkpoint=CheckpointConfig(keep=9))
    (folder / "best" / "model.safetensors").write_bytes(b"")
    (Path(made.run_dir) / "summary.json").unlink()
    top1[:] = [0.5]
    summary = worker.run(config.to_json(longer))
    assert summary["best_epoch"] == 3
    assert any("takes its place" in row["text"] for row in rows(made, "notice"))


def test_a_best_epoch_that_is_gone_is_followed_by_another(
    photos: Path, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint was the newest, was damaged, and had taken the name of the one before."""
    case = {**CASES["on a plateau"], "train": TrainConfig(epochs=2, precision="fp32")}
    made, real, top1 = settings(photos, tmp_path / "run", source, case), fit.train_step, [0.9]
    made = replace(made, checkpoint=CheckpointConfig(steps=2))
    monkeypatch.setattr(Evaluation, "top1", property(lambda _: top1[0]))

    def interrupted(run: Any, live: Any, step: int, *rest: Any) -> None:
        if step == 7:
            raise KeyboardInterrupt
        real(run, live, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fit, "train_step", interrupted)
        worker.run(config.to_json(made))
    folder = Path(made.run_dir) / "checkpoints"
    shutil.rmtree(folder / "epoch-0001")
    top1[:] = [0.5]
    summary = worker.run(config.to_json(made))
    assert (summary["best_epoch"], summary["best_val_top1"]) == (2, 0.5)
    assert (folder / "best").resolve().name == "epoch-0002"


class TestNotFinite:
    def poisoned(self, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> list[dict[str, torch.Tensor]]:
        """Images of these steps are not numbers; returns the model before and after each of them."""
        seen: list[dict[str, torch.Tensor]] = []
        real, real_passes, bad = fit.train_step, fit.passes, []

        def step(run: Any, live: Any, step: int, *rest: Any) -> None:
            bad[:] = [step in steps]
            if bad[0]:
                seen.append({n: t.clone() for n, t in run.model.state_dict().items() if t.is_floating_point()})
            real(run, live, step, *rest)
            if bad[0]:
                seen.append({n: t.clone() for n, t in run.model.state_dict().items() if t.is_floating_point()})

        def passes(run: Any, live: Any, x: torch.Tensor, *rest: Any) -> None:
            real_passes(run, live, x * torch.nan if bad[0] else x, *rest)

        monkeypatch.setattr(fit, "train_step", step)
        monkeypatch.setattr(fit, "passes", passes)
        return seen

    @pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
    @pytest.mark.parametrize("clip_norm", [0.0, 1.0])
    def test_the_step_is_left_out_and_counted(
        self, photos: Path, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch, optimizer: Any, clip_norm: Any
    ) -> None:
        """The first step of all, and one in the middle: neither weights nor BatchNorm's statistics see it."""
        case = {
            "strategy": StrategyConfig(name="full"),
            "train": TrainConfig(epochs=2, precision="fp32"),
            "optim": OptimConfig(name=optimizer, clip_norm=clip_norm),
        }
        made = settings(photos, tmp_path / "run", source, case)
        seen = self.poisoned(monkeypatch, {0, 6})
        summary = worker.run(config.to_json(made))
        assert summary["skipped_steps"] == 2
        for before, after in zip(seen[::2], seen[1::2], strict=True):
            assert all(torch.equal(before[name], after[name]) for name in before)
        assert all(tensor.isfinite().all() for tensor in weights(made).values() if tensor.is_floating_point())
        assert [row["skipped_steps"] for row in rows(made, "eval")] == [1, 2]
        assert all(row["loss"] is not None for row in rows(made, "train"))

    def test_many_in_a_row_end_the_run_and_the_checkpoint_stands(
        self, photos: Path, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case = {"train": TrainConfig(epochs=3, precision="fp32", max_skipped=3)}
        made = settings(photos, tmp_path / "run", source, case)
        self.poisoned(monkeypatch, set(range(5, 100)))
        monkeypatch.setattr(control, "LOOK_S", 0.0)
        with pytest.raises(control.Diverged, match="gradients of 3 steps in a row, up to step 8, were not finite"):
            worker.run(config.to_json(made))
        folder = Path(made.run_dir) / "checkpoints"
        assert checkpoint.damage(folder / "last") is None
        assert (folder / "last").resolve().name == "epoch-0001"


def test_a_run_that_is_done_stays_as_it_is(photos: Path, tmp_path: Path, source: str) -> None:
    made = settings(photos, tmp_path / "run", source, CASES["on a plateau"])
    first = worker.run(config.to_json(made))
    before = weights(made)
    again = worker.run(config.to_json(made))
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(made).items())
    assert (again["epochs"], again["val_top1"]) == (first["epochs"], first["val_top1"])
    assert len(rows(made, "eval")) == 4


def test_killed_and_resumed_through_the_command_line(photos: Path, tmp_path: Path, source: str) -> None:
    """SIGKILL at some moment after the first epoch; `tldist train --resume` ends as an undisturbed run does."""
    case = CASES["gradual, everything moves"]
    whole = settings(photos, tmp_path / "whole", source, case)
    worker.run(config.to_json(whole))
    run_dir = tmp_path / "killed"
    words = ["train", "folder", "--run-dir", str(run_dir)]
    file = tmp_path / "config.yaml"
    config.save(replace(whole, run_dir=""), file)
    command = [sys.executable, "-m", "tldist_launcher.cli"]
    process = subprocess.Popen([*command, *words, "--config", str(file)], stdout=subprocess.DEVNULL)
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and '"event": "eval"' in metrics.read_text()):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run([*command, "train", "--resume", str(run_dir)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    same(whole, config.load(run_dir / "config.yaml"))


class TestCommandLine:
    def run_dir(self, photos: Path, tmp_path: Path) -> Path:
        from tldist.data.source.index import build_index, save_index

        made = RunConfig(run_dir=str(tmp_path), data=DataConfig(root=str(photos), batch_size=8, image_size=32))
        config.save(made, tmp_path / "config.yaml")
        save_index(build_index(photos), tmp_path / "index.json")
        (tmp_path / "logs").mkdir()
        return tmp_path

    def test_only_where_it_runs_may_change(self, photos: Path, tmp_path: Path) -> None:
        run_dir = self.run_dir(photos, tmp_path)
        parsed = parse_resume(["--resume", str(run_dir), "--launch.workers", "2"])
        assert parsed is not None
        assert (parsed[0].launch.workers, parsed[0].run_dir, parsed[1]) == (2, str(run_dir), run_dir)
        parsed = parse_resume([f"--resume={run_dir}", "--train.compile=off"])
        assert parsed is not None
        assert parsed[0].train.compile == "off"
        with pytest.raises(UserError, match="epochs cannot change"):
            parse_resume([f"--resume={run_dir}", "--train.epochs=3"])

    @pytest.mark.parametrize(
        ("words", "says"),
        [(["--resume"], "needs a run directory"), (["--resume", "nowhere"], "is no run directory")],
    )
    def test_mistakes(self, words: list[str], says: str) -> None:
        with pytest.raises(UserError, match=says):
            parse_resume(words)

    def test_a_run_that_ended_is_not_resumed(self, photos: Path, tmp_path: Path) -> None:
        run_dir = self.run_dir(photos, tmp_path)
        (run_dir / "summary.json").write_text("{}")
        with pytest.raises(UserError, match="has reached its end"):
            resume(config.load(run_dir / "config.yaml"), run_dir)

    def test_other_images_are_refused(self, photos: Path, tmp_path: Path) -> None:
        run_dir = self.run_dir(photos, tmp_path)
        index = json.loads((run_dir / "index.json").read_text())
        (run_dir / "index.json").write_text(json.dumps({**index, "fingerprint": "another"}))
        made = replace(config.load(run_dir / "config.yaml"), model=ModelConfig(weights="none"))
        with pytest.raises(UserError, match="are not those that"):
            resume(made, run_dir)

    def test_two_processes_do_not_write_one_run(self, tmp_path: Path) -> None:
        (tmp_path / "logs").mkdir()
        with only_one(tmp_path):
            pid = os.fork()
            if pid == 0:
                try:
                    with only_one(tmp_path):
                        os._exit(1)
                except UserError:
                    os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
