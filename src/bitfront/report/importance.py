"""Which choice mattered: how much of a metric's variance each parameter explains on its own.

The first-order part of a functional analysis of variance (Sobol 1993; Hutter, Hoos and Leyton-Brown, "An efficient
approach for assessing hyperparameter importance", ICML 2014) over the search space, every candidate equally likely:
``y = mean + Σ_p f_p(value of p) + rest``, where each f_p has the mean 0, and the importance of p is
``Var f_p / (Σ_q Var f_q + Var rest)``. The f_p are fitted by least squares. On a full grid they are the differences of
the options' plain means, and the shares are Sobol's first-order indices exactly; on the trials of a sampler, which
likes some regions better than others, least squares does not mistake one parameter's effect for that of another that it
tends to be chosen with. The rest is interactions, and noise where a metric has some.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitfront.spaces.base import Codes, Parameter, Space

Values = NDArray[np.float64]
#: Trials per effect that is estimated; with fewer, the fit explains noise.
TRIALS_PER_EFFECT = 2
#: Rows of the design matrix made at a time.
BLOCK = 2**14


@dataclass(frozen=True)
class Effect:
    """One option of a parameter.

    Attributes:
        effect: difference that it makes to the metric's mean over the space, in the metric's unit.
        mean: the mean that makes.
        trials: how many chose it.
    """

    label: str
    effect: float
    mean: float
    trials: int


@dataclass(frozen=True)
class Influence:
    """One parameter. `share` of the metric's variance that it explains on its own, 0 to 1."""

    parameter: str
    share: float
    effects: tuple[Effect, ...]


@dataclass(frozen=True)
class Importance:
    """Of every parameter for one metric, the largest share first.

    Attributes:
        rest: share of the variance that no parameter explains on its own.
        trials: how many it was taken from.
        missing: why there is none; empty if there is.
    """

    metric: str
    parameters: tuple[Influence, ...] = ()
    rest: float = float("nan")
    trials: int = 0
    missing: str = ""


def importance(space: Space, metric: str, codes: Codes, values: Values) -> Importance:
    """What the choices do to a metric.

    Args:
        codes: of the trials, shape (trials, parameters).
        values: of the metric, shape (trials,); trials without a finite one are left out.
    """
    known = np.isfinite(values)
    codes, values = codes[known], values[known]
    effects = int(sum(len(p.labels) - 1 for p in space.parameters))
    if not space.parameters:
        return Importance(metric, trials=len(values), missing="nothing was to be chosen")
    # Of a whole space nothing is estimated: the means are what they are.
    needed = min(TRIALS_PER_EFFECT * (effects + 1), space.size)
    if len(values) < needed:
        why = f"{effects} effects need {needed} trials with {metric}, and there are {len(values)}"
        return Importance(metric, trials=len(values), missing=why)
    if np.ptp(values) == 0:
        return Importance(metric, trials=len(values), missing=f"{metric} is the same for all trials")
    weights = [_weights(space, p) for p in space.parameters]
    coefficients, mean, rest = _fitted(space, weights, codes, values)
    shares, found = [], []
    taken = {p.name: codes[active(space, c, codes), c] for c, p in enumerate(space.parameters)}
    for p, own, beta in zip(space.parameters, weights, coefficients, strict=True):
        f = beta - (own * beta).sum() / own.sum()
        # Where the parameter has no effect (another branch was taken) its f is 0.
        shares.append(float((own * f**2).sum()))
        found.append((p, f))
    total = sum(shares) + rest
    influences = [
        Influence(
            p.name,
            share / total,
            tuple(
                Effect(label, float(f[i]), mean + float(f[i]), int((taken[p.name] == i).sum()))
                for i, label in enumerate(p.labels)
            ),
        )
        for (p, f), share in zip(found, shares, strict=True)
    ]
    influences.sort(key=lambda i: -i.share)
    return Importance(metric, tuple(influences), rest / total, len(values))


def _weights(space: Space, parameter: Parameter) -> Values:
    """Share of the space's candidates that take each value of a parameter; less than 1 in all if it can be without
    effect."""
    group = space.groups[parameter.group]
    if parameter.branch is None:
        sizes = np.array([b.size for b in group.branches], dtype=np.float64)
        # A parameter that always counts is the choice of a branch, or belongs to the only branch.
        return sizes / group.size if len(sizes) > 1 else np.full(len(parameter.labels), 1 / len(parameter.labels))
    share = group.branches[parameter.branch].size / group.size
    return np.full(len(parameter.labels), share / len(parameter.labels))


def active(space: Space, column: int, codes: Codes) -> NDArray[np.bool_]:
    """Which candidates have taken the branch under which a parameter counts."""
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
        for c, (p, own) in enumerate(zip(parameters, weights, strict=True)):
            counts = active(space, c, rows) * 1.0
            part = matrix[:, starts[c] : starts[c] + len(p.labels)]
            part[np.arange(len(rows)), rows[:, c]] = counts
            part -= counts[:, None] * (own / own.sum())
        return matrix

    for start in range(0, len(codes), BLOCK):
        part, target = design(codes[start : start + BLOCK]), values[start : start + BLOCK] - centre
        gram += part.T @ part
        right += part.T @ target
    # The columns of a parameter add up to nothing: the shortest solution is taken.
    solution = np.linalg.pinv(gram, rcond=1e-10, hermitian=True) @ right
    left = 0.0
    for start in range(0, len(codes), BLOCK):
        part, target = design(codes[start : start + BLOCK]), values[start : start + BLOCK] - centre
        left += float(((target - part @ solution) ** 2).sum())
    coefficients = [solution[starts[c] : starts[c] + len(p.labels)] for c, p in enumerate(parameters)]
    return coefficients, centre + float(solution[0]), left / len(values)
