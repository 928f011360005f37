"""Layers of networks in whole numbers, with NumPy alone: what hardware with these bits computes.

A layer takes real numbers, rounds them to its input's bits, and sums products of whole numbers in int64. What follows
on such sums, e.g. an addition or a mean, is one float32 operation, as in a network that is deployed.
"""

import itertools

import numpy as np


class Layer:
    """A linear layer or convolution with bits for each value.

    Args:
        module: the deployed module; only its numbers and its geometry are read.
        formats: operand → format; only widths, points and signs are read.
    """

    def __init__(self, module, formats):
        self.data, self.weight = formats["data_in"], codes(module.weight, formats["weight"])
        self.weight_point = formats["weight"].points.astype(np.int64)
        self.bias = None
        if module.bias is not None:
            self.bias, self.bias_point = codes(module.bias, formats["bias"]), formats["bias"].points.astype(np.int64)
        dims = module.weight.dim() - 2
        self.stride, self.dilation, self.padding, self.groups = (
            (module.stride, module.dilation, module.padding, module.groups) if dims else ((), (), (), 1)
        )

    def __call__(self, x):
        """x float32 (samples, channels, ...) → float32 (samples, outputs, ...)."""
        points = self.data.points.astype(np.int64)
        high = 2 ** (self.data.widths.astype(np.int64) - self.data.signed * (self.data.widths > 0)) - 1
        low = -high if self.data.signed else 0 * high
        whole = np.clip(np.rint(np.ldexp(x.astype(np.float64), points)), low, high).astype(np.int64)
        # All to one binary point each, so that sums are sums of whole numbers.
        point_x = int(points[self.data.widths > 0].max(initial=0))
        used = self.weight != 0
        point_w = int(self.weight_point[used].max(initial=0))
        whole = np.where(self.data.widths > 0, whole * 2.0 ** (point_x - points), 0).astype(np.int64)
        weight = np.where(used, self.weight * 2.0 ** (point_w - self.weight_point), 0).astype(np.int64)
        total, point = self.products(whole, weight), point_x + point_w
        if self.bias is not None:
            point_b = max(point, int(self.bias_point[self.bias != 0].max(initial=point)))
            bias = np.where(self.bias != 0, self.bias * 2.0 ** (point_b - self.bias_point), 0).astype(np.int64)
            total = total * 2 ** (point_b - point) + bias.reshape(-1, *[1] * (total.ndim - 2))
            point = point_b
        assert np.abs(total).max(initial=0) < 2**53
        return np.ldexp(total.astype(np.float64), -point).astype(np.float32)

    def products(self, x, weight):
        """Sums of products, int64; positions one by one."""
        sizes = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                x.shape[2:], self.padding, self.dilation, weight.shape[2:], self.stride, strict=True
            )
        ]
        padded = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in self.padding)])
        each = len(weight) // self.groups
        out = np.zeros((len(x), len(weight), *sizes), dtype=np.int64)
        for place in itertools.product(*map(range, sizes)):
            for offset in itertools.product(*map(range, weight.shape[2:])):
                at = tuple(p * s + o * d for p, s, o, d in zip(place, self.stride, offset, self.dilation, strict=True))
                seen = padded[(slice(None), slice(None), *at)]
                w = weight[(slice(None), slice(None), *offset)]
                for g in range(self.groups):
                    rows, columns = slice(g * each, (g + 1) * each), slice(g * w.shape[1], (g + 1) * w.shape[1])
                    out[(slice(None), rows, *place)] += seen[:, columns] @ w[rows].T
        return out


def codes(tensor, form):
    """The whole numbers of a parameter; they must be those of the format."""
    whole = np.ldexp(tensor.detach().numpy().astype(np.float64), form.points.astype(np.int64))
    assert (whole == np.rint(whole)).all()
    assert (np.abs(whole) < 2.0 ** np.maximum(form.widths.astype(np.int64) - 1, 0)).all()
    return whole.astype(np.int64)


def relu(x):
    """max(x, 0)."""
    return np.maximum(x, np.float32(0))


def windows(x, size):
    """Windows that do not overlap, over the last two dimensions: (..., height, width, values)."""
    *front, height, width = x.shape
    cut = x.reshape(*front, height // size, size, width // size, size)
    return np.moveaxis(cut, -3, -2).reshape(*front, height // size, width // size, size * size)


def ebops(layers):
    """Bits times bits of every product, and the bits of the biases, once per output, without signs."""
    total = 0
    for layer in layers:
        bits_x = layer.data.widths.astype(np.int64) - layer.data.signed * (layer.data.widths > 0)
        bits_w = [int(abs(w)).bit_length() for w in layer.weight.reshape(-1)]
        products = layer.products(bits_x[None], np.array(bits_w).reshape(layer.weight.shape))
        total += int(products.sum())
        if layer.bias is not None:
            total += products[0, 0].size * sum(int(abs(b)).bit_length() for b in layer.bias)
    return total
