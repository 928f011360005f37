"""The input of a space: a captured model and the tables of choices in the TOML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from bitfront.graph import Graph

#: A table of choices: key → parameter → value or list of values. The key ``default`` applies to sites that no other key
#: names (``DefaultFor``).
Choices = Mapping[str, Mapping[str, object]]
#: What ``default``, and a pattern that matches such sites too, mean: the ``usual`` sites, whose operations are sites by
#: default (products, recurrent layers, embeddings, sums, ReLU), or ``all`` that can have formats.
DefaultFor = Literal["usual", "all"]


@dataclass(frozen=True)
class Part:
    """The tables of one part of a space that has several parts.

    Attributes:
        by, choices, default_for: as in ``SpaceRequest``.
    """

    by: str
    choices: Choices
    default_for: DefaultFor = "usual"


@dataclass(frozen=True)
class SpaceRequest:
    """The input of a space.

    Attributes:
        graph: the captured model.
        by: what the keys of `choices` are: ``name``, ``type`` or ``regex_name``.
        choices: the table of choices, which the TOML calls ``seed``.
        where: path of the table in the TOML, for messages.
        float_only: whether a table that leaves every site in float is accepted; otherwise it is an error.
        parts: for a space that has parts: name of the part → its tables.
        default_for: which sites ``default`` applies to.
    """

    graph: Graph
    by: str = "name"
    choices: Choices = field(default_factory=dict)
    where: tuple[str, ...] = ("search", "search_space", "seed")
    float_only: bool = False
    parts: Mapping[str, Part] = field(default_factory=dict)
    default_for: DefaultFor = "usual"
