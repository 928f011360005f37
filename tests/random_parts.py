"""More blocks of random models: layers beside Linear and Conv2d, views, changes in place, code that torch.fx sees otherwise.

Built like those in ``random_blocks.py``.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from random_blocks import Block, layer, models_in


def channels(shape):
    """(number of channels, their dimension in a batch)."""
    return (shape[0], 1) if len(shape) == 3 else (shape[-1], -1)


# --- other layers ---------------------------------------------------------------------------------------------------------


class Grouped(nn.Module):
    """A depthwise convolution and a pointwise one, or a bottleneck."""

    def __init__(self, shape, n):
        super().__init__()
        c = shape[0]
        if len(shape) == 3:
            mode = ("zeros", "circular", "reflect")[n % 3]
            self.a = nn.Conv2d(c, 2 * c, 3, padding=1, groups=c, padding_mode=mode)
            self.b = nn.Conv2d(2 * c, c, 1, bias=n % 2 == 0)
        else:
            self.a, self.b = nn.Linear(shape[-1], 3), nn.Linear(3, shape[-1], bias=n % 2 == 0)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.b(self.act(self.a(x)))


class Strided(nn.Module):
    """Down and up again."""

    def __init__(self, shape, n):
        super().__init__()
        self.image, self.up, c = len(shape) == 3, n % 2 == 0, shape[0]
        if self.image:
            self.a = nn.Conv2d(c, 4, 3, stride=2, padding=1, dilation=1 + n % 2 * 0)
            self.b = nn.ConvTranspose2d(4, c, 2, stride=2) if self.up else nn.Conv2d(4, c, 3, padding="same")
        else:
            self.a = nn.Conv1d(1 if len(shape) == 1 else c, 4, 2, stride=2)
            self.b = nn.ConvTranspose1d(4, 1 if len(shape) == 1 else c, 2, stride=2)

    def forward(self, x):
        if self.image:
            h = torch.relu(self.a(x))
            return self.b(h) if self.up else F.interpolate(self.b(h), scale_factor=2)
        h = x.unsqueeze(1) if x.dim() == 2 else x
        return self.b(self.a(h).relu()).reshape(x.shape)


class OneDimensional(nn.Module):
    """Conv1d over whatever comes."""

    def __init__(self, shape, n):
        super().__init__()
        c = 1 if len(shape) == 1 else shape[0]
        groups = c if n % 3 == 0 else 1
        self.a = nn.Conv1d(c, 2 * c, 3, padding=1, groups=groups, bias=n % 2 == 0)
        self.b = nn.Conv1d(2 * c, c, 1)

    def forward(self, x):
        h = x.reshape(x.shape[0], self.a.in_channels, -1)
        return self.b(F.relu(self.a(h))).view_as(x)


class Indexed(Block):
    """A table of embeddings, by indices that are computed."""

    def __init__(self, shape, n):
        super().__init__(shape, n)
        self.table = nn.Embedding(8, 1) if n % 2 else nn.EmbeddingBag(8, 1)
        self.bag = n % 2 == 0

    def forward(self, x):
        index = (x.abs() * 3).long().clamp(0, 7)
        looked = self.table(index.reshape(-1, 1)).reshape(x.shape) if self.bag else self.table(index).squeeze(-1)
        return self.a(looked + x)


class Recurrent(nn.Module):
    """LSTM, GRU or RNN."""

    def __init__(self, shape, n):
        super().__init__()
        kind = (nn.LSTM, nn.GRU, nn.RNN)[n % 3]
        both = n % 2 == 0
        self.a = kind(shape[-1], 4, batch_first=True, bidirectional=both, dropout=0.2, num_layers=2)
        self.b = nn.Linear(8 if both else 4, shape[-1])

    def forward(self, x):
        out, _ = self.a(x.flatten(1, -2) if x.dim() == 4 else x.reshape(x.shape[0], -1, x.shape[-1]))
        return self.b(out).reshape(x.shape)


class Encoder(nn.Module):
    """TransformerEncoderLayer: torch has a second path for it in evaluation."""

    def __init__(self, shape, n):
        super().__init__()
        arguments = {"batch_first": n % 3 > 0, "norm_first": n % 4 == 0, "activation": ("relu", "gelu")[n % 2]}
        one = nn.TransformerEncoderLayer(shape[-1], 2, 8, 0.1, **arguments)
        self.a = one if n % 5 else nn.TransformerEncoder(one, 2, enable_nested_tensor=False)
        self.b = layer(shape, n)
        self.free = n % 7 == 0

    def forward(self, x):
        if self.free and float(x.sum()) > 1e9:
            return x
        h = self.a(x.flatten(1, -2) if x.dim() == 4 else x.reshape(x.shape[0], -1, x.shape[-1]))
        return self.b(h.reshape(x.shape))


class Bilinear(Block):
    def __init__(self, shape, n):
        super().__init__(shape, n)
        self.mix = nn.Bilinear(shape[-1], shape[-1], shape[-1])

    def forward(self, x):
        return self.b(self.mix(x, self.a(x)))


# --- functions ------------------------------------------------------------------------------------------------------------


class Viewed(Block):
    """Slices, views, stacks and expanded tensors."""

    def forward(self, x):
        h = self.a(x)
        parts = (h.unbind(-1), h.split(1, -1), h.chunk(h.shape[-1], -1))[self.n % 3]
        h = torch.stack([p.reshape(p.shape[0], -1) for p in parts][::-1], -1).reshape(x.shape)
        first = h[..., :1].expand(h.shape) if self.n % 2 else h[..., -1:].expand_as(h)
        return self.b(h + first.contiguous()).transpose(-1, -2).transpose(-2, -1) if x.dim() > 2 else self.b(h) - first


class Chosen(Block):
    def forward(self, x):
        h = self.a(x)
        return self.b((torch.where(h > 0, h, h * 0.1), torch.maximum(h, x), h.clamp_min(0).minimum(x))[self.n % 3])


class Contracted(nn.Module):
    """einsum, matmul, bmm and baddbmm with parameters and with activations."""

    def __init__(self, shape, n):
        super().__init__()
        size = shape[-1]
        self.w, self.v = nn.Parameter(torch.randn(size, size) / 2), nn.Parameter(torch.randn(size) / 2)
        self.n = n

    def forward(self, x):
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        h = (
            lambda: torch.einsum("bij,jk->bik", flat, self.w),
            lambda: flat @ self.w,
            lambda: torch.matmul(flat, other=self.w),
            lambda: torch.matmul(self.w, flat.transpose(1, 2)).transpose(1, 2),
            lambda: torch.bmm(flat, flat.transpose(1, 2)) @ flat,
            lambda: torch.matmul(input=flat, other=self.w.t()),
            lambda: torch.bmm(flat, mat2=self.w.expand(x.shape[0], -1, -1)),
            lambda: torch.tensordot(flat, self.w, 1),
            lambda: torch.baddbmm(flat, flat, flat.transpose(1, 2) @ flat, alpha=0.5),
            lambda: torch.addmm(self.v, flat.flatten(0, 1), mat2=self.w).view_as(flat),
            lambda: flat.flatten(0, 1).mm(self.w).view_as(flat),
            lambda: torch.einsum("...ij,...kj->...ik", flat, torch.einsum("bij,kj->bik", flat, self.w)) @ flat,
        )[self.n % 12]()
        return torch.add(input=h, other=self.v, alpha=0.5 if self.n % 3 else 1).reshape(x.shape)


class Arithmetic(Block):
    """Operators with numbers, tensors, the same tensor twice, numbers first, keywords."""

    def forward(self, x):
        h = self.a(x)
        return (
            lambda: h + h,
            lambda: h * h - 1,
            lambda: 1 - h,
            lambda: torch.sub(h, x, alpha=2),
            lambda: torch.sub(input=h, other=x),
            lambda: torch.mul(other=x, input=h),
            lambda: h.add(x, alpha=0.25),
            lambda: 0.5 * x + h / 2,
            lambda: h.sub(other=x).mul(other=h),
            lambda: torch.rsub(h, x),
            lambda: sum([h, x, h]),
            lambda: torch.addcmul(h, x, h, value=0.3),
        )[self.n % 12]()


class Named(nn.Module):
    """Functions with operands by name."""

    def __init__(self, shape, n):
        super().__init__()
        self.image, self.n = len(shape) == 3, n
        c, _ = channels(shape)
        self.weight = nn.Parameter(torch.randn(c, c, *((1, 1) if self.image else ())) / 2)
        self.bias = nn.Parameter(torch.randn(c) / 2)

    def forward(self, x):
        call = F.conv2d if self.image else F.linear
        if self.n % 3 == 0:
            return call(input=x, weight=self.weight, bias=self.bias)
        if self.n % 3 == 1:
            return call(x, weight=self.weight, bias=self.bias.abs())
        return F.relu(call(x, self.weight * 0.5, bias=None), inplace=True)


class Partial(Block):
    """functools.partial in place of modules."""

    def __init__(self, shape, n):
        super().__init__(shape, n)
        self.act = functools.partial(F.leaky_relu, negative_slope=0.3)
        c, _ = channels(shape)
        self.weight = nn.Parameter(torch.randn(c, c, *((1, 1) if len(shape) == 3 else ())) / 2)
        self.mix = functools.partial(F.conv2d if len(shape) == 3 else F.linear, bias=None)

    def forward(self, x):
        return self.mix(self.act(self.a(x)), self.weight)


class Casting(Block):
    """Other types on the way."""

    def forward(self, x):
        h = self.a(x)
        kind = (torch.float64, torch.bfloat16, torch.float16)[self.n % 3]
        h = h.to(kind)
        h = (h * 2).to(torch.float32) if self.n % 2 else torch.relu(h).float()
        return self.b(h)


class Creating(Block):
    """Tensors that forward makes."""

    def forward(self, x):
        h = self.a(x)
        if self.n % 4 == 0:
            return h + torch.arange(h.shape[-1]) / 10
        if self.n % 4 == 1:
            return h * torch.full_like(h, 0.5) + torch.ones(h.shape[0], *[1] * (h.dim() - 1))
        if self.n % 4 == 2:
            return torch.cat([h, h.new_zeros(h.shape)], -1)[..., : h.shape[-1]]
        return h * torch.tensor([0.5]) + x.new_tensor(0.25)


# --- in place -------------------------------------------------------------------------------------------------------------


class Written(Block):
    """Parts of an activation are overwritten."""

    def forward(self, x):
        h = self.a(x)
        if self.n % 4 == 0:
            h[:, :1] = 0
        elif self.n % 4 == 1:
            h[..., 0] += 1
        elif self.n % 4 == 2:
            h[h < 0] = 0.5
        else:
            h.view(h.shape[0], -1)[:, 0].mul_(2)
        return self.b(h)


class Discarded(Block):
    """The result of a change in place is not used, but the tensor that it changed."""

    def __init__(self, shape, n):
        super().__init__(shape, n)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.a(x)
        if self.n % 6 == 0:
            F.relu(h, inplace=True)
        elif self.n % 6 == 1:
            h.relu_()
        elif self.n % 6 == 2:
            h.add_(x)
        elif self.n % 6 == 3:
            self.act(h)
        elif self.n % 6 == 4:
            torch.relu_(h.mul_(x))
        else:
            h.view(-1).sub_(x.reshape(-1))
        return self.b(h)


class Aliased(Block):
    """Two names of one tensor that is changed in place."""

    def forward(self, x):
        h = k = self.a(x)
        if self.n % 2:
            h += x
        else:
            h = F.relu(h, inplace=True)
        return self.b(h * 0.5 + k)


class Buffered(Block):
    """Results go into a tensor that the module holds."""

    def forward(self, x):
        h = self.a(x)
        out = torch.empty_like(h)
        torch.add(h, x, out=out)
        return out


class InputChanged(Block):
    """Changes its input."""

    def forward(self, x):
        h = self.b(self.a(x.mul_(0.5)))
        return h + x


PARTS = models_in(globals())
