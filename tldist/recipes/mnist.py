"""MNIST: 60,000 training and 10,000 validation digits of 28 px; about 0.99 within an epoch or two."""

from tldist.config import DataConfig, OptimConfig, RunConfig, StrategyConfig, TrainConfig


def mnist() -> RunConfig:
    """ResNet-18 from scratch at 32 px; a mirrored digit is another sign, so nothing is flipped."""
    return RunConfig(
        recipe="mnist",
        strategy=StrategyConfig(name="scratch"),
        data=DataConfig(root="data/mnist", batch_size=256, image_size=32, augment="none"),
        optim=OptimConfig(name="adamw", base_lr=1e-3),
        train=TrainConfig(epochs=2),
    )
