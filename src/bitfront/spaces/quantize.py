"""The space of mixed precision: which number format, with which parameters, for each operand of each site.

A site is a group; each format named for it is a branch (``NA``, which leaves the site in float, is one too); each
operand is a choice among complete settings, so that a width never meets a frac width that does not fit: settings whose
parameters contradict each other are left out when the space is built, and so are settings that mean the same.
A single configuration (``[passes.quantize]``, a trial's ``sampled_config``) is a space with one candidate.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from bitfront.errors import ConfigError, nearest, one_of
from bitfront.formats import FORMATS
from bitfront.formats.base import FLOAT_BITS, Format, FormatError, Operand
from bitfront.graph import Graph, Site
from bitfront.operations.lookup import operand_names
from bitfront.operations.lookup import sites as site_operations
from bitfront.registry import canonical
from bitfront.spaces import SPACES
from bitfront.spaces.base import Codes
from bitfront.spaces.model_space import CandidateConfig, ModelSpace, Offer
from bitfront.spaces.request import SpaceRequest

NAMING = ("name", "type", "regex_name")
Settings = Mapping[str, object]


@dataclass(frozen=True)
class Setting:
    """One way to treat an operand: what the TOML says, and the format it means (None: left in float)."""

    written: tuple[tuple[str, object], ...]
    format: Format | None

    @property
    def bits(self) -> int:
        """Bits per value."""
        return self.format.bits if self.format else FLOAT_BITS


@dataclass(frozen=True)
class Alternative:
    """One branch at a site: a format by name (``NA``: float), and the settings to choose from per operand."""

    name: str
    operands: tuple[tuple[Operand, tuple[Setting, ...]], ...] = ()


FLOAT = Alternative("NA")


@dataclass(frozen=True)
class Assignment:
    """What a site got.

    Attributes:
        key: the key of the table of choices that applied; ``default`` where no other did.
        alternatives: the branches.
        excluded: how many settings were left out because their parameters contradict each other.
        why: of the last of them, what the format says.
    """

    site: Site
    key: str
    alternatives: tuple[Alternative, ...]
    excluded: int = 0
    why: str = ""


@dataclass(frozen=True)
class _Operand:
    settings: tuple[Setting, ...]
    excluded: int = 0
    why: str = field(default="")


@SPACES.register("graph/quantize/mixed_precision_ptq", "mixed_precision_ptq")
class QuantizationSpace(ModelSpace):
    """Number formats and bit-widths of every operand of every site."""

    def __init__(self, request: SpaceRequest, assignments: tuple[Assignment, ...] | None = None) -> None:
        self.graph = request.graph
        self._request = request
        self.assignments, self.unused = _assign(request) if assignments is None else (assignments, ())
        super().__init__([_described(a) for a in self.assignments])

    @classmethod
    def of_float(cls, graph: Graph) -> QuantizationSpace:
        """The space whose only candidate is the float model itself, for its row in the table."""
        return cls(SpaceRequest(graph, float_only=True))

    def split(self, codes: Codes) -> tuple[Codes, Codes]:
        """No candidate changes a width."""
        return np.zeros((len(codes), 0), dtype=np.int64), codes

    def widths(self, options: NDArray[np.int64]) -> dict[int, int]:  # noqa: ARG002
        """None."""
        return {}

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

    @property
    def sites(self) -> tuple[Site, ...]:
        """The model's sites; group i of the space is site i."""
        return self.graph.sites

    def formats(self, options: NDArray[np.int64]) -> dict[str, dict[Operand, Format]]:
        """Site → operand → format (not calibrated) of one candidate given by its options, shape (groups,)."""
        result: dict[str, dict[Operand, Format]] = {}
        for assignment, group, option in zip(self.assignments, self.groups, options, strict=True):
            branch, picks = group.picks(int(option))
            operands = assignment.alternatives[branch].operands
            chosen = {o: settings[i].format for (o, settings), i in zip(operands, picks, strict=True)}
            formats = {o: f for o, f in chosen.items() if f is not None}
            if formats:
                result[assignment.site.name] = formats
        return result

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
            for index, settings in enumerate(_options(assignment)):
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
                    sizes = [_stored_bytes(dict(settings).get(operand), shape) for settings in own]
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
                rows.append([_nearest_option(a, name, target) for a in self.assignments])
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
        return [list(_options(a)) for a in self.assignments]


