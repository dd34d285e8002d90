"""A study's file: what it means, and every mistake in it as one sentence before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cli import said

from tldist.config import UserError
from tldist_launcher.launch import launch
from tldist_launcher.study import check, describe, examples, left, open_folder, resolved, same_run
from tldist_launcher.study_file import Study, find_study, named_studies, read_file, write_file
from tldist_launcher.trial import run_job

FLAGS = {
    "model.weights": "none", "data.image_size": 32, "data.batch_size": 8, "train.epochs": 1,
    "tracking.wandb": "disabled",
}  # fmt: skip
GRID = {"strategy.name": ["full", "feature_extraction"], "data.mixup": [0.0, 0.2]}


def written(folder: Path, photos: Path, **changes: Any) -> Path:
    """A sound study's file, with changes; None takes a key away."""
    told = {"recipe": "folder", "flags": {**FLAGS, "data.root": str(photos)}, "grid": GRID, "seeds": 2} | changes
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in told.items() if value is not None}, sort_keys=False))
    return path


def read(path: Path, *words: str, seeds: str = "") -> Study:
    return read_file(path, words, path.parent / "study", seeds)


def written_again(study: Study, folder: Path) -> Study:
    write_file(study, folder / study.file_name)
    return read_file(folder / study.file_name, [], study.folder)


def test_a_grid_is_every_combination_with_every_seed(photos: Path, tmp_path: Path) -> None:
    jobs = read(written(tmp_path, photos)).grid()
    assert len(jobs) == 8
    assert len({job.name for job in jobs}) == 8
    assert [job.name for job in jobs[:2]] == ["full-mixup=0.0-seed=0", "full-mixup=0.2-seed=0"]
    assert [job.seed for job in jobs] == [0] * 4 + [1] * 4
    one = jobs[-1].settings
    assert (one.strategy.name, one.data.mixup, one.seed) == ("feature_extraction", 0.2, 1)
    assert (one.data.image_size, one.launch.workers, one.launch.kind) == (32, 1, "local")
    assert one.tracking.group == "mine"
    assert one.run_dir == str(tmp_path / "study" / "trials" / jobs[-1].name)


def test_named_choices_set_several_flags(photos: Path, tmp_path: Path) -> None:
    grid = {"augmentation": {"plain": None, "both at once": {"data.mixup": 0.2, "--data.cutmix": 1.0}}}
    plain, both = read(written(tmp_path, photos, grid=grid, seeds=[3])).grid()
    assert (plain.settings.data.mixup, both.settings.data.mixup, both.settings.data.cutmix) == (0.0, 0.2, 1.0)
    assert (plain.name, both.name) == ("plain-seed=3", "both_at_once-seed=3")


def test_flags_of_train_stand_above_the_file_and_take_an_axis_s_place(photos: Path, tmp_path: Path) -> None:
    study = read(written(tmp_path, photos), "--train.epochs", "4", "--data.mixup=0.3", seeds="5,7")
    assert [axis.name for axis in study.axes] == ["strategy.name"]
    assert {(job.settings.train.epochs, job.settings.data.mixup) for job in study.grid()} == {(4, 0.3)}
    assert study.seeds == (5, 7)


def test_names_tell_values_apart_that_file_names_cannot(photos: Path, tmp_path: Path) -> None:
    grid = {"data.augment": ["basic,hue=off", "basic;hue=off"]}
    study = read_file(written(tmp_path, photos, grid=grid), [], tmp_path / "study")
    names = [job.name for job in study.grid()]
    assert len(set(names)) == 4
    assert not any(letter in name for name in names for letter in ",; /")


@pytest.mark.parametrize("name", named_studies())
def test_named_studies_are_sound(name: str, tmp_path: Path) -> None:
    study = read_file(find_study(name), ["--data.root", "/photos"], Path("/nowhere"))
    assert written_again(study, tmp_path) == study
    assert len(study.grid()) == len(study.seeds) * len({tuple(job.labels.values()) for job in study.grid()})
    assert len(study.seeds) >= 3


