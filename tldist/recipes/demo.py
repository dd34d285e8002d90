"""The demo's two halves, on scikit-learn's digits: learn 0-4 from all images, then 5-9 from 20 images per class.

What each strategy reached is printed by `tldist demo` as measured, beside the same budget from scratch.
"""

from dataclasses import replace

from tldist.config import DataConfig, ModelConfig, OptimConfig, RunConfig, StrategyConfig, TrackingConfig, TrainConfig

SOURCE_CLASSES = ("0", "1", "2", "3", "4")
TARGET_CLASSES = ("5", "6", "7", "8", "9")


def demo() -> RunConfig:
    """The target half: 100 images, 12 epochs of 5 steps. Mirrored digits are other signs: no augmentation."""
    return RunConfig(
        recipe="demo",
        model=ModelConfig(name="resnet18", weights="none"),
        strategy=StrategyConfig(name="feature_extraction", backbone_lr=0.3, epochs_per_stage=2),
        data=DataConfig(
            root="data/digits",
            batch_size=20,
            image_size=32,
            augment="none",
            classes=TARGET_CLASSES,
            train_images_per_class=20,
        ),
        optim=OptimConfig(name="adamw", base_lr=3e-3),
        train=TrainConfig(epochs=12, precision="fp32"),
        tracking=TrackingConfig(wandb="disabled"),
    )


def demo_source() -> RunConfig:
    """The source half: five classes, about 720 images, four epochs."""
    target = demo()
    return replace(
        target,
        recipe="demo_source",
        strategy=StrategyConfig(name="scratch"),
        data=replace(target.data, classes=SOURCE_CLASSES, train_images_per_class=0, batch_size=32),
        optim=replace(target.optim, base_lr=1e-3),
        train=replace(target.train, epochs=4),
    )
