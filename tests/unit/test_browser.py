"""Every report in a real browser: nothing missing, nothing fetched, nothing too wide for a phone."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
import synthetic_run
import synthetic_study
from browser import Browser, Seen
from synthetic_run import Shape

from tldist.report.run_page import write_comparison, write_report
from tldist.study.page import write_study
from tldist_benchmarks import page, report, results

LONG = tuple(f"a class with a rather long name, number {i}" for i in range(12))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    browser.chromium()
    with Browser() as one:
        yield one


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    run = synthetic_run.write(folder / "run", Shape(), folder / "data")
    wide = synthetic_run.write(folder / "wide", Shape(classes=LONG), folder / "wide-data")
    arms = {f"{s}/{m}": (0.8 + 0.01 * len(m), 300.0) for s in ("partial", "full") for m in ("resnet50", "vit_b_16")}
    axes = {"strategy.name": ["partial", "full"], "model.name": ["resnet50", "vit_b_16"]}
    strategies, loaders = (bench_result(folder / "results", name) for name in ("strategies-resnet50", "loaders"))
    return {
        "run": write_report(run, folder / "data"),
        "long names": write_report(wide, folder / "wide-data"),
        "comparison": write_comparison({"one": run, "two": wide}, folder / "both", "Two runs", "Side by side"),
        "study": write_study(synthetic_study.write(folder / "study", arms=arms, axes=axes)),
        "bench": page.write(strategies),
        "benches": page.write_all([strategies, loaders], folder / "results" / "report.html"),
    }


def bench_result(folder: Path, name: str) -> page.Shown:
    """A committed one, its chart drawn in `folder`."""
    source = next((Path(__file__).parents[2] / "benchmarks" / "results").glob(f"{name}-*.csv"))
    result = results.read_csv(source)[-1]
    return page.draw(result, report.VIEWS[result.bench](result), folder / source.name)


def assert_fine(seen: Seen, width_px: int) -> None:
    assert dataclasses.replace(seen, screenshot=b"").errors == []
    assert seen.asked_for == []
    assert seen.missing == []
    assert seen.images > 0
    assert (seen.too_wide, seen.scroll_px) == ([], width_px)
    assert seen.type_px >= 12  # legible without zooming


@pytest.mark.parametrize("width_px", [390, 1280])
@pytest.mark.parametrize("name", ["run", "long names", "comparison", "study", "bench", "benches"])
def test_reports_show_whole(name: str, width_px: int, chromium: Browser, pages: dict[str, Path]) -> None:
    seen = chromium.look(pages[name], width_px)
    if folder := os.environ.get("TLDIST_SCREENSHOTS"):
        Path(folder, f"{name.replace(' ', '-')}-{width_px}.png").write_bytes(seen.screenshot)
    assert_fine(seen, width_px)


@pytest.mark.parametrize(
    ("fault", "found_in"),
    [
        ('<img src="data:image/png;base64,AAAA" alt="broken">', "missing"),
        ('<img src="absent.png" alt="absent">', "errors"),
        ('<img src="http://example.org/x.png" alt="remote">', "asked_for"),
        ("<script>undefined_name()</script>", "errors"),
        ('<div style="width: 900px">wide</div>', "too_wide"),
    ],
)
def test_a_fault_is_seen(fault: str, found_in: str, chromium: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    page = tmp_path / "faulty.html"
    page.write_text(pages["run"].read_text().replace("</main>", f"{fault}</main>"))
    assert getattr(chromium.look(page, 390), found_in)
