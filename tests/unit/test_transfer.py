"""LogME against a direct evaluation of the evidence; the interval against simulation; both commands on real runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from tldist.config import ModelConfig, OptimConfig, RunConfig, StrategyConfig, TrainConfig, UserError
from tldist.models import backbones
from tldist.train import worker
from tldist.transfer.gain import Gain, arm, check, gain, sentence
from tldist.transfer.score import logme, probe
from tldist_launcher.cli import main
from tldist_launcher.commands import transfer

QUICK = [
    "--data.image-size", "32", "--data.batch-size", "8", "--train.epochs", "1", "--train.precision", "fp32",
    "--data.augment", "none", "--data.loader", "torchvision", "--tracking.wandb", "disabled",
]  # fmt: skip


@pytest.mark.parametrize(("images", "dimensions"), [(30, 4), (14, 20)], ids=["tall", "wide, of rank 3"])
def test_logme_is_the_highest_evidence(images: int, dimensions: int) -> None:
    """Of y ~ N(0, I / beta + F F^T / alpha), whose density scipy computes and whose maximum it looks for."""
    rng = np.random.default_rng(0)
    f = rng.normal(size=(images, dimensions))
    labels = (f[:, :3] + 0.5 * rng.normal(size=(images, 3))).argmax(axis=1)
    assert set(labels) == {0, 1, 2}  # of a class without images the evidence has no maximum
    if dimensions > images:
        f = f[:, :3] @ rng.normal(size=(3, dimensions))

    def evidence(logs: np.ndarray, y: np.ndarray) -> float:
        alpha, beta = np.exp(logs.clip(-12, 12))
        return float(multivariate_normal(np.zeros(images), np.eye(images) / beta + f @ f.T / alpha).logpdf(y))

    best = []
    for k in range(3):
        y = (labels == k).astype(float)
        starts = [(1.0, 1.0), (4.0, 2.0)]
        found = [minimize(lambda x, y=y: -evidence(x, y), start, method="Nelder-Mead") for start in starts]
        best.append(-min(each.fun for each in found) / images)
    assert logme(f, labels) == pytest.approx(np.mean(best), abs=1e-4)


def test_features_that_fit_every_label_have_an_evidence_too() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 3
    fitting, random = np.eye(24) + np.eye(3)[labels] @ rng.normal(size=(3, 24)), rng.normal(size=(24, 40))
    assert np.isfinite(logme(fitting, labels))
    assert logme(fitting, labels) > logme(random, labels)


def test_better_features_score_higher() -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(200) % 4
    clean = np.eye(4)[labels] + 0.3 * rng.normal(size=(200, 4))
    noisy, none = clean + rng.normal(size=(200, 4)), rng.normal(size=(200, 4))
    assert logme(clean, labels) > logme(noisy, labels) > logme(none, labels)
    tops = [probe(f[:100], labels[:100], f[100:], labels[100:]) for f in (clean, noisy, none)]
    assert tops[0] > tops[1] > tops[2]


def runs(rng: np.random.Generator, seeds: int, images: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Two arms: images are of unequal difficulty, which both share in part, and seeds are of unequal luck."""
    hard = rng.normal(size=images)
    arms = []
    for mean in (shift, 0.0):
        own = 0.7 * hard + 0.7 * rng.normal(size=images) + mean
        logits = own + 0.25 * rng.normal(size=(seeds, 1)) + 0.5 * rng.normal(size=(seeds, images))
        arms.append(logits > 0)
    return arms[0], arms[1]


def test_the_interval_covers_what_it_says() -> None:
    """Without a difference, at most about a twentieth of the verdicts is one; with a large one it is found."""
    rng = np.random.default_rng(2)
    verdicts = [gain(*runs(rng, 4, 150, 0.0)).verdict for _ in range(400)]
    assert sum(verdict != "no difference" for verdict in verdicts) <= 32
    assert {gain(*runs(rng, 4, 150, 1.6)).verdict for _ in range(30)} == {"helps"}
    assert {gain(*runs(rng, 4, 150, -1.6)).verdict for _ in range(30)} == {"hurts"}


def test_few_images_tell_less_than_many_seeds_suggest() -> None:
    """Twenty seeds that all agree on ten images: the images are what is uncertain."""
    tuned, scratch = np.ones((20, 10), dtype=int), np.ones((20, 10), dtype=int)
    scratch[:, :2] = 0
    found = gain(tuned, scratch)
    assert (found.mean, found.seeds_error) == (pytest.approx(0.2), pytest.approx(0.0))
    assert found.verdict == "no difference"
    assert gain(scratch, scratch) == Gain(0.0, 0.0, 0.0, 0.95, 0.0, 0.0)
    assert "No difference was found: +20.0 points" in sentence(found, 20, 10)


