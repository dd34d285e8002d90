"""`tldist bench strategies` from end to end on a tiny network, and what its figures are made of."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tldist import dist
from tldist.config import UserError
from tldist.train.inputs import features as feature_cache
from tldist_benchmarks import ceiling, harness, results, strategies
from tldist_benchmarks.harness import Series
from tldist_benchmarks.phase import HEAD, PARTIAL, Phase, Training
from tldist_benchmarks.plain import PlainLoop, plain_model
from tldist_benchmarks.pool import build_run, draw_pool
from tldist_benchmarks.results import Result
from tldist_benchmarks.strategies import Settings
from tldist_launcher.cli import main

BASELINES = ["lecture_full", "frozen_fp32", "requires_grad_only_partial", "requires_grad_only_fe"]
TRAINED = [*BASELINES, "full", "partial", "feature_extraction", "partial_cached", "fe_cached"]
VARIANTS = [*TRAINED, "prefix", "conv_ceiling"]
RATIOS = [
    "full_vs_lecture",
    "partial_vs_lecture",
    "fe_vs_lecture",
    "fe_vs_frozen_fp32",
    "partial_vs_requires_grad_only",
    "fe_vs_requires_grad_only",
    "prefix_vs_ceiling",
    "partial_cached_vs_lecture",
    "fe_cached_epoch_vs_uncached",
    "fe_ten_epochs_vs_full",
]
ROUNDS, STEPS, BATCH = 2, 2, 4
TINY = Settings(model="resnet18", image_size=32, batch_size=BATCH, rounds=ROUNDS, steps=STEPS, compile="off")
TRAINING = Training("resnet18", 32, BATCH, "bf16", "off")
FLAGS = [
    "--model", "resnet18", "--image-size=32", "--batch-size", str(BATCH), "--rounds", str(ROUNDS),
    "--steps", str(STEPS), "--compile", "off",
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What one run of the command left."""

    told: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    csv: list[dict[str, str]]
    out: Path
    text: str

    def series(self, variant: str, metric: str) -> list[float]:
        found = [row for row in self.csv if (row["variant"], row["metric"]) == (variant, metric)]
        assert [row["round"] for row in found] == ["1", "2"]
        return [float(row["value"]) for row in found]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as text:
        patch.setattr(dist, "cores", lambda: 1)
        patch.setattr(ceiling, "SECONDS", 0.02)
        patch.setattr(strategies, "CACHED_STEPS", 6)
        threads = torch.get_num_threads()
        assert main(["bench", "strategies", *FLAGS, "--out", str(out), "--json", str(out / "found.json")]) == 0
        assert torch.get_num_threads() == threads
    told = json.loads((out / "found.json").read_text())
    (path,) = out.glob("strategies-resnet18-*.csv")
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    yield Outcome(told, {row["variant"]: row for row in told["rows"]}, table, out, text.getvalue())


def test_a_row_for_every_variant(outcome: Outcome) -> None:
    assert list(outcome.rows) == VARIANTS
    for name, row in outcome.rows.items():
        numbers = [value for key, value in row.items() if key not in ("bench", "variant") and value is not None]
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in numbers)
        assert (row["images_per_s"] is None) == (name == "conv_ceiling")
        assert (row["fill_s"] is not None) == name.endswith("_cached")
        assert row["compile_s"] == (None if name in (*BASELINES, "conv_ceiling") else 0.0)
        if row["images_per_s"]:
            assert row["images_per_s_p20"] <= row["images_per_s"] <= row["images_per_s_p80"]
    assert outcome.rows["lecture_full"]["times_lecture"] == 1.0
    assert outcome.rows["conv_ceiling"]["mfu"] == 1.0


