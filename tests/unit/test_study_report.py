"""A study's tables, sentences and page, from a made-up directory."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import synthetic_study
from test_report import Page, assert_self_contained

from tldist.study.log import read_study
from tldist.study.page import as_csv, as_json, conclusions, families, markdown, table_of, write_study

TWO_AXES = {"strategy.name": ["partial", "full"], "data.mixup": ["0.0", "0.2"]}
FOUR_ARMS = {"partial/0.0": (0.80, 300), "partial/0.2": (0.80, 300), "full/0.0": (0.90, 200), "full/0.2": (0.91, 200)}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic_study.write(tmp_path_factory.mktemp("study") / "study")


def test_the_table_has_an_arm_a_row_with_mean_and_interval(study: Path) -> None:
    head, *rows = table_of(read_study(study))
    assert head[:4] == ["", "runs", "top-1", "best epoch"]
    assert head[-3:] == ["images/s", "core-seconds", "peak memory"]
    assert [row[:2] for row in rows] == [["feature_extraction", "3"], ["partial", "3"], ["full", "3"]]
    assert all(" ± " in row[2] for row in rows)
    assert [row[6] for row in rows] == ["420", "300", "180"]
    # 70 steps of 0.6 s, 6 s around them, two cores.
    assert rows[0][7] == "96"


def test_means_are_those_of_the_summaries(study: Path) -> None:
    found = {arm["arm"]["strategy.name"]: arm for arm in as_json(read_study(study))["arms"]}
    values = [json.loads(p.read_text())["val_top1"] for p in study.glob("trials/full-*/summary.json")]
    assert found["full"]["val_top1"]["mean"] == pytest.approx(sum(values) / 3)
    assert found["full"]["val_top1"]["n"] == 3


def test_seeds_that_agree_to_the_image_have_an_interval_all_the_same(tmp_path: Path) -> None:
    folder = synthetic_study.write(tmp_path / "study")
    for path in folder.glob("trials/full-seed=[12]"):
        shutil.copy(folder / "trials" / "full-seed=0" / "metrics.jsonl", path)
        shutil.copy(folder / "trials" / "full-seed=0" / "summary.json", path)
    log = read_study(folder)
    (told,) = [row for row in table_of(log) if row[0] == "full"]
    assert all(re.search(r" ± 0\.5 %$", cell) for cell in told[2:6]), told
    (arm,) = [arm for arm in as_json(log)["arms"] if arm["arm"]["strategy.name"] == "full"]
    assert arm["images_per_s"]["half"] == 0


def test_what_is_real_and_what_is_noise_is_said(study: Path) -> None:
    said = " ".join(conclusions(read_study(study)))
    assert re.search(r"partial is 9\.9 ± [\d.]+ points above feature_extraction \(p = 0\.00\d, 3 seeds\)\.", said)
    assert re.search(r"full is 11\.0 ± [\d.]+ points above feature_extraction \(p < 0\.001, 3 seeds\)\.", said)
    assert "1 of 3 differences cannot be told from noise" in said


def test_axes_are_compared_over_all_else(tmp_path: Path) -> None:
    log = read_study(synthetic_study.write(tmp_path / "study", arms=FOUR_ARMS, axes=TWO_AXES))
    strategy, mixup, best = families(log)
    (difference,) = strategy.differences
    assert (difference.first, difference.second, difference.seeds) == ("partial", "full", 3)
    assert difference.is_real
    assert mixup.differences[0].seeds == 3
    assert not mixup.differences[0].is_real
    assert best.title == "The best, full, mixup 0.2, against each other"
    assert len(best.differences) == 3


def test_one_seed_is_told_to_prove_nothing(tmp_path: Path) -> None:
    log = read_study(synthetic_study.write(tmp_path / "study", seeds=(0,)))
    assert conclusions(log) == ["One seed: nothing can be said of any difference. Give more seeds."]
    assert "one seed: no test" in markdown(log)
    log = read_study(synthetic_study.write(tmp_path / "two axes", seeds=(0,), arms=FOUR_ARMS, axes=TWO_AXES))
    assert conclusions(log) == ["One seed: nothing can be said of any difference. Give more seeds."]
    log = read_study(synthetic_study.write(tmp_path / "one arm", arms={"full": (0.9, 200)}))
    assert conclusions(log) == []


def test_a_difference_that_only_one_seed_has_seen_is_told_apart(tmp_path: Path) -> None:
    folder = synthetic_study.write(tmp_path / "study")
    for seed in (1, 2):
        (folder / "trials" / f"full-seed={seed}" / "summary.json").unlink()
    assert "nothing can be said of 2 differences seen with one seed." in conclusions(read_study(folder))


def test_csv_and_markdown_hold_the_same_arms(study: Path) -> None:
    log = read_study(study)
    rows = list(csv.DictReader(as_csv(log).splitlines()))
    assert [row["strategy.name"] for row in rows] == list(synthetic_study.ARMS)
    assert float(rows[1]["val_top1_half_width"]) > 0
    assert markdown(log).count("| partial |") == 3


def test_the_page_is_self_contained_and_tells_all(study: Path) -> None:
    page = Page(write_study(study))
    assert_self_contained(page)
    for expected in ("Which <strategy>?", "Which differences are real", "core-seconds", "full-seed=2", "torch.version"):
        assert expected in page.text
    assert len(page.images) == 2
    assert {path.name for path in study.iterdir()} >= {"table.md", "table.csv", "table.json", "report.html"}


def fail(run_dir: Path) -> None:
    (run_dir / "summary.json").unlink()
    (run_dir / "failed.json").write_text('{"why": "the disk is full"}')


def test_a_search_s_failures_are_told_as_poor_results(tmp_path: Path) -> None:
    folder = synthetic_study.write(tmp_path / "study", seeds=(0,), stage="search")
    fail(folder / "trials" / "full-seed=0")
    page = Page(write_study(folder))
    assert "Not all trials are finished" not in page.text
    _, after = page.text.split("What was tried")
    assert after.index("partial") < after.index("feature_extraction") < after.index("failed: the disk is full")


def test_trials_that_did_not_end_are_told_and_do_not_count(tmp_path: Path) -> None:
    folder = synthetic_study.write(tmp_path / "study")
    fail(folder / "trials" / "full-seed=0")
    (folder / "trials" / "partial-seed=0" / "summary.json").unlink()
    page = Page(write_study(folder))
    assert [row[1] for row in table_of(read_study(folder))[1:]] == ["3", "2", "2"]
    assert "1 interrupted, 1 failed" in page.text
    assert "failed: the disk is full" in page.text
