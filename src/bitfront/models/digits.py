"""Two small classifiers of small images, sized for scikit-learn's digits (1 × 8 × 8 pixels).

Each layer is a separate module with a clear name, so that torch.fx names the sites ``conv1``, ``relu1``, ``fc1`` ...
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from bitfront.errors import ConfigError
from bitfront.models import MODELS


class DigitsMLP(nn.Module):
    """Two linear layers on the flattened sample: x (samples, ...) → logits (samples, classes)."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(features, 32)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(32, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of each sample."""
        logits: Tensor = self.fc2(self.relu1(self.fc1(self.flatten(x))))
        return logits


class DigitsCNN(nn.Module):
    """Two convolutions, each halving the image, and two linear layers.

    x (samples, channels, height, width) → logits (samples, classes).
    """

    def __init__(self, channels: int, height: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, kernel_size=3, padding=1)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(32 * (height // 4) * (width // 4), 64)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of each sample."""
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        logits: Tensor = self.fc2(self.relu3(self.fc1(self.flatten(x))))
        return logits


@MODELS.register("digits-mlp", data="digits")
def digits_mlp(sample_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two linear layers, 64-32-10, on the flattened sample; samples of any shape."""
    return DigitsMLP(math.prod(sample_shape), num_classes)


@MODELS.register("digits-cnn", data="digits")
def digits_cnn(sample_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two convolutions and two linear layers, about 14 thousand parameters on digits; for images."""
    if len(sample_shape) != 3 or min(sample_shape[1:]) < 4:
        raise ConfigError(
            "model 'digits-cnn' takes images, of shape (channels, height, width) with at least 4 × 4 pixels; "
            f"the samples of this dataset have shape {tuple(sample_shape)}. Choose a dataset of images, such "
            "as digits, or a model for flat samples, such as digits-mlp or jsc-mlp.",
            key=("model",),
        )
    channels, height, width = sample_shape
    return DigitsCNN(channels, height, width, num_classes)
