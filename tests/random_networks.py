"""Random convolutional networks, built from the blocks of real ones: a hypothesis strategy.

``networks()`` draws a plan, a list of (block, number); ``Network(plan)`` is the model. Weights follow from the plan, and
running statistics are as if it had been trained. Samples have the shape ``Network.shape``. ``Pixels`` is a small network for
segmentation that is the same each time.
"""

import torch
from hypothesis import strategies as st
from torch import nn

CLASSES = 3


class Pixels(nn.Module):
    """A skip over a smaller picture, as in a U-Net."""

    def __init__(self):
        super().__init__()
        self.down, self.pool = nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2)
        self.up, self.head = nn.ConvTranspose2d(4, 4, 2, stride=2), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        skip = torch.relu(self.down(x))
        return self.head(torch.cat([skip, self.up(self.pool(skip))], dim=1))


class Conv(nn.Sequential):
    """Convolution, maybe BatchNorm, and ReLU."""

    def __init__(self, inputs, outputs, kernel=3, norm=True, groups=1):
        layers = [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not norm, groups=groups)]
        super().__init__(*layers, *([nn.BatchNorm2d(outputs)] if norm else []), nn.ReLU())


class Plain(nn.Module):
    def __init__(self, c, n):
        super().__init__()
        self.out = 2 + n
        self.conv = Conv(c, self.out, kernel=1 + 2 * (n % 2), norm=n % 3 > 0)

    def forward(self, x):
        return self.conv(x)


class Residual(nn.Module):
    """x + f(x), f with another width."""

    def __init__(self, c, n):
        super().__init__()
        self.out = c
        self.a, self.b, self.norm = Conv(c, 2 + n), nn.Conv2d(2 + n, c, 1), nn.BatchNorm2d(c)

    def forward(self, x):
        return torch.relu(x + self.norm(self.b(self.a(x))))


class Projected(nn.Module):
    """f(x) + g(x), g a projection."""

    def __init__(self, c, n):
        super().__init__()
        self.out = 2 + n
        self.a, self.b = Conv(c, self.out), nn.Conv2d(c, self.out, 1)

    def forward(self, x):
        return self.a(x).add(self.b(x))


class Concatenating(nn.Module):
    """x beside f(x)."""

    def __init__(self, c, n):
        super().__init__()
        self.out = c + 1 + n
        self.norm, self.a = nn.BatchNorm2d(c), Conv(c, 1 + n)

    def forward(self, x):
        return torch.cat([x, self.a(self.norm(x))], dim=1)


class Inverted(nn.Module):
    """Wide, depthwise, narrow: MobileNet's."""

    def __init__(self, c, n):
        super().__init__()
        self.out = c
        self.a, self.b, self.c = Conv(c, 2 + n, 1), Conv(2 + n, 2 + n, groups=2 + n), Conv(2 + n, c, 1)

    def forward(self, x):
        return x + self.c(self.b(self.a(x)))


class Depthwise(nn.Module):
    """Depthwise on whatever comes, maybe a concatenation, with one or two outputs per channel."""

    def __init__(self, c, n):
        super().__init__()
        self.out = c * (1 + n % 2)
        self.a = Conv(c, self.out, groups=c)

    def forward(self, x):
        return self.a(x)


class Grouped(nn.Module):
    """A convolution in two groups, behind one that makes its input."""

    def __init__(self, c, n):
        super().__init__()
        self.out = 4 + 2 * n
        self.a, self.b = Conv(c, 4), Conv(4, self.out, groups=2)

    def forward(self, x):
        return self.b(self.a(x))


class Squeezed(nn.Module):
    """Each channel times a number that all of them have a say in: squeeze and excitation."""

    def __init__(self, c, n):
        super().__init__()
        self.out = c
        self.a, self.b = nn.Linear(c, 1 + n), nn.Linear(1 + n, c)

    def forward(self, x):
        b, c, _, _ = x.size()
        y = torch.sigmoid(self.b(torch.relu(self.a(x.mean((2, 3)))))).view(b, c, 1, 1)
        return x * y.expand_as(x)


class Overlapping(nn.Module):
    """Two pairs side by side, cut at different places, added."""

    def __init__(self, c, n):
        super().__init__()
        self.out = 4 + n
        self.a, self.b = nn.Conv2d(c, 1 + n, 1), nn.Conv2d(c, 3, 1)
        self.c, self.d = nn.Conv2d(c, 2, 1), nn.Conv2d(c, 2 + n, 1)

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x)], 1) + torch.cat((self.c(x), self.d(x)), dim=1)


class Normed(nn.Module):
    """GroupNorm of two groups, then LayerNorm over channels, which go last for it."""

    def __init__(self, c, n):
        super().__init__()
        self.out = 4
        self.a, self.groups, self.layer = nn.Conv2d(c, 4, 1), nn.GroupNorm(2, 4, affine=n > 1), nn.LayerNorm(4)

    def forward(self, x):
        return self.layer(self.groups(self.a(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


BLOCKS = (Plain, Residual, Projected, Concatenating, Inverted, Depthwise, Grouped, Squeezed, Overlapping)


class Network(nn.Module):
    """A stem, the planned blocks, and a head on the flattened maps or on their means."""

    shape = (2, 4, 4)

    def __init__(self, plan, flat):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem = nn.Conv2d(2, 3, 3, padding=1)
            blocks, width = [], 3
            for block, n in plan:
                blocks.append(block(width, n))
                width = blocks[-1].out
            self.blocks, self.flat = nn.ModuleList(blocks), flat
            self.pool = nn.MaxPool2d(2)
            self.hidden, self.head = nn.Linear(width * (4 if flat else 1), 5), nn.Linear(5, CLASSES)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.normal_(module.running_mean, 0, 0.3)
                    nn.init.uniform_(module.running_var, 0.5, 2)
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.normal_(module.bias, 0, 0.3)
        self.eval()

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = torch.flatten(self.pool(x), 1) if self.flat else x.mean(dim=(2, 3))
        return self.head(torch.relu(self.hidden(x)))


def networks(blocks=BLOCKS, size=4, flat=(False, True)):
    """Strategy: networks of up to `size` of these blocks; `flat`: whether their maps may be flattened."""
    plan = st.lists(st.tuples(st.sampled_from(blocks), st.integers(0, 3)), max_size=size)
    return st.builds(Network, plan, st.sampled_from(flat))
