"""The pressure of each cycle: over a range, or, under constraints, around the pressure at which they just hold.

Without constraints the pressure rises evenly, in its logarithm, from the first cycle to the last one, and faster in the
last quarter where accuracy hardly suffers. With constraints it rises twice as fast, until a cycle is *past* them: its
networks are no longer accurate enough, or cheap enough by now. Then the next cycle begins where that one began, with
another order of samples, and the pressure rises more slowly from there. Where even the smallest rise is too much, the
same pressure goes on, then less: bits still fall under it. So most cycles are spent where the constraints just hold. As
long as no cycle was within them, the pressure falls; the training goes on all the same, because networks may only not
be trained enough yet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitfront.constraints import Constraint

#: The pressure rises at least by this factor.
CLOSE = 1.06
#: How much pressure takes away accuracy depends on the task. After this share of the cycles, one whose best network
#: lost less than so much of the best accuracy so far is followed by so many more steps of the rise.
LATE, LOST, HURRY = 0.75, 0.006, 3


@dataclass(frozen=True)
class Target:
    """What the constraints of a search say about accuracy and cost.

    Attributes:
        least_right: how many samples a network must classify correctly, at least; in another task the least value of
            the metric that leads, negated where smaller is better. None: no matter.
        most_cost: what it may cost at most, as the training counts; None: no matter, or it is not counted as reported.
        others: constraints on metrics that the training does not count, and that more pressure can fulfil.
    """

    least_right: float | None = None
    most_cost: float | None = None
    others: tuple[Constraint, ...] = ()

    def __bool__(self) -> bool:
        return self.least_right is not None or self.bounds_cost

    @property
    def bounds_cost(self) -> bool:
        """Whether it says how cheap a network must be."""
        return self.most_cost is not None or bool(self.others)

    def past(self, networks: Sequence[tuple[float, float]], others: Sequence[bool] = ()) -> bool:
        """Whether the pressure need not rise any more, after networks with these (costs, numbers of right answers).

        A constraint on the accuracy says it alone: the cheapest networks within it are the best within both.

        Args:
            others: of each network, whether it fulfils the other constraints; may be missing if there are none.
        """
        if self.least_right is not None:
            return all(right < self.least_right for _, right in networks)
        return any(self._cheap(networks, others))

    def loose(self, networks: Sequence[tuple[float, float]], others: Sequence[bool] = ()) -> bool:
        """Whether the first networks are as cheap as they must be, so that it says nothing of the pressure."""
        return self.least_right is None and all(self._cheap(networks, others))

    def _cheap(self, networks: Sequence[tuple[float, float]], others: Sequence[bool]) -> list[bool]:
        others = others or [True] * len(networks)
        most = math.inf if self.most_cost is None else self.most_cost
        return [cost <= most and other for (cost, _), other in zip(networks, others, strict=True)]

    def room(self, networks: Sequence[tuple[float, float]]) -> float:
        """How many times as expensive the dearest of some networks might be, 1 to 2; 1 if that is not known."""
        dearest = max((cost for cost, _ in networks), default=0.0)
        return 1.0 if self.most_cost is None else min(2.0, max(1.0, self.most_cost / max(dearest, 1e-9)))

    def best(self, networks: Sequence[tuple[float, float]]) -> list[int]:
        """The cheapest and the most accurate of networks with these (costs, numbers of right answers) that fulfil what
        is known of them; none if none does."""
        least = -math.inf if self.least_right is None else self.least_right
        most = math.inf if self.most_cost is None else self.most_cost
        within = [i for i, (cost, right) in enumerate(networks) if right >= least and cost <= most]
        if not self or not within:
            return []
        cheapest = min(within, key=lambda i: (networks[i][0], -networks[i][1]))
        most_accurate = min(within, key=lambda i: (-networks[i][1], networks[i][0]))
        return list(dict.fromkeys((cheapest, most_accurate)))


@dataclass(frozen=True)
class Hurry:
    """How much further than planned the pressure rises where accuracy hardly suffers, if no constraint steers it.

    Attributes:
        most_right: how many of the val samples the best network so far classifies correctly, or the same for another
            task, as in ``Target``; None before the first cycle.
        steps: how many steps of the rise were added so far.
        before: how many were added before the last cycle.
    """

    most_right: float | None = None
    steps: int = 0
    before: int = 0

    def after(self, right: float, done: float) -> Hurry:
        """How it goes on after a cycle whose best network classifies `right` samples correctly; `done` is the share of
        the course that is done."""
        best = right if self.most_right is None else max(self.most_right, right)
        # Of a metric whose smaller values are better, `best` is negative.
        least = (1 - LOST) * best if best >= 0 else (1 + LOST) * best
        more = HURRY if done >= LATE and right > least else 0
        return Hurry(best, self.steps + more, self.steps)


@dataclass(frozen=True)
class Rise:
    """How the pressure rises under a target.

    Attributes:
        low: the pressure of the last cycle that was not past the target; None before there is one.
        factor: by which the next one is larger; None before the first one.
        high: the pressure of the last cycle, as long as all were past the target.
        free: whether the target was met from the start, so that the pressure rises as without one.
    """

    low: float | None = None
    factor: float | None = None
    high: float | None = None
    free: bool = False

    @property
    def settled(self) -> bool:
        """Whether the pressure is as near to the target as it is worth."""
        return self.factor is not None and self.factor <= CLOSE

    def next(self, first: float) -> float:
        """The pressure of the next cycle; `first` is that of the first one."""
        if self.low is None or self.factor is None:
            return first if self.high is None else self.high / 2
        return self.low * self.factor

    def after(
        self, pressure: float, past: bool, usual: float, target: Target, emptied: bool = False, room: float = 1.0
    ) -> tuple[Rise, bool]:
        """(how it goes on after a cycle at `pressure`, whether the next cycle begins where this one began).

        Args:
            past: whether the cycle is past the target.
            usual: by which factor the pressure rises as long as nothing is past the target.
            emptied: whether the cycle removed most of the weights; none of them comes back.
            room: how many times as expensive its networks might be.
        """
        factor = usual if self.factor is None else self.factor
        if not past:
            return Rise(pressure, max(CLOSE, factor)), False
        if target.least_right is None and self.settled:
            # The cost is met. Less pressure lets bits grow again, so the cost stays near its bound.
            return Rise(pressure / factor / max(factor, room), factor), False
        if self.low is None:
            return Rise(None, factor, pressure), emptied
        if self.settled:
            # Bits may still be falling under the same pressure, so less and less of it is tried.
            return Rise(self.low, 1.0 if factor > 1 else min(1 / CLOSE, factor**2)), True
        return Rise(self.low, max(CLOSE, math.sqrt(factor))), True
