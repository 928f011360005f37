"""The space of mixed precision: a number format, with its parameters, for each operand of each site.

A site is a group. Each format named for it is a branch; so is ``NA``, which leaves the site in float. Each operand is a
choice among complete settings. Settings whose parameters contradict each other, such as a width with a frac width that
does not fit, are left out when the space is built; of settings that mean the same format, one is kept. A single
configuration (``[passes.quantize]``, a trial's ``sampled_config``) is a space with one candidate.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import cast, get_args

import numpy as np
from numpy.typing import NDArray

from bitfront.errors import ConfigError, one_of
from bitfront.formats import FORMATS
from bitfront.formats.base import FLOAT_BITS, Format, Operand
from bitfront.graph import Graph
from bitfront.spaces import SPACES
from bitfront.spaces.assignment import FLOAT, Alternative, Assignment, Setting
from bitfront.spaces.base import Codes
from bitfront.spaces.described import CandidateConfig
from bitfront.spaces.format_choices import Settings, read_choices
from bitfront.spaces.model_space import FormatSpace, Offer
from bitfront.spaces.request import DefaultFor, SpaceRequest


@SPACES.register("graph/quantize/mixed_precision_ptq", "mixed_precision_ptq")
class QuantizationSpace(FormatSpace):
    """Number formats and bit-widths of every operand of every site."""

    def __init__(self, request: SpaceRequest, assignments: tuple[Assignment, ...] | None = None) -> None:
        self._request = request
        if assignments is None:
            self.graph, self.assignments, self.unused = read_choices(request)
        else:
            self.graph, self.assignments, self.unused = request.graph, assignments, ()
        super().__init__([a.described() for a in self.assignments])

    @classmethod
    def of_float(cls, graph: Graph) -> QuantizationSpace:
        """The space whose only candidate is the float model."""
        request = SpaceRequest(graph, float_only=True)
        return cls(request, tuple(Assignment(site, "default", (FLOAT,)) for site in graph.sites))

    def quantization(self, graph: Graph) -> QuantizationSpace:
        """The same choices at the sites of `graph`."""
        if graph is self.graph or graph is self._request.graph:
            return self
        return QuantizationSpace(replace(self._request, graph=graph))

    def offers(self) -> tuple[Offer, ...]:
        """What the space offers at each site: formats by operand, and the number of settings that were left out."""
        offers = []
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
            offers.append(Offer(site.name, site.type, assignment.key, " or ".join(choices), group.size))
        return tuple(offers)

    @classmethod
    def of_formats(cls, graph: Graph, formats: Mapping[str, Mapping[Operand, Format]]) -> QuantizationSpace:
        """The space whose only candidate has the given formats.

        Args:
            graph: the captured model.
            formats: site name → operand → format. Calibrated formats are not calibrated again.
        """
        graph = graph.naming(formats)
        return cls.of_options(graph, [[formats.get(site.name, {})] for site in graph.sites])

    @classmethod
    def of_options(cls, graph: Graph, options: Sequence[Sequence[Mapping[Operand, Format]]]) -> QuantizationSpace:
        """The space that offers given formats.

        Args:
            graph: the captured model.
            options: per site, per option: operand → format; empty: float. Calibrated formats are not calibrated again.
        """
        assignments = []
        for site, of_site in zip(graph.sites, options, strict=True):
            alternatives = []
            for by_operand in of_site:
                name = FORMATS.name_of(type(next(iter(by_operand.values())))) if by_operand else "NA"
                operands = tuple((operand, (Setting((), form),)) for operand, form in by_operand.items())
                alternatives.append(Alternative(name, operands))
            assignments.append(Assignment(site, "default", tuple(alternatives)))
        return cls(SpaceRequest(graph, float_only=True), tuple(assignments))

    def encode(self, config: CandidateConfig) -> NDArray[np.int64]:
        """The code of a candidate spelled out, int64, shape (parameters,).

        Raises:
            ConfigError: `config` is not a candidate of this space; the message names the site and the formats.
        """
        wanted = single(self.graph, {"default_for": self._request.default_for, **config})
        formats = wanted.formats(np.zeros(len(wanted.groups), dtype=np.int64))
        unknown = formats.keys() - {site.name for site in self.sites}
        if unknown:
            raise ConfigError(f"this space offers no formats at {self.graph.site(min(unknown)).title}")
        options = np.zeros((1, len(self.groups)), dtype=np.int64)
        for g, assignment in enumerate(self.assignments):
            by_operand = formats.get(assignment.site.name, {})
            for index, settings in enumerate(assignment.options()):
                if {o: s.format for o, s in settings if s.format is not None} == by_operand:
                    options[0, g] = index
                    break
            else:
                described = ", ".join(f"{o} {f.label}" for o, f in by_operand.items()) or "float"
                raise ConfigError(f"this space does not offer {described} at {assignment.site.title}")
        code: NDArray[np.int64] = self.codes(options)[0]
        return code

    @cached_property
    def site_formats(self) -> tuple[tuple[Mapping[Operand, Format], ...], ...]:
        """Per group and option: operand → format (not calibrated); an operand left in float is absent."""
        return tuple(
            tuple({o: s.format for o, s in settings if s.format is not None} for settings in options)
            for options in self._options
        )

    def bits(self, operand: Operand) -> list[NDArray[np.int64]]:
        """Bits of `operand` under each option; per group an int64 array of shape (options,). 32 if it is in float, or
        if the site has no such operand."""
        return [
            np.array(
                [dict(settings)[operand].bits if operand in dict(settings) else FLOAT_BITS for settings in options]
            )
            for options in self._options
        ]

    def quantized(self, operand: Operand) -> list[NDArray[np.bool_]]:
        """Whether `operand` has a format under each option; per group a bool array of shape (options,)."""
        return [
            np.array([operand in dict(o) and dict(o)[operand].format is not None for o in options], dtype=bool)
            for options in self._options
        ]

    def uniform(self) -> Codes:
        """Uniform-precision candidates: one per format and pair of input and weight bits in the space.

        Each site takes the option that is nearest to that pair. Pairs of equal bits come first.

        Returns:
            Canonical codes, int64, shape (candidates, parameters), each once.
        """
        rows = []
        names = dict.fromkeys(alt.name for a in self.assignments for alt in a.alternatives if alt.operands)
        for name in names:
            inputs = self._widths(name, "data_in") or self._widths(name, "data_out") or [0]
            pairs = itertools.product(inputs, self._widths(name, "weight") or [0])
            for data, weight in sorted(pairs, key=lambda p: (abs(p[0] - p[1]), p)):
                target = {"data_in": data, "weight": weight, "bias": max(data, weight)}
                rows.append([a.nearest_option(name, target) for a in self.assignments])
        if not rows:
            return np.zeros((0, len(self.parameters)), dtype=np.int64)
        codes = self.codes(np.array(rows, dtype=np.int64))
        first = {row.tobytes(): i for i, row in reversed(list(enumerate(codes)))}
        return codes[sorted(first.values())]

    def _widths(self, name: str, wanted: str) -> list[int]:
        """The bits of an operand of that name, or of one with that role, in a format, at any site, ascending."""
        widths = {
            s.bits
            for a in self.assignments
            for alternative in a.alternatives
            if alternative.name == name
            for o, settings in alternative.operands
            if wanted in (o, a.site.operand(o).role)
            for s in settings
            if s.format is not None
        }
        return sorted(widths)

    @cached_property
    def _options(self) -> list[list[tuple[tuple[Operand, Setting], ...]]]:
        """Per group and option: the setting of each operand."""
        return [list(a.options()) for a in self.assignments]


def single(graph: Graph, config: CandidateConfig, where: tuple[str, ...] = ()) -> QuantizationSpace:
    """The space whose only candidate is `config`.

    Args:
        graph: the captured model.
        config: a candidate spelled out, ``{"by": ..., key: {"config": {...}}}``; ``default_for`` as in a search.
        where: path of the table in the TOML, for messages.

    Raises:
        ConfigError: there is a mistake in `config`, or it describes several candidates.
    """
    choices: dict[str, Settings] = {}
    for key, table in config.items():
        if key in ("by", "default_for"):
            continue
        settings = table.get("config", table) if isinstance(table, Mapping) else None
        if not isinstance(settings, Mapping):
            raise ConfigError(f"{key!r} must be a table with a config", key=(*where, key))
        choices[key] = settings
    default_for = config.get("default_for", "usual")
    if default_for not in get_args(DefaultFor):
        allowed = one_of(get_args(DefaultFor))
        raise ConfigError(f"default_for = {default_for!r} is not possible; {allowed}", key=(*where, "default_for"))
    by = str(config.get("by", "name"))
    request = SpaceRequest(graph, by, choices, where, default_for=cast(DefaultFor, default_for))
    space = QuantizationSpace(replace(request, float_only=True))
    used = set(choices) - {"default", *space.unused}
    if not any(choices[key].get("name") in (None, "NA", ["NA"]) for key in used):
        # No key leaves a site in float on purpose, so it is an error if all sites stay in float.
        space = QuantizationSpace(request)
    if space.size != 1:
        free = ", ".join(p.name for p in space.parameters)
        raise ConfigError(f"a single configuration is needed, and this leaves a choice at {free}", key=where)
    return space
