"""`tldist export`: a file that computes the same, says what it is, and is not left behind where it does not."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tldist import config, exported, worker
from tldist import export as export_module
from tldist.config import DataConfig, ModelConfig, OptimConfig, RunConfig, StrategyConfig, TrackingConfig, TrainConfig
from tldist.data.index import build_index, save_index
from tldist.export import OPSET, NotTheSame, export
from tldist.exported import Exported, open_exported
from tldist.trained import open_run, validation_images
from tldist_kernels import mix_normalize
from tldist_launcher.cli import main

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
SIZE = 32


def train_quickly(photos: Path, run_dir: Path) -> Path:
    """A run whose logits are worth comparing: 19 validation images, two epochs, fp32, torchvision's pixels."""
    run_dir.mkdir()
    made = RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(weights="none", head="mlp_bn"),
        strategy=StrategyConfig(name="full"),
        data=DataConfig(root=str(photos), batch_size=8, image_size=SIZE, loader="torchvision"),
        optim=OptimConfig(base_lr=1e-3),
        train=TrainConfig(epochs=2, precision="fp32"),
        tracking=TrackingConfig(wandb="disabled"),
    )
    config.save(made, run_dir / "config.yaml")
    save_index(build_index(photos), run_dir / "index.json")
    worker.run(config.to_json(made))
    return run_dir


@pytest.fixture(scope="module")
def run_dir(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_quickly(photos, tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="module")
def plain(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported by the command."""
    path = tmp_path_factory.mktemp("plain") / "model.onnx"
    assert main(["export", str(run_dir), "--format", "onnx", "--out", str(path), "--batch-size", "8"]) == 0
    return path


@pytest.fixture(scope="module")
def whole(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the preprocessing inside."""
    path = tmp_path_factory.mktemp("whole") / "model.onnx"
    assert main(["export", str(run_dir), "--format", "onnx", "--with-preprocessing", "--out", str(path)]) == 0
    return path


def test_the_file_says_what_it_is(run_dir: Path, plain: Path, whole: Path) -> None:
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
        assert float(told["temperature"]) == open_run(run_dir).card.temperature
        (batch, *_) = model.graph.input[0].type.tensor_type.shape.dim
        assert batch.dim_param == "batch"
        assert [output.name for output in model.graph.output] == ["logits", "probabilities"]
        assert open_exported(path).card == open_run(run_dir).card
        assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("images", [1, 5])
def test_logits_are_the_models(run_dir: Path, plain: Path, whole: Path, images: int) -> None:
    """In batches of any size; from pixels of any size that was cut as evaluation cuts."""
    trained = open_run(run_dir)
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


def test_torch_export(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ([], ["--with-preprocessing"]):
        path = tmp_path / "model.pt2"
        assert main(["export", str(run_dir), "--format", "torch_export", "--out", str(path), *flags]) == 0
        assert "proven on 19 validation images: 19 have the same top-1" in capsys.readouterr().out
        assert open_exported(path).card == open_run(run_dir).card
        assert open_exported(path).inside == bool(flags)


def test_a_file_that_computes_something_else_is_deleted(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, out = export_module._write, tmp_path / "model.pt2"
    out.write_text("an older file")

    def write_another(trained: export_module.Trained, *rest: object) -> None:
        model = copy.deepcopy(trained.model)
        with torch.no_grad():
            next(iter(model.parameters())).mul_(1.02)
        write(replace(trained, model=model), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(export_module, "_write", write_another)
    assert main(["export", str(run_dir), "--format", "torch_export", "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "does not compute what the model does, and was deleted: over 19 validation images" in said.err
    assert said.out == ""
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    assert out.read_text() == "an older file"


def test_a_wrong_preprocessing_is_found(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crop one pixel off, say: the proof goes through what is shipped."""
    trained = open_run(run_dir)
    judged = validation_images(run_dir, trained.card)
    monkeypatch.setattr(export_module, "_centre", lambda rest: rest // 2 + 1)
    with pytest.raises(NotTheSame):
        export(trained, judged, tmp_path / "model.pt2", "torch_export", preprocess=True)
    assert not list(tmp_path.iterdir())


def test_nan_is_not_the_same(run_dir: Path) -> None:
    trained = open_run(run_dir)

    def nothing(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (np.full((len(x), 2), np.nan, np.float32),) * 2

    parity = export_module.compare(
        trained, Exported(trained.card, False, nothing), validation_images(run_dir, trained.card), 8
    )
    with pytest.raises(NotTheSame):
        export_module._judge(parity)


def test_plain_python_equals_predict(
    photos: Path, run_dir: Path, plain: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By onnxruntime, numpy and Pillow alone, from what the file's metadata says (docs/predict.md)."""
    capsys.readouterr()
    assert main(["predict", str(run_dir), str(photos / "val"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["predictions"]
    for path in (plain, whole):
        session = onnxruntime.InferenceSession(str(path))
        about = session.get_modelmeta().custom_metadata_map
        classes, mean, std = (json.loads(about[key]) for key in ("class_names", "mean", "std"))
        size, short = int(about["image_size"]), int(about["resize_short_side"])
        for row in said:
            image = ImageOps.exif_transpose(Image.open(row["path"])).convert("RGB")
            scale = short / min(image.size)
            width, height = (max(int(side * scale + 1e-9), short) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            left, top = round((width - size) / 2), round((height - size) / 2)
            pixels = np.asarray(image.crop((left, top, left + size, top + size)))
            if path == whole:
                x = pixels[None]
            else:
                x = ((pixels / 255 - mean) / std).astype(np.float32).transpose(2, 0, 1)[None]
            (probabilities,) = session.run(["probabilities"], {session.get_inputs()[0].name: x})
            assert classes[probabilities[0].argmax()] == row["top"][0]["class"]
            # Pillow and torchvision round some pixels of a resized image differently, by one level.
            assert probabilities[0].max() == pytest.approx(row["top"][0]["confidence"], abs=5e-3)


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
def test_mistakes(run_dir: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["export", *(str(run_dir) if word == "RUN" else word for word in words)]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_images_that_moved_are_asked_for(
    photos: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = json.loads((run_dir / "index.json").read_text())
    moved = tmp_path / "run"
    moved.mkdir()
    (moved / "checkpoints").symlink_to(run_dir / "checkpoints")
    (moved / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    (moved / "index.json").write_text(json.dumps({**index, "root": "/gone"}))
    assert main(["export", str(moved), "--format", "torch_export"]) == 2
    assert "no longer at /gone: say where with --data.root" in capsys.readouterr().err
    assert main(["export", str(moved), "--format", "torch_export", "--data.root", str(photos)]) == 0
    assert (moved / "model.pt2").exists()


def test_without_the_packages(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = exported.importlib.util.find_spec
    monkeypatch.setattr(exported.importlib.util, "find_spec", lambda name: None if "onnx" in name else find(name))
    assert main(["export", str(run_dir), "--format", "onnx"]) == 2
    said = capsys.readouterr().err
    assert "need onnx and onnxscript and onnxruntime, not installed here: pip install 'tldist[export]'" in said
