"""The conformance suite of operations: what every record must do. The tests of each operation run it.

from bitfront.testing import check_operation
check_operation("silu", nn.SiLU(), torch.randn(8, 6))
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.evaluation.interface import EvaluationJob
from bitfront.exporters.onnx import INPUT, Form, obstacle, onnx_model
from bitfront.exporters.sessions import opened
from bitfront.formats import FORMATS
from bitfront.formats.base import WEIGHT, Format, Operand
from bitfront.graph import Graph, Site, capture
from bitfront.metrics.configured import configured_runner
from bitfront.operations import OPERATIONS
from bitfront.operations.base import DATA_OUT, Call, Operation
from bitfront.operations.lookup import bare, count, of_class, of_function, of_node, shapes_in, tensors_in
from bitfront.population import train_population, why_alone
from bitfront.scoring import evaluate
from bitfront.spaces.request import DefaultFor
from bitfront.training import TrainSettings, train
from bitfront.transforms import quantize
from bitfront.transforms.arguments import operands_of

CLASSES = 3
#: Candidates that are computed together and one by one.
CANDIDATES = 24
#: So many operands have several settings in one space; a site has as many options as they have together.
FREE = 4


def check_operation(
    name: str, example: Callable[[Tensor], Any] | None = None, x: Tensor | None = None, *, seed: int = 0
) -> Operation:
    """Assert that the operation called `name` keeps the contract of :class:`bitfront.operations.base.Operation`.

    Args:
        example: a module of it, a module that calls one, or a function of one tensor. It returns a tensor, or a tuple
            that begins with one, whose first dimension is the samples. Without it, only the record is checked.
        x: input of `example`; the first dimension is the samples, eight or more. It is not changed.
        seed: random seed of the weights around the example, and of the candidates that are drawn.

    Returns:
        The record, for further tests.

    Raises:
        AssertionError: the contract is broken; the message says how.
    """
    record = OPERATIONS.get(name)
    _check_record(record)
    if example is None:
        return record
    assert x is not None, "an example needs samples"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = _Network(example, x).eval()
    graph = capture(network, x)
    assert not graph.untraced, f"the example cannot be traced: {graph.untraced}"
    calls = _calls(graph, record, x)
    assert calls, f"nothing in the example is {name}"
    for call in calls:
        _check_call(record, call)
    _check_counts(record, calls, _calls(graph, record, torch.cat([x, x])))
    usual, graph = graph, graph.naming([site.name for site in graph.nameable])
    sites = [site for site in graph.sites if site.operation is record]
    for site in sites:
        _check_quantized(graph, site, x)
        _check_result(graph, site, x)
    if record.onnx is not None and importlib.util.find_spec("onnxruntime") is not None:
        _check_onnx(graph, sites, x)
    for sited in dict.fromkeys((usual, graph)):
        _check_merged(network, sited, x, seed)
        if record.train is not None:
            _check_trained(sited, x)
    return record


class _Network(nn.Module):
    """An example between two sites, whose formats change its input and what reads its output."""

    def __init__(self, example: Callable[[Tensor], Any], x: Tensor) -> None:
        super().__init__()
        self.example = example
        self.floats = x.is_floating_point()
        with torch.no_grad():
            self.several = isinstance(self.of_example(x), tuple)
            out = self.of_example(x)
        self.head = nn.Linear((out[0] if self.several else out)[0].numel(), CLASSES)

    def of_example(self, x: Tensor) -> Any:
        return self.example(x + x if self.floats else x)

    def forward(self, x: Tensor) -> Tensor:
        out = self.of_example(x)
        logits: Tensor = self.head(torch.flatten(out[0] if self.several else out, 1))
        return logits


@dataclass(frozen=True, eq=False)
class _Called:
    """A call of the operation, and its result."""

    call: Call
    value: Any


def _calls(graph: Graph, record: Operation, x: Tensor) -> list[_Called]:
    """All calls of the operation on the samples."""
    assert graph.fx_graph is not None
    calls: list[_Called] = []

    class Runner(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            tensors, value = shapes_in((args, kwargs)), super().run_node(n)
            if of_node(n, graph.model) is record:
                module = graph.model.get_submodule(str(n.target)) if n.op == "call_module" else None
                output = shapes_in(value)
                call = Call(bare(n.target), tensors, output[0] if output else (), args, kwargs, module)
                calls.append(_Called(call, value))
            return value

    with torch.no_grad():
        Runner(fx.GraphModule(graph.model, graph.fx_graph)).run(x.clone())
    return calls


def _check_record(record: Operation) -> None:
    name = record.name
    for kind in record.modules:
        assert of_class(kind) is record, f"{kind.__name__} is not looked up as {name}"
    for function in (*record.functions, *record.names):
        assert of_function(function) is record, f"{function} is not looked up as {name}"
    assert record.summary.strip(), f"{name} has no summary"
    names = [operand.name for operand in record.operands]
    assert len({*names}) == len(names), f"two operands of {name} have one name"
    arguments = [o for o in record.operands if record.functions or record.names or o.role == "activation"]
    places = [operand.position for operand in arguments if operand.role != "inner"]
    assert len({*places}) == len(places), f"two operands of {name} have one place"
    for operand in record.operands:
        assert operand.name.isidentifier(), f"{operand.name!r} is no prefix of keys in a TOML file"
        assert operand.name not in operand.format_of, f"{operand.name} of {name} shares its own format"
    if record.operands and record.modules:
        assert record.call is not None, f"modules of {name} have operands, but the record has no call"
    if any(operand.role == "inner" for operand in record.operands):
        assert record.call is not None, f"{name} has inner operands, but the record has no call"
    assert record.onnx_integer is None or record.onnx is not None, f"{name} has integer operators and no rule for ONNX"


def _check_call(record: Operation, called: _Called) -> None:
    """Check that ``call`` computes the same as the module's ``forward``."""
    module = called.call.module
    if module is None or not record.operands:
        return
    assert record.call is not None
    operands = operands_of(record, module, called.call.args, called.call.kwargs or {}, {})
    with torch.no_grad():
        value = record.call(module, operands)
    pairs = itertools.zip_longest(tensors_in(value), tensors_in(called.value), fillvalue=torch.empty(0))
    equal = type(value) is type(called.value) and all(torch.equal(*pair) for pair in pairs)
    assert equal, f"the call of {record.name} computes something different from its modules"