def test_both_sides_do_the_same_arithmetic(outcome: Outcome) -> None:
    work = {name: row["gflops_per_image"] for name, row in outcome.rows.items()}
    assert work["full"] == pytest.approx(work["lecture_full"], rel=1e-6)
    assert work["partial"] == pytest.approx(work["requires_grad_only_partial"], rel=1e-6)
    assert work["feature_extraction"] == pytest.approx(work["requires_grad_only_fe"], rel=1e-6)
    assert work["feature_extraction"] == pytest.approx(work["frozen_fp32"], rel=1e-6)
    assert work["prefix"] + work["fe_cached"] == pytest.approx(work["feature_extraction"], rel=1e-6)
    assert work["fe_cached"] < work["partial_cached"] < work["partial"] < work["full"]


def test_ratios_are_medians_of_the_rounds_own(outcome: Outcome) -> None:
    assert list(outcome.told["ratios"]) == RATIOS
    rate = {name: outcome.series(name, "images_per_s") for name in VARIANTS[:-1]}
    epoch = {name: outcome.series(name, "epoch_s_per_image") for name in TRAINED}
    fill = outcome.series("fe_cached", "fill_images_per_s")
    peak = outcome.series("conv_ceiling", "tflops_per_s")

    def median(above: list[float], below: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(above, below, strict=True))

    ten = [1 / rate + 10 * seconds for rate, seconds in zip(fill, epoch["fe_cached"], strict=True)]
    expected = {
        "full_vs_lecture": median(rate["full"], rate["lecture_full"]),
        "partial_vs_lecture": median(rate["partial"], rate["lecture_full"]),
        "fe_vs_lecture": median(rate["feature_extraction"], rate["lecture_full"]),
        "fe_vs_frozen_fp32": median(rate["feature_extraction"], rate["frozen_fp32"]),
        "partial_vs_requires_grad_only": median(rate["partial"], rate["requires_grad_only_partial"]),
        "fe_vs_requires_grad_only": median(rate["feature_extraction"], rate["requires_grad_only_fe"]),
        "prefix_vs_ceiling": median(outcome.series("prefix", "tflops_per_s"), peak),
        "partial_cached_vs_lecture": median(rate["partial_cached"], rate["lecture_full"]),
        "fe_cached_epoch_vs_uncached": median(epoch["feature_extraction"], epoch["fe_cached"]),
        "fe_ten_epochs_vs_full": median([10 * seconds for seconds in epoch["lecture_full"]], ten),
    }
    assert outcome.told["ratios"] == pytest.approx(expected, rel=1e-4)
    for name in RATIOS:
        assert statistics.median(outcome.series("ratios", name)) == pytest.approx(expected[name], rel=1e-4)


def test_rates_and_times_belong_together(outcome: Outcome) -> None:
    """A plain loop's epoch is its images; a fill's rate is over the images of an epoch."""
    for name in BASELINES:
        product = [
            a * b
            for a, b in zip(
                outcome.series(name, "images_per_s"), outcome.series(name, "epoch_s_per_image"), strict=True
            )
        ]
        assert product == pytest.approx([1.0] * ROUNDS, rel=1e-4)
    for name, images in (("partial_cached", STEPS * BATCH), ("fe_cached", 6 * BATCH)):
        seconds, rate = outcome.series(name, "fill_s"), outcome.series(name, "fill_images_per_s")
        assert [a * b for a, b in zip(seconds, rate, strict=True)] == pytest.approx([images] * ROUNDS, rel=1e-4)


def test_every_csv_row_says_what_it_was_measured_on(outcome: Outcome) -> None:
    first = outcome.csv[0]
    assert list(first) == [
        "bench", "started", "commit", "hardware", "cores", "threads", "python", "torch", "torchvision", "model",
        "image_size", "batch_size", "precision", "rounds", "steps", "compile", "optimizer", "classes", "variant",
        "metric", "round", "value",
    ]  # fmt: skip
    same = list(first)[:-4]
    assert all([row[key] for key in same] == [first[key] for key in same] for row in outcome.csv)
    assert (first["model"], first["image_size"], first["batch_size"], first["compile"]) == (
        "resnet18",
        "32",
        "4",
        "off",
    )
    assert first["torch"] == torch.__version__.split("+")[0]
    assert first["hardware"]
    assert {row["variant"] for row in outcome.csv} == {*VARIANTS, "ratios"}
    assert outcome.told["environment"].keys() == set(same)


