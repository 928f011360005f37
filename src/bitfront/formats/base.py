"""What a number format is: an immutable value that maps a tensor onto the numbers it can represent.

A format is parsed once from the parameters in the TOML, calibrated at most once on a sample of the tensor it will
quantize, and then applied any number of times. ``Format`` says of each method when it is called, by whom, and with
what; ``bitfront.testing.check_format`` checks what it promises.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfront.errors import nearest, one_of
from bitfront.formats import FLOAT_BITS as FLOAT_BITS
from bitfront.formats.grid import Grid

if TYPE_CHECKING:
    from bitfront.formats.learned import LearnedRange

#: Name of an operand of a site, as its operation spells it: ``data_in``, ``weight``, ``bias``, ``weight_ih`` ...
Operand = str
#: More values than this do not improve a scale; calibration uses a random part of them.
CALIBRATION_VALUES = 65_536
#: Share of the absolute values that a ``percentile`` range covers: the mildest of those that Wu et al. 2020
#: (arXiv:2004.09602, section 5) compare, 99.9 to 99.9999 %, and the one that tells most from min-max.
PERCENTILE = 0.999


@dataclass(frozen=True)
class OperandKind:
    """What a format must know of an operand beside its values.

    Attributes:
        role: an activation (also a value inside an operation, such as a state), a weight or a bias.
        samples: whether the first dimension holds samples: values of two samples must never depend on one another.
        channel_axis: the dimension along which a format per channel has its scales, the output channels of a weight;
            negative: counted from the end; None: there are no channels, and one scale.
        summed_axis: the dimension along which products are summed, the input channels of a weight; likewise negative.
            None: of a weight whose channels are not the first dimension, the one before them; otherwise the format has
            a rule.
    """

    role: Literal["activation", "weight", "bias"]
    samples: bool
    channel_axis: int | None
    summed_axis: int | None = None

    @property
    def stored_weight(self) -> bool:
        """Whether it is a weight that is a parameter, and so does not depend on the samples."""
        return self.role == "weight" and not self.samples

    @property
    def sums(self) -> int | None:
        """The axis of the sums, as ``summed_axis`` says; None: by the rule of the format."""
        if self.summed_axis is None and self.stored_weight and self.channel_axis:
            return self.channel_axis - 1
        return self.summed_axis

    def __str__(self) -> str:
        """As in messages."""
        if self.role == "weight":
            return "a weight that depends on the samples" if self.samples else "a weight"
        return "an activation" if self.role == "activation" else "a bias"


#: The usual kinds: inputs, parameters of a Linear or a convolution, and a weight that depends on the samples, as the
#: second factor of a product of activations does.
ACTIVATION = OperandKind("activation", samples=True, channel_axis=1)
WEIGHT = OperandKind("weight", samples=False, channel_axis=0)
BIAS = OperandKind("bias", samples=False, channel_axis=0)
FACTOR = OperandKind("weight", samples=True, channel_axis=1)


def dimension(axis: int | None, rank: int) -> int | None:
    """Which dimension of a tensor of this rank an axis is; None where the tensor lacks it. A vector has no axis that is
    counted from the end: a product sums over all of it."""
    if axis is None or axis >= rank or (axis < 0 and (rank < 2 or axis + rank < 0)):
        return None
    return axis % rank


class FormatError(ValueError):
    """The parameters of a format are not possible. `parameter` is the wrong one; None if it is the combination."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


