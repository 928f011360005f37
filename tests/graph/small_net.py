"""A small network, inputs for it, and a format that changes next to nothing, for tests of capture."""

import torch
from torch import nn

from bitfront.formats import FORMATS
from bitfront.formats.base import ACTIVATION


def sample(rows=6, features=8):
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(1))


def wide():
    """A format that changes next to nothing."""
    return FORMATS.get("integer").parse({"width": 30, "frac_width": 20}, ACTIVATION)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.act, self.b = nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)

    def middle(self, h):
        return h

    def forward(self, x):
        h = self.act(self.a(x))
        return self.b(self.middle(h * 1) + h)