def _check_counts(record: Operation, once: list[_Called], twice: list[_Called]) -> None:
    if record.count is None:
        return
    totals = []
    for calls in (once, twice):
        counts = [count(c.call, record) for c in calls]
        for counted in counts:
            assert counted is not None, f"{record.name} does not count the example"
            for number in (counted.operations, counted.macs):
                assert type(number) is int, f"{record.name} counts {number!r}, which is no whole number"
                assert number >= 0, f"{record.name} counts {number}"
            assert counted.macs <= counted.operations, f"{record.name} counts more products than operations"
        totals.append((sum(c.operations for c in counts if c), sum(c.macs for c in counts if c)))
    assert totals[1] == (2 * totals[0][0], 2 * totals[0][1]), (
        f"{record.name} counts {totals[0]} for some samples and {totals[1]} for twice as many"
    )


def _format(width: int, frac_width: int) -> Format:
    return FORMATS.get("integer").parse({"width": width, "frac_width": frac_width}, WEIGHT)


def _check_quantized(graph: Graph, site: Site, x: Tensor) -> None:
    """Check that every format has an effect, and that quantized models keep their keys and can be copied."""
    before = graph.model(x)
    keys = graph.model.state_dict().keys()
    for operand in (*site.operands, DATA_OUT):
        model = quantize(graph, {site.name: {operand: _format(3, 1)}})
        expected = model(x)
        assert not torch.equal(expected, before), f"a format of {operand} changes nothing at {site.title}"
        if site.path:
            assert model.state_dict().keys() == keys, f"quantizing {site.title} changes the keys of the state dict"
        for way, other in (
            ("a copy", copy.deepcopy(model)),
            ("a pickle", pickle.loads(pickle.dumps(model))),  # noqa: S301 (bytes of this process)
        ):
            assert torch.equal(other(x), expected), f"{way} of the quantized {site.title} computes something else"


