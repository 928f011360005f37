"""From a graph and a format per operand to an ONNX model (opset 21) that computes in these formats.

There are two forms. The default, ``integer``, answers as the simulated model does, whatever optimizations a runtime
makes: sites that ONNX has integer operators for (MatMulInteger, ConvInteger) take bytes in, sum in 32 bits, and give
floats out; elsewhere values are rounded by plain operators (Div, Round, Clip, Mul), which no runtime fuses. It has no
DequantizeLinear: ONNX Runtime computes a product or pooling behind one in another way, or refuses the file.

The other, ``qdq``, is approximate: QuantizeLinear and DequantizeLinear around every tensor with a format, the form in
which runtimes look for integer kernels of their own (``fusing.py``). A tensor is rounded once for all that round it
alike. ONNX Runtime's default optimizations fuse these, and round a bias once more that is no multiple of the step of
the sums. Where it is one (``integer_bias`` in a search), it is held in whole numbers of 32 bits and stays what it is;
sums that lie between two codes may still be rounded the other way.

Operands have at most 8 bits. Weights are held as bytes, or two in a byte if their codes fit into 4 bits, and where no
integer operator takes them, operators behind them make floats of them; other biases as the floats of their values.

The graph is written while torch.fx runs it on a sample, so that everything that is not a tensor (a size, a list of
dimensions) is known. The size of the batch is not fixed. The record of an operation has the rule that writes it; this
file has the writer that the rule uses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from bitfront.errors import ExportError, one_of, require
from bitfront.exporters import fusing
from bitfront.exporters.packing import Packing, instead, otherwise, packing
from bitfront.exporters.walking import Walker
from bitfront.formats.base import Format, Operand
from bitfront.graph import Graph, Site
from bitfront.operations.base import DATA_OUT
from bitfront.operations.onnx import Bytes
from bitfront.transforms.correct import bias_in_steps

OPSET, IR_VERSION = 21, 10
INPUT, OUTPUT = "input", "output"

SiteFormats = Mapping[Operand, Format]
#: How quantized sites are written.
Form = Literal["integer", "qdq"]


def onnx_model(graph: Graph, formats: Mapping[str, SiteFormats], form: Form = "integer") -> Any:
    """An ``onnx.ModelProto``: input ``input``, shape ``(batch, *features)``, output ``output``, both float32.

    Args:
        graph: the captured model; on the CPU.
        formats: site name → formats by operand, calibrated; sites that are absent stay in float.
        form: ``integer`` computes what ``transforms.quantize`` simulates, up to the order of sums in float32. ``qdq``
            does so only in a session with ``graph_optimization_level = ORT_DISABLE_ALL``: it is approximate.

    Raises:
        MissingExtraError: the package onnx is not installed.
        ExportError: an operation or a format has no counterpart; the message names the node. Or there is no such form.
    """
    if form not in get_args(Form):
        raise ExportError(f"there is no form {form!r} of an ONNX model; {one_of(get_args(Form))}")
    writer = _Writer(graph, formats, form)
    writer.walk()
    return writer.model()


def integer_sites(graph: Graph, formats: Mapping[str, SiteFormats]) -> frozenset[str]:
    """The sites that ONNX's integer operators compute in these formats."""
    return frozenset(s.name for s in graph.sites if formats.get(s.name) and not _missing(s, formats[s.name]))


def _missing(site: Site, formats: SiteFormats) -> str:
    """As ``obstacle``; but a site whose sums are left in float has no integer operator either."""
    needed = _summed(site)
    return obstacle(site, formats) or ("" if any(o in needed for o in formats) else "its sums are in float")


def _summed(site: Site) -> list[Operand]:
    return [o for o in site.operands if site.operand(o).role != "bias"]


