"""What a number of samples can tell: intervals of a share, and comparisons of two candidates on the same samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

#: Two-sided 95 % quantile of the normal distribution.
Z95 = 1.959963984540054
#: Below this probability two candidates are told apart.
SIGNIFICANT = 0.05


def wilson(accuracy: float, samples: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share observed on `samples` samples (Wilson 1927).

    Returns:
        (low, high), both within 0 to 1.
    """
    z2 = Z95**2
    centre = (accuracy + z2 / (2 * samples)) / (1 + z2 / samples)
    half = Z95 / (1 + z2 / samples) * math.sqrt(accuracy * (1 - accuracy) / samples + z2 / (4 * samples**2))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Paired:
    """Two candidates on the same samples.

    Attributes:
        only_first, only_second: samples that one of them alone answers rightly.
        samples: all of them.
    """

    only_first: int
    only_second: int
    samples: int

    @classmethod
    def of(cls, first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Paired:
        """From right answers, both of shape (samples,)."""
        return cls(int((first & ~second).sum()), int((second & ~first).sum()), len(first))

    @property
    def p(self) -> float:
        """Probability of a difference as large as this if both were equally good: the exact two-sided McNemar test
        (McNemar 1947, with the binomial distribution). 1 where they agree everywhere."""
        discordant = self.only_first + self.only_second
        if not discordant:
            return 1.0
        return min(1.0, 2.0 * float(binom.cdf(min(self.only_first, self.only_second), discordant, 0.5)))

    @property
    def distinguishable(self) -> bool:
        """Whether the samples tell the two apart."""
        return self.p < SIGNIFICANT

    @property
    def difference(self) -> float:
        """Accuracy of the first minus that of the second."""
        return (self.only_first - self.only_second) / self.samples

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval of the difference (Wald, for paired shares)."""
        spread = self.only_first + self.only_second - (self.only_first - self.only_second) ** 2 / self.samples
        return Z95 * math.sqrt(spread) / self.samples
