"""The small convolutional networks of the papers on domain adaptation, for digits of 28 or 32 pixels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor, nn


class DigitNet(nn.Module):
    """images_NCHW -> logits_NC, in stages conv1, conv2, fc3, fc4 and fc5 with the layers of these names.

    Figure 4a of the DANN paper (Ganin et al., JMLR 2016), which is the network of MNIST to MNIST-M there and in DSN
    (Bousmalis et al., 2016): 5 x 5 convolutions of 32 and 48 channels, each pooled by 2, then 100, 100 and 10 units.
    """

    def __init__(self, image_size: int, batchnorm: bool, num_classes: int = 10) -> None:
        """`batchnorm`: put one behind each layer but the last, which the papers' has not."""
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2
        self.conv1, self.conv2 = nn.Conv2d(3, 32, 5), nn.Conv2d(32, 48, 5)
        self.fc3, self.fc4 = nn.Linear(48 * side * side, 100), nn.Linear(100, 100)
        self.fc5 = nn.Linear(100, num_classes)
        if batchnorm:
            self.bn1, self.bn2 = nn.BatchNorm2d(32), nn.BatchNorm2d(48)
            self.bn3, self.bn4 = nn.BatchNorm1d(100), nn.BatchNorm1d(100)

    def stage_modules(self) -> dict[str, nn.Module]:
        """The layers in order, by the stage that runs them."""
        names = dict(self.named_children())
        pooled = {"pool": nn.MaxPool2d(2), "relu": nn.ReLU()}
        stages = {
            "conv1": pooled,
            "conv2": {**pooled, "flatten": nn.Flatten()},
            "fc3": {"relu": nn.ReLU()},
            "fc4": {"relu": nn.ReLU()},
        }
        return {name: _stage(name, names, after) for name, after in stages.items()}

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stage_modules().values():
            x = stage(x)
        return self.fc5(x)


def _stage(name: str, layers: Mapping[str, nn.Module], after: Mapping[str, nn.Module]) -> nn.Module:
    norm = f"bn{name[-1]}"
    own = {name: layers[name]} | ({norm: layers[norm]} if norm in layers else {})
    return nn.Sequential(OrderedDict({**own, **after}))
