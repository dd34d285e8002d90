"""Your own photos: any image folder, with settings that rarely disappoint."""

from tldist.config import DataConfig, OptimConfig, RunConfig, StrategyConfig, TrainConfig


def folder() -> RunConfig:
    """ResNet-18, last two stages, ten epochs at 224 px: a first number within minutes."""
    return RunConfig(
        recipe="folder",
        strategy=StrategyConfig(name="partial", backbone_lr=0.1),
        data=DataConfig(batch_size=32, image_size=224, augment="basic"),
        optim=OptimConfig(name="adamw", base_lr=1e-3),
        train=TrainConfig(epochs=10),
    )
