"""A graph and a format per operand → a new model that computes in these formats (simulated in floating point).

Module sites become quantized twins of their own class, under their own names, so that the state dict keeps its keys;
functional sites get quantizers in front of their arguments. The model the graph was captured from is never touched.
``bake=True`` writes the quantized weights into the new model's parameters: quantizing is idempotent, so the model
computes the same, and its state dict holds what would be deployed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, fx, nn

from bitfront.formats.base import CALIBRATION_VALUES, Format, Operand
from bitfront.graph import Graph, Site
from bitfront.graph.capture import parameter
from bitfront.operations.base import Operation
from bitfront.operations.lookup import of_class, operand_nodes
from bitfront.transforms.correct import Correction

#: operand → its format; an operand that is absent stays as it is.
SiteFormats = Mapping[Operand, Format]


class Rounds(Protocol):
    """What a quantized module applies to an operand: a format, or an observer in its place."""

    def quantize(self, x: Tensor) -> Tensor:
        """`x` as the operation shall see it."""
        ...


def through(rounds: Rounds, x: Tensor) -> Tensor:
    """A weight in its format, with gradients as if it were not (the plain straight-through estimator, Bengio et al.
    2013, arXiv:1308.3432): clipped ones would never move a weight again that is cut off. Ranges that are learned have
    gradients of their own."""
    rounded = rounds.quantize(x)
    if not (isinstance(rounds, Format) and torch.is_grad_enabled() and x.requires_grad):
        return rounded
    return rounded.detach() - (x.detach() - x)


class Quantizer(nn.Module):
    """A format as a module, put in front of an argument of a functional site.

    Args:
        owned: the argument is a parameter.
    """

    def __init__(self, rounds: Rounds, owned: bool = False) -> None:
        super().__init__()
        self.rounds = rounds
        self.owned = owned

    def forward(self, x: Tensor) -> Tensor:
        """`x` in the format."""
        return through(self.rounds, x) if self.owned else self.rounds.quantize(x)


class Twin:
    """Mixin of the quantized twin of a module: the module's own class, state and name, and a ``forward`` that calls
    the operation with each operand as its format holds it.

    Attributes:
        formats: operand → what it is rounded by; an operand that is absent stays as it is.
    """

    formats: Mapping[str, Rounds]
    #: The class it is the twin of.
    original: ClassVar[type[nn.Module]]

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """As the original's."""
        module = cast(nn.Module, self)
        operation = twin_operation(module)
        assert operation is not None
        assert operation.call is not None
        flowing = iter((*inputs, *named.values()))
        operands: dict[str, Tensor | None] = {}
        for operand in operation.operands:
            rounds = self.formats.get(operand.format_of or operand.name)
            if operand.role == "activation":
                x = next(flowing)
                operands[operand.name] = x if rounds is None else rounds.quantize(x)
            else:
                held = getattr(module, operand.name, None)
                operands[operand.name] = held if held is None or rounds is None else through(rounds, held)
        return operation.call(module, operands)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made here and has no name of its own under which pickle could find it.
        return _blank_twin, (self.original,), self.__dict__


_TWINS: dict[type[nn.Module], type[nn.Module]] = {}


