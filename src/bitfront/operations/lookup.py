"""From a module, a function or a node of a graph to the record of its operation."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as _modules

from bitfront.operations import OPERATIONS
from bitfront.operations.base import Call, Count, Operation, Shape

#: Packages whose functions can be recognised by name. A user's function may have any name.
LIBRARIES = ("torch", "operator", "_operator", "torchvision", "timm", "transformers")


@dataclass(frozen=True)
class _Index:
    modules: Mapping[type[nn.Module], Operation]
    module_names: Mapping[str, Operation]
    functions: Mapping[object, Operation]
    names: Mapping[str, Operation]
    sites: Mapping[str, Operation]
    operand_names: tuple[str, ...]


@lru_cache(maxsize=2)
def _index(version: int) -> _Index:  # noqa: ARG001  (a new record changes the version)
    modules: dict[type[nn.Module], Operation] = {}
    module_names: dict[str, Operation] = {}
    functions: dict[object, Operation] = {}
    names: dict[str, Operation] = {}
    tables: tuple[tuple[dict[Any, Operation], str], ...] = (
        (modules, "modules"),
        (module_names, "module_names"),
        (functions, "functions"),
        (names, "names"),
    )
    known = [OPERATIONS.get(name) for name in OPERATIONS.names()]
    for operation in known:
        for table, field in tables:
            for key in getattr(operation, field):
                if table.get(key, operation) is not operation:
                    raise ValueError(f"{key!r} is in two operations: {table[key].name} and {operation.name}")
                table[key] = operation
    sites = {operation.name: operation for operation in known if operation.operands}
    operands = {name for operation in sites.values() for name in operation.formatted}
    usual = [name for name in ("data_in", "weight", "bias") if name in operands]
    return _Index(modules, module_names, functions, names, sites, (*usual, *sorted(operands.difference(usual))))


def _known() -> _Index:
    OPERATIONS.load()
    return _index(OPERATIONS.version)


def of_module(module: nn.Module) -> Operation | None:
    """The operation of a module; None for one without a record, or one that computes something else than its record
    says (``departure``). Hooks around the module (``hooks``) do not count: whoever calls the module runs them."""
    operation = of_class(type(module))
    return None if operation is None or departure(module) else operation


def unusual(module: nn.Module) -> str:
    """What a module does beside the ``forward`` of the class that its record names, in words; empty for nothing.

    This is the one place that knows. A module with a ``departure`` has no record; one with ``hooks`` has a record and
    must be called as a module, so that they run.
    """
    return departure(module) or hooks(module)


def hooks(module: nn.Module) -> str:
    """The hooks that run with a module's ``forward``, those of all modules included, in words; empty for none."""
    kinds = (
        ("forward pre-hook", module._forward_pre_hooks),
        ("forward hook", module._forward_hooks),
        ("forward pre-hook of all modules", _modules._global_forward_pre_hooks),
        ("forward hook of all modules", _modules._global_forward_hooks),
    )
    names = [f"a {kind} ({_name_of(hook)})" for kind, own in kinds for hook in own.values()]
    return f"it has {' and '.join(names)}" if names else ""


def _name_of(hook: object) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__name__)).rpartition("<locals>.")[2]


def departure(module: nn.Module) -> str:
    """Why a module computes something else than the record of its class, or of the class it is derived from, says, in
    words; empty where it does not, and for a class without a record."""
    base = _recorded_base(type(module))
    operation = _listed(base)
    if operation is None:
        return ""
    used = _used_names(base)
    for name, value in vars(module).items():
        if name in used and callable(value) and hasattr(base, name):
            return f"its {name} was replaced on this one module"
    kind: Any = type(module)
    overridden = _overridden(kind, base)
    if overridden:
        return f"its class {kind.__name__} overrides {overridden} of {base.__name__}"
    for operand in operation.operands_in(module) if operation.by_default else ():
        if operand.held_by(module) is not None:
            path, _, name = operand.held_as.rpartition(".")
            holder = module.get_submodule(path)
            if name not in holder._parameters:
                kept = "a buffer" if name in holder._buffers else "a tensor that something else computes"
                return f"its {operand.held_as} is no parameter, but {kept}"
    return "" if operation.refuses is None else operation.refuses(Call(operation.name, (), (), module=module))


def _recorded_base(kind: type[nn.Module]) -> Any:
    """The nearest class with a record that a class is derived from; itself, if it has one; None without one."""
    return next((base for base in kind.__mro__ if _listed(base) is not None), None)


def _listed(kind: Any) -> Operation | None:
    """The operation whose record names a class, by itself or by its full name; None if no record does."""
    table = _known()
    operation = table.modules.get(kind)
    if operation is None and kind is not None:
        operation = table.module_names.get(f"{kind.__module__}.{kind.__qualname__}")
    return operation


def operation_it_resembles(module: nn.Module) -> Operation | None:
    """The operation of the class that a module is derived from, whatever it does beside; None without one."""
    return _listed(_recorded_base(type(module)))


