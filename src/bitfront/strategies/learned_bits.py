"""Learned bits: the weights and the bits of every value are trained together, and each cycle of the training gives
networks. This strategy asks for them in the order of the course."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from bitfront.config import Table
from bitfront.kernels.whole import Rounding
from bitfront.spaces.base import Codes, Space
from bitfront.strategies import STRATEGIES
from bitfront.strategies.base import History, Strategy, StrategySettings

#: What shares its bits: nothing, the weights of an output channel (the values of an input channel), the whole operand.
Granularity = Literal["element", "channel", "layer"]
MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "element": "each weight and each input value has bits of its own; for FPGAs",
        "channel": "weights of an output channel share their bits, and values of an input channel; for processors",
        "layer": "all weights of a layer share their bits, and all its inputs; for processors with few widths",
    }
)
#: A supported width, sign included; 0: removed.
Width = Annotated[int, Field(ge=0, le=20)]
Widths = Annotated[list[Width], Field(min_length=1)]


class LayerSettings(Table):
    """The keys of ``[search.strategy.setup.layers.KEY]``. What is missing is as for all layers."""

    weight: Granularity | None = Field(None, description="which weights share their bits")
    data_in: Granularity | None = Field(None, description="which values of the input share their bits")
    weight_width: Widths | None = Field(None, description="supported widths of its weights")
    data_in_width: Widths | None = Field(None, description="supported widths of its input")
    bias_width: Widths | None = Field(None, description="supported widths of its biases")
    data_in_rounding: Rounding | None = Field(None, description="how values of its input are rounded")


class LearnedBitsSettings(StrategySettings):
    """The keys of ``[search.strategy.setup]`` of learned bits."""

    cost: Literal["ebops", "bops", "model_size", "average_bitwidth"] | None = Field(
        None, description="the metric that is pressed on; default: the first of these that is an objective"
    )
    weight: Granularity = Field("element", description="which weights share their bits: none, a channel, a layer")
    data_in: Granularity | None = Field(
        None, description="which values of an input share their bits; default: as the weights"
    )
    weight_width: Widths | None = Field(
        None,
        description="widths that weights may have, with the sign, e.g. [4, 8]; 0: all weights that share bits may be "
        "removed, as whole channels always may. Not with `element`. Default: any",
    )
    data_in_width: Widths | None = Field(None, description="the same for inputs; after a ReLU they have no sign")
    bias_width: Widths | None = Field(None, description="the same for biases, each with bits of its own")
    data_in_rounding: Rounding = Field(
        "even",
        description="how values of inputs are rounded: half to even, half up, or down; weights and biases are rounded "
        "half to even, once and for all. Values out of range saturate",
    )
    layers: dict[str, LayerSettings] = Field(
        default={}, description="layer, or type of layers (`linear`, `conv2d`) → these six keys, where they differ"
    )
    cycles: int | None = Field(
        None,
        ge=1,
        description="cycles of rising pressure. Default: 20; with `n_trials` as many as give so many networks; with "
        "`timeout` alone as many as the time is enough for, at most 20",
    )
    epochs: float | None = Field(
        None,
        gt=0,
        description="epochs of a cycle while all weights are alive; later cycles have more, in about the same time. "
        "Default: 6,300 steps; with `timeout` alone as many as there is time for",
    )
    members: int = Field(1, ge=1, le=64, description="networks that are trained beside each other, from several seeds")
    float_epochs: int = Field(
        0,
        ge=0,
        description="members after the first start from new weights, trained in float for so many epochs; 0: from the "
        "model's weights",
    )
    networks: int = Field(6, ge=1, description="networks that each cycle gives, per member")
    batch_size: int | None = Field(
        None, ge=16, description="samples per step; default: a power of two from 32 to 1,024, near 1/500 of the samples"
    )
    learning_rate: float = Field(3e-3, gt=0, description="at the start of each cycle; follows a cosine down to 0")
    teacher: str = Field(
        "none",
        description="whose answers take the place of labels: `none`, `self` (the float model), `ensemble` (two float "
        "models, twice as wide, trained first), or a checkpoint of the model",
    )
    temperature: float = Field(0.7, gt=0, description="of a teacher's answers; below 1 they are sharper")
    bits_rate: float = Field(2.0, gt=0, description="how many times as fast bits learn as weights")
    patience: int | None = Field(
        None,
        ge=1,
        description="a weight that was zero after so many epochs in a row is removed; default: those of 2,640 steps",
    )
    first_pressure: float | None = Field(
        None,
        gt=0,
        description="pressure of the first cycle in nats per unit of the cost; default: 0.02 / cost at the start. Of a "
        "loss that is not in nats, such as mse, in its unit; default: times the loss of a constant answer",
    )
    last_pressure: float | None = Field(
        None,
        gt=0,
        description="pressure of the last cycle; default: 200 × the first, 2,000 × if all weights share their bits, "
        "and more where accuracy hardly suffers",
    )


@STRATEGIES.register("learned_bits")
class LearnedBits(Strategy):
    """Trains weights and bits together under a rising pressure; every network of its course is a candidate."""

    Settings = LearnedBitsSettings
    settings: LearnedBitsSettings
    variant = "weight"
    variants = MEANINGS
    exhaustive = True
    looks_back = False
    usual_objectives = ("accuracy", "ebops")
    trains_bits = True

    def __init__(self, space: Space, objectives: int, seed: int, settings: LearnedBitsSettings | None = None) -> None:
        super().__init__(space, objectives, seed, settings)
        #: The networks of a cycle.
        self.batch = self.settings.members * self.settings.networks

    def propose(self, history: History, n: int, rng: np.random.Generator) -> Codes:  # noqa: ARG002
        """The networks of the next cycle that are not known yet, int64, shape (candidates, parameters)."""
        for start in range(0, self.space.size, self.batch):
            block = self.space.numbered(start, min(start + self.batch, self.space.size))
            unknown = block[history.rows(block) < 0]
            if len(unknown):
                return unknown[:n]
        return np.zeros((0, len(self.space.parameters)), dtype=np.int64)
