"""Reads the table of choices of a space of formats, and gives each site its formats.

Every mistake in the table is an error here: keys that match nothing, formats and parameters that do not exist, values
that are not possible. An operand is a choice among complete settings. Settings whose parameters contradict each other
are left out; of settings that mean the same format, one is kept.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from bitfront.errors import ConfigError, nearest, one_of
from bitfront.formats import FORMATS
from bitfront.formats.base import Format, FormatError, Operand
from bitfront.graph import Graph, Site
from bitfront.operations.base import DATA_OUT, OperandSpec
from bitfront.operations.lookup import operand_names
from bitfront.operations.lookup import sites as site_operations
from bitfront.registry import canonical
from bitfront.spaces.assignment import FLOAT, UNSAID, Alternative, Assignment, Setting
from bitfront.spaces.request import SpaceRequest

#: All options of a site are listed. More take minutes and gigabytes.
MOST_OPTIONS = 1_000_000
NAMING = ("name", "type", "regex_name")
Settings = Mapping[str, object]


@dataclass(frozen=True)
class _Operand:
    """The settings of an operand, the number of settings that were left out, and the reason for the last of them."""

    settings: tuple[Setting, ...]
    excluded: int = 0
    why: str = ""


def read_choices(request: SpaceRequest) -> tuple[Graph, tuple[Assignment, ...], tuple[str, ...]]:
    """(the graph, where everything that the table means is a site; what the space offers at each site; keys of the
    table that match nothing).

    Raises:
        ConfigError: a mistake in the table; its key is named.
    """
    choices, where = request.choices, request.where
    if request.by not in NAMING:
        raise ConfigError(
            f"by = {request.by!r} is not possible; {one_of(NAMING)}.{nearest(request.by, NAMING)}",
            key=(*where[:-1], "setup", "by") if where[-1:] == ("seed",) else (*where, "by"),
        )
    keys = [k for k in choices if k != "default"]
    for key in keys:
        _check_key(key, request)
    key_of = _keys_of_sites(keys, request)
    graph = request.graph.naming_only(key_of)
    if not graph.sites:
        raise ConfigError(
            "the model has nothing that could be configured: no Linear, Conv, Embedding, ReLU, matmul or add"
        )
    used: set[str] = set()
    assignments, operands = [], _operand_names(graph)
    for site in graph.sites:
        key = key_of[site.name]
        used.add(key)
        table = choices.get(key, {"name": "NA"})
        assignments.append(_assignment(site, key, table, (*where, key, "config"), operands))
    unused = tuple(k for k in keys if k not in used)
    if not request.float_only and all(a.alternatives == (FLOAT,) for a in assignments):
        names = ", ".join(s.name for s in graph.sites)
        for key in dict.fromkeys(a.key for a in assignments):
            table = choices.get(key, {"name": "NA"})
            if table["name"] not in ("NA", None, ["NA"]) and not any(_split(k, operands) for k in table):
                sizes = dict.fromkeys(f.bits_parameter for f in _formats(_listed(table["name"], where), where) if f)
                allowed = [f"{o}_{p}" if p else o for p in sizes for o in operands]
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
    return graph, tuple(assignments), unused


def _usual_and_others(graph: Graph) -> tuple[list[Site], list[Site]]:
    """(the sites that `default` means in any case, those that only a key or ``default_for = "all"`` means)."""
    everything = (*graph.sites, *graph.nameable)
    return (
        [s for s in everything if s.operation.by_default],
        [s for s in everything if not s.operation.by_default],
    )


def _keys_of_sites(keys: Sequence[str], request: SpaceRequest) -> dict[str, str]:
    """Site → the key that applies to it; without the sites that nothing means."""
    usual, others = _usual_and_others(request.graph)
    meant = {key: _meant(key, usual, others, request) for key in keys}
    in_default = [*usual, *(others if request.default_for == "all" else [])]
    key_of = dict.fromkeys((site.name for site in in_default), "default")
    for key in reversed(keys):  # the first key that means a site applies
        key_of |= dict.fromkeys((site.name for site in meant[key]), key)
    return key_of


def _meant(key: str, usual: list[Site], others: list[Site], request: SpaceRequest) -> list[Site]:
    """The sites that a key means. One that means usual sites means no others, unless ``default`` does too: a pattern
    such as ``encoder.*`` is meant for layers, and not for each norm and activation between them."""
    if request.default_for == "all":
        return _matching(key, [*usual, *others], request.by)
    return _matching(key, usual, request.by) or _matching(key, others, request.by)


def _matching(key: str, sites: list[Site], by: str) -> list[Site]:
    if by == "name":
        # A key that is the name of a site means that site alone. Several calls of a shared module have the same path.
        return [s for s in sites if key == s.name] or [s for s in sites if key == s.path]
    if by == "type":
        return [s for s in sites if canonical(key) in (canonical(s.op), canonical(s.type))]
    return [s for s in sites if re.fullmatch(key, s.name) or (s.path and re.fullmatch(key, s.path))]


def _check_key(key: str, request: SpaceRequest) -> None:
    (usual, others), where = _usual_and_others(request.graph), (*request.where, key)
    sites, names = [*usual, *others], [s.name for s in usual]
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
    # The usual types, and of the others those that this model has: all that there are would fill the screen.
    types = [name for name, operation in site_operations().items() if operation.by_default]
    types += sorted({site.op for site in others})
    other = next((n for n in request.graph.nodes if key in (n.name, n.path)), None)
    if other is not None:
        raise ConfigError(
            f"{other.title} cannot be configured; {one_of(names)}, or the types {', '.join(types)}",
            key=where,
        )
    known = names if request.by == "name" else types
    what = "site" if request.by == "name" else "type of site"
    possible = [s.name for s in sites] if request.by == "name" else list(site_operations())
    raise ConfigError(f"the model has no {what} {key!r}; {one_of(known)}.{nearest(key, possible)}", key=where)


def _operand_names(graph: Graph) -> tuple[Operand, ...]:
    """All names of operands that a table for a model may use: those of the records, and those of the model's sites."""
    of_sites = (operand for site in graph.sites for operand in site.operands)
    return tuple(dict.fromkeys((*operand_names(), *of_sites, DATA_OUT)))


