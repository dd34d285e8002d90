"""`tldist export`: a file that computes the same, says what it is, and is not left behind where it does not."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tldist.trained import export as export_module
from tldist.trained import exported
from tldist.trained.export import OPSET, TOLERANCE, Deployed, NotTheSame, Parity, compare, judge
from tldist.trained.exported import Exported, open_exported
from tldist.trained.model import Trained, open_run, validation_images
from tldist_kernels import mix_normalize
from tldist_launcher.cli import main

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
SIZE = 32


@pytest.fixture(scope="module")
def exported_plain(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A file by the command, and what that printed."""
    path, said = tmp_path_factory.mktemp("plain") / "model.onnx", io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["export", str(trained_run), "--format", "onnx", "--out", str(path), "--batch-size", "8"]) == 0
    return path, said.getvalue()


@pytest.fixture(scope="module")
def plain(exported_plain: tuple[Path, str]) -> Path:
    return exported_plain[0]


@pytest.fixture(scope="module")
def said_of_plain(exported_plain: tuple[Path, str]) -> str:
    return exported_plain[1]


@pytest.fixture(scope="module")
def whole(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the preprocessing inside."""
    path = tmp_path_factory.mktemp("whole") / "model.onnx"
    assert main(["export", str(trained_run), "--format", "onnx", "--with-preprocessing", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def program(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .pt2 with the preprocessing inside."""
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    words = ["export", str(trained_run), "--format", "torch_export", "--with-preprocessing", "--out", str(path)]
    assert main(words) == 0
    return path


def test_the_file_says_what_it_is(trained_run: Path, plain: Path, whole: Path) -> None:
    for path, inside in ((plain, []), (whole, ["crop", "scale", "normalise", "layout"])):
        model = onnx.load(path)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
        told = {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(told["class_names"]) == ["ants", "bees"]
        assert json.loads(told["mean"]) == [0.485, 0.456, 0.406]
        assert json.loads(told["std"]) == [0.229, 0.224, 0.225]
        assert (told["image_size"], told["resize_short_side"], told["crop"]) == ("32", "37", "centre")
        assert told["interpolation"] == "bilinear, antialiased"
        assert json.loads(told["preprocessing_inside"]) == inside
        assert float(told["temperature"]) == open_run(trained_run).card.temperature
        (batch, *_) = model.graph.input[0].type.tensor_type.shape.dim
        assert batch.dim_param == "batch"
        assert [output.name for output in model.graph.output] == ["logits", "probabilities"]
        assert open_exported(path).card == open_run(trained_run).card
        assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]


def test_a_program_says_the_same_of_itself(program: Path, whole: Path) -> None:
    of_onnx = {entry.key: entry.value for entry in onnx.load(whole).metadata_props}
    del of_onnx["opset"]
    told = dict.fromkeys(of_onnx, "")
    torch.export.load(program, extra_files=told)
    about = {key: value if isinstance(value, str) else value.decode() for key, value in told.items()}
    assert about == of_onnx | {"images": "inside"}  # torch fills in all there are


@pytest.mark.parametrize("images", [1, 5])
def test_logits_are_the_models(trained_run: Path, plain: Path, whole: Path, images: int) -> None:
    """In batches of any size; from pixels of any size that was cut as evaluation cuts."""
    trained = open_run(trained_run)
    pixels = torch.randint(0, 256, (images, SIZE, SIZE, 3), dtype=torch.uint8)
    with torch.no_grad():
        wanted = trained.model(mix_normalize(pixels, trained.card.mean, trained.card.std, torch.float32))
    assert wanted.std() > 0.05
    for rest in ((0, 0), (1, 3), (2, 6), (5, 0)):
        top, left = (round(pad / 2) for pad in rest)
        around = torch.randint(0, 256, (images, SIZE + rest[0], SIZE + rest[1], 3), dtype=torch.uint8)
        around[:, top : top + SIZE, left : left + SIZE] = pixels
        logits, probabilities = open_exported(whole).outputs(around)
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(probabilities, trained.card.confidences(wanted), atol=1e-5, rtol=0)
    torch.testing.assert_close(open_exported(plain).logits(pixels), wanted, atol=1e-5, rtol=0)


def test_torch_export(trained_run: Path, program: Path) -> None:
    trained, exported_program = open_run(trained_run), open_exported(program)
    assert exported_program.card == trained.card
    assert exported_program.inside
    pixels = torch.randint(0, 256, (5, SIZE, SIZE, 3), dtype=torch.uint8)
    with torch.no_grad():
        wanted = trained.model(mix_normalize(pixels, trained.card.mean, trained.card.std, torch.float32))
    torch.testing.assert_close(exported_program.logits(pixels), wanted, atol=1e-5, rtol=0)


def test_what_is_printed(trained_run: Path, plain: Path, said_of_plain: str) -> None:
    lines = said_of_plain.splitlines()
    assert lines[0].startswith("proven on 19 validation images: 19 have the same top-1, largest difference ")
    assert lines[1].startswith(f"file: {plain} (4")


def test_a_file_that_computes_something_else_is_deleted(
    trained_run: Path,
    program: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The file of the trained model passes; for a model that is 2 % off it does not, and the older file stays."""
    out = tmp_path / "model.pt2"
    monkeypatch.setattr(export_module, "_write", lambda trained, path, *_: shutil.copy(program, path))
    words = ["export", str(trained_run), "--format", "torch_export", "--out", str(out)]
    assert main(words) == 0
    out.write_text("an older file")
    trained = open_run(trained_run)
    with torch.no_grad():
        next(iter(trained.model.parameters())).mul_(1.02)
    monkeypatch.setattr("tldist_launcher.commands.export.open_run", lambda _: trained)
    capsys.readouterr()
    assert main(words) == 1
    said = capsys.readouterr()
    assert "does not compute what the model does, and was deleted: over 19 validation images" in said.err
    assert said.out == ""
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    assert out.read_text() == "an older file"


@pytest.mark.parametrize("batch_size", ["8", "19", "1"])
def test_a_file_for_one_batch_size_is_deleted(
    trained_run: Path,
    tmp_path: Path,
    batch_size: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where the exporter silently fixes what was to stay open, as it did for `len` of a batch; also where all 19 images
    come in batches of that size."""

    def write(trained: Trained, path: Path, *_: object) -> None:
        example = torch.zeros(int(batch_size), 3, SIZE, SIZE)
        made = torch.export.export(Deployed(trained, preprocess=False).eval(), (example,))
        about = export_module.description(trained.card, False) | {export_module.IMAGES: "outside"}
        torch.export.save(made, path, extra_files=about)

    monkeypatch.setattr(export_module, "_write", write)
    words = ["export", str(trained_run), "--format", "torch_export", "--out", str(tmp_path / "model.pt2")]
    assert main([*words, "--batch-size", batch_size]) == 1
    assert "the file does not run, and was deleted: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["crop", "scale", "nothing"])
def test_the_proof_goes_through_the_preprocessing(
    trained_run: Path, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crop that is one pixel off is found, so is a scale that is 1 % off."""
    trained = open_run(trained_run)
    module = Deployed(trained, preprocess=True).eval()
    if wrong == "crop":
        monkeypatch.setattr(export_module, "_centre", lambda rest: rest // 2 + 1)
    if wrong == "scale":
        module.scale_3 *= 1.01

    @torch.no_grad()
    def run(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, probabilities = module(torch.from_numpy(x))
        return logits.numpy(), probabilities.numpy()

    judged = validation_images(trained_run, trained.card)
    parity = compare(trained, Exported(trained.card, True, run), judged, 8)
    assert parity.images == 19
    assert (parity.largest_difference <= TOLERANCE) == (wrong == "nothing")
    if wrong != "nothing":
        with pytest.raises(NotTheSame):
            judge(parity)


def test_nan_is_not_the_same(trained_run: Path) -> None:
    trained = open_run(trained_run)

    def nothing(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        wrong = np.full((len(x), 2), np.nan, np.float32)
        return wrong, wrong

    judged = validation_images(trained_run, trained.card)
    with pytest.raises(NotTheSame):
        judge(compare(trained, Exported(trained.card, False, nothing), judged, 8))
    with pytest.raises(NotTheSame, match="nothing is proven"):
        judge(Parity(0, 0.0, 0.0, 0))


@pytest.fixture(scope="module")
def told_by_predict(photos: Path, trained_run: Path) -> list[dict[str, Any]]:
    """`tldist predict RUN --json` of the validation images."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["predict", str(trained_run), f"{photos}/val/*/*.jpg", "--json", "--batch-size", "7"]) == 0
    return json.loads(said.getvalue())["predictions"]


def test_predict_takes_the_files(
    photos: Path, plain: Path, whole: Path, program: Path, told_by_predict: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each says what the run says."""
    assert len(told_by_predict) == 19
    for path in (plain, whole, program):
        capsys.readouterr()
        assert main(["predict", str(path), str(photos / "val"), "--json", "--batch-size", "5"]) == 0
        for one, other in zip(told_by_predict, json.loads(capsys.readouterr().out)["predictions"], strict=True):
            assert one["path"] == other["path"]
            assert [row["class"] for row in one["top"]] == [row["class"] for row in other["top"]]
            assert one["top"][0]["confidence"] == pytest.approx(other["top"][0]["confidence"], abs=1e-5)


def test_plain_python_equals_predict(plain: Path, whole: Path, told_by_predict: Any) -> None:
    """By onnxruntime, numpy and Pillow alone: the code in docs/predict.md, as it stands there."""
    page = (Path(__file__).parents[2] / "docs" / "predict.md").read_text()
    (code,) = (block for block in page.split("```python\n")[1:])
    code = code.split("```")[0].replace("print(", "found = (")
    for path, text in ((plain, code), (whole, re.sub("x = .*", "x = pixels[None]", code))):
        for row in told_by_predict:
            names: dict[str, Any] = {}
            exec(text.replace('"model.onnx"', repr(str(path))).replace('"photo.jpg"', repr(row["path"])), names)
            assert names["found"][0] == row["top"][0]["class"]
            # Pillow and torchvision round some pixels of a resized image differently, by one level.
            assert names["found"][1] == pytest.approx(row["top"][0]["confidence"], abs=5e-3)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "name one run: tldist export RUN"),
        (["RUN"], "say what to write: --format onnx or torch_export"),
        (["RUN", "--format", "onx"], "--format 'onx' is not known (did you mean 'onnx'?)"),
        (["RUN", "--format", "onnx", "--out", "model.pt2"], "name a .onnx file"),
        (["RUN", "--format", "onnx", "--out", "/no/such/model.onnx"], "in a folder that exists"),
        (["RUN", "--format", "onnx", "--with-preprocesing"], "did you mean '--with-preprocessing'?"),
        (["RUN", "--format", "onnx", "--data.root", "/no/such"], "does not exist"),
        (["/no/such", "--format", "onnx"], "is no run with a model"),
    ],
)
def test_mistakes(trained_run: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["export", *(str(trained_run) if word == "RUN" else word for word in words)]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_images_that_moved_are_asked_for(
    photos: Path, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = json.loads((trained_run / "index.json").read_text())
    moved = tmp_path / "run"
    moved.mkdir()
    (moved / "checkpoints").symlink_to(trained_run / "checkpoints")
    (moved / "config.yaml").write_text((trained_run / "config.yaml").read_text())
    (moved / "index.json").write_text(json.dumps({**index, "root": "/gone"}))
    assert main(["export", str(moved), "--format", "torch_export"]) == 2
    assert "no longer at /gone: say where with --data.root" in capsys.readouterr().err
    judged = validation_images(moved, open_run(moved).card, str(photos))
    assert judged.split == validation_images(trained_run, open_run(trained_run).card).split


def test_without_the_packages(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = exported.importlib.util.find_spec
    monkeypatch.setattr(exported.importlib.util, "find_spec", lambda name: None if "onnx" in name else find(name))
    assert main(["export", str(trained_run), "--format", "onnx"]) == 2
    said = capsys.readouterr().err
    assert "not installed here: pip install onnx onnxscript onnxruntime" in said
