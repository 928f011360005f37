"""Layers of networks in whole numbers, with NumPy alone: what hardware with these bits computes.

A layer takes real numbers, rounds them to its input's bits, and sums products of whole numbers in int64. What follows
on such sums, e.g. an addition or a mean, is one float32 operation, as in a network that is deployed.
"""

import itertools
import math

import numpy as np


class Layer:
    """A linear layer or convolution with bits for each value.

    Args:
        module: the deployed module; only its numbers and its geometry are read.
        formats: operand → format; only widths, points and signs are read.
    """

    def __init__(self, module, formats):
        self.data, self.weight = formats["data_in"], codes(module.weight, formats["weight"])
        self.weight_format, self.weight_point = formats["weight"], formats["weight"].points.astype(np.int64)
        self.bias = None
        if module.bias is not None:
            self.bias_format, self.bias_point = formats["bias"], formats["bias"].points.astype(np.int64)
            self.bias = codes(module.bias, formats["bias"])
        dims = module.weight.dim() - 2
        self.stride, self.dilation, self.padding, self.groups = (
            (module.stride, module.dilation, module.padding, module.groups) if dims else ((), (), (), 1)
        )
        if self.padding == "same":
            kernel = zip(module.kernel_size, module.dilation, strict=True)
            self.padding = tuple(d * (k - 1) // 2 for k, d in kernel)

    def __call__(self, x):
        """x float32 (samples, channels, ...) → float32 (samples, outputs, ...)."""
        points = self.data.points.astype(np.int64)
        high = 2 ** (self.data.widths.astype(np.int64) - self.data.signed * (self.data.widths > 0)) - 1
        low = -high if self.data.signed else 0 * high
        steps = np.ldexp(x.astype(np.float64), points)
        # Half a step more is exact in float64.
        steps = {"even": np.rint(steps), "half_up": np.floor(steps + 0.5), "floor": np.floor(steps)}[self.data.rounding]
        whole = np.clip(steps, low, high).astype(np.int64)
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
        sizes = self.sizes(x.shape[2:])
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

    def sizes(self, of_input):
        """Positions of the output per dimension, from those of the input."""
        geometry = zip(of_input, self.padding, self.dilation, self.weight.shape[2:], self.stride, strict=True)
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in geometry]

    def outputs(self, shape):
        """Of each output of an input of this shape its products: (place of the weight, place of the input)."""
        inside, each = [range(n) for n in shape[1:]], len(self.weight) // self.groups
        for row, *place in itertools.product(range(len(self.weight)), *map(range, self.sizes(shape[1:]))):
            products = []
            for column, *offset in itertools.product(*map(range, self.weight.shape[1:])):
                steps = zip(place, self.stride, offset, self.dilation, self.padding, strict=True)
                at = [p * s + o * d - padding for p, s, o, d, padding in steps]
                if all(a in n for a, n in zip(at, inside, strict=True)):
                    channel = row // each * self.weight.shape[1] + column
                    products.append(((row, column, *offset), (channel, *at)))
            yield products

    def number_of_outputs(self):
        """Of one sample."""
        return len(self.weight) * math.prod(self.sizes(self.data.widths.shape[1:]))


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


def ebops(layers, sign_bits=False, count="width", biases=True):
    """Bits times bits of every product, one by one, and the bits of the biases, once per output.

    Args:
        sign_bits: whether signs are bits.
        count: "width", or "set_bits": of a weight or bias those from its highest to its lowest bit that is set.
        biases: whether they count.
    """

    def bits(codes, form):
        each = magnitudes(form) if count == "width" else np.array([span(code) for code in codes.flat])
        return np.where(codes != 0, each.reshape(codes.shape) + sign_bits, 0)

    total = 0
    for layer in layers:
        bits_x = magnitudes(layer.data)
        bits_x += (bits_x > 0) * layer.data.signed * sign_bits
        bits_w, outputs = bits(layer.weight, layer.weight_format), 0
        for window in layer.outputs(bits_x.shape):
            outputs += 1
            total += sum(int(bits_w[at]) * int(bits_x[source]) for at, source in window)
        if layer.bias is not None and biases:
            total += outputs // len(layer.weight) * int(bits(layer.bias, layer.bias_format).sum())
    return total


def bops(layers):
    """m·n·(p·b_a·b_w + b_a + b_w + log2 n), b_a and b_w the mean widths with signs, p the share of weights not zero."""
    total = 0.0
    for layer in layers:
        outputs, terms = layer.number_of_outputs(), layer.weight[0].size
        data, weight = layer.data.widths.astype(float).mean(), layer.weight_format.widths.astype(float).mean()
        share = (layer.weight != 0).sum() / layer.weight.size
        total += outputs * terms * (share * data * weight + data + weight + math.log2(terms))
    return total


def stored_bits(layer):
    """(bits of all weights, of all biases), signs included."""
    bias = 0 if layer.bias is None else int(layer.bias_format.widths.astype(np.int64).sum())
    return int(layer.weight_format.widths.astype(np.int64).sum()), bias


def magnitudes(form):
    """Bits of the magnitude of each value of a format."""
    widths = form.widths.astype(np.int64)
    return np.maximum(widths - 1, 0) if form.signed else widths


def span(code):
    """Bits from the highest to the lowest one that is set."""
    code = abs(int(code))
    return len(bin(code)[2:].rstrip("0")) if code else 0


def loss(logits, labels):
    """Mean cross entropy, float64."""
    z = logits.astype(np.float64)
    top = z.max(1)
    return float((np.log(np.exp(z - top[:, None]).sum(1)) + top - z[np.arange(len(z)), labels]).mean())