def single(graph: Graph, config: CandidateConfig, where: tuple[str, ...] = ()) -> QuantizationSpace:
    """The space whose only candidate is `config` (``{"by": ..., key: {"config": {...}}}``).

    Raises:
        ConfigError: as for any space, or more than one candidate is described.
    """
    choices = {
        k: v["config"] if isinstance(v, Mapping) and "config" in v else v for k, v in config.items() if k != "by"
    }
    for key, own in choices.items():
        if not isinstance(own, Mapping):
            raise ConfigError(f"{key!r} must be a table with a config", key=(*where, key))
    request = SpaceRequest(graph, str(config.get("by", "name")), cast(Mapping[str, Settings], choices), where)
    space = QuantizationSpace(replace(request, float_only=True))
    said = set(choices) - {"default", *space.unused}
    if not any(cast(Settings, choices[key]).get("name") in (None, "NA", ["NA"]) for key in said):
        # Nothing says that a site shall stay in float, as the candidate that quantizes nothing does.
        space = QuantizationSpace(request)
    if space.size != 1:
        free = ", ".join(p.name for p in space.parameters)
        raise ConfigError(f"one configuration is needed, and this leaves a choice at {free}", key=where)
    return space


def _options(assignment: Assignment) -> Iterator[tuple[tuple[Operand, Setting], ...]]:
    """Every option of a site, in the order in which the space numbers them."""
    for alternative in assignment.alternatives:
        operands = [o for o, _ in alternative.operands]
        for picks in itertools.product(*(settings for _, settings in alternative.operands)):
            yield tuple(zip(operands, picks, strict=True))


def _described(assignment: Assignment) -> dict[str, Any]:
    alternatives = []
    for alternative in assignment.alternatives:
        operands = [
            {
                "operand": operand,
                "settings": [
                    {
                        "label": s.format.label if s.format else "float",
                        "set": {k: _written(v) for k, v in s.written},
                        "bits": s.bits,
                    }
                    for s in settings
                ],
            }
            for operand, settings in alternative.operands
        ]
        alternatives.append({"name": alternative.name, "operands": operands})
    return {"site": assignment.site.name, "alternatives": alternatives}


def _written(value: object) -> object:
    return "NA" if value is None else value


