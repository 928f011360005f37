"""The steps of a captured graph, and what depends on options alone, computed once per search.

This is how inputs are rounded, and the quantized weights; ``products.py`` says how their products are computed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from bitfront import kernels
from bitfront.engine.evaluation.calibration import Calibration
from bitfront.engine.evaluation.keeping import KeptWeights
from bitfront.engine.evaluation.tree.activations import Ints, Norm
from bitfront.engine.evaluation.tree.rounding import DIVISOR, STEP, Rounding
from bitfront.formats.base import Format, Operand
from bitfront.graph import Graph, Site
from bitfront.graph.capture import owns_parameters, parameter
from bitfront.operations.base import DATA_OUT, MergeKind
from bitfront.operations.lookup import hooks, of_node
from bitfront.spaces.model_space import FormatSpace
from bitfront.transforms.correct import is_norm
from bitfront.transforms.direct import Kept
from bitfront.transforms.quantize import twin_of

#: The second input of arithmetic.
SECOND: Operand = "data_in_2"

#: How a step is computed: merged, in the way of its operation (``operations.base.Merge``), or state by state ("call").
StepKind = Literal["input", "constant", "call"] | MergeKind
#: Kinds that are computed as one product of all inputs and weights.
PRODUCTS = ("dense", "convolution")
#: Kinds that treat every value, or every window of every channel, separately. Their results do not depend on the number
#: of samples in a call.
PER_SAMPLE = ("identity", "flatten", "selection", "norm", "elementwise")


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
        ceiling: what a rectifier cuts off above; infinite where it does not.
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
    ceiling: float = math.inf


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
        weights: where quantized weights are kept; None: in a place of this program alone.
    """

    def __init__(
        self,
        graph: Graph,
        space: FormatSpace,
        calibration: Calibration,
        device: str = "cpu",
        unmerged: Collection[str] = (),
        weights: KeptWeights | None = None,
    ) -> None:
        assert graph.fx_graph is not None
        self.graph, self.device = graph, device
        self._calibration = calibration
        self.model = graph.model if device == "cpu" else _moved(graph.model, device)
        self.options = tuple(_split_options(o) for o in space.site_formats)
        held = (*self.model.parameters(), *self.model.buffers())
        #: What is computed of weights, and may be forgotten.
        self.shelf = (weights or KeptWeights()).shelf(self, held)
        self._norms: dict[str, Norm] = {}
        self._channels: dict[int, int] = {}
        self._grids: dict[tuple[int, Operand], tuple[NDArray[np.float32], NDArray[np.bool_]]] = {}
        #: Site → why some of its sums are not of whole numbers. Grows while candidates are evaluated.
        self.inexact: dict[str, str] = {}
        # A result in a format is rounded by the call of the deployed model.
        named = {s.name for s, options in zip(graph.sites, space.site_formats, strict=True) if _names_result(options)}
        self.steps, self.output = _steps(graph, self.model, calibration, named.union(unmerged))
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

    def formats(self, step: Step, data: int, parameters: int) -> dict[Operand, Format]:
        """The formats of all of the step's operands under a data option and a parameter option."""
        formats = dict(self.parameter_formats(step, parameters))
        data_format = self.data_format(step, data)
        return formats if data_format is None else formats | {"data_in": data_format}

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

    def rounding(self, step: Step, *, coded: bool = False) -> Rounding:
        """How the step's input is rounded; ``prepare`` must have been called for the data options in use.

        Args:
            coded: to what products multiply with (``Whole.numbers``), and not to values.
        """
        assert step.group is not None
        grids, covered = self._grids[step.group, "data_in"]
        if coded:
            grids = grids.copy()
            grids[:, STEP] = np.where(grids[:, DIVISOR] != 0, 1.0, grids[:, STEP])
        return Rounding(grids, covered, lambda k: self.data_format(step, k))

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
        empty = np.zeros((count, kernels.NUMBERS), dtype=np.float32), np.zeros(count, dtype=bool)
        table, covered = self._grids.setdefault((group, operand), empty)
        for k in np.flatnonzero(np.bincount(numbers, minlength=count) * ~covered).tolist():
            row = rounding_row(form(k))
            if row is not None:
                table[k], covered[k] = row, True

    def parameters(self, step: Step, index: int) -> tuple[Tensor, Tensor | None]:
        """The step's quantized weight and bias under parameter option `index`."""
        return self.shelf.get(("rounded", step.group, index), lambda: self._rounded(step, index))

    def _rounded(self, step: Step, index: int) -> tuple[Tensor, Tensor | None]:
        weight, bias = self._float_parameters(step)
        replaced = self.replaced(step, index)
        weight, bias = replaced.get("weight", weight), replaced.get("bias", bias)
        formats = self.parameter_formats(step, index)
        if "weight" in formats:
            weight = formats["weight"].quantize(weight)
        if "bias" in formats and bias is not None:
            bias = formats["bias"].quantize(bias)
        return weight, bias

    def channels(self, step: Step) -> int:
        """The length of the step's weight: its output channels."""
        assert step.group is not None
        if step.group not in self._channels:
            self._channels[step.group] = len(self._float_parameters(step)[0])
        return self._channels[step.group]

    def replaced(self, step: Step, index: int) -> dict[Operand, Tensor]:
        """Operand → what takes the place of its parameter under parameter option `index`: what corrections changed."""
        assert step.group is not None
        assert step.site is not None
        formats = self._with_inputs(step.group, index)[0]
        replaced = self._calibration.replaced(step.site, formats)
        return {operand: value.to(self.device) for operand, value in replaced.items()}

    def _with_inputs(self, group: int, index: int) -> list[dict[Operand, Format]]:
        """Parameter option `index` with each of the formats that the input has beside it."""
        options = self.options[group]
        inputs = [options.data_formats[d] for d in np.unique(options.data[options.parameters == index]).tolist()]
        formats = dict(options.parameter_formats[index])
        return [formats | ({} if data is None else {"data_in": data}) for data in inputs]

    @property
    def undecided(self) -> str:
        """The first site where a parameter depends on the format of the input too, and that varies; "" for none."""
        for site, group in ((s.site, s.group) for s in self.steps if s.site is not None and s.group is not None):
            for index in range(len(self.options[group].parameter_formats)):
                found = self._with_inputs(group, index)
                if len(found) > 1 and any(self._calibration.rounds_bias(site, formats) for formats in found):
                    return site.title
        return ""

    def kept(self, step: Step, index: int) -> Kept:
        """What calls with parameter option `index` compute once: rounded parameters, how products are computed."""
        return self.shelf.get(("kept", step.group, index), Kept)

    def twin(self, step: Step, data: int, parameters: int) -> nn.Module:
        """The module of a site as it is deployed under these options."""
        return self.shelf.get(("twin", step.group, data, parameters), lambda: self._twin(step, data, parameters))

    def _twin(self, step: Step, data: int, parameters: int) -> nn.Module:
        assert step.site is not None
        formats = self.formats(step, data, parameters)
        module = self.model.get_submodule(step.site.path)
        if not formats:
            return module
        twin: Any = twin_of(module, step.site, formats, self.replaced(step, parameters))
        twin.kept = self.kept(step, parameters)
        return cast(nn.Module, twin)

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

    def _float_parameters(self, step: Step) -> tuple[Tensor, Tensor | None]:
        site = step.site
        assert site is not None
        assert site.weight is not None
        weight = parameter(self.model, site.weight)
        return weight, parameter(self.model, site.bias) if site.bias else None

    def not_negative(self, step: Step) -> bool:
        """Whether the input of a step comes from a ReLU, at most moved or selected since."""
        before = self.steps[step.inputs[0]]
        while before.kind in ("identity", "flatten", "selection"):
            before = self.steps[before.inputs[0]]
        return before.kind == "rectifier"


