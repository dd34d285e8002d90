"""EWC: the Fisher information against a loop over single images, the penalty of several tasks, and whole runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import run_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from tldist import config, dist
from tldist.checkpoints import checkpoint
from tldist.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    StrategyConfig,
    TrackingConfig,
    TrainConfig,
    UserError,
)
from tldist.models import backbones
from tldist.models.backbones import StagedModel
from tldist.objectives.anchor import AnchorPenalty, Pull, joined
from tldist.objectives.ewc import checkpoint_at, read_fisher
from tldist.train import worker
from tldist.transfer import fisher, forgetting
from tldist.transfer.forgetting import FisherJob
from tldist_launcher.cli import main


def settings(photos: Path, run_dir: Path, **optim: Any) -> RunConfig:
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(weights="none"),
        strategy=StrategyConfig(name="full"),
        data=DataConfig(root=str(photos), batch_size=8, image_size=32, augment="none", threads=1, loader="torchvision"),
        optim=OptimConfig(name="sgd", base_lr=5e-3, **optim),
        train=TrainConfig(epochs=1, precision="fp32", batchnorm="eval"),
        tracking=TrackingConfig(wandb="disabled"),
    )


def train(made: RunConfig) -> dict[str, Any]:
    run_dir = Path(made.run_dir)
    run_dir.mkdir()
    config.save(made, run_dir / "config.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "write_report", lambda *_: None)
        return worker.run(config.to_json(made))


@pytest.fixture(scope="module")
def earlier(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its Fisher information; tests must leave it as it is."""
    run_dir = tmp_path_factory.mktemp("earlier") / "run"
    made = settings(photos, run_dir)
    train(replace(made, train=replace(made.train, batchnorm="train", epochs=3), optim=OptimConfig(base_lr=1e-3)))
    forgetting.compute(json.dumps(vars(FisherJob(str(run_dir), images=20))))
    return run_dir


def small() -> StagedModel:
    """A network with BatchNorm that has seen something, in eval mode, in double precision."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )
    net(torch.randn(64, 3, 8, 8) * 2 + 1)
    return StagedModel({"stem": net[:3], "head": net[3:]}, net).double().eval()


IMAGES = torch.randn(11, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def shown(ids: range) -> list[tuple[Tensor, Any]]:
    """Batches of up to five of the images."""
    return [
        (IMAGES[part], SimpleNamespace(labels_N=torch.tensor(part) % 4, ids_N=np.array(part)))
        for part in (list(ids)[i : i + 5] for i in range(0, len(ids), 5))
    ]


def brute_force(model: StagedModel, batches: Any, labels: str, images: int, seed: int) -> dict[str, Tensor]:
    """One image after the other, through plain autograd."""
    uniform = np.random.Generator(np.random.Philox(key=[seed, fisher._LABELS])).random(images)
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for images_NCHW, batch in batches:
        for image, label, i in zip(images_NCHW, batch.labels_N.tolist(), batch.ids_N.tolist(), strict=True):
            logits = model(image[None])
            if labels == "model":
                label = int((logits.double().softmax(1).cumsum(1) < uniform[i]).sum())
            gradients = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([label])), list(model.parameters()))
            for name, g in zip(total, gradients, strict=True):
                total[name] += g.square()
    return {model.torchvision_names[name]: t / images for name, t in total.items()}


def off(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference, as a share of a parameter's largest value."""
    assert ours.keys() == theirs.keys()
    return max(((ours[n].double() - t).abs().max() / t.abs().max()).item() for n, t in theirs.items())


