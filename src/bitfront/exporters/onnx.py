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
import operator
from collections.abc import Mapping
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import Tensor, fx

from bitfront.errors import ExportError, one_of
from bitfront.exporters import fusing
from bitfront.exporters.borrowed import BY_TORCH, Borrowed, whole_model
from bitfront.exporters.borrowed import INPUT as INPUT
from bitfront.exporters.borrowed import IR_VERSION as IR_VERSION
from bitfront.exporters.borrowed import OPSET as OPSET
from bitfront.exporters.borrowed import OUTPUT as OUTPUT
from bitfront.exporters.onnx_tensors import Form as Form
from bitfront.exporters.onnx_tensors import OnnxTensors, along
from bitfront.exporters.packing import Packing, otherwise, packing
from bitfront.formats.base import Format, Operand
from bitfront.graph import Graph, Site
from bitfront.operations.base import DATA_OUT
from bitfront.operations.lookup import tensors_in
from bitfront.operations.onnx import Bytes, Named

SiteFormats = Mapping[Operand, Format]


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
    if graph.fx_graph is None and not any(formats.values()):
        return whole_model(graph)
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


class _Writer(OnnxTensors):
    """Runs the graph and writes each step: an ``operations.onnx.OnnxWriter``."""

    def __init__(self, graph: Graph, formats: Mapping[str, SiteFormats], form: Form) -> None:
        super().__init__(graph, formats, form)
        self.in_integers = integer_sites(graph, formats) if form == "integer" else frozenset[str]()
        self.names: dict[fx.Node, str] = {}
        #: Of a node that gives several tensors: their names.
        self.parts: dict[fx.Node, tuple[Named | None, ...]] = {}
        #: Such nodes that are not written yet.
        self.waiting: set[fx.Node] = set()
        self.result: tuple[int, ...] = ()
        #: Functions and classes that torch.onnx has written, in order.
        self.by_torch: dict[str, None] = {}
        self.borrowed_parts = Borrowed(cast(fx.GraphModule, self.module), graph)
        #: In the form qdq: (tensor, its form in bytes) → the tensor of its rounded values.
        self.shared: dict[tuple[object, ...], str] = {}

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
        elif n in self.flowing and (tensors := list(tensors_in(value))):
            self._write_several(n, tensors[0])

    def _write_several(self, n: fx.Node, value: Tensor) -> None:
        """A node that gives several tensors. Without a rule it is written together with who reads one of them."""
        given = self._part(n)
        if isinstance(given, tuple):
            self.parts[n] = given
            return
        written = len(self.nodes)
        try:
            named = self._by_rule(n)
        except ExportError:
            if self.formats.get(n.name):
                raise
            del self.nodes[written:]
            self.waiting.add(n)
            return
        assert isinstance(named, tuple)
        first, *others = named
        if (rounding := self.format_of(n, DATA_OUT)) is not None:
            assert isinstance(first, str)
            first = self._rounded(n, DATA_OUT, value, first, rounding)
        self.check_all_written(n)
        self.parts[n] = (first, *others)

    def _part(self, n: fx.Node) -> Named | None:
        """What a node takes out of the tensors that another one gives; None if it does something else."""
        if n.target is not operator.getitem or n.args[0] not in self.parts or not isinstance(n.args[1], int):
            return None
        return self.parts[cast(fx.Node, n.args[0])][n.args[1]]

    def _write(self, n: fx.Node) -> str:
        if n.op == "placeholder":
            return INPUT
        constant = n.op == "get_attr" or not any(source in self.flowing for source in n.all_input_nodes)
        if constant and not self.formats.get(n.name):
            return self.constant(f"{n.name}.value", self.out.detach().numpy())
        if constant:
            raise self.refuse(n, "it is computed of parameters alone; leave it in float")
        written = len(self.nodes)
        try:
            return self._written(n)
        except ExportError as error:
            if self.formats.get(n.name):
                raise
            del self.nodes[written:]
            return self._borrowed(n, error)

    def _written(self, n: fx.Node) -> str:
        """A node, by the rule of its operation. Raises ExportError if it has none."""
        computed = self.flowing & (self.names.keys() | self.parts.keys() | self.waiting)
        if not any(source in computed for source in n.all_input_nodes):
            return self._for_each_sample(n)
        if (part := self._part(n)) is not None:
            assert isinstance(part, str)
            return part
        named = self._by_rule(n)
        name = named if isinstance(named, str) else named[0]
        assert isinstance(name, str)
        if (rounding := self.format_of(n, DATA_OUT)) is not None:
            name = self._rounded(n, DATA_OUT, self.out, name, rounding)
        self.check_all_written(n)
        return name

    def _by_rule(self, n: fx.Node) -> Named:
        operation = self.operation(n)
        if operation is None or operation.onnx is None:
            return self._by_moving(n)
        arithmetic = operation.merge is not None and operation.merge.kind == "arithmetic"
        if arithmetic and any(tensor.dtype != torch.float32 for tensor in tensors_in(self.tensors(n))):
            raise self.refuse(n, "an input is no float32")  # torch converts types, and ONNX does not
        return operation.onnx(self, n)

    def _borrowed(self, n: fx.Node, error: ExportError) -> str:
        """A node in float that has no rule, or whose settings its rule does not know, as torch.onnx writes it.

        Raises:
            ExportError: torch.onnx cannot write it either.
        """
        part = self.borrowed_parts.of_node(n, self.names.keys() & self.flowing, str(error))
        given = [self.names[source] for source in part.sources]
        nodes, constants, result = part.joined(f"{n.name}.torch.", given)
        self.nodes += nodes
        self.initializers |= constants
        for inside in part.inside:
            if inside.op.startswith("call") and inside.target not in (operator.getitem, getattr):
                self.by_torch[self.kind(inside)] = None
        return result

    def _for_each_sample(self, n: fx.Node) -> str:
        """A constant that a node repeats for each sample, as a class token."""
        value = self.out.detach().numpy()
        if len(value) != self.batch or not (value == value[:1]).all():
            raise self.refuse(n, "it makes a tensor of the number of samples, whose values are not the same for all")
        shape = self.add("Shape", [INPUT], f"{n.name}.of_input", start=0, end=1)
        rest = self.constant(f"{n.name}.rest", np.array(value.shape[1:], np.int64))
        target = self.add("Concat", [shape, rest], f"{n.name}.shape", axis=0)
        return self.add("Expand", [self.constant(f"{n.name}.value", value[:1]), target], n.name)

    def _by_moving(self, n: fx.Node) -> Named:
        """The tensors that a node gives which moves values and computes nothing: a part, a shuffle, a padding. The rule
        for whole numbers says whether it is one, and calls ``moved``."""
        operation = self.operation(n)
        if operation is None or operation.integers is None or n.all_input_nodes[0] not in self.names:
            raise self.without_rule(n)
        names: Any = operation.integers(cast(Any, self), n)
        return tuple(names)

    def moved(self, n: fx.Node) -> list[str]:
        if self.borrowed_parts.sample_dims(n.all_input_nodes[0]) != {0}:
            raise self.refuse(n, "the samples do not lie along the first dimension of what it moves")
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
        if self.by_torch:
            self.onnx.helper.set_model_props(model, {BY_TORCH: ", ".join(self.by_torch)})
        self.onnx.checker.check_model(model)
        return model

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

    def inner(self, n: fx.Node, operand: str, tensor: str, shape: tuple[int, ...]) -> str:
        rounding = self.format_of(n, operand)
        return tensor if rounding is None else self._rounded(n, operand, torch.empty(shape), tensor, rounding)

    def sample_dims(self, n: fx.Node, position: int = 0, name: str = "input") -> set[int]:
        given = self.argument(n, position, name)
        return self.borrowed_parts.sample_dims(given) if isinstance(given, fx.Node) else set()

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
        kind, axis, place = np.int8 if held.signed else np.uint8, along(held.axis), f"{n.name}.{label}"
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
        as_bytes = self.add("QuantizeLinear", [value, scale, zero], f"{n.name}.{label}.bytes", **along(held.axis))
        return Bytes(as_bytes, scale, zero, held)
