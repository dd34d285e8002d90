"""What the benches' figures are made into: scaling and its cost model, comparisons, the report."""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_images

from tldist.config import TrainingFailed, UserError
from tldist_benchmarks import compare, kernels, loaders, report, results, scaling, scaling_view
from tldist_benchmarks.cost_model import AllReduce, Link, Work, all_reduce_s, fit_link, step_s
from tldist_benchmarks.harness import Measured, Series
from tldist_benchmarks.kernels import Case
from tldist_benchmarks.results import Result
from tldist_benchmarks.workers import machines
from tldist_launcher.cli import main

ROOT = Path(__file__).parents[2]
SLOW = Link(bytes_per_s=1e9, latency_s=1e-3, hides=False)
MEBI = 2**20


# The cost model


def test_an_all_reduce_moves_almost_twice_its_bytes_and_hops_up_and_down_a_tree() -> None:
    assert all_reduce_s(1e9, 1, 1, SLOW) == 0.0
    assert all_reduce_s(1e9, 1, 2, SLOW) == pytest.approx(1.0 + 2e-3)
    assert all_reduce_s(1e9, 3, 8, SLOW) == pytest.approx(2 * 7 / 8 + 3 * 6e-3)


def test_what_hides_is_all_but_the_last_bucket_and_no_longer_than_the_backward_pass() -> None:
    work = Work(compute_s=1.0, backward_s=0.6, reduced_bytes=4 * 25 * MEBI)
    assert work.buckets == 4
    whole = all_reduce_s(work.reduced_bytes, 4, 2, SLOW)
    assert step_s(work, 2, SLOW) == pytest.approx(1.0 + whole)
    beside = replace(SLOW, hides=True)
    assert step_s(work, 2, beside) == pytest.approx(1.0 + whole / 4)
    assert step_s(replace(work, backward_s=0.01), 2, beside) == pytest.approx(1.0 + whole - 0.01)
    assert step_s(work, 1, beside) == 1.0


def test_a_fit_finds_the_link_that_made_the_times() -> None:
    sizes = [(94e6, 4), (60e6, 3), (8e4, 1)]
    made = [AllReduce(b, k, n, all_reduce_s(b, k, n, SLOW)) for b, k in sizes for n in (2, 4)]
    found = fit_link(made, hides=False)
    assert (found.bytes_per_s, found.latency_s) == pytest.approx((1e9, 1e-3))
    assert fit_link([AllReduce(1e6, 1, 2, 1e-3)], hides=False).latency_s >= 0


def test_groups_double_on_one_machine_and_then_over_machines() -> None:
    assert scaling.group_sizes(2, 1) == [[1], [2]]
    assert scaling.group_sizes(6, 1) == [[1], [2], [4], [6]]
    assert scaling.group_sizes(4, 3) == [[1], [2], [4], [4, 4], [4, 4, 4]]


# Scaling's figures


def scaled(**same: Any) -> Result:
    """Two strategies on 1, 2 and (on a second machine) 4 workers."""
    flags = {"bench": "scaling", "started": "2026-11-25T10:00:00", "commit": "abc", "hardware": "EPYC", "cores": 2}
    flags |= {"threads": 1, "python": "3", "torch": "2", "torchvision": "0", "model": "resnet50", "image_size": 224}
    flags |= {"batch_size": 8, "scaling": "weak", "workers": 0, "precision": "bf16", "compile": "off", "rounds": 3}
    flags |= {"steps": 3, "gpu_tflops": 100.0, "gpu_batch_size": 100, "gpus_per_node": 8, "node_gb_per_s": 100.0}
    flags |= {"network_gb_per_s": 10.0, "network_latency_us": 10.0, "machines": 2, "most_workers": 4, "device": "cpu"}

    def measured(*milliseconds: float) -> dict[str, Series]:
        step, apart, reduce = milliseconds
        return {
            "step_ms": Series((step, step + 1, step - 1)),
            "cpu_ms": Series((step / 2,) * 3),
            "apart_ms": Series((apart, apart + 1, apart - 1)),
            "all_reduce_ms": Series((reduce,) * 3),
        }

    def alone(step: float, megabytes: float, gflops: Sequence[float]) -> dict[str, Series]:
        parts = zip(("prefix_gflops", "forward_gflops", "backward_gflops"), gflops, strict=True)
        steps = {"step_ms": Series((step, step + 1, step - 1)), "cpu_ms": Series((step,) * 3)}
        return {**steps, "reduced_mb": Series((megabytes,))} | {part: Series((g,)) for part, g in parts}

    found: Measured = {
        "full x1": alone(100, 100, (0, 8, 16)),
        "full x2": measured(125, 104, 20),
        "full x4": measured(200, 104, 90),
        "head x1": alone(50, 0.1, (8, 0.002, 0.004)),
        "head x2": measured(50, 50, 0.02),
        "head x4": measured(50, 50, 0.09),
    }
    return Result(flags | same, found)