class TestFisher:
    @pytest.mark.parametrize("labels", ["model", "data"])
    def test_it_is_the_mean_over_images_of_squared_gradients(self, labels: fisher.Labels) -> None:
        """Within 1e-6 of the loop; one image at a time, and several through vmap."""
        expected = brute_force(small(), shown(range(11)), labels, 11, seed=3)
        for chunk in (1, 3):
            found, images = fisher.fisher(small(), shown(range(11)), 11, labels, 3, chunk)
            assert images == 11
            assert off(found, expected) < 1e-6
        other = brute_force(small(), shown(range(11)), "data" if labels == "model" else "model", 11, seed=3)
        assert off(found, other) > 1e-2

    def test_it_is_not_the_square_of_the_mean_gradient(self) -> None:
        """What some libraries compute; the test above must be able to tell."""
        model, labels_N = small(), torch.arange(11) % 4
        own = fisher.squared_gradients(model, IMAGES, labels_N)
        F.cross_entropy(model(IMAGES), labels_N).backward()
        means = {name: p.grad.square() for name, p in model.named_parameters() if p.grad is not None}
        assert off({name: t / 11 for name, t in own.items()}, means) > 0.1

    def test_batchnorm_in_train_mode_is_refused(self) -> None:
        """There an image's loss depends on the others, and it would have no gradient of its own."""
        with pytest.raises(AssertionError):
            fisher.squared_gradients(small().train(), IMAGES, torch.arange(11) % 4)

    def test_what_is_written_is_what_is_computed_and_whole(self, earlier: Path) -> None:
        """Of a ResNet-18 that was trained, on its own images, in fp32: within 1e-5 of the loop."""
        task = forgetting.read_task(earlier, torch.device("cpu"))
        split = forgetting.some(task.index.train, 20, 0)
        expected = brute_force(task.model, task.batches(split), "model", 20, seed=0)
        assert off(read_fisher(earlier), expected) < 1e-5
        best = earlier / "checkpoints" / "best"
        assert checkpoint.damage(best) is None
        assert fisher.about(earlier) == {"images": "20", "labels": "model", "seed": "0"}
        assert "fisher.safetensors" in (best / "SHA256SUMS").read_text()

    def test_two_ranks_compute_what_one_does(self) -> None:
        """Each a share of the images, one all-reduce; labels too depend on the image alone."""
        alone, _ = fisher.fisher(small(), shown(range(11)), 11)
        (one, images), (other, _) = run_ranks(_of_ranks, 2)
        assert images == 11
        assert one == other
        together = {name: torch.tensor(values).view(alone[name].shape) for name, values in one.items()}
        assert off(together, {name: t.double() for name, t in alone.items()}) < 1e-6

    @pytest.mark.parametrize("name", ["efficientnet_b0", "convnext_base", "vit_b_16"])
    def test_vmap_knows_every_backbone(self, name: Any) -> None:
        """Several images together equal one after the other, through head and last stage's normalisation alone."""
        model = backbones.build(ModelConfig(name=name, weights="none"), 3, 32, 0).eval()
        _, head = model.cut(len(model.stages) - 1)
        x = torch.randn(4, next(p for n, p in head.named_parameters() if n.endswith("weight") and p.ndim == 2).shape[1])
        x = x[:, :, None, None] if name == "convnext_base" else x
        labels = torch.arange(4) % 3
        one, many = (fisher.squared_gradients(head.eval(), x, labels, chunk) for chunk in (1, 4))
        assert off(many, {name: t.double() for name, t in one.items()}) < 1e-4

    def test_drawn_labels_follow_the_models_probabilities(self) -> None:
        logits_NC = torch.tensor([[0.0, 1.0, -1.0]]).expand(20000, 3)
        drawn = fisher.drawn_labels(logits_NC, torch.rand(20000, generator=torch.Generator().manual_seed(0)))
        shares = drawn.bincount(minlength=3) / 20000
        torch.testing.assert_close(shares, logits_NC[0].softmax(0), atol=0.01, rtol=0)
        assert fisher.drawn_labels(logits_NC[:2], torch.tensor([0.0, 1.0])).tolist() == [0, 2]

    def test_a_writer_that_was_killed_leaves_a_whole_checkpoint_without(self, earlier: Path, tmp_path: Path) -> None:
        copied = tmp_path / "epoch-0001"
        copied.mkdir()
        for file in (earlier / "checkpoints" / "best").iterdir():
            (copied / file.name).write_bytes(file.read_bytes())
        sums = (copied / "SHA256SUMS").read_text().splitlines(keepends=True)
        (copied / "SHA256SUMS").write_text("".join(line for line in sums if "fisher" not in line))
        (copied / "fisher.safetensors").write_bytes(b"half")
        assert checkpoint.damage(copied) is None
        with pytest.raises(UserError, match="has no Fisher information yet"):
            read_fisher(copied)
        (copied / "SHA256SUMS").write_text("".join(sums))
        with pytest.raises(UserError, match=r"damaged: fisher\.safetensors is not what was written"):
            read_fisher(copied)