def _assignment(
    site: Site, key: str, settings: Settings, where: tuple[str, ...], operands: tuple[Operand, ...]
) -> Assignment:
    given = {k: _listed(v, (*where, k)) for k, v in settings.items() if not _takes_list(k, operands)}
    given |= {k: _lists(v, (*where, k)) for k, v in settings.items() if _takes_list(k, operands)}
    names = given.pop("name", None)
    if names is None:
        raise ConfigError(f"'name' is missing: the number format, or 'NA'; {one_of(FORMATS.names())}", key=where)
    bypass = given.pop("bypass", [False])
    for value in bypass:
        if not isinstance(value, bool):
            raise ConfigError(f"bypass = {value!r} is not possible; allowed: true, false", key=(*where, "bypass"))
    formats = _formats(names, (*where, "name"))
    classes = [f for f in formats if f is not None]
    values = _checked_parameters(site, given, classes, where, operands)
    choices = dict.fromkeys(_named_as(spec, values) for spec in site.specs)
    if DATA_OUT in values:  # a result is no choice of a site unless a key says so
        choices[DATA_OUT] = None
    alternatives: list[Alternative] = []
    excluded, why = 0, ""
    for name, format_class in formats.items_by_name() if False in bypass else ():
        settings_of = []
        for operand in choices:
            choice = _settings(site, operand, format_class, values.get(operand, {}), where, alone=len(classes) == 1)
            excluded, why = excluded + choice.excluded, choice.why or why
            settings_of.append((operand, choice.settings))
        alternative = Alternative(name, tuple(settings_of))
        _check_number(site, alternative, where)
        floats = any(map(_can_be_float, alternatives))
        # Float is one option, even if several formats allow it.
        alternatives += _never_float(alternative) if floats else [alternative]
    floats = any(map(_can_be_float, alternatives))
    if (None in formats or True in bypass) and not floats:
        alternatives.append(FLOAT)
    if alternatives and all(s.format is None for a in alternatives for _, ss in a.operands for s in ss):
        # A format that has no width for any operand of the site leaves the site in float.
        alternatives = [FLOAT]
    return Assignment(site, key, tuple(alternatives), excluded, why)


def _check_number(site: Site, alternative: Alternative, where: tuple[str, ...]) -> None:
    """Raises ConfigError where a site would have more options than can be listed."""
    number = math.prod(len(settings) for _, settings in alternative.operands)
    if number > MOST_OPTIONS:
        several = " · ".join(f"{len(settings)} of {key}" for key, settings in alternative.operands if len(settings) > 1)
        raise ConfigError(
            f"{site.title} would have {number:,} options ({several}); allowed: up to {MOST_OPTIONS:,}. Give fewer "
            "operands keys with lists: an operand without keys shares the choice of another",
            key=where,
        )


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
    """Format class (None for float) → its name; the formats of one key of the table."""

    def items_by_name(self) -> Iterator[tuple[str, type[Format]]]:
        for format_class, name in self.items():
            if format_class is not None:
                yield name, format_class


def _formats(names: Sequence[object], where: tuple[str, ...]) -> _Formats:
    formats = _Formats()
    for name in names:
        if name in (None, "NA"):
            formats.setdefault(None, "NA")
        elif isinstance(name, str) and name in FORMATS:
            formats.setdefault(FORMATS.get(name), FORMATS.official(name))
        else:
            hint = nearest(str(name), FORMATS.names())
            raise ConfigError(f"there is no format {name!r}; {one_of([*FORMATS.names(), 'NA'])}.{hint}", key=where)
    return formats


def _listed(value: object, where: tuple[str, ...]) -> list[object]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise ConfigError("the list of choices is empty", key=where)
    return values


def _lists(value: object, where: tuple[str, ...]) -> list[object]:
    """The choices of a parameter whose value is a list: ``[[1, 16], [1, 32]]`` are two, ``[1, 16]`` is one."""
    values = _listed(value, where)
    return [values] if all(isinstance(v, int) for v in values) else values


