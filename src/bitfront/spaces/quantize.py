"""The space of mixed precision: which number format, with which parameters, for each operand of each site.

A site is a group; each format named for it is a branch (``NA``, which leaves the site in float, is one too); each
operand is a choice among complete settings, so that a width never meets a frac width that does not fit: settings whose
parameters contradict each other are left out when the space is built, and so are settings that mean the same.
A single configuration (``[passes.quantize]``, a trial's ``sampled_config``) is a space with one candidate.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bitfront.errors import ConfigError
from bitfront.formats import FORMATS
from bitfront.formats.base import FLOAT_BITS, Format, Operand
from bitfront.graph import Graph
from bitfront.spaces import SPACES
from bitfront.spaces.assignment import Alternative, Assignment, Setting
from bitfront.spaces.base import Codes
from bitfront.spaces.described import CandidateConfig
from bitfront.spaces.format_choices import Settings, read_choices
from bitfront.spaces.model_space import FormatSpace, Offer
from bitfront.spaces.request import SpaceRequest

#: How an operand without a choice is treated.
AS_IT_IS = Setting((), None)


@SPACES.register("graph/quantize/mixed_precision_ptq", "mixed_precision_ptq")
class QuantizationSpace(FormatSpace):
    """Number formats and bit-widths of every operand of every site."""

    def __init__(self, request: SpaceRequest, assignments: tuple[Assignment, ...] | None = None) -> None:
        self.graph = request.graph
        self._request = request
        self.assignments, self.unused = read_choices(request) if assignments is None else (assignments, ())
        super().__init__([a.described() for a in self.assignments])

    @classmethod
    def of_float(cls, graph: Graph) -> QuantizationSpace:
        """The space whose only candidate is the float model itself, for its row in the table."""
        return cls(SpaceRequest(graph, float_only=True))

    def quantization(self, graph: Graph) -> QuantizationSpace:
        """The same choices at the sites of `graph`."""
        return self if graph is self.graph else QuantizationSpace(replace(self._request, graph=graph))

    def offers(self) -> tuple[Offer, ...]:
        """Formats by operand, and how many pairs of parameters were left out."""
        found = []
        for assignment, group in zip(self.assignments, self.groups, strict=True):
            choices = []
            for alternative in assignment.alternatives:
                operands = [
                    f"{operand}: {' '.join(s.format.label if s.format else 'float' for s in settings)}"
                    for operand, settings in alternative.operands
                ]
                choices.append("float" if alternative.name == "NA" else f"{alternative.name} ({'; '.join(operands)})")
            if assignment.excluded:
                choices[-1] += f" ({assignment.excluded} left out, e.g. {assignment.why})"
            site = assignment.site
            found.append(Offer(site.name, site.type, assignment.key, " or ".join(choices), group.size))
        return tuple(found)

    @classmethod
    def of_formats(cls, graph: Graph, formats: Mapping[str, Mapping[Operand, Format]]) -> QuantizationSpace:
        """The space whose only candidate has the given formats, calibrated ones as they are: site name → operand →
        format."""
        assignments = []
        for site in graph.sites:
            own = formats.get(site.name, {})
            name = FORMATS.name_of(type(next(iter(own.values())))) if own else "NA"
            operands = tuple((operand, (Setting((), form),)) for operand, form in own.items())
            assignments.append(Assignment(site, "default", (Alternative(name, operands),)))
        return cls(SpaceRequest(graph, float_only=True), tuple(assignments))

    def encode(self, config: CandidateConfig) -> NDArray[np.int64]:
        """The code of a candidate spelled out.

        Raises:
            ConfigError: `config` is not of this space; the site and what it offers are named.
        """
        wanted = single(self.graph, config)
        formats = wanted.formats(np.zeros(len(wanted.groups), dtype=np.int64))
        options = np.zeros((1, len(self.groups)), dtype=np.int64)
        for g, assignment in enumerate(self.assignments):
            own = formats.get(assignment.site.name, {})
            for index, settings in enumerate(assignment.options()):
                if {o: s.format for o, s in settings if s.format is not None} == own:
                    options[0, g] = index
                    break
            else:
                described = ", ".join(f"{o} {f.label}" for o, f in own.items()) or "float"
                raise ConfigError(f"this space does not offer {described} at {assignment.site.title}")
        code: NDArray[np.int64] = self.codes(options)[0]
        return code

    @cached_property
    def site_formats(self) -> tuple[tuple[Mapping[Operand, Format], ...], ...]:
        """Per group and option: operand → format (not calibrated); an operand left in float is absent."""
        return tuple(
            tuple({o: s.format for o, s in settings if s.format is not None} for settings in own)
            for own in self._every_option
        )

    def bits(self, operand: Operand) -> list[NDArray[np.int64]]:
        """Bits of `operand` under each option, per group an array of shape (options,). Float and absent: 32."""
        return [
            np.array([dict(settings)[operand].bits if operand in dict(settings) else FLOAT_BITS for settings in own])
            for own in self._every_option
        ]

    def quantized(self, operand: Operand) -> list[NDArray[np.bool_]]:
        """Whether `operand` has a format under each option; per group an array of shape (options,)."""
        return [
            np.array([operand in dict(o) and dict(o)[operand].format is not None for o in own], dtype=bool)
            for own in self._every_option
        ]

    def storage(self) -> Iterator[tuple[str, int, NDArray[np.int64]]]:
        """(parameter, group, bytes under each option of the group) for every parameter with a format of its own.

        Scales are included, and a tensor ends on a whole byte. A parameter that several sites share comes up once per
        site.
        """
        first: dict[int, str] = {}
        # Tied parameters have several names, and are stored once.
        names = {
            name: first.setdefault(id(tensor), name)
            for name, tensor in self.graph.model.named_parameters(remove_duplicate=False)
        }
        for g, (assignment, own) in enumerate(zip(self.assignments, self._every_option, strict=True)):
            for operand in assignment.site.operands:
                parameter = assignment.site.parameter(operand)
                if parameter is not None:
                    name, shape = names.get(parameter[0], parameter[0]), parameter[1]
                    sizes = [dict(settings).get(operand, AS_IT_IS).stored_bytes(shape) for settings in own]
                    yield name, g, np.array(sizes, dtype=np.int64)

    def uniform(self) -> Codes:
        """Uniform-precision candidates: for every format and pair of a weight and an input width in the space, each
        site as near to that pair as it can get. Equal widths first; each candidate once."""
        rows = []
        names = dict.fromkeys(alt.name for a in self.assignments for alt in a.alternatives if alt.operands)
        for name in names:
            widths = {o: self._widths(name, o) for o in ("data_in", "weight")}
            pairs = itertools.product(widths["data_in"] or [0], widths["weight"] or [0])
            for data, weight in sorted(pairs, key=lambda p: (abs(p[0] - p[1]), p)):
                target = {"data_in": data, "weight": weight, "bias": max(data, weight)}
                rows.append([a.nearest_option(name, target) for a in self.assignments])
        if not rows:
            return np.zeros((0, len(self.parameters)), dtype=np.int64)
        codes = self.codes(np.array(rows, dtype=np.int64))
        first = {row.tobytes(): i for i, row in reversed(list(enumerate(codes)))}
        return codes[sorted(first.values())]

    def _widths(self, name: str, operand: Operand) -> list[int]:
        found = {
            s.bits
            for a in self.assignments
            for alternative in a.alternatives
            if alternative.name == name
            for o, settings in alternative.operands
            if o == operand
            for s in settings
            if s.format is not None
        }
        return sorted(found)

    @cached_property
    def _every_option(self) -> list[list[tuple[tuple[Operand, Setting], ...]]]:
        return [list(a.options()) for a in self.assignments]


def single(graph: Graph, config: CandidateConfig, where: tuple[str, ...] = ()) -> QuantizationSpace:
    """The space whose only candidate is `config` (``{"by": ..., key: {"config": {...}}}``).

    Raises:
        ConfigError: as for any space, or more than one candidate is described.
    """
    choices: dict[str, Settings] = {}
    for key, table in config.items():
        if key == "by":
            continue
        settings = table.get("config", table) if isinstance(table, Mapping) else None
        if not isinstance(settings, Mapping):
            raise ConfigError(f"{key!r} must be a table with a config", key=(*where, key))
        choices[key] = settings
    request = SpaceRequest(graph, str(config.get("by", "name")), choices, where)
    space = QuantizationSpace(replace(request, float_only=True))
    said = set(choices) - {"default", *space.unused}
    if not any(choices[key].get("name") in (None, "NA", ["NA"]) for key in said):
        # Nothing says that a site shall stay in float, as the candidate that quantizes nothing does.
        space = QuantizationSpace(request)
    if space.size != 1:
        free = ", ".join(p.name for p in space.parameters)
        raise ConfigError(f"one configuration is needed, and this leaves a choice at {free}", key=where)
    return space
