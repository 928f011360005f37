"""A network of the size that people really quantize: ResNet-20 on 32 × 32 × 3 (He et al. 2016, section 4.2).

An ordinary ``nn.Module``: three stages of three residual blocks with 16, 32 and 64 channels, batch norms as they are
trained, shortcuts by a 1 × 1 convolution where the shape changes; 22 convolutions and linear layers in all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet20(nn.Module):
    def __init__(self, classes: int = 10, blocks: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        stages: list[nn.Module] = []
        width = 16
        for stage, outputs in enumerate((16, 32, 64)):
            for block in range(blocks):
                stages.append(Block(width, outputs, 2 if stage and not block else 1))
                width = outputs
        self.blocks = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn(self.conv(x))))
        return self.fc(self.flatten(self.pool(x)))


def resnet20(blocks: int = 3, seed: int = 0) -> nn.Module:
    """Random weights, but batch norm statistics that belong to them: some batches are run in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ResNet20(blocks=blocks).train()
        with torch.no_grad():
            for _ in range(10):
                model(torch.randn(32, 3, 32, 32))
    return model.eval()