def _takes_list(key: str, operands: Sequence[Operand]) -> bool:
    """Whether a key's value is a list, in the formats that know it."""
    part = _split(key, operands)
    return part is not None and any(
        part[1] in f.parameters and f.parameters[part[1]].listed for f in map(FORMATS.get, FORMATS.names())
    )


def _split(key: str, operands: Sequence[Operand]) -> tuple[Operand, str] | None:
    """``weight_width`` → (weight, width); ``weight`` → (weight, "")."""
    # The longest name first: ``weight_ih_width`` belongs to ``weight_ih``, not to ``weight``.
    for operand in sorted(operands, key=len, reverse=True):
        if key == operand:
            return operand, ""
        if key.startswith(operand + "_"):
            return operand, key[len(operand) + 1 :]
    return None


def _named_as(operand: OperandSpec, values: Mapping[Operand, object]) -> Operand:
    """The name under which a table has the settings of an operand: the most exact one; the widest, if there is none."""
    return next((name for name in operand.names if name in values), operand.names[-1])


def _checked_parameters(
    site: Site,
    values: Mapping[str, list[object]],
    formats: list[type[Format]],
    where: tuple[str, ...],
    operands: Sequence[Operand],
) -> dict[Operand, dict[str, list[object]]]:
    """Operand → parameter → the choices in the table ("" for a choice among complete settings).

    Args:
        site: the first one that the table is for; a message names the operands that such a site has.
        operands: all that a table may name.

    Raises:
        ConfigError: a key does not belong to an operand and to one of the formats; to any format, if only NA is named.
    """
    named: dict[Operand, dict[str, list[object]]] = {}
    formats = formats or [FORMATS.get(n) for n in FORMATS.names()]
    known = {name: p for f in formats for name, p in f.parameters.items()}
    allowed = ["name", "bypass", *operands, *(f"{o}_{n}" for o in operands for n in known)]
    for key, choices in values.items():
        part = _split(key, operands)
        if part is None or (part[1] and part[1] not in known):
            own = dict.fromkeys(name for spec in site.specs for name in reversed(spec.names) if name in operands)
            own[DATA_OUT] = None
            first = next(iter(own))
            raise ConfigError(
                f"unknown key; {one_of(['name', 'bypass', *own])}, or one of these and a parameter "
                f"({', '.join(known)}), such as {first}{f'_{next(iter(known))}' if known else ''}."
                f"{nearest(key, allowed)}",
                key=(*where, key),
            )
        for choice in choices:
            tables = choice if isinstance(choice, Mapping) else {part[1]: choice}
            if not part[1] and not isinstance(choice, Mapping):
                needed = ", ".join(f"{n} = {choice!r}" for n, p in formats[0].parameters.items() if p.default is ...)
                raise ConfigError(
                    f"{choice!r} is not possible: a choice among complete settings is a list of tables, such as "
                    f"{key} = [{{{needed}}}]",
                    key=(*where, key),
                )
            for name, value in tables.items():
                _check_value(name, value, formats, known, (*where, key))
        named.setdefault(part[0], {})[part[1]] = choices
    return named


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
    given: Mapping[str, list[object]],
    where: tuple[str, ...],
    *,
    alone: bool,
) -> _Operand:
    if not given:
        return _Operand((UNSAID,))
    if "" in given and len(given) > 1:
        raise ConfigError(
            f"{operand} is given both as complete settings and by single parameters; use one of the two",
            key=(*where, operand),
        )
    tables: list[dict[str, object]]
    if "" in given:
        tables = [dict(cast(Mapping[str, object], t)) for t in given[""]]
        place = (*where, operand)
    else:
        names = [n for n in given if n in format_class.parameters]
        tables = [dict(zip(names, picks, strict=True)) for picks in itertools.product(*(given[n] for n in names))]
        place = (*where, f"{operand}_{names[0]}") if names else where
    kind = site.operand(operand).kind(from_samples=site.flows(operand))
    settings: dict[Format | None, Setting] = {}
    why, excluded = "", 0
    for table in tables:
        if format_class.leaves_float(table):
            settings.setdefault(None, Setting(((str(format_class.bits_parameter), "NA"),) if table else (), None))
            continue
        try:
            parsed = format_class.parse(table, kind, signed=operand != "data_in" or site.negative_inputs_matter)
        except FormatError as error:
            # Of several formats, each takes from the list what it can; one of them takes every value.
            if error.parameter is not None and (alone or error.parameter not in table):
                raise ConfigError(f"{operand} of {site.title}: {error}", key=place) from None
            why, excluded = str(error), excluded + 1
            continue
        settings.setdefault(parsed, Setting(tuple(table.items()), parsed))
    if not settings:
        raise ConfigError(f"no valid setting is left for {operand} of {site.title}: {why}", key=place)
    ordered = sorted(settings.values(), key=lambda s: s.bits)
    return _Operand(tuple(ordered), excluded, why)