def test_the_chart_and_the_tables(outcome: Outcome) -> None:
    (chart,) = outcome.out.glob("*.png")
    with Image.open(chart) as picture:
        assert picture.size[0] > 300
    assert all(name in outcome.text for name in (*VARIANTS, *RATIOS))
    assert "…" not in outcome.text


def test_targets_stand_beside_what_was_measured_at_the_default_flags(outcome: Outcome) -> None:
    (result,) = results.read_csv(next(outcome.out.glob("*.csv")))
    flags = {key: str(value) for key, value in asdict(Settings()).items() if key in result.same}
    at_defaults = results.Result({**result.same, **flags, "model": "resnet18"}, result.measured)
    for shown, there in ((at_defaults, True), (result, False)):
        cells = [cell for column in strategies.view(shown).tables[1].columns for cell in column.cells]
        assert ("at least 2.3" in cells) == there


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "needs a name: strategies or engines"),
        (["strategy"], "did you mean 'strategies'?"),
        (["strategies", "--round", "3"], "no flag --round (did you mean '--rounds'?)"),
        (["strategies", "--model", "resnet19"], "did you mean 'resnet18'?"),
        (["strategies", "--precision", "fp16"], "choose from bf16, fp32"),
        (["strategies", "--rounds", "many"], "--rounds 'many' is not a whole number"),
        (["strategies", "--steps", "0"], "--steps is 0: give 1 or more"),
        (["strategies", "--steps"], "--steps needs a value"),
        (["strategies", "--batch-size", "1"], "needs 2 images"),
        (["strategies", "--image-size", "16"], "need 32 or more"),
        (["strategies", "--model", "vit_b_16", "--image-size", "100"], "16-pixel patches"),
        (["strategies", "--out", "{file}"], "cannot make the folder"),
        (["strategies", "--json", "{file}/x.json"], "cannot make the folder"),
        (["strategies", "--json", "{folder}"], "is a folder: name a file"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    given = [word.format(file=tmp_path / "file", folder=tmp_path) for word in words]
    assert main(["bench", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tldist: ")
    assert error.count("\n") == 1
    assert says in error


def test_compiling_without_a_compiler_is_told_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="use --compile off"):
        replace(TINY, compile="on").validate()
    TINY.validate()


def test_a_missing_package_is_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tldist_benchmarks", None)
    assert main(["bench", "strategies"]) == 2
    assert "tldist_benchmarks, and it is not installed" in capsys.readouterr().err


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "strategies", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--batch-size 16" in text
    assert "--json JSON" in text
    assert main(["bench", "--help"]) == 0
    assert "strategies | engines | scaling" in capsys.readouterr().out


def test_turns_are_interleaved_and_the_warm_up_is_dropped() -> None:
    order: list[str] = []

    def turn(name: str) -> harness.Turn:
        def take() -> dict[str, float]:
            order.append(name)
            return {"turn": float(len(order))}

        return take

    found = harness.take_turns({name: turn(name) for name in "abc"}, 2, lambda text: None)
    assert "".join(order) == "abcbcacab"
    assert found["a"]["turn"].values == (6.0, 8.0)
    assert found["c"]["turn"].values == (5.0, 7.0)


def test_a_series_takes_ratios_within_rounds() -> None:
    ratio = Series((10.0, 1.0, 8.0)).over(Series((5.0, 1.0, 2.0)))
    assert ratio.values == (2.0, 1.0, 4.0)
    assert (ratio.median, ratio.percentile(0.2), ratio.percentile(0.8)) == (2.0, 1.0, 4.0)


def appended(folder: Path, **same: str) -> Path:
    return results.append_csv(folder, "rows", Result(same, {"full": {"rate": Series((1.0, 2.0))}}))


def test_a_second_run_is_appended(tmp_path: Path) -> None:
    assert appended(tmp_path, started="one") == appended(tmp_path, started="two") == tmp_path / "rows.csv"
    assert (tmp_path / "rows.csv").read_text().splitlines() == [
        "started,variant,metric,round,value",
        "one,full,rate,1,1",
        "one,full,rate,2,2",
        "two,full,rate,1,1",
        "two,full,rate,2,2",
    ]


def test_rows_with_other_columns_get_a_file_of_their_own(tmp_path: Path) -> None:
    appended(tmp_path, started="one")
    assert appended(tmp_path, started="two", more="x") == tmp_path / "rows-2.csv"
    assert appended(tmp_path, started="three") == tmp_path / "rows.csv"
    assert appended(tmp_path, started="four", more="y") == tmp_path / "rows-2.csv"
    assert (tmp_path / "rows.csv").read_text().count("\n") == 5


def test_a_pool_shows_its_images_again_where_a_run_has_more(tmp_path: Path) -> None:
    pool = draw_pool(BATCH, 32, torch.device("cpu"))
    run = build_run(TRAINING.config(tmp_path), pool, 3 * BATCH, torch.device("cpu"))
    phase = Phase(run)
    batches = list(phase.live.inputs.train(0))
    assert sum(len(batch.labels_N) for batch in batches) == 3 * BATCH == len(run.index.train)
    for batch in batches:
        assert torch.equal(batch.labels_N, pool.labels_N[torch.from_numpy(batch.ids_N % BATCH)])
        assert [run.index.train.labels_N[i] for i in batch.ids_N] == batch.labels_N.tolist()
    phase.close()


@pytest.mark.parametrize(("stages", "starts"), [(HEAD, ("fc.",)), (PARTIAL, ("layer4.", "fc.")), (10**6, ("",))])
def test_the_plain_model_freezes_by_requires_grad_alone(stages: int, starts: tuple[str, ...]) -> None:
    model = plain_model("resnet18", 32, stages)
    batches = draw_pool(BATCH, 32, torch.device("cpu")).batches(1, BATCH, torch.contiguous_format)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    PlainLoop(model, batches, None).epoch()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    parameters = {name for name, _ in model.named_parameters()}
    assert moved & parameters == {name for name in parameters if name.startswith(starts)}
    assert "bn1.running_mean" in moved  # as in other tools, frozen BatchNorm runs in train mode


def test_the_phase_and_the_plain_loop_see_the_same_pixels(tmp_path: Path) -> None:
    pool = draw_pool(2 * BATCH, 32, torch.device("cpu"))
    run = build_run(TRAINING.config(tmp_path), pool, 2 * BATCH, torch.device("cpu"))
    phase = Phase(replace(run, numbers=replace(run.numbers, dtype=torch.float32)))
    plain = torch.cat([images for images, _ in pool.batches(2, BATCH, torch.contiguous_format)])
    seen = 0
    for batch in phase.live.inputs.train(0):
        assert torch.equal(phase.live.inputs.inputs(batch), plain[torch.from_numpy(batch.ids_N)])
        assert torch.equal(batch.labels_N, pool.labels_N[torch.from_numpy(batch.ids_N)])
        seen += len(batch.labels_N)
    assert seen == 2 * BATCH
    phase.close()


def test_features_that_find_no_room_stop_the_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "room_for", lambda folder, gib: 0)
    pool = draw_pool(BATCH, 32, torch.device("cpu"))
    run = build_run(
        replace(TRAINING, strategy="feature_extraction", cached=True).config(tmp_path), pool, BATCH, torch.device("cpu")
    )
    with pytest.raises(UserError, match="no room for cached features"):
        Phase(run)
