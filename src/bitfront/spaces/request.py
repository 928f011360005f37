"""What a space is built from: a captured model and the tables of the TOML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bitfront.graph import Graph


@dataclass(frozen=True)
class Part:
    """One part of a space that has several: as ``by`` and ``seed`` of ``SpaceRequest``."""

    by: str
    seed: Mapping[str, Mapping[str, object]]


@dataclass(frozen=True)
class SpaceRequest:
    """What the user asked for.

    Attributes:
        graph: the captured model.
        by: how the keys of `seed` name sites: ``name``, ``type`` or ``regex_name``.
        seed: key → parameter → value or list of values; the key ``default`` is for sites that no other key names.
        where: path of the seed table in the TOML, for messages.
        float_only: every site staying as it is is what is wanted, not a mistake.
        parts: name of the table → its tables, for a space that is made of others.
    """

    graph: Graph
    by: str = "name"
    seed: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    where: tuple[str, ...] = ("search", "search_space", "seed")
    float_only: bool = False
    parts: Mapping[str, Part] = field(default_factory=dict)
