"""The interface of search spaces: candidates of one captured model.

A candidate has two parts: the widths of its layers and the formats that it computes in. Each kind of space says how its
codes split into these two parts, and an evaluator needs to know nothing else about the kind. The second part is a code
of a ``FormatSpace``, whose candidates differ in formats alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bitfront.formats.base import FLOAT_BITS, Format, Operand
from bitfront.graph import Graph, Site
from bitfront.spaces.base import Codes
from bitfront.spaces.described import CandidateConfig, DescribedSpace


@dataclass(frozen=True)
class Offer:
    """What a space offers at a site, as text for users.

    Attributes:
        site: the name of the site.
        type: the type of the site, e.g. ``Linear``.
        rule: the key of the table of choices that applies.
        choices: the options of the site, in words.
        options: the number of options.
    """

    site: str
    type: str
    rule: str
    choices: str
    options: int


class ModelSpace(DescribedSpace):
    """A space of candidates of one captured model.

    **When it is called.** A space is built when a search is planned, from the initialised model, and again with the
    trained weights and in every worker process. The same request must always give the same space. Strategies use its
    codes (``spaces.base.Space``). The plan reads ``offers``, ``spelled_size``, `unused` and `notes`, to show them. The
    loop starts with ``uniform``. Evaluators call ``split`` for each batch, then ``widths`` and ``quantization``.

    **What it may not do.** It may not change the graph or its model, nor depend on the values of the weights. Its
    description is JSON, and a run folder stores nothing else of it, so a code must mean the same with the description
    alone.

    Every mistake in the request raises a ConfigError when the space is built. ``bitfront.testing.check_space`` tests
    all of this.

    Class attributes:
        changes_widths: whether a candidate may have other layer widths than the model.

    Attributes:
        graph: the captured model.
        unused: keys of the table of choices that match nothing in the model.
        notes: remarks for the user on how the choices were understood.
    """

    changes_widths: ClassVar[bool] = True
    graph: Graph
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def spelled_size(self) -> int:
        """Number of candidates that the file spells out. Several of them may be the same network; each counts."""
        return self.size

    @abstractmethod
    def offers(self) -> tuple[Offer, ...]:
        """What the space offers, site by site."""

    @abstractmethod
    def uniform(self) -> Codes:
        """Candidates that treat all sites alike as far as possible. A search evaluates them first.

        Returns:
            Canonical codes, int64, shape (candidates, parameters), each once; there may be none.
        """

    @abstractmethod
    def encode(self, config: CandidateConfig) -> NDArray[np.int64]:
        """The code of a candidate spelled out as ``decode`` does.

        Returns:
            A canonical code, int64, shape (parameters,).

        Raises:
            ConfigError: `config` is not a candidate of this space; the message says where, and what is offered there.
        """

    @abstractmethod
    def split(self, codes: Codes) -> tuple[Codes, Codes]:
        """The two parts of candidates: widths and formats.

        Args:
            codes: canonical codes, int64, shape (candidates, parameters).

        Returns:
            (options for ``widths``, one row per candidate; codes of the space that ``quantization`` gives, one row per
            candidate).
        """

    @abstractmethod
    def widths(self, options: NDArray[np.int64]) -> dict[int, int]:
        """Channel group → new width, for the groups whose width changes; as ``transforms.widen`` takes it.

        Args:
            options: the first part of one candidate, a row of the first result of ``split``.
        """

    @abstractmethod
    def quantization(self, graph: Graph) -> FormatSpace:
        """The space of the formats at the sites of `graph`, which is the model with its widths or with others."""


class FormatSpace(ModelSpace):
    """A space whose candidates differ in the formats of the model's sites alone. Group i is site i of the graph.

    Metric runners and evaluators work with spaces of this kind. Options are numbered as in ``Space``.
    """

    changes_widths: ClassVar[bool] = False

    @property
    def sites(self) -> tuple[Site, ...]:
        """The model's sites, one per group."""
        return self.graph.sites

    def split(self, codes: Codes) -> tuple[Codes, Codes]:
        """(options without columns, as no candidate changes a width; the codes)."""
        return np.zeros((len(codes), 0), dtype=np.int64), codes

    def widths(self, options: NDArray[np.int64]) -> dict[int, int]:  # noqa: ARG002
        """Empty, as no candidate changes a width."""
        return {}

    @property
    @abstractmethod
    def site_formats(self) -> tuple[tuple[Mapping[Operand, Format], ...], ...]:
        """Per group and option: operand → format, not calibrated. An operand left in float is absent."""

    @abstractmethod
    def bits(self, operand: Operand) -> list[NDArray[np.int64]]:
        """Bits of `operand` under each option; per group an int64 array of shape (options,). 32 if it is in float, or
        if the site has no such operand."""

    def bits_at(self, group: int, operand: Operand) -> NDArray[Any]:
        """Bits of one operand of a site under each option, shape (options,). 32 if it is in float or missing; the mean
        where the values of an operand have bits of their own."""
        formats = (option.get(operand) for option in self.site_formats[group])
        # Whole numbers, except where bits differ from value to value: then they are means.
        return np.array([FLOAT_BITS if form is None else form.bits for form in formats])

    def input_bits(self) -> list[NDArray[np.int64]]:
        """Bits of the widest input of a site under each option, per group an array of shape (options,). Float: 32."""
        of_sites = self.bits("data_in")
        for g, site in enumerate(self.sites):
            inputs = [s.name for s in site.specs if s.role == "activation" and "data_in" in s.names]
            if inputs:
                of_sites[g] = np.maximum.reduce([self.bits_at(g, name) for name in inputs])
        return of_sites

    @abstractmethod
    def quantized(self, operand: Operand) -> list[NDArray[np.bool_]]:
        """Whether `operand` has a format under each option; per group a bool array of shape (options,)."""

    def formats(self, options: NDArray[np.int64]) -> dict[str, dict[Operand, Format]]:
        """Site → operand → format (not calibrated) of one candidate; a site in float is absent.

        Args:
            options: the candidate's option at each group, int64, shape (groups,).
        """
        chosen = zip(self.sites, self.site_formats, options.tolist(), strict=True)
        return {site.name: dict(table[option]) for site, table, option in chosen if table[option]}
