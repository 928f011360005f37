"""VGG7, the convolutional network of MASE's examples on CIFAR-10, from the literature on ternary weights.

Names of layers are MASE's, so its configurations and checkpoints fit.
"""

from __future__ import annotations

from torch import Tensor, nn

from bitfront.errors import ConfigError
from bitfront.models import MODELS

#: Output channels of the two convolutions before each halving of the image.
STAGES = (128, 256, 512)
#: The image is halved once per stage.
REDUCTION = 2 ** len(STAGES)


class VGG7(nn.Module):
    """Six convolutions with batch norm, and three linear layers.

    x (samples, channels, height, width) → logits (samples, classes).
    """

    def __init__(self, channels: int, height: int, width: int, num_classes: int) -> None:
        super().__init__()
        features: list[nn.Module] = []
        for size in STAGES:
            for _ in range(2):
                norm = nn.BatchNorm2d(size, momentum=0.9)
                features += [nn.Conv2d(channels, size, kernel_size=3, padding=1), norm, nn.ReLU()]
                channels = size
            features.append(nn.MaxPool2d(2))
        self.feature_layers = nn.Sequential(*features)
        flat = channels * (height // REDUCTION) * (width // REDUCTION)
        self.classifier = nn.Sequential(nn.Linear(flat, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU())
        self.last_layer = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of each sample."""
        logits: Tensor = self.last_layer(self.classifier(self.feature_layers(x).flatten(1)))
        return logits


@MODELS.register("vgg7", data="cifar10")
def vgg7(sample_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Six convolutions, 128 to 512 channels, and three linear layers: 14 million parameters on cifar10; for images."""
    if len(sample_shape) != 3 or min(sample_shape[1:]) < REDUCTION:
        raise ConfigError(
            f"model 'vgg7' takes images, of shape (channels, height, width) with at least {REDUCTION} × {REDUCTION} "
            f"pixels; the samples of this dataset have shape {tuple(sample_shape)}. Choose a dataset of images, such "
            "as cifar10 or digits, or a model for flat samples, such as digits-mlp or jsc-mlp.",
            key=("model",),
        )
    channels, height, width = sample_shape
    return VGG7(channels, height, width, num_classes)
