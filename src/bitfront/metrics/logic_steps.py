"""A captured model as steps of fixed-point logic: what can be laid out, and which values each step reads.

Everything is there once per value, as in a circuit that takes a new sample with every clock. A step that moves values
costs nothing, so it is only noted where each value comes from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from bitfront.errors import ExportError
from bitfront.formats.base import Format, Operand
from bitfront.graph import Graph, Site
from bitfront.operations.base import Shape
from bitfront.operations.lookup import of_node, unusual
from bitfront.spaces.model_space import FormatSpace

Indices = NDArray[np.int64]
#: What a format that learns is calibrated on before a search, to see what its grid is like.
_STAND_IN = torch.linspace(-0.9, 0.7, 64).reshape(8, 8)
#: What can be laid out, for messages.
MODELLED = (
    "Linear, Conv1d, Conv2d, ReLU, MaxPool1d, MaxPool2d, means over windows of a power of two of values, sums and "
    "differences of two branches, dropout, and what only moves values"
)
#: Operation → signs of what it adds.
_SIGNS = {"add": (1, 1), "sub": (1, -1)}


@dataclass(frozen=True, eq=False)
class Step:
    """One node of the graph as logic.

    Attributes:
        name: of the node.
        kind: of the logic; a step that moves values has none.
        sources: numbers of the steps whose results it reads.
        group: of its site in the space; None where it is none.
        shape: of its result, per sample.
        index: which values it reads, by their places in the flattened source; −1: a zero of padding. ``moves``: of the
            shape of the result. ``pools``, ``means``: (results, values of a window). ``sums``: (groups of channels,
            places, inputs of a sum). Of no size where each result reads the value at its own place.
        channels_last: of ``sums``, whether the outputs of a sum are the last dimension of the result.
        signs: of ``adds``, 1 or −1 for each source.
    """

    name: str
    kind: Literal["enters", "moves", "rectifies", "pools", "means", "sums", "adds"]
    sources: tuple[int, ...]
    group: int | None
    shape: Shape
    index: Indices
    channels_last: bool = False
    signs: tuple[int, ...] = ()

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Which operand of its site each source is."""
        return ("data_in", "data_in_2")[: len(self.sources)]


def steps_of(space: FormatSpace) -> tuple[Step, ...]:
    """The steps of the model of a space, in order; the last one gives the outputs.

    Raises:
        ExportError: a node cannot be laid out; the message names it.
    """
    graph = space.graph
    if graph.fx_graph is None:
        raise ExportError(f"the model cannot be traced: {graph.untraced}")
    reader = _Reader(graph, {site.name: g for g, site in enumerate(space.sites)})
    with torch.no_grad():
        reader.run(torch.zeros(1, *graph.sample_shape))
    return tuple(reader.steps)


def obstacle(space: FormatSpace) -> str:
    """Why the candidates of a space cannot be laid out as logic; empty if they can."""
    try:
        steps = steps_of(space)
    except ExportError as error:
        return str(error)
    return _in_formats(space) or _in_float(space, steps)


def _in_formats(space: FormatSpace) -> str:
    for site, options in zip(space.sites, space.site_formats, strict=True):
        for formats in options:
            why = _obstacle(site, formats)
            if why:
                return f"{site.title}: {why}"
    return ""


def _in_float(space: FormatSpace, steps: Sequence[Step]) -> str:
    """Which step computes with values that no format has rounded before; empty if none does."""
    rounded: list[bool] = []
    for step in steps:
        options = () if step.group is None else space.site_formats[step.group]
        inputs = [
            rounded[source] or (bool(options) and all(operand in formats for formats in options))
            for source, operand in zip(step.sources, step.operands, strict=True)
        ]
        rounded.append(step.kind != "enters" and all(inputs))
        if step.kind in ("pools", "means", "adds") and not rounded[-1]:
            which = "its input" if len(inputs) == 1 else f"its {'second' if inputs[0] else 'first'} input"
            return f"{step.name}: {which} stays in float; give it, or what is before it, a format"
    return ""


