"""Small networks with random weights, one for each way in which a model can be put together.

``NETWORKS`` holds every one of them that has a site. Each has a `shape`, that of one sample, and is at the top level, so
that it can be pickled; ``seeded_model(network)`` gives the same weights every time.
"""

import torch
import torch.nn.functional as F
from torch import nn

NETWORKS = []
CLASSES = 4


def network(*shape):
    """Decorator: into the list, with the shape of a sample."""

    def listed(cls):
        cls.shape = shape
        NETWORKS.append(cls)
        return cls

    return listed


def seeded_model(cls, seed=0):
    """The network with seeded weights, in evaluation mode, with running statistics as if it had been trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls().eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(module.running_mean, 0, 0.3)
                nn.init.uniform_(module.running_var, 0.3, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    return model


# --- chains ----------------------------------------------------------------------------------------------------------


@network(6)
class Chain(nn.Sequential):
    """Linear and ReLU in turn."""

    def __init__(self):
        super().__init__(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, CLASSES))


@network(6)
class Lonely(nn.Sequential):
    """One Linear, which makes the output."""

    def __init__(self):
        super().__init__(nn.Linear(6, CLASSES, bias=False))


@network(6)
class Normalised(nn.Sequential):
    """BatchNorm between Linear and ReLU, one at the very front, ReLU in place."""

    def __init__(self):
        super().__init__(
            nn.BatchNorm1d(6),
            nn.Linear(6, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(inplace=True),
            nn.Linear(8, 7, bias=False),
            nn.BatchNorm1d(7),
            nn.ReLU(inplace=True),
            nn.Linear(7, CLASSES),
        )


@network(6)
class EndsInReLU(nn.Sequential):
    """The logits are a ReLU's: many are 0, and equal."""

    def __init__(self):
        super().__init__(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, CLASSES), nn.ReLU())


@network(6)
class StartsWithReLU(nn.Sequential):
    """The input itself goes through a ReLU that is in place."""

    def __init__(self):
        super().__init__(nn.ReLU(inplace=True), nn.Linear(6, CLASSES))


@network(6)
class Nested(nn.Module):
    """Blocks within blocks, with modules between them that do nothing."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Sequential(nn.Identity(), nn.Linear(6, 5), nn.Sequential(nn.ReLU(), nn.Identity())), nn.Linear(5, 6)
        )
        self.heads = nn.ModuleDict({"one": nn.Linear(6, CLASSES)})

    def forward(self, x):
        return self.heads["one"](torch.relu(self.body(x)))


@network(6)
class Norms(nn.Module):
    """Two batch norms behind one Linear, one that is called twice, one behind a sum, one that sees no sample at all."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, CLASSES)
        self.one, self.other, self.twice, self.sum = (nn.BatchNorm1d(5) for _ in range(4))
        self.query, self.matrix = nn.Parameter(torch.randn(1, 3)), nn.Parameter(torch.randn(5, 3))
        self.offset, self.still = nn.Parameter(torch.randn(5)), nn.BatchNorm1d(5)

    def forward(self, x):
        h = self.a(x)
        h = self.twice(self.b(F.relu(self.one(h)))) + self.other(h)
        constant = self.still(F.linear(self.query, self.matrix, self.offset))
        return self.head(self.sum(h + self.twice(h)) + constant)


@network(1, 6, 6)
class Images(nn.Sequential):
    """Conv2d, BatchNorm2d, ReLU, MaxPool, Flatten, Linear."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 2, stride=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, CLASSES),
        )


class Inverted(nn.Module):
    """ReLU6 before and behind a depthwise convolution, whose result is added to its input."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 4, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(4)])
        self.clip = nn.ReLU6()

    def forward(self, x):
        h = self.clip(self.norms[0](self.wide(4 * x)))
        h = self.clip(self.norms[1](self.depthwise(h)))
        return x + self.norms[2](self.narrow(h))


@network(1, 6, 6)
class Clipped(nn.Sequential):
    """ReLU6 before everything that it can stand before."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU6(),
            Inverted(),
            nn.ReLU6(),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.ReLU6(),
            nn.Linear(36, CLASSES),
            nn.ReLU6(),
        )


@network(2, 9)
class Signals(nn.Sequential):
    """Conv1d, the way of images in one dimension."""

    def __init__(self):
        super().__init__(
            nn.Conv1d(2, 4, 3, stride=2),
            nn.BatchNorm1d(4),
            nn.ReLU(),
            nn.Conv1d(4, 3, 2, padding=1, padding_mode="circular"),
            nn.AvgPool1d(2),
            nn.Flatten(),
            nn.Linear(6, CLASSES),
        )


@network(4, 5, 5)
class Grouped(nn.Sequential):
    """Depthwise, grouped, dilated and pointwise convolutions, an adaptive average at the end."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(4, 4, 3, padding=1, groups=4),
            nn.Conv2d(4, 6, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, padding=2, dilation=2, groups=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(1),
            nn.Linear(4, CLASSES),
        )


