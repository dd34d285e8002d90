"""Two domains: what training shows of them, what makes them alike, and that no label of the target is read."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_images

from tldist import config
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
from tldist.data.batches import Worker, steps_per_epoch, target_batches, train_batches
from tldist.data.make.sharding import write_shards
from tldist.data.presets import AugmentSpec
from tldist.data.source.domains import UNLABELLED, build_domains
from tldist.data.source.index import build_index, load_index, save_index
from tldist.models import backbones
from tldist.models.batchnorm import part_by_domain
from tldist.objectives.base import Targets
from tldist.objectives.domains import DANN, MMD, discriminator, ramp, reverse_gradient, rows_of
from tldist.plans import build_plan
from tldist.rules import validate
from tldist.train import worker
from tldist.transfer import forgetting
from tldist_kernels import mmd

SHOWN = ("source", "target")


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes; the target's training images, one to a name, lie in class folders."""
    root = tmp_path_factory.mktemp("domains")
    write_images(root / "source" / "train", {"ants": 10, "bees": 10}, seed=1)
    write_images(root / "target" / "val", {"ants": 5, "bees": 4}, seed=2)
    write_images(root / "target" / "train", {"ants": 7, "bees": 6}, seed=3)
    for path in (root / "target" / "train" / "bees").iterdir():
        path.rename(path.with_stem(f"1{path.stem[1:]}"))
    return root


def settings(root: Path, run_dir: Path, name: str = "dann", **train: Any) -> RunConfig:
    run_dir.mkdir()
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(name="dann_mnist_bn", weights="none"),
        strategy=StrategyConfig(name=name),  # type: ignore[arg-type]
        data=DataConfig(root=str(root), batch_size=4, image_size=28, threads=1, loader="torchvision"),
        optim=OptimConfig(name="sgd", base_lr=1e-2),
        train=TrainConfig(**{"epochs": 2, "precision": "fp32", **train}),
        tracking=TrackingConfig(wandb="disabled"),
    )


def ended(made: RunConfig) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    summary = worker.run(config.to_json(made))
    last = Path(made.run_dir) / "checkpoints" / "last"
    return summary, {**checkpoint.read_weights(last), **checkpoint.read_objective(last)}


