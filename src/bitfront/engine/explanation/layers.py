"""Layer by layer: what options cost and buy, which layers interact, what else a trial could have had."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitfront.engine.explanation.model import Model, Trials
from bitfront.engine.explanation.option_costs import Cost
from bitfront.engine.explanation.results import (
    Alternative,
    Estimate,
    Interaction,
    OptionEffect,
    PlaceAlternatives,
    PlaceEffects,
)
from bitfront.spaces.base import Codes
from bitfront.spaces.described import DescribedSpace

Floats = NDArray[np.float64]

#: Trials of the front that effects are averages over, and interactions, at most.
AROUND, AROUND_PAIRS = 8, 4
#: Pairs of layers that are reported.
PAIRS = 5
#: Pairs of layers that are looked at together.
BLOCK = 512


@dataclass(frozen=True)
class Place:
    """Something that is chosen: one operand of a layer, or the whole layer if it has several formats.

    Attributes:
        name: e.g. ``fc1/weight``.
        group: index of the layer's group.
        column: the column of the code; None: the whole group.
        labels: one per value, for people.
    """

    name: str
    group: int
    column: int | None
    labels: tuple[str, ...]

    def values(self, options: Codes, codes: Codes) -> NDArray[np.int64]:
        """The value that candidates have here, shape (candidates,).

        Args:
            options: shape (candidates, groups).
            codes: of the same candidates, shape (candidates, parameters).
        """
        values: NDArray[np.int64] = options[:, self.group] if self.column is None else codes[:, self.column]
        return values

    def changed(self, space: DescribedSpace, options: Codes) -> Codes:
        """`options` with each value here, int64, shape (values, candidates, groups)."""
        changed = np.repeat(options[None], len(self.labels), axis=0)
        if self.column is None:
            changed[:, :, self.group] = np.arange(len(self.labels))[:, None]
            return changed
        codes = space.codes(changed.reshape(-1, options.shape[1]))
        codes[:, self.column] = np.repeat(np.arange(len(self.labels)), len(options))
        return space.options(codes).reshape(changed.shape)


def places_of(space: DescribedSpace) -> list[Place]:
    """Everything that can be chosen in a space, in its order."""
    places = []
    for g, group in enumerate(space.groups):
        if group.size == 1:
            continue
        columns = [(c, p) for c, p in enumerate(space.parameters) if p.group == g]
        if len(group.branches) == 1:
            places += [Place(p.name, g, c, _readable(space, p.labels)) for c, p in columns]
        else:
            places.append(Place(group.name, g, None, option_labels(space, g)))
    return places


def option_labels(space: DescribedSpace, g: int) -> tuple[str, ...]:
    """The options of a group, for people, e.g. ``affine, data_in 8 bits, weight 4 bits``: the format where there are
    several, and every operand that has a choice."""
    group = space.groups[g]
    labels = []
    for option in range(group.size):
        branch, entries = group.picks(option)
        chosen = group.branches[branch]
        parts = ["float" if chosen.label == "NA" else chosen.label] if len(group.branches) > 1 else []
        for choice, entry in zip(chosen.choices, entries, strict=True):
            if len(choice.labels) > 1:
                parts.append(f"{choice.name} {_readable(space, choice.labels)[entry]}")
        labels.append(", ".join(parts))
    return tuple(labels)


def _readable(space: DescribedSpace, labels: tuple[str, ...]) -> tuple[str, ...]:
    """Labels as bits or multipliers, where these tell them apart."""
    sizes = [space.sizes.get(label) for label in labels]
    words = []
    for size in sizes:
        if size is None or (size.kind == "bits" and size.amount != int(size.amount)):
            return labels
        words.append(f"×{size.amount:g}" if size.kind == "width" else _bits(int(size.amount)))
    return tuple(words) if len(set(words)) == len(words) else labels


def _bits(number: int) -> str:
    return "1 bit" if number == 1 else f"{number} bits"


def evenly(rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Up to `most` rows, evenly from the first to the last."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(np.int64))]


def effects(model: Model, costs: Sequence[Cost], around: Codes) -> list[PlaceEffects]:
    """What the options of every place cost and buy, on average over candidates.

    Args:
        model: of the explained metric.
        costs: the first one sorts the options of a place.
        around: the candidates, shape (candidates, groups).
    """
    result = []
    for place in places_of(model.space):
        changed = place.changed(model.space, around)
        flat = changed.reshape(-1, around.shape[1])
        of_cost = {cost.name: cost.of(flat).reshape(changed.shape[:2]) for cost in costs}
        order = np.arange(len(place.labels))
        if costs:
            order = np.argsort(of_cost[costs[0].name].mean(axis=1), kind="stable")
        weights = np.repeat(np.eye(len(order)), len(around), axis=1) / len(around)
        contrasts = model.contrasts(flat, weights - weights[order[0]])
        options = [
            OptionEffect(
                place.labels[o], {name: float((c[o] - c[order[0]]).mean()) for name, c in of_cost.items()}, contrasts[o]
            )
            for o in order.tolist()
        ]
        result.append(PlaceEffects(place.name, tuple(options)))
    return result


def interactions(model: Model, costs: Sequence[Cost], around: Codes) -> list[Interaction]:
    """The pairs of layers whose cheapest options together change the metric most beyond the sum of both changes.

    Args:
        model: of the explained metric.
        costs: the first one says what is cheap; without it the first and the last option of each layer are taken.
        around: candidates whose other layers are kept, shape (candidates, groups).
    """
    space, around = model.space, evenly(around, AROUND_PAIRS)
    chosen = [g for g, group in enumerate(space.groups) if group.size > 1]
    ends = {}
    for g in chosen:
        table = costs[0].tables[g] if costs and np.ptp(costs[0].tables[g]) > 0 else np.arange(space.groups[g].size)
        ends[g] = int(np.argmin(table)), int(np.argmax(table))
    pairs = list(itertools.combinations(chosen, 2))
    signs = np.array([1.0, -1.0, -1.0, 1.0])
    excess = np.zeros(len(pairs))
    for start in range(0, len(pairs), BLOCK):
        corners = np.concatenate([_corners(around, ends, pair) for pair in pairs[start : start + BLOCK]])
        losses = model.losses(corners.reshape(-1, around.shape[1])).reshape(-1, 4, len(around))
        excess[start : start + BLOCK] = np.einsum("pcx,c->p", losses, signs) / len(around)
    result = []
    for p in np.argsort(-np.abs(excess), kind="stable")[:PAIRS].tolist():
        corners = _corners(around, ends, pairs[p]).reshape(-1, around.shape[1])
        weights = np.repeat(signs, len(around))[None] / len(around)
        a, b = pairs[p]
        result.append(
            Interaction(
                (space.groups[a].name, space.groups[b].name),
                (option_labels(space, a)[ends[a][0]], option_labels(space, b)[ends[b][0]]),
                model.contrasts(corners, weights)[0],
            )
        )
    return result


def _corners(around: Codes, ends: dict[int, tuple[int, int]], pair: tuple[int, int]) -> Codes:
    """Candidates with both layers cheap, one of them, the other, none; shape (1, 4, candidates, groups)."""
    corners = np.repeat(around[None], 4, axis=0)
    for at, (a, b) in enumerate(itertools.product((0, 1), repeat=2)):
        corners[at, :, pair[0]] = ends[pair[0]][a]
        corners[at, :, pair[1]] = ends[pair[1]][b]
    return corners[None]


def known_or_expected(model: Model, trials: Trials, options: Codes) -> list[Estimate]:
    """The metric of candidates: measured where it was, else predicted."""
    found = trials.find(model.space, options)
    result = model.estimates(options)
    for i in np.flatnonzero(found >= 0).tolist():
        value = model.sign * float(trials.losses[found[i]])
        result[i] = Estimate(value, value, value, int(trials.numbers[found[i]]))
    return result


def alternatives(model: Model, trials: Trials, costs: Sequence[Cost], place_of_trial: int) -> list[PlaceAlternatives]:
    """Per place, what else could have been chosen, everything else as in one trial.

    Args:
        model: of the explained metric.
        trials: the trials.
        costs: metrics in closed form.
        place_of_trial: the place of the trial among `trials`.
    """
    space, options = model.space, trials.options[place_of_trial][None]
    value = model.sign * float(trials.losses[place_of_trial])
    result = []
    for place in places_of(space):
        changed = place.changed(space, options)[:, 0]
        now = int(place.values(options, trials.codes[place_of_trial][None])[0])
        order = np.argsort(costs[0].of(changed), kind="stable") if costs else np.arange(len(changed))
        values = known_or_expected(model, trials, changed)
        others = [
            Alternative(
                place.labels[o],
                {cost.name: float((cost.of(changed[o : o + 1]) - cost.of(options))[0]) for cost in costs},
                values[o],
                values[o].value - value,
            )
            for o in order.tolist()
            if o != now
        ]
        result.append(PlaceAlternatives(place.name, place.labels[now], tuple(others)))
    return result


def changes_between(space: DescribedSpace, before: Codes, after: Codes) -> dict[str, tuple[str, str]]:
    """Place → (option before, option after), for the places at which two candidates differ.

    Args:
        before, after: options, each of shape (groups,).
    """
    both = np.stack([before, after])
    codes, result = space.codes(both), {}
    for place in places_of(space):
        a, b = place.values(both, codes).tolist()
        if a != b:
            result[place.name] = (place.labels[a], place.labels[b])
    return result
