"""The steps of a captured graph, and what depends on options alone, computed once per search.

This is the quantized weights, and whether the sums of products under some options are exact. A sum of products of
fixed-point numbers is a fixed-point number. If it needs no more than 24 bits, float32 holds it and every partial sum
exactly, so it is the same in any order of summation. Where that does not hold (floats, scales that are not powers of
two, sums beyond 2^24), ``Program.inexact`` says where and why.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from bitfront import kernels
from bitfront.engine.evaluation.calibration import Calibration
from bitfront.engine.evaluation.tree.activations import Ints, Norm, Rounding
from bitfront.engine.evaluation.tree.byte_convolution import ByteConvolution, byte_sized, exact_bytes
from bitfront.formats.base import Format, Operand
from bitfront.formats.grid import FixedPoint
from bitfront.graph import Graph, Site
from bitfront.graph.capture import owns_parameters
from bitfront.operations.lookup import hooks, of_node
from bitfront.spaces.model_space import FormatSpace
from bitfront.transforms.correct import is_norm
from bitfront.transforms.quantize import twin_of

#: The second input of arithmetic.
SECOND: Operand = "data_in_2"
#: Sums up to here are exact in float32.
EXACT = 2**24
#: Of the numbers that every unit computes with in full; some take smaller ones for 0.
SMALLEST_STEP = 2.0**-126

#: How a step is computed: merged, in the way of its operation (``operations.base.Merge``), or state by state ("call").
StepKind = Literal[
    "input",
    "constant",
    "dense",
    "convolution",
    "rectifier",
    "arithmetic",
    "identity",
    "flatten",
    "selection",
    "norm",
    "call",
]
#: Kinds that are computed as one product of all inputs and weights.
PRODUCTS = ("dense", "convolution")
#: Kinds that treat every value, or every window of every channel, separately. Their results do not depend on the number
#: of samples in a call.
PER_SAMPLE = ("identity", "flatten", "selection", "norm")


@dataclass(frozen=True, eq=False)
class Step:
    """One node of the graph.

    Attributes:
        inputs: numbers of the steps whose values it takes.
        group: the site's group in the space; None for a node that is not a site.
        shape: shape of its value per sample; empty for a node that is neither a site nor a module.
        operations: number of operations per sample.
        groups: number of groups of a convolution.
        corrected: whether it is a batch norm whose statistics depend on the option of the site before it.
        hooked: whether it is a site whose module has hooks. It is called as the deployed module, so that they run.
    """

    node: fx.Node
    kind: StepKind
    inputs: tuple[int, ...]
    site: Site | None = None
    group: int | None = None
    shape: tuple[int, ...] = ()
    operations: int = 0
    groups: int = 1
    corrected: bool = False
    hooked: bool = False


@dataclass(frozen=True, eq=False)
class Options:
    """The options of one site, each split into a data option and a parameter option.

    Attributes:
        data: the data option of each option, an index into `data_formats`, int64, shape (options,).
        data_formats: the distinct formats of the site's input; None for float.
        parameters: the parameter option of each option, an index into `parameter_formats`, int64, shape (options,).
        parameter_formats: the distinct formats of all other operands together.
    """

    data: Ints
    data_formats: tuple[Format | None, ...]
    parameters: Ints
    parameter_formats: tuple[Mapping[Operand, Format], ...]


class Program:
    """The steps of a captured graph, and what depends on options alone: quantized weights, exactness.

    Args:
        graph: a traced graph.
        space: the space of its sites' formats.
        calibration: calibrated formats and corrections; the options in use must have been learned.
        device: where to compute.
        unmerged: names of nodes that are computed state by state, even if their operation can be merged.
    """

    def __init__(
        self,
        graph: Graph,
        space: FormatSpace,
        calibration: Calibration,
        device: str = "cpu",
        unmerged: Collection[str] = (),
    ) -> None:
        assert graph.fx_graph is not None
        self.graph, self.device = graph, device
        self._calibration = calibration
        self.model = graph.model if device == "cpu" else _moved(graph.model, device)
        self.options = tuple(_split_options(o) for o in space.site_formats)
        self._parameters: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}
        self._merged: dict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor | None]] = {}
        self._exact: dict[tuple[int, int, int], str] = {}
        self._norms: dict[str, Norm] = {}
        self._twins: dict[tuple[int, int, int], nn.Module] = {}
        self._bytes: dict[tuple[int, int, tuple[int, ...], bool], ByteConvolution | None] = {}
        self._grids: dict[tuple[int, Operand], tuple[NDArray[np.float32], NDArray[np.bool_]]] = {}
        self._lock = threading.Lock()
        #: Site → why some of its products are not merged. Grows while candidates are evaluated.
        self.inexact: dict[str, str] = {}
        self.steps, self.output = _steps(graph, self.model, calibration, unmerged)
        self.last_use = [max((j for j, s in enumerate(self.steps) if i in s.inputs), default=i) for i in self._all]
        self.last_use[self.output] = len(self.steps)

    @property
    def _all(self) -> range:
        return range(len(self.steps))

    def data_format(self, step: Step, index: int) -> Format | None:
        """The format of the step's input under data option `index`; None for float."""
        assert step.group is not None
        assert step.site is not None
        wanted = self.options[step.group].data_formats[index]
        return None if wanted is None else self._calibration.format(step.site, "data_in", wanted)

    def parameter_formats(self, step: Step, index: int) -> Mapping[Operand, Format]:
        """The formats of the step's operands, without its input, under parameter option `index`."""
        assert step.group is not None
        assert step.site is not None
        return self._calibration.formats(step.site, self.options[step.group].parameter_formats[index])

    def unformatted(self, step: Step, data: Ints) -> bool:
        """Whether the step's input stays in float under all of some data options."""
        assert step.group is not None
        formats = self.options[step.group].data_formats
        return all(formats[d] is None for d in np.unique(data).tolist())

    def unformatted_second(self, step: Step, parameters: Ints) -> bool:
        """Whether the step's second input stays as it is under all of some parameter options."""
        assert step.group is not None
        formats = self.options[step.group].parameter_formats
        return not any(SECOND in formats[p] for p in np.unique(parameters).tolist())

    def rounding(self, step: Step) -> Rounding:
        """How the step's input is rounded; ``prepare`` must have been called for the data options in use."""
        assert step.group is not None
        return Rounding(*self._grids[step.group, "data_in"], lambda k: self.data_format(step, k))

    def second_rounding(self, step: Step) -> Rounding:
        """Of the formats of the step's second input that were prepared, by parameter option."""
        assert step.group is not None
        return Rounding(*self._grids[step.group, SECOND], lambda k: self.parameter_formats(step, k).get(SECOND))

    def norm(self, step: Step) -> Norm:
        """The step's batch norm."""
        key = str(step.node.target)
        if key not in self._norms:
            self._norms[key] = Norm.of(self.model.get_submodule(key))
        return self._norms[key]

    def bytes(self, step: Step, data: int, indices: tuple[int, ...], rectified: bool) -> ByteConvolution | None:
        """The step as a convolution of bytes under a data option and several parameter options, all exact.

        None if its operands do not fit bytes, or the device has no kernel for them.

        Args:
            rectified: whether a ReLU is applied to the input before it is rounded.
        """
        assert step.group is not None
        key = (step.group, data, indices, rectified)
        if key not in self._bytes:
            self._bytes[key] = self._byte_convolution(step, data, indices, rectified)
        return self._bytes[key]

    def _byte_convolution(
        self, step: Step, data: int, indices: tuple[int, ...], rectified: bool
    ) -> ByteConvolution | None:
        if step.node.op != "call_module" or not exact_bytes() or self.device != "cpu":
            return None
        module: Any = self.model.get_submodule(str(step.node.target))
        rounding = _rounding(self.data_format(step, data))
        if rounding is None or not byte_sized(module):
            return None
        low, high = max(rounding.low, 0) if rectified else rounding.low, rounding.high
        offset = 0 if low >= 0 else 128
        if low + offset < 0 or high + offset > 255:
            return None
        weights, steps = [], []
        for index in indices:
            weight = self.parameters(step, index)[0]
            w = _multiples(self.parameter_formats(step, index).get("weight"), weight)
            if w is None or w.low < -128 or w.high > 127:
                return None
            weights.append((weight / w.step).to(torch.int8))
            steps.append(torch.full((len(weight),), w.step))
        _, bias = self.merged(step, indices)
        numbers = np.array([1 / rounding.step, low, high, offset], dtype=np.float32)
        return ByteConvolution.of(module, torch.cat(weights), torch.cat(steps), bias, rounding.step, numbers)

    def prepare(self, step: Step, data: Ints, parameters: Ints) -> None:
        """Look up the grids of some formats of the step's inputs."""
        assert step.group is not None
        options = self.options[step.group]
        self._prepare(step.group, "data_in", data, len(options.data_formats), lambda k: self.data_format(step, k))
        if step.kind == "arithmetic":
            count = len(options.parameter_formats)
            self._prepare(step.group, SECOND, parameters, count, lambda k: self.parameter_formats(step, k).get(SECOND))

    def _prepare(
        self, group: int, operand: Operand, numbers: Ints, count: int, form: Callable[[int], Format | None]
    ) -> None:
        empty = np.zeros((count, 4), dtype=np.float32), np.zeros(count, dtype=bool)
        table, covered = self._grids.setdefault((group, operand), empty)
        for k in np.flatnonzero(np.bincount(numbers, minlength=count) * ~covered).tolist():
            rounding = _rounding(form(k))
            if rounding is not None and max(-rounding.low, rounding.high) < 2**kernels.WIDEST:
                table[k], covered[k] = rounding.row, True

    def parameters(self, step: Step, index: int) -> tuple[Tensor, Tensor | None]:
        """The step's quantized weight and bias under parameter option `index`."""
        assert step.group is not None
        assert step.site is not None
        key = (step.group, index)
        with self._lock:
            if key not in self._parameters:
                weight, bias = self._float_parameters(step)
                uncalibrated = self.options[step.group].parameter_formats[index]
                corrected = self._calibration.bias(step.site, uncalibrated.get("weight"))
                bias = bias if corrected is None else corrected.to(self.device)
                formats = self.parameter_formats(step, index)
                if "weight" in formats:
                    weight = formats["weight"].quantize(weight)
                if "bias" in formats and bias is not None:
                    bias = formats["bias"].quantize(bias)
                self._parameters[key] = (weight, bias)
            return self._parameters[key]

    def twin(self, step: Step, data: int, parameters: int) -> nn.Module:
        """The module of a site as it is deployed under these options."""
        assert step.group is not None
        assert step.site is not None
        key = (step.group, data, parameters)
        if key not in self._twins:
            formats = dict(self.parameter_formats(step, parameters))
            if (data_format := self.data_format(step, data)) is not None:
                formats["data_in"] = data_format
            wanted = self.options[step.group].parameter_formats[parameters].get("weight")
            bias = self._calibration.bias(step.site, wanted) if formats else None
            module = self.model.get_submodule(step.site.path)
            bias = None if bias is None else bias.to(self.device)
            self._twins[key] = twin_of(module, step.site, formats, bias) if formats else module
        return self._twins[key]

    def normalise(self, step: Step, before: Step, data: int, parameters: int, x: Tensor) -> Tensor:
        """The value of the step, a batch norm, for the output of the site before it.

        Args:
            before: the step of that site.
            data, parameters: the options of that site.
            x: its output, shape (samples, channels, ...).
        """
        assert before.group is not None
        assert before.site is not None
        options = self.options[before.group]
        formats = dict(options.parameter_formats[parameters])
        if (data_format := options.data_formats[data]) is not None:
            formats["data_in"] = data_format
        statistics = self._calibration.statistics(before.site, formats)
        path = str(step.node.target)
        module: Any = self.model.get_submodule(path)
        mean, variance = statistics.get(path, (module.running_mean, module.running_var))
        mean, variance = mean.to(self.device), variance.to(self.device)
        return F.batch_norm(x, mean, variance, module.weight, module.bias, False, 0.0, module.eps)

    def merged(self, step: Step, indices: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """Weights and biases of several parameter options, concatenated along the output channels. The bias of a
        linear step is the last column of its weight."""
        assert step.group is not None
        key = (step.group, indices)
        if key not in self._merged:
            pairs = [self.parameters(step, i) for i in indices]
            weight = torch.cat([w for w, _ in pairs])
            bias = torch.cat([b for _, b in pairs if b is not None]) if pairs[0][1] is not None else None
            if step.kind == "convolution" and weight.dim() == 4:
                weight = weight.contiguous(memory_format=torch.channels_last)
            if step.kind == "dense" and bias is not None:
                weight, bias = torch.cat([weight, bias[:, None]], dim=1), None
            self._merged[key] = (weight, bias)
        return self._merged[key]

    def _float_parameters(self, step: Step) -> tuple[Tensor, Tensor | None]:
        site = step.site
        assert site is not None
        assert site.weight is not None
        named = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())
        return named[site.weight].detach(), named[site.bias].detach() if site.bias else None

    def exact(self, step: Step, data: int, parameters: int) -> bool:
        """Whether the step's sums of products are exact in float32 under these options, in any order."""
        assert step.group is not None
        assert step.site is not None
        key = (step.group, data, parameters)
        if key not in self._exact:
            self._exact[key] = self._why_inexact(step, data, parameters)
            if self._exact[key]:
                self.inexact.setdefault(step.site.title, self._exact[key])
        return not self._exact[key]

    def _not_negative(self, step: Step) -> bool:
        """Whether the input of a step comes from a ReLU, at most moved or selected since."""
        before = self.steps[step.inputs[0]]
        while before.kind in ("identity", "flatten", "selection"):
            before = self.steps[before.inputs[0]]
        return before.kind == "rectifier"

    def _why_inexact(self, step: Step, data: int, parameters: int) -> str:
        assert step.group is not None
        assert step.site is not None
        weight, bias = self.parameters(step, parameters)
        x = self.data_format(step, data)
        formats = self.parameter_formats(step, parameters)
        w, b = formats.get("weight"), formats.get("bias")
        if x is None or w is None or (bias is not None and b is None):
            return "an operand is left in float"
        x_grid, w_grid = None if x.grid is None else x.grid.fixed_point, _multiples(w, weight)
        b_grid = None if bias is None else _multiples(b, bias)
        if x_grid is None or w_grid is None or (bias is not None and b_grid is None):
            return "a format whose step is not a power of two, or differs between values"
        step_size = min([x_grid.step * w_grid.step] + ([] if b_grid is None else [b_grid.step]))
        low, high = -x_grid.low, x_grid.high
        if self._not_negative(step):
            low = 0
        rows = weight.double().flatten(1)
        up, down = rows.clamp(min=0).sum(dim=1), -rows.clamp(max=0).sum(dim=1)
        # The largest absolute value of any part of a sum: every term at the end of its range that adds to it.
        sums = torch.maximum(up * high + down * low, up * low + down * high) * x_grid.step
        if bias is not None:
            sums = sums + bias.double().abs()
        if not step_size >= SMALLEST_STEP:
            return "steps whose product is smaller than the numbers of float32"
        largest = float(sums.max()) / step_size
        if not largest <= EXACT:
            return f"sums of up to {np.log2(largest):.1f} bits, more than the 24 that float32 holds"
        return ""


