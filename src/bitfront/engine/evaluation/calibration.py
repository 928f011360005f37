"""What the options of a space learn from the calibration samples, each thing once for the whole search.

A format learns its scale; a site learns how its bias and the batch norms behind it must be corrected, where that is
asked for. All of it depends on one site and on its own formats, never on the other sites': inputs are those of the
float model. So it hangs off options, as everything expensive does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from bitfront.formats.base import Format, Operand
from bitfront.graph import Graph, Site
from bitfront.transforms import SiteFormats
from bitfront.transforms.correct import (
    Correction,
    Statistics,
    corrected_bias,
    has_bias,
    norms_behind,
    output_statistics,
    restated,
)
from bitfront.transforms.quantize import joined, observe

#: A site's formats by operand, as the space spells them, in a fixed order.
Own = tuple[tuple[Operand, Format], ...]


@dataclass(frozen=True)
class Corrections:
    """What is corrected where a site is quantized; nothing by default.

    Attributes:
        bias: biases, for the error of the weights.
        batch_norm: the statistics of batch norms right behind a site.
    """

    bias: bool = False
    batch_norm: bool = False


class Calibration:
    """Formats ready to be applied, and corrections. What was not learned before cannot be asked for.

    Args:
        graph: the float model.
        x: calibration samples, on the CPU.
        corrections: which to make.
    """

    def __init__(self, graph: Graph, x: Tensor, corrections: Corrections) -> None:
        self._graph, self._x = graph, x
        self._biased = {s.name for s in graph.sites if corrections.bias and has_bias(graph, s)}
        self._norms = {s.name: norms_behind(graph, s) for s in graph.sites} if corrections.batch_norm else {}
        self._observed: dict[tuple[str, Operand], tuple[Tensor, ...]] = {}
        self._formats: dict[tuple[str, Operand, Format, Format | None], Format] = {}
        self._biases: dict[tuple[str, Format], Tensor] = {}
        self._floating: dict[str, Statistics] = {}
        self._statistics: dict[tuple[str, Own], Mapping[str, Statistics]] = {}

    def norms(self, site: Site) -> tuple[str, ...]:
        """Paths of the batch norms that are corrected when the site is quantized."""
        return self._norms.get(site.name, ())

    def corrects_bias(self, site: Site) -> bool:
        """Whether the site's bias is corrected when its weight is quantized."""
        return site.name in self._biased

    def learn(self, wanted: Iterable[tuple[Site, SiteFormats]]) -> None:
        """Learn what some sites need under some formats, as the space spells them."""
        missing = [(site, own) for site, own in wanted if not self._knows(site, own)]
        pairs: set[tuple[str, Operand]] = set()
        for site, own in missing:
            pairs |= {(site.name, operand) for operand, form in own.items() if form.calibrates}
            if self._changes_bias(site, own) or (own and self.norms(site)):
                pairs.add((site.name, "data_in"))
        unseen = pairs - set(self._observed)
        if unseen:
            self._observed.update(observe(self._graph, sorted(unseen), self._x))
        for site, own in missing:
            self._learn(site, own)

    def _knows(self, site: Site, own: SiteFormats) -> bool:
        known = all(
            not f.calibrates or self._key(site, o, f, own.get("weight")) in self._formats for o, f in own.items()
        )
        if self._changes_bias(site, own):
            known = known and (site.name, own["weight"]) in self._biases
        if own and self.norms(site):
            known = known and (site.name, _own(own)) in self._statistics
        return known

    def _learn(self, site: Site, own: SiteFormats) -> None:
        for operand in own:
            if operand != "bias":
                self._learn_format(site, operand, own, None)
        if self._changes_bias(site, own) and (site.name, own["weight"]) not in self._biases:
            inputs = self._observed[site.name, "data_in"]
            weight = self.format(site, "weight", own["weight"])
            self._biases[site.name, own["weight"]] = corrected_bias(self._graph, site, weight, inputs)
        if "bias" in own:
            self._learn_format(site, "bias", own, self.bias(site, own.get("weight")))
        if own and self.norms(site) and (site.name, _own(own)) not in self._statistics:
            self._statistics[site.name, _own(own)] = self._restated(site, own)

    def _learn_format(self, site: Site, operand: Operand, own: SiteFormats, sample: Tensor | None) -> None:
        """From `sample`, or from what was observed at the operand."""
        key = self._key(site, operand, own[operand], own.get("weight"))
        if own[operand].calibrates and key not in self._formats:
            sample = joined(self._observed[site.name, operand]) if sample is None else sample
            self._formats[key] = own[operand].calibrated(sample)

    def _restated(self, site: Site, own: SiteFormats) -> dict[str, Statistics]:
        # A traced site is called once.
        (x,) = self._observed[site.name, "data_in"]
        if site.name not in self._floating:
            self._floating[site.name] = output_statistics(self._graph, site, {}, None, x)
        bias = self.bias(site, own.get("weight"))
        found = output_statistics(self._graph, site, self.formats(site, own), bias, x)
        return {
            path: restated(self._graph.model.get_submodule(path), self._floating[site.name], found)
            for path in self.norms(site)
        }

    def _changes_bias(self, site: Site, own: SiteFormats) -> bool:
        return self.corrects_bias(site) and "weight" in own

    def _key(
        self, site: Site, operand: Operand, form: Format, weight: Format | None
    ) -> tuple[str, Operand, Format, Format | None]:
        """A bias is corrected before it is quantized: its format depends on the weight's."""
        return site.name, operand, form, weight if operand == "bias" and self.corrects_bias(site) else None

    def format(self, site: Site, operand: Operand, form: Format, weight: Format | None = None) -> Format:
        """A format, ready to be applied.

        Args:
            weight: for a bias, the format of the weight beside it, as the space spells it.
        """
        return self._formats[self._key(site, operand, form, weight)] if form.calibrates else form

    def formats(self, site: Site, own: SiteFormats) -> dict[Operand, Format]:
        """All formats of an option, ready to be applied."""
        return {operand: self.format(site, operand, form, own.get("weight")) for operand, form in own.items()}

    def bias(self, site: Site, weight: Format | None) -> Tensor | None:
        """The site's corrected bias, not quantized; None where it stays."""
        return None if weight is None or not self.corrects_bias(site) else self._biases[site.name, weight]

    def statistics(self, site: Site, own: SiteFormats) -> Mapping[str, Statistics]:
        """Path of a batch norm behind the site → its running mean and variance; of float sites there is nothing."""
        return self._statistics[site.name, _own(own)] if own and self.norms(site) else {}

    def correction(self, site: Site, own: SiteFormats) -> Correction:
        """Everything that changes beside the formats of an option."""
        return Correction(self.bias(site, own.get("weight")), self.statistics(site, own))


def _own(own: SiteFormats) -> Own:
    return tuple(sorted(own.items(), key=lambda item: item[0]))
