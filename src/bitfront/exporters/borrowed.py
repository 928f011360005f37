"""Float parts of an ONNX model that torch.onnx writes: operations that no rule of a record can write.

A part is a node of the traced graph, with everything before it that gives no single tensor (a size, a tuple). It is
exported alone, and its ONNX nodes are joined into the file. A model that cannot be traced is one part, if all of it is
in float. Which dimensions depend on the number of samples is seen in two runs of the graph, with other numbers.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from bitfront.errors import ExportError, MissingExtraError, parsing, require
from bitfront.exporters.walking import BATCH
from bitfront.graph import Graph

OPSET, IR_VERSION = 21, 10
INPUT, OUTPUT = "input", "output"
#: Key of the model's properties: the functions and classes that torch.onnx has written.
BY_TORCH = "written_by_torch_onnx"
#: The number of samples of the other run.
_OTHER = BATCH + 2


@dataclass(frozen=True, eq=False)
class Part:
    """A part as ONNX.

    Attributes:
        sources: the nodes of the traced graph whose tensors it takes.
        inside: the nodes that it computes.
        model: an ``onnx.ModelProto``, with inputs in that order and one output.
    """

    sources: tuple[fx.Node, ...]
    inside: tuple[fx.Node, ...]
    model: Any

    def joined(self, prefix: str, given: Sequence[str]) -> tuple[list[Any], dict[str, NDArray[Any]], str]:
        """(nodes, constants, name of the result), for a model that has the tensors `given`.

        Args:
            prefix: begins every name.
            given: names of the tensors of `sources`.
        """
        onnx: Any = require("onnx", "onnx", "writing ONNX")
        graph = onnx.compose.add_prefix(self.model, prefix).graph
        inputs = [
            onnx.helper.make_node("Identity", [name], [entry.name], name=entry.name)
            for name, entry in zip(given, graph.input, strict=True)
        ]
        constants = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
        return [*inputs, *graph.node], constants, graph.output[0].name


class Borrowed:
    """Writes nodes of a traced graph by torch.onnx.

    Args:
        module: the traced graph, which can be called.
        graph: the captured model.
    """

    def __init__(self, module: fx.GraphModule, graph: Graph) -> None:
        self.module, self.captured = module, graph

    def of_node(self, n: fx.Node, written: Collection[fx.Node], why: str) -> Part:
        """A node, and what it needs up to nodes whose tensors are written already.

        Args:
            n: gives one tensor.
            written: nodes whose tensors are in the model, and depend on the samples.
            why: no rule writes it: the beginning of messages.

        Raises:
            ExportError: torch.onnx cannot write it either, or a package for it is missing.
        """
        part, sources, inside = _cut(self.module, n, written)
        examples = [torch.zeros(*self._shapes[0][s], dtype=self._kinds[s]) for s in sources]
        moving = [self.sample_dims(s) for s in sources]
        if not any(moving):
            raise ExportError(f"{why}; and no dimension of what it takes is that of the samples")
        model = _exported(part, examples, moving, why)
        return Part(tuple(sources), tuple(inside), model)

    def sample_dims(self, n: fx.Node) -> set[int]:
        """The dimensions of a node's tensor that depend on the number of samples."""
        one, other = (shapes[n] for shapes in self._shapes)
        return {d for d, (a, b) in enumerate(zip(one, other, strict=True)) if a != b}

    @cached_property
    def _runs(self) -> tuple[_Shapes, _Shapes]:
        runs = _Shapes(self.module), _Shapes(self.module)
        with torch.no_grad():
            for run, batch in zip(runs, (BATCH, _OTHER), strict=True):
                run.run(torch.zeros(batch, *self.captured.sample_shape))
        return runs

    @property
    def _shapes(self) -> tuple[Mapping[fx.Node, tuple[int, ...]], Mapping[fx.Node, tuple[int, ...]]]:
        return self._runs[0].shapes, self._runs[1].shapes

    @property
    def _kinds(self) -> Mapping[fx.Node, torch.dtype]:
        return self._runs[0].kinds


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shape and dtype of each tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.kinds: dict[fx.Node, torch.dtype] = {}

    def run_node(self, n: fx.Node) -> Any:
        """As of ``fx.Interpreter``."""
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n], self.kinds[n] = tuple(value.shape), value.dtype
        return value


def whole_model(graph: Graph) -> Any:
    """A model in float that cannot be traced, as an ``onnx.ModelProto``.

    Raises:
        ExportError: torch.onnx cannot write it either, or a package for it is missing.
    """
    onnx: Any = require("onnx", "onnx", "writing ONNX")
    why = f"the model cannot be traced: {graph.untraced}"
    example = torch.zeros(BATCH, *graph.sample_shape)
    model = _exported(graph.model, [example], [{0}], why, input_names=[INPUT], output_names=[OUTPUT])
    for entry in (model.graph.input[0], model.graph.output[0]):
        batch = entry.type.tensor_type.shape.dim[0]
        if not batch.dim_param:
            raise ExportError(f"{why}; torch.onnx writes it for {batch.dim_value} samples at a time only")
        batch.dim_param = "batch"
    model.producer_name = "bitfront"
    onnx.helper.set_model_props(model, {BY_TORCH: type(graph.model).__name__})
    onnx.checker.check_model(model)
    return model


def _cut(
    module: fx.GraphModule, last: fx.Node, written: Collection[fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
    """(a module that computes the tensor of a node, the nodes whose tensors it takes, those that it computes)."""
    part, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    sources: list[fx.Node] = []

    def copied(n: fx.Node) -> fx.Node:
        if n not in copies and n in written:
            copies[n] = part.placeholder(f"given_{len(sources)}")
            sources.append(n)
        elif n not in copies:
            copies[n] = part.node_copy(n, copied)
        return copies[n]

    part.output(copied(last))
    return fx.GraphModule(module, part), sources, [n for n in copies if n not in sources]


def _exported(module: nn.Module, examples: Sequence[Tensor], moving: Sequence[set[int]], why: str, **names: Any) -> Any:
    """A module as ONNX.

    Args:
        module: is copied.
        examples: its inputs.
        moving: the dimensions of each of them that depend on the number of samples.
        why: the beginning of messages.
        names: further arguments of ``torch.onnx.export``.

    Raises:
        ExportError: torch.onnx does not write it, or not in this opset.
    """
    try:
        require("onnxscript", "onnx", "torch.onnx")
    except MissingExtraError as error:
        raise ExportError(f"{why}; {error}") from None
    dynamic = torch.export.Dim.DYNAMIC
    shapes = tuple(dict.fromkeys(dims, dynamic) for dims in moving)
    with parsing(ExportError, f"{why}; nor does torch.onnx write it", "replace it in the model"), _quiet():
        program: Any = torch.onnx.export(
            copy.deepcopy(module).eval(),
            tuple(examples),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            verbose=False,
            **names,
        )
        model = program.model_proto
    versions = {entry.domain: entry.version for entry in model.opset_import}
    others = {node.domain for node in model.graph.node} - {"", "ai.onnx"}
    if versions.get("") != OPSET or others or model.functions:
        raise ExportError(f"{why}; torch.onnx writes it in other operators than those of opset {OPSET}")
    model.ir_version = IR_VERSION
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says on its way: errors say what matters."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
