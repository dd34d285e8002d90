"""`tldist predict` and `tldist evaluate`: every file is answered, and the answers are those of evaluation."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tldist.checkpoints import checkpoint
from tldist.config import UserError
from tldist.data.augment import draw_views
from tldist.data.load.torchvision_loader import evaluation_square, show
from tldist.data.presets import AugmentSpec
from tldist.data.source.files import find_files
from tldist.trained.model import open_run, validation_images
from tldist.trained.predict import predict
from tldist_launcher.cli import main

PROBLEMS = {
    "clip.gif": "GIF is not supported",
    "cut.jpg": "truncated: the end of the file is missing",
    "cut.png": "truncated: the end of the file is missing",
    "deep.png": "PNG pixels of type I;16 are not supported: convert it to 8-bit RGB",
    "empty.jpg": "empty file",
    "folder.jpg": "a folder, not an image",
    "gone.jpg": "broken link",
    "note.jpg": "not an image",
    "notes.txt": "not an image",
    "pipe.jpg": "not a file",
}


@pytest.fixture
def mixed(photos: Path, tmp_path: Path) -> Path:
    """Three images among ten things that are none."""
    folder = tmp_path / "mixed"
    (folder / "below").mkdir(parents=True)
    source = sorted((photos / "val" / "ants").iterdir())
    shutil.copy(source[0], folder / "a photo.jpg")
    shutil.copy(source[1], folder / "below" / "z.jpg")
    image = Image.open(source[2])
    image.save(folder / "b.png")
    image.save(folder / "clip.gif")
    (folder / "cut.jpg").write_bytes(source[0].read_bytes()[:900])
    (folder / "cut.png").write_bytes((folder / "b.png").read_bytes()[:4000])
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(folder / "deep.png")
    (folder / "empty.jpg").touch()
    (folder / "folder.jpg").mkdir()
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "loop").symlink_to(folder)
    for name in ("note.jpg", "notes.txt", ".hidden.jpg"):
        (folder / name).write_text("hello")
    os.mkfifo(folder / "pipe.jpg")
    return folder


def test_each_bad_file_is_named_and_the_rest_predicted(
    trained_run: Path, mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(trained_run), str(mixed), "--batch-size", "2"]) == 1
    said = capsys.readouterr()
    for name, problem in PROBLEMS.items():
        assert said.err.count(f"cannot predict {mixed / name}: {problem}\n") == 1
    assert [line.split(": ")[0] for line in said.out.splitlines()] == [
        str(mixed / name) for name in ("a photo.jpg", "b.png", "below/z.jpg")
    ]
    last = said.err.splitlines()[-1]
    assert last.startswith("3 of 13 files in ")
    assert last.endswith(" images/s; 10 could not be read")
    assert main(["predict", str(trained_run), str(mixed / "b.png")]) == 0


def test_a_folder_that_cannot_be_read_is_named(
    trained_run: Path, mixed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is called like an image. Tests run as root, to whom no folder is closed."""
    (named := mixed / "below" / "closed.jpg").mkdir()
    (named / "x.jpg").write_text("not seen")
    scandir, closed = os.scandir, {mixed / "below", named, mixed / "folder.jpg"}

    def denied(path: str | Path) -> Any:
        if Path(path) in closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    def problems(*paths: Path) -> dict[str, str]:
        assert main(["predict", str(trained_run), *map(str, paths), "--json"]) == 1
        return {row["path"]: row["problem"] for row in json.loads(capsys.readouterr().out)["unreadable"]}

    monkeypatch.setattr(os, "scandir", denied)
    reason = "cannot be read: Permission denied"
    told = problems(mixed)
    assert {told[str(folder)] for folder in (mixed / "below", mixed / "folder.jpg")} == {reason}
    closed.remove(mixed / "below")
    assert problems(mixed / "below") == {str(named): reason}
    assert problems(named) == {str(named): reason}