def test_points_say_what_is_lost_and_where() -> None:
    points = {(row["strategy"], row["workers"]): row for row in scaling_view.points(scaled())}
    two, four = points["full", 2], points["full", 4]
    assert points["full", 1]["efficiency"] == 1.0
    assert two["efficiency"] == pytest.approx(100 / 125)
    assert two["apart_efficiency"] == pytest.approx(100 / 104)
    assert two["cpu_efficiency"] == pytest.approx(100 / (125 / 2))
    assert two["in_step_ms"] == 21
    assert two["alone_ms"] == 20
    assert two["images_per_s"] == pytest.approx(16 / 0.125)
    # 100 ms of compute and what the all-reduces that were measured alone say; links are fitted for near and far apart
    assert two["model_ms"] == pytest.approx(120, rel=1e-2)
    assert two["model_error"] == pytest.approx(-5 / 125, abs=1e-2)
    assert four["model_ms"] == pytest.approx(190, rel=1e-2)
    assert points["head", 4]["model_error"] == pytest.approx(0, abs=1e-2)


def test_strong_scaling_shares_one_workers_images() -> None:
    two = next(row for row in scaling_view.points(scaled(scaling="strong")) if row["workers"] == 2)
    assert two["efficiency"] == pytest.approx(100 / 125 / 2)
    assert two["images_per_s"] == pytest.approx(8 / 0.125)
    assert two["model_ms"] == pytest.approx(50 + 20, rel=1e-2)


def test_gpus_are_taken_as_assumed_or_as_measured() -> None:
    rows = {(row["strategy"], row["gpus"]): row for row in scaling_view.extrapolated(scaled())}
    assert rows["full", 1]["step_ms"] == pytest.approx(24 * 100 / 100)  # GFLOP, images, TFLOP/s
    assert rows["full", 8]["all_reduce_ms"] == pytest.approx(2 * 7 / 8 * 100e6 / 100e9 * 1e3)
    assert rows["full", 64]["all_reduce_ms"] == pytest.approx(2 * 63 / 64 * 10 + 4 * 12 * 0.01)
    assert rows["full", 64]["efficiency"] < rows["full", 8]["efficiency"] < 1.0
    assert rows["head", 512]["images_per_s"] == pytest.approx(512 * 100 / rows["head", 512]["step_ms"] * 1e3)
    measured = {(r["strategy"], r["gpus"]): r for r in scaling_view.extrapolated(scaled(device="cuda"))}
    assert measured["full", 1]["step_ms"] == 100
    assert measured["full", 1]["images_per_s"] == pytest.approx(8 / 0.1)
    assert "as measured here" in scaling_view.assumptions(scaled(device="cuda"))


