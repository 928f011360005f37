"""Small random networks for learned bits: each as a torch model, and once more in whole numbers.

``networks()`` draws one. ``Network.forward`` is what a user writes. ``Network.whole`` is the same in NumPy, with a layer
of ``by_integers`` in the place of each linear layer and convolution; a batch norm is in its layer by then.
"""

import numpy as np
import torch
from by_integers import relu, windows
from hypothesis import strategies as st
from torch import nn

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d}
NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
LARGEST, MEANS = {1: nn.MaxPool1d, 2: nn.MaxPool2d}, {1: nn.AvgPool1d, 2: nn.AvgPool2d}
#: Name → (the module, the same in NumPy).
ACTIVATIONS = {
    "none": (nn.Identity, lambda x: x),
    "relu": (nn.ReLU, relu),
    "relu6": (nn.ReLU6, lambda x: np.minimum(relu(x), np.float32(6))),
    "bounded": (lambda: nn.Hardtanh(0.0, 1.5), lambda x: np.minimum(relu(x), np.float32(1.5))),
    "both": (nn.Hardtanh, lambda x: np.clip(x, np.float32(-1), np.float32(1))),
    "leaky": (lambda: nn.LeakyReLU(0.1), lambda x: np.where(x < 0, x * np.float32(0.1), x)),
}


class Layered(nn.Module):
    """A linear layer or convolution, maybe a batch norm, an activation.

    Args:
        shape: of a sample of the input.
        same: whether the output has the sizes of the input.
        draw: hypothesis's.
    """

    def __init__(self, draw, shape, outputs=None, same=False, act=None):
        super().__init__()
        dims, channels = len(shape) - 1, shape[0]
        norm = draw(st.booleans())
        bias = draw(st.booleans())
        if dims == 0:
            outputs = outputs or draw(st.integers(1, 6))
            self.layer, self.out = nn.Linear(channels, outputs, bias), (outputs,)
        else:
            outputs = outputs or channels * draw(st.integers(1, 2)) if same else draw(st.sampled_from([2, 4]))
            shared = [g for g in {1, 2, channels} if channels % g == 0 and outputs % g == 0]
            geometry = {"groups": draw(st.sampled_from(sorted(shared)))}
            if same:
                kernel = draw(st.sampled_from([1, 3]))
                geometry |= {"kernel_size": kernel, "padding": kernel // 2}
            else:
                kernel = draw(st.integers(1, min(3, *shape[1:])))
                geometry |= {"kernel_size": kernel, "stride": draw(st.integers(1, 2)), "padding": 0}
                if kernel == 2 and min(shape[1:]) > 2:
                    geometry["dilation"] = draw(st.integers(1, 2))
                geometry["padding"] = draw(st.integers(0, kernel // 2))
            self.layer = CONVOLUTIONS[dims](channels, outputs, bias=bias, **geometry)
            with torch.no_grad():
                self.out = tuple(self.layer(torch.zeros(1, *shape)).shape[1:])
        self.norm = NORMS[dims](outputs) if norm else nn.Identity()
        act = act or draw(st.sampled_from(sorted(ACTIVATIONS)))
        self.act, self.function = ACTIVATIONS[act][0](), act

    def forward(self, x):
        return self.act(self.norm(self.layer(x)))

    def whole(self, path, layers, x):
        return ACTIVATIONS[self.function][1](layers[f"{path}.layer"](x))


class Residual(nn.Module):
    """x + f(x), or f(x) + g(x), and an activation."""

    def __init__(self, draw, shape):
        super().__init__()
        self.first = Layered(draw, shape, same=True)
        self.second = Layered(draw, self.first.out, shape[0], same=True, act="none")
        self.short = Layered(draw, shape, shape[0], same=True, act="none") if draw(st.booleans()) else None
        self.out, self.function = shape, draw(st.sampled_from(["none", "relu"]))
        self.act = ACTIVATIONS[self.function][0]()

    def forward(self, x):
        beside = x if self.short is None else self.short(x)
        return self.act(beside + self.second(self.first(x)))

    def whole(self, path, layers, x):
        beside = x if self.short is None else self.short.whole(f"{path}.short", layers, x)
        behind = self.second.whole(f"{path}.second", layers, self.first.whole(f"{path}.first", layers, x))
        return ACTIVATIONS[self.function][1](beside + behind)


class Beside(nn.Module):
    """The channels of x and of f(x)."""

    def __init__(self, draw, shape):
        super().__init__()
        self.branch = Layered(draw, shape, same=True)
        self.out = (shape[0] + self.branch.out[0], *shape[1:])

    def forward(self, x):
        return torch.cat([x, self.branch(x)], dim=1)

    def whole(self, path, layers, x):
        return np.concatenate([x, self.branch.whole(f"{path}.branch", layers, x)], axis=1)


class Pooled(nn.Module):
    """Windows of two per dimension: their largest value, or their mean."""

    def __init__(self, draw, shape):
        super().__init__()
        self.mean, dims = draw(st.booleans()), len(shape) - 1
        self.pool = (MEANS if self.mean else LARGEST)[dims](2)
        self.out = (shape[0], *(size // 2 for size in shape[1:]))

    def forward(self, x):
        return self.pool(x)

    def whole(self, path, layers, x):
        even = x[(slice(None), slice(None), *(slice(0, size // 2 * 2) for size in x.shape[2:]))]
        cut = windows(even, 2) if x.ndim == 4 else even.reshape(*even.shape[:2], -1, 2)
        return cut.sum(-1) / np.float32(cut.shape[-1]) if self.mean else cut.max(-1)


class Flat(nn.Module):
    def __init__(self, draw, shape):
        super().__init__()
        self.out = (int(np.prod(shape)),)

    def forward(self, x):
        return x.flatten(1)

    def whole(self, path, layers, x):
        return x.reshape(len(x), -1)


class Network(nn.Module):
    """Blocks one after another, and a linear layer at the end."""

    def __init__(self, draw, shape, blocks, classes):
        super().__init__()
        self.shape, self.classes, steps = shape, classes, []
        for kind in blocks:
            if kind is Pooled and (len(shape) == 1 or min(shape[1:]) < 2):
                continue
            steps.append(kind(draw, shape))
            shape = steps[-1].out
        if len(shape) > 1:
            steps.append(Flat(draw, shape))
        self.steps, self.head = nn.ModuleList(steps), nn.Linear(steps[-1].out[0], classes)

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return self.head(x)

    def whole(self, layers, x):
        """Logits; `layers` has a layer of ``by_integers`` by path."""
        for place, step in enumerate(self.steps):
            x = step.whole(f"steps.{place}", layers, x)
        return layers["head"](x)


@st.composite
def networks(draw):
    """A network of two to five layers or so, with seeded weights, and statistics as if it had been trained."""
    shape = draw(st.sampled_from([(5,), (2, 7), (2, 4, 4)]))
    blocks = draw(st.lists(st.sampled_from([Layered, Layered, Residual, Beside, Pooled]), min_size=1, max_size=3))
    if all(kind is Pooled for kind in blocks):
        blocks.append(Layered)
    seed = draw(st.integers(0, 999))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Network(draw, shape, blocks, draw(st.integers(2, 4))).eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(module.running_mean, 0, 0.2)
                nn.init.uniform_(module.running_var, 0.3, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
    return model