def test_the_lecture_s_exercises_are_there() -> None:
    assert {"strategies-500", "unfreezing", "ablation"} <= set(named_studies())
    sizes = {name: len(read_file(path, [], Path("x")).grid()) for name, path in named_studies().items()}
    assert (sizes["strategies-500"], sizes["unfreezing"], sizes["ablation"]) == (15, 15, 162)


SEARCH = {"optim.base_lr": {"from": "1e-4", "to": 1.0, "log": True}, "train.epochs": {"from": 1, "to": 3}}


def test_a_search_has_ranges(photos: Path, tmp_path: Path) -> None:
    search = {**SEARCH, "strategy.name": ["full", "partial"]}
    study = read(written(tmp_path, photos, grid=None, search=search, budget={"trials": 5, "keep": 1}))
    rate, epochs, strategy = study.axes
    assert rate.span is not None
    assert epochs.span is not None
    assert (rate.span.low, rate.span.high, rate.span.log, epochs.span.whole) == (1e-4, 1.0, True, True)
    assert list(strategy.choices) == ["full", "partial"]
    choices = {"optim.base_lr": 0.0123456789, "train.epochs": 2, "strategy.name": "partial"}
    job, near = study.job(choices, 0, "search"), study.job({**choices, "optim.base_lr": 0.0123456788}, 0, "search")
    assert job.settings.optim.base_lr == 0.0123456789
    assert job.name.startswith("search-base-lr=0.01235-epochs=2-partial-seed=0-".replace("base-lr", "base_lr"))
    assert job.name != near.name
    assert len(list(examples(study))) == 6
    assert written_again(study, tmp_path) == study


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"grid": {"data.mixxup": [0.1]}}, "no flag 'data.mixxup' (did you mean 'data.mixup'?)"),
        ({"flags": {"train.epoch": 3}}, "no flag 'train.epoch' (did you mean 'train.epochs'?)"),
        ({"grid": {}}, "grid: is empty"),
        ({"grid": {"strategy.name": []}}, "strategy.name has no values"),
        ({"grid": {"strategy.name": "full"}}, "give a list of values"),
        ({"grid": {"strategy.name": ["full", "full"]}}, "names a value twice"),
        ({"grid": {"strategy.name": ["ful"]}}, "strategy.name: Input should be 'scratch'"),
        ({"grid": {"data.mixup": [0.0, -1]}}, "-1: --data.mixup is -1.0: give 0 or more"),
        ({"grid": {"how": {"a": {"data.mixup": 0.1}}, "data.mixup": [0.2]}}, "varied by how and by data.mixup"),
        ({"grid": {"how": {"a": {}, "b": {}}}}, "none of its choices sets a flag"),
        ({"grid": {"data.batch_size": [8, 1000]}}, "1000: --data.batch-size 1000 is more than the 40 training images"),
        ({"grid": {"optim.base_lr": {"from": 1, "to": 2}}}, "a grid needs values"),
        ({"grid": None}, "write either grid: or search:"),
        ({"metric": "val_top5"}, "no metric 'val_top5' (did you mean"),
        ({"seeds": 0}, "give at least one"),
        ({"seeds": [1, 1]}, "none twice"),
        ({"seeds": "many"}, "are no numbers"),
        ({"recipe": "foldre"}, "no recipe 'foldre' (did you mean 'folder'?)"),
        ({"recipe": None}, "recipe: is missing"),
        ({"seed": 3}, "there is no 'seed' (did you mean 'seeds'?)"),
        ({"flags": {"seed": 3}}, "write seeds:"),
        ({"flags": {**FLAGS, "launch.workers": 2}}, "each trial runs one worker"),
        ({"budget": {"trials": 3}}, "trials is for a search"),
        ({"budget": {"hour": 3}}, "there is no 'hour' (did you mean 'hours'?)"),
        ({"grid": None, "search": SEARCH, "metric": "images_per_s"}, "that is known after each epoch"),
        ({"grid": None, "search": {"optim.base_lr": {"from": 1, "to": 1}}}, "1 to 1 is no range"),
        ({"grid": None, "search": {"optim.base_lr": {"from": 0, "to": 1, "log": True}}}, "no range on a log scale"),
        ({"grid": None, "search": {"strategy.name": {"from": 0, "to": 1}}}, "takes no numbers"),
        ({"grid": None, "search": SEARCH, "budget": {"trials": 0}}, "no number above 0"),
    ],
)
def test_bad_studies_are_told_before_anything_starts(
    changes: dict[str, Any], says: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = written(tmp_path, photos, **changes), tmp_path / "study"
    assert says in said(["study", str(path), "--dir", str(folder)], capsys)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "name a study"),
        (["strategies-50"], "no study 'strategies-50' (did you mean 'strategies-500'?)"),
        (["FILE", "--workers", "two"], "'two' is not a whole number"),
        (["FILE", "--gpus-per-trial", "2"], "a share from 0 to 1"),
        (["FILE", "--worker", "2"], "no flag --worker (did you mean '--workers'?)"),
        (["FILE", "--seed", "3"], "write seeds:"),
        (["FILE", "--launch.workers", "2"], "each trial runs one worker"),
        (["FILE", "--run-dir", "x"], "use --dir"),
        (["FILE", "--strategy.name", "full", "--data.mixup", "0"], "leave nothing that varies"),
        (["FILE", "--dir", "FOLDER"], "holds something else than a study"),
    ],
)
def test_bad_commands(
    words: list[str], says: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"FILE": str(written(tmp_path, photos)), "FOLDER": str(tmp_path)}
    assert says in said(["study", *(given.get(word, word) for word in words)], capsys)


