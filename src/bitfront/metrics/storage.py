"""Storage of a model: mean bits per weight, and bytes of all parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from bitfront.formats.base import FLOAT_BITS
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import EvaluationContext, Metric, Runner, RunnerSettings, Side, Values, option_sum
from bitfront.metrics.coverage import all_weights
from bitfront.metrics.stored import stored_forms
from bitfront.spaces.base import Codes


class BitwidthSettings(RunnerSettings):
    """``[search.strategy.hw_runner.average_bitwidth]``."""

    compare_to: float = Field(32, gt=0, description="bits that `memory_density` compares with")
    over: Literal["all", "quantized"] = Field(
        "all", description="`all` weights of the model, where those in float count 32 bits; or only `quantized` ones"
    )


@RUNNERS.register("average_bitwidth")
class AverageBitwidth(Runner):
    """Mean bits per weight, and how many times smaller that is than `compare_to` bits."""

    Settings = BitwidthSettings
    settings: BitwidthSettings
    side: ClassVar[Side] = "hw_runner"
    closed_form: ClassVar[bool] = True
    produces = (
        Metric(
            "average_bitwidth",
            "bits",
            "minimize",
            "modelled",
            "mean bits per weight over all weights of the model, scales included",
        ),
        Metric("memory_density", "", "maximize", "modelled", "compare_to / average_bitwidth"),
    )

    def measure(self, context: EvaluationContext, codes: Codes) -> Mapping[str, Values]:
        """Both metrics of each candidate; with ``over = "quantized"`` 32 bits where no weight is quantized."""
        settings = self.settings
        options = context.space.options(codes)
        total, number = np.zeros(len(codes)), np.zeros(len(codes))
        for weight in all_weights(context.space):
            included = np.ones(len(codes)) if settings.over == "all" else weight.quantized(options)
            total += weight.bits(options) * included
            number += weight.elements * included
        average = np.divide(total, number, out=np.full(len(codes), float(FLOAT_BITS)), where=number > 0)
        return {"average_bitwidth": average, "memory_density": settings.compare_to / average}


@RUNNERS.register("model_size")
class ModelSize(Runner):
    """Bytes of all parameters and buffers as deployed."""

    side: ClassVar[Side] = "hw_runner"
    closed_form: ClassVar[bool] = True
    produces = (
        Metric(
            "model_size",
            "bytes",
            "minimize",
            "modelled",
            "parameters in their formats, scales included, plus float parameters and buffers",
        ),
    )

    def measure(self, context: EvaluationContext, codes: Codes) -> Mapping[str, Values]:
        """Bytes of each candidate. What several use is stored once in float if one of them uses it so, else once in
        each of their formats."""
        space = context.space
        options = space.options(codes)
        # Tensors with a single use are summed into one table per group.
        single = [np.zeros(group.size) for group in space.groups]
        total = np.zeros(len(codes))
        for stored in stored_forms(space):
            if len(stored.groups) == 1 and not stored.tensor.as_it_is:
                single[stored.groups[0]] += stored.bytes[0]
            else:
                total += stored.stored_bytes(options)
        return {"model_size": total + option_sum(single, options)}
