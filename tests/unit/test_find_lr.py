"""The learning-rate range test: what it suggests on curves whose answer is known, and what it says without one."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tldist.config import DataConfig, LaunchConfig, ModelConfig, OptimConfig, RunConfig, StrategyConfig, TrainConfig
from tldist.rules import validate
from tldist.train.find_lr import Curve, Finding, Sweep, averaged, is_lost, measure, read_curve, trial
from tldist_launcher.cli import main
from tldist_launcher.start.arguments import parse_run

QUICK = [
    "--model.weights", "none", "--strategy.name", "two_phase", "--data.image-size", "32", "--data.batch-size", "8",
    "--tracking.wandb", "disabled",
]  # fmt: skip


USUAL = Sweep()


def seen(shape: Callable[[float], float], sweep: Sweep = USUAL, noise: float = 0.0, seed: int = 0) -> Finding:
    """What is found on a loss that is a function of log10 of the rate; the test ends where it would end."""
    rng, losses = np.random.default_rng(seed), []
    for rate in sweep.rates:
        losses.append(shape(math.log10(rate)) + noise * rng.normal())
        if is_lost(losses, sweep.memory):
            break
    return read_curve(Curve(sweep, tuple(losses)))


def fall(x: float) -> float:
    """From 2 to 1, fastest at a rate of 0.01."""
    return 2 - 1 / (1 + math.exp(-4 * (x + 2)))


def valley(x: float) -> float:
    """Falls as above, and is back at 2 at a rate of 1."""
    return fall(x) + math.exp(4 * x)


def test_a_valley_is_taken_where_it_falls_fastest() -> None:
    found = seen(valley)
    assert found.suggestion == pytest.approx(0.01, rel=0.3)
    assert found.diverges_from == pytest.approx(0.46, rel=0.4)  # where a quarter of the fall is lost
    assert found.remark == ""


@pytest.mark.parametrize("seed", range(8))
def test_noise_moves_it_by_half_a_decade_at_most(seed: int) -> None:
    found = seen(valley, noise=0.15, seed=seed)
    assert found.suggestion is not None
    assert 0.003 < found.suggestion < 0.033
    assert found.diverges_from is not None
    assert 0.15 < found.diverges_from < 1.5


def test_a_bump_at_the_bottom_is_no_fall() -> None:
    """The loss falls slowly over three decades; behind a bump on the floor it falls faster, but learns nothing new."""

    def bumpy(x: float) -> float:
        slope = 2 - min(max((x + 4) / 3, 0), 1)
        return slope + 0.6 * math.exp(-(((x + 0.6) / 0.2) ** 2)) + math.exp(4 * (x - 0.7))

    found = seen(bumpy)
    assert found.suggestion is not None
    assert 1e-4 < found.suggestion < 0.1
    assert found.diverges_from is not None
    assert found.diverges_from > 0.5


@pytest.mark.parametrize("sweep", [Sweep(100, 1e-8, 10), Sweep(100, 1e-4, 1), Sweep(40), Sweep(1000)])
def test_it_does_not_depend_on_the_sweep(sweep: Sweep) -> None:
    assert seen(valley, sweep).suggestion == pytest.approx(0.01, rel=0.3)


def test_a_loss_that_only_falls() -> None:
    """Flat again at the highest rate: a suggestion with a remark. Still falling there: none."""
    found = seen(fall)
    assert found.suggestion == pytest.approx(0.01, rel=0.3)
    assert found.diverges_from is None
    assert "did not diverge up to 10" in found.remark
    cut = seen(fall, Sweep(100, 1e-6, 1e-2))
    assert cut.suggestion is None
    assert "raise --highest" in cut.remark


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (lambda x: 2.0, "no rate up to 10"),
        (lambda x: math.nan, "diverged at once"),
        (lambda x: 2 + 10 ** (x + 5), "the loss rose without having fallen"),
        (lambda x: 2 if x < -4 else math.inf, "the loss rose without having fallen"),
        (lambda x: valley(x + 4.8), "lower --lowest"),
    ],
)
def test_no_suggestion_but_a_sentence(shape: Callable[[float], float], says: str) -> None:
    found = seen(shape)
    assert found.suggestion is None
    assert says in found.remark


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_is_no_valley(seed: int) -> None:
    found = seen(lambda _: 2.0, noise=0.15, seed=seed)
    assert found.suggestion is None
    assert "by more than its noise" in found.remark


def test_lost_is_four_times_the_best_and_above_the_start() -> None:
    assert averaged([3.0, 3.0, 3.0], 0.98) == pytest.approx([3.0, 3.0, 3.0])
    assert is_lost([1.0, math.nan], 0.0)
    assert is_lost([1.0, 0.5, 2.1], 0.0)
    assert not is_lost([1.0, 0.5, 1.9], 0.0)
    assert not is_lost([1.0, 0.01, 0.1], 0.0)
    assert not is_lost([1.0, 0.5, 2.1], 0.9)


def small(photos: Path) -> RunConfig:
    return RunConfig(
        model=ModelConfig(weights="none"),
        strategy=StrategyConfig(name="gradual"),
        data=DataConfig(root=str(photos), batch_size=8, image_size=32, mixup=0.2),
        optim=OptimConfig(name="sgd"),
        train=TrainConfig(epochs=1),
    )


def test_the_same_seed_gives_the_same_curve(photos: Path, tmp_path: Path) -> None:
    """More steps than an epoch has (5); base_lr changes nothing but rounding."""
    sweep = Sweep(20, 1e-4, 1)
    before = torch.get_num_threads(), torch.backends.cudnn.deterministic
    losses = measure(trial(small(photos), str(tmp_path)), sweep).losses
    assert (torch.get_num_threads(), torch.backends.cudnn.deterministic) == before
    assert len(losses) == 20
    assert all(math.isfinite(loss) for loss in losses)
    assert measure(trial(small(photos), str(tmp_path)), sweep).losses == losses
    rated = replace(small(photos), optim=OptimConfig(name="sgd", base_lr=0.5))
    assert measure(trial(rated, str(tmp_path)), sweep).losses == pytest.approx(losses, rel=0.02)
    other = replace(small(photos), seed=1)
    assert measure(trial(other, str(tmp_path)), sweep).losses != losses
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]


def test_a_trial_passes_what_one_of_several_workers_would() -> None:
    made = RunConfig(launch=LaunchConfig(workers=4), train=TrainConfig(accumulate=2, ema=0.9))
    tried = trial(made, "x")
    validate(tried)
    assert (tried.launch.workers, tried.train.accumulate, tried.train.ema) == (1, 8, 0.0)
    assert tried.data.batch_size == made.data.batch_size


def test_the_command(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table, a command that trains with what was found, a plot and the numbers; no run directory, W&B or not."""
    files = ["--json", str(tmp_path / "lr.json"), f"--plot={tmp_path / 'lr.png'}"]
    words = ["folder", *QUICK, "--data.root", str(photos), "--optim.name", "sgd"]
    assert main(["find-lr", *words, "--steps", "30", "--lowest", "1e-4", "--highest", "10", *files]) == 0
    text = capsys.readouterr().out
    assert "two_phase of resnet18, sgd" in text
    told = json.loads((tmp_path / "lr.json").read_text())
    assert len(told["rates"]) == len(told["losses"]) == len(told["smoothed"]) <= 30
    assert (tmp_path / "lr.png").stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lr.json", "lr.png"]
    if told["suggestion"] is None:
        assert "No suggestion: " in text
    else:
        command = shlex.split(next(line for line in text.splitlines() if line.startswith("Train with it: ")))
        assert parse_run(command[5:], "train").optim.base_lr == told["suggestion"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name a recipe: tldist find-lr RECIPE"),
        (["folder"], "--data.root is missing"),
        (["folder", "--steps", "many"], "--steps 'many' is not a whole number"),
        (["folder", "--steps", "5"], "--steps is 5: give at least 20"),
        (["folder", "--steps"], "--steps needs a value"),
        (["folder", "--step", "50"], "no flag --step (did you mean '--steps'?)"),
        (["folder", "--lowest", "1", "--highest", "0.1"], "the lower one first"),
        (["folder", "--lowest", "0"], "two rates above 0"),
        (["folder", "--highest", "nan"], "two rates above 0"),
        (["folder", "--plot", "/no/such/folder/x.png"], "name a file in a folder that exists"),
        (["folder", "--run-dir", "x"], "leave --run-dir out"),
        (["folder", "--strategy.name", "gradul"], "(did you mean 'gradual'?)"),
        (["folder", "--train.epochs", "0"], "--train.epochs is 0"),
    ],
)
def test_mistakes(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["find-lr", *arguments]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("tldist: ")
    assert output.err.count("\n") == 1
    assert says in output.err
