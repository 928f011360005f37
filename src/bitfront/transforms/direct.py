"""What the calls of a quantized layer keep, and layers that one call of a kernel rounds, multiplies and scales.

A deployed model rounds an input to values, finds their codes again, multiplies them as floats, then scales the sums:
each is a pass over memory. For candidates that are run whole, and operands that fit bytes, the kernel of convolutions
(``kernels.convolution``) does all of it, a few rows at a time. Its sums are of whole numbers and exact, so the result
has the same bits. Deployed models are not computed in this way, so that candidates can be compared with them.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront.formats.base import Format, Operand
from bitfront.kernels import convolution
from bitfront.operations.base import Operation, Product, Rounds
from bitfront.transforms.arguments import formats_of
from bitfront.transforms.arithmetic import KnownProducts, WholeProduct, known_product
from bitfront.transforms.functions import seen_by_another

#: The largest sum of bytes that 32-bit integers hold.
LARGEST_SUM = 2**31 - 1
#: A thread has as many products at least: about a tenth of a millisecond.
THREAD_PRODUCTS = 1 << 23
#: Rows of an input that are rounded at a time, less where they would not stay in the cache.
ROWS, ROW_BYTES = 64, 16384


@functools.cache
def _pool(_process: int) -> ThreadPoolExecutor:
    """The threads that share a product. A process that was forked has none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="bitfront")


@dataclass(frozen=True, eq=False)
class DirectProduct:
    """A matrix product with a rounded weight, whose inputs are not rounded yet.

    Attributes:
        grid: how the input is rounded, float32, shape (1, NUMBERS).
        operands: the weight, its sums, scales and bias, as the kernel reads them.
        size: values of a row of the input and of the result.
    """

    grid: NDArray[np.float32]
    operands: tuple[Tensor, Tensor, Tensor, Tensor]
    size: tuple[int, int]

    @classmethod
    def of(cls, way: WholeProduct | str, rule: Product, form: Format, bias: Tensor | None) -> DirectProduct | None:
        """The product; None if this machine, its operands or its sums do not suit the kernel.

        Args:
            way: how it is computed.
            rule: of its operation.
            form: of the input.
            bias: rounded.
        """
        if isinstance(way, str) or rule.matrix or rule.output != -1 or way.weight.numbers.dim() != 2:
            return None
        grid = None if form.grid is None else form.grid.rounding_row()
        row = None if grid is None else convolution.byte_row(grid)
        weight = way.weight.numbers
        if row is None or weight.device.type != "cpu" or way.longest > LARGEST_SUM or not convolution.fast_bytes():
            return None
        numbers = way.weight.rows(weight)
        if float(numbers.min()) < -128 or float(numbers.max()) > 127:
            return None
        outer, inner = numbers.shape
        # Steps of values are powers of two, so that it makes no difference when they are multiplied with.
        steps = torch.as_tensor(way.weight.whole.step).float() * float(way.inputs.step)
        scale = (way.scale * steps).expand(outer).contiguous()
        bias = torch.zeros(outer) if bias is None else bias.detach()
        packed, sums = convolution.packed(numbers[:, :, None, None], depthwise=False)
        operands = packed, sums, convolution.filled(scale), convolution.filled(bias)
        return cls(row[None], operands, (inner, outer))

    def __call__(self, x: Tensor) -> Tensor | None:
        """The result for an input; None for one that the kernel does not take.

        Args:
            x: not rounded, shape (..., inner).
        """
        inner, outer = self.size
        if x.dtype != torch.float32 or x.device.type != "cpu" or x.shape[-1:] != (inner,) or not x.numel():
            return None
        if torch.is_grad_enabled() or type(x) is not Tensor:
            return None
        x = x.contiguous()
        out = torch.empty(*x.shape[:-1], outer)
        rows = x.numel() // inner
        length = max(1, min(rows, ROWS, ROW_BYTES // inner))
        threads = max(1, min(torch.get_num_threads(), rows * inner * outer // THREAD_PRODUCTS))
        edges = [*(rows // length * k // threads * length for k in range(threads + 1)), rows]

        def compute(start: int, stop: int) -> bool:
            source, target = x.data_ptr() + 4 * start * inner, out.data_ptr() + 4 * start * outer
            return start == stop or self._rows(source, target, stop - start, length)

        # The rows that are left over are few, so they are nobody's work but this thread's.
        others = [_pool(os.getpid()).submit(compute, *part) for part in itertools.pairwise(edges[:-2])]
        fine = [compute(*part) for part in itertools.pairwise(edges[-3:])]
        return out if all([*fine, *(other.result() for other in others)]) else None

    def _rows(self, source: int, target: int, count: int, length: int) -> bool:
        """Compute `count` rows, in groups of `length` or all at once; False if one has a NaN."""
        length = min(length, count)
        one = (1, 1)
        geometry = convolution.Geometry(1, (count // length, length), self.size, one, one, (0, 0), one, False)
        inputs = np.array([[source, self.size[0], 0, 1]])
        products = np.array([[target, *(t.data_ptr() for t in self.operands)]])
        return not convolution.convolve(geometry, inputs, products, self.grid, grouped=True)


@dataclass(frozen=True, eq=False)
class Kept:
    """What the calls of a twin compute that does not depend on samples, kept from one call to the next.

    Attributes:
        parameters: its rounded weights and biases, by operand; empty before the first call.
        products: how its products are computed.
        direct: format of an input → how a kernel computes its product, or that it does not; None where no kernel may.
    """

    parameters: dict[Operand, Tensor | None] = field(default_factory=dict)
    products: KnownProducts = field(default_factory=dict)
    direct: dict[Format, DirectProduct | None] | None = None

    def directly(
        self, operation: Operation, module: nn.Module, rounds: Mapping[Operand, Rounds], x: Tensor
    ) -> Tensor | None:
        """The result of a call, computed by a kernel; None where none may or can, and before the first call.

        Args:
            operation: of the module.
            module: the quantized layer.
            rounds: its formats.
            x: its input, not rounded.
        """
        weight, form = self.parameters.get("weight"), rounds.get("data_in")
        rule = operation.product
        if self.direct is None or rule is None or weight is None or not isinstance(form, Format) or module.training:
            return None
        if seen_by_another(module):
            return None
        if form not in self.direct:
            formats = formats_of(rounds)
            rounded = weight
            way = known_product(rule, lambda: rounded, formats, self.products)
            bias = self.parameters.get("bias", operation.operand("bias").held_by(module))
            self.direct[form] = DirectProduct.of(way, rule, form, bias)
        product = self.direct[form]
        return None if product is None else product(x)
