"""Networks for the tests of learned bits, each a model and the same once more for the reference."""

from torch import nn
from torch.nn import functional as F


class Mlp(nn.Module):
    shape, classes = (6,), 3

    def __init__(self, bias=True):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 9, bias), nn.Linear(9, 7), nn.Linear(7, 3, bias)

    def forward(self, x):
        return self.third(F.relu(self.second(F.relu(self.first(x)))))

    @staticmethod
    def reference(net, x):
        return net.layer("third", net.layer("second", net.layer("first", x).relu()).relu())


class SignedMlp(nn.Module):
    """Without an activation, so a hidden value may be negative."""

    shape, classes = (5,), 4

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.second(self.first(x))

    @staticmethod
    def reference(net, x):
        return net.layer("second", net.layer("first", x))


class Cnn(nn.Module):
    """Padding, a stride, pooling, an addition, a layer without a bias."""

    shape, classes = (2, 6, 6), 3

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.third = nn.Conv2d(4, 6, (2, 3), stride=(2, 1), padding=(0, 1))
        self.pool = nn.MaxPool2d((1, 2))
        self.head = nn.Linear(6 * 3 * 3, 3)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.relu(self.third(F.relu(self.second(x) + x)))
        return self.head(self.pool(x).flatten(1))

    @staticmethod
    def reference(net, x):
        x = net.layer("first", x).relu()
        x = net.layer("third", (net.layer("second", x) + x).relu()).relu()
        return net.layer("head", F.max_pool2d(x, (1, 2)).flatten(1))
