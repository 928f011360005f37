"""The costs of a model in closed form, module by module: operations, buffers, parameters, bits, and their totals.

Operations come from the records in ``bitfront.operations``. Bits come from a space of one candidate, so that the totals
equal the metrics of a search. All numbers are for one batch; nothing is trained or measured.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront import config as configuration
from bitfront.config import Config
from bitfront.engine.planning.inputs import load_weights, open_data, open_model, stand_in
from bitfront.engine.rebuild import candidate_of
from bitfront.errors import CaptureError, ConfigError
from bitfront.events import Events
from bitfront.formats.base import FLOAT_BITS, Format, Operand
from bitfront.graph import Graph, Node, Site, capture
from bitfront.graph.baking import private_copy
from bitfront.graph.base import WeightProducts
from bitfront.graph.capture import parameter
from bitfront.graph.costs import bit_operations, bops
from bitfront.graph.nodes import recorded_nodes
from bitfront.metrics.base import ParameterFigure
from bitfront.metrics.effective_bits import BitCount, site_ebops
from bitfront.metrics.stored import stored_forms
from bitfront.operations.base import DATA_OUT
from bitfront.operations.lookup import tensors_in
from bitfront.spaces.described import CandidateConfig
from bitfront.spaces.quantize import QuantizationSpace, single

#: Number of samples that a model is captured with. With a single one, a batch dimension looks like a constant.
SAMPLES = 2


@dataclass(frozen=True)
class Row:
    """One node of the model, in the order of execution.

    Attributes:
        name, path, type: as in ``Node``.
        inputs, output: shapes per sample, without the batch dimension.
        parameters: number of parameter values that it uses. A parameter used by several rows counts in each of them,
            and once in the total.
        operations: for the batch; a multiply-accumulate counts once. None if no rule counts this type.
        backward_operations: of the backward pass: each multiply-accumulate twice (gradients of input and weight), every
            other operation once.
        macs: the multiply-accumulates among the operations.
        input_buffer, output_buffer: number of elements of the batch that flow in and out.
        input_bytes: bytes of the elements that flow in, at the bits of the operands.
        output_bytes: bytes of the elements that flow out, at 32 bits each, the precision of results.
        data_in_bits, weight_bits, bias_bits: bits of the operands, of several weights the most; None if there is no
            such operand.
        parameter_bytes: bytes of the parameters in their formats.
        bitops: macs · weight bits · input bits + other operations · input bits.
        operation_bits: operations · input bits.
        bops, ebops: as defined by Baskin et al. and by HGQ (``graph/costs.py``), for the values of the weights; None if
            the row has products that they are not defined for.
    """

    name: str
    path: str
    type: str
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    parameters: int
    operations: int | None
    backward_operations: int | None
    macs: int
    input_buffer: int
    output_buffer: int
    input_bytes: int
    output_bytes: int
    data_in_bits: int
    weight_bits: int | None
    bias_bits: int | None
    parameter_bytes: int
    bitops: int | None
    operation_bits: int | None
    bops: float | None
    ebops: float | None


@dataclass(frozen=True)
class Total:
    """Sums over the rows; rows without a figure are left out.

    Attributes:
        operations, backward_operations, macs, bitops, operation_bits, bops, ebops: as in ``Row``.
        parameters, parameter_bytes: of the whole model: every parameter once, also those that no row uses.
        not_counted: ``name (type)`` of the rows whose operations no rule counts.
        without_bops: ``name (type)`` of the rows with products that are not in `bops` and `ebops`.
    """

    operations: int
    backward_operations: int
    macs: int
    parameters: int
    parameter_bytes: int
    bitops: int
    operation_bits: int
    bops: float
    ebops: float
    not_counted: tuple[str, ...]
    without_bops: tuple[str, ...]


@dataclass(frozen=True)
class Analysis:
    """The costs of a model for one batch.

    Attributes:
        batch: number of samples in the batch.
        rows: one per node, in the order of execution.
        total: sums over the rows.
        untraced: why torch.fx did not trace the model, so that its calls were recorded instead; empty if it did.
        unused: keys of the candidate that name nothing in this model.
    """

    batch: int
    rows: tuple[Row, ...]
    total: Total
    untraced: str = ""
    unused: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """``{"batch": ..., "modules": [...], "total": {...}, "untraced": ..., "unused": [...]}``, for JSON."""
        return {
            "batch": self.batch,
            "modules": [dataclasses.asdict(row) for row in self.rows],
            "total": dataclasses.asdict(self.total),
            "untraced": self.untraced,
            "unused": list(self.unused),
        }

    def to_csv(self) -> str:
        """CSV with a line of names and a line per row. Shapes are ``3x32x32``, separated by spaces; None is empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = [f.name for f in dataclasses.fields(Row)]
        writer.writerow(names)
        for row in self.rows:
            values = {**vars(row), "inputs": " ".join(map(_shape, row.inputs)), "output": _shape(row.output)}
            writer.writerow([values[name] for name in names])
        return text.getvalue()

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(column titles, rows of text); the last row is the total."""
        columns = ["name", "type", "input", "output", "parameters", "bits d/w/b", "operations", "backward"]
        columns += ["in bytes", "out bytes", "parameter bytes", "bitops", "bops", "ebops"]
        cells = []
        for row in self.rows:
            bits = [row.data_in_bits, row.weight_bits, row.bias_bits]
            numbers: list[float | None] = [row.operations, row.backward_operations, row.input_bytes, row.output_bytes]
            numbers += [row.parameter_bytes, row.bitops, row.bops, row.ebops]
            widths = "/".join("-" if b is None else str(b) for b in bits)
            shapes = (" ".join(map(_shape, row.inputs)), _shape(row.output))
            cells.append([row.name, row.type, *shapes, _number(row.parameters), widths, *map(_number, numbers)])
        t = self.total
        sums = [_number(t.operations), _number(t.backward_operations), "", "", _number(t.parameter_bytes)]
        sums += [_number(t.bitops), _number(t.bops), _number(t.ebops)]
        cells.append(["total", "", "", "", _number(t.parameters), "", *sums])
        return columns, cells

    def remarks(self) -> list[str]:
        """Remarks on the table, one line each."""
        lines = [f"batch of {self.batch:,}; {self.total.operation_bits:,} operation bits (operations · input bits)"]
        if self.untraced:
            lines.append(f"torch.fx did not trace this model, so its calls were recorded: {self.untraced}")
        if self.unused:
            lines.append("keys that name nothing in this model: " + ", ".join(map(repr, self.unused)))
        if self.total.not_counted:
            lines.append("operations not counted: " + ", ".join(self.total.not_counted))
        if self.total.without_bops:
            lines.append("products that are not in bops and ebops: " + ", ".join(self.total.without_bops))
        return lines

    def _repr_html_(self) -> str:
        import bitfront  # loads what draws when it is used

        return bitfront._html(self)

    def __str__(self) -> str:
        columns, rows = self.table()
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        lines = [
            "  ".join(c.ljust(w) if i < 4 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in (columns, *rows)
        ]
        return "\n".join(line.rstrip() for line in (*lines, *self.remarks()))


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "1"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def analyze(model: nn.Module, sample: object, batch: int = 1, config: CandidateConfig | None = None) -> Analysis:
    """The costs of `model` for a batch, module by module: operations, buffers, parameters, bits.

    Args:
        model: any nn.Module; it is not changed.
        sample: the input: a tensor with a batch dimension of 1 or more; a tuple with such tensors (positional
            arguments); or a mapping with such tensors (keyword arguments), as transformers take.
        batch: number of samples that the figures are for, 1 or more.
        config: a candidate spelled out, as in ``[passes.quantize]`` or a trial's ``config``; None for all in float.

    Raises:
        CaptureError: the model cannot be copied, fails on `sample`, or `sample` is of another kind.
        ConfigError: `batch` is below 1, or `config` is not a candidate of this model.
    """
    return describe(graph_of(model, sample), _positive(batch), config)


def _positive(batch: int) -> int:
    if batch < 1:
        raise ConfigError(f"a batch of {batch} samples is not possible; allowed: 1 or more")
    return batch


def analyze_config(config: Config, batch: int = 1, events: Events | None = None) -> Analysis:
    """The costs of the model of a configuration, in the formats of its ``[passes.quantize]`` if it has one.

    Nothing is trained: the weights are those of the checkpoint ``load_name``, or the initial ones. Where the
    configuration names no data, and the model says of which shape its samples are, no data is read.

    Args:
        config: the configuration.
        batch: number of samples that the figures are for, 1 or more.
        events: receives notes.

    Raises:
        UserError: the configuration, the data or the checkpoint cannot be used; the message says why.
    """
    events = events or Events()
    dataset = stand_in(config) or open_data(config, events.note, events.downloading)
    model = open_model(config, dataset)
    if config.load_name is not None:
        model.load_state_dict(load_weights(config, model).state)
    passes = configuration.quantize_pass(config) if "quantize" in config.passes else None
    graph = graph_of(model, dataset.split("train")[0])
    with config.locating():
        return describe(graph, _positive(batch), passes, ("passes", "quantize"))


def analyze_trial(folder: str | Path, number: int, batch: int = 1, events: Events | None = None) -> Analysis:
    """The costs of a trial of a run, with the weights of its search.

    Args:
        folder: the run folder.
        number: the number of the trial.
        batch: number of samples that the figures are for, 1 or more.
        events: receives notes.

    Raises:
        RunError: the folder has no such run or trial.
        UserError: the configuration of the run, its data or its weights cannot be used; the message says why.
    """
    batch = _positive(batch)
    candidate = candidate_of(folder, number, events=events)
    space = candidate.evaluator.space
    config = space.decode(candidate.code) if candidate.evaluator.formats(candidate.code) else None
    return describe(space.graph, batch, config)


def graph_of(model: nn.Module, sample: object) -> Graph:
    """Capture `model`. If ``capture`` refuses it (token ids, several inputs or outputs), its calls are recorded.

    Args:
        model: any nn.Module; it is not changed.
        sample: as in ``analyze``.

    Raises:
        CaptureError: the model cannot be copied, fails on `sample`, or `sample` is of another kind.
    """
    pair = _pair(sample)
    untraced = "it takes more than one tensor"
    if isinstance(pair, Tensor):
        try:
            return capture(model, pair)
        except CaptureError as error:
            untraced = str(error)
    try:
        copied = private_copy(model).eval()
    except Exception as error:
        raise CaptureError(f"the model cannot be copied ({type(error).__name__}: {error})") from error
    args, kwargs = ((), pair) if isinstance(pair, Mapping) else (pair if isinstance(pair, tuple) else (pair,), {})
    try:
        nodes = recorded_nodes(copied, args, kwargs, SAMPLES)
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors_in(pair))
        raise CaptureError(
            f"the model fails on an input of shape {shapes} (batch first): {type(error).__name__}: {error}"
        ) from error
    return Graph(copied, None, nodes, next(tuple(t.shape[1:]) for t in tensors_in(pair)), untraced)


def _pair(value: object) -> Any:
    """Two samples of an input: the first two, or the only one twice."""
    if isinstance(value, Tensor):
        if value.dim() == 0 or not len(value):
            raise CaptureError(f"a sample needs a batch dimension of at least 1; it has shape {tuple(value.shape)}")
        return (value if len(value) >= SAMPLES else torch.cat([value] * SAMPLES))[:SAMPLES].detach().clone()
    if isinstance(value, Mapping):
        return {str(k): _pair(v) if isinstance(v, Tensor) else v for k, v in value.items()}
    if isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
        return tuple(_pair(v) if isinstance(v, Tensor) else v for v in value)
    raise CaptureError(f"the sample is a {type(value).__name__}; allowed: a tensor, or a tuple or mapping of tensors")


def describe(
    graph: Graph, batch: int = 1, config: CandidateConfig | None = None, where: tuple[str, ...] = ()
) -> Analysis:
    """The costs of a captured model for a batch, in the formats of `config`.

    Args:
        graph: the captured model.
        batch: number of samples that the figures are for, 1 or more.
        config: a candidate spelled out; None for all in float.
        where: path of `config` in the TOML, for messages.

    Raises:
        ConfigError: `config` is not a candidate of this model.
    """
    space = QuantizationSpace.of_float(graph) if config is None else single(graph, config, where)
    graph, formats = space.graph, space.formats(np.zeros(len(space.groups), dtype=np.int64))
    forms = [form for form in stored_forms(space) if form.tensor.parameter]
    # A parameter with several names counts once, under the first one.
    names = {name: form.tensor.names[0] for form in forms for name in form.tensor.names}
    tensors = {form.tensor.names[0]: form.tensor.elements for form in forms}
    only = np.zeros((1, len(space.groups)), dtype=np.int64)
    stored = {form.tensor.names[0]: int(form.stored_bytes(only)[0]) for form in forms}
    rows = tuple(_row(node, graph, batch, formats.get(node.name, {}), names, stored) for node in graph.nodes)
    total = Total(
        operations=sum(r.operations or 0 for r in rows),
        backward_operations=sum(r.backward_operations or 0 for r in rows),
        macs=sum(r.macs for r in rows),
        parameters=sum(tensors.values()),
        parameter_bytes=sum(stored.values()),
        bitops=sum(r.bitops or 0 for r in rows),
        operation_bits=sum(r.operation_bits or 0 for r in rows),
        bops=sum(r.bops or 0 for r in rows),
        ebops=sum(r.ebops or 0 for r in rows),
        not_counted=tuple(f"{r.name} ({r.type})" for r in rows if r.operations is None),
        without_bops=tuple(f"{r.name} ({r.type})" for r in rows if r.operations is not None and r.bops is None),
    )
    return Analysis(batch, rows, total, graph.untraced, tuple(space.unused))


def _input_bits(node: Node, bits: Mapping[Operand, int]) -> tuple[int, ...]:
    """Bits of each tensor that flows in: those of the operand that it is. The weight of a product may flow in, too."""
    if not isinstance(node, Site):
        return (bits["data_in"],) * len(node.inputs)
    parameters = dict(node.operand_parameters)
    specs = sorted(node.specs, key=lambda s: s.position)
    named = [s for s in specs if s.role != "inner" and s.name not in parameters and s.name in bits]
    given = [bits[s.name] for s in named for _ in range(len(node.inputs) if s.several else 1)]
    others = len(node.inputs) - len(given)  # tensors that are no operands, such as indices
    return (*given, *[FLOAT_BITS] * others)


def _row(
    node: Node,
    graph: Graph,
    batch: int,
    formats: Mapping[Operand, Format],
    names: Mapping[str, str],
    stored: Mapping[str, int],
) -> Row:
    operands = node.operands if isinstance(node, Site) else ()
    bits = {o: formats[o].bits if o in formats else FLOAT_BITS for o in operands}
    bits.setdefault("data_in", bits[operands[0]] if operands else FLOAT_BITS)
    data = bits["data_in"]
    specs = node.specs if isinstance(node, Site) else ()
    weights, biases = ([s.name for s in specs if s.role == role] for role in ("weight", "bias"))
    used = dict.fromkeys(names[n] for n in node.parameters if n in names)
    sizes = [batch * math.prod(shape) for shape in node.inputs]
    widths, output_bits = _input_bits(node, bits), formats[DATA_OUT].bits if DATA_OUT in formats else FLOAT_BITS
    operations = None if node.operations is None else batch * node.operations
    macs = batch * node.macs
    effective = _effective(node, graph, batch, formats, bits)
    return Row(
        name=node.name,
        path=node.path,
        type=node.type,
        inputs=node.inputs,
        output=node.output,
        parameters=sum(parameter(graph.model, n).numel() for n in used),
        operations=operations,
        backward_operations=None if operations is None else operations + macs,
        macs=macs,
        input_buffer=sum(sizes),
        output_buffer=batch * math.prod(node.output),
        input_bytes=sum(-(-size * width // 8) for size, width in zip(sizes, widths, strict=False)),
        output_bytes=-(-batch * math.prod(node.output) * output_bits // 8),
        data_in_bits=data,
        weight_bits=max((bits[name] for name in weights), default=None),
        bias_bits=max((bits[name] for name in biases), default=None),
        parameter_bytes=sum(stored[n] for n in used),
        bitops=None if operations is None else int(batch * bit_operations(node, lambda o: bits.get(o, FLOAT_BITS))),
        operation_bits=None if operations is None else operations * data,
        bops=effective[0],
        ebops=effective[1],
    )


def _effective(
    node: Node, graph: Graph, batch: int, formats: Mapping[Operand, Format], bits: Mapping[Operand, int]
) -> tuple[float | None, float | None]:
    """(BOPs, EBOPs) for the values of the weights; 0 without products, None for products of nodes that are no sites."""
    if node.operations is None:
        return None, None
    if not node.macs:
        return 0.0, 0.0
    if not isinstance(node, Site):
        return None, None
    total = 0.0
    for product in node.products:
        density = _nonzero(graph, node, product, formats) / math.prod(product.shape)
        data, weight = bits.get(product.data, FLOAT_BITS), bits[product.weight]
        total += float(batch * bops(product, data, weight, density))

    def figure_of(operand: Operand, figure: ParameterFigure) -> NDArray[np.float64]:
        return np.array([figure(node, formats.get(operand), _rounded(graph, node, operand, formats))])

    data_formats = {operand: [form] for operand, form in formats.items()}
    return total, batch * float(site_ebops(graph, node, data_formats, BitCount(), figure_of)[0])


def _nonzero(graph: Graph, site: Site, product: WeightProducts, formats: Mapping[Operand, Format]) -> int:
    """Number of quantized values of a weight that are not zero; for a product of activations all elements count."""
    if site.parameter(product.weight) is None:
        return math.prod(product.shape)
    return int(torch.count_nonzero(_rounded(graph, site, product.weight, formats)))


def _rounded(graph: Graph, site: Site, operand: Operand, formats: Mapping[Operand, Format]) -> Tensor:
    """A parameter of a site in its format."""
    held = site.parameter(operand)
    assert held is not None
    values, form = parameter(graph.model, held[0]), formats.get(operand)
    if form is None:
        return values
    with torch.no_grad():
        return (form.calibrated(values) if form.calibrates else form).quantize(values)
