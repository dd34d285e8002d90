"""`tldist bench scaling` and `tldist bench engines` from end to end: real groups of gloo workers, the real loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tldist_benchmarks import engines, results, scaling_view
from tldist_launcher.cli import main

TINY = ["--model", "resnet18", "--image-size", "32", "--batch-size", "2", "--workers", "2", "--rounds", "2"]
MEBI = 2**20


def ran(bench: str, out: Path, *more: str) -> tuple[dict[str, Any], results.Result]:
    """What the command left: its JSON, and its CSV as it is read again."""
    assert main(["bench", bench, *TINY, *more, "--steps", "1", "--out", str(out), "--json", str(out / "x.json")]) == 0
    (path,) = out.glob("*.csv")
    assert path.with_suffix(".png").exists()
    (result,) = results.read_csv(path)
    return json.loads((out / "x.json").read_text()), result


@pytest.mark.slow
def test_scaling_measures_every_strategy_on_every_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told, result = ran("scaling", tmp_path, "--batch-size", "4", "--scaling", "strong")
    cases = [(row["strategy"], row["workers"]) for row in told["rows"]]
    assert cases == [(s, n) for s in ("full", "partial", "feature_extraction") for n in (1, 2)]
    for strategy, n in cases:
        metrics = result.measured[f"{strategy} x{n}"]
        assert len(metrics["step_ms"].values) == len(metrics["cpu_ms"].values) == 2
        assert ("apart_ms" in metrics) == ("all_reduce_ms" in metrics) == (n > 1)
    # What trains, 4 bytes a parameter, and nothing that is frozen.
    megabytes = {row["strategy"]: row["reduced_mb"] for row in told["rows"]}
    assert megabytes["full"] == pytest.approx((11_176_512 + 513 * 10) * 4 / 1e6)
    assert megabytes["partial"] == pytest.approx((8_393_728 + 513 * 10) * 4 / 1e6)
    assert megabytes["feature_extraction"] == pytest.approx(513 * 10 * 4 / 1e6)
    two = next(row for row in told["rows"] if row["workers"] == 2)
    assert two["images_per_s"] == pytest.approx(4 / two["step_ms"] * 1e3)
    assert scaling_view.points(result)[1]["model_error"] == pytest.approx(two["model_error"], rel=1e-3)
    assert [row["gpus"] for row in told["extrapolated"]] == [1, 8, 64, 512] * 3
    text = capsys.readouterr().out
    assert "strong scaling: 4 images in all" in text
    assert "170.0 TFLOP/s" in text


@pytest.mark.slow
def test_engines_steps_all_four_in_the_real_loop(tmp_path: Path) -> None:
    told, result = ran("engines", tmp_path)
    rows = {row["variant"]: row for row in told["rows"]}
    assert tuple(rows) == engines.KINDS
    assert rows["ddp"]["over_ddp"] == 1.0
    assert all(len(result.measured[kind]["step_ms"].values) == 2 for kind in rows)
    weights = (11_176_512 + 513 * 10) * 4 / MEBI
    assert rows["ddp"]["weights_mib"] == pytest.approx(weights, rel=1e-3)
    assert rows["ddp"]["optimizer_mib"] == pytest.approx(2 * weights, rel=1e-3)
    for kind in ("zero1", "zero2", "zero3"):
        assert rows[kind]["optimizer_mib"] == pytest.approx(weights, rel=1e-2)
    assert rows["zero2"]["gradients_mib"] < rows["zero1"]["gradients_mib"]
    assert rows["zero3"]["weights_mib"] < rows["ddp"]["weights_mib"]
