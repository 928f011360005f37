"""A network whose bits are learned by torch: any captured model, some layers of which learn bits.

Bits are learned by layers whose results are sums of products of their input with their weight: linear layers and
convolutions, transposed ones too. Everything else is called as it is and is trained with them: in float, or in the one
format that the file gives it. Notes name it, and say how it counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from bitfront.errors import ConfigError
from bitfront.graph import Graph, Node, Site
from bitfront.graph.memory import stored_tensors
from bitfront.kernels import bits as compiled
from bitfront.learned_bits.program import (
    Granularities,
    Indices,
    Layer,
    Program,
    folding_notes,
    of_layers,
    with_learned_bits,
)
from bitfront.operations import OPERATIONS
from bitfront.operations.base import Operands
from bitfront.operations.lookup import hooks, of_node
from bitfront.operations.training import UnsupportedError
from bitfront.tasks.base import Task
from bitfront.tasks.classification import CLASSIFICATION
from bitfront.transforms.fold import folded
from bitfront.transforms.quantize import SiteFormats

#: Operations whose values are not negative, whatever they get; and if they get no negative ones.
POSITIVE = frozenset(("relu", "relu6", "sigmoid", "softmax", "softmin", "hardsigmoid", "softplus"))
KEEPS_SIGN = frozenset(
    """
    adaptive_avg_pool adaptive_max_pool add avg_pool clone concatenation dropout flatten gelu getitem hardswish identity
    leaky_relu max_pool1d max_pool2d max_pool3d mean mish mul silu stack tanh
    """.split()
)
#: Operations that need no bits, since they move values, choose among them, or add up what is exact, and need no name.
NEEDS_NO_BITS = frozenset(
    """
    adaptive_avg_pool adaptive_max_pool add avg_pool clone concatenation dropout expand_as flatten getattr getitem
    hardtanh identity leaky_relu max_pool1d max_pool2d max_pool3d mean move movedim padding relu relu6 size stack sub
    """.split()
)


@dataclass(frozen=True, eq=False)
class TorchLayer(Layer):
    """A layer with its rounding, of a captured model.

    Attributes:
        site: of the captured model.
        module: its module there; of it only what it computes is used, not its parameters.
    """

    site: Site
    module: nn.Module

    def applied(self, data: Tensor, weight: Tensor, module: nn.Module | None = None) -> Tensor:
        """What the layer computes of an input and a weight, without a bias."""
        assert self.site.operation.call is not None
        operands = Operands({"data_in": data, "weight": weight, "bias": None})
        result: Tensor = self.site.operation.call(module or self.module, operands)
        return result

    def read(self, slots: Indices) -> NDArray[np.bool_]:
        """Which values of the input some weights read, bool, shape (values of a sample,)."""
        weight = torch.zeros(self.weights)
        weight[torch.from_numpy(slots)] = 1
        data = torch.ones(1, *self.source, requires_grad=True)
        with torch.enable_grad():
            # The derivative by a value is the number of its products.
            (uses,) = torch.autograd.grad(self.applied(data, weight.reshape(self.weight_shape)).sum(), data)
        return (uses > 0).numpy().reshape(-1)


@dataclass(frozen=True, eq=False)
class TorchProgram(Program):
    """A captured model, some layers of which learn bits.

    Attributes:
        layers: those that do, in the order of their calls.
        graph: the captured model, with its batch norms folded where that is possible.
        device: where it is trained.
        why: why it is not trained by compiled steps, in words.
        before: per layer, the layer whose output, after at most a ReLU, is its whole input.
        notes: what stays in float, in words.
        float_macs: multiply-accumulates of what learns no bits.
        fixed: site → operand → format, of what learns no bits and has formats all the same; not calibrated.
        loose: names of the parameters that are trained beside, in order.
    """

    layers: tuple[Layer, ...]
    graph: Graph
    device: str
    why: str
    before: tuple[int | None, ...]
    notes: tuple[str, ...]
    float_macs: int = 0
    fixed: Mapping[str, SiteFormats] = field(default_factory=dict)
    loose: tuple[str, ...] = ()
    task: Task = CLASSIFICATION

    @property
    def trainer(self) -> str:
        """Who trains it, and why, in words."""
        return f"torch, on {self.device} ({self.why}); later cycles have more epochs and take longer"

    def at_a_time(self, threads: int, members: int) -> int:  # noqa: ARG002
        """One: what torch draws in a step comes from one stream for all threads."""
        return 1

    def follows(self, layer: int) -> int | None:
        """The layer whose output, after at most a ReLU, is the whole input of `layer`; None if there is none."""
        return self.before[layer]


def open_program(
    graph: Graph,
    x: Tensor,
    default: Granularities,
    named: Mapping[str, Granularities],
    device: str = "cpu",
    offered: Mapping[str, Sequence[SiteFormats]] | None = None,
    task: Task = CLASSIFICATION,
) -> tuple[Graph, Program]:
    """(the graph with its batch norms folded, the network with learned bits): compiled steps on a CPU if the whole
    network has them and the task has their loss, otherwise torch.

    Args:
        graph: a captured model.
        x: three samples or more, as the model takes them.
        default, named: which values share their bits: of all layers, and of those with other ones, by path.
        device: where it is trained.
        offered: site → the formats by operand that a file offers there, not calibrated. What learns no bits has them,
            if there is one choice; compiled steps have no such layers.
        task: what the samples are.

    Raises:
        ConfigError: no layer can learn bits; or `named` names no layer that does.
    """
    try:
        if not task.plainly_trained:
            raise UnsupportedError("they train for the plain cross entropy, and the task has another loss")
        steps = with_learned_bits(graph, tuple(x.shape[1:]), default, named, x[:2])
    except UnsupportedError as reason:
        why = f"no compiled steps: {reason}"
    else:
        if device == "cpu" and compiled.available():
            return steps
        cpu = "compiled steps are for CPUs, and often faster for a small network: accelerator = 'cpu'"
        why = cpu if device != "cpu" else "there is no C++ compiler here"
    graph, program = _traced(graph, x, default, named, device, why, offered or {})
    return graph, replace(program, task=task)


def _traced(
    graph: Graph,
    x: Tensor,
    default: Granularities,
    named: Mapping[str, Granularities],
    device: str,
    why: str,
    offered: Mapping[str, Sequence[SiteFormats]],
) -> tuple[Graph, TorchProgram]:
    changed = folded(graph, x[:2], dropouts=False)
    graph = changed.graph
    reasons = {site.name: reason for site in graph.sites if _has_products(site) and (reason := _obstacle(graph, site))}
    sites = [site for site in graph.sites if _has_products(site) and site.name not in reasons]
    shapes = _shapes(graph.model, [site.path for site in sites], x)
    for site in sites:
        if site.path not in shapes:
            reasons[site.name] = "its input has its samples not along the first dimension, or is no single tensor"
    sites = [site for site in sites if site.name not in reasons]
    if not sites:
        named_reasons = "; ".join(f"{graph.site(name).title}: {reason}" for name, reason in reasons.items())
        raise ConfigError(
            "strategy 'learned_bits' has no layer here whose bits it could learn: it takes modules of linear layers "
            f"and convolutions, transposed ones too{f' ({named_reasons})' if reasons else ''}",
            key=("search", "strategy", "name"),
        )
    shared = of_layers(graph, [site.path for site in sites], default, named)
    positive = _positive(graph)
    layers = tuple(
        _layer(graph, site, *shapes[site.path], site.name not in positive, shared[site.path]) for site in sites
    )
    learned = {site.name for site in sites}
    others = [node for node in graph.nodes if node.name not in learned]
    macs = sum(node.macs for node in others) + sum(layer.macs for layer in graph.left_out)
    single = {name: choices[0] for name, choices in offered.items() if name not in learned and len(choices) == 1}
    fixed = {name: formats for name, formats in single.items() if formats}
    in_float = [node for node in others if node.name not in fixed]
    notes = (*folding_notes(changed), *_fixed_notes(fixed, offered, learned), *_float_notes(in_float, reasons, graph))
    before, loose = _before(graph, sites, layers, fixed), _loose(graph.model, layers)
    return graph, TorchProgram(layers, graph, device, why, before, notes, macs, fixed, loose)


def _loose(model: nn.Module, layers: Sequence[Layer]) -> tuple[str, ...]:
    """Names of the parameters that are trained beside the layers whose bits are learned."""
    learned = {f"{layer.path}.{name}" for layer in layers for name in ("weight", "bias")}
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if name not in learned and parameter.requires_grad and parameter.dtype == torch.float32
    )


def _has_products(site: Site) -> bool:
    """Whether the results of a site are sums of products of its input with its weight."""
    return site.operation.product is not None and {"data_in", "weight"} <= set(site.operands) and bool(site.macs)


def _obstacle(graph: Graph, site: Site) -> str:
    """Why a layer cannot learn bits, in words; empty if it can."""
    if not site.path or site.operation.call is None:
        return "it is a function, and only modules learn bits"
    if graph.is_rewritten_for(site):
        return "it is called more than once"
    module = graph.model.get_submodule(site.path)
    if hooks(module):
        return hooks(module)
    held = {o: f"{site.path}.{o}" for o in ("weight", "bias") if isinstance(getattr(module, o, None), Tensor)}
    if dict(site.operand_parameters) != held:
        return "its weight is not a plain parameter"
    shared = {name for s in stored_tensors(graph) if len(s.uses) != 1 or s.floats for name in s.names}
    if shared & set(held.values()):
        return "others use its weight too"
    for name in held.values():
        parameter = graph.model.get_parameter(name)
        if not parameter.requires_grad:
            return f"{name} is not trained"
        if parameter.dtype != torch.float32:
            return f"{name} is {parameter.dtype}"
    return ""


def _shapes(model: nn.Module, paths: list[str], x: Tensor) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Path → shapes of a sample of the input and of the output, of layers that have samples along dimension 0."""
    seen: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {path: [] for path in paths}

    def look(path: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                seen[path].append((tuple(inputs[0].shape), tuple(output.shape)))

        return hook

    handles = [model.get_submodule(path).register_forward_hook(look(path)) for path in paths]
    try:
        with torch.no_grad():
            for count in (2, 3):
                model(x[:count].clone())
    finally:
        for handle in handles:
            handle.remove()
    shapes = {}
    for path, calls in seen.items():
        samples = [(source[:1], target[:1]) for source, target in calls]
        parts = {(source[1:], target[1:]) for source, target in calls}
        if samples == [((2,), (2,)), ((3,), (3,))] and len(parts) == 1 and all(next(iter(parts))):
            shapes[path] = next(iter(parts))
    return shapes


def _layer(
    graph: Graph,
    site: Site,
    source: tuple[int, ...],
    target: tuple[int, ...],
    signed: bool,
    shared: Granularities,
) -> TorchLayer:
    module = graph.model.get_submodule(site.path)
    weight = module.get_parameter("weight")
    # A matrix multiplies the last dimension; a window slides over those behind the channels.
    axis = len(source) - 1 if weight.dim() == 2 else 0
    groups = int(getattr(module, "groups", 1))
    bias = getattr(module, "bias", None) is not None
    output_axis = (site.operand("weight").channel_axis or 0) % weight.dim()
    nowhere = np.zeros((0, 3), dtype=np.int64)
    shape = tuple(weight.shape)
    return TorchLayer(
        *(site.path, shape, source, target, groups, bias, nowhere, signed, shared, axis, output_axis, site, module)
    )


def _positive(graph: Graph) -> frozenset[str]:
    """Names of the sites whose input is never negative, as far as the graph says."""
    if graph.fx_graph is None:
        return frozenset()
    without: set[fx.Node] = set()
    names = set()
    for node in graph.fx_graph.nodes:
        sources = node.all_input_nodes
        given = bool(sources) and all(source in without for source in sources)
        if given:
            names.add(node.name)
        operation = None if node.op in ("placeholder", "output", "get_attr") else of_node(node, graph.model)
        if operation is None:
            continue
        keeps = operation.view or (operation.name in KEEPS_SIGN and not _has_negative(node.args, node.kwargs))
        if operation.name in POSITIVE or (given and keeps):
            without.add(node)
    return frozenset(names)


def _has_negative(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call gets a negative number, such as a factor; a dimension counts too."""
    return any(isinstance(given, int | float) and given < 0 for given in (*args, *kwargs.values()))


def _before(
    graph: Graph, sites: list[Site], layers: tuple[Layer, ...], fixed: Collection[str]
) -> tuple[int | None, ...]:
    """Per layer, the one whose output is its whole input after at most a ReLU, both linear layers of vectors.

    Args:
        fixed: names of sites with formats of the file; a ReLU among them rounds.
    """
    if graph.fx_graph is None:
        return (None,) * len(sites)
    places = {site.name: place for place, site in enumerate(sites)}
    plain = [len(layer.source) == 1 and len(layer.target) == 1 and layer.output_axis == 0 for layer in layers]
    before: list[int | None] = [None] * len(sites)
    for node in graph.fx_graph.nodes:
        place = places.get(node.name)
        if place is None or not plain[place]:
            continue
        (source,) = node.all_input_nodes
        operation = None if source.op == "placeholder" else of_node(source, graph.model)
        rectifies = operation is not None and operation.name == "relu" and source.name not in fixed
        if rectifies and len(source.users) == 1:
            (source,) = source.all_input_nodes
        producer = places.get(source.name)
        if producer is not None and plain[producer] and len(source.users) == 1:
            before[place] = producer
    return tuple(before)


def _fixed_notes(
    fixed: Mapping[str, SiteFormats], offered: Mapping[str, Sequence[SiteFormats]], learned: Collection[str]
) -> Iterator[str]:
    """Which formats of the file are used, and which are not."""
    if fixed:
        words = {
            name: ", ".join(f"{operand} {form.label}" for operand, form in formats.items())
            for name, formats in fixed.items()
        }
        text = "; ".join(f"{name}: {formats}" for name, formats in words.items())
        yield f"these learn no bits and have the formats that the file gives them, from the start: {text}"
    several = [name for name, choices in offered.items() if name not in learned and len(choices) > 1]
    if several:
        yield (
            f"{', '.join(several)}: the file offers several formats, and what learns no bits can have one; it stays in "
            "float"
        )


def _float_notes(others: list[Node], reasons: Mapping[str, str], graph: Graph) -> tuple[str, ...]:
    """What stays in float, and how it counts."""
    moves = [node for node in others if node.operations == 0 and not node.parameters]
    listed = [node for node in others if node not in moves]
    listed = [node for node in listed if node.name in reasons or not _needs_no_bits(node)]
    notes = []
    of_types = itertools.groupby(sorted((n for n in listed if n.name not in reasons), key=_kind), key=_kind)
    groups = [(kind, [node.path or node.name for node in nodes]) for kind, nodes in of_types]
    if groups:
        text = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in groups)
        notes.append(
            f"no bits are learned of what is no sum of products of an input with a weight. It stays in float: {text}"
        )
    for name, reason in reasons.items():
        site = graph.site(name)
        notes.append(f"{site.path or site.name} ({site.type}) learns no bits and stays in float: {reason}")
    multiplied = [node for node in listed if node.macs]
    if multiplied:
        macs = sum(node.macs for node in multiplied)
        notes.append(
            f"{', '.join(node.path or node.name for node in multiplied)}: {macs:,} multiply-accumulates of values in "
            "float. The training cannot make them cheaper; metrics count them in every network as products of two "
            "values of 32 bits (ebops: 31 · 31 each, without signs)"
        )
    elif listed:
        notes.append("what stays in float has no products with weights: ebops and bops do not count it")
    return tuple(notes)


def _kind(node: Node) -> str:
    return node.type


def _needs_no_bits(node: Node) -> bool:
    """Whether it moves values, chooses among them, or adds up exact ones."""
    return node.op in NEEDS_NO_BITS or (node.op in OPERATIONS and OPERATIONS.get(node.op).view)
