"""Statistics on samples: confidence intervals of an accuracy, and paired comparisons of two candidates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Two-sided 95 % quantile of the normal distribution.
Z95 = 1.959963984540054
#: Below this p-value the difference between two candidates is significant.
SIGNIFICANT = 0.05


def wilson(accuracy: float, samples: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of an accuracy (Wilson 1927).

    Args:
        accuracy: 0 to 1.
        samples: how many samples the accuracy was measured on; 1 or more.

    Returns:
        (low, high), both within 0 to 1.
    """
    z2 = Z95**2
    centre = (accuracy + z2 / (2 * samples)) / (1 + z2 / samples)
    half = Z95 / (1 + z2 / samples) * math.sqrt(accuracy * (1 - accuracy) / samples + z2 / (4 * samples**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _at_most(heads: int, tosses: int) -> float:
    """Probability of at most `heads` heads in `tosses` of a fair coin.

    Computed here, because importing the binomial distribution of SciPy takes a second.
    """
    number = np.arange(heads, 0, -1, dtype=np.float64)
    below = np.cumprod(number / (tosses - number + 1)).sum()  # fewer heads, relative to exactly `heads`
    binomial = math.lgamma(tosses + 1) - math.lgamma(heads + 1) - math.lgamma(tosses - heads + 1)
    return float(math.exp(binomial - tosses * math.log(2)) * (1 + below))


@dataclass(frozen=True)
class PairedCounts:
    """The answers of two candidates on the same samples, counted.

    Attributes:
        only_first: samples that only the first candidate answers correctly.
        only_second: samples that only the second candidate answers correctly.
        samples: number of all samples.
    """

    only_first: int
    only_second: int
    samples: int

    @classmethod
    def of(cls, first: NDArray[np.bool_], second: NDArray[np.bool_]) -> PairedCounts:
        """Count from which answers are correct, both of shape (samples,)."""
        return cls(int((first & ~second).sum()), int((second & ~first).sum()), len(first))

    @property
    def p(self) -> float:
        """The p-value of the exact two-sided McNemar test (McNemar 1947, with the binomial distribution).

        It is the probability of a difference at least this large if both are equally good; 1 if they never differ.
        """
        discordant = self.only_first + self.only_second
        if not discordant:
            return 1.0
        return min(1.0, 2.0 * _at_most(min(self.only_first, self.only_second), discordant))

    @property
    def distinguishable(self) -> bool:
        """Whether the difference between the two is significant."""
        return self.p < SIGNIFICANT

    @property
    def difference(self) -> float:
        """Accuracy of the first minus that of the second."""
        return (self.only_first - self.only_second) / self.samples

    @property
    def half_width(self) -> float:
        """Half of the width of the 95 % interval of the difference (Wald, for paired proportions)."""
        spread = self.only_first + self.only_second - (self.only_first - self.only_second) ** 2 / self.samples
        return Z95 * math.sqrt(spread) / self.samples