def test_json_and_csv(trained_run: Path, mixed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(trained_run), str(mixed), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert {Path(row["path"]).name: row["problem"] for row in told["unreadable"]} == PROBLEMS
    assert main(["predict", str(trained_run), str(mixed), "--csv", "--top", "1"]) == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 13
    by_path = {row["path"]: row for row in rows}
    for row in told["predictions"]:
        assert sum(said["confidence"] for said in row["top"]) == pytest.approx(1)
        assert row["top"][0]["confidence"] >= row["top"][1]["confidence"]
        same = by_path[row["path"]]
        assert (same["class_1"], float(same["confidence_1"])) == tuple(row["top"][0].values())
        assert same["problem"] == ""
    assert sum(bool(row["problem"]) for row in rows) == 10


def test_predictions_are_those_of_evaluation(
    photos: Path, trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same pixels, the same classes, and the accuracy that training saw."""
    assert main(["evaluate", str(trained_run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    trained = open_run(trained_run)
    assert told["top1"] == trained.card.val_top1 == checkpoint.read_state(trained_run / "checkpoints/best")[0].val_top1
    assert told["temperature"] == pytest.approx(told["best_temperature"], rel=1e-3)
    assert told["images"] == 19
    assert {row["name"]: row["images"] for row in told["classes"]} == {"ants": 9, "bees": 10}
    paths = find_files([str(photos / "val")])
    found = list(predict(trained.classifier(torch.device("cpu")), paths, batch_size=4))
    assert [prediction.path for prediction in found] == paths
    right = sum(prediction.top[0][0] == prediction.path.parent.name for prediction in found)
    assert right / 19 == told["top1"]


@pytest.mark.parametrize("shape", [(3, 71, 50), (3, 37, 37), (3, 20, 300), (3, 401, 222)])
def test_the_square_is_what_evaluation_shows(shape: tuple[int, int, int]) -> None:
    image = torch.randint(0, 256, shape, dtype=torch.uint8)
    view = draw_views(AugmentSpec(), np.array([shape[1:]]), 32, 0, 0, np.arange(1))
    assert torch.equal(evaluation_square(image, 32), show(image, view[0], AugmentSpec(), 32))


def test_other_data(photos: Path, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its classes are found by name; there may be fewer, not others."""
    other = tmp_path / "other"
    shutil.copytree(photos, other)
    shutil.copytree(photos / "val" / "ants", other / "train" / "butterflies")
    assert main(["evaluate", str(trained_run), "--data.root", str(other)]) == 2
    assert "class 'butterflies' of" in capsys.readouterr().err
    card = open_run(trained_run).card
    more = replace(card, classes=("zebras", "bees", "ants"))
    here, there = (validation_images(trained_run, known, str(photos)).split.labels_N for known in (card, more))
    assert (2 - here == there).all()
    assert set(here) == {0, 1}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["predict"], "name a run or an exported file, then images"),
        (["predict", "RUN", "/no/such.jpg"], "there is no file or folder /no/such.jpg"),
        (["predict", "RUN", "/no/*.jpg"], "no file fits /no/*.jpg"),
        (["predict", "RUN", "PHOTO", "--top", "0"], "--top is 0: give 1 or more"),
        (["predict", "RUN", "PHOTO", "--top", "many"], "--top 'many' is not a whole number"),
        (["predict", "RUN", "PHOTO", "--json", "--csv"], "give one"),
        (["predict", "RUN", "PHOTO", "--batchsize", "2"], "no flag --batchsize (did you mean '--batch-size'?)"),
        (["predict", "/no/model.onnx", "PHOTO"], "there is no file /no/model.onnx"),
        (["predict", "/no/run", "PHOTO"], "/no/run is no run with a model"),
        (["predict", "PHOTO", "PHOTO"], "is neither a run directory nor a file"),
        (["evaluate"], "name one run: tldist evaluate RUN"),
        (["evaluate", "RUN", "--data.root", "/no/such"], "does not exist"),
    ],
)
def test_mistakes(
    photos: Path, trained_run: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"RUN": str(trained_run), "PHOTO": str(photos / "val" / "ants" / "0000.jpg")}
    capsys.readouterr()
    assert main([known.get(word, word) for word in words]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_files_that_are_no_models(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = photos / "val" / "ants" / "0000.jpg"
    for name in ("model.onnx", "model.pt2"):
        (tmp_path / name).write_text("hello")
        assert main(["predict", str(tmp_path / name), str(photo)]) == 2
        assert f"cannot read {tmp_path / name}" in capsys.readouterr().err


def test_damaged_weights_are_refused(trained_run: Path, tmp_path: Path, photos: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(trained_run, copied, symlinks=True)
    weights = copied / "checkpoints" / "best" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="is damaged"):
        open_run(copied)


def test_files_are_listed_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b/2.jpg", "b/1.jpg", "a/3.jpg", "b/Thumbs.db", "b/.git/x.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_files([str(tmp_path / "b" / "2.jpg"), str(tmp_path), f"{tmp_path}/**/*.jpg"])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["b/2.jpg", "a/3.jpg", "b/1.jpg"]
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match="there is no file in"):
        find_files([str(tmp_path / "c")])
