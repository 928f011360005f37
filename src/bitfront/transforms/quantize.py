"""From a graph and a format per operand to a new model that computes in these formats, simulated in floating point.

Module sites become quantized twins: modules of a subclass of their class, with the same names, so that the state dict
keeps its keys. Functional sites get quantizers before their arguments. The captured model is never changed. With
``bake=True`` the parameters of the new model are the quantized weights. Quantizing a second time changes nothing, so
the model computes the same, and its state dict has the weights to deploy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx, nn

from bitfront.formats.base import Format, Operand
from bitfront.graph import Graph, Site
from bitfront.graph.checking import copied_graph
from bitfront.graph.tracing import install
from bitfront.operations import OPERATIONS
from bitfront.operations.base import DATA_IN, DATA_OUT, Operands, OperandSpec, Operation, Rounds
from bitfront.operations.lookup import nodes_of_operands, of_class
from bitfront.transforms.arguments import (
    called,
    called_function,
    first_rounded,
    formats_of,
    function_product,
    inner_rounds,
    operands_of,
    rounded,
    rounded_result,
    through,
)
from bitfront.transforms.arithmetic import KnownProducts, product
from bitfront.transforms.correct import Correction
from bitfront.transforms.direct import Kept
from bitfront.transforms.functions import replace_calls
from bitfront.transforms.inplace import without_change, written_into

#: Operand → its format; operands that are missing stay in float.
SiteFormats = Mapping[Operand, Format]


class Quantizer(nn.Module):
    """A format as a module, placed before an argument of a functional site, or behind its result.

    Args:
        owned: whether it is a parameter.
        operand: what is rounded.
    """

    def __init__(self, rounds: Rounds, owned: bool = False, operand: OperandSpec = DATA_IN) -> None:
        super().__init__()
        self.rounds = rounds
        self.owned = owned
        self.operand = operand

    def forward(self, x: Any) -> Any:
        """`x` in the format; of a result of several tensors, the first one."""
        if self.operand.role == "result":
            return first_rounded(self.operand, self.rounds, x)
        return through(self.rounds, x) if self.owned else rounded(self.operand, self.rounds, x)


class FunctionTwin(nn.Module):
    """A function of a site, where a value that it computes on its way has a format.

    Args:
        operation: its name.
        function: the function.
        inner: what rounds the inner operands, by name.
    """

    def __init__(self, operation: str, function: Callable[..., Any], inner: Mapping[Operand, Rounds]) -> None:
        super().__init__()
        self.operation, self.function, self.inner = operation, function, dict(inner)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Same arguments, shapes and results as those of the function."""
        return called(OPERATIONS.get(self.operation), self.function, inputs, named, self.inner)


