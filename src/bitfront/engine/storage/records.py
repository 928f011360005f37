"""Results about the front of a finished search, beside its trials: paired comparisons and fine-tuned trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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
