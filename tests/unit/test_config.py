"""Configs made in Python and sent as JSON are checked as files and flags are."""

from __future__ import annotations

from typing import Any

import pytest

from tldist import config
from tldist.config import DataConfig, OptimConfig, RunConfig, StrategyConfig, TrainConfig, UserError
from tldist.recipes import RECIPES
from tldist.rules import validate
from tldist_launcher.start.launch import launch

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a word that is near": (
        {"strategy": StrategyConfig(name="fulll")},  # type: ignore[arg-type]
        r"^strategy\.name: .*\(found 'fulll'\) \(did you mean 'full'\?\)$",
    ),
    "another word": ({"train": TrainConfig(precision="bf17")}, r"did you mean 'bf16'"),  # type: ignore[arg-type]
    "a number in quotes": ({"train": TrainConfig(epochs="3")}, r"^train\.epochs is '3', of a wrong kind: give 3$"),  # type: ignore[arg-type]
    "a truth for a number": ({"seed": True}, r"^seed is True, of a wrong kind: give 1$"),
    "no number": ({"optim": OptimConfig(base_lr="high")}, r"^optim\.base_lr: "),  # type: ignore[arg-type]
    "a share of an image": ({"data": DataConfig(batch_size=2.5)}, r"^data\.batch_size: "),  # type: ignore[arg-type]
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", WRONG)
def test_a_config_made_in_python_is_checked(case: str) -> None:
    values, sentence = WRONG[case]
    for check in (validate, launch):
        with pytest.raises(UserError, match=sentence):
            check(RunConfig(**values))


def test_json_of_another_version_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"^unknown key 'train\.epoch' \(did you mean 'train\.epochs'\?\)"):
        config.from_json('{"train": {"epoch": 3}}')


def test_whole_numbers_stand_for_rates_and_every_recipe_passes() -> None:
    validate(RunConfig(optim=OptimConfig(base_lr=1), launch=config.LaunchConfig(workers="1:2")))
    for name, recipe in RECIPES.items():
        assert recipe().recipe == name
        config.check_types(recipe())