@network(6)
class Smooth(nn.Sequential):
    """What is not exact element by element, between sites: LayerNorm, GELU, Softmax, Tanh, and Dropout."""

    def __init__(self):
        super().__init__(
            nn.Linear(6, 9),
            nn.LayerNorm(9),
            nn.GELU(),
            nn.Dropout(0.5),
            nn.Linear(9, 7),
            nn.Softmax(dim=1),
            nn.Linear(7, 6),
            nn.Tanh(),
            nn.Linear(6, CLASSES),
        )


# --- more than one way through ---------------------------------------------------------------------------------------


@network(6)
class Residual(nn.Module):
    """x + f(x) in two blocks, the second of which ends in a projection."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 5)
        self.project, self.head = nn.Linear(6, 5, bias=False), nn.Linear(5, CLASSES)

    def forward(self, x):
        x = x + F.relu(self.first(x))
        x = self.project(x) + F.relu(self.second(x))
        return self.head(x)


@network(2, 5, 5)
class ResidualImages(nn.Module):
    """Two residual blocks of convolutions, one as it is, one with a strided projection; one ReLU for all."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.b, self.project = nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.Conv2d(2, 4, 1, stride=2, bias=False)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.relu(x + self.norm(self.a(x)))
        x = self.relu(torch.add(self.b(x), self.project(x)))
        return self.head(x.mean((2, 3)))


@network(6)
class Accumulating(nn.Module):
    """Sums and ReLUs in place, written as one does to save memory."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        h = self.a(x)
        h += self.b(x)
        h.relu_()
        h = F.relu(h.sub(0.25), inplace=True)
        return self.head(h)


@network(6)
class Dense(nn.Module):
    """Every layer sees everything before it, side by side."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(6, 3), nn.Linear(9, 4), nn.Linear(13, 2), nn.Linear(15, CLASSES)

    def forward(self, x):
        x = torch.cat([x, F.relu(self.a(x))], dim=1)
        x = torch.cat((x, F.relu(self.b(x))), 1)
        return self.head(torch.cat([F.relu(self.c(x)), x], dim=-1))


@network(2, 4, 4)
class DenseImages(nn.Module):
    """Two branches of convolutions, concatenated by channel."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 2, 1)
        self.mix, self.head = nn.Conv2d(7, 3, 2), nn.Linear(27, CLASSES)

    def forward(self, x):
        x = torch.cat([self.a(x), self.b(x), x], dim=1)
        return self.head(torch.flatten(self.mix(x.relu()), 1))


@network(6)
class Heads(nn.Module):
    """One tensor feeds three heads, whose outputs are averaged."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 5)
        self.heads = nn.ModuleList(nn.Linear(5, CLASSES) for _ in range(3))

    def forward(self, x):
        h = torch.relu(self.stem(x))
        return sum(head(h) for head in self.heads) / 3


@network(6)
class Stacked(nn.Module):
    """Heads as a new dimension, over which the mean is taken; the maximum of two others is added."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, CLASSES) for _ in range(3))

    def forward(self, x):
        a, b, c = self.a(x), self.b(x), self.c(x)
        return torch.stack([a, b, c], dim=1).mean(dim=1) + torch.maximum(a, b)


@network(6)
class Gate(nn.Module):
    """One branch multiplies the other, and is taken away from it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        a, b = self.a(x), torch.sigmoid(self.b(x))
        return self.head(a * b - b)


@network(6)
class SharedLayer(nn.Module):
    """A Linear that is called twice, with one ReLU for three places."""

    def __init__(self):
        super().__init__()
        self.fc, self.relu, self.head = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.relu(self.head(self.relu(self.fc(self.relu(self.fc(x))))))


@network(6)
class Tied(nn.Module):
    """Two Linears of one weight, of which the second is another function's parameter, transposed."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(F.relu(self.b(F.relu(self.a(x)))) @ self.a.weight.t())


@network(6)
class TwiceTheInput(nn.Module):
    """The model's input is used by three, the last time at the very end."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.b(self.a(x) * x) + x[:, :CLASSES]


@network(6)
class TwiceTheSame(nn.Module):
    """Both inputs of a sum, and of a product, are one tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        h = self.a(x)
        h = h + h
        return self.b(h * h)


@network(6)
class Unused(nn.Module):
    """A branch that leads nowhere."""

    def __init__(self):
        super().__init__()
        self.a, self.aside, self.b = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, CLASSES)

    def forward(self, x):
        h = F.relu(self.a(x))
        F.relu(self.aside(h))
        return self.b(h)


@network(6)
class Leaking(nn.Module):
    """A site's output goes to the output and to another site."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, CLASSES), nn.Linear(CLASSES, CLASSES)

    def forward(self, x):
        first = self.a(x)
        return first + self.b(F.relu(first))


# --- functions, methods, constants -----------------------------------------------------------------------------------


