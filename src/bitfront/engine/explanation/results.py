"""What an explanation consists of: plain values and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bitfront.spaces.described import CandidateConfig


@dataclass(frozen=True)
class Estimate:
    """A number with its 90 % interval, in the unit of its metric.

    Attributes:
        value: the number.
        low, high: the ends of the interval, as far as the model holds; equal to `value` for what was measured.
        trial: the number of the trial that measured it; None: it is predicted.
    """

    value: float
    low: float
    high: float
    trial: int | None = None

    @property
    def word(self) -> str:
        """``measured`` or ``predicted``."""
        return "predicted" if self.trial is None else "measured"


@dataclass(frozen=True)
class OptionEffect:
    """One option of a place, compared with the first one of its list, everything else as it is on the front.

    Attributes:
        option: for people, e.g. ``4 bits``.
        costs: metric → by how much it is more; the mean where it depends on other options of the layer.
        effect: by how much the explained metric is more.
    """

    option: str
    costs: Mapping[str, float]
    effect: Estimate


@dataclass(frozen=True)
class PlaceEffects:
    """What the options of one place cost and buy, the cheapest first.

    Attributes:
        place: e.g. ``fc1/weight``; a layer with several formats is one place.
        options: the first one has only zeros.
    """

    place: str
    options: tuple[OptionEffect, ...]


@dataclass(frozen=True)
class Interaction:
    """Two layers whose effects do not add up.

    Attributes:
        layers: the two.
        options: the cheapest option of each.
        excess: by how much the explained metric changes more if both take their cheapest option in place of their
            dearest, than by the sum of the two changes.
    """

    layers: tuple[str, str]
    options: tuple[str, str]
    excess: Estimate


@dataclass(frozen=True)
class Alternative:
    """Another option of a place, everything else as in the explained trial.

    Attributes:
        option: for people.
        costs: metric → by how much it is more than in the trial, exact.
        value: the explained metric with it.
        difference: by how much it is more than the trial's measured value.
    """

    option: str
    costs: Mapping[str, float]
    value: Estimate
    difference: float


@dataclass(frozen=True)
class PlaceAlternatives:
    """Why a trial has its option at one place.

    Attributes:
        place: e.g. ``fc1/weight``.
        option: what the trial has.
        alternatives: everything else that can be chosen there.
    """

    place: str
    option: str
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True)
class Step:
    """One step along the upper hull of the predicted front: from a budget to the next larger one.

    Attributes:
        cost: at which it begins, in the unit of its metric.
        value: the explained metric there.
        price: by how much the explained metric is better per unit of cost, up to the next step.
        changes: what changes up to the next step: place → (before, after).
    """

    cost: float
    value: Estimate
    price: float
    changes: Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Prices:
    """What one more unit of a budget buys.

    Attributes:
        cost: the metric of the budget.
        steps: along the predicted front, the least cost first. The last one has no price (0) and no changes.
        exact: whether the predicted front is that of the whole space. If not, it is the exact one of the main effects,
            improved by changes of one layer.
    """

    cost: str
    steps: tuple[Step, ...]
    exact: bool

    def price(self, cost: float) -> float:
        """What one more unit of cost buys where so much is spent; 0 at the end of the front."""
        inside = [s.price for s in self.steps if s.cost <= cost]
        return inside[-1] if inside else (self.steps[0].price if self.steps else 0.0)


@dataclass(frozen=True)
class Answer:
    """The best candidate for some budgets, from stored knowledge.

    Attributes:
        budgets: as they were given, and the constraints of the search.
        optimised: what is best: the explained metric, or a cost if a budget is on the explained metric.
        config: the candidate, as ``[passes.quantize]`` takes it.
        code: its code.
        costs: metric → value, exact.
        value: the explained metric: measured if it is a trial of the run, else predicted.
        chance: the probability that it keeps the budgets on the explained metric when it is evaluated, 0 to 1, as far
            as the model holds; None if there is none, or if it was evaluated already.
        exact: whether it is the best of the whole space by the model.
        verified: metric → value, if it was evaluated for this answer; empty if it was not.
        failed: why it could not be evaluated; empty if it could, or was not tried.
        broken: the budgets that what was verified does not keep.
        measured: number of the best trial that keeps the budgets; None: no trial does.
    """

    budgets: tuple[str, ...]
    optimised: str
    config: CandidateConfig
    code: tuple[int, ...]
    costs: Mapping[str, float]
    value: Estimate
    exact: bool
    verified: Mapping[str, float]
    chance: float | None = None
    failed: str = ""
    broken: tuple[str, ...] = ()
    measured: int | None = None


@dataclass(frozen=True)
class Held:
    """How well predictions held: trials predicted by a model that was fitted to others.

    Attributes:
        fitted, predicted: how many trials the model was fitted to, and how many it predicted.
        correlation: Spearman's rank correlation of predictions and results, −1 to 1; NaN where all are equal.
        inside: share of the results within the 90 % interval of their prediction.
        how: which trials were predicted.
    """

    fitted: int
    predicted: int
    correlation: float
    inside: float
    how: str


@dataclass(frozen=True)
class Gap:
    """What is proven at the end of a search, and what is estimated.

    Attributes:
        evaluated, failed: number of trials that have results, and of those that failed.
        candidates: size of the space.
        proven: whether every candidate was evaluated, so that nothing is missing.
        best: the best verified value of the explained metric among trials that fulfil the constraints; None: there is
            none.
        expected: by how much the best candidate that was not evaluated is predicted to be better than every trial that
            costs no more, in the metric's unit; 0: none is.
        possible: the same for the good end of 90 % intervals: 95 % sure per candidate.
        at: the candidate of `expected` or, if that is 0, of `possible`; None where both are 0.
        looked_at: number of candidates that were predicted for this.
        focus: only candidates that are predicted within so many percentage points of the float model are looked at, or
            so many per cent of its value where the metric is no share; None: all are.
        held: how well predictions held; None where there are too few trials to tell.
    """

    evaluated: int
    failed: int
    candidates: int
    proven: bool
    best: Estimate | None
    expected: float
    possible: float
    at: Answer | None
    looked_at: int
    focus: float | None
    held: Held | None


@dataclass(frozen=True)
class Explanation:
    """What the trials of a run tell.

    Attributes:
        run: the run folder.
        metric: what is explained; `better` is ``higher`` or ``lower``.
        share: whether it is a share, 0 to 1, whose differences are percentage points.
        unit: of the metric.
        costs: the metrics in closed form that explanations are about; the first one sorts options.
        units: metric in closed form → unit.
        around: the numbers of the trials that effects are averages over: some of the front.
        effects: per place, what options cost and buy.
        interactions: the pairs of layers that interact most, the strongest first.
        trial: the explained trial; None if none was asked for.
        trial_costs: its costs; empty without a trial.
        alternatives: per place, the options that this trial does not have; empty without a trial.
        prices: per cost, what more of it buys.
        answers: one for the budgets together, if any were given.
        gap: what is proven.
        notes: remarks.
        answering: statements on budgets → the answer for them. Nothing is fitted again.
    """

    run: str
    metric: str
    better: str
    share: bool
    unit: str
    costs: tuple[str, ...]
    units: Mapping[str, str]
    around: tuple[int, ...]
    effects: tuple[PlaceEffects, ...]
    interactions: tuple[Interaction, ...]
    trial: int | None
    trial_costs: Mapping[str, float]
    alternatives: tuple[PlaceAlternatives, ...]
    prices: tuple[Prices, ...]
    answers: tuple[Answer, ...]
    gap: Gap
    notes: tuple[str, ...]
    answering: Callable[[Sequence[str]], Answer] = field(repr=False, compare=False)

    def _repr_html_(self) -> str:
        import bitfront  # loads what draws when it is used

        return bitfront._html(self)

    def answer(self, *budgets: str) -> Answer:
        """The best candidate for some budgets, such as ``"model_size <= 2 kB"``, from stored knowledge.

        Raises:
            RunError: no candidate keeps them, as far as is known.
            ConfigError: one cannot be read, or is on a metric that cannot be predicted.
        """
        return self.answering(budgets)

    def to_dict(self) -> dict[str, Any]:
        """All tables, for JSON."""
        tables = asdict(replace(self, answering=_no_answer))
        del tables["answering"]
        return tables


def _no_answer(budgets: Sequence[str]) -> Answer:
    raise AssertionError(f"a table has no answer for {budgets}")
