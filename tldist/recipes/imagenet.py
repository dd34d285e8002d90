"""ImageNet-1k as class folders: 1,281,167 training and 50,000 validation photos.

ResNet-50 from scratch, 90 epochs, this schedule: about 0.76 (Goyal et al., 2017; torchvision V1 0.761).
"""

from tldist.config import DataConfig, ModelConfig, OptimConfig, RunConfig, StrategyConfig, TrainConfig


def imagenet() -> RunConfig:
    """Batch 1024 with the linear rule: 0.1 per 256 images, five epochs of warm-up."""
    return RunConfig(
        recipe="imagenet",
        model=ModelConfig(name="resnet50", weights="none"),
        strategy=StrategyConfig(name="scratch"),
        data=DataConfig(root="data/imagenet", batch_size=1024, image_size=224, augment="basic"),
        optim=OptimConfig(name="sgd", base_lr=0.4, weight_decay=1e-4, warmup_epochs=5, clip_norm=0.0),
        train=TrainConfig(epochs=90),
    )
