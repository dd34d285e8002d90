"""Ants and bees: 244 training and 153 validation photos (PyTorch's transfer-learning tutorial).

Published for ResNet-18 with ImageNet weights at 224 px: fine-tuned 0.935 to 0.961, fixed features 0.935 to 0.948
(best epoch). With much weaker TinyImageNet weights at 96 px tldist measured 0.79 to 0.82: docs/results.md.
"""

from tldist.config import DataConfig, OptimConfig, RunConfig, StrategyConfig, TrainConfig


def hymenoptera() -> RunConfig:
    """Small data: SGD, a high rate for the head, a tenth of it for pre-trained stages, fifteen epochs."""
    return RunConfig(
        recipe="hymenoptera",
        strategy=StrategyConfig(name="feature_extraction", backbone_lr=0.1),
        # The archive holds one file that is no photo, train/ants/imageNotFound.gif.
        data=DataConfig(root="data/hymenoptera", batch_size=32, image_size=96, augment="basic", on_bad_image="skip"),
        optim=OptimConfig(name="sgd", base_lr=0.2, weight_decay=1e-4),
        train=TrainConfig(epochs=15, label_smoothing=0.0),
    )
