"""What a run folder holds beside its trials: paired comparisons, fine-tuned trials, and what stays in float."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bitfront.metrics.intervals import Z95

#: How the reason begins for which a search ended, if its strategy has ended it.
ENOUGH = "nothing to gain"


@dataclass(frozen=True)
class PairedComparison:
    """A trial of the front compared with others on the samples of the search.

    Attributes:
        number: the number of the trial.
        above: the number of the next more accurate trial of the front; None for the most accurate one.
        p_above, p_best: p-value of McNemar's test (0 to 1) of the difference to the trial `above`, and to the most
            accurate one.
    """

    number: int
    above: int | None
    p_above: float
    p_best: float


@dataclass(frozen=True)
class Optimism:
    """By how much the front looks better on the samples of its search than on the test split, in the metric that leads.

    Attributes:
        members: number of trials of the front that were tested.
        searched: by how much they are worse than the float model on the samples of the search, on average: percentage
            points, or per cent of the float model's value where the metric is no share. Less than 0: better.
        tested: the same on the test split.
        error: the standard error of the difference of both.
    """

    members: int
    searched: float
    tested: float
    error: float

    @property
    def value(self) -> float:
        """The optimism: how much worse the front is on the test split than it looked."""
        return self.tested - self.searched

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval."""
        return self.value - Z95 * self.error, self.value + Z95 * self.error


@dataclass(frozen=True)
class Quality:
    """Which way a metric that says how good the answers are is better, and whether it is a share, 0 to 1."""

    direction: str
    share: bool = False


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuned trial.

    Attributes:
        number: the number of the trial.
        metrics: metrics after fine-tuning, on the samples of the search; None where one could not be measured.
        test: loss and accuracy on the test split after fine-tuning; empty if there is no test split.
        kept: whether the fine-tuned candidate is more accurate than before. If not, the trial keeps its weights.
        epochs: the best epoch on the validation split; 0 if no epoch was better than the start.
        failed: why it could not be trained; empty if it could.
    """

    number: int
    metrics: Mapping[str, float | None]
    test: Mapping[str, float]
    kept: bool
    epochs: int
    failed: str = ""


@dataclass(frozen=True)
class OptionCosts:
    """A metric that is a sum over the groups of a space.

    Attributes:
        first: its value with the first option everywhere, in its unit.
        options: per group what each of its options adds to that.
    """

    first: float
    options: tuple[tuple[float, ...], ...]


#: Smaller shares in float are not worth a line.
SMALL = 0.01


@dataclass(frozen=True)
class InFloat:
    """What stays in float in every candidate of a space.

    Attributes:
        weights, macs: its shares of the model's weights and multiply-accumulates, 0 to 1.
        largest: the layers, functions and parameters with the largest shares, at most three.
        others: the number of the others.
    """

    weights: float = 0.0
    macs: float = 0.0
    largest: tuple[str, ...] = ()
    others: int = 0

    @property
    def text(self) -> str:
        """One line for users; empty if both shares are small."""
        if max(self.weights, self.macs) <= SMALL:
            return ""
        more = (f"{self.others:,} more",) if self.others else ()
        return f"in float in every candidate: {shares(self.weights, self.macs)} ({', '.join((*self.largest, *more))})"


def shares(weights: float, macs: float) -> str:
    """Shares of a model's weights and multiply-accumulates, each 0 to 1, in words; without one that is nothing."""
    named = {"weights": weights, "multiply-accumulates": macs}
    return ", ".join(f"{_percent(share)} of the {name}" for name, share in named.items() if share > 0)


def _percent(share: float) -> str:
    """A share as a percentage, with the digits that tell it from nothing and from everything."""
    percent = 100 * share
    return f"{percent:.0f} %" if 10 <= percent <= 99 else f"{percent:.2f}".rstrip("0").rstrip(".") + " %"
