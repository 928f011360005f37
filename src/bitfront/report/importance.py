"""The importance of each parameter: how much of a metric's variance it explains alone.

The first-order part of a functional analysis of variance (Sobol 1993; Hutter, Hoos and Leyton-Brown, "An efficient
approach for assessing hyperparameter importance", ICML 2014) over the search space, with all candidates equally likely:
``y = mean + Σ_p f_p(value of p) + rest``, where each f_p has the mean 0, and the importance of p is
``Var f_p / (Σ_q Var f_q + Var rest)``. The f_p are fitted by least squares. On a full grid they are the differences of
the plain means, and the shares are exactly Sobol's first-order indices. A sampler evaluates some regions more often
than others, so that choices of different parameters occur together; least squares separates their effects. The rest
is interactions, and noise if the metric has any.

Of an option that no trial took nothing is known, for example because no candidate with it fulfils a constraint. It is
left out, and the space is that of the other options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitfront.spaces.base import Codes, Parameter, Space

Values = NDArray[np.float64]
#: Trials needed per estimated effect; with fewer, the fit explains noise.
TRIALS_PER_EFFECT = 2
#: Rows of the design matrix that are built at a time.
BLOCK = 2**14


@dataclass(frozen=True)
class Effect:
    """One option of a parameter.

    Attributes:
        effect: difference from the metric's mean over the space, in the unit of the metric.
        mean: the mean of the metric with this option.
        trials: number of trials that chose it.
    """

    label: str
    effect: float
    mean: float
    trials: int


@dataclass(frozen=True)
class Influence:
    """The importance of one parameter: `share` is the part of the metric's variance that it explains alone, 0 to 1.

    Its effects are those of the options that some trial took.
    """

    parameter: str
    share: float
    effects: tuple[Effect, ...]


@dataclass(frozen=True)
class Importance:
    """The importance of all parameters for one metric, the largest share first.

    Attributes:
        rest: share of the variance that no parameter explains alone; NaN if `missing`.
        trials: number of trials with a finite value.
        missing: why there is no result; empty if there is one.
    """

    metric: str
    parameters: tuple[Influence, ...] = ()
    rest: float = float("nan")
    trials: int = 0
    missing: str = ""


def importance(space: Space, metric: str, codes: Codes, values: Values) -> Importance:
    """The importance of all parameters for one metric.

    Args:
        codes: codes of the trials, int64, shape (trials, parameters).
        values: values of the metric, float64, shape (trials,). Trials without a finite value are left out.
    """
    known = np.isfinite(values)
    codes, values = codes[known], values[known]
    taken = [
        np.bincount(codes[active(space, c, codes), c], minlength=len(p.labels)) for c, p in enumerate(space.parameters)
    ]
    effects = int(sum(len(p.labels) - 1 for p in space.parameters))
    if not space.parameters:
        return Importance(metric, trials=len(values), missing="there was nothing to choose")
    # If the whole space is evaluated, the means are exact, and fewer trials are enough.
    needed = min(TRIALS_PER_EFFECT * (effects + 1), space.size)
    if len(values) < needed:
        why = f"{effects} effects need {needed} trials with {metric}, and there are {len(values)}"
        return Importance(metric, trials=len(values), missing=why)
    if np.ptp(values) == 0:
        return Importance(metric, trials=len(values), missing=f"{metric} is the same for all trials")
    weights = _tried(space, taken)
    coefficients, mean, rest = _fitted(space, weights, codes, values)
    shares, fits = [], []
    for weight, beta in zip(weights, coefficients, strict=True):
        f = beta - (weight * beta).sum() / (weight.sum() or 1.0)
        # For candidates that take another branch, the parameter has no effect and its f is 0.
        shares.append(float((weight * f**2).sum()))
        fits.append(f)
    total = sum(shares) + rest
    influences = [
        Influence(
            p.name,
            share / total,
            tuple(
                Effect(label, float(f[i]), mean + float(f[i]), int(counts[i]))
                for i, label in enumerate(p.labels)
                if counts[i]
            ),
        )
        for p, f, counts, share in zip(space.parameters, fits, taken, shares, strict=True)
        if counts.any()
    ]
    influences.sort(key=lambda i: -i.share)
    return Importance(metric, tuple(influences), rest / total, len(values))


def _weights(space: Space, parameter: Parameter) -> Values:
    """Share of the candidates that take each value of a parameter. The sum is less than 1 if the parameter has no
    effect in some candidates."""
    group = space.groups[parameter.group]
    if parameter.branch is None:
        sizes = np.array([b.size for b in group.branches], dtype=np.float64)
        # Such a parameter always counts: it chooses the branch, or the group has only one branch.
        return sizes / group.size if len(sizes) > 1 else np.full(len(parameter.labels), 1 / len(parameter.labels))
    share = group.branches[parameter.branch].size / group.size
    return np.full(len(parameter.labels), share / len(parameter.labels))


def _tried(space: Space, taken: Sequence[NDArray[np.int64]]) -> list[Values]:
    """The weights of each parameter in the space of the options that some trial took.

    Args:
        taken: per parameter and option, how many trials took it.
    """
    weights = [_weights(space, p) for p in space.parameters]
    branches: dict[tuple[int, int], float] = {}
    for c, (p, counts) in enumerate(zip(space.parameters, taken, strict=True)):
        whole = weights[c].sum() if p.branch is None else branches.get((p.group, p.branch), weights[c].sum())
        kept = weights[c] * (counts > 0)
        weights[c] = kept * whole / kept.sum() if kept.any() else kept
        if p.branch is None:
            branches |= {(p.group, branch): float(weight) for branch, weight in enumerate(weights[c])}
    return weights


def active(space: Space, column: int, codes: Codes) -> NDArray[np.bool_]:
    """Which candidates take the branch in which a parameter has an effect: shape (candidates,).

    Args:
        column: column of the parameter in `codes`.
    """
    parameter = space.parameters[column]
    if parameter.branch is None:
        return np.ones(len(codes), dtype=bool)
    selector = next(c for c, p in enumerate(space.parameters) if p.group == parameter.group and p.branch is None)
    taken: NDArray[np.bool_] = codes[:, selector] == parameter.branch
    return taken


def _fitted(space: Space, weights: Sequence[Values], codes: Codes, values: Values) -> tuple[list[Values], float, float]:
    """(coefficients per option of each parameter, mean over the space, variance of what is left)."""
    parameters = space.parameters
    starts = np.cumsum([1, *(len(p.labels) for p in parameters)])
    size = int(starts[-1])
    gram, right = np.zeros((size, size)), np.zeros(size)
    centre = float(values.mean())

    def design(rows: Codes) -> Values:
        matrix = np.zeros((len(rows), size))
        matrix[:, 0] = 1
        for c, (p, weight) in enumerate(zip(parameters, weights, strict=True)):
            counts = active(space, c, rows) * 1.0
            part = matrix[:, starts[c] : starts[c] + len(p.labels)]
            part[np.arange(len(rows)), rows[:, c]] = counts
            part -= counts[:, None] * (weight / (weight.sum() or 1.0))
        return matrix

    for start in range(0, len(codes), BLOCK):
        part, target = design(codes[start : start + BLOCK]), values[start : start + BLOCK] - centre
        gram += part.T @ part
        right += part.T @ target
    # The columns of one parameter are linearly dependent, so there are many solutions; pinv gives the shortest.
    solution = np.linalg.pinv(gram, rcond=1e-10, hermitian=True) @ right
    left = 0.0
    for start in range(0, len(codes), BLOCK):
        part, target = design(codes[start : start + BLOCK]), values[start : start + BLOCK] - centre
        left += float(((target - part @ solution) ** 2).sum())
    coefficients = [solution[starts[c] : starts[c] + len(p.labels)] for c, p in enumerate(parameters)]
    return coefficients, centre + float(solution[0]), left / len(values)
