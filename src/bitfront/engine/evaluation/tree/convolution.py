"""Convolutions in the tree: one call of a kernel computes all states of a step that need one.

The kernel rounds inputs on the way, and scales sums, so no other pass over memory is needed. Its sums are of whole
numbers and exact: they are the float32 that the deployed model computes, whose sums are exact too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfront import kernels
from bitfront.engine.evaluation.tree import rounding
from bitfront.engine.evaluation.tree.activations import COLUMNS, BatchedActivations, Ints, norm_mode, room
from bitfront.engine.evaluation.tree.products import Products
from bitfront.engine.evaluation.tree.program import Program, Step
from bitfront.engine.evaluation.tree.rounding import LOW, ZERO
from bitfront.engine.evaluation.tree.schedule import States
from bitfront.kernels import convolution

#: What is known of a pair of options: nothing yet, that the kernel computes it, that it does not.
UNKNOWN, COMPUTED, OTHERWISE = range(3)


@dataclass(eq=False)
class _Options:
    """What the kernel needs of the options of a step.

    Attributes:
        known: for each data option and parameter option, see above.
        addresses: weight, sums, scales and bias of each pair, shape (data options, parameter options, 4).
        grids: how inputs are rounded, shape (data options, NUMBERS).
        kept: the tensors at these addresses.
    """

    known: NDArray[np.int8]
    addresses: Ints
    grids: NDArray[np.float32]
    kept: list[Tensor] = field(default_factory=list)


class Convolutions:
    """The convolutions of a program that the kernel computes.

    Args:
        program: the steps.
        products: how their products are computed.
    """

    def __init__(self, program: Program, products: Products) -> None:
        self._program, self._products = program, products
        self._options: dict[tuple[int, bool], _Options] = {}
        self._weights: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._geometries: dict[tuple[Any, ...], convolution.Geometry] = {}

    def __call__(
        self, step: Step, states: States, needed: Ints, x: BatchedActivations, samples: int
    ) -> tuple[NDArray[np.bool_], Tensor | None]:
        """(which of the states `needed` the kernel computes; their values, a part with a row for each of them).

        Args:
            x: the input, in layout ``last``.
            samples: their number.
        """
        none = np.zeros(len(needed), dtype=bool)
        if not self._products.compiled(step) or (x.norm is not None and not norm_mode()):
            return none, None
        data, parameters = states.data[needed], states.parameters[needed]
        options = self._prepared(step, x.rectify, data, parameters)
        computed = options.known[data, parameters] == COMPUTED
        if not computed.any():
            return none, None
        geometry = self.geometry(step, x.features[1:], samples)
        chosen = needed[computed]
        out = room((len(chosen), samples, *geometry.out, 1, geometry.channels[1]), "cpu")
        # States are numbered by rounded input, so the products of an input are neighbours.
        rounded = states.rounded[chosen]
        first = np.flatnonzero(np.diff(rounded, prepend=rounded[0] - 1))
        parents = x.positions(states.rounded_parent[rounded[first]])
        grids = options.grids[data[computed][first]]
        rounding.lower(grids, x.ceiling)
        products = np.empty((len(chosen), 5), dtype=np.int64)
        products[:, 0] = out.data_ptr() + 4 * out[0].numel() * np.arange(len(chosen))
        products[:, 1:] = options.addresses[data[computed], parameters[computed]]
        inputs, held = addresses(x, parents)
        inputs[:, 2], inputs[:, 3] = first, np.append(first[1:], len(chosen))
        affine = None if x.norm is None else x.norm.affine(geometry.rows.size[1])
        has_nan = convolution.convolve(geometry, inputs, products, grids, affine)
        del held
        return (none, None) if has_nan else (computed, out)

    def computes(self, step: Step, states: States, needed: Ints, rectified: bool) -> bool:
        """Whether the kernel computes all states `needed`; `rectified` says whether a ReLU is pending for the input."""
        if not self._products.compiled(step):
            return False
        data, parameters = states.data[needed], states.parameters[needed]
        known = self._prepared(step, rectified, data, parameters).known
        return bool((known[data, parameters] == COMPUTED).all())

    def operands(self, step: Step, states: States, needed: Ints, rectified: bool) -> tuple[NDArray[np.float32], Ints]:
        """For each state, which the kernel computes: how its input is rounded, shape (states, NUMBERS), and the
        addresses of weight, sums, scales and bias, shape (states, 4)."""
        data, parameters = states.data[needed], states.parameters[needed]
        options = self._prepared(step, rectified, data, parameters)
        return options.grids[data], options.addresses[data, parameters]

    def geometry(self, step: Step, size: tuple[int, ...], samples: int) -> convolution.Geometry:
        """The shape of a convolution of some samples of a height and a width."""
        key = (step.node.name, *size, samples)
        if key not in self._geometries:
            self._geometries[key] = self._geometry(step, size, samples)
        return self._geometries[key]

    def _geometry(self, step: Step, size: tuple[int, ...], samples: int) -> convolution.Geometry:
        module: Any = self._program.model.get_submodule(str(step.node.target))
        height, width = size
        return convolution.Geometry(
            samples,
            (height, width),
            (module.in_channels, module.out_channels),
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups > 1,
        )

    def _prepared(self, step: Step, rectified: bool, data: Ints, parameters: Ints) -> _Options:
        """What is known of the step's options, at least of some pairs.

        Args:
            rectified: whether a ReLU is applied to the input before it is rounded.
        """
        assert step.group is not None
        key = (step.group, rectified)
        if key not in self._options:
            of = self._program.options[step.group]
            shape = (len(of.data_formats), len(of.parameter_formats))
            empty = np.zeros((*shape, 4), dtype=np.int64), np.zeros((shape[0], kernels.NUMBERS), dtype=np.float32)
            self._options.setdefault(key, _Options(np.zeros(shape, dtype=np.int8), *empty))
        options = self._options[key]
        unknown = options.known[data, parameters] == UNKNOWN
        if unknown.any():
            for d, p in sorted(set(zip(data[unknown].tolist(), parameters[unknown].tolist(), strict=True))):
                self._prepare(step, options, d, p, rectified)
        return options

    def _prepare(self, step: Step, options: _Options, data: int, parameters: int, rectified: bool) -> None:
        operands = self._operands(step, data, parameters, rectified)
        if operands is None:
            options.known[data, parameters] = OTHERWISE
            return
        grid, *tensors = operands
        options.kept += tensors
        options.grids[data] = grid
        options.addresses[data, parameters] = [t.data_ptr() for t in tensors]
        options.known[data, parameters] = COMPUTED

    def _operands(
        self, step: Step, data: int, parameters: int, rectified: bool
    ) -> tuple[NDArray[np.float32], Tensor, Tensor, Tensor, Tensor] | None:
        """How the input is rounded, then weight, sums, scales and bias; None if the kernel cannot take them."""
        products, program = self._products, self._program
        assert step.group is not None
        if products.kind(step, data, parameters) in ("alone", "ordered"):
            return None
        whole = products.whole(step, data, parameters)
        assert whole is not None
        weight, bias = program.parameters(step, parameters)
        scale = whole.scale.expand(len(weight))
        if step.groups > 1:
            grids, covered = program.rounding(step, coded=True).grids, program.rounding(step).covered
            if not covered[data]:
                return None
            grid = grids[data].copy()
            grid[LOW] = max(grid[LOW], grid[ZERO]) if rectified else grid[LOW]
            numbers = whole.weight.numbers
        else:
            grid = products.byte_grid(step, data, rectified)
            if grid is None or not products.fits_bytes(step, data, parameters, rectified):
                return None
            numbers = whole.weight.rows(whole.weight.numbers).reshape(weight.shape)
            # Steps of values are powers of two, so that it makes no difference when they are multiplied with.
            scale = scale * torch.as_tensor(whole.weight.whole.step).float() * float(whole.inputs.step)
        key = (step.group, parameters)
        if key not in self._weights:
            bias = torch.zeros(len(weight)) if bias is None else bias
            self._weights[key] = (*convolution.packed(numbers, step.groups > 1), convolution.filled(bias))
        packed, sums, bias = self._weights[key]
        return grid, packed, sums, convolution.filled(scale.contiguous()), bias


def addresses(x: BatchedActivations, positions: Ints) -> tuple[Ints, list[Tensor]]:
    """(address and distance of pixels of some states, in the first columns; the tensors that hold them)."""
    inputs = np.empty((len(positions), 4), dtype=np.int64)
    where, held = x.where[positions], []
    for index, part in enumerate(x.parts):
        here = where[:, 0] == index
        shape = rounding.rows_of(part, "last", dense=False)
        if shape is None:
            part = part.contiguous()
            shape = rounding.rows_of(part, "last", dense=False)
            assert shape is not None
        held.append(part)
        places = where[here, 1] * part.stride(0) + where[here, 2] * part.stride(COLUMNS["last"])
        inputs[here, 0], inputs[here, 1] = part.data_ptr() + 4 * places, shape[2]
    return inputs, held
