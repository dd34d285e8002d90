"""scikit-learn's digits: 1,797 images of 8 px, scaled to 32 px; they come with a dependency, so nothing is fetched.

ResNet-18 from scratch on all ten classes reaches about 0.98 in ten epochs. `tldist demo` transfers from 0-4 to 5-9.
"""

from tldist.config import DataConfig, ModelConfig, OptimConfig, RunConfig, StrategyConfig, TrainConfig


def digits() -> RunConfig:
    """ResNet-18 from scratch at 32 px."""
    return RunConfig(
        recipe="digits",
        model=ModelConfig(name="resnet18", weights="none"),
        strategy=StrategyConfig(name="scratch"),
        data=DataConfig(root="data/digits", batch_size=64, image_size=32, augment="none"),
        optim=OptimConfig(name="adamw", base_lr=1e-3),
        train=TrainConfig(epochs=10),
    )
