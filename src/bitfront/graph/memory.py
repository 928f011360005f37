"""The tensors that a model stores, each once, and who uses them in which way.

Several names may be one tensor (tied weights), and several tensors may be one memory: a view of a part, a transpose, an
expanded vector. What is deployed stores that memory once, in a form that is good enough for everybody who uses it. So
each user is found: a site's operand, which holds the tensor in a format (also through a view such as ``weight.t()``),
or somebody else, who takes it in float.

Copying a model makes tensors of their own of what shares memory. So a captured copy remembers the places that the
user's tensors had; they count as long as the values there agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from bitfront.formats.base import Operand
from bitfront.graph.base import Graph, Node, Site
from bitfront.operations.base import Role, Shape, free
from bitfront.operations.lookup import nodes_of_operands, of_node

#: Where a captured copy holds the places: name → (number of the memory, its elements, offset, shape, strides).
_PLACES = "_bitfront_places"
Place = tuple[int, int, int, Shape, Shape]
#: Whose values can be compared; others are taken to be tensors of their own.
_COMPARED = frozenset(
    (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64)
)


@dataclass(frozen=True)
class TensorUse:
    """A site's operand that holds a stored tensor, in the format that the site has for it.

    Attributes:
        shape: as the site sees it.
        role: of the operand.
    """

    site: str
    operand: Operand
    shape: Shape
    role: Role


@dataclass(frozen=True)
class StoredTensor:
    """What a model stores of one or more of its parameters and buffers that share memory.

    Attributes:
        names: all of them, the first one first.
        elements: how many values are stored.
        itemsize: bytes of a value as it is in the model.
        parameter: whether one of them is a parameter.
        uses: who holds it in a format.
        floats: nodes that use it as it is.
    """

    names: tuple[str, ...]
    elements: int
    itemsize: int
    parameter: bool
    uses: tuple[TensorUse, ...]
    floats: tuple[str, ...]

    @property
    def as_it_is(self) -> bool:
        """Whether it is stored as it is in the model: somebody uses it so, or nobody uses it in a format."""
        return bool(self.floats) or not self.uses


def remember_places(model: nn.Module, copied: nn.Module) -> None:
    """Write into a copy of a model which of the model's tensors share memory, or repeat a part of it."""
    if _PLACES in vars(copied):
        return  # the model is a copy itself, and has it from there
    memories: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _tensors(model).items():
        if not is_lazy(tensor) and tensor.layout == torch.strided and tensor.dtype in _COMPARED and tensor.numel():
            memories.setdefault(tensor.untyped_storage().data_ptr(), {})[name] = tensor
    places: dict[str, Place] = {}
    for number, sharing in enumerate(memories.values()):
        if len({t.dtype for t in sharing.values()}) == 1 and _meet(list({id(t): t for t in sharing.values()}.values())):
            for name, t in sharing.items():
                elements = t.untyped_storage().nbytes() // t.element_size()
                places[name] = (number, elements, int(t.storage_offset()), tuple(t.shape), tuple(t.stride()))
    if places:
        vars(copied)[_PLACES] = places


def _meet(tensors: list[Tensor]) -> bool:
    """Whether tensors of one memory may overlap, or one of them repeats a value."""
    extents = sorted(
        (t.storage_offset(), t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)))
        for t in tensors
    )
    repeated = any(s == 0 and n > 1 for t in tensors for n, s in zip(t.shape, t.stride(), strict=True))
    return repeated or any(start <= last for (_, last), (start, _) in itertools.pairwise(extents))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, under all names."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {n: t for n, t in named if not n.endswith("num_batches_tracked")}


@lru_cache(maxsize=8)
def stored_tensors(graph: Graph) -> tuple[StoredTensor, ...]:
    """Every tensor that a captured model stores, once.

    BatchNorm's counter of steps is left out, because it is not deployed.
    """
    tensors = _tensors(graph.model)
    uses: dict[str, list[TensorUse]] = {}
    floats: dict[str, list[str]] = {}
    for name, use in _uses(graph):
        if isinstance(use, TensorUse):
            uses.setdefault(name, []).append(use)
        else:
            floats.setdefault(name, []).append(use)
    for name, tensor in tensors.items():
        if not isinstance(tensor, nn.Parameter) and name not in uses and name not in floats:
            floats[name] = ["the model's code"]  # tracers compute what depends on buffers alone, and lose who did
    found = []
    for names, elements in _memories(graph.model, tensors):
        found.append(
            StoredTensor(
                names,
                elements,
                tensors[names[0]].element_size(),
                any(isinstance(tensors[name], nn.Parameter) for name in names),
                tuple(dict.fromkeys(use for name in names for use in uses.get(name, ()))),
                tuple(dict.fromkeys(user for name in names for user in floats.get(name, ()))),
            )
        )
    return tuple(found)


