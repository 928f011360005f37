"""What a number format is: an immutable value that maps a tensor onto the numbers it can represent.

A format is parsed once from the parameters in the TOML, calibrated at most once on a sample of the tensor it will
quantize, and then applied any number of times. Applying it is a pure function of the tensor; gradients pass straight
through where the value is inside the representable range and are zero outside (the clipped straight-through
estimator of Jacob et al. 2018, section 3).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from bitfront.errors import nearest, one_of
from bitfront.formats.grid import Grid

if TYPE_CHECKING:
    from bitfront.formats.learned import LearnedRange

#: Name of an operand of a site, as its operation spells it: ``data_in``, ``weight``, ``bias``, ``weight_ih`` ...
Operand = str
#: Bits of a value that is left as it is.
FLOAT_BITS = 32
#: More values than this say nothing new about a scale; calibration looks at a random part of them.
CALIBRATION_VALUES = 65_536
#: Share of the absolute values that a ``percentile`` range covers: the mildest of those that Wu et al. 2020
#: (arXiv:2004.09602, section 5) compare, 99.9 to 99.9999 %, and the one that tells most from min-max.
PERCENTILE = 0.999


def channel_axis(operand: Operand) -> int:
    """The dimension along which a format per channel has its scales: features of what flows, rows of a parameter."""
    return 1 if operand.startswith("data_in") else 0


class FormatError(ValueError):
    """A format's parameters make no sense. `parameter` names the one to blame, None where it is the combination."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


@dataclass(frozen=True)
class FormatParameter:
    """One parameter of a format, as it stands in the TOML after the operand's name.

    Attributes:
        meaning: for the configuration reference.
        default: used where the TOML has none; ``...`` where one must be given.
        low, high: the range of an integer, both inclusive.
        words: the strings allowed beside, or instead of, an integer; ``"NA"`` stands for None.
        boolean: true and false are allowed.
    """

    meaning: str
    default: object = ...
    low: int | None = None
    high: int | None = None
    words: tuple[str, ...] = ()
    boolean: bool = False

    def allowed(self) -> str:
        """What may stand there, for messages and the reference."""
        parts = [f"a whole number from {self.low} to {self.high}"] if self.low is not None else []
        parts += ["true", "false"] if self.boolean else []
        return " or ".join(parts + [repr(w) for w in self.words])

    def check(self, name: str, value: object) -> None:
        """Raises FormatError if `value` may not stand there."""
        if isinstance(value, bool):
            ok = self.boolean
        elif isinstance(value, int):
            ok = self.low is not None and self.high is not None and self.low <= value <= self.high
        else:
            ok = ("NA" if value is None else value) in self.words
        if not ok:
            raise FormatError(f"{name} = {value!r} is not possible; allowed: {self.allowed()}", name)


