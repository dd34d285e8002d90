"""A study's file: what it means, and every mistake in it as one sentence before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cli import said

from tldist import config
from tldist.config import TrainingFailed, UserError
from tldist.study.log import read_study
from tldist.train.launch import absolute
from tldist_launcher.start.launch import launch
from tldist_launcher.study.command import (
    check,
    close_search,
    conclude,
    describe,
    examples,
    kept,
    left,
    news,
    open_folder,
    outstanding,
    resolved,
    same_run,
)
from tldist_launcher.study.file import Study, find_study, named_studies, read_file, write_file
from tldist_launcher.study.trial import run_job, write_json

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
        (["DEVICES"], "fp16: --train.precision fp16 needs a GPU"),
    ],
)
def test_bad_commands(
    words: list[str], says: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "devices").mkdir()
    devices = written(tmp_path / "devices", photos, grid={"train.precision": ["bf16", "fp16"]})
    given = {"FILE": str(written(tmp_path, photos)), "FOLDER": str(tmp_path), "DEVICES": str(devices)}
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
    cut_short = Path(second.settings.run_dir)
    (cut_short / "logs").mkdir(parents=True)
    (cut_short / "config.yaml").touch()
    run_job(second)
    assert left(study) == []
    alone = launch(read(written(tmp_path, photos), "--data.mixup", "0").grid()[2].settings, quiet=True)
    one, other = (json.loads((path / "summary.json").read_text()) for path in (cut_short, alone))
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


def begun(study: Study, choices: dict[str, Any], seed: int, stage: str) -> None:
    """What a trial leaves when it begins."""
    job = study.job(choices, seed, stage)
    folder = Path(job.settings.run_dir)
    folder.mkdir()
    write_json(folder / "trial.json", {"exact": choices, "seed": seed, "stage": stage, "choices": job.labels})
    config.save(absolute(job.settings), folder / "config.yaml")


def test_a_search_that_is_resumed_with_other_flags_is_refused(photos: Path, tmp_path: Path) -> None:
    search = {**SEARCH, "strategy.name": ["full", "partial"]}
    path = written(tmp_path, photos, grid=None, search=search, seeds=2)
    study = resolved(read(path))
    open_folder(study)
    chosen = {"optim.base_lr": 0.0123456789, "train.epochs": 2, "strategy.name": "partial"}
    begun(study, chosen, 0, "search")
    begun(study, chosen, 1, "kept")
    told = (study.folder / "study.json").read_text()
    open_folder(resolved(read(path, "--tracking.log-every", "3")))
    open_folder(study)
    for words, seeds, says in (
        (["--data.mixup", "0.5"], "", "was begun with other settings"),
        ([], "1,0", "seed=0-[0-9a-f]{6} was begun with other settings"),
    ):
        with pytest.raises(UserError, match=says):
            open_folder(resolved(read(path, *words, seeds=seeds)))
    for narrower in ({"strategy.name": ["full"]}, {"optim.base_lr": {"from": 0.1, "to": 1.0}}):
        path = written(tmp_path, photos, grid=None, search=search | narrower, seeds=2)
        with pytest.raises(UserError, match="what the search no longer holds"):
            open_folder(resolved(read(path)))
    grid = {"optim.base_lr": [0.1], "train.epochs": [2], "strategy.name": ["full"]}
    with pytest.raises(UserError, match="holds a search"):
        open_folder(resolved(read(written(tmp_path, photos, grid=grid))))
    assert (study.folder / "study.json").read_text() == told


def test_a_grid_may_lose_a_value_but_not_change_a_flag(photos: Path, tmp_path: Path) -> None:
    study = resolved(read(written(tmp_path, photos)))
    open_folder(study)
    begun(study, {"strategy.name": "full", "data.mixup": "0.2"}, 0, "grid")
    open_folder(resolved(read(written(tmp_path, photos, grid={**GRID, "data.mixup": [0.0, 0.4]}))))
    with pytest.raises(UserError, match=r"full-mixup=0\.2-seed=0 was begun with other settings"):
        open_folder(resolved(read(written(tmp_path, photos), "--optim.base-lr", "0.7")))


def test_a_folder_of_another_study_is_left_alone(photos: Path, tmp_path: Path) -> None:
    study = read(written(tmp_path, photos))
    open_folder(study)
    open_folder(study)
    assert describe(study)["axes"] == {"strategy.name": ["full", "feature_extraction"], "data.mixup": ["0.0", "0.2"]}
    with pytest.raises(UserError, match=r"holds a study of strategy\.name, data\.mixup"):
        open_folder(read(tmp_path / "mine.yaml", "--data.mixup", "0.1"))


def searching(folder: Path, photos: Path, states: dict[float, str]) -> Study:
    """A search of two configurations, both of which were run: by learning rate, how each ended."""
    search = {"optim.base_lr": {"from": 0.1, "to": 0.9}}
    budget = {"trials": len(states), "keep": 1}
    study = resolved(read(written(folder, photos, grid=None, search=search, seeds=2, budget=budget)))
    open_folder(study)
    for rate, state in states.items():
        begun(study, {"optim.base_lr": rate}, 0, "search")
        run_dir = Path(study.job({"optim.base_lr": rate}, 0, "search").settings.run_dir)
        told = {"why": "wild"} if state == "failed" else {"val_top1": rate}
        write_json(run_dir / ("failed.json" if state == "failed" else "summary.json"), told)
    return study


def test_a_failed_configuration_is_a_poor_result(photos: Path, tmp_path: Path) -> None:
    study = searching(tmp_path, photos, {0.2: "finished", 0.3: "failed"})
    assert outstanding(study) == 1  # the best with the other seed
    close_search(study)
    (job,) = kept(study) or []
    assert (job.choices, job.seed) == ({"optim.base_lr": 0.2}, 1)
    with pytest.raises(TrainingFailed, match=r"seed=1-[0-9a-f]{6} did not end; the same command"):
        conclude(study)
    begun(study, job.choices, 1, "kept")
    write_json(Path(job.settings.run_dir) / "failed.json", {"why": "no disk"})
    with pytest.raises(TrainingFailed, match=r"1 trials failed, the first base_lr=0\.2-seed=1-.*: no disk; the same"):
        conclude(study)
    write_json(Path(job.settings.run_dir) / "summary.json", {"val_top1": 0.2})
    assert conclude(study) == 0


def test_where_all_configurations_failed_nothing_is_chosen_and_all_are_tried_again(
    photos: Path, tmp_path: Path
) -> None:
    study = searching(tmp_path, photos, {0.2: "failed", 0.3: "failed"})
    close_search(study)
    assert kept(study) is None
    assert outstanding(study) == 3
    with pytest.raises(TrainingFailed, match=r"2 trials failed, the first search-base_lr=0\.2-.*: wild; the same"):
        conclude(study)


def test_optuna_learns_of_failures_and_suggests_first_what_is_tried_again(photos: Path, tmp_path: Path) -> None:
    tune = pytest.importorskip("tldist_launcher.study.tune")
    study = searching(tmp_path, photos, {0.2: "finished", 0.3: "failed"})
    searcher = tune.optuna_of(study, list(read_study(study.folder).trials))
    states = {trial.params["optim.base_lr"]: trial.state.name for trial in searcher._ot_study.trials}
    assert states == {0.2: "COMPLETE", 0.3: "PRUNED"}
    chosen = searcher.suggest("new")
    searcher.on_trial_complete("new", {"val_top1": float("nan"), "training_iteration": 1})
    (last,) = [trial for trial in searcher._ot_study.trials if trial.params == chosen]
    assert last.state.name == "PRUNED"
    for path in study.folder.glob("trials/*/summary.json"):
        path.unlink()
    again = tune.optuna_of(study, list(read_study(study.folder).trials))
    assert [again.suggest(name) for name in "ab"] == [{"optim.base_lr": 0.2}, {"optim.base_lr": 0.3}]


def test_a_failed_trial_that_is_tried_again_is_news_when_it_ends(photos: Path, tmp_path: Path) -> None:
    study = searching(tmp_path, photos, {0.2: "finished", 0.3: "failed"})
    seen: dict[str, int] = {}
    assert [trial.state for trial in news(study, seen)] == ["finished", "failed"]
    assert news(study, seen) == []
    run_dir = Path(study.job({"optim.base_lr": 0.3}, 0, "search").settings.run_dir)
    (run_dir / "failed.json").unlink()
    assert news(study, seen) == []
    write_json(run_dir / "failed.json", {"why": "again"})
    assert [trial.why for trial in news(study, seen)] == ["again"]
    write_json(run_dir / "summary.json", {"val_top1": 0.3})
    assert [trial.state for trial in news(study, seen)] == ["finished"]
    assert news(study, seen) == []