def test_a_csv_read_back_says_what_was_written(tmp_path: Path) -> None:
    written = scaled()
    path = results.append_csv(tmp_path, "scaling", written)
    results.append_csv(tmp_path, "scaling", scaled(started="2026-11-25T11:00:00"))
    first, second = results.read_csv(path)
    assert first.same["started"] < second.same["started"]
    assert scaling_view.points(first) == [pytest.approx(row) for row in scaling_view.points(written)]
    assert scaling_view.assumptions(first) == scaling_view.assumptions(written)
    assert [r.same["started"] for r in results.latest([first, second])] == ["2026-11-25T11:00:00"]
    results.write_json(str(tmp_path / "x.json"), written, [])
    assert results.read_json(tmp_path / "x.json").measured == written.measured


def test_kernels_write_rows_and_json_as_the_others_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, kernels.Call] = {"cpu": lambda i: torch.zeros(10), "reference": lambda i: torch.zeros(1000)}
    monkeypatch.setattr(kernels, "_cases", lambda device: [Case("mmd", "64x8", 1000, 2, calls)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "kernels", "--rounds", "3", "--out", str(tmp_path), "--json", str(tmp_path / "k.json")]) == 0
    (path,) = tmp_path.glob("kernels-*.csv")
    (result,) = results.read_csv(path)
    assert list(result.variants) == ["mmd/64x8/copy", "mmd/64x8/cpu", "mmd/64x8/reference"]
    assert len(result.measured["mmd/64x8/cpu"]["us"].values) == 3
    told = json.loads((tmp_path / "k.json").read_text())
    assert [row["variant"] for row in told["rows"]] == ["copy", "cpu", "reference"]
    assert told["compared"]["mmd/64x8"]["reference_over_cpu"] > 0
    (table,) = kernels.view(result).tables
    assert "| mmd, 64x8, reference |" in report.markdown(table)
    assert compare.compare(result, results.read_json(tmp_path / "k.json"), compare.Settings())[0].metric == "us"


# Machines and workers