class Twin:
    """Mixin of quantized twins. A twin has the state and the name of the module, and is of a subclass of its class; its
    ``forward`` calls the operation with rounded operands.

    Attributes:
        formats: operand → what rounds it; operands that are missing stay in float.
        kept: filled by the calls, while parameters and formats stay the same; None where they may change.
    """

    formats: Mapping[str, Rounds]
    kept: Kept | None = None
    #: The class of the module without formats.
    original: ClassVar[type[nn.Module]]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Same arguments, shapes and results as in the original class."""
        module = cast(nn.Module, self)
        operation = twin_operation(module)
        assert operation is not None
        assert operation.call is not None
        if self.kept is not None and len(inputs) == 1 and not named:
            done = self.kept.directly(operation, module, self.formats, inputs[0])
            if done is not None:
                return rounded_result(operation.operands_in(module), self.formats, done)
        operands = self._operands(operation, inputs, named)
        known = None if self.kept is None else self.kept.products
        result = _called(operation, module, operands, self.formats, known)
        result = rounded_result(operation.operands_in(module), self.formats, result)
        if getattr(module, "inplace", False):
            # The module changes its input, which the model may read afterwards. A rounded input is another tensor.
            return (*inputs, *named.values())[0].copy_(result)
        return result

    def _operands(self, operation: Operation, inputs: Sequence[Any], named: Mapping[str, Any]) -> Operands:
        module, kept = cast(nn.Module, self), self.kept
        if kept is None:
            return operands_of(operation, module, inputs, named, self.formats)
        rounds = {operand: form for operand, form in self.formats.items() if operand not in kept.parameters}
        operands = operands_of(operation, module, inputs, named, rounds)
        if not kept.parameters:
            held = [o.name for o in operation.operands_in(module) if o.role not in ("activation", "inner")]
            kept.parameters.update({o: operands.values[o] for o in held if o in self.formats})
        return replace(operands, values={**operands.values, **kept.parameters})

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is created here and has no name under which pickle could import it.
        # Recurrent layers say themselves what of them can be copied.
        return _blank_twin, (self.original,), self.__getstate__()


def _called(
    operation: Operation,
    module: nn.Module,
    operands: Operands,
    rounds: Mapping[Operand, Rounds],
    known: KnownProducts | None,
) -> Any:
    """What the operation computes with its operands; a product in whole numbers where formats allow."""
    assert operation.call is not None
    rule, call = operation.product, operation.call
    if rule is None or module.training:
        return call(module, operands)

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        values = {**operands.values, "data_in": x, "weight": weight, "bias": bias}
        result: Tensor = call(module, replace(operands, values=values))
        return result

    given = operands["data_in"], operands["weight"], operands.get("bias")
    return product(rule, compute, given, formats_of(rounds), module=module, known=known)


class ProductCall(nn.Module):
    """A function that sums products, as a module: in evaluation it computes in whole numbers where formats allow.

    Args:
        operation: of the function.
        function: the function, or the name of a method.
        formats: of its input and its weight, which are rounded before.
        flows: whether its weight depends on the samples.
    """

    def __init__(
        self, operation: Operation, function: Any, formats: tuple[Format | None, Format | None], flows: bool
    ) -> None:
        super().__init__()
        self.operation, self.function = operation.name, function
        self.formats, self.flows = formats, flows

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Same arguments and result as the function."""
        if self.training:
            return called_function(self.function, args, kwargs)
        return function_product(OPERATIONS.get(self.operation), self.function, args, kwargs, self.formats, self.flows)


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
    """A new model that computes like `graph.model`, with the given formats at its sites.

    Args:
        graph: the captured model.
        formats: site name → formats by operand, calibrated; sites and operands that are missing stay in float. A name
            of several operands of a site stands for those of them that are missing.
        corrections: site name → its corrections; only for sites that have formats.
        bake: write the quantized weights and biases into the parameters; not into those that the model's code reads
            beside, which are needed in float.

    Returns:
        A model in evaluation mode, with new parameters. It has the class of the original, or is an ``fx.GraphModule``
        if a functional site, or one of several calls of a shared module, is quantized.
    """
    graph = graph.naming(formats)
    wanted = {site.name: site.for_operands(formats[site.name]) for site in graph.sites if site.name in formats}
    return rebuilt(graph, wanted, corrections or {}, bake)


def rebuilt(
    graph: Graph,
    rounds: Mapping[str, Mapping[Operand, Rounds]],
    corrections: Mapping[str, Correction],
    bake: bool = False,
) -> nn.Module:
    """Like ``quantize``, for formats, learned ranges and observers."""
    graph, model = graph.naming(rounds), copy.deepcopy(graph.model)
    for correction in corrections.values():
        for path, (mean, variance) in correction.norms.items():
            norm = model.get_submodule(path)
            norm.running_mean, norm.running_var = mean.clone(), variance.clone()
    replaced = {name: correction.parameters for name, correction in corrections.items()}
    touched = [site for site in graph.sites if rounds.get(site.name)]
    in_graph: list[Site] = []
    shared: Baked = {}
    for site in touched:
        if not graph.is_rewritten_for(site):
            baked = [o for o, name in site.operand_parameters if bake and name not in graph.read_by_code]
            # In its place, not a copy: the model may hold the module under other names and in lists too.
            given = replaced.get(site.name, {})
            _make_twin(model.get_submodule(site.path), site, rounds[site.name], given, baked, shared)
        else:
            in_graph.append(site)
    if in_graph and graph.fx_graph is None:
        replace_calls(model, in_graph, rounds)
        return model
    return _rewrite(model, graph, in_graph, rounds, replaced, bake) if in_graph else model