def obstacle(site: Site, formats: SiteFormats) -> str:
    """Why ONNX Runtime has no integer kernel for a site in these formats; empty if it has one, or if the site stays
    in float. Formats must be calibrated."""
    needed, result = _summed(site), formats.get(DATA_OUT)
    if result is not None and packing(result, activation=True) is None:
        return f"{DATA_OUT} is {result.label}, which no kernel of bytes takes"
    if result is not None and (why := otherwise(result, DATA_OUT)):
        return why
    if not any(o in needed for o in formats):
        return ""
    if site.operation.onnx_integer is None:
        return f"there is no kernel of bytes for {site.op}"
    held = dict(site.operand_parameters)
    packed: dict[str, Packing] = {}
    for operand in needed:
        rounding = formats.get(operand)
        if rounding is None:
            return f"{operand} stays in float"
        as_bytes = packing(rounding, activation=False)
        if as_bytes is None:
            return f"{operand} is {rounding.label}, which no kernel of bytes takes"
        if operand not in held and (why := otherwise(rounding, operand)):
            return why
        packed[operand] = as_bytes
    if any(p.axis is not None for o, p in packed.items() if o not in held):
        return "an input with a scale per channel cannot be summed as integers"
    return site.operation.onnx_integer(packed)


#: What a format must be, for the end of a message.
WRITTEN = "only whole numbers of at most 8 bits, with one scale per tensor or channel, are written to ONNX here"


