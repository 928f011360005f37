"""What metrics ask of the weights and biases of a space, rounded: how many are not zero, how many bits they have."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bitfront.engine.evaluation.calibration import Calibration
from bitfront.formats.base import Format, Operand
from bitfront.graph import Site
from bitfront.graph.capture import parameter
from bitfront.metrics.base import ParameterFigure
from bitfront.spaces.model_space import FormatSpace


class RoundedParameters:
    """Figures of rounded weights and biases. Each is computed once per format, and kept.

    Args:
        space: its options say which formats there are.
        calibration: what formats and corrections have learned. Whoever asks must compute on one thread.
    """

    def __init__(self, space: FormatSpace, calibration: Calibration) -> None:
        self._space, self._calibration = space, calibration
        self._tables: dict[tuple[int, Operand, ParameterFigure], NDArray[np.float64]] = {}

    def table(self, group: int, operand: Operand, figure: ParameterFigure) -> NDArray[np.float64]:
        """A figure of a parameter of a site under each option, float64, shape (options,); zeros where the site has no
        parameter of that name."""
        key = (group, operand, figure)
        if key not in self._tables:
            self._tables[key] = self._computed(group, operand, figure)
        return self._tables[key]

    def _computed(self, group: int, operand: Operand, figure: ParameterFigure) -> NDArray[np.float64]:
        site, options = self._space.sites[group], self._space.site_formats[group]
        if site.parameter(operand) is None:
            return np.zeros(len(options))
        known: dict[tuple[Format | None, Format | None], float] = {}  # once per format, not per option
        # A corrected bias follows from the format of the weight.
        corrected = operand == "bias" and self._calibration.corrects_bias(site)
        keys = [(formats.get(operand), formats.get("weight") if corrected else None) for formats in options]
        for form, weight in keys:
            if (form, weight) not in known:
                known[form, weight] = figure(site, *self._rounded(site, operand, form, weight))
        return np.array([known[key] for key in keys], dtype=np.float64)

    def _rounded(
        self, site: Site, operand: Operand, form: Format | None, weight: Format | None
    ) -> tuple[Format | None, Tensor]:
        """(the calibrated format, the values rounded by it)."""
        held = site.parameter(operand)
        assert held is not None
        values = parameter(self._space.graph.model, held[0])
        if weight is not None:
            self._calibration.learn([(site, {"weight": weight})])
            values = self._calibration.replaced(site, {"weight": weight}).get("bias", values)
        if form is None:
            return None, values
        calibrated = form.calibrated(values)
        if operand == "weight" and self._calibration.learns_rounding(site):
            self._calibration.learn([(site, {operand: form})])
            return calibrated, self._calibration.quantized(site, form)
        return calibrated, calibrated.quantize(values)


def count_nonzero(_site: Site, _form: Format | None, values: Tensor) -> float:
    """How many values of a parameter are not zero."""
    return float((values != 0).sum())