def _memories(model: nn.Module, tensors: dict[str, Tensor]) -> Iterator[tuple[tuple[str, ...], int]]:
    """(the names of what is one memory, how many values that has)."""
    same: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        same.setdefault(id(tensor), []).append(name)
    places: dict[str, Place] = vars(model).get(_PLACES, {})
    shared: dict[int, list[tuple[tuple[str, ...], Place]]] = {}
    for names in same.values():
        place = places.get(names[0])
        if place is not None and place[3] == tuple(tensors[names[0]].shape):
            shared.setdefault(place[0], []).append((tuple(names), place))
        else:
            yield tuple(names), tensors[names[0]].numel()
    for members in shared.values():
        yield from _overlapping(members, tensors)


def _overlapping(
    members: list[tuple[tuple[str, ...], Place]], tensors: dict[str, Tensor]
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Members of one memory, those together that overlap and agree there."""
    size = members[0][1][1]
    owner = np.full(size, -1)
    values = np.zeros(size, dtype=_numpy(tensors[members[0][0][0]]).dtype)
    groups: list[list[int]] = []
    for number, (names, (_, _, offset, shape, strides)) in enumerate(members):
        mine = _numpy(tensors[names[0]])
        met = {int(g) for g in np.unique(_view(owner, offset, shape, strides)) if g >= 0}
        taken = _view(owner, offset, shape, strides) >= 0
        seen = _view(values, offset, shape, strides)
        if not np.array_equal(seen[taken], mine[taken]):
            yield names, mine.size  # it was written to since: it is a tensor of its own now
            continue
        _view(values, offset, shape, strides)[...] = mine
        groups.append([number, *(n for g in met for n in groups[g])])
        for g in met:
            groups[g] = []
            owner[owner == g] = len(groups) - 1
        _view(owner, offset, shape, strides)[...] = len(groups) - 1
    for g, numbers in enumerate(groups):
        if numbers:
            yield tuple(name for n in sorted(numbers) for name in members[n][0]), int((owner == g).sum())


def _numpy(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _view(memory: Any, offset: int, shape: Shape, strides: Shape) -> Any:
    return as_strided(memory[offset:], shape, tuple(s * memory.itemsize for s in strides))


def _use(site: Node, operand: Operand, shape: Shape) -> TensorUse:
    assert isinstance(site, Site)
    return TensorUse(site.name, operand, shape, site.operand(operand).role)


def _uses(graph: Graph) -> Iterator[tuple[str, TensorUse | str]]:
    """(name of a parameter or buffer, a use in a format, or the name of a node that takes it as it is)."""
    sites = {site.name: site for site in graph.sites}
    for node in graph.nodes:
        if graph.fx_graph is not None and not node.path:
            continue  # functions are looked at below
        held = dict(node.operand_parameters) if isinstance(node, Site) else {}
        shapes = dict(node.shapes) if isinstance(node, Site) else {}
        for name in node.parameters:
            operands = [operand for operand, parameter in held.items() if parameter == name]
            yield from ((name, _use(node, operand, shapes[operand])) for operand in operands)
            if not operands:
                yield name, node.name
        if node.path:
            path = f"{node.path}."
            yield from ((path + name, node.name) for name, _ in graph.model.get_submodule(node.path).named_buffers())
    for node in () if graph.fx_graph is None else graph.fx_graph.nodes:
        if node.op == "get_attr":
            yield from ((str(node.target), use) for use in _users(node, graph, sites))


def _users(node: fx.Node, graph: Graph, sites: dict[str, Site]) -> Iterator[TensorUse | str]:
    """Who uses a tensor of a traced graph, also through views of it."""
    for user in node.users:
        site = sites.get(user.name)
        if site is not None:
            shapes = dict(site.shapes)  # of weights, biases and states: what flows in is no stored tensor
            given = [o for o, nodes in nodes_of_operands(user, site.operation).items() if node in nodes]
            yield from (_use(site, o, shapes[o]) if o in shapes else user.name for o in given)
            if user.all_input_nodes.count(node) and not given:
                yield user.name
            continue
        operation = of_node(user, graph.model)
        shows = operation is not None and (operation.view or operation.count is free)
        if shows and user.all_input_nodes == [node]:
            yield from _users(user, graph, sites)
        else:
            yield user.name
