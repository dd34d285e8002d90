"""CIFAR-10: 50,000 training and 10,000 validation images of 32 px.

Published, full fine-tuning of an ImageNet ResNet-50: 0.966 (tllib); linear probe of MoCo-v2 features: 0.918.
"""

from tldist.config import DataConfig, OptimConfig, RunConfig, StrategyConfig, TrainConfig


def cifar10() -> RunConfig:
    """ResNet-18, everything trains, pre-trained stages at a third of the head's rate."""
    return RunConfig(
        recipe="cifar10",
        strategy=StrategyConfig(name="full", backbone_lr=0.3),
        data=DataConfig(root="data/cifar10", batch_size=256, image_size=64, augment="basic"),
        optim=OptimConfig(name="adamw", base_lr=1e-3, weight_decay=0.05),
        train=TrainConfig(epochs=10),
    )