def test_the_arms_differ_in_where_they_start_alone() -> None:
    made = RunConfig(
        model=ModelConfig(weights="w.pth"),
        strategy=StrategyConfig(name="two_phase"),
        optim=OptimConfig(l2_sp=0.1, base_lr=0.01),
        train=TrainConfig(batchnorm="eval", epochs=7),
    )
    tuned, scratch = (arm(made, name, 3, Path("x")) for name in ("fine-tuned", "scratch"))
    assert (tuned.seed, scratch.seed, tuned.model.weights, scratch.model.weights) == (3, 3, "w.pth", "none")
    assert (scratch.strategy.name, scratch.optim.l2_sp, scratch.train.batchnorm) == ("scratch", 0.0, "train")
    assert (tuned.train.epochs, scratch.train.epochs, scratch.optim.base_lr) == (7, 7, 0.01)
    assert arm(made, "scratch", 3, Path("x"), 0.5).optim.base_lr == 0.5
    with pytest.raises(UserError, match="compares with scratch"):
        check(arm(made, "scratch", 0, Path("x")), 3)
    with pytest.raises(UserError, match="two at least"):
        check(made, 1)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "source.safetensors"
    safetensors.torch.save_file(backbones.build(ModelConfig(weights="none"), 5, 32, 3).torchvision_state(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "write_report", lambda *_: None)
        yield str(path)


def test_the_gain_command_goes_on_and_repeats_nothing(
    photos: Path, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped before its third run, it makes the last two when it is called again; then it makes none."""
    made: list[str] = []
    real = transfer.launch

    def counting(settings: RunConfig, **given: bool) -> Path:
        if len(made) == 2 and "stopped" not in made:
            made.append("stopped")
            raise KeyboardInterrupt
        made.append(Path(settings.run_dir).name)
        return real(settings, **given)

    monkeypatch.setattr(transfer, "launch", counting)
    words = ["transfer-gain", "folder", "--seeds", "2", "--data.root", str(photos), *QUICK]
    words += ["--model.weights", source, "--strategy.name", "partial", "--run-dir", str(tmp_path / "gain")]
    assert main(words) == 130
    assert main(words) == 0
    assert made == ["fine-tuned-seed0", "scratch-seed0", "stopped", "fine-tuned-seed1", "scratch-seed1"]
    assert main(words) == 0
    assert len(made) == 5
    told = json.loads((tmp_path / "gain" / "transfer_gain.json").read_text())
    assert [(run["arm"], run["seed"]) for run in told["runs"]] == [
        (name, seed) for seed in (0, 1) for name in ("fine-tuned", "scratch")
    ]
    for run in told["runs"]:
        summary = json.loads((tmp_path / "gain" / f"{run['arm']}-seed{run['seed']}" / "summary.json").read_text())
        assert summary["val_top1"] == pytest.approx(run["top1"])
        assert summary["strategy"] == ("partial" if run["arm"] == "fine-tuned" else "scratch")
    text = capsys.readouterr().out
    assert told["verdict"] in ("helps", "hurts", "no difference")
    assert "points of top-1 (between" in text
    assert main([*words, "--optim.base-lr", "0.5"]) == 2
    assert "is a run with other settings" in capsys.readouterr().err


def test_the_score_command(photos: Path, tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Two sets of weights ranked by LogME; the same features from the kept cache again."""
    cache = ["--cache.dir", str(tmp_path / "kept")]
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file(backbones.build(ModelConfig(weights="none"), 5, 32, 8).torchvision_state(), other)
    words = ["transfer-score", "folder", "--models", f"resnet18:{source}, resnet18:{other}", "--data.root", str(photos)]
    assert main([*words, *QUICK, *cache, "--json", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [score["dimensions"] for score in scores] == [512, 512]
    assert scores[0]["logme"] > scores[1]["logme"]
    assert all(score["probe_top1"] > 0.8 for score in scores), "colours tell the classes apart"
    assert {Path(score["weights"]).name for score in scores} == {"source.safetensors", "other.safetensors"}
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert "the most promising first" in capsys.readouterr().out
    for given, says in [
        (["--models", "resnet81"], "did you mean 'resnet18'?"),
        (["--models", f"resnet50:{source}"], "are not resnet50's"),
        ([], "needs --models"),
    ]:
        assert main(["transfer-score", "folder", "--data.root", str(photos), *QUICK, *given]) == 2
        assert says in capsys.readouterr().err