@network(6)
class Functional(nn.Module):
    """Sites that are functions of parameters: F.linear, matmul, addition, product."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5))
        self.gain, self.matrix = nn.Parameter(torch.rand(5)), nn.Parameter(torch.randn(5, CLASSES))

    def forward(self, x):
        h = F.relu(F.linear(x, self.weight, bias=self.bias))
        h = torch.add(h.mul(self.gain), h, alpha=2)
        return torch.matmul(h, self.matrix) - 0.5


@network(2, 8)
class FunctionalConv(nn.Module):
    """Convolutions as functions, with views between them that name the number of samples."""

    def __init__(self):
        super().__init__()
        self.k1, self.b1 = nn.Parameter(torch.randn(4, 1, 3)), nn.Parameter(torch.randn(4))
        self.k2, self.head = nn.Parameter(torch.randn(2, 2, 3, 3) / 3), nn.Linear(32, CLASSES)

    def forward(self, x):
        h = F.conv1d(x, self.k1, self.b1, padding=1, groups=2)
        h = F.conv2d(h.view(x.size(0), 2, 2, 8), weight=self.k2, padding=1)
        return self.head(h.view(x.size(0), -1))


@network(6)
class Buffers(nn.Module):
    """Constants that are added and multiplied, one of them a learned number, one a buffer of one sample."""

    def __init__(self):
        super().__init__()
        self.fc, self.head, self.scale = nn.Linear(6, 6), nn.Linear(6, CLASSES), nn.Parameter(torch.tensor(0.7))
        self.register_buffer("offset", torch.randn(6))
        self.register_buffer("mask", torch.tensor([[1.0, 0, 1, 1, 0, 1]]))

    def forward(self, x):
        h = self.fc(x + self.offset) * self.mask
        return self.head(h * self.scale) + self.offset[:CLASSES]


@network(6)
class ConstantBranch(nn.Module):
    """A site that sees nothing but parameters: the same for every sample."""

    def __init__(self):
        super().__init__()
        self.fc, self.query, self.embed = nn.Linear(6, CLASSES), nn.Parameter(torch.randn(1, 3)), nn.Linear(3, CLASSES)

    def forward(self, x):
        return self.fc(x) + F.relu(self.embed(self.query))


@network(8)
class Split(nn.Module):
    """Tuples in between: chunk and split, and their parts by index."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(4, 3), nn.Linear(3, CLASSES)

    def forward(self, x):
        left, right = self.a(x).chunk(2, dim=1)
        parts = torch.split(left * right, [1, 3], dim=1)
        return self.c(F.relu(parts[1] - parts[0])) + self.b(right)[:, :1]


@network(12)
class Reshaped(nn.Module):
    """Views that count samples, x.size(0), x.shape and new tensors of as many."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(9, CLASSES)

    def forward(self, x):
        h = F.relu(self.a(x.view(x.size(0), 3, 4))).transpose(1, 2).contiguous()
        h = h.reshape(x.shape[0], -1) + x.new_ones(x.size(0), 1)
        return self.b(h)


@network(12)
class Tokens(nn.Module):
    """A Linear on samples, tokens and features, and the mean over the tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.embed(x.unflatten(1, (3, 4))))).mean(dim=1))


@network(3, 4)
class Attention(nn.Module):
    """Products of two activations, batch by batch, with a softmax between them."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.head = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        share = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.5, dim=-1)
        return self.head(torch.matmul(share, v).flatten(1)[:, :4])


# --- what cannot be traced -------------------------------------------------------------------------------------------


@network(6)
class Stubborn(nn.Module):
    """Control flow on data: cannot be traced."""

    def __init__(self):
        super().__init__()
        self.a, self.relu, self.b = nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.b(self.relu(self.a(x))) if x.sum() > -1e9 else x[:, :CLASSES]


@network(6)
class StubbornAndShared(nn.Module):
    """Cannot be traced, and calls one Linear as often as the length of a list says."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        for _ in range(2 if bool(torch.isfinite(x).all()) else 1):
            x = F.relu(self.fc(x))
        return self.head(x)


class Siteless(nn.Sequential):
    """Nothing in it can be configured."""

    def __init__(self):
        super().__init__(nn.BatchNorm1d(CLASSES), nn.Tanh())


class Overflowing(nn.Module):
    """The second weight is so large that its float product overflows; 8 bits of it do not."""

    shape = (6,)

    def __init__(self):
        super().__init__()
        self.a, self.big, self.b = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)
        nn.init.normal_(self.big.weight, 0, 3e38)

    def forward(self, x):
        return self.b(self.big(F.relu(self.a(x))))


class Logits(nn.Module):
    """The logits are the input, or what a format makes of it."""

    shape = (CLASSES,)

    def __init__(self):
        super().__init__()
        self.register_buffer("zero", torch.zeros(CLASSES))

    def forward(self, x):
        return x - self.zero