class TestClosedForms:
    def test_the_schedule_is_the_papers(self) -> None:
        """From 0 to 1; by hand at a tenth: 2 / (1 + 1/e) - 1 = (e - 1) / (e + 1)."""
        assert ramp(0.0) == 0.0
        assert ramp(0.1) == pytest.approx((math.e - 1) / (math.e + 1), abs=1e-15)
        assert ramp(1.0) == pytest.approx(math.tanh(5.0), abs=1e-15)  # 2 / (1 + exp(-2x)) - 1 = tanh(x)
        assert [ramp(p) for p in (0.2, 0.4, 0.8)] == sorted(ramp(p) for p in (0.2, 0.4, 0.8))

    def test_gradient_reversal_by_finite_differences(self) -> None:
        """Forward the identity; backward -strength times the difference quotient of what follows."""
        x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        assert torch.equal(reverse_gradient(x, 0.3), x)

        def after(y: torch.Tensor) -> torch.Tensor:
            return (y.sin() * torch.arange(12.0, dtype=torch.float64).view(3, 4)).sum()

        after(reverse_gradient(x, 0.3)).backward()
        assert x.grad is not None
        for i, j in np.ndindex(3, 4):
            step = torch.zeros_like(x)
            step[i, j] = 1e-6
            slope = (after(x.detach() + step) - after(x.detach() - step)) / 2e-6
            assert x.grad[i, j].item() == pytest.approx(-0.3 * slope.item(), abs=1e-6)

    def test_the_unbiased_estimator_by_its_sums(self) -> None:
        """Gretton et al., 2012, eq. 3, pair by pair; and its gradient by finite differences."""
        generator = torch.Generator().manual_seed(1)
        source = torch.randn(4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
        target = torch.randn(5, 3, dtype=torch.float64, generator=generator) + 1

        def estimate(x: torch.Tensor, y: torch.Tensor) -> float:
            def k(a: torch.Tensor, b: torch.Tensor) -> float:
                return sum(math.exp(-float((a - b).square().sum()) / (2.0 * u)) for u in (0.25, 0.5, 1, 2, 4))

            n, m = len(x), len(y)
            within = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
            within += sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
            return within - 2 * sum(k(a, b) for a in x for b in y) / (n * m)

        loss = mmd(source, target, bandwidth=2.0, unbiased=True)
        assert loss.item() == pytest.approx(estimate(source.detach(), target), abs=1e-12)
        loss.backward()
        assert source.grad is not None
        for i, j in np.ndindex(4, 3):
            step = torch.zeros(4, 3, dtype=torch.float64)
            step[i, j] = 1e-6
            slope = (estimate(source.detach() + step, target) - estimate(source.detach() - step, target)) / 2e-6
            assert source.grad[i, j].item() == pytest.approx(slope, abs=1e-7)


class TestObjectives:
    def network(self, name: str = "dann_mnist") -> backbones.Segment:
        model = backbones.build(ModelConfig(name=name, weights="none"), 3, 28, 0)  # type: ignore[arg-type]
        return model.cut(0)[1]

    def batch(self, progress: float) -> tuple[torch.Tensor, Targets]:
        images = torch.randn(8, 3, 28, 28, generator=torch.Generator().manual_seed(2))
        return images, Targets(torch.tensor([0, 1, 2, 0]), progress=progress)

    def test_dann_is_two_losses_and_a_reversed_gradient(self) -> None:
        """The discriminator descends on its loss at full rate; the features climb it by lambda; the head sees the
        source alone."""
        network, learned = self.network(), discriminator(100, 16)
        images, targets = self.batch(0.3)
        output = DANN(network, 0.0, None, "fc4", 0.5, learned)(images, targets)
        output.loss.backward()
        found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        own = [p.grad.clone() for p in learned.parameters() if p.grad is not None]
        network.zero_grad()
        learned.zero_grad()
        logits, features = network(images, "fc4")
        task = torch.nn.functional.cross_entropy(logits[:4], targets.labels_N)
        domain_logits = learned(features)[:, 0]
        is_source = torch.tensor([1.0] * 4 + [0.0] * 4)
        domain = torch.nn.functional.binary_cross_entropy_with_logits(domain_logits, is_source)
        assert output.loss.item() == pytest.approx((task + domain).item(), abs=1e-6)
        assert output.logits.shape == (4, 3)
        task.backward(retain_graph=True)
        of_task = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        network.zero_grad()
        domain.backward()
        strength = 0.5 * ramp(0.3)
        for name, p in network.named_parameters():
            climb = 0.0 if p.grad is None else p.grad
            torch.testing.assert_close(found[name], of_task[name] - strength * climb, rtol=1e-4, atol=1e-6)
        for p, gradient in zip(learned.parameters(), own, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(gradient, p.grad, rtol=1e-5, atol=1e-7)

    def test_mmd_grows_with_progress(self) -> None:
        network = self.network()
        objective = MMD(network, 0.0, None, "fc3", 2.0)
        images, start = self.batch(0.0)
        with torch.no_grad():
            logits, features = network(images, "fc3")
            task = torch.nn.functional.cross_entropy(logits[:4], start.labels_N)
            apart = mmd(features[:4], features[4:], unbiased=True)
            assert objective(images, start).loss.item() == pytest.approx(task.item(), abs=1e-6)
            loss = objective(images, replace(start, progress=0.2)).loss
        assert loss.item() == pytest.approx((task + 2.0 * ramp(0.2) * apart).item(), abs=1e-6)

    def test_any_stage_of_any_backbone_gives_rows(self) -> None:
        for name in ("resnet18", "dann_mnist"):
            model = backbones.build(ModelConfig(name=name, weights="none"), 3, 32, 0).eval()  # type: ignore[arg-type]
            with torch.no_grad():
                whole = model(x := torch.randn(2, 3, 32, 32))
                for stage in model.stages:
                    logits, output = model(x, stage)
                    assert torch.equal(logits, whole)
                    assert rows_of(output).ndim == 2
        tokens_NLD = torch.randn(2, 5, 3)
        assert torch.equal(rows_of(tokens_NLD), tokens_NLD[:, 0])

    def test_a_stage_that_is_not_there(self) -> None:
        with pytest.raises(UserError, match=r"no stage 'fc5' \(did you mean 'fc4'\?\)"):
            build_plan(StrategyConfig(name="mmd", align_at="fc5"), backbones.stage_names("dann_mnist"), 2)

    def test_each_domain_has_its_own_statistics(self) -> None:
        """Each half is normalised as if it were alone; the target's statistics are kept, and the source's are not."""
        torch.manual_seed(0)
        layer, plain = (torch.nn.Sequential(torch.nn.BatchNorm2d(3)) for _ in range(2))
        part_by_domain(layer)
        source, target = torch.randn(4, 3, 5, 5) * 3 + 7, torch.randn(4, 3, 5, 5)
        shown = layer(torch.cat([source, target]))
        expected = torch.cat([torch.nn.functional.batch_norm(source, None, None, training=True), plain(target)])
        torch.testing.assert_close(shown, expected)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(layer.state_dict()[name], value)
        torch.testing.assert_close(layer.eval()(source), plain.eval()(source))


class TestBatches:
    def test_the_target_goes_on_by_its_own_length(self, domains: Path) -> None:
        """13 images in steps of 4 are 3 steps an epoch; the source's 20 are 5. Any worker, any first step."""
        split = build_domains(domains, SHOWN).target
        assert split is not None
        assert steps_per_epoch(len(split), 4) == 3

        def shown(steps: range, worker: Worker) -> list[list[int]]:
            plans = target_batches(split, AugmentSpec(), 28, 4, 7, steps, worker)
            return [plan.ids_N.tolist() for plan in plans]

        whole = shown(range(10), Worker(0, 1))
        assert len(whole) == 10
        for epoch in range(3):
            ids = {i for ids_N in whole[3 * epoch : 3 * epoch + 3] for i in ids_N}
            assert len(ids) == 12  # each once, but for the incomplete batch
        assert whole[0:3] != whole[3:6]
        assert shown(range(5, 10), Worker(0, 1)) == whole[5:]
        halves = [shown(range(10), Worker(rank, 2)) for rank in (0, 1)]
        assert [a + b for a, b in zip(*halves, strict=True)] == whole

    def test_the_two_domains_are_shuffled_apart(self, domains: Path) -> None:
        """Where both have the same length, an image must not meet itself."""
        split = build_domains(domains, SHOWN).train
        source = [p.ids_N.tolist() for p in train_batches(split, AugmentSpec(), 28, 4, 0, 0, Worker(0, 1))]
        target = [p.ids_N.tolist() for p in target_batches(split, AugmentSpec(), 28, 4, 0, range(5), Worker(0, 1))]
        assert source != target


class TestIndex:
    def test_which_images_are_shown(self, domains: Path) -> None:
        index = build_domains(domains, SHOWN)
        assert index.target is not None
        assert (len(index.train), len(index.target), len(index.val)) == (20, 13, 9)
        assert set(index.target.labels_N.tolist()) == {UNLABELLED}
        assert all(path.startswith("source/train/") for path in index.train.paths)
        assert all(path.startswith("target/val/") for path in index.val.paths)
        assert build_domains(domains, ("target",)).train.paths[0].startswith("target/train/ants/")
        assert build_domains(domains, ("source",)).target is None

    def test_it_is_saved_whole(self, domains: Path, tmp_path: Path) -> None:
        index = build_domains(domains, SHOWN)
        save_index(index, tmp_path / "index.json")
        loaded = load_index(tmp_path / "index.json")
        assert (loaded, loaded.target) == (index, index.target)

    def test_a_finished_run_reads_them_from_shards_by_dali_too(self, domains: Path, tmp_path: Path) -> None:
        """The root itself holds no tar: whether a split does, its own index says."""
        shutil.copytree(domains / "source", tmp_path / "source")
        write_shards(build_index(domains / "target"), tmp_path / "target")
        index = build_domains(tmp_path, SHOWN)
        data = DataConfig(root=str(tmp_path), image_size=32, batch_size=4, loader="dali", threads=1)
        task = forgetting.Task(tmp_path, RunConfig(data=data), index, torch.nn.Linear(1, 1))  # type: ignore[arg-type]
        assert sum(len(batch.ids_N) for batch in task.loaded(index.val)) == len(index.val)

    def test_shards_and_folders_together(self, domains: Path, tmp_path: Path) -> None:
        """A target packed into shards: the same images, wherever their labels lie."""
        shutil.copytree(domains / "source", tmp_path / "source")
        write_shards(build_index(domains / "target"), tmp_path / "target")
        index, folders = build_domains(tmp_path, SHOWN), build_domains(domains, SHOWN)
        assert index.target is not None
        assert index.target.members is not None
        assert set(index.target.labels_N.tolist()) == {UNLABELLED}
        assert index.target.members.shards == ("target/train-000000.tar",)
        assert folders.target is not None
        names = [sorted(path.rsplit("/", 1)[1] for path in split.paths) for split in (index.target, folders.target)]
        assert names[0] == names[1]
        made = settings(tmp_path, tmp_path / "run", "mmd", epochs=1)
        assert ended(made)[0]["target_images"] == 13

    @pytest.mark.parametrize(
        ("remove", "says"),
        [
            ("source", "no folder source/"),
            ("target", "no folder target/"),
            ("target/train", "has no train/ folder"),
            ("target/val", "has no val/ folder"),
        ],
    )
    def test_what_is_missing(self, domains: Path, tmp_path: Path, remove: str, says: str) -> None:
        shutil.copytree(domains, tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy" / remove)
        with pytest.raises(UserError, match=says):
            build_domains(tmp_path / "copy", SHOWN)

    def test_a_class_that_the_source_does_not_have(self, domains: Path, tmp_path: Path) -> None:
        shutil.copytree(domains, tmp_path / "copy")
        (tmp_path / "copy/target/val/bees").rename(tmp_path / "copy/target/val/bee")
        with pytest.raises(UserError, match=r"class 'bee', .*/source/train does not \(did you mean 'bees'\?\)"):
            build_domains(tmp_path / "copy", SHOWN)


class TestNoTargetLabel:
    def variant(self, domains: Path, root: Path, kind: str) -> Path:
        """The same images in other class folders, or in none."""
        shutil.copytree(domains, root)
        train = root / "target" / "train"
        files = sorted(train.glob("*/*"), key=lambda path: path.name)
        for i, path in enumerate(files):
            folder = {"absent": train, "one": train / "ants"}.get(kind, train / ("bees", "ants")[i % 2])
            folder.mkdir(exist_ok=True)
            path.rename(folder / path.name)
        return root

    @pytest.mark.parametrize("name", ["mmd", "dann"])
    def test_training_ends_with_the_same_bits_whatever_they_are(self, domains: Path, tmp_path: Path, name: str) -> None:
        """Shuffled, all the same, or absent; and the same images in another order would show (other file names)."""
        _, expected = ended(settings(domains, tmp_path / "run", name))
        for kind in ("absent", "shuffled", "one"):
            root = self.variant(domains, tmp_path / kind, kind)
            summary, found = ended(settings(root, tmp_path / f"run-{kind}", name))
            assert summary["target_images"] == 13
            assert all(torch.equal(found[key], tensor) for key, tensor in expected.items()), kind
        root = self.variant(domains, tmp_path / "renamed", "absent")
        for path in (root / "target" / "train").iterdir():
            path.rename(path.with_stem(path.stem[::-1]))
        _, found = ended(settings(root, tmp_path / "run-renamed", name))
        assert not all(torch.equal(found[key], tensor) for key, tensor in expected.items())

    def test_source_only_does_not_even_look_at_them(self, domains: Path, tmp_path: Path) -> None:
        shutil.copytree(domains, tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy" / "target" / "train")
        summary, _ = ended(settings(tmp_path / "copy", tmp_path / "run", "source_only", epochs=1))
        assert (summary["train_images"], summary["target_images"], summary["val_images"]) == (20, 0, 9)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"strategy": StrategyConfig(name="dann"), "cache": config.CacheConfig(features="exact")}, "everything trains"),
        ({"strategy": StrategyConfig(name="mmd"), "data": DataConfig(mixup=1.0, mix_at="cut")}, "source and target"),
        ({"strategy": StrategyConfig(name="mmd"), "train": TrainConfig(accumulate=32)}, "needs two"),
    ],
)
def test_what_cannot_be(changes: dict[str, Any], says: str) -> None:
    base = RunConfig(data=DataConfig(augment="none"))
    changes = {name: replace(value, augment="none") if name == "data" else value for name, value in changes.items()}
    with pytest.raises(UserError, match=says):
        validate(replace(base, **changes))


def test_weights_are_saved_under_the_networks_own_names(domains: Path, tmp_path: Path) -> None:
    """They load into the network itself, and are weights to start from."""
    made = settings(domains, tmp_path / "run", "dann", batchnorm="domain", epochs=1)
    _, weights = ended(made)
    from tldist.models.digit_nets import DigitNet

    net = DigitNet(28, batchnorm=True, num_classes=2)
    net.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith("discriminator")})
    path = Path(made.run_dir) / "checkpoints" / "last" / "model.safetensors"
    model = backbones.build(ModelConfig(name="dann_mnist_bn", weights=str(path)), 5, 28, 0)
    assert torch.equal(model.torchvision_state()["conv2.weight"], net.conv2.weight)
    with pytest.raises(UserError, match="no published weights of dann_mnist"):
        backbones.build(ModelConfig(name="dann_mnist"), 5, 28, 0)