def rounding_row(form: Format | None) -> tuple[float, ...] | None:
    """The numbers with which the kernels round to a format (``Grid.rounding_row``); None if they cannot."""
    grid = None if form is None else form.grid
    row = None if grid is None else grid.rounding_row()
    return row if row is not None and max(-row[1], row[2]) < 2**kernels.WIDEST else None


def _names_result(options: Sequence[Mapping[Operand, Format]]) -> bool:
    return any(DATA_OUT in formats for formats in options)


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
                _ceiling(node, model),
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


def _ceiling(node: fx.Node, model: nn.Module) -> float:
    operation = of_node(node, model)
    merge = None if operation is None else operation.merge
    return math.inf if merge is None else merge.ceiling


def _kind(node: fx.Node, site: Site | None, model: nn.Module) -> StepKind:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return "constant"
    operation = of_node(node, model)
    merge = operation.merge if operation is not None else None
    if merge is None or (site is not None and merge.kind in PER_SAMPLE):
        return "call"  # what treats every value separately is merged in float only
    if merge.kind in PRODUCTS:
        return merge.kind if site is not None and owns_parameters(site, node) else "call"
    if merge.kind == "rectifier":
        inplace = node.op != "call_module" and node.kwargs.get("inplace", False)
        return "call" if inplace or len(node.all_input_nodes) != 1 else merge.kind
    if merge.kind == "arithmetic":
        return merge.kind if site is not None and len(node.args) == 2 and not node.kwargs else "call"
    if merge.kind == "elementwise":
        return "call" if len(node.all_input_nodes) != 1 or _changes_argument(node, model) else merge.kind
    if node.op != "call_module":
        return "call"
    module: Any = model.get_submodule(str(node.target))
    if merge.kind == "flatten" and module.start_dim != 1:
        return "call"
    return "call" if merge.kind == "norm" and not is_norm(module) else merge.kind


def _changes_argument(node: fx.Node, model: nn.Module) -> bool:
    """Whether an activation function may write its result into its argument."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    return name.endswith("_") or any(a is True for a in node.args) or bool(node.kwargs.get("inplace"))