@dataclass(frozen=True)
class FormatParameter:
    """One parameter of a format. In the TOML, its key has the name of the operand as prefix.

    Attributes:
        meaning: the text in the configuration reference.
        default: the value if the TOML has none; ``...`` if the TOML must have one.
        low, high: the range of an integer, both inclusive.
        words: the strings that are allowed; ``"NA"`` means None.
        boolean: whether true and false are allowed.
        listed: the value is a list of integers in that range, and not one of them. A format gets it as a tuple.
    """

    meaning: str
    default: object = ...
    low: int | None = None
    high: int | None = None
    words: tuple[str, ...] = ()
    boolean: bool = False
    listed: bool = False

    def allowed(self) -> str:
        """The allowed values as text, for messages and the reference."""
        numbers = "a list of whole numbers" if self.listed else "a whole number"
        parts = [f"{numbers} from {self.low} to {self.high}"] if self.low is not None else []
        parts += ["true", "false"] if self.boolean else []
        return " or ".join(parts + [repr(w) for w in self.words])

    def check(self, name: str, value: object) -> None:
        """Raises FormatError if `value` is not allowed."""
        if isinstance(value, bool):
            ok = self.boolean
        elif isinstance(value, int):
            ok = not self.listed and self._in_range(value)
        elif isinstance(value, list | tuple):
            ok = self.listed and bool(value) and all(map(self._in_range, value))
        else:
            ok = ("NA" if value is None else value) in self.words
        if not ok:
            raise FormatError(f"{name} = {value!r} is not possible; allowed: {self.allowed()}", name)

    def _in_range(self, value: object) -> bool:
        number = isinstance(value, int) and not isinstance(value, bool)
        return number and self.low is not None and self.high is not None and self.low <= cast(int, value) <= self.high