def _obstacle(site: Site, formats: Mapping[Operand, Format]) -> str:
    needed = [spec.name for spec in site.specs if spec.role != "activation" or site.macs]
    for operand in needed:
        if operand not in formats and (site.parameter(operand) is not None or operand == "data_in"):
            return (
                f"{operand} stays in float in an option, and logic has no floats; give it formats only, without 'NA' "
                f"({operand}_width = [...])"
            )
    for operand, form in formats.items():
        if not _is_fixed_point(form, rounds=site.parameter(operand) is None):
            return (
                f"{operand} is {form.label}, whose values are no multiples of a power of two; take the format integer, "
                "or learned bits"
            )
    return ""


def _is_fixed_point(form: Format, rounds: bool) -> bool:
    """Whether a format's values are fixed point, and, if asked, its rounding is that of fixed point."""
    calibrated = form.calibrated(_STAND_IN) if form.calibrates else form
    grid = calibrated.grid
    if grid is None or grid.zero is not None or (rounds and not grid.complete):
        return False
    steps = grid.step.numpy() if isinstance(grid.step, Tensor) else np.array(grid.step)
    return bool((np.frexp(steps)[0] == 0.5).all())


class _Reader(fx.Interpreter):
    """Runs the graph on one sample, and notes its steps."""

    def __init__(self, graph: Graph, groups: Mapping[str, int]) -> None:
        assert graph.fx_graph is not None
        super().__init__(fx.GraphModule(graph.model, graph.fx_graph))
        self.extra_traceback = False
        self.graph_of, self.groups = graph, groups
        self.steps: list[Step] = []
        self.numbers: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "output":
            last = n.args[0]
            if not isinstance(last, fx.Node) or self.numbers.get(last) != len(self.steps) - 1:
                self.steps.append(self._moved(n, n, value))
        elif isinstance(value, Tensor):
            self.steps.append(self._step(n, value))
            self.numbers[n] = len(self.steps) - 1
        return value

    def _step(self, n: fx.Node, value: Tensor) -> Step:
        if n.op == "placeholder":
            return Step(n.name, "enters", (), None, tuple(value.shape[1:]), np.zeros(0, dtype=np.int64))
        module = self.graph_of.model.get_submodule(str(n.target)) if n.op == "call_module" else None
        operation = of_node(n, self.graph_of.model)
        name = "" if operation is None else operation.name
        if operation is not None and (operation.view or name in ("dropout", "contiguous")):
            return self._moved(n, n, value)
        if name in _SIGNS:
            return self._added(n, value, _SIGNS[name])
        sources = [m for m in n.all_input_nodes if m in self.numbers]
        if len(sources) == 1 and (module is None or not unusual(module)):
            shape, source = tuple(value.shape[1:]), self.env[sources[0]]
            found = self._computed(name, module, source)
            if found is not None:
                kind, index = found
                number = self.numbers[sources[0]]
                return Step(n.name, kind, (number,), self.groups.get(n.name), shape, index, name == "linear")
        title = type(module).__name__ if module is not None else str(getattr(n.target, "__name__", n.target))
        raise ExportError(f"{n.name} ({title}) cannot be laid out as logic; possible are {MODELLED}")

    def _added(self, n: fx.Node, value: Tensor, signs: tuple[int, int]) -> Step:
        """A sum or difference of two tensors of one shape."""
        terms = [*n.args[:2], *([n.kwargs["other"]] if "other" in n.kwargs else [])]
        sources = [term for term in terms if isinstance(term, fx.Node) and term in self.numbers]
        alike = len(sources) == 2 and all(self.env[term].shape == value.shape for term in sources)
        if not alike or len(n.args) > 2 or n.kwargs.get("alpha", 1) != 1:
            raise ExportError(
                f"{n.name}: of sums and differences, those of two tensors of one shape can be laid out, without alpha"
            )
        first, second = (self.numbers[term] for term in sources)
        nowhere, shape = np.zeros(0, dtype=np.int64), tuple(value.shape[1:])
        return Step(n.name, "adds", (first, second), self.groups.get(n.name), shape, nowhere, signs=signs)

    def _computed(self, name: str, module: nn.Module | None, source: Tensor) -> Any:
        """(kind, index) of a node with one source; None where there is no such logic."""
        if name == "relu":
            return "rectifies", np.zeros(0, dtype=np.int64)
        if isinstance(module, nn.Linear):
            return "sums", _places(source).numpy().reshape(1, -1, source.shape[-1])
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            padding = module.padding
            if module.padding_mode != "zeros" or padding == "same":
                return None
            sizes = (0,) * len(module.kernel_size) if isinstance(padding, str) else padding
            columns = _windows(source, module.kernel_size, module.stride, sizes, module.dilation)
            return "sums", columns.reshape(module.groups, -1, columns.shape[-1]).transpose(0, 2, 1)
        if isinstance(module, nn.MaxPool1d | nn.MaxPool2d) and not module.ceil_mode and not module.return_indices:
            return "pools", _pooled(source, module.kernel_size, module.stride, module.padding, module.dilation)
        window, stride = _window_of_mean(module, source)
        if window and math.prod(window).bit_count() == 1:
            return "means", _pooled(source, window, stride, 0, 1)
        return None

    def _moved(self, n: fx.Node, title: fx.Node, value: Any) -> Step:
        """A step that moves values: the node is run on their places."""
        sources = [m for m in n.all_input_nodes if m in self.numbers]
        if len(sources) != 1 or not isinstance(value, Tensor) or value.shape[0] != 1:
            raise ExportError(f"{title.name} ({title.target}) cannot be laid out as logic; possible are {MODELLED}")
        kept = self.env[sources[0]]
        if n.op == "output":
            index = _places(kept)
        else:
            self.env[sources[0]] = _places(kept).double()
            index = super().run_node(n)
            self.env[sources[0]] = kept
        shape = tuple(value.shape[1:])
        return Step(
            n.name,
            "moves",
            (self.numbers[sources[0]],),
            self.groups.get(n.name),
            shape,
            index.long().numpy().reshape(shape),
        )