def twin_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class of the quantized twins of modules of a class."""
    if original not in _TWINS:
        members = {"original": original, "__module__": __name__}
        _TWINS[original] = type(f"Quantized{original.__name__}", (Twin, original), members)
    return _TWINS[original]


def _blank_twin(original: type[nn.Module]) -> nn.Module:
    kind = twin_class(original)
    return kind.__new__(kind)


def twin_operation(module: nn.Module) -> Operation | None:
    """The operation of a module, or of the module that it is the quantized twin of; None for one without a record."""
    return of_class(module.original if isinstance(module, Twin) else type(module))


def quantize(
    graph: Graph,
    formats: Mapping[str, SiteFormats],
    *,
    corrections: Mapping[str, Correction] | None = None,
    bake: bool = False,
) -> nn.Module:
    """A new model that computes as `graph.model` does, with the given formats at its sites.

    Args:
        graph: the captured model.
        formats: site name → formats by operand, calibrated; sites that are absent stay as they are.
        corrections: site name → what else changes because of its formats; only of sites that have formats.
        bake: write the quantized weights and biases into the parameters.

    Returns:
        A model in evaluation mode, with parameters of its own. Of the same class as the original unless a
        functional site, or one of several calls of a shared module, is quantized: then an ``fx.GraphModule``.
    """
    return rebuilt(graph, formats, corrections or {}, bake)


def rebuilt(
    graph: Graph,
    rounds: Mapping[str, Mapping[Operand, Rounds]],
    corrections: Mapping[str, Correction],
    bake: bool = False,
) -> nn.Module:
    """``quantize`` with anything that rounds in place of formats: observers, ranges that are learned."""
    model = copy.deepcopy(graph.model)
    for correction in corrections.values():
        for path, (mean, variance) in correction.norms.items():
            norm = model.get_submodule(path)
            norm.running_mean, norm.running_var = mean.clone(), variance.clone()
    biases = {name: own.bias for name, own in corrections.items() if own.bias is not None}
    touched = [site for site in graph.sites if rounds.get(site.name)]
    calls = [site.path for site in graph.sites if site.path]
    in_graph: list[Site] = []
    for site in touched:
        if site.path and calls.count(site.path) == 1:
            twin = _twin(model.get_submodule(site.path), site, rounds[site.name], biases.get(site.name), bake)
            _replace(model, site.path, twin)
        else:
            in_graph.append(site)
    return _rewrite(model, graph, in_graph, rounds, biases, bake) if in_graph else model


def _twin(
    module: nn.Module, site: Site, rounds: Mapping[Operand, Rounds], bias: Tensor | None, bake: bool
) -> nn.Module:
    assert site.operation.call is not None
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    twin.__class__ = twin_class(type(module))
    twin.formats = dict(rounds)  # type: ignore[assignment]
    if bias is not None:
        twin._parameters["bias"] = _in_place_of(module.bias, bias)
    if bake:
        for name, own in list(twin.named_parameters(recurse=False)):
            if name in rounds:
                with torch.no_grad():
                    baked = rounds[name].quantize(own)
                twin._parameters[name] = _in_place_of(own, baked)
    return twin


def _attribute(model: nn.Module, target: str) -> Any:
    path, _, name = target.rpartition(".")
    return getattr(model.get_submodule(path), name)


def _in_place_of(original: Any, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.clone(), requires_grad=original.requires_grad)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _rewrite(
    model: nn.Module,
    graph: Graph,
    sites: Iterable[Site],
    rounds: Mapping[str, Mapping[Operand, Rounds]],
    biases: Mapping[str, Tensor],
    bake: bool,
) -> nn.Module:
    """The graph itself rewritten: for functional sites, and for one of several calls of a shared module."""
    assert graph.fx_graph is not None
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = new.graph_copy(graph.fx_graph, mapping)
    new.output(output)
    by_name = {old.name: node for old, node in mapping.items()}
    for node in new.nodes:
        node.type = None  # an annotation of the user's forward may be text, which torch.fx cannot pickle
    for site in sites:
        node = by_name[site.name]
        if site.path:
            target = f"{site.name}_quantized"
            module, bias = model.get_submodule(site.path), biases.get(site.name)
            model.add_module(target, _twin(module, site, rounds[site.name], bias, bake))
            node.target = target
            continue
        for operand, argument in operand_nodes(node, site.operation).items():
            spec = site.operation.operand(operand)
            own = rounds[site.name].get(spec.format_of or operand)
            given = argument
            if operand == "bias" and site.name in biases:
                target = f"{site.name}_bias_corrected"
                model.register_parameter(
                    target, _in_place_of(_attribute(model, str(argument.target)), biases[site.name])
                )
                with new.inserting_before(node):
                    given = new.get_attr(target)
            if own is not None:
                target = f"{site.name}_{operand}_quantizer"
                model.add_module(target, Quantizer(own, argument.op == "get_attr"))
                with new.inserting_before(node):
                    given = new.call_module(target, (given,))
            if given is argument:
                continue
            if spec.position < len(node.args):
                # Both inputs may be one node (x + x): replace by position, not by value.
                node.update_arg(spec.position, given)
            else:
                node.update_kwarg(spec.argument, given)
    new.lint()
    return fx.GraphModule(model, new).eval()


class _OperandObserver:
    """Stands in for a format, remembers what flows by, changes nothing."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def quantize(self, x: Tensor) -> Tensor:
        # Flattened samples would lose the channels that a per-channel format needs.
        seen = x.detach().reshape(-1) if x.dim() < 2 else x.detach()
        rows = max(1, CALIBRATION_VALUES * 4 // max(1, seen[0].numel()))
        self.seen.append(seen[:rows].clone())
        return x


def joined(seen: Sequence[Tensor]) -> Tensor:
    """Everything observed at an operand as one sample; flat where shapes differ: the two sides of an addition may."""
    shapes = {s.shape[1:] for s in seen}
    return torch.cat(list(seen) if len(shapes) == 1 else [s.flatten() for s in seen])


def observe(
    graph: Graph, wanted: Iterable[tuple[str, Operand]], x: Tensor
) -> dict[tuple[str, Operand], tuple[Tensor, ...]]:
    """What the float model feeds into operands of its sites.

    Args:
        graph: the captured model.
        wanted: (site name, operand) pairs.
        x: input samples, shape (samples, *features).

    Returns:
        Per pair what each call brings, first dimension samples, of large tensors the first ones; for a parameter, the
        parameter itself.
    """
    result: dict[tuple[str, Operand], tuple[Tensor, ...]] = {}
    observers: dict[str, dict[Operand, Rounds]] = {}
    for name, operand in wanted:
        owned = graph.site(name).parameter(operand)
        if owned is not None:
            result[name, operand] = (parameter(graph.model, owned[0]),)
        else:
            observers.setdefault(name, {})[operand] = _OperandObserver()
    if observers:
        with torch.no_grad():
            rebuilt(graph, observers, {}, bake=False)(x)
        for name, by_operand in observers.items():
            for operand, observer in by_operand.items():
                assert isinstance(observer, _OperandObserver)
                result[name, operand] = tuple(observer.seen)
    return result


def calibrate(graph: Graph, formats: Mapping[str, SiteFormats], x: Tensor) -> dict[str, dict[Operand, Format]]:
    """`formats` with everything learned that calibrates: weights from themselves, inputs from what `x` makes of them.

    Inputs are observed in the float model, so that the result for a site does not depend on the other sites' formats.
    """
    wanted = [(n, o) for n, by_operand in formats.items() for o, f in by_operand.items() if f.calibrates]
    samples = observe(graph, wanted, x) if wanted else {}
    return {
        name: {o: f.calibrated(joined(samples[name, o])) if f.calibrates else f for o, f in by_operand.items()}
        for name, by_operand in formats.items()
    }