def _check_result(graph: Graph, site: Site, x: Tensor) -> None:
    """Check that a format of the result rounds what the site gives, for all that read it, and nothing else."""
    assert graph.fx_graph is not None
    rounding = _format(3, 1)

    class Rounding(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name == site.name:
                result = next(tensors_in(value))
                result.copy_(rounding.quantize(result))
            return value

    with torch.no_grad():
        expected = Rounding(fx.GraphModule(graph.model, graph.fx_graph)).run(x.clone())
        computed = quantize(graph, {site.name: {DATA_OUT: rounding}})(x.clone())
    assert torch.equal(computed, expected), f"a format of the result of {site.title} does not round what it gives"


def _check_onnx(graph: Graph, sites: list[Site], x: Tensor) -> None:
    """Check that ONNX Runtime computes the same: in float, and in bytes in both forms."""
    narrow = {s.name: {o: _format(8, 4) for o in s.operands} for s in sites}
    integer = [s.name for s in sites if not obstacle(s, narrow[s.name])]
    assert bool(integer) == any(s.operation.onnx_integer is not None for s in sites), (
        f"integer operators do not take 8 bits: {[obstacle(s, narrow[s.name]) for s in sites]}"
    )
    cases: list[tuple[str, Mapping[str, Mapping[Operand, Format]], Form]] = [("in float", {}, "integer")]
    if sites:
        cases += [("quantized", narrow, "qdq"), ("in integers", narrow, "integer")]
    for how, formats, form in cases:
        with torch.no_grad():
            expected = quantize(graph, formats)(x)
        # With optimizations, ONNX Runtime rounds biases once more.
        session = opened(onnx_model(graph, formats, form).SerializeToString(), form, optimized=False, threads=1)
        computed = torch.from_numpy(session.run(None, {INPUT: x.numpy()})[0])
        off = float((computed - expected).abs().max())
        assert off <= 1e-4, f"{how}, the ONNX model differs from the quantized one by {off}"


def _check_merged(network: nn.Module, graph: Graph, x: Tensor, seed: int) -> None:
    """Check that candidates computed together have the same loss as each alone, to the last bit.

    Args:
        graph: of the network; what is no site in it stays in float.
    """
    operands = list(dict.fromkeys(itertools.chain(*(site.operands for site in graph.sites))))
    for first in range(0, len(operands), FREE):
        choices: dict[str, object] = {"name": ["integer", "NA"]}
        for i, operand in enumerate(operands):
            if first <= i < first + FREE:
                choices |= {f"{operand}_width": [2, 4, 8], f"{operand}_frac_width": [1, 2]}
            else:
                choices |= {f"{operand}_width": 6, f"{operand}_frac_width": 3}
        _check_choices(network, choices, "usual" if graph.nameable else "all", x, seed)
    choices = {"name": ["integer", "NA"], "data_in_width": [4, 8], "data_in_frac_width": 2}
    choices |= {f"{DATA_OUT}_width": [4, "NA"], f"{DATA_OUT}_frac_width": [1, 2]}
    _check_choices(network, choices, "usual" if graph.nameable else "all", x, seed)


def _check_choices(
    network: nn.Module, choices: Mapping[str, object], default_for: DefaultFor, x: Tensor, seed: int
) -> None:
    y = torch.arange(len(x)) % CLASSES
    job = EvaluationJob(
        model=network,
        sample=x[:2],
        space="graph/quantize/mixed_precision_ptq",
        by="name",
        choices={"default": choices},
        runners=(configured_runner("basic_evaluation"),),
        splits={"val": (x, y)},
        calibration=x,
        default_for=default_for,
    )
    evaluator = FixedEvaluator(job)
    codes = evaluator.space.sample(CANDIDATES, np.random.default_rng(seed))
    measured = evaluator.evaluate(codes)
    assert not evaluator.plain, f"candidates cannot be computed together: {evaluator.plain}"
    for i, code in enumerate(codes):
        alone = evaluate(evaluator.model(code), x, y, batch_size=evaluator.chunk)
        assert measured.values["loss"][i] == alone.loss, (
            f"a candidate's loss is {measured.values['loss'][i]} among others and {alone.loss} alone"
        )


def _check_trained(graph: Graph, x: Tensor) -> None:
    """Check that members of a population are trained as if alone, in float and with formats."""
    y = torch.arange(len(x)) % CLASSES
    data: Any = SimpleNamespace(name="samples", split=lambda _: (x, y), num_classes=CLASSES, mapped=False)
    settings = TrainSettings(max_epochs=1, max_steps=1, batch_size=len(x), learning_rate=0.1, optimizer="sgd")
    formats = {s.name: {o: _format(8, 4) for o in s.operands if o != "bias"} for s in graph.sites if s.path}
    for how, model in (("float", quantize(graph, {})), ("quantized", quantize(graph, formats))):
        if why_alone(model, tuple(x.shape[1:])):
            continue
        expected = train(model, data, settings).last_state
        (member,) = train_population([model], data, settings)
        assert not member.error, member.error
        for key, value in expected.items():
            close = torch.allclose(member.state[key].float(), value.float(), rtol=1e-4, atol=1e-5)
            assert close, f"a population trains {key} of a {how} example to other weights"
