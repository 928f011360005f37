"""DS-CNN, the keyword spotter of MLPerf Tiny, for spectrograms of a second of speech (1 × 49 × 10).

Zhang et al., *Hello Edge: Keyword Spotting on Microcontrollers*, arXiv:1711.07128. It has no batch norms: in a network
for microcontrollers they are folded into the convolutions. So the weights begin as He et al. have them, with which
gradients keep their size through all layers.
"""

from __future__ import annotations

from torch import Tensor, nn

from bitfront.errors import ConfigError
from bitfront.models import MODELS


class DsCnn(nn.Module):
    """A convolution and blocks of a depthwise and a pointwise one: x (samples, 1, frames, features) → logits.

    Args:
        channels: of every layer.
        blocks: how many pairs of depthwise and pointwise convolutions.
        size: frames and features of a sample.
        num_classes: number of words.
    """

    def __init__(self, channels: int, blocks: int, size: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, (10, 4), stride=2, padding=(5, 1))
        self.relu = nn.ReLU()
        self.blocks = nn.ModuleList(_Block(channels) for _ in range(blocks))
        self.pool = nn.AvgPool2d((size[0] // 2 + 1, size[1] // 2))
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of each sample."""
        x = self.relu(self.conv(x))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.fc(self.flatten(self.pool(x)))
        return logits


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.relu1 = nn.ReLU()
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps of the same shape."""
        result: Tensor = self.relu2(self.pointwise(self.relu1(self.depthwise(x))))
        return result


@MODELS.register("ds-cnn", data="synthetic-keywords")
def ds_cnn(sample_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """MLPerf Tiny's DS-CNN: 64 channels, four depthwise-separable blocks, 22 thousand parameters; for 1 × 49 × 10."""
    return _sized(sample_shape, num_classes, 64, 4, "ds-cnn")


@MODELS.register("ds-cnn-small", data="synthetic-keywords")
def ds_cnn_small(sample_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The same with 16 channels and two blocks, for a quick try."""
    return _sized(sample_shape, num_classes, 16, 2, "ds-cnn-small")


def _sized(sample_shape: tuple[int, ...], num_classes: int, channels: int, blocks: int, name: str) -> nn.Module:
    if len(sample_shape) != 3 or sample_shape[0] != 1 or min(sample_shape[1:]) < 8:
        raise ConfigError(
            f"model {name!r} takes spectrograms, of shape (1, frames, features) with at least 8 of each; the samples "
            f'of this dataset have shape {tuple(sample_shape)}. Choose dataset = "synthetic-keywords", or a model for '
            "other samples, such as digits-mlp.",
            key=("model",),
        )
    return DsCnn(channels, blocks, (sample_shape[1], sample_shape[2]), num_classes)
