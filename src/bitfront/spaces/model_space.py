"""Spaces of candidates of one captured model: what every kind of space that can be searched is.

A candidate of a model has two sides: how wide its layers are, and in which formats it computes. Each kind of space says
how its codes split into the two; whoever evaluates candidates needs to know nothing else of the kind. The second side
is a code of a ``FormatSpace``, whose candidates differ in formats alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bitfront.formats.base import Format, Operand
from bitfront.graph import Graph, Site
from bitfront.spaces.base import Codes
from bitfront.spaces.described import CandidateConfig, DescribedSpace


@dataclass(frozen=True)
class Offer:
    """What a space offers at a site, for people.

    Attributes:
        site: its name.
        type: of the site, e.g. ``Linear``.
        rule: the key of the table of choices that applied.
        choices: what the site may become, in words.
        options: how many that are.
    """

    site: str
    type: str
    rule: str
    choices: str
    options: int


class ModelSpace(DescribedSpace):
    """A space of candidates of one captured model.

    **When it is called.** A space is made when a search is planned, of the model as it is initialised, and again with
    the trained weights and in every worker process: from the same request it must be the same space. Strategies see
    its codes (``spaces.base.Space``); the plan asks for ``offers``, ``spelled_size``, `unused` and `notes`, for people;
    the loop begins with ``uniform``; evaluators ask for ``split`` of each batch, then ``widths`` and ``quantization``.

    **What it may not do.** Change the graph or its model, or depend on the values of the weights. Its description is
    JSON, and all that a run folder keeps of it: codes must mean there what they mean here.

    Every mistake in the request is a ConfigError when the space is made. ``bitfront.testing.check_space`` tests it.

    Class attributes:
        changes_widths: whether a candidate may have other layer widths than the model.

    Attributes:
        graph: the captured model.
        unused: keys of the table of choices that name nothing.
        notes: what the user should know about how the choices were understood.
    """

    changes_widths: ClassVar[bool] = True
    graph: Graph
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def spelled_size(self) -> int:
        """How many candidates the file spells out, those that turn out to be the same network included."""
        return self.size

    @abstractmethod
    def offers(self) -> tuple[Offer, ...]:
        """What may be chosen, site by site."""

    @abstractmethod
    def uniform(self) -> Codes:
        """Candidates that treat all sites alike, as far as they can: what a search should begin with.

        Returns:
            Canonical codes of shape (candidates, parameters), each once; there may be none.
        """

    @abstractmethod
    def encode(self, config: CandidateConfig) -> NDArray[np.int64]:
        """The code of a candidate spelled out, as ``decode`` spells it.

        Returns:
            A canonical code of shape (parameters,).

        Raises:
            ConfigError: `config` is not a candidate of this space; says where, and what there is.
        """

    @abstractmethod
    def split(self, codes: Codes) -> tuple[Codes, Codes]:
        """The two sides of candidates.

        Args:
            codes: canonical codes of shape (candidates, parameters).

        Returns:
            (what ``widths`` takes, a row each; codes of the space that ``quantization`` gives, a row each).
        """

    @abstractmethod
    def widths(self, options: NDArray[np.int64]) -> dict[int, int]:
        """The channel groups whose width changes, with their new widths; what ``transforms.widen`` takes.

        Args:
            options: the first side of one candidate, a row of what ``split`` gives.
        """

    @abstractmethod
    def quantization(self, graph: Graph) -> FormatSpace:
        """The formats that may be chosen, as a space of `graph`: the model in other widths, or as it is."""


class FormatSpace(ModelSpace):
    """A space whose candidates differ in the formats of the model's sites alone: group i is site i of the graph.

    Metric runners and evaluators see spaces of this kind. Tables per option number options as ``Space`` does.
    """

    changes_widths: ClassVar[bool] = False

    @property
    def sites(self) -> tuple[Site, ...]:
        """The model's sites, one per group."""
        return self.graph.sites

    def split(self, codes: Codes) -> tuple[Codes, Codes]:
        """No candidate changes a width."""
        return np.zeros((len(codes), 0), dtype=np.int64), codes

    def widths(self, options: NDArray[np.int64]) -> dict[int, int]:  # noqa: ARG002
        """None."""
        return {}

    @property
    @abstractmethod
    def site_formats(self) -> tuple[tuple[Mapping[Operand, Format], ...], ...]:
        """Per group and option: operand → format, not calibrated. An operand left in float is absent."""

    @abstractmethod
    def bits(self, operand: Operand) -> list[NDArray[np.int64]]:
        """Bits of `operand` under each option, per group an array of shape (options,). Float and absent: 32."""

    @abstractmethod
    def quantized(self, operand: Operand) -> list[NDArray[np.bool_]]:
        """Whether `operand` has a format under each option; per group an array of shape (options,)."""

    @abstractmethod
    def storage(self) -> Iterator[tuple[str, int, NDArray[np.int64]]]:
        """(parameter, group, bytes under each option of the group) for every parameter with a format of its own.

        Scales are included, and a tensor ends on a whole byte. A parameter that several sites share comes up once per
        site.
        """

    def formats(self, options: NDArray[np.int64]) -> dict[str, dict[Operand, Format]]:
        """Site → operand → format (not calibrated) of one candidate given by its options, shape (groups,). A site left
        in float is absent."""
        chosen = zip(self.sites, self.site_formats, options.tolist(), strict=True)
        return {site.name: dict(table[option]) for site, table, option in chosen if table[option]}