def marked(mark: str) -> list[str]:
    """Processes that inherited it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


def test_a_worker_that_fails_is_told_and_all_processes_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLDIST_TEST", mark := uuid.uuid4().hex)
    with machines() as found:
        assert found.found[0].cores >= 1
        with pytest.raises(TrainingFailed, match="worker 0 of 1 of the bench failed: TypeError"):
            found.group([1], 1, divmod, None)  # cannot divide a place
        assert len(marked(mark)) >= 1
    assert "Traceback" in capsys.readouterr().err
    assert marked(mark) == []


# Compare


def rounds(values: Mapping[str, Sequence[float]], **same: Any) -> Result:
    flags = {"bench": "engines", "started": "2026-11-25T10:00:00", "commit": "abc", "hardware": "EPYC", "cores": 2}
    measured = {name: {"step_ms": Series(tuple(found)), "gib": Series((1.0,))} for name, found in values.items()}
    return Result({**flags, "threads": 1, "model": "resnet50", **same}, measured)


def noisy(median: float, seed: int, count: int = 9) -> list[float]:
    return (median * np.exp(np.random.default_rng(seed).normal(0, 0.03, count))).tolist()


def changes(a: Result, b: Result, **flags: Any) -> dict[str, str]:
    return {c.variant: c.verdict for c in compare.compare(a, b, compare.Settings(**flags))}


def test_noise_is_no_change_and_a_change_is_none_of_noise() -> None:
    a = rounds({"ddp": noisy(100, 1), "zero1": noisy(100, 2), "zero2": noisy(100, 3)})
    b = rounds({"ddp": noisy(100, 4), "zero1": noisy(120, 5), "zero2": noisy(85, 6)})
    assert changes(a, b) == {"ddp": "no change shown", "zero1": "worse", "zero2": "better"}
    assert changes(a, b, least=30.0) == dict.fromkeys(("ddp", "zero1", "zero2"), "no change shown")


def test_noise_alone_is_seldom_called_a_change() -> None:
    """Of 100 comparisons of equal runs at most the 5 % that the correction allows, and a few by chance."""
    false = 0
    for seed in range(100):
        a, b = (rounds({name: noisy(100, 10 * seed + 5 * k + i) for i, name in enumerate("vwxyz")}) for k in (0, 1))
        false += any(verdict != "no change shown" for verdict in changes(a, b).values())
    assert false <= 12


def test_a_load_that_slows_all_alike_cancels_over_a_variant() -> None:
    load = [1.0, 1.4, 1.1, 1.9, 1.2, 1.6, 1.3]
    plain = {"ddp": noisy(100, 1, 7), "zero1": noisy(110, 2, 7)}
    loaded = {name: [v * x for v, x in zip(values, load, strict=True)] for name, values in plain.items()}
    assert changes(rounds(plain), rounds(loaded))["zero1"] == "worse"
    assert changes(rounds(plain), rounds(loaded), over="ddp") == {"zero1": "no change shown"}


def test_few_rounds_show_nothing_and_are_told() -> None:
    assert changes(rounds({"ddp": [1, 2, 3]}), rounds({"ddp": [7, 8, 9]})) == {"ddp": "too few rounds"}


@pytest.mark.parametrize(
    "metric", ["step_ms", "fill_s", "us", "weights_mib", "epoch_s_per_image", "images_per_s", "tflops_per_s", "x_vs_y"]
)
def test_which_way_is_better(metric: str) -> None:
    assert compare.less_is_better(metric) is (metric not in ("images_per_s", "tflops_per_s", "x_vs_y"))


def test_other_hardware_is_refused_unless_it_is_asked_for() -> None:
    a, b = rounds({"ddp": noisy(100, 1)}), rounds({"ddp": noisy(50, 2)}, hardware="Xeon")
    with pytest.raises(UserError, match=r"different hardware \(hardware EPYC and Xeon"):
        changes(a, b)
    assert changes(a, b, hardware="any") == {"ddp": "better"}
    with pytest.raises(UserError, match=r"different things \(model resnet50 and resnet18"):
        changes(a, rounds({"ddp": [1.0]}, model="resnet18"), hardware="any")


def test_loaders_on_other_photos_are_not_compared(tmp_path: Path) -> None:
    """What they were measured on stands in the rows; earlier ones, without it, can still be read."""
    told = []
    for name, sides in (("few", (40, 40)), ("many", (40, 40, 80))):
        write_images(tmp_path / name, {"a": len(sides)})
        files = sorted((tmp_path / name).rglob("*.jpg"))
        split = loaders._split({str(path.relative_to(tmp_path / name)): (48, 48) for path in files})
        told.append(loaders.facts_of(tmp_path / name, split))
        assert told[-1]["photos"] == len(sides)
        assert told[-1]["photo_kb"] == pytest.approx(sum(p.stat().st_size for p in files) / len(files) / 1e3, abs=0.05)
    a, b = (rounds({"dali": noisy(100, seed)}, bench="loaders", **facts) for seed, facts in enumerate(told))
    with pytest.raises(UserError, match=r"different things \(photos 2 and 3"):
        changes(a, b)
    assert results.read_csv(ROOT / "benchmarks" / "results" / "loaders-2026-11-25.csv")


def test_kernels_are_drawn_against_their_compiled_references() -> None:
    us = {"copy": 10.0, "cpu": 20.0, "compiled": 30.0, "reference": 60.0}
    measured = {
        f"mix_normalize/none/{name}": {metric: Series((value,)) for metric, value in
            (("us", time), ("host_us", time), ("bytes_moved", 1e6))}
        for name, time in us.items()
    }  # fmt: skip
    view = kernels.view(Result(rounds({}).same, measured))
    assert view.chart is not None
    axes: Any = view.chart.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mix_normalize, none"]
    assert [bar.get_width() for bar in axes.containers[0].patches] == [1.5]


def test_the_command_exits_with_one_where_something_got_worse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = tmp_path / "a.csv", tmp_path / "b.json"
    for started, median in (("2026-11-25T10:00:00", 100), ("2026-11-25T11:00:00", 100)):
        results.append_csv(tmp_path, "a", rounds({"ddp": noisy(median, 1)}, started=started))
    results.write_json(str(after), rounds({"ddp": noisy(130, 2)}, commit="def"), [])
    assert main(["bench", "compare", str(before), str(after), "--json", str(tmp_path / "found.json")]) == 1
    told = capsys.readouterr().out
    assert "worse: ddp" in told
    assert "commit: abc -> def" in told
    assert '"verdict": "worse"' in (tmp_path / "found.json").read_text()
    assert main(["bench", "compare", f"{before}@2026-11-25T10", str(before)]) == 0
    assert main(["bench", "compare", f"{before}@2027", str(before)]) == 2
    assert "has no run that started 2027: it has 2026-11-25T10:00:00, 2026-11-25T11:00:00" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["compare", "a.csv"], "needs two files"),
        (["compare", "a.csv", "b.csv"], "there is no file a.csv"),
        (["compare", "bad.csv", "bad.csv"], "is not a bench's CSV"),
        (["compare", "bad.json", "bad.json"], "is not what a bench writes with --json"),
        (["compare", "a", "b", "--lest", "3"], "did you mean '--least'?"),
        (["report", "--document", "none.md"], "there is no document none.md"),
        (["report", "--document", "bad.csv", "--results", "none"], "there is no CSV in none"),
        (["scaling", "--gpu-tflops", "many"], "'many' is not a number"),
        (["scaling", "--gpu-tflops", "-3"], "give a number above 0"),
        (["scaling", "--scaling", "big"], "choose from weak, strong"),
        (["engines", "--batch-size", "1"], "needs 2 images"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.csv").write_text("a,b\n1,2\n")
    Path("bad.json").write_text("{}")
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error


# Report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The committed results, and one of scaling."""
    made = tmp_path / "results"
    shutil.copytree(ROOT / "benchmarks" / "results", made, ignore=shutil.ignore_patterns("*.png"))
    results.append_csv(made, "scaling-resnet50-2026-11-25", scaled())
    return made


