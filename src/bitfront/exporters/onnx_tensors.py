"""The tensors of an ONNX model while it is written: nodes, constants, and the weights of a graph in their formats.

``onnx.py`` has the writer that runs the graph. What is here asks nothing of the tensors that flow through the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from bitfront.errors import ExportError, require
from bitfront.exporters import fusing
from bitfront.exporters.packing import Packing, instead, otherwise, packing
from bitfront.exporters.walking import SiteFormats, Walker
from bitfront.formats.base import Format, Operand
from bitfront.graph import Graph
from bitfront.operations.onnx import Bytes
from bitfront.transforms.correct import bias_in_steps

#: How quantized sites are written.
Form = Literal["integer", "qdq"]
#: What a format must be, for the end of a message.
WRITTEN = "only whole numbers of at most 8 bits, with one scale per tensor or channel, are written to ONNX here"


class OnnxTensors(Walker):
    """Nodes, constants and weights: a part of ``operations.onnx.OnnxWriter``.

    Args:
        graph, formats, form: as of ``onnx_model``.
    """

    def __init__(self, graph: Graph, formats: Mapping[str, SiteFormats], form: Form) -> None:
        super().__init__(graph, formats, "written as ONNX", "has no counterpart in ONNX here")
        self.onnx, self.form = require("onnx", "onnx", "writing ONNX"), form
        #: What depends on the samples; everything else is a constant.
        self.flowing: set[fx.Node] = set()
        self.nodes: list[Any] = []
        self.initializers: dict[str, NDArray[Any]] = {}
        self.taken: dict[str, int] = {}
        #: Constants that are stored in 4 bits.
        self.four_bits: set[str] = set()
        #: (node, operand) → the tensor that ``held`` has given.
        self.held_before: dict[tuple[fx.Node, Operand], str | None] = {}
        #: In the form qdq: output of a QuantizeLinear, or of a DequantizeLinear of an activation → its form in bytes.
        self.quantized: dict[str, Packing] = {}

    def add(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """As of ``operations.onnx.OnnxWriter``."""
        name = self._free(name)
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def add_several(self, op: str, inputs: Sequence[str], names: Sequence[str], **attributes: Any) -> list[str]:
        """As of ``operations.onnx.OnnxWriter``."""
        outputs = [self._free(name) for name in names]
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), outputs, name=outputs[0], **attributes))
        return outputs

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """As of ``operations.onnx.OnnxWriter``."""
        name = self._free(name)
        self.initializers[name] = np.ascontiguousarray(value).reshape(value.shape)
        return name

    def _free(self, name: str) -> str:
        self.taken[name] = self.taken.get(name, -1) + 1
        return f"{name}.{self.taken[name]}" if self.taken[name] else name

    def held(self, n: fx.Node, operand: str) -> str | None:
        """As of ``operations.onnx.OnnxWriter``."""
        if (n, operand) not in self.held_before:
            self.held_before[n, operand] = self._held_now(n, operand)
        return self.held_before[n, operand]

    def _held_now(self, n: fx.Node, operand: str) -> str | None:
        spec = self.operand_named(n, operand)
        module = self.module_of(n)
        if module is None and self.flows(n, spec.position, spec.argument):
            raise self.refuse(n, f"its {operand} is computed from the samples")
        tensor = spec.held_by(module) if module is not None else self.sample(n, spec.position, spec.argument)
        rounding = self.format_of(n, operand)
        if tensor is None:
            return None
        tensor = tensor.detach()
        if rounding is None or spec.role == "bias":
            held = tensor if rounding is None else rounding.quantize(tensor)
            return self.constant(f"{n.name}.{operand}", held.float().numpy())
        packed = self._packing(n, operand, rounding, activation=False, computed=False)
        stored = self._stored(f"{n.name}.{operand}", tensor, packed)
        return self.unpacked(stored, f"{n.name}.{operand}.rounded", tensor.dim())

    def has_format(self, n: fx.Node, operand: str) -> bool:
        """As of ``operations.onnx.OnnxWriter``."""
        return operand in self.formats.get(n.name, {})

    def _packing(
        self, n: fx.Node, label: str, rounding: Format, *, activation: bool = True, computed: bool = True
    ) -> Packing:
        held = packing(rounding, activation=activation)
        if held is None:
            raise ExportError(f"{n.name}: {label} is {rounding.label}, and {WRITTEN}{instead(rounding)}")
        if computed and (why := otherwise(rounding, label)):
            raise ExportError(f"{n.name}: {why}")
        return held

    def unpacked(self, stored: Bytes, name: str, dims: int = 0) -> str:
        """As of ``operations.onnx.OnnxWriter``."""
        held = stored.held
        if self.form == "qdq":
            return self.add("DequantizeLinear", [stored.name, stored.scale, stored.zero], name, **along(held.axis))
        # Plain operators: around a DequantizeLinear, runtimes look for products that they compute in another way.
        shape = () if held.axis is None else tuple(-1 if d == held.axis else 1 for d in range(dims))
        codes = self.add("Cast", [stored.name], f"{name}.codes", to=self.onnx.TensorProto.FLOAT)
        if held.zero.any():
            zero = self.constant(f"{name}.zero", held.zero.astype(np.float32).reshape(shape))
            codes = self.add("Sub", [codes, zero], f"{name}.centred")
        return self.add("Mul", [codes, self.constant(f"{name}.step", held.scale.reshape(shape))], name)

    def _scale(self, name: str, held: Packing, zero: NDArray[np.int64]) -> tuple[str, str]:
        kind = np.int8 if held.signed else np.uint8
        scale = self.constant(f"{name}.scale", held.scale.astype(np.float32))
        return scale, self.constant(f"{name}.zero", zero.astype(kind))

    def has_weight(self, n: fx.Node) -> bool:
        """As of ``operations.onnx.OnnxWriter``."""
        return bool(self.site(n).weight)

    def _held(self, n: fx.Node) -> Packing | None:
        rounding = self.format_of(n, "weight")
        return None if rounding is None else self._packing(n, "weight", rounding, activation=False, computed=False)

    def weight_shape(self, n: fx.Node) -> tuple[int, ...]:
        """As of ``operations.onnx.OnnxWriter``."""
        tensor, _ = self.weight(n), self._held(n)
        return tuple(tensor.shape)

    def packed_weight(self, n: fx.Node, *, turned: bool = False, one_zero: bool = False) -> Bytes:
        """As of ``operations.onnx.OnnxWriter``. Signed bytes with which a kernel may saturate (``sessions.py``) become
        unsigned ones."""
        tensor, held = self.weight(n), self._held(n)
        assert held is not None
        held = held.unsigned if held.saturates else held
        return self._stored(f"{n.name}.weight", tensor, held, turned=turned, one_zero=one_zero)

    def _stored(
        self, name: str, tensor: Tensor, held: Packing, *, turned: bool = False, one_zero: bool = False
    ) -> Bytes:
        """A weight in bytes, or in 4 bits."""
        codes = held.pack(tensor)
        stored = self.constant(name, codes.T if turned else codes)
        if held.four_bits:
            # ONNX Runtime makes bytes of them when it loads the file; its kernels take no others.
            self.four_bits.add(stored)
            kinds = self.onnx.TensorProto
            stored = self.add("Cast", [stored], f"{name}.bytes", to=kinds.INT8 if held.signed else kinds.UINT8)
        zero = held.zero.reshape(-1)[:1].reshape(()) if one_zero else held.zero
        return Bytes(stored, *self._scale(name, held, zero), held)

    def weights(self, n: fx.Node, *, turned: bool = False) -> str:
        """As of ``operations.onnx.OnnxWriter``."""
        tensor, held = self.weight(n), self._held(n)
        if held is None:
            plain = tensor.numpy()
            return self.constant(f"{n.name}.weight", plain.T if turned else plain)
        stored = self._stored(f"{n.name}.weight", tensor, held, turned=turned)
        axis = tensor.dim() - 1 - held.axis if turned and held.axis is not None else held.axis
        return self.unpacked(replace(stored, held=replace(held, axis=axis)), f"{n.name}.weight.rounded", tensor.dim())

    def bias(self, n: fx.Node) -> NDArray[np.float32] | None:
        """As of ``operations.onnx.OnnxWriter``."""
        rounding, tensor = self.format_of(n, "bias"), self.held_bias(n)
        if tensor is None:
            return None
        held = tensor if rounding is None else rounding.quantize(tensor)
        result: NDArray[np.float32] = held.float().numpy()
        return result

    @property
    def fuses(self) -> bool:
        """As of ``operations.onnx.OnnxWriter``."""
        return self.form == "qdq"

    def bias_of(self, n: fx.Node, data: str) -> str | None:
        """As of ``operations.onnx.OnnxWriter``."""
        bias, weight = self.bias(n), self._held(n) if n.name in self.sites else None
        if bias is None:
            return None
        *_, (source, _) = fusing.sources(self.nodes, data)
        held = self.quantized.get(source) if self.fuses else None
        if held is None or held.axis is not None or weight is None or weight.axis not in (None, 0):
            return self.constant(f"{n.name}.bias", bias)
        step = np.asarray(held.scale * weight.scale, np.float32)
        values, codes = bias_in_steps(torch.from_numpy(bias), torch.from_numpy(step.reshape(-1)))
        if not np.array_equal(values.numpy(), bias):
            return self.constant(f"{n.name}.bias", bias)  # another network otherwise
        inputs = [self.constant(f"{n.name}.bias", codes.numpy()), self.constant(f"{n.name}.bias.scale", step)]
        return self.add("DequantizeLinear", inputs, f"{n.name}.bias.rounded", **along(weight.axis))

    def scaled(self, n: fx.Node, sums: str, scale: NDArray[np.float32], bias: NDArray[np.float32] | None) -> str:
        """As of ``operations.onnx.OnnxWriter``."""
        as_float = self.add("Cast", [sums], f"{n.name}.sums", to=self.onnx.TensorProto.FLOAT)
        scales = self.constant(f"{n.name}.scale", scale)
        if bias is None:
            return self.add("Mul", [as_float, scales], n.name)
        product = self.add("Mul", [as_float, scales], f"{n.name}.product")
        return self.add("Add", [product, self.constant(f"{n.name}.bias", bias)], n.name)

    def flows(self, n: fx.Node, position: int, name: str) -> bool:
        """As of ``operations.onnx.OnnxWriter``."""
        given = self.argument(n, position, name)
        return isinstance(given, fx.Node) and given in self.flowing


def along(axis: int | None) -> dict[str, int]:
    """The attribute of QuantizeLinear and DequantizeLinear for scales along a dimension."""
    return {} if axis is None else {"axis": axis}
