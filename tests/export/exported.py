"""Models and formats that what is exported must compute as the simulated model does."""

import torch
from torch import nn

from bitfront.formats.affine import Affine
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.models import MODELS
from bitfront.models.base import build_model
from bitfront.transforms import calibrate

BUNDLED = [
    (name, (1, 8, 8) if name == "digits-cnn" else (16,))
    for name in MODELS.names()
    if name.startswith(("digits", "jsc"))
]


class Residual(nn.Module):
    """Most of what convolutional networks are put together from."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding="same", groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.act, self.relu = nn.Hardswish(), nn.ReLU6()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.pool, self.drop = nn.MaxPool2d(2), nn.Dropout(0.5)
        self.down = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        y = self.relu(self.point(self.act(self.deep(x))))
        x = x + y * self.gate(y)
        x = self.down(self.pool(x))
        x = torch.cat([torch.tanh(x).mean((2, 3)), nn.functional.gelu(x).mean([2, 3])], dim=1)
        return self.head(self.drop(x)).softmax(-1)


class Attention(nn.Module):
    """Products of activations, on (batch, tokens, features)."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(24, 3)

    def forward(self, x):
        x = self.norm(x)
        mixed = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) * 0.5, dim=-1) @ self.v(x)
        return self.out(mixed.reshape(x.size(0), -1))


class Sequence1d(nn.Sequential):
    """Conv1d and its pools."""

    def __init__(self):
        super().__init__(
            nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(4, 6, 3), nn.Sigmoid(),
            nn.MaxPool1d(2), nn.Flatten(), nn.Linear(6, 3),
        )  # fmt: skip


def model_of(name, shape):
    network = {"residual": Residual, "attention": Attention, "sequence": Sequence1d}.get(name)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if network is None:
            return build_model(name, shape, 5, seed=1).eval()
        model = network().eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(module.running_mean, 0, 0.3)
                nn.init.uniform_(module.running_var, 0.3, 2)
    return model


def formats_of(graph, family, width):
    formats = {}
    for site in graph.sites:
        by_operand = {}
        for operand in site.operands:
            kind = site.operation.operand(operand).kind()
            signed = operand != "data_in" or site.negative_inputs_matter
            if family == "integer":
                by_operand[operand] = Integer.parse(
                    {"width": 16 if operand == "bias" else width, "frac_width": "auto"}, kind, signed=signed
                )
            else:
                granularity = "NA" if site.weight else "tensor"
                by_operand[operand] = Affine.parse(
                    {"width": 16 if operand == "bias" else width, "range": "mse", "granularity": granularity}, kind
                )
        formats[site.name] = by_operand
    return formats


EVERY = [*BUNDLED, ("residual", (2, 8, 8)), ("attention", (4, 6)), ("sequence", (2, 8))]


def case(name, shape, family, width):
    graph = capture(model_of(name, shape), torch.randn(2, *shape, generator=torch.Generator().manual_seed(2)))
    x = torch.randn(64, *shape, generator=torch.Generator().manual_seed(3))
    return graph, calibrate(graph, formats_of(graph, family, width), x), x
