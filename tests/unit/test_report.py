"""The report: self-contained, escaped, and useful whatever a run left behind."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic_run
from PIL import Image
from synthetic_run import Shape

from tldist.report import plots
from tldist.report.run_page import write_comparison, write_report
from tldist.tracking import wording
from tldist.tracking.runlog import RunLog, read

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What the tests ask of a page: its pictures, references, text and whether its tags balance."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "action")]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += " ".join(data.split()) + "\n"

    def sizes(self) -> list[tuple[int, int]]:
        """Decode every picture."""
        found = []
        for image in self.images:
            head, _, body = (image["src"] or "").partition(",")
            assert head in ("data:image/png;base64", "data:image/jpeg;base64")
            with Image.open(io.BytesIO(base64.b64decode(body, validate=True))) as decoded:
                decoded.load()
                found.append(decoded.size)
        return found


def assert_self_contained(page: Page) -> None:
    assert page.references == [image["src"] for image in page.images]
    assert all(image["alt"] for image in page.images)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in page.source
    assert "@import" not in page.source
    page.sizes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    folder = tmp_path_factory.mktemp("whole")
    run_dir = synthetic_run.write(folder / "run", data_root=folder / "data")
    return run_dir, Page(write_report(run_dir, folder / "data"))


def test_a_whole_run_makes_a_self_contained_page(whole: tuple[Path, Page]) -> None:
    run_dir, page = whole
    assert_self_contained(page)
    saved = sorted(path.name for path in (run_dir / "plots").iterdir())
    assert saved == ["confusion.png", "learning_rate.png", "loss.png", "throughput.png", "top1.png"]
    # Five figures, then twelve thumbnails at twice 112 px.
    assert page.sizes()[5:] == [(224, 224)] * 12


def test_saved_plots_are_the_ones_on_the_page(whole: tuple[Path, Page]) -> None:
    run_dir, page = whole
    inline = {image["alt"]: (image["src"] or "").partition(",")[2] for image in page.images}
    assert base64.b64decode(inline["learning rate"]) == (run_dir / "plots" / "learning_rate.png").read_bytes()


def test_key_figures_plan_and_environment_are_told(whole: tuple[Path, Page]) -> None:
    text = whole[1].text
    for expected in ("insects, gradual, resnet18", "10.5 M", "11.2 M", "identical", "0:48", "2.1 %", "240"):
        assert expected in text
    for expected in ("2. +layer4", "frozen", "0.0003", "9e-05", "torch.version", "2.11.0", "1 image skipped"):
        assert expected in text
    assert "not finished" not in text


def rows_of(page: Page, section: str) -> list[list[str]]:
    """The cells of a section's table, row by row, its heading first."""
    table = page.source.split(f"<h2>{section}</h2>")[1].split("</table>")[0]
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]


def test_phases_are_tabled_with_what_each_cost(whole: tuple[Path, Page]) -> None:
    heading, *phases = rows_of(whole[1], "Phases")
    # Nothing was compiled: no column for it.
    assert heading[:5] == ["phase", "epochs", "images/s", "GFLOP/image", "TFLOP/s"]
    assert heading[5:] == ["MFU", "data wait", "peak memory", "cache fill"]
    assert phases[0] == ["1. head", "3", "240", "3.63", "0.871", "41.5 %", "2.1 %", "1.20 GiB", "4.2 s"]
    assert phases[2] == ["3. +layer3", "4", "182", "6.67", "1.22", "57.9 %", "2.1 %", "1.80 GiB", "-"]


@pytest.mark.parametrize(
    ("peak", "share", "of"),
    [
        ((1.05, "measured"), "41.5 %", "of the measured conv peak"),
        ((2.1, "table"), "20.7 %", "of the data sheet&#39;s peak"),
    ],
)
def test_the_mfu_says_of_which_peak_it_is(peak: tuple[float, str], share: str, of: str, tmp_path: Path) -> None:
    page = Page(write_report(synthetic_run.write(tmp_path / "run", Shape(peak=peak))))
    assert re.search(rf"<dt>MFU</dt><dd>{share}<small>{of}</small>", page.source)
    assert f"MFU: {of}, {peak[0]} TFLOP/s per worker." in page.source


def test_without_a_known_peak_there_is_no_mfu(tmp_path: Path) -> None:
    page = Page(write_report(synthetic_run.write(tmp_path / "run", Shape(peak=(0.0, "unknown")))))
    assert "MFU" not in page.text
    assert "TFLOP/s" in rows_of(page, "Phases")[0]