def test_a_file_that_is_no_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.yaml"
    for text, says in (("a: [1", "is not YAML"), ("- 1", "it is no study"), ("", "it is no study")):
        path.write_text(text)
        assert says in said(["study", str(path)], capsys)


def test_finished_trials_are_not_run_again_and_others_go_on(photos: Path, tmp_path: Path) -> None:
    study = resolved(read(written(tmp_path, photos, grid={"strategy.name": ["full"], "data.mixup": [0.0]})))
    check(study)
    open_folder(study)
    first, second = left(study)
    run_job(first)
    assert [job.name for job in left(study)] == [second.name]
    before = Path(first.settings.run_dir, "metrics.jsonl").read_bytes()
    run_job(first)
    assert Path(first.settings.run_dir, "metrics.jsonl").read_bytes() == before
    # Killed between two of the files that a run begins with.
    begun = Path(second.settings.run_dir)
    (begun / "logs").mkdir(parents=True)
    (begun / "config.yaml").touch()
    run_job(second)
    assert left(study) == []
    alone = launch(read(written(tmp_path, photos), "--data.mixup", "0").grid()[2].settings, quiet=True)
    one, other = (json.loads((path / "summary.json").read_text()) for path in (begun, alone))
    assert one["val_top1"] == other["val_top1"]


def test_a_trial_of_other_settings_is_not_taken_for_this_one_s(photos: Path, tmp_path: Path) -> None:
    study = resolved(read(written(tmp_path, photos, grid={"strategy.name": ["full"]}, seeds=1)))
    open_folder(study)
    (job,) = left(study)
    run_job(job)
    assert same_run(job)
    (same,) = resolved(read(tmp_path / "mine.yaml", "--tracking.log-every", "3")).grid()
    (other,) = resolved(read(tmp_path / "mine.yaml", "--optim.base-lr", "0.7")).grid()
    assert same_run(same)
    assert not same_run(other)


def test_a_folder_of_another_study_is_left_alone(photos: Path, tmp_path: Path) -> None:
    study = read(written(tmp_path, photos))
    open_folder(study)
    open_folder(study)
    assert describe(study)["axes"] == {"strategy.name": ["full", "feature_extraction"], "data.mixup": ["0.0", "0.2"]}
    with pytest.raises(UserError, match=r"holds a study of strategy\.name, data\.mixup"):
        open_folder(read(tmp_path / "mine.yaml", "--data.mixup", "0.1"))
