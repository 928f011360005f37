"""Bitfront's own search: evolution among all trials so far, and a small model that picks the most promising children.

Selection is NSGA-II's (Deb et al. 2002): fronts by non-domination, within a front by crowding. What is selected from is
the whole history, so that nothing good is ever lost and there is no state beside it. Children come from two parents;
ordered choices mostly move by one step. Many more are made than are asked for: a Gaussian process, fitted to the best
trials, predicts their objectives, and those go on that would stand in front, as in model-assisted evolution (Jin 2011).
It costs much less than an evaluation, and is what makes a few hundred evaluations enough.

Everything is a function of the arguments of ``propose``. Sums are made by einsum, never by BLAS, whose results depend
on the number of threads: a search that is resumed with another number of threads goes on exactly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitfront.pareto import non_dominated_sorted
from bitfront.spaces.base import Codes, Space
from bitfront.strategies import STRATEGIES
from bitfront.strategies.base import History, Strategy, StrategySettings

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

# Tuned on brute-forced spaces of jsc and digits models and on synthetic ones of 12 to 30 parameters. Half or twice of
# any of them changes the front found by about as much as another seed does.
#: Candidates that are spread over the space before anything is learned; the loop's initial ones count.
START = 16
#: Parents: the best ones, and all of the front, as far as it is no larger than `FRONT`.
POPULATION = 16
FRONT = 32
#: A generation is as large as this part of the history, within `SMALLEST` and what is asked for: early on, every few
#: results change the picture.
SHARE = 1 / 8
SMALLEST = 8
#: Children made for each that goes on, and for all of them together at most.
POOL = 8
LARGEST_POOL = 512
#: Part of the children with two parents, and part of the changes of an ordered choice that are not to a neighbour.
CROSSED = 0.8
JUMPS = 0.2
#: Trials that the model is fitted to: the best ones, and some that failed.
FITTED = 160
FAILURES = 32
#: The model's prior: variance of its linear part, of its noise (of the smooth part: 1), length scale along a diagonal.
LINEAR = 1.0
NOISE = 3e-4
LENGTH = 0.5
#: Part of a generation that goes on without asking the model, after so many trials: in the end it only repeats itself.
UNASKED = 0.25
RIPE = 400
#: A predicted violation below this part of the spread of the known ones is taken for none.
SLIGHT = 0.1
#: Columns that are eliminated before all others are updated.
PANEL = 16
#: Of a space no larger than this every unseen candidate is looked at.
SMALL = 1024


@STRATEGIES.register("evolution")
class Evolution(Strategy):
    """Evolution of the front, helped by a small model: any budget, exact resuming; a good first choice."""

    batch = 256

    def __init__(self, space: Space, objectives: int, seed: int, settings: StrategySettings | None = None) -> None:
        super().__init__(space, objectives, seed, settings)
        parameters, counts = space.parameters, space.cardinalities.tolist()
        self._ordered = np.array([p.steps for p in parameters], dtype=bool)
        # Per column: the branch under which it has an effect (−1: always), and the column that picks the branch.
        self._branch = np.array([-1 if p.branch is None else p.branch for p in parameters], dtype=np.int64)
        pick = {p.group: i for i, p in reversed(list(enumerate(parameters))) if p.branch is None}
        self._picked_by = np.array([pick.get(p.group, i) for i, p in enumerate(parameters)], dtype=np.int64)
        self._branches = bool((self._branch >= 0).any())
        # What the model sees of each value: its place from 0 to 1, or, where there is no order, a corner of a simplex.
        self._features = [
            np.linspace(0.0, 1.0, c)[:, None] if p.steps else np.eye(c) / np.sqrt(2.0)
            for p, c in zip(parameters, counts, strict=True)
        ]

    def propose(self, history: History, n: int, rng: np.random.Generator) -> Codes:
        """Up to `n` candidates that are not known; fewer while the history is short, or near its end.

        Returns:
            Shape (candidates, parameters); the most promising first. Empty only if nothing is left.
        """
        seen = len(history)
        best, rank = select(history.losses, FITTED, history.violation)
        starting = seen < START or len(best) < 2
        n = min(n, max(SMALLEST, START - seen if starting else int(seen * SHARE)))
        if starting:
            pool = history.fresh(self._spread(2 * n, rng))
        elif self.space.size <= SMALL:
            pool = history.fresh(rng.permutation(self.space.numbered(0, self.space.size)))
        else:
            parents = history.codes[best[: max(POPULATION, min(FRONT, int((rank == 0).sum())))]]
            pool, wanted = parents[:0], max(n, min(POOL * n, LARGEST_POOL))
            for attempt in range(4):
                # Where the surroundings of the front are known, larger steps leave them.
                children = self._children(parents, wanted, 1.0 + attempt, rng)
                pool = history.fresh(np.concatenate([pool, children]))
                if len(pool) >= max(n, wanted // 2):
                    break
        if len(pool) < n:
            pool = history.fresh(np.concatenate([pool, self.space.sample(4 * n, rng)]))
        if len(pool) < n:
            pool = history.fresh(np.concatenate([pool, self._left(history, n, rng)]))
        if starting or len(pool) <= n:
            return pool[:n]
        chosen = self._promising(history, best, rank, pool, n - int(n * UNASKED * min(1.0, seen / RIPE)))
        return history.fresh(np.concatenate([chosen, pool]))[:n]

    def _spread(self, n: int, rng: np.random.Generator) -> Codes:
        """A Latin hypercube: `n` candidates, along which the options of every group come up equally often."""
        options = np.empty((n, len(self.space.groups)), dtype=np.int64)
        for g, group in enumerate(self.space.groups):
            options[:, g] = (rng.permutation(n) + rng.random(n)) / n * group.size
        return self.space.codes(options)

    def _left(self, history: History, n: int, rng: np.random.Generator) -> Codes:
        """At least `n` unseen candidates, if so many are left: found by going through the space, so the last resort."""
        block, size = 4096, self.space.size
        blocks = -(-size // block)
        # Numbers of blocks may be beyond 64 bits; where to begin matters only in spaces that can be exhausted.
        first = int(rng.integers(0, min(blocks, 2**62)))
        found = [self.space.numbered(0, 0)]
        for i in range(blocks):
            start = (first + i) % blocks * block
            found.append(history.fresh(self.space.numbered(start, start + block)))
            if sum(map(len, found)) >= n:
                break
        return rng.permutation(np.concatenate(found))

    def _children(self, parents: Codes, n: int, strength: float, rng: np.random.Generator) -> Codes:
        """`n` children: uniform crossover, then about `strength` changes in each.

        Args:
            parents: best first, shape (parents, parameters).
        """
        columns = parents.shape[1]
        # The winner of a tournament of two is the better placed: an earlier front, or in the same one less crowded.
        mother, father = rng.integers(0, len(parents), (2, 2, n)).min(axis=1)
        mixed = (rng.random((n, columns)) < 0.5) & (rng.random((n, 1)) < CROSSED)
        child = np.where(mixed, parents[father], parents[mother])
        counts = self.space.cardinalities
        if self._branches:
            # Columns of branches not taken are 0; when a branch is entered they should be anything.
            idle = (self._branch >= 0) & (child[:, self._picked_by] != self._branch)
            child = np.where(idle, rng.integers(0, counts, child.shape), child)
        changed = rng.random((n, columns)) < strength / columns
        same = np.flatnonzero(~changed.any(axis=1) & ~mixed.any(axis=1))
        changed[same, rng.integers(0, columns, len(same))] = True
        step = child + rng.integers(0, 2, child.shape) * 2 - 1
        step = np.where((step < 0) | (step >= counts), 2 * child - step, step)
        other = (child + rng.integers(1, counts, child.shape)) % counts
        near = self._ordered & (rng.random(child.shape) >= JUMPS)
        child = np.where(changed, np.where(near, step, other), child)
        return self.space.canonical(child) if self._branches else child

    # -- the model

    def _promising(self, history: History, best: Rows, rank: Rows, pool: Codes, n: int) -> Codes:
        """The `n` of `pool` that are selected among their own predicted objectives and those of the front."""
        failed = np.flatnonzero(np.isnan(history.losses).any(axis=1) & (history.violation == 0))[-FAILURES:]
        rows = np.concatenate([best, failed])
        known = history.losses[rows]
        # What failed, or was never evaluated, is taken for as bad as the worst: its surroundings are avoided as far as
        # nothing speaks for them.
        known = np.where(np.isnan(known), np.nan_to_num(known, nan=-np.inf).max(axis=0), known)
        known = np.where(np.isfinite(known), known, 0.0)
        violation = history.violation[rows]
        constrained = bool(violation.any())
        if constrained:
            known = np.concatenate([known, np.log1p(violation)[:, None]], axis=1)
        centre, spread = known.mean(axis=0), known.std(axis=0)
        known = (known - centre) / np.where(spread > 0, spread, 1.0)
        front = known[: len(best)][rank == 0]
        guess = self._predicted(history.codes[rows], known, pool)
        both = np.concatenate([front, guess])
        outside = None
        if constrained:
            # The last column is the violation; near nothing of it, the model's error is larger than what it says.
            outside = both[:, -1] * spread[-1] + centre[-1]
            outside = np.where(outside > SLIGHT * spread[-1], outside, 0.0)
            both = both[:, :-1]
        chosen, _ = select(both, len(front) + n, outside)
        return pool[chosen[chosen >= len(front)][:n] - len(front)]

    def _predicted(self, codes: Codes, losses: Floats, pool: Codes) -> Floats:
        """Mean of a Gaussian process at `pool`, shape (pool, objectives), given `losses` at `codes`."""
        x, z = self._seen_by_model(codes), self._seen_by_model(pool)
        kernel = self._kernel(x, x) + NOISE * np.eye(len(x))
        guess: Floats = np.einsum("ij,jk->ik", self._kernel(z, x), solve(kernel, losses))
        return guess

    def _seen_by_model(self, codes: Codes) -> Floats:
        return np.concatenate([values[codes[:, i]] for i, values in enumerate(self._features)], axis=1) - 0.5

    def _kernel(self, x: Floats, y: Floats) -> Floats:
        """Squared exponential plus linear, both measured per parameter."""
        dots = np.einsum("ik,kj->ij", x, np.ascontiguousarray(y.T))
        squares = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1) - 2.0 * dots
        width = len(self._features)
        kernel: Floats = np.exp(squares / (-2.0 * LENGTH**2 * width)) + LINEAR / width * dots
        return kernel


# -- selection


def select(losses: Floats, n: int, violation: Floats | None = None) -> tuple[Rows, Rows]:
    """The `n` best candidates, best first: front by front, within a front the less crowded first (NSGA-II).

    Whoever violates a constraint comes after all who do not, the slightest violation first (constrained domination,
    Deb et al. 2002, section VI). The first `k` of `n` are what ``select(losses, k)`` gives. Fronts are peeled off only
    as far as they are needed.

    Args:
        losses: shape (candidates, objectives), to be minimised; rows with NaN (failed) are left out, unless they
            violate a constraint.
        violation: shape (candidates,), 0 where there is none.

    Returns:
        Their rows and the number of the front that each is on, 0 for what nobody dominates.
    """
    if violation is not None and violation.any():
        fine, ranks_of_fine = select(np.where((violation > 0)[:, None], np.nan, losses), n)
        outside = np.flatnonzero(violation > 0)
        outside = outside[np.argsort(violation[outside], kind="stable")][: n - len(fine)]
        behind = ranks_of_fine.max(initial=-1) + 1 + np.arange(len(outside))
        return np.concatenate([fine, outside]), np.concatenate([ranks_of_fine, behind])
    left: Rows = np.flatnonzero(~np.isnan(losses).any(axis=1))
    # From here on sorted by the first objective, then the second ...: who dominates stands before who is dominated.
    left = left[np.lexsort(losses[left].T[::-1])]
    if losses.shape[1] == 1:
        values = losses[left[:n], 0]
        return left[:n], np.searchsorted(np.unique(values), values)
    rows, ranks, count, values = [left[:0]], [left[:0]], 0, losses[left]
    while len(left) and count < n:
        first = non_dominated_sorted(values)
        front = left[first][np.argsort(-crowding(values[first]), kind="stable")]
        rows.append(front)
        ranks.append(np.full(len(front), len(ranks) - 1, dtype=np.int64))
        left, values, count = left[~first], values[~first], count + len(front)
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


def solve(matrix: Floats, right: Floats) -> Floats:
    """``matrix⁻¹ · right`` for a symmetric positive definite matrix, by plain elimination; the top says why.

    In panels of `PANEL` columns, since what stands to the right of a panel can be updated for all of them at once.
    """
    size = len(matrix)
    a = np.concatenate([matrix, right], axis=1)
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        factors = np.zeros((size - start, stop - start))
        for i in range(start, stop):
            factor = a[i + 1 :, i] / a[i, i]
            factors[i + 1 - start :, i - start] = factor
            a[i + 1 :, i:stop] -= factor[:, None] * a[i, i:stop]
            a[i + 1 : stop, stop:] -= factor[: stop - i - 1, None] * a[i, stop:]
        a[stop:, stop:] -= np.einsum("ik,kj->ij", factors[stop - start :], a[start:stop, stop:])
    solution = a[:, size:]
    for i in range(size - 1, -1, -1):
        solution[i] /= a[i, i]
        solution[:i] -= a[:i, i, None] * solution[i]
    return solution