def twin_of(
    module: nn.Module,
    site: Site,
    rounds: Mapping[Operand, Rounds],
    replaced: Mapping[Operand, Tensor] | None = None,
    baked: Iterable[Operand] = (),
) -> nn.Module:
    """The quantized twin of the module of a site: the same parameters, hooks and children, other arithmetic.

    Args:
        replaced: operand → what takes the place of its parameter; the others are kept.
        baked: operands whose parameters are replaced by new ones that hold the quantized values.
    """
    twin = copy.copy(module)
    # What the copy gets must not be seen in the module.
    twin._parameters, twin._modules = dict(module._parameters), dict(module._modules)
    twin._forward_hooks = copy.copy(module._forward_hooks)
    for name in {site.operand(o).held_as.partition(".")[0] for o, _ in site.operand_parameters}:
        if isinstance(child := module._modules.get(name), nn.Module):
            twin._modules[name] = child = copy.copy(child)
            child._parameters = dict(child._parameters)
    _make_twin(twin, site, rounds, replaced, baked)
    return twin


#: What was baked: (id of a parameter, what rounded it) → that parameter, and the one with the rounded values.
Baked = dict[tuple[int, Rounds], tuple[nn.Parameter, nn.Parameter]]


def _make_twin(
    module: Any,
    site: Site,
    rounds: Mapping[Operand, Rounds],
    replaced: Mapping[Operand, Tensor] | None = None,
    baked: Iterable[Operand] = (),
    shared: Baked | None = None,
) -> None:
    """Change a module into its quantized twin; arguments as for ``twin_of``.

    Args:
        shared: what was baked before in this model, and now is. Modules that share a parameter, and its format, share
            the baked one.
    """
    shared = {} if shared is None else shared
    assert site.operation.call is not None
    module.__class__ = twin_class(type(module))
    module.formats = dict(rounds)
    for operand, value in (replaced or {}).items():
        module._parameters[operand] = _in_place_of(getattr(module, operand), value)
    for operand in baked:
        spec, rounding = site.operand(operand), rounds.get(operand)
        parameter = spec.held_by(module)
        if parameter is None or rounding is None:
            continue
        key = id(parameter), rounding
        if key not in shared:
            with torch.no_grad():
                quantized = rounding.quantize(parameter)
            shared[key] = cast(nn.Parameter, parameter), _in_place_of(parameter, quantized)
        path, _, name = spec.held_as.rpartition(".")
        module.get_submodule(path)._parameters[name] = shared[key][1]


def _attribute(model: nn.Module, target: str) -> Any:
    path, _, name = target.rpartition(".")
    return getattr(model.get_submodule(path), name)


def _in_place_of(original: Any, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.clone(), requires_grad=original.requires_grad)


def _replace(node: fx.Node, spec: OperandSpec, given: Any) -> None:
    """Give a call another argument as its operand. Both inputs may be one node (x + x): by position, not by value."""
    args, kwargs = list(node.args), dict(node.kwargs)
    spec.put_into(args, kwargs, given)
    node.args, node.kwargs = tuple(args), kwargs


def _round_each(model: nn.Module, node: fx.Node, spec: OperandSpec, rounding: Rounds, target: str) -> None:
    """Round each tensor of an operand that is a list, by one format."""
    held = {a for a in node.all_input_nodes if a.op == "get_attr"}
    given: Any = spec.taken_from(node.args, node.kwargs)
    model.add_module(target, Quantizer(rounding))
    if held:
        model.add_module(f"{target}_of_parameters", Quantizer(rounding, owned=True))
    with node.graph.inserting_before(node):
        listed = [node.graph.call_module(f"{target}_of_parameters" if a in held else target, (a,)) for a in given]
    _replace(node, spec, type(given)(listed))