def _places(source: Tensor) -> Tensor:
    """The place of each value of one sample, int64, of the shape of the tensor."""
    return torch.arange(source.numel()).reshape(source.shape)


def _pooled(source: Tensor, *sizes: Any) -> Indices:
    """The places under each window of each channel, shape (channels · windows, values of a window); −1: padding.

    Args:
        sizes: kernel, stride, padding and dilation; each one number, or one per dimension.
    """
    dims = source.dim() - 2
    window, stride, padding, dilation = ((s,) * dims if isinstance(s, int) else tuple(s) for s in sizes)
    columns = _windows(source, window, stride, padding, dilation)
    per_channel = columns.reshape(source.shape[1], -1, columns.shape[-1]).transpose(0, 2, 1)
    return per_channel.reshape(-1, per_channel.shape[-1])


def _window_of_mean(module: nn.Module | None, source: Tensor) -> tuple[Shape, Shape]:
    """(window, stride) of an average pooling whose windows are of one size and have no padding; else both empty."""
    dims, sizes = source.dim() - 2, tuple(source.shape[2:])
    if isinstance(module, nn.AvgPool1d | nn.AvgPool2d):
        kernel, stride, padding = (
            (s,) * dims if isinstance(s, int) else tuple(s) for s in (module.kernel_size, module.stride, module.padding)
        )
        usual = not module.ceil_mode and getattr(module, "divisor_override", None) is None
        return (kernel, stride) if usual and not any(padding) else ((), ())
    if isinstance(module, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d):
        given: Any = module.output_size
        wanted = (given,) * dims if isinstance(given, int) else tuple(given)
        wanted = tuple(size if w is None else w for w, size in zip(wanted, sizes, strict=True))
        if not any(size % w for size, w in zip(sizes, wanted, strict=True)):
            window = tuple(size // w for size, w in zip(sizes, wanted, strict=True))
            return window, window
    return (), ()


def _windows(
    source: Tensor, window: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Indices:
    """The places under each window, shape (channels · window, windows), channels first; −1: padding."""
    marks = _places(source).double() + 1
    flat = marks.unsqueeze(2) if len(window) == 1 else marks
    settings = _filled(window, stride, padding, dilation)
    size, steps, pads, apart = [(fill, *given) if len(window) == 1 else tuple(given) for given, fill in settings]
    columns = F.unfold(flat, size, dilation=apart, padding=pads, stride=steps)[0]
    return columns.long().numpy() - 1


def _filled(*settings: Sequence[int]) -> Iterator[tuple[Sequence[int], int]]:
    """Settings of a window, each with what it is along a dimension of size 1."""
    return zip(settings, (1, 1, 0, 1), strict=True)
