"""Calibration: what the options of a space learn from the calibration samples, each thing once per search.

A format learns its scale. If corrections are configured, a site learns its corrected bias and the statistics of the
batch norms behind it. All of this depends on one site and the formats of its operands only, because the inputs are
those of the float model. So it is stored per option.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from bitfront.engine.evaluation.range_loss import Kind, losses_of, merged
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
    rescaled_statistics,
)
from bitfront.transforms.observe import Observed, observe

#: The formats of a site's operands before calibration, sorted by operand; hashable.
FormatsKey = tuple[tuple[Operand, Format], ...]


@dataclass(frozen=True)
class Corrections:
    """Which corrections are done for quantized sites; none by default.

    Attributes:
        bias: correct biases for the error of the quantized weights.
        batch_norm: correct the statistics of batch norms that directly follow a site.
    """

    bias: bool = False
    batch_norm: bool = False


class Calibration:
    """Calibrated formats and corrections. Call `learn` first; the other methods only look up what it has learned.

    Args:
        graph: the float model.
        x: calibration samples, float32, shape (samples, ...), on the CPU.
        corrections: which corrections are done.
        looks: say what formats lose of an input also where they learn nothing from it, which takes a forward pass.
    """

    def __init__(self, graph: Graph, x: Tensor, corrections: Corrections, looks: bool = False) -> None:
        self._looks = looks
        self._graph, self._x = graph, x
        self._biased = {s.name for s in graph.sites if corrections.bias and has_bias(graph, s)}
        self._norms = {s.name: norms_behind(graph, s) for s in graph.sites} if corrections.batch_norm else {}
        self._corrects = bool(self._biased or self._norms)
        self._observed: dict[tuple[str, Operand], Observed] = {}
        self._formats: dict[tuple[str, Operand, Format, Format | None], Format] = {}
        self._biases: dict[tuple[str, Format], Tensor] = {}
        self._floating: dict[str, Statistics] = {}
        self._statistics: dict[tuple[str, FormatsKey], Mapping[str, Statistics]] = {}
        self._looked: set[tuple[str, Operand, Format, Format | None]] = set()
        #: What the formats that were learned or looked at lose of the calibration samples.
        self.losses: dict[tuple[str, Operand, Kind], tuple[float, str]] = {}

    def norms(self, site: Site) -> tuple[str, ...]:
        """Module paths of the batch norms that are corrected if the site is quantized."""
        return self._norms.get(site.name, ())

    def corrects_bias(self, site: Site) -> bool:
        """Whether the site's bias is corrected if its weight is quantized."""
        return site.name in self._biased

    def learn(self, pairs: Iterable[tuple[Site, SiteFormats]]) -> None:
        """Learn whatever is missing for some pairs of a site and the formats of its operands.

        Args:
            pairs: the formats as the space gives them, not calibrated.
        """
        missing = [(site, formats) for site, formats in pairs if not self._knows(site, formats)]
        operands: set[tuple[str, Operand]] = set()
        for site, formats in missing:
            operands |= {(site.name, o) for o, form in formats.items() if self._looks_at(site, o, form)}
            if self._changes_bias(site, formats) or (formats and self.norms(site)):
                operands.add((site.name, "data_in"))
        unseen = operands - set(self._observed)
        if unseen:
            self._observed.update(observe(self._graph, sorted(unseen), self._x, self._corrects))
        for site, formats in missing:
            self._learn(site, formats)

    def _knows(self, site: Site, formats: SiteFormats) -> bool:
        known = all(
            not self._looks_at(site, o, f) or self._key(site, o, f, formats.get("weight")) in self._looked
            for o, f in formats.items()
        )
        if self._changes_bias(site, formats):
            known = known and (site.name, formats["weight"]) in self._biases
        if formats and self.norms(site):
            known = known and (site.name, _key_of(formats)) in self._statistics
        return known

    def _learn(self, site: Site, formats: SiteFormats) -> None:
        for operand in formats:
            if operand != "bias":
                self._learn_format(site, operand, formats, None)
        if self._changes_bias(site, formats) and (site.name, formats["weight"]) not in self._biases:
            inputs = self._observed[site.name, "data_in"].samples
            weight = self.format(site, "weight", formats["weight"])
            self._biases[site.name, formats["weight"]] = corrected_bias(self._graph, site, weight, inputs)
        if "bias" in formats:
            self._learn_format(site, "bias", formats, self.bias(site, formats.get("weight")))
        if formats and self.norms(site) and (site.name, _key_of(formats)) not in self._statistics:
            self._statistics[site.name, _key_of(formats)] = self._rescaled(site, formats)

    def _learn_format(self, site: Site, operand: Operand, formats: SiteFormats, sample: Tensor | None) -> None:
        """Calibrate a format on `sample`, or on the values that were observed at the operand."""
        key = self._key(site, operand, formats[operand], formats.get("weight"))
        if key in self._looked or not self._looks_at(site, operand, formats[operand]):
            return
        seen = self._observed[site.name, operand] if sample is None else Observed(sample)
        form = seen.calibrated(formats[operand])
        if formats[operand].calibrates:
            self._formats[key] = form
        self.losses = merged([self.losses, losses_of(site, operand, form, seen.values)])
        self._looked.add(key)

    def _looks_at(self, site: Site, operand: Operand, form: Format) -> bool:
        """Whether values of an operand are needed: a format learns from them, or what it loses is to be said."""
        return form.calibrates or self._looks or (operand != "bias" and site.parameter(operand) is not None)

    def _rescaled(self, site: Site, formats: SiteFormats) -> dict[str, Statistics]:
        # A traced site is called once, so there is one tensor of inputs.
        (x,) = self._observed[site.name, "data_in"].samples
        if site.name not in self._floating:
            self._floating[site.name] = output_statistics(self._graph, site, {}, None, x)
        bias = self.bias(site, formats.get("weight"))
        quantized = output_statistics(self._graph, site, self.formats(site, formats), bias, x)
        return {
            path: rescaled_statistics(self._graph.model.get_submodule(path), self._floating[site.name], quantized)
            for path in self.norms(site)
        }

    def _changes_bias(self, site: Site, formats: SiteFormats) -> bool:
        return self.corrects_bias(site) and "weight" in formats

    def _key(
        self, site: Site, operand: Operand, form: Format, weight: Format | None
    ) -> tuple[str, Operand, Format, Format | None]:
        """The key of a calibrated format. A bias is corrected before it is quantized, so its format depends on the
        format of the weight."""
        return site.name, operand, form, weight if operand == "bias" and self.corrects_bias(site) else None

    def format(self, site: Site, operand: Operand, form: Format, weight: Format | None = None) -> Format:
        """The calibrated format of an operand.

        Args:
            site: a site of the graph.
            operand: one of its operands.
            form: the format as the space gives it, not calibrated.
            weight: for a bias, the format of the same site's weight, not calibrated; None if it stays in float.
        """
        return self._formats[self._key(site, operand, form, weight)] if form.calibrates else form

    def formats(self, site: Site, formats: SiteFormats) -> dict[Operand, Format]:
        """The calibrated formats of an option: operand → format."""
        return {operand: self.format(site, operand, form, formats.get("weight")) for operand, form in formats.items()}

    def bias(self, site: Site, weight: Format | None) -> Tensor | None:
        """The site's corrected bias before it is quantized, shape (output channels,); None if it is not corrected."""
        return None if weight is None or not self.corrects_bias(site) else self._biases[site.name, weight]

    def statistics(self, site: Site, formats: SiteFormats) -> Mapping[str, Statistics]:
        """Module path of a batch norm behind the site → its corrected mean and variance; empty for a site in float."""
        return self._statistics[site.name, _key_of(formats)] if formats and self.norms(site) else {}

    def correction(self, site: Site, formats: SiteFormats) -> Correction:
        """The corrected bias and batch norm statistics of an option."""
        return Correction(self.bias(site, formats.get("weight")), self.statistics(site, formats))


def _key_of(formats: SiteFormats) -> FormatsKey:
    return tuple(sorted(formats.items(), key=lambda item: item[0]))