def _stored_bytes(setting: Setting | None, shape: tuple[int, ...]) -> int:
    values = int(np.prod(shape, dtype=np.int64))
    if setting is None or setting.format is None:
        return values * FLOAT_BITS // 8
    return -(-(values * setting.bits + setting.format.overhead_bits(shape)) // 8)


def _nearest_option(assignment: Assignment, name: str, target: Mapping[str, int]) -> int:
    offset = 0
    for alternative in assignment.alternatives:
        radices = [len(settings) for _, settings in alternative.operands]
        if alternative.name == name or len(assignment.alternatives) == 1:
            picks = [
                min(range(len(settings)), key=lambda i: _distance(settings[i], target[operand], i))
                for operand, settings in alternative.operands
            ]
            return offset + int(np.ravel_multi_index(picks, radices) if radices else 0)
        offset += int(np.prod(radices, dtype=np.int64)) if radices else 1
    return 0


def _distance(setting: Setting, target: int, index: int) -> tuple[float, float, int]:
    """Nearest bits first; among equal bits as the format ranks."""
    return abs(setting.bits - target), setting.format.rank if setting.format else 0.0, index


# --- from the TOML's tables to assignments ---------------------------------------------------------------------------


def _assign(request: SpaceRequest) -> tuple[tuple[Assignment, ...], tuple[str, ...]]:
    graph, choices, where = request.graph, request.choices, request.where
    if request.by not in NAMING:
        raise ConfigError(
            f"by = {request.by!r} is not possible; {one_of(NAMING)}.{nearest(request.by, NAMING)}",
            key=(*where[:-1], "setup", "by") if where[-1:] == ("seed",) else (*where, "by"),
        )
    if not graph.sites:
        raise ConfigError("the model has nothing that could be configured: no Linear, Conv, ReLU, matmul or add")
    keys = [k for k in choices if k != "default"]
    for key in keys:
        _check_key(key, request)
    used: set[str] = set()
    assignments = []
    for site in graph.sites:
        key = next((k for k in keys if _names(k, site, request)), "default")
        used.add(key)
        assignments.append(_assignment(site, key, choices.get(key, {"name": "NA"}), (*where, key, "config")))
    unused = tuple(k for k in keys if k not in used)
    if not request.float_only and all(a.alternatives == (FLOAT,) for a in assignments):
        names = ", ".join(s.name for s in graph.sites)
        for key in dict.fromkeys(a.key for a in assignments):
            own = choices.get(key, {"name": "NA"})
            if own["name"] not in ("NA", None, ["NA"]) and not any(_split(k) for k in own):
                sizes = dict.fromkeys(f.bits_parameter for f in _formats(_listed(own["name"], where), where) if f)
                allowed = [f"{o}_{p}" if p else o for p in sizes for o in operand_names()]
                raise ConfigError(
                    f"every site stays in float: no operand has a {' or '.join(p or 'format' for p in sizes)}; "
                    f"{one_of(allowed)}",
                    key=(*where, key),
                )
        hint = f" Unused keys: {', '.join(map(repr, unused))}." if unused else ""
        raise ConfigError(
            f"every site stays in float: no key with another name than 'NA' matches one of {names} "
            f"by = {request.by!r}.{hint}",
            key=where,
        )
    return tuple(assignments), unused


def _names(key: str, site: Site, request: SpaceRequest) -> bool:
    if request.by == "name":
        # The name of a site is that site alone; several calls of a shared module have one path.
        named = any(key == s.name for s in request.graph.sites)
        return key == (site.name if named else site.path)
    if request.by == "type":
        return canonical(key) in (canonical(site.op), canonical(site.type))
    return bool(re.fullmatch(key, site.name) or (site.path and re.fullmatch(key, site.path)))


def _check_key(key: str, request: SpaceRequest) -> None:
    sites, where = request.graph.sites, (*request.where, key)
    names = [s.name for s in sites]
    if request.by == "regex_name":
        try:
            re.compile(key)
        except re.error as error:
            raise ConfigError(f"{key!r} is not a regular expression: {error}", key=where) from None
        return
    is_type = canonical(key) in {canonical(op) for op in site_operations()} | {canonical(s.type) for s in sites}
    is_site = any(key in (s.name, s.path) for s in sites)
    if is_type or is_site:
        return
    other = next((n for n in request.graph.nodes if key in (n.name, n.path)), None)
    if other is not None:
        raise ConfigError(
            f"{other.title} cannot be configured; {one_of(names)}, or the types {', '.join(site_operations())}",
            key=where,
        )
    known = names if request.by == "name" else list(site_operations())
    what = "site" if request.by == "name" else "type of site"
    raise ConfigError(f"the model has no {what} {key!r}; {one_of(known)}.{nearest(key, known)}", key=where)


def _assignment(site: Site, key: str, settings: Settings, where: tuple[str, ...]) -> Assignment:
    values = {k: _listed(v, (*where, k)) for k, v in settings.items()}
    names = values.pop("name", None)
    if names is None:
        raise ConfigError(f"'name' is missing: the number format, or 'NA'; {one_of(FORMATS.names())}", key=where)
    bypass = values.pop("bypass", [False])
    for value in bypass:
        if not isinstance(value, bool):
            raise ConfigError(f"bypass = {value!r} is not possible; allowed: true, false", key=(*where, "bypass"))
    formats = _formats(names, (*where, "name"))
    classes = [f for f in formats if f is not None]
    _check_parameters(values, classes, where)
    alternatives: list[Alternative] = []
    excluded, why = 0, ""
    for name, format_class in formats.items_by_name() if False in bypass else ():
        operands = []
        for operand in site.operands:
            own = _settings(site, operand, format_class, values, where)
            excluded, why = excluded + own.excluded, own.why or why
            operands.append((operand, own.settings))
        alternative = Alternative(name, tuple(operands))
        floats = any(map(_can_be_float, alternatives))
        # Float is one candidate, whichever format it is spelled in.
        alternatives += _never_float(alternative) if floats else [alternative]
    floats = any(map(_can_be_float, alternatives))
    if (None in formats or True in bypass) and not floats:
        alternatives.append(FLOAT)
    if alternatives and all(s.format is None for a in alternatives for _, ss in a.operands for s in ss):
        # A format without a width for any of the site's operands leaves the site as it is.
        alternatives = [FLOAT]
    return Assignment(site, key, tuple(alternatives), excluded, why)


def _can_be_float(alternative: Alternative) -> bool:
    return all(any(s.format is None for s in settings) for _, settings in alternative.operands)


def _never_float(alternative: Alternative) -> list[Alternative]:
    """`alternative` without the one option that leaves every operand in float, as disjoint products."""
    parts = []
    for i, (operand, settings) in enumerate(alternative.operands):
        formats = tuple(s for s in settings if s.format is not None)
        if formats:
            before = [(o, tuple(s for s in ss if s.format is None)) for o, ss in alternative.operands[:i]]
            operands = (*before, (operand, formats), *alternative.operands[i + 1 :])
            parts.append(Alternative(alternative.name, operands))
        if len(formats) == len(settings):
            break
    return parts


class _Formats(dict["type[Format] | None", str]):
    """Format class (None: float) → its name, as chosen at a site."""

    def items_by_name(self) -> Iterator[tuple[str, type[Format]]]:
        for format_class, name in self.items():
            if format_class is not None:
                yield name, format_class


def _formats(names: Sequence[object], where: tuple[str, ...]) -> _Formats:
    found = _Formats()
    for name in names:
        if name in (None, "NA"):
            found.setdefault(None, "NA")
        elif isinstance(name, str) and name in FORMATS:
            found.setdefault(FORMATS.get(name), FORMATS.official(name))
        else:
            hint = nearest(str(name), FORMATS.names())
            raise ConfigError(f"there is no format {name!r}; {one_of([*FORMATS.names(), 'NA'])}.{hint}", key=where)
    return found


def _listed(value: object, where: tuple[str, ...]) -> list[object]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise ConfigError("the list of choices is empty", key=where)
    return values


def _split(key: str) -> tuple[Operand, str] | None:
    """``weight_width`` → (weight, width); ``weight`` → (weight, "")."""
    # The longest first: ``weight_ih_width`` is no key of ``weight``.
    for operand in sorted(operand_names(), key=len, reverse=True):
        if key == operand:
            return operand, ""
        if key.startswith(operand + "_"):
            return operand, key[len(operand) + 1 :]
    return None


def _check_parameters(values: Mapping[str, list[object]], formats: list[type[Format]], where: tuple[str, ...]) -> None:
    """Every key must belong to an operand and to at least one of the formats; where only NA is named, to any."""
    formats = formats or [FORMATS.get(n) for n in FORMATS.names()]
    known = {name: p for f in formats for name, p in f.parameters.items()}
    allowed = ["name", "bypass", *operand_names(), *(f"{o}_{n}" for o in operand_names() for n in known)]
    for key, choices in values.items():
        part = _split(key)
        if part is None or (part[1] and part[1] not in known):
            raise ConfigError(f"unknown key; {one_of(allowed)}.{nearest(key, allowed)}", key=(*where, key))
        for choice in choices:
            tables = choice if isinstance(choice, Mapping) else {part[1]: choice}
            if not part[1] and not isinstance(choice, Mapping):
                needed = ", ".join(f"{n} = {choice!r}" for n, p in formats[0].parameters.items() if p.default is ...)
                raise ConfigError(
                    f"{choice!r} is not possible: a choice among whole settings is a list of tables, such as "
                    f"{key} = [{{{needed}}}]",
                    key=(*where, key),
                )
            for name, value in tables.items():
                _check_value(name, value, formats, known, (*where, key))


def _check_value(
    name: str, value: object, formats: list[type[Format]], known: Mapping[str, object], where: tuple[str, ...]
) -> None:
    if name not in known:
        raise ConfigError(f"has no parameter {name!r}; {one_of(known)}.{nearest(name, known)}", key=where)
    if value in (None, "NA") and any(f.bits_parameter == name for f in formats):
        return
    problems = []
    for format_class in formats:
        if name in format_class.parameters:
            try:
                format_class.parameters[name].check(name, None if value == "NA" else value)
            except FormatError as error:
                problems.append(str(error))
            else:
                return
    raise ConfigError(problems[0], key=where)


def _settings(
    site: Site,
    operand: Operand,
    format_class: type[Format],
    values: Mapping[str, list[object]],
    where: tuple[str, ...],
) -> _Operand:
    own = {name: v for key, v in values.items() if (part := _split(key)) and part[0] == operand for name in [part[1]]}
    if not own:
        return _Operand((Setting((), None),))
    if "" in own and len(own) > 1:
        raise ConfigError(
            f"{operand} is given both as whole settings and by single parameters; use one of the two",
            key=(*where, operand),
        )
    tables: list[dict[str, object]]
    if "" in own:
        tables = [dict(cast(Mapping[str, object], t)) for t in own[""]]
        place = (*where, operand)
    else:
        names = [n for n in own if n in format_class.parameters]
        tables = [dict(zip(names, picks, strict=True)) for picks in itertools.product(*(own[n] for n in names))]
        place = (*where, f"{operand}_{names[0]}") if names else where
    settings: dict[Format | None, Setting] = {}
    why, excluded = "", 0
    for table in tables:
        if format_class.leaves_float(table):
            settings.setdefault(None, Setting(((str(format_class.bits_parameter), "NA"),) if table else (), None))
            continue
        try:
            parsed = format_class.parse(table, operand, signed=operand != "data_in" or site.negative_inputs_matter)
        except FormatError as error:
            if error.parameter is not None:
                raise ConfigError(f"{operand} of {site.title}: {error}", key=place) from None
            why, excluded = str(error), excluded + 1
            continue
        settings.setdefault(parsed, Setting(tuple(table.items()), parsed))
    if not settings:
        raise ConfigError(f"no valid setting is left for {operand} of {site.title}: {why}", key=place)
    ordered = sorted(settings.values(), key=lambda s: s.bits)
    return _Operand(tuple(ordered), excluded, why)
