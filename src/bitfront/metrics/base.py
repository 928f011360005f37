"""What a metric is, and what a runner sees.

A runner is a configured thing under ``[search.strategy.sw_runner.<name>]`` or ``hw_runner``; it produces one or more
metrics. It measures a whole batch of candidates at once and keeps nothing from one batch to the next, so that the
result for a candidate never depends on which came before it. (One that reads a clock or a power meter may keep what it
read: measured again, the same network would give another number.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront.config import Direction, Table
from bitfront.data.base import Split
from bitfront.formats.base import Format, Operand
from bitfront.graph import Graph, Site
from bitfront.spaces.base import Codes
from bitfront.spaces.model_space import FormatSpace
from bitfront.tasks.base import Task

Values = NDArray[np.float64]
Kind = Literal["measured", "modelled", "estimated"]
Side = Literal["sw_runner", "hw_runner"]


@dataclass(frozen=True)
class Metric:
    """One number about a candidate.

    Attributes:
        unit: e.g. ``bits``, ``bytes``; empty for a share or a pure number.
        direction: which way is better, where the configuration does not say.
        kind: whether the number was measured, follows from a model, or is an estimate.
        meaning: one line for the reference.
        quality: whether it says how good the answers are; a constraint may compare it with the float model's.
        share: of a quality, whether it is a share: 1 % in such a constraint is then 0.01, not a part of the float
            model's value.
    """

    name: str
    unit: str
    direction: Direction
    kind: Kind
    meaning: str
    quality: bool = False
    share: bool = False


@dataclass(frozen=True, eq=False)
class Scores:
    """What forward passes over the evaluation samples give, per candidate: arrays of shape (candidates,).

    Attributes:
        loss: mean loss; NaN where the candidate failed.
        correct: number of samples whose largest output is the label's; zeros where the task is no classification.
        samples: number of samples, the same for all.
        errors: why a candidate failed; empty where it did not.
        others: the other metrics of the task, by name; None for a classification: its accuracy follows from `correct`.
    """

    loss: Values
    correct: NDArray[np.int64]
    samples: int
    errors: tuple[str, ...]
    others: Mapping[str, Values] | None = None

    @property
    def of_task(self) -> dict[str, Values]:
        """Metric of the task → values, NaN where the candidate failed: the loss, then the others."""
        failed = np.array([bool(e) for e in self.errors], dtype=bool)
        others = {"accuracy": self.correct / max(1, self.samples)} if self.others is None else self.others
        return {name: np.where(failed, np.nan, v) for name, v in {"loss": self.loss, **others}.items()}

    def taken(self, rows: NDArray[np.int64]) -> Scores:
        """Those of some candidates, in this order."""
        others = None if self.others is None else {m: v[rows] for m, v in self.others.items()}
        errors = tuple(self.errors[row] for row in rows)
        return Scores(self.loss[rows], self.correct[rows], self.samples, errors, others)

    @classmethod
    def joined(cls, parts: Sequence[Scores], samples: int) -> Scores:
        """The scores of several batches, one after the other, on the same samples."""
        others = [part.others for part in parts]
        names = next((tuple(of) for of in others if of is not None), None)
        return cls(
            np.concatenate([np.zeros(0), *(p.loss for p in parts)]),
            np.concatenate([np.zeros(0, dtype=np.int64), *(p.correct for p in parts)]),
            samples,
            tuple(e for p in parts for e in p.errors),
            None if names is None else {m: np.concatenate([of[m] for of in others if of is not None]) for m in names},
        )


#: (site, the format of one of its parameters or None in float, its rounded values) → a number. Equal figures must give
#: equal numbers: what one gives is kept.
ParameterFigure = Callable[[Site, Format | None, Tensor], float]


class EvaluationContext(Protocol):
    """What a runner may look at: the evaluator, as it is during one batch. It is not to be changed.

    Whatever is asked twice is computed once: runners share forward passes over the same samples.
    """

    @property
    def space(self) -> FormatSpace:
        """The space the codes belong to; its ``graph`` is the captured model."""
        ...

    @property
    def searched(self) -> FormatSpace:
        """The space of the search. It is ``space``, except where the float model is measured beside a search: its
        metrics come about as those of the candidates do."""
        ...

    @property
    def sample(self) -> Tensor:
        """Two input samples, shape ``(2, *features)``, on the CPU."""
        ...

    @property
    def device(self) -> str:
        """Where the search computes: ``cpu``, ``cuda``, ``mps``."""
        ...

    @property
    def epochs(self) -> int:
        """How many epochs the candidates were trained in the search; 0 where they are not."""
        ...

    def scores(self, codes: Codes, split: str, num_samples: int | None) -> Scores:
        """Forward passes of candidates over fixed samples of a split: the same ones for every candidate.

        Args:
            num_samples: how many; None for the whole split.
        """
        ...

    def formats(self, code: NDArray[np.int64]) -> Mapping[str, Mapping[Operand, Format]]:
        """Site → operand → calibrated format of one candidate; an operand left in float is absent."""
        ...

    def graph(self, code: NDArray[np.int64]) -> Graph:
        """The captured float model with what calibration corrects for one candidate."""
        ...

    def model(self, code: NDArray[np.int64]) -> nn.Module:
        """One candidate as a model in evaluation mode on ``device``: it computes what the candidate computes, simulated
        in floating point. Its time says nothing about the time of what would be deployed."""
        ...

    def nonzero(self, group: int, operand: Operand = "weight") -> NDArray[np.int64]:
        """How many values of a weight of one site are not zero once quantized, under each option, shape (options,).
        Zeros for a site without a parameter of that name."""
        ...

    def of_parameter(self, group: int, operand: Operand, figure: ParameterFigure) -> Values:
        """A figure of a rounded weight or bias of one site under each option, shape (options,). Zeros if the site has
        no parameter of that name."""
        ...


@dataclass(frozen=True)
class SampleChoice:
    """The samples that a runner evaluates candidates on.

    Attributes:
        split: of the dataset.
        number: how many; None for all.
        auto: whether the search shall determine how many, before it begins.
    """

    split: Split
    number: int | None
    auto: bool = False


class RunnerSettings(Table):
    """Settings of a runner, the keys of its table; this class has none. Unknown keys are errors."""

    @property
    def samples(self) -> SampleChoice | None:
        """The samples that the runner asks ``EvaluationContext.scores`` for; None where it needs no forward pass."""
        return None

    def with_samples(self, number: int) -> Self:  # noqa: ARG002
        """The same with a number of samples; asked only of settings whose ``samples.auto`` is true."""
        return self

    @property
    def batch(self) -> int | None:
        """Samples in the batch that the metrics are of; None where they are of a sample."""
        return None

    def with_batch(self, size: int) -> Self:  # noqa: ARG002
        """The same where batches have `size` samples and the table does not say another size."""
        return self


class Runner(ABC):
    """Turns a batch of candidates into metrics.

    **When it is called.** A search makes one runner of each kind per process, and asks ``ready`` of it before any work.
    ``kinds`` is asked when the search is planned and when it begins. Then the evaluator calls ``measure`` for every
    batch of candidates, and once for the float model, with itself as the context. A closed-form runner is also asked
    about candidates that are never evaluated: what a constraint allows is known before.

    **What it may not do.** Let the values of a candidate depend on the other candidates of a batch, on the batches
    before it, or on the number of processes. So it keeps nothing from one batch to the next, with one exception: one
    that reads a clock or a power meter keeps what it read, since a second reading would be another number. It changes
    neither the codes nor anything that the context gives it.

    **When it fails.** A candidate that cannot be measured has NaN, and becomes a failed trial. An exception in
    ``measure`` is caught: the batch is measured again one by one, and the error is stored with whichever candidate
    raises it. A ``UserError`` ends the search.

    ``bitfront.testing.check_runner`` tests that.

    Class attributes:
        Settings: the keys under the runner's table in the TOML; they arrive as `settings`.
        produces: the metrics it measures, in the order in which tables show them.
        side: the table it belongs in, ``sw_runner`` (needs data or a clock) or ``hw_runner`` (closed form). Files that
            put it under the other one are accepted; its metrics are then reported there.
        closed_form: whether it needs neither data nor a clock, so that a constraint on it is checked before a
            candidate is evaluated.
        of_weights: whether it looks at the values of the weights, so that before training it is not known.
        one_by_one: whether a runner in closed form computes each candidate, and does not look it up in tables of its
            layers. What it gives is then kept.
    """

    Settings: ClassVar[type[RunnerSettings]] = RunnerSettings
    settings: RunnerSettings
    produces: tuple[Metric, ...]
    side: ClassVar[Side]
    closed_form: ClassVar[bool] = False
    of_weights: ClassVar[bool] = False
    one_by_one: ClassVar[bool] = False

    def __init__(self, settings: RunnerSettings) -> None:
        """Makes it, at no cost: a plan makes runners that measure nothing."""
        self.settings = settings

    @classmethod
    def of_task(cls, task: Task) -> tuple[Metric, ...]:  # noqa: ARG003
        """The metrics that it measures where samples are those of `task`; what is in closed form has the same."""
        return cls.produces

    def ready(self, device: str) -> None:  # noqa: ARG002
        """Whether it can work here, asked before any work.

        Args:
            device: where the search computes.

        Raises:
            ConfigError: something it needs is not there: a package, a counter. ``key`` names the setting to change.
        """
        return

    def kinds(self, context: EvaluationContext) -> Mapping[str, tuple[Kind, str]]:  # noqa: ARG002
        """Metric → (how its values come about in this search, why if that is not what ``produces`` says).

        The same for every candidate of a search, so that a column never mixes what was measured with what was not.
        """
        return {m.name: (m.kind, "") for m in self.produces}

    @abstractmethod
    def measure(self, context: EvaluationContext, codes: Codes) -> Mapping[str, Values]:
        """The metrics of a batch of candidates.

        Args:
            context: what evaluates them.
            codes: canonical codes of ``context.space``, int64 of shape (candidates, parameters); not to be changed.

        Returns:
            Each metric of `produces` → values, float64 of shape (candidates,), in the unit that it declares. NaN
            where a candidate could not be measured.
        """

    def why_unmeasured(self, context: EvaluationContext, code: NDArray[np.int64]) -> str:  # noqa: ARG002
        """Why a candidate has NaN, for its error; empty where there is no more to say.

        Args:
            context: what evaluates it.
            code: canonical, shape (parameters,).
        """
        return ""


def table_sum(space: FormatSpace, tables: list[NDArray[np.float64]], codes: Codes) -> Values:
    """Σ over sites of a cost per option: `tables` holds, per group, the cost of each of its options.

    This is what makes closed-form metrics table look-ups, vectorised over all candidates at once.
    """
    return option_sum(tables, space.options(codes))


def option_sum(tables: list[NDArray[np.float64]], options: Codes) -> Values:
    """The same for candidates given by their options, shape (candidates, groups)."""
    total = np.zeros(len(options))
    for g, table in enumerate(tables):
        # Where every option costs the same there is nothing to look up.
        total += table[0] if (table == table[0]).all() else table[options[:, g]]
    return total