def _of_ranks() -> tuple[dict[str, list[float]], int]:
    dist.init(torch.device("cpu"))
    found, images = fisher.fisher(small(), shown(range(dist.rank(), 11, 2)), 11)
    dist.close()
    return {name: t.flatten().tolist() for name, t in found.items()}, images


class TestPenalty:
    def tasks(self, count: int) -> tuple[dict[str, nn.Parameter], list[Pull]]:
        parameters = {name: nn.Parameter(torch.randn(3, 5).double()) for name in "ab"}
        pulls = []
        for k in range(count):
            anchors, importances = ({n: torch.rand_like(p) for n, p in parameters.items()} for _ in range(2))
            pulls.append(Pull(k + 0.5, anchors, importances))
        return parameters, pulls

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_value_and_gradient_are_autograds(self, count: int) -> None:
        """Of the sum over tasks of lambda/2 * sum F (w - w*)^2, however many tasks are one pull."""
        parameters, pulls = self.tasks(count)
        value = AnchorPenalty(parameters, joined(pulls))()
        terms = [
            0.5 * pull.strength * (pull.importances[n] * (p - pull.anchors[n]).square()).sum()
            for pull in pulls
            for n, p in parameters.items()
        ]
        expected = torch.stack(terms).sum()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
        ours = torch.autograd.grad(0.3 * value, list(parameters.values()))
        theirs = torch.autograd.grad(0.3 * expected, list(parameters.values()))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)

    def test_weights_of_no_importance_are_free_and_l2_sp_joins_in(self) -> None:
        parameters, (pull,) = self.tasks(1)
        none = replace(pull, importances={n: torch.zeros_like(t) for n, t in pull.importances.items()})
        assert AnchorPenalty(parameters, joined([none, none]))().item() == 0.0
        anchors = {n: torch.zeros_like(p) for n, p in parameters.items()}
        together = AnchorPenalty(parameters, joined([none, Pull(0.7, anchors)]))()
        expected = 0.35 * sum((p.square().sum() for p in parameters.values()), torch.zeros(()))
        torch.testing.assert_close(together.double(), expected, rtol=1e-6, atol=0)


def test_a_run_under_ewc_moves_what_matters_less(photos: Path, tmp_path: Path, earlier: Path) -> None:
    """Nearer to the earlier task than a free run, in the Fisher's measure by far; two tasks at half of it are one."""
    start, information = checkpoint.read_weights(checkpoint_at(earlier)), read_fisher(earlier)
    source = ModelConfig(weights=str(checkpoint_at(earlier) / "model.safetensors"))
    losses, distances = {}, {}
    for name, strength, tasks in (("free", 0.0, 0), ("held", 1e6, 1), ("two", 5e5, 2)):
        run_dir = tmp_path / name
        made = settings(photos, run_dir)
        optim = OptimConfig(base_lr=1e-3, ewc=strength, ewc_from=(str(earlier),) * tasks)
        train(replace(made, model=source, seed=1, optim=optim))
        end = checkpoint.read_weights(run_dir / "checkpoints" / "last")
        moved = {n: (end[n] - start[n]).square() for n in information if "fc" not in n}
        losses[name] = sum((information[n] * t).sum().item() for n, t in moved.items())
        distances[name] = sum(t.sum().item() for t in moved.values())
    assert 0 < losses["held"] < 0.3 * losses["free"]
    assert 0.5 * distances["free"] < distances["held"] < distances["free"]
    assert losses["two"] == pytest.approx(losses["held"], rel=0.01)