def rewrite(run_dir: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Replace each row of metrics.jsonl by what `change` makes of it; None drops it."""
    path = run_dir / "metrics.jsonl"
    changed = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in changed if row is not None))


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_from_before_flops_were_counted_still_has_its_page(finished: bool, tmp_path: Path) -> None:
    run_dir = synthetic_run.write(tmp_path / "run")
    rewrite(run_dir, lambda row: synthetic_run.as_before(row) if finished or row["event"] != "end" else None)
    page = Page(write_report(run_dir))
    assert_self_contained(page)
    heading, *phases = rows_of(page, "Phases")
    assert heading == ["phase", "epochs", "images/s", "data wait"]
    assert [row[:2] for row in phases] == [["1. head", "3"], ["2. +layer4", "3"], ["3. +layer3", "4"]]
    assert "FLOP" not in page.text
    assert "MFU" not in page.text


def test_a_crashed_run_tells_its_phases_from_its_rows(tmp_path: Path) -> None:
    run_dir = synthetic_run.write(tmp_path / "run")
    rewrite(run_dir, lambda row: row if row.get("step", 0) <= 30 and row["event"] != "end" else None)
    first, second = read(run_dir).per_phase
    assert [first["name"], first["epochs"], first["cache_fill_s"]] == ["head", 3, 4.2]
    assert first["images_per_s"] == pytest.approx(240, abs=8)
    assert first["tflops_per_s"] == pytest.approx(240 * 3.63 / 1e3, rel=0.04)
    assert first["mfu"] == pytest.approx(0.415, abs=0.02)
    # One of its three epochs, and two steps.
    assert [second["name"], second["epochs"], second["peak_mem_gib"]] == ["+layer4", 1, 1.5]
    page = Page(write_report(run_dir))
    assert page.source.count("of a peak that is not on record") == 2


def test_mistakes_are_marked_and_come_with_what_was_said(whole: tuple[Path, Page]) -> None:
    page = whole[1]
    assert page.source.count('<figure class="wrong">') == 6
    assert "said bees 99 %, is ants" in page.text
    assert "said ants 81 %, right" in page.text


def test_names_are_escaped(tmp_path: Path) -> None:
    shape = Shape(classes=("<b>x", "$a$ & 'b'", "_hidden"), strategy="<script>alert(1)</script>")
    run_dir = synthetic_run.write(tmp_path / "run", shape, tmp_path / "data")
    page = Page(write_report(run_dir, tmp_path / "data"))
    assert_self_contained(page)
    assert "b" in page.tags  # the mark before a mistake
    assert page.tags.count("b") == 6
    assert "said $a$ & 'b' 99 %, is <b>x" in page.text
    assert "<script>alert(1)</script>" in page.text


def test_a_crashed_run_tells_how_far_it_came(tmp_path: Path) -> None:
    run_dir = synthetic_run.write(tmp_path / "run")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line).get("step", 0) <= 28 and '"end"' not in line]
    (run_dir / "metrics.jsonl").write_text("\n".join(kept) + '\n{"event": "train", "st')
    (run_dir / "summary.json").unlink()
    page = Page(write_report(run_dir))
    assert_self_contained(page)
    assert "has not finished: its last record is of step 28 of 70" in page.text
    assert "8.39 M" in page.text  # of the phase it was in
    assert len(page.images) == 4


def without_evals(run_dir: Path) -> None:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    (run_dir / "metrics.jsonl").write_text("\n".join(line for line in lines if '"eval"' not in line))


def with_nonsense(run_dir: Path) -> None:
    junk = [
        '{"event":"train","step":null,"loss":"x","lr":3}',
        '{"event":"train","step":71,"loss":NaN,"lr":{"head":Infinity},"images_per_s":NaN}',
        '{"event":"eval","step":[],"val_top1":{}}',
        '{"event":"phase","phase":"a"}',
        '{"event":"run","plan":{"no":1},"classes":7,"steps_per_epoch":0}',
        "[1,2]",
        "\x00\x01",
        '{"event":["run"]}',
    ]
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write("\n".join(junk))
    (run_dir / "predictions.json").write_text('{"classes":[1],"confusion_CC":[[1,2],[3]],"samples":[4,{}]}')
    (run_dir / "environment.json").write_text("not json")
    (run_dir / "config.yaml").write_text("a: [1")


def empty(run_dir: Path) -> None:
    for path in run_dir.iterdir():
        path.unlink()


@pytest.mark.parametrize("damage", [without_evals, with_nonsense, empty])
def test_missing_and_broken_pieces_still_make_a_page(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    run_dir = synthetic_run.write(tmp_path / "run", data_root=tmp_path / "data")
    damage(run_dir)
    page = Page(write_report(run_dir, tmp_path / "data"))
    assert_self_contained(page)
    comparison = Page(write_comparison({"one": run_dir}, tmp_path / "out", "Title", "Intro"))
    assert_self_contained(comparison)


def test_unreadable_pictures_leave_their_caption(tmp_path: Path) -> None:
    run_dir = synthetic_run.write(tmp_path / "run", data_root=tmp_path / "data")
    (tmp_path / "data" / "val" / "0" / "0.jpg").write_bytes(b"no picture")
    (tmp_path / "data" / "val" / "1" / "1.jpg").unlink()
    page = Page(write_report(run_dir))  # the data root comes from config.yaml
    assert page.text.count("picture not readable") == 2
    assert page.text.count("said ") == 12
    assert len(page.images) == 5 + 10


def test_a_resumed_run_counts_each_step_once(tmp_path: Path) -> None:
    run_dir = synthetic_run.write(tmp_path / "run")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    repeated = json.loads(lines[3]) | {"loss": 9.0}
    again = [lines[0], json.dumps(json.loads(lines[1]) | {"step": 2}), json.dumps(repeated)]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines + again) + "\n")
    log = read(run_dir)
    steps = [row["step"] for row in log.train]
    assert steps == sorted(set(steps))
    assert next(row["loss"] for row in log.train if row["step"] == repeated["step"]) == 9.0
    assert log.phases[0]["step"] == 0
    assert not log.finished  # the `end` is of the attempt before


def test_figures_mark_phases_and_group_equal_rates(tmp_path: Path) -> None:
    log = read(synthetic_run.write(tmp_path / "run"))
    loss, rates = plots.loss(log), plots.learning_rates(log)
    assert loss is not None
    assert rates is not None
    assert [text.get_text() for text in loss.axes[0].texts] == ["head", "+layer4", "+layer3"]
    boundaries = [np.asarray(line.get_xdata())[0] for line in loss.axes[0].lines[2:]]
    assert boundaries == [3.0, 6.0]
    assert rates.axes[0].get_yscale() == "log"
    assert [text.get_text() for text in rates.legends[0].get_texts()] == ["layer3", "layer4", "head"]
    same = RunLog(run=log.run, train=[row | {"lr": {"stem": 1e-3, "layer1": 1e-3, "head": 1e-2}} for row in log.train])
    grouped = plots.learning_rates(same)
    assert grouped is not None
    assert [text.get_text() for text in grouped.legends[0].get_texts()] == ["stem to layer1", "head"]


@pytest.mark.parametrize("norms", [(3.1, 3.2), (2.2, 7.9), (0.04, 900.0), (1e-7, 1e-7), (30.0, 1500.0)])
def test_a_gradient_norm_of_any_range_can_be_read_off(tmp_path: Path, norms: tuple[float, float]) -> None:
    log = read(synthetic_run.write(tmp_path / "run"))
    of_rows = np.geomspace(*norms, len(log.train))
    told = [row | {"grad_norm": y, "grad_norm_max": y} for row, y in zip(log.train, of_rows, strict=True)]
    figure = plots.gradient_norm(RunLog(run=log.run, train=told))
    assert figure is not None
    (axes,) = figure.axes
    figure.draw_without_rendering()
    low, high = axes.get_ylim()
    assert low < norms[0] <= norms[1] < high
    ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    assert len([text for y, text in ticks if low <= y <= high and text.get_text()]) >= 2


@pytest.mark.parametrize(("size", "labels"), [(2, 2), (30, 30), (31, 0)])
def test_confusion_labels_up_to_thirty_classes(size: int, labels: int) -> None:
    figure = plots.confusion([f"c{i}" for i in range(size)], [[1] * size] * size)
    assert figure is not None
    assert len(figure.axes[0].get_yticklabels()) == labels


def test_a_comparison_tables_every_run_and_marks_the_best(tmp_path: Path) -> None:
    shapes = {
        "full": Shape(strategy="full", phase_starts=(0,), best=0.9, images_per_s=180),
        "feature_extraction <b>": Shape(strategy="feature_extraction", phase_starts=(0,), best=0.8, images_per_s=420),
        "gradual": Shape(best=0.95, images_per_s=300),
    }
    runs = {name: synthetic_run.write(tmp_path / str(i), shape) for i, (name, shape) in enumerate(shapes.items())}
    path = write_comparison(runs | {"absent": tmp_path / "absent"}, tmp_path / "out", "Three <i>", "Said & done")
    page = Page(path)
    assert path == tmp_path / "out" / "report.html"
    assert_self_contained(page)
    assert "Three <i>" in page.text
    assert "Said & done" in page.text
    assert "absent (unfinished)" in page.text
    assert [part.split("<")[0] for part in page.source.split('class="best">')[1:]] == [
        "420",
        "95.6 %",
        "95.6 %",
    ]
    saved = {file.name for file in (tmp_path / "out" / "plots").iterdir()}
    assert {"top1.png", "images_per_s.png", "val_top1.png", "full-loss.png", "gradual-top1.png"} <= saved
    assert len(page.images) == 3 + 2 * 3


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (wording.count(1026), "1026"),
        (wording.count(999_999), "1.00 M"),
        (wording.count(8_393_728), "8.39 M"),
        (wording.count(11_177_538), "11.2 M"),
        (wording.count(None), "-"),
        (wording.duration(59.6), "1:00"),
        (wording.duration(3723), "1:02:03"),
        (wording.duration(float("nan")), "-:--"),
        (wording.percent(0.02), "2 %"),
        (wording.spread(0.0, 2), "0 (identical)"),
        (wording.spread(0.17, 2), "1.7e-01 (workers differ)"),
        (wording.rate(240.1), "240"),
        (wording.rate(3.14159), "3.14"),
        (wording.seconds(12.34), "12.3 s"),
        (wording.seconds(None), "-"),
        (wording.mfu({}), "-"),
        (wording.mfu({"mfu": 0.412, "peak_flops": {"source": "table"}}), "41.2 %"),
    ],
)
def test_wording(written: str, expected: str) -> None:
    assert written == expected