class _Writer(Walker):
    """Runs the graph and writes each step: an ``operations.onnx.OnnxWriter``."""

    def __init__(self, graph: Graph, formats: Mapping[str, SiteFormats], form: Form) -> None:
        super().__init__(graph, formats, "written as ONNX", "has no counterpart in ONNX here")
        self.onnx, self.form = require("onnx", "onnx", "writing ONNX"), form
        self.in_integers = integer_sites(graph, formats) if form == "integer" else frozenset[str]()
        self.names: dict[fx.Node, str] = {}
        #: What depends on the samples; everything else is a constant.
        self.flowing: set[fx.Node] = set()
        #: Of a node that gives several tensors.
        self.parts: dict[fx.Node, list[str]] = {}
        self.nodes: list[Any] = []
        self.initializers: dict[str, NDArray[Any]] = {}
        self.taken: dict[str, int] = {}
        self.result: tuple[int, ...] = ()
        #: Constants that are stored in 4 bits.
        self.four_bits: set[str] = set()
        #: In the form qdq: (tensor, its form in bytes) → the tensor of its rounded values; output of a QuantizeLinear,
        #: or of a DequantizeLinear of an activation → its form in bytes.
        self.shared: dict[tuple[object, ...], str] = {}
        self.quantized: dict[str, Packing] = {}

    # --- what the walker calls ----------------------------------------------------------------------------------------

    def visit(self, n: fx.Node, value: Any) -> None:
        if n.op == "placeholder" or any(source in self.flowing for source in n.all_input_nodes):
            self.flowing.add(n)
        if n.op == "output":
            (last,) = n.all_input_nodes
            if not fusing.named_at_the_end(self.nodes, self.name_of(last), OUTPUT):
                self.add("Identity", [self.name_of(last)], OUTPUT)
            self.result = tuple(value.shape[1:])
        elif isinstance(value, Tensor):
            self.names[n] = self._write(n)
        elif n in self.flowing and isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
            self.parts[n] = self._by_moving(n)

    def _write(self, n: fx.Node) -> str:
        if n.op == "placeholder":
            return INPUT
        constant = n.op == "get_attr" or not any(source in self.flowing for source in n.all_input_nodes)
        if constant and not self.formats.get(n.name):
            return self.constant(f"{n.name}.value", self.out.detach().numpy())
        computed = self.flowing & (self.names.keys() | self.parts.keys())
        if not any(source in computed for source in n.all_input_nodes):
            return self._for_each_sample(n)
        operation = self.operation(n)
        if n.all_input_nodes[0] in self.parts:
            return self.parts[n.all_input_nodes[0]][int(self.argument(n, 1, ""))]
        if operation is not None and operation.onnx is None and operation.integers is not None:
            (name,) = self._by_moving(n)
        elif operation is None or operation.onnx is None:
            raise self.without_rule(n)
        else:
            name = operation.onnx(self, n)
        if (rounding := self.format_of(n, DATA_OUT)) is not None:
            name = self._rounded(n, DATA_OUT, self.out, name, rounding)
        self.check_all_written(n)
        return name

    def _for_each_sample(self, n: fx.Node) -> str:
        """A constant that a node repeats for each sample, as a class token."""
        value = self.out.detach().numpy()
        if len(value) != self.batch or not (value == value[:1]).all():
            raise self.refuse(n, "it makes a tensor of the number of samples, whose values are not the same for all")
        shape = self.add("Shape", [INPUT], f"{n.name}.of_input", start=0, end=1)
        rest = self.constant(f"{n.name}.rest", np.array(value.shape[1:], np.int64))
        target = self.add("Concat", [shape, rest], f"{n.name}.shape", axis=0)
        return self.add("Expand", [self.constant(f"{n.name}.value", value[:1]), target], n.name)

    def _by_moving(self, n: fx.Node) -> list[str]:
        """The tensors that a node gives which moves values and computes nothing: a part, a shuffle, a padding. The rule
        for whole numbers says whether it is one, and calls ``moved``."""
        operation = self.operation(n)
        if operation is None or operation.integers is None or n.all_input_nodes[0] not in self.names:
            raise self.without_rule(n)
        names: Any = operation.integers(cast(Any, self), n)
        return list(names)

    def moved(self, n: fx.Node) -> list[str]:
        shape = tuple(self.source(n).shape[1:])
        names = []
        for k, places in enumerate(self.places(n, shape)[0]):
            flat = self.add("Flatten", [self.value(n)], f"{n.name}.{k}.flat", axis=1)
            size = math.prod(shape)
            if (places < 0).any():
                pads = self.constant(f"{n.name}.{k}.pads", np.array([0, 0, 0, 1]))
                flat = self.add("Pad", [flat, pads], f"{n.name}.{k}.padded")
            taken = self.constant(f"{n.name}.{k}.places", np.where(places < 0, size, places).ravel())
            values = self.add("Gather", [flat, taken], f"{n.name}.{k}.taken", axis=1)
            target = self.constant(f"{n.name}.{k}.shape", np.array([-1, *places.shape]))
            names.append(self.add("Reshape", [values, target], f"{n.name}.{k}"))
        return names

    # --- what the rules of operations use -----------------------------------------------------------------------------

    def model(self) -> Any:
        """The finished model, checked."""
        h, kinds = self.onnx.helper, self.onnx.TensorProto
        if self.fuses:
            fusing.without_upper_bounds(self.nodes, self.initializers, self.quantized)
        # With integer operators, the scale of a weight is merged with that of the input; runtimes warn if one is
        # unused.
        used = {name for node in self.nodes for name in node.input}
        graph = h.make_graph(
            self.nodes,
            "bitfront",
            [h.make_tensor_value_info(INPUT, kinds.FLOAT, ["batch", *self.captured.sample_shape])],
            [h.make_tensor_value_info(OUTPUT, kinds.FLOAT, ["batch", *self.result])],
            fusing.initializers(self.onnx, self.initializers, used, self.four_bits),
        )
        model = h.make_model(
            graph, producer_name="bitfront", opset_imports=[h.make_opsetid("", OPSET)], ir_version=IR_VERSION
        )
        self.onnx.checker.check_model(model)
        return model

    def add(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        name = self._free(name)
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: NDArray[Any]) -> str:
        name = self._free(name)
        self.initializers[name] = np.ascontiguousarray(value).reshape(value.shape)
        return name

    def _free(self, name: str) -> str:
        self.taken[name] = self.taken.get(name, -1) + 1
        return f"{name}.{self.taken[name]}" if self.taken[name] else name

    def name_of(self, n: fx.Node) -> str:
        if n not in self.names:
            raise ExportError(f"{n.name} ({self.kind(n)}) does not return one tensor")
        return self.names[n]

    def tensor(self, n: fx.Node, position: int = 0, name: str = "input") -> str:
        return self._tensor(n, self.argument(n, position, name), name)

    def _tensor(self, n: fx.Node, given: Any, name: str) -> str:
        if isinstance(given, fx.Node):
            value = self.env[given]
            if isinstance(value, Tensor):
                return self.name_of(given)
            given = value
        return self.constant(f"{n.name}.{name}", np.array(given, np.float32))

    def parameter(self, n: fx.Node, position: int, name: str) -> str | None:
        value = self.setting(n, position, name)
        if value is None:
            return None
        rounding = self.format_of(n, name)
        given = None if self.module_of(n) is not None else self.argument(n, position, name)
        if isinstance(given, fx.Node) and (rounding is None or given.op != "get_attr"):
            return self.value(n, position, name)
        # Like a bias, it is held as the floats of its quantized values.
        held = value.detach() if rounding is None else rounding.quantize(value.detach())
        return self.constant(f"{n.name}.{name}", held.float().numpy())

    def value(self, n: fx.Node, position: int = 0, name: str = "input") -> str:
        return self._in_format(n, self.argument(n, position, name), position, name)

    def values(self, n: fx.Node, position: int, name: str) -> list[str]:
        return [self._in_format(n, given, position, name) for given in self.argument(n, position, name)]

    def _in_format(self, n: fx.Node, given: Any, position: int, name: str) -> str:
        """A tensor that is an argument of a node, in the format of the operand at a position."""
        rounding = self._format(n, position)
        tensor = self._tensor(n, given, name)
        if rounding is None:
            return tensor
        x = self.env[given] if isinstance(given, fx.Node) else torch.zeros(())
        return self._rounded(n, self.operand_at(n, position), x, tensor, rounding)

    def _rounded(self, n: fx.Node, label: Operand, x: Tensor, tensor: str, rounding: Format) -> str:
        """An activation in a format. In the integer form by plain operators: as the format rounds, and nothing that a
        runtime would fuse.

        Args:
            x: its values here, for their shape.
            tensor: its name.
        """
        if self.fuses:
            return self._dequantized(n, label, tensor, rounding)
        self._packing(n, label, rounding)
        grid, place = rounding.grid, f"{n.name}.{label}"
        assert grid is not None

        def constant(what: str, entry: float | Tensor) -> str:
            return self.constant(f"{place}.{what}", grid.along(entry, x).numpy())

        step = constant("step", grid.step)
        codes = self.add("Round", [self.add("Div", [tensor, step], f"{place}.steps")], f"{place}.whole")
        zero = None if grid.zero is None else constant("zero", grid.zero)
        codes = codes if zero is None else self.add("Add", [codes, zero], f"{place}.moved")
        codes = self.add("Clip", [codes, constant("low", grid.low), constant("high", grid.high)], f"{place}.codes")
        codes = codes if zero is None else self.add("Sub", [codes, zero], f"{place}.centred")
        return self.add("Mul", [codes, step], f"{place}.rounded")

    def _dequantized(self, n: fx.Node, label: Operand, tensor: str, rounding: Format) -> str:
        """An activation behind QuantizeLinear and DequantizeLinear: once for all that round it alike."""
        # Kernels take no mixture of signed and unsigned bytes, and what a ReLU gives is fused where it is unsigned.
        held = self._packing(n, label, rounding, activation=False)
        low, high = fusing.bounds(self.nodes, self.initializers, tensor)
        held = fusing.bounded(held, low, high) if low == 0 and held.symmetric else self._packing(n, label, rounding)
        kind, axis, place = np.int8 if held.signed else np.uint8, _axis(held.axis), f"{n.name}.{label}"
        key = (tensor, held.scale.tobytes(), held.zero.tobytes(), held.low, held.high, held.signed, held.axis)
        if key not in self.shared:
            scale, zero = self._scale(place, held, held.zero)
            codes = self.add("QuantizeLinear", [tensor, scale, zero], f"{place}.bytes", **axis)
            self.quantized[codes] = held
            if held.narrow:
                ends = (("low", held.low), ("high", held.high))
                bounds = [self.constant(f"{place}.{what}", np.array(end, kind)) for what, end in ends]
                codes = self.add("Clip", [codes, *bounds], f"{place}.clipped")
            self.shared[key] = self.add("DequantizeLinear", [codes, scale, zero], f"{place}.rounded", **axis)
            self.quantized[self.shared[key]] = held
        return self.shared[key]

    def _packing(self, n: fx.Node, label: str, rounding: Format, *, activation: bool = True) -> Packing:
        held = packing(rounding, activation=activation)
        if held is None:
            raise ExportError(f"{n.name}: {label} is {rounding.label}, and {WRITTEN}{instead(rounding)}")
        if why := otherwise(rounding, label):
            raise ExportError(f"{n.name}: {why}")
        return held

    def _format(self, n: fx.Node, position: int) -> Format | None:
        return self.format_of(n, self.operand_at(n, position))

    def integer(self, n: fx.Node) -> bool:
        return n.name in self.in_integers

    def packed(self, n: fx.Node, position: int = 0, name: str = "input", *, signed: bool = False) -> Bytes:
        rounding = self._format(n, position)
        assert rounding is not None
        return self._bytes(n, self.tensor(n, position, name), rounding, self.operand_at(n, position), signed=signed)

    def _bytes(self, n: fx.Node, value: str, rounding: Format, label: str, *, signed: bool = False) -> Bytes:
        held = self._packing(n, label, rounding, activation=not signed)
        if held.narrow:
            if held.axis is not None:
                raise ExportError(
                    f"{n.name}: {label} is {rounding.label}, narrower than 8 bits with a scale per channel"
                )
            low, high = (
                self.constant(f"{n.name}.{label}.{w}", np.array(b, np.float32))
                for w, b in zip(("low", "high"), held.range, strict=True)
            )
            value = self.add("Clip", [value, low, high], f"{n.name}.{label}.clipped")
        scale, zero = self._scale(f"{n.name}.{label}", held, held.zero)
        as_bytes = self.add("QuantizeLinear", [value, scale, zero], f"{n.name}.{label}.bytes", **_axis(held.axis))
        return Bytes(as_bytes, scale, zero, held)

    def unpacked(self, stored: Bytes, name: str, dims: int = 0) -> str:
        held = stored.held
        if self.form == "qdq":
            return self.add("DequantizeLinear", [stored.name, stored.scale, stored.zero], name, **_axis(held.axis))
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
        return bool(self.site(n).weight)

    def _held(self, n: fx.Node) -> Packing | None:
        rounding = self.format_of(n, "weight")
        held = packing(rounding, activation=False) if rounding is not None else None
        if rounding is not None and held is None:
            raise ExportError(f"{n.name}: weight is {rounding.label}, and {WRITTEN}{instead(rounding)}")
        return held

    def weight_shape(self, n: fx.Node) -> tuple[int, ...]:
        tensor, _ = self.weight(n), self._held(n)
        return tuple(tensor.shape)

    def packed_weight(self, n: fx.Node, *, turned: bool = False, one_zero: bool = False) -> Bytes:
        tensor, held = self.weight(n), self._held(n)
        assert held is not None
        stored = held.pack(tensor)
        name = self.constant(f"{n.name}.weight", stored.T if turned else stored)
        if held.four_bits:
            # ONNX Runtime makes bytes of them when it loads the file; its kernels take no others.
            self.four_bits.add(name)
            kinds = self.onnx.TensorProto
            name = self.add("Cast", [name], f"{n.name}.weight.bytes", to=kinds.INT8 if held.signed else kinds.UINT8)
        zero = held.zero.reshape(-1)[:1].reshape(()) if one_zero else held.zero
        return Bytes(name, *self._scale(f"{n.name}.weight", held, zero), held)

    def weights(self, n: fx.Node, *, turned: bool = False) -> str:
        tensor, held = self.weight(n), self._held(n)
        if held is None:
            plain = tensor.numpy()
            return self.constant(f"{n.name}.weight", plain.T if turned else plain)
        stored = self.packed_weight(n, turned=turned)
        axis = tensor.dim() - 1 - held.axis if turned and held.axis is not None else held.axis
        return self.unpacked(replace(stored, held=replace(held, axis=axis)), f"{n.name}.weight.rounded", tensor.dim())

    def bias(self, n: fx.Node) -> NDArray[np.float32] | None:
        rounding, tensor = self.format_of(n, "bias"), self.held_bias(n)
        if tensor is None:
            return None
        held = tensor if rounding is None else rounding.quantize(tensor)
        result: NDArray[np.float32] = held.float().numpy()
        return result

    @property
    def fuses(self) -> bool:
        return self.form == "qdq"

    def bias_of(self, n: fx.Node, data: str) -> str | None:
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
        return self.add("DequantizeLinear", inputs, f"{n.name}.bias.rounded", **_axis(weight.axis))

    def scaled(self, n: fx.Node, sums: str, scale: NDArray[np.float32], bias: NDArray[np.float32] | None) -> str:
        as_float = self.add("Cast", [sums], f"{n.name}.sums", to=self.onnx.TensorProto.FLOAT)
        scales = self.constant(f"{n.name}.scale", scale)
        if bias is None:
            return self.add("Mul", [as_float, scales], n.name)
        product = self.add("Mul", [as_float, scales], f"{n.name}.product")
        return self.add("Add", [product, self.constant(f"{n.name}.bias", bias)], n.name)


def _axis(axis: int | None) -> dict[str, int]:
    return {} if axis is None else {"axis": axis}
