"""Evolution with a surrogate model: children of the best trials so far, of which a small model picks the most
promising.

Selection is that of NSGA-II (Deb et al. 2002): fronts by non-domination, and crowding distance within a front. It
selects from the whole history, so no good trial is lost and there is no hidden state. Children have two parents;
ordered choices mostly change by one step. Many more children are generated than are requested. A Gaussian process,
fitted to the best trials, predicts their objectives, and the children with the best predictions are proposed, as in
surrogate-assisted evolution (Jin 2011). That costs much less than evaluating them, so a few hundred evaluations are
enough.

Everything is a function of the arguments of ``propose``. Sums are computed by einsum, not by BLAS, whose results depend
on the number of threads. So a search that is resumed with another number of threads continues exactly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitfront.pareto import non_dominated_sorted
from bitfront.spaces.base import Codes, Space
from bitfront.strategies import STRATEGIES
from bitfront.strategies.base import History, Strategy, StrategySettings, latin_hypercube
from bitfront.strategies.elimination import solve

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

# These constants were tuned on completely evaluated spaces of jsc and digits models, and on synthetic ones of 12 to 30
# parameters. Half or twice the value of any of them changes the resulting front about as much as another seed does.
#: Candidates spread over the space before the model is used; the loop's initial candidates count.
START = 16
#: Parents: the best trials, at least so many, and the whole front up to `MAX_FRONT` members.
POPULATION = 16
MAX_FRONT = 32
#: Size of a generation as a fraction of the history, at least `MIN_GENERATION`: early on, a few results change a lot.
GENERATION = 1 / 8
MIN_GENERATION = 8
#: Children generated per proposed one, and the maximum of all children.
POOL = 8
MAX_POOL = 512
#: Fraction of the children with two parents, and fraction of the changes of an ordered choice that are not by one step.
CROSSOVER = 0.8
JUMPS = 0.2
#: Trials that the model is fitted to: the best ones, and failed ones.
FITTED = 160
FAILURES = 32
#: The model's prior: variances of its linear part and of its noise (of its smooth part: 1), length scale along a
#: diagonal.
LINEAR = 1.0
NOISE = 3e-4
LENGTH = 0.5
#: Fraction of a generation that is not chosen by the model, reached after `LATE` trials: later the model repeats
#: itself.
RANDOM = 0.25
LATE = 400
#: A predicted violation below this fraction of the spread of the known ones counts as none.
SLIGHT = 0.1
#: In a space of at most this size every unseen candidate is in the pool.
SMALL = 1024


@STRATEGIES.register("evolution")
class Evolution(Strategy):
    """Evolution of the front with a surrogate model: any budget, exact resuming; a good first choice."""

    batch = 256

    def __init__(self, space: Space, objectives: int, seed: int, settings: StrategySettings | None = None) -> None:
        super().__init__(space, objectives, seed, settings)
        parameters, counts = space.parameters, space.cardinalities.tolist()
        self._ordered = np.array([p.steps for p in parameters], dtype=bool)
        # Per column: the branch in which it has an effect (−1: in all), and the column that chooses the branch.
        self._branch = np.array([-1 if p.branch is None else p.branch for p in parameters], dtype=np.int64)
        choosing = {p.group: i for i, p in reversed(list(enumerate(parameters))) if p.branch is None}
        self._branch_column = np.array([choosing.get(p.group, i) for i, p in enumerate(parameters)], dtype=np.int64)
        self._has_branches = bool((self._branch >= 0).any())
        # The model's features of each value: its position from 0 to 1, or, without an order, a corner of a simplex.
        self._features = [
            np.linspace(0.0, 1.0, c)[:, None] if p.steps else np.eye(c) / np.sqrt(2.0)
            for p, c in zip(parameters, counts, strict=True)
        ]

    def propose(self, history: History, n: int, rng: np.random.Generator) -> Codes:
        """Up to `n` candidates that are not in the history; fewer while it is short, or when few are left.

        Returns:
            Codes, shape (candidates, parameters), the most promising first. Empty only if no candidate is left.
        """
        trials = len(history)
        best, rank = select(history.losses, FITTED, history.violation)
        starting = trials < START or len(best) < 2
        n = min(n, max(MIN_GENERATION, START - trials if starting else int(trials * GENERATION)))
        if starting:
            pool = history.fresh(latin_hypercube(self.space, 2 * n, rng))
        elif self.space.size <= SMALL:
            pool = history.fresh(rng.permutation(self.space.numbered(0, self.space.size)))
        else:
            parents = history.codes[best[: max(POPULATION, min(MAX_FRONT, int((rank == 0).sum())))]]
            pool, needed = parents[:0], max(n, min(POOL * n, MAX_POOL))
            for attempt in range(4):
                # If too many neighbours of the front are known already, the next attempt takes larger steps.
                children = self._children(parents, needed, 1.0 + attempt, rng)
                pool = history.fresh(np.concatenate([pool, children]))
                if len(pool) >= max(n, needed // 2):
                    break
        if len(pool) < n:
            pool = history.fresh(np.concatenate([pool, self.space.sample(4 * n, rng)]))
        if len(pool) < n:
            pool = history.fresh(np.concatenate([pool, self._unseen(history, n, rng)]))
        if starting or len(pool) <= n:
            return pool[:n]
        by_model = n - int(n * RANDOM * min(1.0, trials / LATE))
        promising = self._promising(history, best, rank, pool, by_model)
        return history.fresh(np.concatenate([promising, pool]))[:n]

    def _unseen(self, history: History, n: int, rng: np.random.Generator) -> Codes:
        """At least `n` unseen candidates, or all that are left. It enumerates the space, so it is the last resort."""
        block, size = 4096, self.space.size
        blocks = -(-size // block)
        # The number of blocks may exceed 64 bits; the first block matters only in spaces small enough to be exhausted.
        first = int(rng.integers(0, min(blocks, 2**62)))
        parts = [self.space.numbered(0, 0)]
        for i in range(blocks):
            start = (first + i) % blocks * block
            parts.append(history.fresh(self.space.numbered(start, start + block)))
            if sum(map(len, parts)) >= n:
                break
        return rng.permutation(np.concatenate(parts))

    def _children(self, parents: Codes, n: int, strength: float, rng: np.random.Generator) -> Codes:
        """`n` children, shape (n, parameters): uniform crossover, then about `strength` mutations in each.

        Args:
            parents: best first, shape (parents, parameters).
            n: number of children.
            strength: expected number of mutations.
            rng: source of all random numbers.
        """
        columns = parents.shape[1]
        # Binary tournaments: the better parent has the smaller index (an earlier front, or less crowded in the same
        # one).
        mother, father = rng.integers(0, len(parents), (2, 2, n)).min(axis=1)
        mixed = (rng.random((n, columns)) < 0.5) & (rng.random((n, 1)) < CROSSOVER)
        child = np.where(mixed, parents[father], parents[mother])
        counts = self.space.cardinalities
        if self._has_branches:
            # Columns of other branches are 0. They get random values, in case a mutation changes the branch.
            unused = (self._branch >= 0) & (child[:, self._branch_column] != self._branch)
            child = np.where(unused, rng.integers(0, counts, child.shape), child)
        changed = rng.random((n, columns)) < strength / columns
        same = np.flatnonzero(~changed.any(axis=1) & ~mixed.any(axis=1))
        changed[same, rng.integers(0, columns, len(same))] = True
        step = child + rng.integers(0, 2, child.shape) * 2 - 1
        step = np.where((step < 0) | (step >= counts), 2 * child - step, step)
        other = (child + rng.integers(1, counts, child.shape)) % counts
        near = self._ordered & (rng.random(child.shape) >= JUMPS)
        child = np.where(changed, np.where(near, step, other), child)
        return self.space.canonical(child) if self._has_branches else child

    # -- the model

    def _promising(self, history: History, best: Rows, rank: Rows, pool: Codes, n: int) -> Codes:
        """The `n` candidates of `pool` that are selected by their predicted objectives, together with the front."""
        failed = np.flatnonzero(np.isnan(history.losses).any(axis=1) & (history.violation == 0))[-FAILURES:]
        rows = np.concatenate([best, failed])
        targets = history.losses[rows]
        # A failed or unevaluated candidate counts as bad as the worst one, so that its neighbours are avoided.
        targets = np.where(np.isnan(targets), np.nan_to_num(targets, nan=-np.inf).max(axis=0), targets)
        targets = np.where(np.isfinite(targets), targets, 0.0)
        violation = history.violation[rows]
        constrained = bool(violation.any())
        if constrained:
            targets = np.concatenate([targets, np.log1p(violation)[:, None]], axis=1)
        centre, spread = targets.mean(axis=0), targets.std(axis=0)
        targets = (targets - centre) / np.where(spread > 0, spread, 1.0)
        front = targets[: len(best)][rank == 0]
        predicted = self._predicted(history.codes[rows], targets, pool)
        both = np.concatenate([front, predicted])
        predicted_violation = None
        if constrained:
            # The last column is the violation. Near 0 the model's error is larger than the predicted value.
            predicted_violation = both[:, -1] * spread[-1] + centre[-1]
            considerable = predicted_violation > SLIGHT * spread[-1]
            predicted_violation = np.where(considerable, predicted_violation, 0.0)
            both = both[:, :-1]
        selected, _ = select(both, len(front) + n, predicted_violation)
        return pool[selected[selected >= len(front)][:n] - len(front)]

    def _predicted(self, codes: Codes, targets: Floats, pool: Codes) -> Floats:
        """Mean of a Gaussian process at `pool`, shape (pool, targets), given `targets` at `codes`."""
        x, z = self._model_features(codes), self._model_features(pool)
        kernel = self._kernel(x, x) + NOISE * np.eye(len(x))
        mean: Floats = np.einsum("ij,jk->ik", self._kernel(z, x), solve(kernel, targets))
        return mean

    def _model_features(self, codes: Codes) -> Floats:
        return np.concatenate([values[codes[:, i]] for i, values in enumerate(self._features)], axis=1) - 0.5

    def _kernel(self, x: Floats, y: Floats) -> Floats:
        """The sum of a squared exponential and a linear kernel, both averaged over the parameters."""
        dots = np.einsum("ik,kj->ij", x, np.ascontiguousarray(y.T))
        squares = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1) - 2.0 * dots
        width = len(self._features)
        kernel: Floats = np.exp(squares / (-2.0 * LENGTH**2 * width)) + LINEAR / width * dots
        return kernel


# -- selection


def select(losses: Floats, n: int, violation: Floats | None = None) -> tuple[Rows, Rows]:
    """The `n` best candidates, best first: front by front, within a front the less crowded first (NSGA-II).

    Candidates that violate a constraint come after all others, the smallest violation first (constrained domination,
    Deb et al. 2002, section VI). The first `k` of `n` are the result of ``select(losses, k)``. Only as many fronts are
    computed as are needed.

    Args:
        losses: shape (candidates, objectives), to be minimised. Rows with NaN (failed) are left out, unless they
            violate a constraint.
        n: how many at most.
        violation: shape (candidates,), 0 where there is none; None for no constraints.

    Returns:
        Row numbers, and the number of the front that each row is on (0: not dominated); both of shape (selected,).
    """
    if violation is not None and violation.any():
        fulfilling, ranks_of_fulfilling = select(np.where((violation > 0)[:, None], np.nan, losses), n)
        violating = np.flatnonzero(violation > 0)
        violating = violating[np.argsort(violation[violating], kind="stable")][: n - len(fulfilling)]
        ranks_of_violating = ranks_of_fulfilling.max(initial=-1) + 1 + np.arange(len(violating))
        return np.concatenate([fulfilling, violating]), np.concatenate([ranks_of_fulfilling, ranks_of_violating])
    remaining: Rows = np.flatnonzero(~np.isnan(losses).any(axis=1))
    # Sorted by the first objective, then the second ...: a row is dominated only by rows before it.
    remaining = remaining[np.lexsort(losses[remaining].T[::-1])]
    if losses.shape[1] == 1:
        values = losses[remaining[:n], 0]
        return remaining[:n], np.searchsorted(np.unique(values), values)
    rows, ranks, count, values = [remaining[:0]], [remaining[:0]], 0, losses[remaining]
    while len(remaining) and count < n:
        first = non_dominated_sorted(values)
        front = remaining[first][np.argsort(-crowding(values[first]), kind="stable")]
        rows.append(front)
        ranks.append(np.full(len(front), len(ranks) - 1, dtype=np.int64))
        remaining, values, count = remaining[~first], values[~first], count + len(front)
    return np.concatenate(rows)[:n], np.concatenate(ranks)[:n]


def crowding(losses: Floats) -> Floats:
    """Crowding distance of the members of one front, shape (members,): infinite at the ends of any objective."""
    order = np.argsort(losses, axis=0, kind="stable")
    ordered = np.take_along_axis(losses, order, axis=0)
    extent = ordered[-1] - ordered[0]
    gaps = np.full(losses.shape, np.inf)
    gaps[1:-1] = (ordered[2:] - ordered[:-2]) / np.where(extent > 0, extent, 1.0)
    distance = np.empty(losses.shape)
    np.put_along_axis(distance, order, gaps, axis=0)
    total: Floats = distance.sum(axis=1)
    return total