@dataclass(frozen=True)
class Format(ABC):
    """A number format with its parameters: the base class of every format.

    A subclass is a frozen dataclass whose fields are its parameters and its calibrated values: None, bool, int, float,
    str, or tuples of these, nested or not. Only they are compared, hashed, and kept in a run folder (as JSON under the
    registered name, so no field may be called ``format``). Equal formats must quantize equally.

    Every method is a pure function: it changes neither the format nor a tensor, draws random numbers only from a fixed
    seed, and stores nothing that could change a later result. Methods are called from several threads and processes at
    once, with tensors on the CPU or a GPU, of float32 or float64.

    A subclass must define ``parameters``, ``_build``, ``bits``, ``label``, ``round`` and ``bounds``. The other methods
    have defaults, for a format that learns nothing, stores nothing beside its values and has no grid.
    """

    #: The parameters a user may set, by name. Read for the configuration reference, and by the space for every key of
    #: the TOML.
    parameters: ClassVar[Mapping[str, FormatParameter]]
    #: The parameter that says how many bits a value has; ``"NA"`` for it leaves an operand in float. None for a format
    #: without one: an operand is then quantized by an empty table, ``weight = [{}]``.
    bits_parameter: ClassVar[str | None] = "width"
    #: Whether calibration lets the bounds cover nearly all values, so that a note is worth writing if many are beyond.
    #: False where the bounds are means, as for binary numbers.
    covers_range: ClassVar[bool] = True
    #: Whether ``round`` gives the same bits in whatever order the values lie in memory. A format that adds up values,
    #: as for a mean, does not. It saves the evaluation a copy.
    any_memory_order: ClassVar[bool] = False

    @classmethod
    def parse(cls, settings: Mapping[str, object], kind: OperandKind, *, signed: bool = True) -> Self:
        """The format for `settings`, e.g. ``{"width": 8, "frac_width": "NA"}``.

        The space calls it for every operand of every site and every combination of parameters that the TOML allows,
        before any work is done, and again when a candidate is read from a configuration. Do not override it;
        override :meth:`_build`.

        Args:
            settings: parameter name → value, without the operand's prefix. ``"NA"`` is None.
            kind: what will be quantized.
            signed: whether the tensor can be negative. False for the input of a ReLU, which removes negative values
                anyway.

        Raises:
            FormatError: an unknown parameter or a value out of range (an error of the configuration), or values that
                contradict each other (such combinations are left out of the space).
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
            values[name] = tuple(value) if isinstance(value, list) else value
        return cls._build(values, kind, signed)

    @classmethod
    def leaves_float(cls, settings: Mapping[str, object]) -> bool:
        """Whether `settings`, as for :meth:`parse`, leave the operand in float.

        The space calls it before :meth:`parse`. Do not override it.
        """
        if cls.bits_parameter is None:
            return False
        return not settings or settings.get(cls.bits_parameter, ...) in (None, "NA")

    @classmethod
    @abstractmethod
    def _build(cls, values: Mapping[str, object], kind: OperandKind, signed: bool) -> Self:
        """The format for complete values, each of which is allowed. Called by :meth:`parse` only.

        Args:
            values: every parameter → its value or default; ``"NA"`` is None.
            kind, signed: as in :meth:`parse`.

        Raises:
            FormatError: the values contradict each other. Its `parameter` must be None: then the combination is
                left out. Otherwise the configuration is refused.
        """

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of one stored value, 1 to 32; the value of ``bits_parameter`` where there is one.

        Metrics, tables and the report read it, also before calibration; calibration must not change it.
        """

    @property
    @abstractmethod
    def label(self) -> str:
        """A few characters for tables, e.g. ``int8.4``: at most 20, without blanks.

        Read before calibration for the options of a space, and after it for the formats of a rebuilt model. Formats
        that are options of one choice should have different labels.
        """

    @property
    def rank(self) -> float:
        """Of formats with equal bits, the one with the lowest rank is tried first.

        The space reads it for the uniform candidates at the start of a search, before calibration.
        """
        return 0.0

    @property
    def has_sign(self) -> bool:
        """Whether one of the bits of a value is its sign; also before calibration, which must not change it. Metrics
        that count the bits of magnitudes alone read it."""
        return True

    @property
    def saturates(self) -> bool:
        """Whether a value beyond :meth:`bounds` becomes the nearest bound. If not, it comes back on the other side, and
        gradients pass everywhere."""
        return True

    @property
    def value_bits(self) -> NDArray[np.int64] | None:
        """Bits of the magnitude of each value, without a sign, int64, of the shape of the operand without samples; None
        where all values have the same bits. Metrics that multiply bits with bits read it."""
        return None

    def overhead_bits(self, shape: tuple[int, ...]) -> int:  # noqa: ARG002
        """Bits that are stored once per tensor in addition to its values, e.g. for scales.

        The space calls it for every parameter of the model, for the metrics of size, also before calibration;
        calibration must not change the result.

        Args:
            shape: shape of the whole tensor.
        """
        return 0

    @property
    def calibrates(self) -> bool:
        """Whether :meth:`calibrated` must be called with a sample before :meth:`round`. False after that."""
        return False

    def calibrated(self, sample: Tensor) -> Self:  # noqa: ARG002
        """The same format, calibrated on `sample`; the format itself if :attr:`calibrates` is false.

        Called once per site, operand and format of a search, and again in each process that evaluates: it must depend
        on `sample` alone. Before a search it is also called with a stand-in, to see whether a runtime has a kernel.

        Args:
            sample: for a parameter, the parameter in float. Otherwise the values of the operand in the float model on
                the calibration samples; the first dimension is the samples. It may have NaN and infinite values, if the
                model overflows or has masks: they should not decide.
        """
        return self

    def calibrated_on(self, sample: Tensor, ends: Tensor) -> Self:
        """As :meth:`calibrated`, called in its place where a tensor is too large to keep.

        Args:
            sample: a random part of the tensor: all channels of some samples and positions, shape (draws, channels, 1,
                ...) with as many dimensions as the tensor has.
            ends: the smallest and the largest finite value of each channel of the whole tensor, shape (2, channels, 1,
                ...); infinite where a channel has none. A format that overrides this can tell them from the others.
        """
        return self.calibrated(torch.cat([sample, ends]))

    @abstractmethod
    def round(self, x: Tensor) -> Tensor:
        """`x` mapped to the nearest representable values (logarithmic formats: to the nearest exponents).

        Same shape and dtype, in new memory.

        A format with a threshold by definition, such as ternary, maps to a value by that threshold instead. NaN stays
        NaN.

        Called by :meth:`quantize`, and directly if no gradients are needed. `x` is any tensor that the operand can be:
        a batch of any size, or the whole parameter. Rounding a second time must change nothing. The result for a value
        of one sample may depend on other values of that sample, in the same group or block, never on another sample.

        Raises:
            FormatError: the format needs calibration, and was not calibrated.
        """

    @abstractmethod
    def bounds(self, x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """The smallest and the largest representable value, broadcastable to `x`. Infinities count, if there are some.

        Called by :meth:`quantize` in every training step: outside these bounds the gradient is zero. Raises as
        :meth:`round` does.
        """

    @property
    def grid(self) -> Grid | None:
        """The grid of whole numbers that the values lie on, if it is the same for every tensor; None otherwise.

        Read from a calibrated format by the parts that compute in whole numbers: the evaluation, which merges products
        that are exact; compiled training; exporters and kernels of bytes. With None they take the general path, through
        :meth:`round`, or refuse. The result of :meth:`round` must lie on the grid. If the grid is ``complete``,
        it must be the rounding of the grid. Raises as :meth:`round` does.
        """
        return None

    def grid_of(self, x: Tensor) -> Grid | None:  # noqa: ARG002
        """The grid that ``round(x)`` lies on; None if there is none.

        Called by the evaluation on a calibrated format, with a whole parameter that is rounded already. It equals
        :attr:`grid` unless the steps depend on the tensor, as in block formats.
        """
        return self.grid

    def learned_range(self) -> LearnedRange | None:
        """A module that rounds like this format and learns its range; None if there is no range to learn.

        Called on a calibrated format when a candidate is fine-tuned, once per operand. The module starts with the range
        of this format, and every call must return a new module.
        """
        return None

    def quantize(self, x: Tensor) -> Tensor:
        """``round(x)`` with gradients: same shape and dtype.

        Gradients pass unchanged where `x` is within :meth:`bounds`, and are zero outside (the clipped straight-through
        estimator of Jacob et al. 2018, section 3); of a format that does not saturate they pass everywhere. Called for
        every operand in evaluation and in training. A subclass may override it for other gradients. Then the values
        must still be those of :meth:`round`, and candidates are trained one by one, since compiled training has only
        these gradients.
        """
        rounded = self.round(x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return rounded
        low, high = self.bounds(x) if self.saturates else (torch.finfo(x.dtype).min, torch.finfo(x.dtype).max)
        inside = torch.clamp(x, low, high)  # type: ignore[arg-type]
        # This subtracts exact zeros (adding them would turn −0 into 0). The value is exactly the rounded one, and the
        # gradient is that of the clamp.
        return rounded.detach() - (inside.detach() - inside)


def channel_rows(sample: Tensor, dim: int | None) -> Tensor:
    """The values of each index of a dimension, or of the whole tensor, detached, shape (channels or 1, values)."""
    x = sample.detach()
    if dim is None:
        return x.reshape(1, -1)
    return x.movedim(dim, 0).reshape(x.shape[dim], x.numel() // max(1, x.shape[dim]))


def finite(sample: Tensor) -> Tensor:
    """The finite values of `sample`, flat, detached: a NaN or an infinity says nothing about a range."""
    flat = sample.detach().flatten()
    return flat if all_finite(flat) else flat[flat.isfinite()]


def all_finite(x: Tensor) -> bool:
    """Whether no value of a tensor is NaN or infinite; true of an empty one."""
    # The smallest and the largest value say so, and take a tenth of the time of isfinite.
    return not x.numel() or all(end.isfinite() for end in torch.aminmax(x.detach()))


def thinned(sample: Tensor) -> Tensor:
    """At most CALIBRATION_VALUES values of `sample`, flat, float64: enough to choose a scale by its squared error.

    They are drawn at random from a fixed seed. Every n-th value would miss some features if n divides their number.
    """
    return thinned_rows(sample.detach().reshape(1, -1))[0]


def thinned_rows(rows: Tensor) -> Tensor:
    """As ``thinned``, of each row of a matrix: at most CALIBRATION_VALUES columns, float64."""
    if rows.shape[1] > CALIBRATION_VALUES:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(rows.shape[1], (CALIBRATION_VALUES,), generator=generator)
        rows = rows[:, drawn.to(rows.device)]
    return rows.double()


def percentile_range(sample: Tensor, ends: Tensor) -> tuple[float, float]:
    """(low, high) of `sample` without the largest 0.1 % of its absolute values (the definition of Wu et al. 2020,
    arXiv:2004.09602, section 3.3): the observed range cut to [−p, p], where p is the smallest of the absolute values
    that no more than 0.1 % of them exceed. Nothing is cut off fewer than 1,000 values, nor where p is 0: a tensor that
    is nearly all zeros would become nothing else.

    Args:
        sample: any shape, all finite; of large ones a part is looked at, as ``thinned`` says.
        ends: any shape, at least one value: its smallest and its largest one are those of the whole tensor.
    """
    size = thinned(sample).abs()
    reach = (float(size.kthvalue(math.ceil(PERCENTILE * len(size))).values) if len(size) else 0.0) or math.inf
    return max(float(ends.min()), -reach), min(float(ends.max()), reach)