def test_what_is_forgotten_is_measured_with_the_earlier_head(
    photos: Path, tmp_path: Path, earlier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing by the run itself, and what its own evaluation said; all of it by a trunk without weights."""
    summary = json.loads((earlier / "summary.json").read_text())
    same = forgetting.kept(earlier, earlier, torch.device("cpu"))
    assert (same.then, same.now, same.val_images) == (summary["best_val_top1"], same.then, 19)
    made = settings(photos, tmp_path / "later")
    train(replace(made, seed=5, optim=replace(made.optim, base_lr=1e-6)))
    assert main(["forgetting", str(tmp_path / "later"), str(earlier), "--json", str(tmp_path / "kept.json")]) == 0
    (row,) = json.loads((tmp_path / "kept.json").read_text())
    assert row["then"] == same.then > row["now"]
    assert f"{same.then - row['now']:+.3f}" in capsys.readouterr().out


def test_the_fisher_command(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of some images with their own labels; it says how to go on, and a run may name a folder as its weights."""
    run_dir = tmp_path / "run"
    train(settings(photos, run_dir))
    assert main(["fisher", str(run_dir), "--images", "7", "--labels", "data"]) == 0
    text = capsys.readouterr().out
    assert "7 images, labels the data's own" in text
    assert "layer4" in text
    words = text.splitlines()[-1].split("tldist ")[1].replace("RECIPE", "folder").split()
    quick = ["--data.root", str(photos), "--data.image-size", "32", "--data.batch-size", "8", "--train.epochs", "1"]
    quick += ["--tracking.wandb", "disabled", "--strategy.name", "partial", "--run-dir", str(tmp_path / "next")]
    assert main([*words, *quick]) == 0
    made = config.load(tmp_path / "next" / "config.yaml")
    assert made.model.weights == str(run_dir.resolve() / "checkpoints" / "epoch-0001" / "model.safetensors")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--optim.ewc", "1"], "name their run directories in --optim.ewc-from"),
        (["--optim.ewc-from", "EARLIER"], "is 0: give both"),
        (["--optim.ewc", "1", "--optim.ewc-from", "EARLIER", "--model.weights", "none"], "starts without any"),
        (["--optim.ewc", "1", "--optim.ewc-from", "EARLIER", "--model.weights", "OTHER"], "this run starts elsewhere"),
        (["--optim.ewc", "1", "--optim.ewc-from", "nowhere", "--model.weights", "OTHER"], "neither a run directory"),
        (
            [
                "--model.name",
                "resnet50",
                "--optim.ewc",
                "1",
                "--optim.ewc-from",
                "EARLIER",
                "--model.weights",
                "OTHER50",
            ],
            "is a run of another backbone",
        ),
    ],
)
def test_mistakes(
    words: list[str], says: str, photos: Path, tmp_path: Path, earlier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"EARLIER": str(earlier)}
    for key, name in (("OTHER", "resnet18"), ("OTHER50", "resnet50")):
        if key in words:
            paths[key] = str(tmp_path / "other.safetensors")
            other = backbones.build(ModelConfig(name=name, weights="none"), 2, 32, 9)  # type: ignore[arg-type]
            safetensors.torch.save_file(other.torchvision_state(), paths[key])
    given = [paths.get(word, word) for word in words]
    run = ["--strategy.name", "full", "--data.image-size", "32", "--run-dir", str(tmp_path / "run")]
    assert main(["train", "folder", "--data.root", str(photos), *run, *given]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_mistakes_of_the_commands(tmp_path: Path, earlier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in [
        (["fisher"], "needs one run directory"),
        (["fisher", str(tmp_path)], "neither a run directory with a checkpoint nor a checkpoint"),
        (["fisher", str(earlier), "--labels", "true"], "is not known"),
        (["fisher", str(earlier), "--imagse", "3"], "did you mean '--images'?"),
        (["forgetting", str(earlier)], "needs a run and the earlier runs"),
        (["forgetting", str(earlier), str(tmp_path)], "neither a run directory"),
    ]:
        assert main(words) == 2
        assert says in capsys.readouterr().err