def test_the_report_fills_its_markers_keeps_the_prose_and_changes_nothing_twice(folder: Path, tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    document.write_text("# Prose\nkept\n<!-- results of scaling -->\nold\n<!-- end of results -->\nkept too\n")
    words = ["bench", "report", "--results", str(folder), "--document", str(document)]
    assert main(words) == 0
    text = document.read_text()
    pictures = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert text.startswith("# Prose\nkept\n<!-- results of scaling -->\n")
    assert "\n<!-- end of results -->\nkept too\n" in text
    assert "\nold\n" not in text
    assert "| full | 2 | 125 | 128 | 0.800 | 0.798..0.802 | 1.600 |" in text
    assert 'src="results/scaling-resnet50-2026-11-25.png"' in text
    assert "## strategies: results\n<!-- results of strategies -->" in text
    shown = (folder / "report.html").read_text()
    assert "scaling: resnet50" in shown
    assert '<td class="number">0.798..0.802</td>' in shown
    assert shown.count('src="data:image/png;base64,') == len(pictures)
    assert {"scaling-resnet50-2026-11-25.png", "strategies-resnet50-2026-11-24.png"} <= pictures.keys()
    assert main(words) == 0
    assert document.read_text() == text
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == pictures


def test_a_marker_without_its_end_is_told(folder: Path) -> None:
    with pytest.raises(UserError, match="without '<!-- end of results -->'"):
        report.insert("<!-- results of engines -->\n", "engines", "")


def test_the_documents_tables_are_those_of_the_rows() -> None:
    """docs/benchmarks.md is what `tldist bench report` would write."""
    document = ROOT / "docs" / "benchmarks.md"
    text = document.read_text()
    for path in (ROOT / "benchmarks" / "results").glob("*.csv"):
        for result in results.latest(results.read_csv(path)):
            for table in report.VIEWS[result.bench](result).tables:
                assert report.markdown(table) in text
