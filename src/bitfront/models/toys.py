"""The smallest models of MASE, for the data ``toy-tiny`` and for images: ``toy`` and ``toy-tiny``.

Names of layers are MASE's, so its configurations and checkpoints fit.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from bitfront.models import MODELS


class Toy(nn.Module):
    """Three linear layers in ``seq_blocks``: x (samples, ...) → logits (samples, classes)."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.seq_blocks = nn.Sequential(
            *(nn.Linear(features, 8), nn.ReLU()), *(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits of each sample."""
        logits: Tensor = self.seq_blocks(x.flatten(1))
        return logits


class ToyTiny(nn.Module):
    """Two linear layers, each with a ReLU: x (samples, ...) → logits (samples, classes)."""

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.l1, self.relu_1 = nn.Linear(features, 2), nn.ReLU()
        self.l2, self.relu_2 = nn.Linear(2, num_classes), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Logits of each sample."""
        logits: Tensor = self.relu_2(self.l2(self.relu_1(self.l1(x.flatten(1)))))
        return logits


@MODELS.register("toy", data="toy-tiny")
def toy(sample_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Three linear layers, 4-8-8-2 on toy-tiny, on the flattened sample; MASE's, for samples of any shape."""
    return Toy(math.prod(sample_shape), num_classes)


@MODELS.register("toy-tiny", data="toy-tiny")
def toy_tiny(sample_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two linear layers, 4-2-2 on toy-tiny, on the flattened sample; MASE's, for samples of any shape."""
    return ToyTiny(math.prod(sample_shape), num_classes)