@dataclass(frozen=True)
class Format(ABC):
    """A number format with its parameters. Frozen, hashable; equal formats quantize equally."""

    #: The parameters a user may set, by name.
    parameters: ClassVar[Mapping[str, FormatParameter]]
    #: The one of them that says how many bits a value has: ``"NA"`` for it leaves an operand in float. None for a
    #: format that has none; an operand is then quantized by an empty table, ``weight = [{}]``.
    bits_parameter: ClassVar[str | None] = "width"

    @classmethod
    def parse(cls, settings: Mapping[str, object], operand: Operand, *, signed: bool = True) -> Self:
        """The format for `settings`, e.g. ``{"width": 8, "frac_width": "NA"}``.

        Args:
            settings: parameter name → value, without the operand's prefix. ``"NA"`` is None.
            operand: what will be quantized.
            signed: whether the tensor can be negative (the input of a ReLU counts as not, since what is negative is
                cut off anyway).

        Raises:
            FormatError: an unknown parameter, a value out of range, or values that contradict each other.
        """
        for name in settings:
            if name not in cls.parameters:
                raise FormatError(
                    f"has no parameter {name!r}; {one_of(cls.parameters)}.{nearest(name, cls.parameters)}",
                    name,
                )
        values: dict[str, object] = {}
        for name, parameter in cls.parameters.items():
            value = settings.get(name, parameter.default)
            if value is ...:
                raise FormatError(f"needs {name!r} ({parameter.meaning}); allowed: {parameter.allowed()}", name)
            value = None if value == "NA" else value
            if name in settings:
                parameter.check(name, value)
            values[name] = value
        return cls._build(values, operand, signed)

    @classmethod
    def leaves_float(cls, settings: Mapping[str, object]) -> bool:
        """Whether `settings`, as for :meth:`parse`, leave the operand in float."""
        if cls.bits_parameter is None:
            return False
        return not settings or settings.get(cls.bits_parameter, ...) in (None, "NA")

    @classmethod
    @abstractmethod
    def _build(cls, values: Mapping[str, object], operand: Operand, signed: bool) -> Self:
        """The format for complete, individually checked values."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of one stored value."""

    @property
    def rank(self) -> float:
        """Among formats of equal bits the one that ranks lowest is tried first."""
        return 0.0

    def overhead_bits(self, shape: tuple[int, ...]) -> int:  # noqa: ARG002
        """Bits stored once for a tensor of `shape` beside its values, e.g. its scales."""
        return 0

    @property
    def calibrates(self) -> bool:
        """Whether :meth:`calibrated` must be called with a sample before :meth:`quantize`."""
        return False

    def calibrated(self, sample: Tensor) -> Self:  # noqa: ARG002
        """The same format with whatever it learns from `sample` (the tensor itself, or typical values of it)."""
        return self

    @property
    def grid(self) -> Grid | None:
        """The whole numbers behind the values, where they are the same for every tensor; None elsewhere."""
        return None

    def grid_of(self, x: Tensor) -> Grid | None:  # noqa: ARG002
        """The grid on which ``round(x)`` lies, None where there is none."""
        return self.grid

    @abstractmethod
    def round(self, x: Tensor) -> Tensor:
        """`x` mapped to the nearest representable values, without gradients. Same shape and dtype."""

    @abstractmethod
    def bounds(self, x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """The smallest and the largest representable value, broadcastable to `x`."""

    def learned_range(self) -> LearnedRange | None:
        """A module that rounds as this format does and learns its range; None where there is no range to learn."""
        return None

    @property
    @abstractmethod
    def label(self) -> str:
        """A few characters for tables, e.g. ``int8.4``."""

    def quantize(self, x: Tensor) -> Tensor:
        """`x` as this format holds it: same shape and dtype, with clipped straight-through gradients."""
        rounded = self.round(x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return rounded
        low, high = self.bounds(x)
        inside = torch.clamp(x, low, high)  # type: ignore[arg-type]
        # Subtracts exact zeros (adding them would turn −0 into 0): the value stays the rounded one to the last bit, the
        # gradient is the clamp's.
        return rounded.detach() - (inside.detach() - inside)


def thinned(sample: Tensor) -> Tensor:
    """At most CALIBRATION_VALUES values of `sample`, flat, float64: enough to choose a scale by its squared error.

    Drawn at random under a fixed seed: an even stride would see some features only, wherever it divides their number.
    """
    flat = sample.detach().flatten()
    if flat.numel() > CALIBRATION_VALUES:
        generator = torch.Generator().manual_seed(0)
        flat = flat[torch.randint(flat.numel(), (CALIBRATION_VALUES,), generator=generator).to(flat.device)]
    return flat.double()


def percentile_range(sample: Tensor) -> tuple[float, float]:
    """(low, high) of `sample` without the largest 0.1 % of its absolute values (the definition of Wu et al. 2020,
    arXiv:2004.09602, section 3.3): the observed range cut to [−p, p], where p is the smallest of the absolute values
    that no more than 0.1 % of them exceed. Nothing is cut off fewer than 1,000 values.

    Args:
        sample: any shape, at least one value; of large ones a part is looked at, as ``thinned`` says.
    """
    size = thinned(sample).abs()
    reach = float(size.kthvalue(math.ceil(PERCENTILE * len(size))).values)
    return max(float(sample.min()), -reach), min(float(sample.max()), reach)
