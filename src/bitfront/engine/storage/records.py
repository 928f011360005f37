"""What a finished search knows of its front beside the trials: paired comparisons, and winners that were trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PairedComparison:
    """A trial of the front against others, on the search's samples.

    Attributes:
        number: of the trial.
        above: the next more accurate trial of the front; None for the first.
        p_above, p_best: McNemar's probability that the difference to it, and to the most accurate one, is chance.
    """

    number: int
    above: int | None
    p_above: float
    p_best: float


@dataclass(frozen=True)
class Finetuned:
    """A trial that was trained on.

    Attributes:
        metrics: of the trained candidate, on the samples of the search.
        test: loss and accuracy on the test split; empty where there is none.
        kept: whether it is better than the candidate as found; if not, that one stays.
        epochs: which epoch was the best on the validation split; 0 if training made nothing better.
        failed: why it could not be trained; empty if it could.
    """

    number: int
    metrics: Mapping[str, float | None]
    test: Mapping[str, float]
    kept: bool
    epochs: int
    failed: str = ""
