"""Convolutions of many states in one call of a compiled kernel, which rounds inputs, and scales sums, on the way.

Two kinds: of bytes, where each output channel sums over all input channels; and of floats, where each channel has a
weight for itself (depthwise). The sums are of whole numbers and exact, so that they have the same bits in any order.
``exact`` tests whether the kernel exists and gives these bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bitfront import kernels
from bitfront.kernels import native

#: Channels of a result that are computed together; weights are filled up to a multiple of it.
LANES = 16
#: Size of a cache line in bytes: values that lie in two of them take twice as long to read.
LINE = 64
#: Of the rows of an input that are rounded at a time. More do not stay in the cache.
ROW_VALUES, ROW_PIXELS = 2048, 256
#: Of the result of a step that is computed at once in a chain: two of them stay in the cache of a core.
CHAIN_BYTES = 256 << 10
#: Down, across.
Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Everything that a convolution's shape depends on; channels lie last in memory.

    Attributes:
        size: height and width of the input.
        channels: of the input and of the output.
        depthwise: whether each channel has a weight for itself, and inputs are rounded to floats, not bytes.
    """

    samples: int
    size: Pair
    channels: Pair
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    depthwise: bool

    @property
    def out(self) -> Pair:
        """Height and width of the output."""
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(self.size, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        )
        return height, width

    @functools.cached_property
    def rows(self) -> Geometry:
        """The same work in rows of a good length: pixels of a kernel of one pixel may be grouped in any way."""
        if (self.kernel, self.stride, self.padding) != ((1, 1), (1, 1), (0, 0)):
            return self
        pixels = self.samples * self.size[0] * self.size[1]
        most = max(1, min(pixels, ROW_PIXELS, ROW_VALUES // self.channels[0]))
        length = next(n for n in range(most, 0, -1) if pixels % n == 0)
        size = (pixels // length, length)
        return Geometry(1, size, self.channels, (1, 1), (1, 1), (0, 0), (1, 1), self.depthwise)

    @functools.cached_property
    def numbers(self) -> NDArray[np.int64]:
        """The kernel's ``Shape``."""
        width = max(
            self.size[1] + 2 * self.padding[1],
            (self.out[1] - 1) * self.stride[1] + (self.kernel[1] - 1) * self.dilation[1] + 1,
        )
        pitch = -(-width * self.channels[0] // 64) * 64 + 64
        pairs = (*self.kernel, *self.stride, *self.padding, *self.dilation)
        return np.array([self.samples, *self.size, self.channels[0], *self.out, self.channels[1], *pairs, pitch])

    @property
    def kept(self) -> int:
        """Bytes of the rows that the kernel keeps, and of the row of padding after them."""
        rows = (self.kernel[0] - 1) * self.dilation[0] + 2
        return int(self.numbers[-1]) * rows * (4 if self.depthwise else 1)


def packed(numbers: Tensor, depthwise: bool) -> tuple[Tensor, Tensor]:
    """A weight as the kernel reads it, and the sum of the weights of each output channel.

    Args:
        numbers: whole numbers that fit into int8; or any values, if `depthwise`. Shape (channels out, channels in or 1,
            height, width).
    """
    sums = filled(numbers.flatten(1).sum(1)).to(torch.int32)
    if depthwise:
        return filled(numbers[:, 0].permute(1, 2, 0)).float().contiguous(), sums
    rows = filled(numbers.permute(2, 3, 1, 0)).permute(3, 0, 1, 2).flatten(2)
    rows = F.pad(rows, (0, -rows.shape[2] % 4))
    rows = rows.view(-1, LANES, rows.shape[1], rows.shape[2] // 4, 4)
    return rows.permute(0, 2, 3, 1, 4).to(torch.int8).contiguous(), sums


def filled(values: Tensor) -> Tensor:
    """`values`, whose last dimension is channels, with zeros for the channels that fill the last lanes."""
    return F.pad(values, (0, -values.shape[-1] % LANES))


def byte_row(row: Sequence[float], *, rectified: bool = False) -> NDArray[np.float32] | None:
    """The numbers of a rounding (``Grid.rounding_row``) as those of one to bytes, float32, shape (NUMBERS,);
    None if its codes do not fit bytes.

    Args:
        rectified: whether a ReLU is applied before.
    """
    scale, low, high, _, divisor, zero, way = row
    low = max(low, zero) if rectified else low
    offset = 0.0 if low >= 0 else 128.0
    if low + offset < 0 or high + offset > 255:
        return None
    return np.array([scale, low, high, offset, divisor, zero, way], dtype=np.float32)


def convolve(
    geometry: Geometry,
    inputs: NDArray[np.int64],
    products: NDArray[np.int64],
    grids: NDArray[np.float32],
    affine: kernels.Affine | None = None,
    *,
    grouped: bool = False,
) -> bool:
    """Compute products of inputs. Only where :func:`exact` is true.

    Args:
        inputs: for each input the address of its first value, values from pixel to pixel, and the range of its products
            (first, behind the last), shape (inputs, 4).
        products: for each product the addresses of the result, the packed weight, its sums, the scales (float32) and
            the bias (float32), all but the first filled (``filled``), shape (products, 5). The result is ``sum · scale
            + bias``, two roundings, of shape (samples, height, width, channels).
        grids: for each input the numbers of its rounding (``kernels.round_blocks``), to float32 if depthwise, else to
            bytes, shape (inputs, NUMBERS).
        affine: the pending batch norm of the inputs, repeated for the pixels of a row of ``geometry.rows``.

    Returns:
        Whether there is a NaN where a byte is needed.
    """
    library = native.library()
    assert library is not None
    rows = geometry if grouped else geometry.rows
    kept = np.empty(rows.kept + LINE, dtype=np.uint8)
    inputs, products = np.ascontiguousarray(inputs), np.ascontiguousarray(products)
    grids = np.ascontiguousarray(grids)
    alpha, beta, mode = (0, 0, 0) if affine is None else (affine[0].data_ptr(), affine[1].data_ptr(), affine[2])
    has_nan = library.bitfront_convolve(
        rows.numbers.ctypes.data, len(inputs), inputs.ctypes.data, products.ctypes.data, grids.ctypes.data,
        alpha, beta, mode, int(not geometry.depthwise), -(-kept.ctypes.data // LINE) * LINE,
    )  # fmt: skip
    return bool(has_nan)


@dataclass(frozen=True, eq=False)
class Stage:
    """A convolution or a sum of a chain: what all its states share.

    Attributes:
        geometry: of one sample; of a sum the shape of its operands, which is that of its result.
        depthwise: whether a convolution has a weight for each channel alone; None for a sum.
        norms: the pending batch norms of the inputs, for the rows of ``geometry.rows``; of a sum there are two, for the
            rows of ``geometry``.
        rectify: which operands of a sum pass a ReLU; a convolution has that in the numbers of its roundings.
    """

    geometry: Geometry
    depthwise: bool | None
    norms: tuple[kernels.Affine | None, ...]
    rectify: tuple[bool, bool] = (False, False)

    @functools.cached_property
    def bytes(self) -> int:
        """Size of the result."""
        height, width = self.geometry.out
        return 4 * self.geometry.samples * height * width * self.geometry.channels[1]

    @property
    def numbers(self) -> list[int]:
        """The kernel's ``Stage``."""
        kind = 2 if self.depthwise is None else int(self.depthwise)
        first, second = (
            (0, 0, 0) if n is None else (n[2], n[0].data_ptr(), n[1].data_ptr()) for n in (*self.norms, None)[:2]
        )
        shape = (self.geometry if kind == 2 else self.geometry.rows).numbers.tolist()
        return [*shape, kind, self.bytes, *first, int(self.rectify[0]), *second, int(self.rectify[1])]


def chain(
    stages: Sequence[Stage],
    tasks: NDArray[np.int64],
    places: NDArray[np.int64],
    products: NDArray[np.int64],
    grids: NDArray[np.float32],
    samples: int,
) -> bool:
    """Compute convolutions and sums that follow each other, a few samples at a time. Only where :func:`exact` is true.

    Args:
        stages: what is computed, in any order.
        tasks: for each its stage, the place of its input, that of the second one of a sum (else −1), and the range of
            its products (first, behind the last), shape (tasks, 5). Inputs come before what is computed of them.
        places: for each value its address, bytes from sample to sample, values from pixel to pixel, and a number below
            the number of stages that values of the same size share, shape (places, 4). Values without a distance from
            sample to sample lie in memory of the kernel, and are lost. The array is changed.
        products: as for :func:`convolve`, one for each of the first places, without the address of the result.
        grids: as for :func:`convolve`, one row per task; of sums it is ignored.
        samples: their number.

    Returns:
        Whether there is a NaN where a byte is needed.

    Raises:
        MemoryError: there is none for the values between.
    """
    library = native.library()
    assert library is not None
    numbers = np.array([s.numbers for s in stages], dtype=np.int64)
    largest = max(s.bytes for s in stages)
    kept = max(s.geometry.rows.kept for s in stages)
    at_once = max(1, min(samples, CHAIN_BYTES // largest))
    tasks, products, grids = np.ascontiguousarray(tasks), np.ascontiguousarray(products), np.ascontiguousarray(grids)
    result = library.bitfront_chain(
        len(stages), numbers.ctypes.data, len(tasks), tasks.ctypes.data, len(places), places.ctypes.data,
        products.ctypes.data, grids.ctypes.data, samples, at_once, kept,
    )  # fmt: skip
    if result < 0:
        raise MemoryError("no memory for the values of a few samples")
    return bool(result)


@functools.cache
def fast_bytes() -> bool:
    """Whether this processor multiplies bytes faster than floats, and the kernel is exact."""
    library = native.library()
    return library is not None and exact() and bool(library.bitfront_fast_bytes())


@functools.cache
def exact() -> bool:
    """Whether the kernel exists and sums exactly, also the largest values, and at the edges of images."""
    if not kernels.compiled():
        return False
    generator = torch.Generator().manual_seed(0)
    for depthwise, inner, outer in ((False, 3, 72), (False, 64, 24), (True, 40, 40)):
        for kernel, stride, padding in ((1, 1, 0), (3, 2, 1), (3, 1, 1)):
            x = torch.randint(-128, 128, (2, inner, 9, 11), generator=generator).float()
            weight = torch.randint(-128, 128, (outer, 1 if depthwise else inner, kernel, kernel), generator=generator)
            x[0], weight[:2], weight[2:4] = 127, 127, -128
            groups = inner if depthwise else 1
            wanted = torch.conv2d(x.double(), weight.double(), None, stride, padding, 1, groups) * 0.5 + 3
            geometry = Geometry(
                2, (9, 11), (inner, outer), (kernel, kernel), (stride, stride), (padding, padding), (1, 1), depthwise
            )
            last, out = x.permute(0, 2, 3, 1).contiguous(), torch.empty(2, *geometry.out, outer)
            scale, bias = filled(torch.full((outer,), 0.5)), filled(torch.full((outer,), 3.0))
            parts = [out, *packed(weight, depthwise), scale, bias]
            grid = [1.0, -128.0, 127.0, 1.0 if depthwise else 128.0, 0.0, 0.0, 0.0]
            addresses = np.array([[t.data_ptr() for t in parts]])
            convolve(geometry, np.array([[last.data_ptr(), inner, 0, 1]]), addresses, np.array([grid], np.float32))
            if not torch.equal(out.permute(0, 3, 1, 2).double(), wanted):
                return False
    return True
