"""A graph and a format per operand → an ONNX model (opset 21) that computes in these formats.

Operands of at most 8 bits are written as QuantizeLinear and DequantizeLinear (QDQ), the form in which runtimes look for
integer kernels: activations as unsigned bytes, clipped first where the format is narrower; weights as bytes with a
DequantizeLinear behind them; a bias as the floats of its quantized values. Sites named in `integer` are written with
ONNX's integer operators (MatMulInteger, ConvInteger) in place of that: bytes in, 32-bit sums, floats out. Both forms
compute what ``transforms.quantize`` simulates, up to the order of sums in float32.

The graph is written while torch.fx runs it on a sample: whatever is no tensor (a size, a list of dimensions) is known
by then. The batch stays open.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from bitfront.errors import ExportError, require
from bitfront.export.packing import Packing, packing
from bitfront.formats.base import Format, Operand
from bitfront.graph import Graph, Site
from bitfront.graph.capture import parameter
from bitfront.operations.lookup import operand_nodes

OPSET, IR_VERSION = 21, 10
INPUT, OUTPUT = "input", "output"
#: Samples that run while the graph is written: a number that is unlikely to be one of the model's own.
_BATCH = 3

SiteFormats = Mapping[Operand, Format]


def onnx_model(graph: Graph, formats: Mapping[str, SiteFormats], integer: Collection[str] = ()) -> Any:
    """An ``onnx.ModelProto``: input ``input``, shape ``(batch, *features)``, output ``output``, both float32.

    ONNX Runtime's default optimizations fuse QuantizeLinear and DequantizeLinear into kernels that round biases again:
    a few answers are then others than those that were evaluated. Sites in `integer` are free of that, and so is a
    session with ``graph_optimization_level = ORT_DISABLE_ALL``.

    Args:
        graph: the captured model; on the CPU.
        formats: site name → formats by operand, calibrated; sites that are absent stay in float.
        integer: sites written with integer operators; each must be free of an ``obstacle``.

    Raises:
        MissingExtraError: the package onnx is not installed.
        ExportError: an operation or a format has no counterpart; names the node.
    """
    if graph.fx_graph is None:
        raise ExportError(f"the model cannot be traced, so it cannot be written as ONNX: {graph.untraced}")
    writer = _Writer(graph, formats, frozenset(integer))
    sample = torch.zeros(_BATCH, *graph.sample_shape)
    with torch.no_grad():
        writer.run(sample)
    return writer.model()


def obstacle(site: Site, formats: SiteFormats) -> str:
    """Why ONNX Runtime has no integer kernel for a site in these formats; empty where it has one, or where the site is
    left in float. Formats must be calibrated."""
    wanted = [o for o in formats if o != "bias"]
    if not wanted:
        return ""
    needed = [o for o in site.operands if o != "bias"]
    if site.op not in ("linear", "conv1d", "conv2d", "relu", "matmul", "bmm"):
        return f"there is no kernel of bytes for {site.op}"
    packed: dict[str, Packing] = {}
    for operand in needed:
        own = formats.get(operand)
        if own is None:
            return f"{operand} stays in float"
        held = packing(own, activation=operand == "data_in" or not site.weight)
        if held is None:
            return f"{operand} is {own.label}, which no kernel of bytes takes"
        packed[operand] = held
    inputs = [p for o, p in packed.items() if o == "data_in" or not site.weight]
    if any(p.axis is not None for p in inputs):
        return "an input with a scale per channel cannot be summed as integers"
    weight = packed.get("weight")
    if site.op.startswith("conv") and weight is not None and len(np.unique(weight.zero)) > 1:
        return "its weights have a zero point per channel"
    if site.op in ("matmul", "bmm") and weight is not None and weight.axis is not None:
        return "its weight has a scale per row, and sums run over the rows"
    if site.op == "relu" and packed["data_in"].zero != (128 if _signed(formats["data_in"]) else 0):
        return "its input has a zero point other than 0"
    return ""


def _signed(own: Format) -> bool:
    held = packing(own, activation=False)
    return held is not None and held.signed


Write = Callable[["_Writer", fx.Node], str]


class _Writer(fx.Interpreter):
    """Runs the graph and writes down each step."""

    def __init__(self, graph: Graph, formats: Mapping[str, SiteFormats], integer: frozenset[str]) -> None:
        assert graph.fx_graph is not None
        super().__init__(fx.GraphModule(graph.model, graph.fx_graph))
        self.onnx = require("onnx", "onnx", "writing ONNX")
        self.extra_traceback = False  # it would write the tracer's state into our messages
        self.captured, self.formats, self.integer = graph, formats, integer
        self.sites = {s.name: s for s in graph.sites}
        self.names: dict[fx.Node, str] = {}
        self.nodes: list[Any] = []
        self.initializers: dict[str, NDArray[Any]] = {}
        self.taken: dict[str, int] = {}
        self.result: tuple[int, ...] = ()
        #: What the node that is being written made of the sample.
        self.out = torch.empty(0)

    # --- what fx calls ------------------------------------------------------------------------------------------------

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "output":
            (last,) = n.all_input_nodes
            self.add("Identity", [self.made(last)], OUTPUT)
            self.result = tuple(value.shape[1:])
        elif isinstance(value, Tensor):
            self.out = value
            self.names[n] = self._write(n)
        return value

    def _write(self, n: fx.Node) -> str:
        if n.op == "placeholder":
            return INPUT
        if n.op == "get_attr" or not n.all_input_nodes:
            return self.constant(f"{n.name}.value", self.out.detach().numpy())
        if n.name in self.sites and self.sites[n.name].op in _SITES:
            return _SITES[self.sites[n.name].op](self, n)
        if n.op == "call_module":
            module = self.fetch_attr(str(n.target))
            write = _MODULES.get(type(module))
            kind = type(module).__name__
        else:
            write = _METHODS.get(str(n.target)) if n.op == "call_method" else _FUNCTIONS.get(n.target)
            kind = str(n.target) if n.op == "call_method" else getattr(n.target, "__name__", str(n.target))
        if write is None:
            raise ExportError(f"{n.name} ({kind}) has no counterpart in ONNX here")
        return write(self, n)

    # --- what the writers of single operations use --------------------------------------------------------------------

    def model(self) -> Any:
        """What was written, checked."""
        h, kinds = self.onnx.helper, self.onnx.TensorProto
        # Of a weight that goes into integer operators the scale is merged with the input's; runtimes warn of leftovers.
        used = {name for node in self.nodes for name in node.input}
        graph = h.make_graph(
            self.nodes,
            "bitfront",
            [h.make_tensor_value_info(INPUT, kinds.FLOAT, ["batch", *self.captured.sample_shape])],
            [h.make_tensor_value_info(OUTPUT, kinds.FLOAT, ["batch", *self.result])],
            [self.onnx.numpy_helper.from_array(v, k) for k, v in self.initializers.items() if k in used],
        )
        made = h.make_model(
            graph, producer_name="bitfront", opset_imports=[h.make_opsetid("", OPSET)], ir_version=IR_VERSION
        )
        self.onnx.checker.check_model(made)
        return made

    def add(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """A node with one output, called `name` (numbered where that is taken). Returns the output's name."""
        self.taken[name] = self.taken.get(name, -1) + 1
        own = f"{name}.{self.taken[name]}" if self.taken[name] else name
        self.nodes.append(self.onnx.helper.make_node(op, list(inputs), [own], name=own, **attributes))
        return own

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """An initializer."""
        self.taken[name] = self.taken.get(name, -1) + 1
        own = f"{name}.{self.taken[name]}" if self.taken[name] else name
        self.initializers[own] = np.ascontiguousarray(value).reshape(value.shape)
        return own

    def made(self, n: fx.Node) -> str:
        """The value that a node made."""
        if n not in self.names:
            raise ExportError(
                f"{n.name} ({getattr(n.target, '__name__', n.target)}) makes something else than one tensor"
            )
        return self.names[n]

    def called(self, n: fx.Node) -> Any:
        """The module that a node calls."""
        return self.fetch_attr(str(n.target))

    def argument(self, n: fx.Node, position: int, name: str, default: Any = None) -> Any:
        """The value of an argument of a function or method."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return args[position] if position < len(args) else kwargs.get(name, default)

    def tensor(self, n: fx.Node, position: int, name: str = "input") -> str:
        """The name of a tensor, or of a number, among the arguments."""
        given = n.args[position] if position < len(n.args) else n.kwargs.get(name)
        if isinstance(given, fx.Node):
            value = self.env[given]
            if isinstance(value, Tensor):
                return self.made(given)
            given = value
        return self.constant(f"{n.name}.{name}", np.array(given, np.float32))

    def packed(self, n: fx.Node, operand: Operand, value: str, signed: bool = False) -> tuple[str, Packing, list[str]]:
        """An activation as bytes: its name, how it is held, and the names of scale and zero point."""
        own = self.formats[n.name][operand]
        held = packing(own, activation=not signed)
        if held is None:
            raise ExportError(
                f"{n.name}: {operand} is {own.label}, and ONNX's QuantizeLinear takes at most 8 bits here"
            )
        if held.narrow:
            if held.axis is not None:
                raise ExportError(f"{n.name}: {operand} is {own.label}, narrower than 8 bits with a scale per channel")
            low, high = (
                self.constant(f"{n.name}.{operand}.{w}", np.array(b, np.float32))
                for w, b in zip(("low", "high"), held.range, strict=True)
            )
            value = self.add("Clip", [value, low, high], f"{n.name}.{operand}.clipped")
        constants = self._scale(f"{n.name}.{operand}", held)
        axis = {} if held.axis is None else {"axis": held.axis}
        return self.add("QuantizeLinear", [value, *constants], f"{n.name}.{operand}.bytes", **axis), held, constants

    def _scale(self, name: str, held: Packing) -> list[str]:
        kind = np.int8 if held.signed else np.uint8
        return [
            self.constant(f"{name}.scale", held.scale.astype(np.float32)),
            self.constant(f"{name}.zero", held.zero.astype(kind)),
        ]

    def rounded(self, n: fx.Node, operand: Operand, value: str) -> str:
        """An activation as its format holds it, as float; itself where it has none."""
        if operand not in self.formats.get(n.name, {}):
            return value
        held_bytes, held, constants = self.packed(n, operand, value)
        axis = {} if held.axis is None else {"axis": held.axis}
        return self.add("DequantizeLinear", [held_bytes, *constants], f"{n.name}.{operand}.rounded", **axis)

    def weight(self, n: fx.Node) -> tuple[Tensor, Packing | None]:
        """The float weight of a site, and how it is held."""
        site = self.sites[n.name]
        if not site.weight:
            raise ExportError(f"{n.name} ({site.type}): its weight is computed, not a parameter")
        own = self.formats.get(n.name, {}).get("weight")
        held = packing(own, activation=False) if own is not None else None
        if own is not None and held is None:
            raise ExportError(f"{n.name}: weight is {own.label}, and at most 8 bits are written to ONNX here")
        return parameter(self.captured.model, site.weight), held

    def weights(self, n: fx.Node, turned: bool) -> str:
        """The weight as float, with a DequantizeLinear in front of it where it is quantized; transposed if `turned`."""
        tensor, held = self.weight(n)
        if held is None:
            plain = tensor.numpy()
            return self.constant(f"{n.name}.weight", plain.T if turned else plain)
        stored = held.pack(tensor)
        name = self.constant(f"{n.name}.weight", stored.T if turned else stored)
        axis = {} if held.axis is None else {"axis": tensor.dim() - 1 - held.axis if turned else held.axis}
        constants = self._scale(f"{n.name}.weight", held)
        return self.add("DequantizeLinear", [name, *constants], f"{n.name}.weight.rounded", **axis)

    def bias(self, n: fx.Node) -> NDArray[np.float32] | None:
        """The bias as float, in its format."""
        site = self.sites[n.name]
        if n.op == "call_module":
            tensor = self.called(n).bias
        else:
            tensor = self.argument(n, 2, "bias")
        if tensor is None:
            return None
        if site.path == "" and site.bias is None:
            raise ExportError(f"{n.name} ({site.type}): its bias is computed, not a parameter")
        own = self.formats.get(n.name, {}).get("bias")
        found = tensor.detach() if own is None else own.quantize(tensor.detach())
        result: NDArray[np.float32] = found.float().numpy()
        return result

    def scaled(self, n: fx.Node, sums: str, scale: NDArray[np.float32], bias: NDArray[np.float32] | None) -> str:
        """32-bit sums → floats."""
        as_float = self.add("Cast", [sums], f"{n.name}.sums", to=self.onnx.TensorProto.FLOAT)
        scales = self.constant(f"{n.name}.scale", scale)
        if bias is None:
            return self.add("Mul", [as_float, scales], n.name)
        product = self.add("Mul", [as_float, scales], f"{n.name}.product")
        return self.add("Add", [product, self.constant(f"{n.name}.bias", bias)], n.name)


# --- sites -----------------------------------------------------------------------------------------------------------


def _first(w: _Writer, n: fx.Node) -> str:
    return w.tensor(n, 0)


def _linear(w: _Writer, n: fx.Node) -> str:
    bias = w.bias(n)
    if n.name in w.integer:
        tensor, held = w.weight(n)
        assert held is not None
        data, source, (_, zero) = w.packed(n, "data_in", _first(w, n))
        stored = w.constant(f"{n.name}.weight", held.pack(tensor).T)
        zeros = w._scale(f"{n.name}.weight", held)[1]
        sums = w.add("MatMulInteger", [data, stored, zero, zeros], f"{n.name}.integer")
        return w.scaled(n, sums, source.scale * held.scale, bias)
    data = w.rounded(n, "data_in", _first(w, n))
    weight = w.weights(n, turned=True)
    if bias is None:
        return w.add("MatMul", [data, weight], n.name)
    product = w.add("MatMul", [data, weight], f"{n.name}.product")
    return w.add("Add", [product, w.constant(f"{n.name}.bias", bias)], n.name)


def _conv(w: _Writer, n: fx.Node) -> str:
    spatial = w.out.dim() - 2
    if n.op == "call_module":
        module = w.called(n)
        if module.padding_mode != "zeros":
            raise ExportError(f"{n.name} ({type(module).__name__}): padding_mode {module.padding_mode!r}")
        stride, padding, dilation, groups = module.stride, module.padding, module.dilation, module.groups
    else:
        stride, padding, dilation, groups = (
            w.argument(n, i, k, d)
            for i, k, d in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1), (6, "groups", 1))
        )
    tensor, held = w.weight(n)
    kernel, dilation = tuple(tensor.shape[2:]), _many(dilation, spatial)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        pads = list(_many(0 if padding == "valid" else padding, spatial)) * 2
    geometry = {
        "kernel_shape": kernel,
        "strides": _many(stride, spatial),
        "pads": pads,
        "dilations": dilation,
        "group": groups,
    }
    bias = w.bias(n)
    if n.name in w.integer:
        assert held is not None
        data, source, (_, zero) = w.packed(n, "data_in", _first(w, n))
        stored = w.constant(f"{n.name}.weight", held.pack(tensor))
        zeros = w.constant(
            f"{n.name}.weight.zero", held.zero.reshape(-1)[:1].reshape(()).astype(held.pack(tensor).dtype)
        )
        sums = w.add("ConvInteger", [data, stored, zero, zeros], f"{n.name}.integer", **geometry)
        shape = (1, -1, *[1] * spatial)
        scale = source.scale * held.scale
        scale = scale if held.axis is None else scale.reshape(shape)
        return w.scaled(n, sums, scale, None if bias is None else bias.reshape(shape))
    inputs = [w.rounded(n, "data_in", _first(w, n)), w.weights(n, turned=False)]
    if bias is not None:
        inputs.append(w.constant(f"{n.name}.bias", bias))
    return w.add("Conv", inputs, n.name, **geometry)


def _relu(w: _Writer, n: fx.Node) -> str:
    if n.name not in w.integer:
        return w.add("Relu", [w.rounded(n, "data_in", _first(w, n))], n.name)
    data, held, constants = w.packed(n, "data_in", _first(w, n), signed=True)
    # Unsigned bytes whose zero is 0 are what a ReLU leaves.
    cut = w.add("Relu", [data], f"{n.name}.integer") if held.signed else data
    return w.add("DequantizeLinear", [cut, *constants], n.name)


def _matmul(w: _Writer, n: fx.Node) -> str:
    first, second = (w.tensor(n, i, k) for i, k in ((0, "input"), (1, "other")))
    if n.name in w.integer:
        site = w.sites[n.name]
        a, left, (_, zero_a) = w.packed(n, "data_in", first)
        if site.weight:
            tensor, held = w.weight(n)
            assert held is not None
            b, right = w.constant(f"{n.name}.weight", held.pack(tensor)), held
            zero_b = w._scale(f"{n.name}.weight", held)[1]
        else:
            b, right, (_, zero_b) = w.packed(n, "weight", second)
        sums = w.add("MatMulInteger", [a, b, zero_a, zero_b], f"{n.name}.integer")
        return w.scaled(n, sums, left.scale * right.scale, None)
    second = w.weights(n, turned=False) if w.sites[n.name].weight else w.rounded(n, "weight", second)
    return w.add("MatMul", [w.rounded(n, "data_in", first), second], n.name)


def _arithmetic(op: str) -> Write:
    def write(w: _Writer, n: fx.Node) -> str:
        if w.argument(n, 2, "alpha", 1) != 1:
            raise ExportError(f"{n.name} ({op}): alpha other than 1")
        names = [w.tensor(n, 0, "input"), w.tensor(n, 1, "other")]
        if n.name in w.sites:
            # The second input of an addition has the format of the first.
            names = [w.rounded(n, "data_in", name) for name in names]
            assert len(operand_nodes(n, w.sites[n.name].operation)) == 2
        return w.add(op, names, n.name)

    return write


# --- everything else -------------------------------------------------------------------------------------------------


def _unary(op: str, **attributes: Any) -> Write:
    return lambda w, n: w.add(op, [_first(w, n)], n.name, **attributes)


def _clip(low: float, high: float) -> Write:
    def write(w: _Writer, n: fx.Node) -> str:
        bounds = [w.constant(f"{n.name}.{k}", np.array(v, np.float32)) for k, v in (("low", low), ("high", high))]
        return w.add("Clip", [_first(w, n), *bounds], n.name)

    return write


def _setting(w: _Writer, n: fx.Node, position: int, name: str, default: Any) -> Any:
    """A setting of a module, or the same as an argument of the function."""
    return getattr(w.called(n), name) if n.op == "call_module" else w.argument(n, position, name, default)


def _gelu(w: _Writer, n: fx.Node) -> str:
    return w.add("Gelu", [_first(w, n)], n.name, approximate=_setting(w, n, 1, "approximate", "none"))


def _leaky(w: _Writer, n: fx.Node) -> str:
    return w.add("LeakyRelu", [_first(w, n)], n.name, alpha=float(_setting(w, n, 1, "negative_slope", 0.01)))


def _silu(w: _Writer, n: fx.Node) -> str:
    x = _first(w, n)
    return w.add("Mul", [x, w.add("Sigmoid", [x], f"{n.name}.gate")], n.name)


def _softmax(op: str) -> Write:
    def write(w: _Writer, n: fx.Node) -> str:
        dim = _setting(w, n, 1, "dim", None)
        if dim is None:
            raise ExportError(f"{n.name} ({op}): without a dim")
        return w.add(op, [_first(w, n)], n.name, axis=int(dim) % w.out.dim())

    return write


def _batch_norm(w: _Writer, n: fx.Node) -> str:
    module = w.called(n)
    if module.running_mean is None:
        raise ExportError(f"{n.name} ({type(module).__name__}): without running statistics")
    ones = torch.ones_like(module.running_mean)
    weight, bias = (ones, ones * 0) if module.weight is None else (module.weight, module.bias)
    tensors = {"weight": weight, "bias": bias, "mean": module.running_mean, "var": module.running_var}
    names = [w.constant(f"{n.name}.{k}", v.detach().numpy()) for k, v in tensors.items()]
    return w.add("BatchNormalization", [_first(w, n), *names], n.name, epsilon=module.eps)


def _layer_norm(w: _Writer, n: fx.Node) -> str:
    module = w.called(n)
    shape = tuple(module.normalized_shape)
    weight = torch.ones(shape) if module.weight is None else module.weight
    inputs = [_first(w, n), w.constant(f"{n.name}.weight", weight.detach().numpy())]
    if module.bias is not None:
        inputs.append(w.constant(f"{n.name}.bias", module.bias.detach().numpy()))
    return w.add("LayerNormalization", inputs, n.name, axis=-len(shape), epsilon=module.eps)


def _pool(op: str, dims: int) -> Write:
    def write(w: _Writer, n: fx.Node) -> str:
        kernel = _many(_setting(w, n, 1, "kernel_size", None), dims)
        stride = _setting(w, n, 2, "stride", None)
        stride = kernel if stride is None or stride == [] else _many(stride, dims)
        pads = list(_many(_setting(w, n, 3, "padding", 0), dims)) * 2
        common = {"kernel_shape": kernel, "strides": stride, "pads": pads}
        average = op == "AveragePool"
        if _setting(w, n, 4 if average else 5, "ceil_mode", False):
            raise ExportError(f"{n.name} ({op}): ceil_mode")
        if average:
            if dims == 2 and _setting(w, n, 6, "divisor_override", None) is not None:
                raise ExportError(f"{n.name} ({op}): divisor_override")
            padded = int(bool(_setting(w, n, 5, "count_include_pad", True)))
            return w.add(op, [_first(w, n)], n.name, count_include_pad=padded, **common)
        dilations = _many(_setting(w, n, 4, "dilation", 1), dims)
        return w.add(op, [_first(w, n)], n.name, dilations=dilations, **common)

    return write


def _adaptive_pool(dims: int) -> Write:
    def write(w: _Writer, n: fx.Node) -> str:
        (source,) = n.all_input_nodes
        before, after = tuple(w.env[source].shape[-dims:]), tuple(w.out.shape[-dims:])
        if any(b % a for b, a in zip(before, after, strict=True)):
            raise ExportError(f"{n.name}: an adaptive pool from {before} to {after} has windows of several sizes")
        window = [b // a for b, a in zip(before, after, strict=True)]
        return w.add("AveragePool", [_first(w, n)], n.name, kernel_shape=window, strides=window)

    return write


def _reshape(w: _Writer, n: fx.Node) -> str:
    source = n.all_input_nodes[0]
    before, after = tuple(w.env[source].shape), tuple(w.out.shape)
    if before[0] != _BATCH or math.prod(before) != math.prod(after) or after[0] % _BATCH:
        raise ExportError(f"{n.name}: reshapes {before} into {after}, which does not keep the batch in front")
    target = np.array([-1, *after[1:]], np.int64)
    return w.add("Reshape", [_first(w, n), w.constant(f"{n.name}.shape", target)], n.name)


def _permute(w: _Writer, n: fx.Node) -> str:
    order = list(range(w.out.dim()))
    if str(getattr(n.target, "__name__", n.target)) in ("transpose", "swapaxes"):
        a, b = int(w.argument(n, 1, "dim0")), int(w.argument(n, 2, "dim1"))
        order[a], order[b] = order[b], order[a]
    else:
        given = w.fetch_args_kwargs_from_env(n)[0][1:]
        given = given[0] if len(given) == 1 and not isinstance(given[0], int) else given
        order = [int(d) % w.out.dim() for d in given or w.argument(n, 1, "dims")]
    return w.add("Transpose", [_first(w, n)], n.name, perm=order)


def _concat(w: _Writer, n: fx.Node) -> str:
    given = n.args[0] if n.args else n.kwargs["tensors"]
    assert isinstance(given, list | tuple)
    names = [w.made(a) for a in given if isinstance(a, fx.Node)]
    return w.add("Concat", names, n.name, axis=int(w.argument(n, 1, "dim", 0)) % w.out.dim())


def _mean(w: _Writer, n: fx.Node) -> str:
    dims = w.argument(n, 1, "dim")
    if dims is None:
        raise ExportError(f"{n.name} (mean): over all dimensions, the batch included")
    axes = w.constant(f"{n.name}.axes", np.array([dims] if isinstance(dims, int) else list(dims), np.int64))
    return w.add("ReduceMean", [_first(w, n), axes], n.name, keepdims=int(bool(w.argument(n, 2, "keepdim", False))))


def _many(value: Any, dims: int) -> tuple[int, ...]:
    return (int(value),) * dims if isinstance(value, int) else tuple(int(v) for v in value)


_SITES: Mapping[str, Write] = {
    "linear": _linear,
    "conv1d": _conv,
    "conv2d": _conv,
    "relu": _relu,
    "matmul": _matmul,
    "bmm": _matmul,
    "add": _arithmetic("Add"),
    "sub": _arithmetic("Sub"),
    "mul": _arithmetic("Mul"),
}
_same = _unary("Identity")
_hard_sigmoid = _unary("HardSigmoid", alpha=1 / 6, beta=0.5)


def _hardtanh(w: _Writer, n: fx.Node) -> str:
    low, high = _setting(w, n, 1, "min_val", -1.0), _setting(w, n, 2, "max_val", 1.0)
    return _clip(float(low), float(high))(w, n)


_MODULES: Mapping[type[nn.Module], Write] = {
    nn.ReLU6: _clip(0, 6),
    nn.Hardtanh: _hardtanh,
    nn.LeakyReLU: _leaky,
    nn.Sigmoid: _unary("Sigmoid"),
    nn.Tanh: _unary("Tanh"),
    nn.GELU: _gelu,
    nn.SiLU: _silu,
    nn.Hardswish: _unary("HardSwish"),
    nn.Hardsigmoid: _hard_sigmoid,
    nn.Softmax: _softmax("Softmax"),
    nn.LogSoftmax: _softmax("LogSoftmax"),
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.MaxPool1d: _pool("MaxPool", 1),
    nn.MaxPool2d: _pool("MaxPool", 2),
    nn.AvgPool1d: _pool("AveragePool", 1),
    nn.AvgPool2d: _pool("AveragePool", 2),
    nn.AdaptiveAvgPool1d: _adaptive_pool(1),
    nn.AdaptiveAvgPool2d: _adaptive_pool(2),
    nn.Flatten: _reshape,
    nn.Unflatten: _reshape,
    nn.Dropout: _same,
    nn.Dropout1d: _same,
    nn.Dropout2d: _same,
    nn.Identity: _same,
}
_METHODS: Mapping[str, Write] = {
    "sigmoid": _unary("Sigmoid"),
    "tanh": _unary("Tanh"),
    "softmax": _softmax("Softmax"),
    "log_softmax": _softmax("LogSoftmax"),
    "add": _arithmetic("Add"),
    "sub": _arithmetic("Sub"),
    "mul": _arithmetic("Mul"),
    "flatten": _reshape,
    "view": _reshape,
    "reshape": _reshape,
    "squeeze": _reshape,
    "unsqueeze": _reshape,
    "contiguous": _same,
    "transpose": _permute,
    "permute": _permute,
    "mean": _mean,
}
_FUNCTIONS: Mapping[object, Write] = {
    operator.add: _arithmetic("Add"),
    torch.add: _arithmetic("Add"),
    operator.sub: _arithmetic("Sub"),
    torch.sub: _arithmetic("Sub"),
    operator.mul: _arithmetic("Mul"),
    torch.mul: _arithmetic("Mul"),
    F.relu6: _clip(0, 6),
    F.hardtanh: _hardtanh,
    F.leaky_relu: _leaky,
    torch.sigmoid: _unary("Sigmoid"),
    F.sigmoid: _unary("Sigmoid"),
    torch.tanh: _unary("Tanh"),
    F.tanh: _unary("Tanh"),
    F.gelu: _gelu,
    F.silu: _silu,
    F.hardswish: _unary("HardSwish"),
    F.hardsigmoid: _hard_sigmoid,
    F.softmax: _softmax("Softmax"),
    torch.softmax: _softmax("Softmax"),
    F.log_softmax: _softmax("LogSoftmax"),
    F.max_pool1d: _pool("MaxPool", 1),
    F.max_pool2d: _pool("MaxPool", 2),
    F.avg_pool1d: _pool("AveragePool", 1),
    F.avg_pool2d: _pool("AveragePool", 2),
    F.adaptive_avg_pool1d: _adaptive_pool(1),
    F.adaptive_avg_pool2d: _adaptive_pool(2),
    F.dropout: _same,
    torch.flatten: _reshape,
    torch.reshape: _reshape,
    torch.squeeze: _reshape,
    torch.unsqueeze: _reshape,
    torch.transpose: _permute,
    torch.permute: _permute,
    torch.cat: _concat,
    torch.concat: _concat,
    torch.mean: _mean,
}
