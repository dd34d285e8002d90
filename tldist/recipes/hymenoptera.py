"""Ants and bees: 244 training and 153 validation photos (PyTorch's transfer-learning tutorial).

Published for ResNet-18 with ImageNet weights at 224 px: fine-tuned 0.935 to 0.961, fixed features 0.935 to 0.948
(best epoch). What tldist measured, with weaker TinyImageNet weights at 96 px, is in docs/results.md.
"""

from tldist.config import DataConfig, OptimConfig, RunConfig, StrategyConfig, TrainConfig


def hymenoptera() -> RunConfig:
    """Small data: gentle crops, SGD, fifteen epochs."""
    return RunConfig(
        recipe="hymenoptera",
        strategy=StrategyConfig(name="feature_extraction"),
        data=DataConfig(root="data/hymenoptera", batch_size=32, image_size=96, augment="basic"),
        optim=OptimConfig(name="sgd", base_lr=0.01, weight_decay=1e-4),
        train=TrainConfig(epochs=15),
    )