@lru_cache(maxsize=1024)
def _used_names(base: Any) -> frozenset[str]:
    """Names of everything that the ``forward`` of a class looks up, and the helpers that it calls."""
    names, todo = {"forward"}, ["forward"]
    while todo:
        code = getattr(inspect.getattr_static(base, todo.pop(), None), "__code__", None)
        new = set(code.co_names if code is not None else ()) - names
        names |= new
        todo += sorted(new)
    return frozenset(names)


#: What calls ``forward``, and how attributes are looked up.
_MACHINERY = frozenset(("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__"))


@lru_cache(maxsize=1024)
def _overridden(kind: Any, base: Any) -> str:
    """The first method or property that a class has in place of one that the ``forward`` of its base uses."""
    wanted = _used_names(base) | _MACHINERY
    for between in kind.__mro__[: kind.__mro__.index(base)]:
        for name, value in vars(between).items():
            if name in wanted and (callable(value) or hasattr(value, "__get__")):
                return str(name)
    return ""


def is_leaf(module: nn.Module) -> bool:
    """Whether tracers take a module as one node, instead of tracing into it, because a record has its class."""
    return of_module(module) is not None and _listed(type(module)) is not None


def of_class(kind: Any) -> Operation | None:
    """The operation of the modules of a class; None without a record, or where it overrides what its base computes."""
    base = _recorded_base(kind)
    return None if base is None or _overridden(kind, base) else _listed(base)


def of_function(function: object) -> Operation | None:
    """The operation of a function, or of a method of tensors given by its name; None for one without a record."""
    table = _known()
    try:
        exact = table.functions.get(function)
    except TypeError:  # not hashable
        exact = None
    if exact is not None:
        return exact
    return table.names.get(bare(function)) if _of_library(function) else None


def _of_library(function: object) -> bool:
    if isinstance(function, (str, BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType)):
        return True
    package = (getattr(function, "__module__", None) or "torch").partition(".")[0]
    return package in LIBRARIES


def of_node(node: fx.Node, model: nn.Module) -> Operation | None:
    """The operation of a node of a traced graph; None for a module with hooks: the node does more than the record says,
    and nothing but a call of the module does the same."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        return None if hooks(module) else of_module(module)
    if node.op == "call_method":
        return of_function(str(node.target))
    return of_function(node.target) if node.op == "call_function" else None


def bare(function: object) -> str:
    """A function's name: ``__iadd__``, ``add_`` and ``add`` give ``iadd``, ``add`` and ``add``. Those of torch.special
    are called ``special_softmax``: without the first part."""
    name = str(getattr(function, "__name__", function))
    if getattr(function, "__module__", None) == torch.special.softmax.__module__:
        name = name.removeprefix("special_")
    return name.strip("_") or name


def module_name(module: nn.Module) -> str:
    """The name of a module's operation; without a record, that of its class in lower case."""
    operation = of_module(module)
    return operation.name if operation is not None else type(module).__name__.lower()


def function_name(function: object) -> str:
    """The name of a function's operation if that can be a site; otherwise the name of the function."""
    operation = of_function(function)
    return operation.name if operation is not None and operation.operands else bare(function)


def count(call: Call, operation: Operation | None) -> Count | None:
    """The count of a call on the whole batch; None if no rule covers it."""
    return operation.count(call) if operation is not None and operation.count is not None else None


def sites() -> Mapping[str, Operation]:
    """The operations that can be sites, by name, sorted."""
    return _known().sites


def operand_names() -> tuple[str, ...]:
    """All operands of any operation with a separate format; data_in, weight and bias first."""
    return _known().operand_names


def shapes_in(value: object) -> tuple[Shape, ...]:
    """Shapes of the tensors in a value that may be nested, in order."""
    return tuple(tuple(t.shape) for t in tensors_in(value))


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in lists, tuples and mappings (such as transformers' outputs), in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)


def operand_nodes(node: fx.Node, operation: Operation) -> dict[str, fx.Node]:
    """Operand → the graph node that computes it, for a function or method; without operands that are lists."""
    several = {operand.name for operand in operation.operands if operand.several}
    return {name: nodes[0] for name, nodes in nodes_of_operands(node, operation).items() if name not in several}


def nodes_of_operands(node: fx.Node, operation: Operation) -> dict[str, tuple[fx.Node, ...]]:
    """Operand → the graph nodes that compute it, for a function or method: one, or those of the list that it is."""
    nodes: dict[str, tuple[fx.Node, ...]] = {}
    for operand in operation.operands:
        if operand.role == "inner":
            continue
        value = operand.taken_from(node.args, node.kwargs)
        if operand.several:
            listed = tuple(v for v in value if isinstance(v, fx.Node)) if isinstance(value, (list, tuple)) else ()
            if listed and len(listed) == len(value):
                nodes[operand.name] = listed
        elif isinstance(value, fx.Node):
            nodes[operand.name] = (value,)
    return nodes