def _round_result(model: nn.Module, node: fx.Node, site: Site, rounding: Rounds, changed: Any) -> None:
    """Round what a node gives, for all that take it.

    Args:
        changed: the argument that the function used to write its result into, and now does not; None if there is none.
    """
    target = f"{site.name}_{DATA_OUT}_quantizer"
    model.add_module(target, Quantizer(rounding, operand=site.operand(DATA_OUT)))
    with node.graph.inserting_after(node):
        result = node.graph.call_module(target, (node,))
    node.replace_all_uses_with(result, delete_user_cb=lambda user: bool(user is not result))
    if changed is not None:
        written_into(result, changed)


def _round_function(
    model: nn.Module,
    node: fx.Node,
    site: Site,
    rounds: Mapping[Operand, Rounds],
    replaced: Mapping[Operand, Tensor],
) -> None:
    """Round the operands and the result of a function, and let it compute in whole numbers where formats allow."""
    inplace, first = False, node.args[0] if node.args else None
    for operand, arguments in nodes_of_operands(node, site.operation).items():
        spec, rounding = site.operand(operand), rounds.get(operand)
        if spec.several:
            if rounding is not None:
                _round_each(model, node, spec, rounding, f"{site.name}_{operand}_quantizer")
            continue
        (argument,) = arguments
        given = argument
        value = replaced.get(operand)
        if value is not None:
            target = f"{site.name}_{operand}_corrected"
            model.register_parameter(target, _in_place_of(_attribute(model, str(argument.target)), value))
            with node.graph.inserting_before(node):
                given = node.graph.get_attr(target)
        if rounding is not None:
            target = f"{site.name}_{operand}_quantizer"
            model.add_module(target, Quantizer(rounding, argument.op == "get_attr", spec))
            changed = spec.position == 0 and without_change(node)
            inplace = inplace or changed
            with node.graph.inserting_before(node):
                # What rounding keeps for its gradients must not change with the argument.
                given = node.graph.call_method("clone", (given,)) if changed else given
                given = node.graph.call_module(target, (given,))
            if changed:
                written_into(node, argument)
        if given is argument:
            continue
        _replace(node, spec, given)
    rounding, changed_by_result = rounds.get(DATA_OUT), None
    if rounding is not None and not inplace and without_change(node):
        inplace, changed_by_result = True, first
    formats = (None, None) if site.operation.product is None else formats_of(rounds)
    inner, function = inner_rounds(site.specs, rounds), cast(Any, node.target)
    target = f"{site.name}_product"
    if inner:
        model.add_module(target, FunctionTwin(site.op, function, inner))
        node.op, node.target = "call_module", target
    elif formats != (None, None) and not inplace:
        model.add_module(target, ProductCall(site.operation, function, formats, site.flows("weight")))
        node.op, node.target = "call_module", target
    if rounding is not None:
        _round_result(model, node, site, rounding, changed_by_result)


def _rewrite(
    model: nn.Module,
    graph: Graph,
    sites: Iterable[Site],
    rounds: Mapping[str, Mapping[Operand, Rounds]],
    replaced: Mapping[str, Mapping[Operand, Tensor]],
    bake: bool,
) -> nn.Module:
    """A rewritten graph, for functional sites and for one of several calls of a shared module."""
    new, by_name = copied_graph(graph)
    for node in new.nodes:
        node.type = None  # an annotation of the user's forward may be text, which torch.fx cannot pickle
    for site in sites:
        node = by_name[site.name]
        if site.path:
            target = f"{site.name}_quantized"
            module, baked = model.get_submodule(site.path), [o for o, _ in site.operand_parameters] if bake else []
            model.add_module(target, twin_of(module, site, rounds[site.name], replaced.get(site.name), baked))
            node.target = target
            continue
        _round_function(model, node, site, rounds[site.name], replaced.get(site.name, {}))
    install(new, by_name, graph.switches)
    new.lint()
    return fx.GraphModule(model, new).eval()
