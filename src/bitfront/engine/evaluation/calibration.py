"""Calibration: what the options of a space learn from the calibration samples, each thing once per search.

A format learns its scale. If corrections are configured, a site learns how its weight is rounded, its corrected bias
and the statistics of the batch norms behind it, in this order. All of this depends on one site and the formats of its
operands only, because the inputs are those of the float model. So it is stored per option, in a memory that outlives
this process (``memory.py``).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast

from torch import Tensor

from bitfront.engine.evaluation.memory import Known, Memory, code_of
from bitfront.engine.evaluation.range_loss import Kind, losses_of, merged
from bitfront.engine.storage.learned import Entry, Learned
from bitfront.formats.base import Format, Operand
from bitfront.graph import Graph, Site
from bitfront.graph.capture import parameter
from bitfront.transforms import SiteFormats
from bitfront.transforms.correct import (
    Correction,
    Statistics,
    bias_in_steps,
    corrected_bias,
    has_bias,
    norms_behind,
    output_statistics,
    rescaled_statistics,
    step_of_sums,
)
from bitfront.transforms.observe import Observed, observe
from bitfront.transforms.rounding import adaptive_weight, has_two_sides, learns_rounding


@dataclass(frozen=True)
class Corrections:
    """Which corrections are done for quantized sites; none by default.

    Attributes:
        bias: correct biases for the error of the quantized weights.
        batch_norm: correct the statistics of batch norms that directly follow a site.
        rounding: learn how weights are rounded, in so many iterations; 0: they are rounded to the nearest value.
        integer_bias: round biases without a format to multiples of the steps of the sums that they are added to.
    """

    bias: bool = False
    batch_norm: bool = False
    rounding: int = 0
    integer_bias: bool = False

    def __str__(self) -> str:
        """Those that are done, for keys of what is learned."""
        rounding = [f"rounding in {self.rounding} iterations"] if self.rounding else []
        return ", ".join([*(n for n in ("bias", "batch_norm", "integer_bias") if getattr(self, n)), *rounding])


class Calibration:
    """Calibrated formats and corrections. Call `learn` first; the other methods only look up what it has learned.

    Args:
        graph: the float model.
        x: calibration samples, float32, shape (samples, ...), on the CPU.
        corrections: which corrections are done.
        looks: say what formats lose of an input also where they learn nothing from it, which takes a forward pass.
        memory: where what is learned is looked up and left for others; None: it is of this object alone.
    """

    def __init__(
        self, graph: Graph, x: Tensor, corrections: Corrections, looks: bool = False, memory: Memory | None = None
    ) -> None:
        self._looks, self._memory = looks, memory
        self._graph, self._x = graph, x
        self._corrections, self._iterations = str(corrections), corrections.rounding
        self._rounded = {s.name for s in graph.sites if corrections.rounding and learns_rounding(graph, s)}
        self._biased = {s.name for s in graph.sites if corrections.bias and has_bias(graph, s)}
        self._in_steps = {s.name for s in graph.sites if corrections.integer_bias and has_bias(graph, s)}
        self._norms = {s.name: norms_behind(graph, s) for s in graph.sites} if corrections.batch_norm else {}
        self._corrects = bool(self._rounded or self._biased or self._norms)
        self._asked: set[Learned] = set()
        self._new: dict[Learned, Entry] = {}
        #: What the formats that were learned or looked at here lose of the calibration samples.
        self.losses: dict[tuple[str, Operand, Kind], tuple[float, str]] = {}

    @cached_property
    def _filed(self) -> tuple[str, Known]:
        """(fingerprint of the model and its samples, what is known of them). Only read where there is something to
        learn: it takes a while."""
        return ("", Known()) if self._memory is None else self._memory.of(self._graph, self._x)

    @property
    def _entries(self) -> dict[Learned, Entry]:
        return self._filed[1].entries

    def norms(self, site: Site) -> tuple[str, ...]:
        """Module paths of the batch norms that are corrected if the site is quantized."""
        return self._norms.get(site.name, ())

    def learns_rounding(self, site: Site) -> bool:
        """Whether it is learned how the site's weight is rounded, in formats that have a grid."""
        return site.name in self._rounded

    def corrects_bias(self, site: Site) -> bool:
        """Whether the site's bias is corrected if its weight is quantized."""
        return site.name in self._biased

    def learn(self, pairs: Iterable[tuple[Site, SiteFormats]]) -> None:
        """Learn whatever is missing for some pairs of a site and the formats of its operands.

        Args:
            pairs: the formats as the space gives them, not calibrated.
        """
        began = time.perf_counter()
        missing = [(site, formats) for site, formats in pairs if not self._knows(site, formats)]
        if not missing:
            return
        operands: set[tuple[str, Operand]] = set()
        for site, formats in missing:
            operands |= {(site.name, o) for o in formats if self._lacks(self._key(site, o, formats))}
            if any(self._lacks(key) for key in self._corrections_of(site, formats)):
                operands.add((site.name, "data_in"))
        seen = self._filed[1].observed
        unseen = sorted(pair for pair in operands if (self._corrects, *pair) not in seen)
        if unseen:
            observed = observe(self._graph, unseen, self._x, self._corrects)
            seen.update({(self._corrects, *pair): what for pair, what in observed.items()})
        for site, formats in missing:
            self._learn(site, formats)
        new, self._new = self._new, {}
        if self._memory is not None and new:
            self._memory.add(self._filed[0], new, time.perf_counter() - began)

    def _observed(self, site: Site, operand: Operand) -> Observed:
        return self._filed[1].observed[self._corrects, site.name, operand]

    def _knows(self, site: Site, formats: SiteFormats) -> bool:
        """Whether nothing is left to learn for a pair; what its formats lose is taken up."""
        looked = [self._key(site, o, formats) for o, form in formats.items() if self._looks_at(site, o, form)]
        for key in looked:
            self._take_up(site, key)
        return not any(self._lacks(key) for key in (*looked, *self._corrections_of(site, formats)))

    def _lacks(self, key: Learned) -> bool:
        if key.kind == "format" and not self._looks_at(self._graph.site(key.site), key.operand, _of(key)):
            return False
        return key not in self._entries

    def _take_up(self, site: Site, key: Learned) -> None:
        if key not in self._asked and key in self._entries:
            self._asked.add(key)
            losses = self._entries[key].losses
            known = {(site.title, key.operand, cast(Kind, kind)): loss for kind, loss in losses.items()}
            self.losses = merged([self.losses, known])

    def _corrections_of(self, site: Site, formats: SiteFormats) -> list[Learned]:
        keys = []
        if self._changes_rounding(site, formats.get("weight")):
            keys.append(self._rounding_key(site, formats["weight"]))
        if self._changes_bias(site, formats):
            keys.append(self._bias_key(site, formats["weight"]))
        if formats and self.norms(site):
            keys.append(self._norms_key(site, formats))
        return keys

    def _learn(self, site: Site, formats: SiteFormats) -> None:
        for operand in formats:
            if operand != "bias":
                self._learn_format(site, operand, formats)
        if self._changes_rounding(site, formats.get("weight")):
            self._learn_rounding(site, formats["weight"])
        if self._changes_bias(site, formats):
            key = self._bias_key(site, formats["weight"])
            if key not in self._entries:
                weight, inputs = self.quantized(site, formats["weight"]), self._observed(site, "data_in").samples
                self._remember(key, Entry(tensors={"bias": corrected_bias(self._graph, site, weight, inputs)}))
        if "bias" in formats:
            self._learn_format(site, "bias", formats)
        if formats and self.norms(site):
            key = self._norms_key(site, formats)
            if key not in self._entries:
                self._remember(key, Entry(tensors=self._rescaled(site, formats)))

    def _learn_rounding(self, site: Site, weight: Format) -> None:
        key = self._rounding_key(site, weight)
        if key in self._entries:
            return
        calibrated = self.format(site, "weight", weight)
        tensors = {}
        if has_two_sides(calibrated):
            inputs = self._observed(site, "data_in").samples
            tensors["weight"] = adaptive_weight(self._graph, site, calibrated, inputs, self._iterations)
        self._remember(key, Entry(tensors=tensors))

    def _learn_format(self, site: Site, operand: Operand, formats: SiteFormats) -> None:
        """Calibrate a format on the values that were observed at the operand, or on the corrected bias."""
        key, form = self._key(site, operand, formats), formats[operand]
        if not self._looks_at(site, operand, form):
            return
        if key not in self._entries:
            bias = self.bias(site, formats) if operand == "bias" else None
            seen = self._observed(site, operand) if bias is None else Observed(bias)
            calibrated = seen.calibrated(form)
            losses = losses_of(site, operand, calibrated, seen.values)
            lost: dict[str, tuple[float, str]] = {kind: loss for (_, _, kind), loss in losses.items()}
            self._remember(key, Entry(calibrated if form.calibrates else None, losses=lost))
        self._take_up(site, key)

    def _remember(self, key: Learned, entry: Entry) -> None:
        self._entries[key] = self._new[key] = entry

    def _looks_at(self, site: Site, operand: Operand, form: Format) -> bool:
        """Whether values of an operand are needed: a format learns from them, or what it loses is to be said."""
        return form.calibrates or self._looks or (operand != "bias" and site.parameter(operand) is not None)

    def _rescaled(self, site: Site, formats: SiteFormats) -> dict[str, Tensor]:
        # A traced site is called once, so there is one tensor of inputs.
        (x,) = self._observed(site, "data_in").samples
        floating = self._filed[1].statistics
        if site.name not in floating:
            floating[site.name] = output_statistics(self._graph, site, {}, {}, x)
        replaced = self.replaced(site, formats)
        quantized = output_statistics(self._graph, site, self.formats(site, formats), replaced, x)
        result = {}
        for path in self.norms(site):
            norm = self._graph.model.get_submodule(path)
            result[f"{path} mean"], result[f"{path} variance"] = rescaled_statistics(
                norm, floating[site.name], quantized
            )
        return result

    def _changes_bias(self, site: Site, formats: SiteFormats) -> bool:
        return self.corrects_bias(site) and "weight" in formats

    def _key(self, site: Site, operand: Operand, formats: SiteFormats) -> Learned:
        """The key of a calibrated format. A bias is corrected before it is quantized, so its format depends on the
        format of the weight."""
        form, weight = formats[operand], formats.get("weight")
        if operand != "bias" or weight is None or not self.corrects_bias(site):
            return _learned("format", site, {operand: form}, operand)
        return _learned("format", site, {operand: form, "weight": weight}, operand, self._corrections)

    def _changes_rounding(self, site: Site, weight: Format | None) -> bool:
        return weight is not None and self.learns_rounding(site)

    def _rounding_key(self, site: Site, weight: Format) -> Learned:
        return _learned("rounding", site, {"weight": weight}, "weight", f"{self._iterations} iterations")

    def _bias_key(self, site: Site, weight: Format) -> Learned:
        return _learned("bias", site, {"weight": weight}, "bias", self._corrections)

    def _norms_key(self, site: Site, formats: SiteFormats) -> Learned:
        return _learned("norms", site, formats, "", self._corrections)

    def format(self, site: Site, operand: Operand, form: Format, weight: Format | None = None) -> Format:
        """The calibrated format of an operand.

        Args:
            site: a site of the graph.
            operand: one of its operands.
            form: the format as the space gives it, not calibrated.
            weight: for a bias, the format of the same site's weight, not calibrated; None if it stays in float.
        """
        if not form.calibrates:
            return form
        given = {operand: form} if weight is None else {operand: form, "weight": weight}
        calibrated = self._entries[self._key(site, operand, given)].form
        assert calibrated is not None
        return calibrated

    def formats(self, site: Site, formats: SiteFormats) -> dict[Operand, Format]:
        """The calibrated formats of an option: operand → format."""
        return {operand: self.format(site, operand, form, formats.get("weight")) for operand, form in formats.items()}

    def rounds_bias(self, site: Site, formats: SiteFormats) -> bool:
        """Whether the site's bias is rounded to steps of its sums, which the formats of input and weight give."""
        return site.name in self._in_steps and "bias" not in formats and {"data_in", "weight"} <= formats.keys()

    def bias(self, site: Site, formats: SiteFormats) -> Tensor | None:
        """The site's bias under an option, corrected or in steps of the sums, before it is quantized, shape (output
        channels,); None if nothing changes it."""
        weight, bias = formats.get("weight"), None
        if weight is not None and self.corrects_bias(site):
            bias = self._entries[self._bias_key(site, weight)].tensors["bias"]
        if not self.rounds_bias(site, formats):
            return bias
        step = step_of_sums(site, self.formats(site, formats))
        if step is None or site.bias is None:
            return bias
        return bias_in_steps(parameter(self._graph.model, site.bias) if bias is None else bias, step)[0]

    def weight(self, site: Site, weight: Format | None) -> Tensor | None:
        """The site's weight in this format with learned rounding; None where each value is rounded to the nearest."""
        if weight is None or not self._changes_rounding(site, weight):
            return None
        return self._entries[self._rounding_key(site, weight)].tensors.get("weight")

    def quantized(self, site: Site, weight: Format) -> Tensor:
        """The site's quantized weight in this format."""
        assert site.weight is not None
        learned = self.weight(site, weight)
        if learned is None:
            return self.format(site, "weight", weight).round(parameter(self._graph.model, site.weight))
        return learned

    def replaced(self, site: Site, formats: SiteFormats) -> dict[Operand, Tensor]:
        """Operand → what takes the place of its parameter under an option."""
        return Correction(bias=self.bias(site, formats), weight=self.weight(site, formats.get("weight"))).parameters

    def statistics(self, site: Site, formats: SiteFormats) -> Mapping[str, Statistics]:
        """Module path of a batch norm behind the site → its corrected mean and variance; empty for a site in float."""
        if not formats or not self.norms(site):
            return {}
        tensors = self._entries[self._norms_key(site, formats)].tensors
        return {path: (tensors[f"{path} mean"], tensors[f"{path} variance"]) for path in self.norms(site)}

    def correction(self, site: Site, formats: SiteFormats) -> Correction:
        """The weight, bias and batch norm statistics of an option, as far as they are corrected."""
        weight = self.weight(site, formats.get("weight"))
        return Correction(self.bias(site, formats), self.statistics(site, formats), weight)


def _of(key: Learned) -> Format:
    """The format that a key of the kind "format" is about."""
    return dict(key.formats)[key.operand]


def _learned(
    kind: Literal["format", "bias", "norms", "rounding"],
    site: Site,
    formats: SiteFormats,
    operand: Operand = "",
    corrections: str = "",
) -> Learned:
    # Equal formats of edited code are not equal.
    modules = {type(form).__module__ for form in formats.values()}
    code = "" if all(name.startswith("bitfront.") for name in modules) else code_of(modules)
    given = tuple(sorted(formats.items(), key=lambda item: item[0]))
    return Learned(kind, site.name, operand, given, " ".join(text for text in (corrections, code) if text))
