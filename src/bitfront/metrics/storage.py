"""Storage of a model: mean bits per weight, and bytes of all parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from bitfront.formats.base import FLOAT_BITS
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import EvaluationContext, Metric, Runner, RunnerSettings, Side, Values, option_sum
from bitfront.spaces.base import Codes


class BitwidthSettings(RunnerSettings):
    """``[search.strategy.hw_runner.average_bitwidth]``."""

    compare_to: float = Field(32, gt=0, description="bits that `memory_density` compares with")
    over: Literal["all", "quantized"] = Field(
        "all", description="`all` sites with weights, where float weights count 32 bits; or only `quantized` ones"
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
            "mean bits per weight over the sites with weights",
        ),
        Metric("memory_density", "", "maximize", "modelled", "compare_to / average_bitwidth"),
    )

    def measure(self, context: EvaluationContext, codes: Codes) -> Mapping[str, Values]:
        """Both metrics of each candidate; with ``over = "quantized"`` 32 bits where no weight is quantized."""
        settings = self.settings
        space = context.space
        bits: list[NDArray[np.float64]] = []
        weights: list[NDArray[np.float64]] = []
        tables = zip(space.sites, space.bits("weight"), space.quantized("weight"), strict=True)
        for site, weight_bits, quantized in tables:
            count = float(site.stored_weights)
            included = np.ones(len(weight_bits)) if settings.over == "all" else quantized.astype(np.float64)
            bits.append(count * weight_bits * included)
            weights.append(count * included)
        options = space.options(codes)
        # Layers that compute something beside their class are no sites, and stay in float.
        apart = sum(layer.weights for layer in space.graph.left_out) if settings.over == "all" else 0
        total, number = option_sum(bits, options) + apart * FLOAT_BITS, option_sum(weights, options) + apart
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
        """Bytes of each candidate. A parameter shared by several sites is stored once, in its widest format."""
        space = context.space
        options = space.options(codes)
        uses: dict[str, list[tuple[int, NDArray[np.int64]]]] = defaultdict(list)
        for name, group, table in space.storage():
            uses[name].append((group, table))
        # Parameters that a single site uses are summed into one table per group.
        unshared = [np.zeros(group.size) for group in space.groups]
        for group, table in (tables[0] for tables in uses.values() if len(tables) == 1):
            unshared[group] += table
        total = option_sum(unshared, options) + float(fixed_bytes(space.graph.model, set(uses)))
        for tables in uses.values():
            if len(tables) > 1:
                total += np.maximum.reduce([table[options[:, group]] for group, table in tables])
        return {"model_size": total}


def fixed_bytes(model: nn.Module, without: set[str]) -> int:
    """Bytes of the parameters and buffers as they are in the model, except the parameters named in `without`.

    BatchNorm's step counter does not count, because it is not deployed.
    """
    tensors: list[Tensor] = [tensor for name, tensor in model.named_parameters() if name not in without]
    tensors += [tensor for name, tensor in model.named_buffers() if not name.endswith("num_batches_tracked")]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
