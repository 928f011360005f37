"""A Gaussian process of main effects and pairwise interactions over the columns of a code.

The kernel of two candidates x and y, after the functional ANOVA of Durrande et al. 2013 and the order-2 additive kernel
of Duvenaud et al. 2011 (section 2), is

    k(x, y) = CONSTANT + e₁ + τ·e₂,   zᵢ = aᵢ·exp(−|xᵢ − yᵢ| / LENGTH)

with e₁ = Σ zᵢ, e₂ = Σ_{i<j} zᵢ·zⱼ = (e₁² − Σ zᵢ²) / 2, and one scale aᵢ per column. |xᵢ − yᵢ| is the distance of two
values of column i: how many steps of an ordered choice lie between them, as a share of all steps, and 1 where there is
no order. The scales, τ and the noise are those of the highest posterior density, under broad log-normal priors.

Where something is known of the options beforehand, the kernel has one more term for each trend (``trends.py``): a
function of the candidate's place on it, which is not additive.

Apart from that, the posterior mean is a sum over pairs of columns. So what it predicts for all changes of a candidate
in one group follows from a matrix product, and nothing is ever drawn at random to find its minimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bitfront.spaces.base import Codes, Space
from bitfront.strategies.elimination import Solver, solve, solve_with_determinant
from bitfront.strategies.trends import HIGHEST, LOWEST, Trend, prior, similarities
from bitfront.strategies.trends import LENGTH as ALONG

Floats = NDArray[np.float64]

#: The variance of the constant, for standardised results.
CONSTANT = 4.0
#: The length of the kernel, as a share of the distance of the first and the last value of a column. Between 0.35 and 3
#: it makes no difference that can be measured.
LENGTH = 1.0
#: The priors: median, and standard deviation of the logarithm. The median of a column's scale is 1 / columns.
SCALE_DEVIATION = 1.5
INTERACTION, INTERACTION_DEVIATION = 0.3, 1.5
NOISE, NOISE_DEVIATION = 1e-3, 2.0
#: The same of the function of a trend.
TREND, TREND_DEVIATION = 1.0, 1.5
#: Places at which this function is tabulated.
PLACES = 1025
#: Candidates whose kernel is computed together.
BLOCK = 4096
#: Steps of L-BFGS, and how many deviations from its median a parameter may be.
STEPS, BOUND = 25, 4.0


class Columns:
    """The columns of a space as the kernel sees them: distances of values.

    A column of a branch that a candidate does not take has one more value, "not taken".

    Args:
        space: the space.

    Attributes:
        count: number of columns.
        of_group: per group, the columns of its options.
    """

    def __init__(self, space: Space) -> None:
        self._space = space
        parameters = space.parameters
        self.count = len(parameters)
        self.of_group = [[i for i, p in enumerate(parameters) if p.group == g] for g in range(len(space.groups))]
        self._choosing = {p.group: i for i, p in reversed(list(enumerate(parameters))) if p.branch is None}
        self._similar = [self._similarities(len(p.labels), p.steps) for p in parameters]

    @staticmethod
    def _similarities(count: int, ordered: bool) -> Floats:
        """exp(−distance / LENGTH) of the values of a column and, last, "not taken"."""
        places = np.linspace(0.0, 1.0, count)
        distances = np.ones((count + 1, count + 1))
        distances[:count, :count] = np.abs(places[:, None] - places) if ordered else 1.0
        np.fill_diagonal(distances, 0.0)
        return np.exp(-distances / LENGTH)

    def values(self, codes: Codes) -> Codes:
        """The value of each column, with "not taken" for columns of other branches; shape (candidates, columns)."""
        values = codes.copy()
        for i, parameter in enumerate(self._space.parameters):
            if parameter.branch is not None and parameter.group in self._choosing:
                taken = codes[:, self._choosing[parameter.group]] == parameter.branch
                values[:, i] = np.where(taken, codes[:, i], len(parameter.labels))
        return values

    def options(self, group: int) -> Codes:
        """The values of the columns of a group under each of its options, shape (options, columns of the group)."""
        space = self._space
        options = np.zeros((space.groups[group].size, len(space.groups)), dtype=np.int64)
        options[:, group] = np.arange(len(options))
        return self.values(space.codes(options))[:, self.of_group[group]]

    def similarities(self, column: int, values: Codes, others: Codes) -> Floats:
        """exp(−distance / LENGTH) of two lists of values of one column, shape (values, others)."""
        return self._similar[column][values[:, None], others]


@dataclass(frozen=True)
class Scales:
    """The parameters of the kernel.

    Attributes:
        columns: a, per column, shape (columns,).
        interaction: τ, what two columns together add.
        noise: variance of the noise, for standardised results.
        trends: what the function of each trend adds, shape (trends,).
        score: logarithm of likelihood times prior.
        length: of the kernel along the trends; it is given, and not fitted.
    """

    columns: Floats
    interaction: float
    noise: float
    trends: Floats
    score: float
    length: float = ALONG


def fitted(
    columns: Columns,
    codes: Codes,
    results: Floats,
    places: Sequence[Floats] = (),
    solver: Solver = solve_with_determinant,
    length: float = ALONG,
) -> Scales:
    """The scales that explain results best: the maximum of likelihood times prior.

    Args:
        columns: of the space.
        codes: candidates, shape (candidates, parameters).
        results: one number per candidate, finite; they are standardised here.
        places: of the candidates on each trend, shape (candidates,).
        solver: of linear systems; it takes most of the time.
        length: of the kernel along the trends.
    """
    values, count = columns.values(codes), columns.count
    target = standardised(results)[0]
    shape = (count, len(codes), len(codes))
    similar = np.empty(shape)
    for i in range(count):
        similar[i] = columns.similarities(i, values[:, i], values[:, i])
    squares = similar * similar
    trends = [similarities(p, p, length) for p in places]
    middle = np.concatenate(
        [np.full(count, -np.log(max(count, 1))), np.log([INTERACTION, NOISE, *[TREND] * len(trends)])]
    )
    deviation = np.concatenate(
        [np.full(count, SCALE_DEVIATION), [INTERACTION_DEVIATION, NOISE_DEVIATION, *[TREND_DEVIATION] * len(trends)]]
    )
    identity = np.eye(len(codes))

    def negative(logarithms: Floats) -> tuple[float, Floats]:
        """−log(likelihood · prior) and its gradient (Rasmussen and Williams 2006, equations 5.8 and 5.9)."""
        a, (tau, noise, *of_trends) = np.exp(logarithms[:count]), np.exp(logarithms[count:])
        first = np.einsum("i,ixy->xy", a, similar)
        second = (first**2 - np.einsum("i,ixy->xy", a * a, squares)) / 2
        kernel = CONSTANT + first + tau * second + noise * identity
        for of_trend, trend in zip(of_trends, trends, strict=True):
            kernel += of_trend * trend
        inverse, determinant = solver(kernel, identity)
        weights = np.einsum("ij,j->i", inverse, target)
        both = weights[:, None] * weights - inverse
        away = (logarithms - middle) / deviation
        score = -0.5 * (target * weights).sum() - 0.5 * determinant - 0.5 * (away * away).sum()
        of_columns = np.einsum("ixy,xy->i", similar, both * (1 + tau * first))
        of_columns -= tau * a * np.einsum("ixy,xy->i", squares, both)
        along = [0.5 * of_trend * (both * trend).sum() for of_trend, trend in zip(of_trends, trends, strict=True)]
        rest = [0.5 * tau * (both * second).sum(), 0.5 * noise * np.trace(both), *along]
        gradient = np.concatenate([0.5 * a * of_columns, rest]) - away / deviation
        return -score, -gradient

    from scipy.optimize import minimize  # it loads slowly, and small searches do not need it

    bounds = list(zip(middle - BOUND * deviation, middle + BOUND * deviation, strict=True))
    found = minimize(negative, middle, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": STEPS})
    a = np.exp(found.x)
    return Scales(a[:count], float(a[count]), float(a[count + 1]), a[count + 2 :], -float(found.fun), length)


def standardised(results: Floats) -> tuple[Floats, float, float]:
    """(results with mean 0 and standard deviation 1, their mean, their deviation)."""
    centre, spread = float(results.mean()), float(results.std())
    spread = spread if spread > 0 else 1.0
    return (results - centre) / spread, centre, spread


class Effects:
    """What a Gaussian process predicts, given results.

    Args:
        space: the space.
        columns: its columns.
        scales: parameters of the kernel.
        codes: candidates with results, shape (known, parameters).
        results: shape (known,), finite.
        trends: of the space.
    """

    def __init__(
        self,
        space: Space,
        columns: Columns,
        scales: Scales,
        codes: Codes,
        results: Floats,
        trends: Sequence[Trend] = (),
    ) -> None:
        self._space, self._columns, self.scales, self._trends = space, columns, scales, trends
        target, self._centre, self._spread = standardised(results)
        values = columns.values(codes)
        #: Per group: Σ zᵢ and Σ zᵢ² of its columns, options against known candidates, shape (options, known).
        self._first: list[Floats] = []
        self._squares: list[Floats] = []
        for g, of_group in enumerate(columns.of_group):
            options = columns.options(g)
            first = np.zeros((len(options), len(codes)))
            squares = np.zeros_like(first)
            for place, i in enumerate(of_group):
                z = scales.columns[i] * columns.similarities(i, options[:, place], values[:, i])
                first += z
                squares += z * z
            self._first.append(first)
            self._squares.append(squares)
        options = space.options(codes)
        self._places = [trend.places(options) for trend in trends]
        kernel = self._kernel(options)
        kernel[np.diag_indices_from(kernel)] += scales.noise
        self._matrix = kernel
        self._weights = solve(kernel, target[:, None])[:, 0]
        # The function of each trend, at places along it.
        self._grid = np.linspace(LOWEST, HIGHEST, PLACES)
        self._along = [
            scale * np.einsum("pk,k->p", similarities(self._grid, places, scales.length), self._weights)
            for scale, places in zip(scales.trends, self._places, strict=True)
        ]

    def _sums(self, options: Codes) -> tuple[Floats, Floats]:
        """Σ zᵢ and Σ zᵢ² over all columns, against the known candidates, each of shape (candidates, known)."""
        known = self._first[0].shape[1]
        first, squares = np.zeros((len(options), known)), np.zeros((len(options), known))
        for g in range(len(self._first)):
            first += self._first[g][options[:, g]]
            squares += self._squares[g][options[:, g]]
        return first, squares

    def _kernel(self, options: Codes) -> Floats:
        first, squares = self._sums(options)
        kernel: Floats = CONSTANT + first + self.scales.interaction * (first * first - squares) / 2
        for trend, scale, places in zip(self._trends, self.scales.trends, self._places, strict=True):
            kernel += scale * similarities(trend.places(options), places, self.scales.length)
        return kernel

    def mean(self, options: Codes) -> Floats:
        """The expected results of candidates, shape (candidates,).

        Args:
            options: the option of each candidate at each group, shape (candidates, groups).
        """
        parts = [
            np.einsum("xk,k->x", self._kernel(options[start : start + BLOCK]), self._weights)
            for start in range(0, len(options), BLOCK)
        ]
        return self._centre + self._spread * (np.concatenate(parts) if parts else np.zeros(0))

    def deviation(self, options: Codes) -> Floats:
        """The standard deviation of what is predicted, without noise, shape (candidates,)."""
        kernel = self._kernel(options)
        solved = solve(self._matrix, np.ascontiguousarray(kernel.T))
        prior = CONSTANT + self._prior(options)
        variance = prior - np.einsum("xk,kx->x", kernel, solved)
        result: Floats = self._spread * np.sqrt(np.maximum(variance, 0.0))
        return result

    @property
    def noise(self) -> float:
        """The standard deviation of the noise of results."""
        return float(self._spread * np.sqrt(self.scales.noise))

    def covariance(self, options: Codes) -> Floats:
        """The covariance of what is predicted of candidates, without noise, shape (candidates, candidates).

        It is for reports alone: its last bits depend on BLAS.

        Args:
            options: shape (candidates, groups).
        """
        values, a = self._columns.values(self._space.codes(options)), self.scales.columns
        first = np.zeros((len(options), len(options)))
        squares = np.zeros_like(first)
        for i in range(self._columns.count):
            z = a[i] * self._columns.similarities(i, values[:, i], values[:, i])
            first += z
            squares += z * z
        prior = CONSTANT + first + self.scales.interaction * (first * first - squares) / 2
        for trend, scale in zip(self._trends, self.scales.trends, strict=True):
            places = trend.places(options)
            prior += scale * similarities(places, places, self.scales.length)
        kernel = self._kernel(options)
        result: Floats = self._spread**2 * (prior - kernel @ self._inverse @ kernel.T)
        return result

    def quick_deviation(self, options: Codes) -> Floats:
        """``deviation`` of many candidates, for reports alone: its last bits depend on BLAS."""
        parts = []
        for start in range(0, len(options), BLOCK):
            block = options[start : start + BLOCK]
            kernel = self._kernel(block)
            parts.append(CONSTANT + self._prior(block) - ((kernel @ self._inverse) * kernel).sum(axis=1))
        variance = np.concatenate(parts) if parts else np.zeros(0)
        result: Floats = self._spread * np.sqrt(np.maximum(variance, 0.0))
        return result

    @cached_property
    def _inverse(self) -> Floats:
        result: Floats = np.asarray(np.linalg.inv(self._matrix), dtype=np.float64)
        return result

    def _prior(self, options: Codes) -> Floats:
        a = self.scales.columns
        # Columns of a branch that is not taken count too: "not taken" is one of their values.
        first, squares = a.sum(), (a * a).sum()
        both = first + self.scales.interaction * (first * first - squares) / 2
        of_trends = [s * prior(t.places(options)) for s, t in zip(self.scales.trends, self._trends, strict=True)]
        return np.asarray(both + np.sum(of_trends, axis=0) + np.zeros(len(options)))

    def changes(self, options: Codes) -> list[Floats]:
        """What candidates are expected to give if one group takes another option.

        Args:
            options: shape (candidates, groups).

        Returns:
            Per group the expected results, shape (candidates, options of the group).
        """
        tau, weights = self.scales.interaction, self._weights
        first, _ = self._sums(options)
        mean = self.mean(options)
        weighted = weights * (1.0 + tau * first)
        places = [trend.changed(options) for trend in self._trends]
        changed = []
        for g, (z, squares) in enumerate(zip(self._first, self._squares, strict=True)):
            # f(o) = Σ w·(z(o) + τ·(z(o)·(e₁ − z(now)) + e₂(o))): all that depends on the option of this group.
            within = np.einsum("ok,k->o", (z * z - squares) / 2, weights) * tau
            blocks = tau * np.einsum("ok,pk->op", z * weights, z)
            effect = np.einsum("xk,ok->xo", weighted, z) - blocks[options[:, g]] + within
            for along, of_group in zip(self._along, places, strict=True):
                effect = effect + np.interp(of_group[g], self._grid, along)
            rows = np.arange(len(options))
            changed.append(mean[:, None] + self._spread * (effect - effect[rows, options[:, g]][:, None]))
        return changed

    def mains(self, options: Codes) -> list[Floats]:
        """Per group the effect of each of its options on average over candidates, shape (options,), mean 0.

        Args:
            options: the candidates, shape (candidates, groups), 1 or more.
        """
        means = [change.mean(axis=0) for change in self.changes(options)]
        return [mean - mean.mean() for mean in means]
