"""Draw what runs between two domains learned to see: target and source features of several runs, by t-SNE.

    python -m tldist_benchmarks.domain_features OUT.png RUN_DIR [RUN_DIR ...]

Each run gives one panel: the same images of both domains, as its last weights see them at the stage where `mmd` and
`dann` align them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch

from tldist import config
from tldist.checkpoints import checkpoint
from tldist.config import DOMAINS, RunConfig
from tldist.data.batches import plan_batch
from tldist.data.load.open import open_loader
from tldist.data.presets import AugmentSpec
from tldist.data.source.domains import build_domains
from tldist.data.source.index import Index, Split
from tldist.models import backbones
from tldist.models.batchnorm import BatchNorm
from tldist.objectives.domains import rows_of
from tldist.train.inputs.inputs import to_input

IMAGES = 500
"""Of each domain."""


@torch.no_grad()
def features(settings: RunConfig, index: Index, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """(features_ND, labels_N) of the first images of a split, by the run's last weights."""
    folder = Path(settings.run_dir) / "checkpoints" / "last"
    model = backbones.build(settings.model, len(index.classes), settings.data.image_size, 0, pretrained=False)
    model.load_torchvision_state(checkpoint.read_weights(folder))
    ids_N = np.arange(min(IMAGES, len(split)))
    plan = plan_batch(split, AugmentSpec(), settings.data.image_size, 0, 0, ids_N)
    device = torch.device("cpu")
    loader = open_loader(settings.data, AugmentSpec(), len(ids_N), device, in_shards=split.members is not None)
    images_NHWC = next(iter(loader.batches([plan]))).images_NHWC
    loader.close()
    stage = settings.strategy.align_at or list(model.stages)[-2]
    model.eval()
    if settings.train.batchnorm == "domain" and len(DOMAINS[settings.strategy.name]) == 2:
        for module in model.modules():  # each domain by its own statistics, of which the target's alone were kept
            module.train(isinstance(module, BatchNorm))
    _, output = model(to_input(images_NHWC, torch.float32), stage)
    return rows_of(output).numpy(), plan.labels_N


def draw(out: Path, run_dirs: list[Path]) -> None:
    """One panel for each run: colour tells the class, filled the source, hollow the target."""
    from sklearn.manifold import TSNE  # takes a second to import

    figure, axes = plt.subplots(1, len(run_dirs), figsize=(4.2 * len(run_dirs), 4.2), squeeze=False)
    for axis, run_dir in zip(axes[0], run_dirs, strict=True):
        settings = config.load(run_dir / "config.yaml")
        index = build_domains(settings.data.root, ("source",))
        (source, source_labels), (target, target_labels) = (
            features(settings, index, s) for s in (index.train, index.val)
        )
        placed = TSNE(random_state=0, init="pca", perplexity=30).fit_transform(np.concatenate([source, target]))
        colours = plt.get_cmap("tab10")
        axis.scatter(*placed[: len(source)].T, s=9, c=colours(source_labels), linewidths=0)
        edges = colours(target_labels)
        axis.scatter(*placed[len(source) :].T, s=12, facecolors="none", edgecolors=edges, linewidths=0.8)
        axis.set_title(settings.strategy.name)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.text(0.5, 0.02, "filled: MNIST; hollow: MNIST-M (test); one colour a digit", ha="center", fontsize=9)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(out, dpi=75)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]])