def _rounding(form: Format | None) -> FixedPoint | None:
    """The fixed-point numbers to which a format rounds; None for any other rounding."""
    return None if form is None or form.grid is None else form.grid.rounding


def _multiples(form: Format | None, x: Tensor) -> FixedPoint | None:
    """Fixed-point numbers that contain all values of `x`; None if there are none.

    Args:
        form: the format that rounded `x`.
    """
    grid = None if form is None else form.grid_of(x)
    return None if grid is None else grid.fixed_point


def _moved(model: nn.Module, device: str) -> nn.Module:
    return copy.deepcopy(model).to(device)


def _split_options(options: Sequence[Mapping[Operand, Format]]) -> Options:
    data: dict[Format | None, int] = {}
    parameters: dict[tuple[tuple[Operand, Format], ...], int] = {}
    data_of = [data.setdefault(o.get("data_in"), len(data)) for o in options]
    others = [tuple(sorted((k, f) for k, f in o.items() if k != "data_in")) for o in options]
    parameters_of = [parameters.setdefault(formats, len(parameters)) for formats in others]
    return Options(np.array(data_of), tuple(data), np.array(parameters_of), tuple(map(dict, parameters)))


def _steps(
    graph: Graph, model: nn.Module, calibration: Calibration, unmerged: Collection[str]
) -> tuple[tuple[Step, ...], int]:
    """(the steps that the output depends on, in order; the number of the output's step)."""
    assert graph.fx_graph is not None
    nodes = {n.name: n for n in graph.nodes}
    groups = {s.name: g for g, s in enumerate(graph.sites)}
    corrected = {path for site in graph.sites for path in calibration.norms(site)}
    (result,) = [n for n in graph.fx_graph.nodes if n.op == "output"]
    needed: set[fx.Node] = set()
    todo = list(result.all_input_nodes)
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += node.all_input_nodes
    index: dict[fx.Node, int] = {}
    steps: list[Step] = []
    for node in graph.fx_graph.nodes:
        if node not in needed:
            continue
        info = nodes.get(node.name)
        site = info if isinstance(info, Site) else None
        steps.append(
            Step(
                node,
                "call" if node.name in unmerged else _kind(node, site, model),
                tuple(index[n] for n in node.all_input_nodes),
                site,
                groups.get(node.name),
                info.output if info else graph.sample_shape if node.op == "placeholder" else (),
                (info.operations or 0) if info else 0,
                _groups(node, site, model),
                node.op == "call_module" and str(node.target) in corrected,
                site is not None and bool(site.path) and bool(hooks(model.get_submodule(site.path))),
            )
        )
        index[node] = len(steps) - 1
    return tuple(steps), index[result.args[0]]


def _groups(node: fx.Node, site: Site | None, model: nn.Module) -> int:
    if site is None or site.operation.merge is None or site.operation.merge.kind != "convolution":
        return 1
    module: Any = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    given: Any = node.kwargs.get("groups", node.args[6] if len(node.args) > 6 else 1)
    return int(module.groups if module is not None else given)


def _kind(node: fx.Node, site: Site | None, model: nn.Module) -> StepKind:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return "constant"
    operation = of_node(node, model)
    merge = operation.merge if operation is not None else None
    if merge is None:
        return "call"
    if merge.kind in PRODUCTS:
        return merge.kind if site is not None and owns_parameters(site, node) else "call"
    if merge.kind == "rectifier":
        return merge.kind if site is not None else "call"
    if merge.kind == "arithmetic":
        return merge.kind if site is not None and len(node.args) == 2 and not node.kwargs else "call"
    if node.op != "call_module":
        return "call"
    module: Any = model.get_submodule(str(node.target))
    if merge.kind == "flatten" and module.start_dim != 1:
        return "call"
    return "call" if merge.kind == "norm" and not is_norm(module) else merge.kind
