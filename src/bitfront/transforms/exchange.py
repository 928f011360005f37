"""One copy of a model whose sites change their formats, for candidates that are run one after the other.

``transforms.quantize`` makes a new model for each candidate. Here a module of one copied model becomes what it is in
the next candidate: the class and the attributes of its quantized twin are put into it. Each twin is made once, and
keeps its rounded weights. The model computes what the model of ``transforms.quantize`` computes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bitfront.formats.base import Format, Operand
from bitfront.graph import Graph, Site
from bitfront.operations.base import Rounds
from bitfront.transforms.correct import Correction
from bitfront.transforms.direct import Kept
from bitfront.transforms.functions import replace_calls
from bitfront.transforms.quantize import twin_of

#: What twins may keep where nothing else is said, in bytes.
KEPT_BYTES = 1 << 30

#: The formats of a site's operands, sorted by operand.
_Key = tuple[tuple[Operand, Format], ...]


class Exchange:
    """A copy of a captured model in which formats can be exchanged.

    Args:
        graph: the captured model, which is not changed.
        sites: those that get formats; none that needs a rewritten graph.
        device: where the copy lies.
        before: is given a site that is a function before it is called; a site that is a module is not.
        room: twins keep their rounded weights up to this size, in bytes; beyond it they are made again.

    Attributes:
        model: the copy, in evaluation mode. It is one model: what it computes changes with ``put``.
    """

    def __init__(
        self,
        graph: Graph,
        sites: Sequence[Site],
        device: str,
        before: Callable[[Site], None],
        room: int = KEPT_BYTES,
    ) -> None:
        self._room = room
        self.model = copy.deepcopy(graph.model).to(device)
        self._device = device
        #: The formats of functions, which their calls look up.
        self._functions: dict[str, dict[Operand, Rounds]] = {site.name: {} for site in sites if not site.path}
        if self._functions:
            replace_calls(self.model, [s for s in sites if not s.path], self._functions, before)
        self._float = {site.name: _Lender.of(self.model.get_submodule(site.path)) for site in sites if site.path}
        self._in_place: dict[str, _Lender] = dict(self._float)
        self._twins: dict[tuple[str, _Key], _Lender] = {}
        self._kept: dict[tuple[str, _Key], Kept] = {}
        self._bytes = 0

    def put(self, site: Site, formats: Mapping[Operand, Format], correction: Correction | None = None) -> None:
        """Give a site these formats, and take away those that it had.

        Args:
            site: one of the sites, or a function that never has formats.
            formats: calibrated; operands that are missing stay in float, and all of them do where there is none.
            correction: of its parameters; it follows from the formats.
        """
        if not site.path:
            if site.name in self._functions:
                self._functions[site.name].clear()
                self._functions[site.name].update(site.for_operands(formats))
            return
        lender = self._twin(site, site.for_operands(formats), correction) if formats else self._float[site.name]
        lender.lend(self.model.get_submodule(site.path), self._in_place[site.name])
        self._in_place[site.name] = lender

    def _twin(self, site: Site, formats: Mapping[Operand, Format], correction: Correction | None) -> _Lender:
        given = {} if correction is None else correction.parameters
        replaced = {operand: value.to(self._device) for operand, value in given.items()}
        key = site.name, _key(formats)
        if key not in self._twins:
            if self._bytes > self._room:
                self._twins.clear()
                self._kept.clear()
                self._bytes = 0
            twin: Any = twin_of(self._float[site.name].module(), site, formats, replaced)
            held = dict(site.operand_parameters)
            of_parameters = site.name, _key({o: f for o, f in formats.items() if o in held})
            if of_parameters not in self._kept:
                self._kept[of_parameters] = Kept(direct={})
                # The rounded weight, and the whole numbers that products are computed with.
                self._bytes += 2 * sum(_bytes(twin, operand) for operand in held)
            twin.kept = self._kept[of_parameters]
            self._twins[key] = _Lender.of(twin)
        return self._twins[key]


class _Lender:
    """The class and the attributes of a module, which another one can take."""

    def __init__(self, kind: type[nn.Module], attributes: dict[str, Any]) -> None:
        self.kind, self.attributes = kind, attributes

    @classmethod
    def of(cls, module: nn.Module) -> _Lender:
        return cls(type(module), dict(vars(module)))

    def module(self) -> nn.Module:
        """A module with them."""
        module = self.kind.__new__(self.kind)
        vars(module).update(self.attributes)
        return module

    def lend(self, module: nn.Module, before: _Lender) -> None:
        """Let a module have them, in place of those that it has from `before`."""
        for name in before.attributes.keys() - self.attributes.keys():
            vars(module).pop(name, None)
        module.__class__ = self.kind
        vars(module).update(self.attributes)


def _key(formats: Mapping[Operand, Format]) -> _Key:
    return tuple(sorted(formats.items(), key=lambda item: item[0]))


def _bytes(module: nn.Module, operand: Operand) -> int:
    held = getattr(module, operand, None)
    return held.numel() * held.element_size() if isinstance(held, Tensor) else 0
