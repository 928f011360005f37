"""How the tree computes the products of a linear layer or a convolution under some options.

``transforms.arithmetic`` defines the result. Here is the fastest way to the same bits. All inputs and all weights of a
site go through one product if its sums are exact in float32: then they do not depend on the order of summation, nor on
what is computed beside them. Sums of a fixed order are merged too, by a kernel that keeps the order. The rest is
computed one by one.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfront.engine.evaluation.tree.activations import Ints
from bitfront.engine.evaluation.tree.program import Program, Step, rounding_row
from bitfront.kernels import convolution
from bitfront.transforms.arithmetic import EXACT, SMALLEST_STEP, Weight, WholeProduct, known_product

#: ``exact``: sums with their biases are exact in float32. ``scaled``: sums of whole numbers are; they are scaled, and
#: get their biases, afterwards. ``long``: so are sums of whole numbers in float64. ``ordered``: sums of values in
#: float64, in a fixed order; they get their biases afterwards. ``alone``: by the call of the deployed model.
Kind = Literal["exact", "scaled", "long", "ordered", "alone"]
#: Kinds that multiply whole numbers.
WHOLE: tuple[Kind, ...] = ("scaled", "long")
#: Kinds that are computed by the kernel that keeps the order of a sum.
ORDERED: tuple[Kind, ...] = ("long", "ordered")


#: The largest sum of bytes that 32-bit integers hold.
LARGEST_SUM = 2**31 - 1


class Products:
    """How the products of a program's sites are computed. Everything is computed once per option.

    Args:
        program: the program.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._kinds: dict[tuple[int, int, int], Kind] = {}
        self._compiled: dict[int, bool] = {}

    def kind(self, step: Step, data: int, parameters: int) -> Kind:
        """How the step is computed under a data option and a parameter option."""
        assert step.group is not None
        key = (step.group, data, parameters)
        if key not in self._kinds:
            self._kinds[key] = self._kind(step, data, parameters)
        return self._kinds[key]

    def whole(self, step: Step, data: int, parameters: int) -> WholeProduct | None:
        """The product of whole numbers under a data option and a parameter option; None if it is none."""
        assert step.group is not None
        # Looking up formats takes longer than a small product.
        key = ("product", step.group, data, parameters)
        way = self._program.shelf.get(key, lambda: self._whole_or_why(step, data, parameters))
        return None if isinstance(way, str) else way

    def _whole_or_why(self, step: Step, data: int, parameters: int) -> WholeProduct | str:
        assert step.site is not None
        program, rule = self._program, step.site.operation.product
        assert rule is not None
        formats = program.data_format(step, data), program.parameter_formats(step, parameters).get("weight")
        known = program.kept(step, parameters).products
        way = known_product(rule, lambda: program.parameters(step, parameters)[0], formats, known)
        if isinstance(way, str):
            program.inexact.setdefault(step.site.title, way)
        return way

    def _kind(self, step: Step, data: int, parameters: int) -> Kind:
        program = self._program
        weight, bias = program.parameters(step, parameters)
        formats = program.data_format(step, data), program.parameter_formats(step, parameters).get("weight")
        dense = step.kind == "dense"
        if formats == (None, None) or weight.dtype != torch.float32:
            return "alone"
        whole = self.whole(step, data, parameters)
        if whole is None:
            return "ordered" if dense else "alone"
        inputs, numbers = whole.inputs, whole.weight
        longest = numbers.longest(inputs, rectified=True) if program.not_negative(step) else whole.longest
        if longest > EXACT:
            # Without a kernel of bytes, a convolution has none that keeps long sums exact.
            bytes_hold = (
                longest <= LARGEST_SUM
                and step.groups == 1
                and self.compiled(step)
                and self.fits_bytes(step, data, parameters, False)
            )
            return "long" if dense or bytes_hold else "alone"
        if inputs.coded or numbers.whole.coded:
            return "scaled"
        if bias is None:
            return "exact"
        form = program.parameter_formats(step, parameters).get("bias")
        grid = None if form is None else form.grid_of(bias)
        fixed = None if grid is None else grid.fixed_point
        if fixed is None or isinstance(numbers.whole.step, Tensor):
            return "scaled"
        product = float(inputs.step) * numbers.whole.step
        unit = min(product, fixed.step)
        most = (longest * product + float(bias.abs().max())) / unit
        return "exact" if most <= EXACT and unit >= SMALLEST_STEP else "scaled"

    def weights(
        self, step: Step, indices: tuple[int, ...], kind: Kind, *, joined: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """What is multiplied with of the weights of several parameter options, and their biases, concatenated along the
        output channels.

        Args:
            joined: the bias is the last column of the weight.
        """
        key = ("multiplied", step.group, indices, kind, joined)
        return self._program.shelf.get(key, lambda: self._joined(step, indices, kind, joined=joined))

    def _joined(
        self, step: Step, indices: tuple[int, ...], kind: Kind, *, joined: bool
    ) -> tuple[Tensor, Tensor | None]:
        program = self._program
        pairs = [program.parameters(step, i) for i in indices]
        rows = [self._numbers(step, i) for i in indices] if kind in WHOLE else [w for w, _ in pairs]
        weight = torch.cat(rows) if len(rows) > 1 else rows[0]
        bias = torch.cat([b for _, b in pairs if b is not None]) if pairs[0][1] is not None else None
        if step.kind == "convolution" and weight.dim() == 4:
            weight = weight.contiguous(memory_format=torch.channels_last)
        if joined and bias is not None:
            weight, bias = torch.cat([weight, bias[:, None]], dim=1), None
        return weight, bias

    def _numbers(self, step: Step, parameters: int) -> Tensor:
        """The whole numbers of a weight."""
        assert step.site is not None
        form = self._program.parameter_formats(step, parameters)["weight"]
        rule = step.site.operation.product
        assert rule is not None
        for (_, known), way in self._program.kept(step, parameters).products.items():
            if known == form and not isinstance(way, str):
                return way.weight.numbers
        weight = Weight.of(form, self._program.parameters(step, parameters)[0], rule, False)
        assert weight is not None
        return weight.numbers

    def scales(self, step: Step, data: Ints, indices: tuple[int, ...], kind: Kind) -> Tensor:
        """What sums are multiplied with afterwards.

        Args:
            data: the data option of each row of a product.
            indices: the parameter options of its columns.

        Returns:
            float32, shape (rows, output channels of all columns).
        """
        return torch.stack([torch.cat([self._scale(step, d, p, kind) for p in indices]) for d in data.tolist()])

    def _scale(self, step: Step, data: int, parameters: int, kind: Kind) -> Tensor:
        channels = self._program.channels(step)
        if kind not in WHOLE:
            return torch.ones(channels, device=self._program.device)
        whole = self.whole(step, data, parameters)
        assert whole is not None
        return whole.scale.expand(channels)

    def compiled(self, step: Step) -> bool:
        """Whether the kernel of convolutions computes the step, under the options that it can compute."""
        assert step.group is not None
        if step.group not in self._compiled:
            self._compiled[step.group] = self._program.device == "cpu" and _compiled(self._program, step)
        return self._compiled[step.group]

    def fits_bytes(self, step: Step, data: int, parameters: int, rectified: bool) -> bool:
        """Whether both operands of a product of whole numbers fit bytes under a data option and a parameter option.

        Args:
            rectified: whether a ReLU is applied to the input before it is rounded.
        """
        whole = self.whole(step, data, parameters)
        grid = self.byte_grid(step, data, rectified)
        if whole is None or grid is None:
            return False
        numbers = whole.weight.rows(whole.weight.numbers)
        return float(numbers.min()) >= -128 and float(numbers.max()) <= 127

    def byte_grid(self, step: Step, data: int, rectified: bool) -> NDArray[np.float32] | None:
        """How the step's input is rounded to bytes under a data option, shape (NUMBERS,) (``kernels.round_blocks``);
        None if it does not fit bytes."""
        row = rounding_row(self._program.data_format(step, data))
        return None if row is None else convolution.byte_row(row, rectified=rectified)


def _compiled(program: Program, step: Step) -> bool:
    """Whether a step is a convolution of two dimensions with zero padding, and without groups or with one channel in
    each; and this machine has a kernel for it."""
    module: Any = program.model.get_submodule(str(step.node.target)) if step.node.op == "call_module" else None
    if not isinstance(module, torch.nn.Conv2d) or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return False
    if module.groups == 1:
        return convolution.fast_bytes() and (module.dilation[1] == 1 or module.kernel_size[1] == 1)
    return convolution.exact() and module.groups == module.in_channels == module.out_channels
