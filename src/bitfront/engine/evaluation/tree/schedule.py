"""The schedule of a batch: which states of each node its candidates need.

The value of a node depends only on the options of the sites before it. So over a batch a node has one *state* for each
distinct combination of these options. For a chain of sites, the states are a prefix tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bitfront.engine.evaluation.tree.activations import Ints
from bitfront.engine.evaluation.tree.program import PRODUCTS, Program, Step
from bitfront.spaces.base import Codes


@dataclass(eq=False)
class States:
    """The distinct states of one step over a batch. All arrays are int64 indices.

    Attributes:
        of: the state of each candidate, shape (candidates,).
        count: number of states.
        monotone: whether `of` never decreases; then a range of candidates needs a range of states.
        parents: the state of each input, per state, shape (states, inputs).
        data, parameters: the data option and the parameter option of each state, shape (states,); empty for a step
            without options.
        rounded: for steps that are products, the rounded input of each state, shape (states,); empty for others.
        rounded_parent, rounded_data: the state and the data option of each rounded input, shape (rounded inputs,).
    """

    of: Ints
    count: int
    monotone: bool
    parents: Ints
    data: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    parameters: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    rounded: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    rounded_parent: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    rounded_data: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def needed(self, start: int, stop: int) -> Ints:
        """The states of candidates `start` to `stop` − 1, ascending, each once."""
        if self.monotone:
            return np.arange(self.of[start], self.of[stop - 1] + 1)
        return np.unique(self.of[start:stop])


class Schedule:
    """The states of every step that a batch of candidates needs, with the candidates sorted so that neighbours share
    as many states as possible.

    Args:
        program: the steps.
        options: the option of each candidate at each group, int64, shape (candidates, groups).

    Attributes:
        order: the sorted order, as indices of the candidates, shape (candidates,).
        states: per step its states, for the candidates in this order.
    """

    def __init__(self, program: Program, options: Codes) -> None:
        self.order, self._output = sorted_order(options), program.output
        options = options[self.order]
        self.states: list[States] = []
        for step in program.steps:
            self.states.append(self._states(program, step, options))

    def __len__(self) -> int:
        return len(self.order)

    @property
    def final_states(self) -> Ints:
        """The state of the model's output of each candidate, in the order in which candidates were given."""
        at = np.empty(len(self), dtype=np.int64)
        at[self.order] = self.states[self._output].of
        return at

    def _states(self, program: Program, step: Step, options: Codes) -> States:
        inputs = [self.states[i] for i in step.inputs]
        if step.group is None:
            return _combined([s.of for s in inputs], len(options))
        site_options = program.options[step.group]
        data, parameters = site_options.data[options[:, step.group]], site_options.parameters[options[:, step.group]]
        program.prepare(step, data, parameters)
        if step.kind not in PRODUCTS:
            states = _combined([*(s.of for s in inputs), data, parameters], len(options))
            *_, states.data, states.parameters = states.parents.T
            states.parents = states.parents[:, :-2]
            return states
        rounded = _combined([inputs[0].of, data], len(options))
        states = _combined([rounded.of, parameters], len(options))
        states.rounded, states.parameters = states.parents.T
        states.rounded_parent, states.rounded_data = rounded.parents.T
        states.data = states.rounded_data[states.rounded]
        # The other inputs of a product are parameters, which have one state.
        states.parents = np.zeros((states.count, len(inputs)), dtype=np.int64)
        states.parents[:, 0] = states.rounded_parent[states.rounded]
        return states


def sorted_order(options: Codes) -> Ints:
    """The order of some candidates in which neighbours share as many states as possible, as their indices."""
    varying = np.flatnonzero((options != options[:1]).any(axis=0))
    return np.lexsort(options[:, varying[::-1]].T) if len(varying) else np.arange(len(options))


def _combined(columns: Sequence[Ints], count: int) -> States:
    """The distinct rows of `columns` as states, numbered in lexicographic order."""
    columns = [np.asarray(c) for c in columns]
    moving = [c for c in columns if len(c) and (c[0] != c).any()]
    if not moving:
        only = np.array([[c[0] for c in columns]], dtype=np.int64).reshape(1, len(columns))
        return States(np.zeros(count, dtype=np.int64), 1, True, only)
    key = np.zeros(count, dtype=np.int64)
    for column in moving:
        # Large keys are renumbered before the next column, so that they cannot overflow.
        key = key * (int(column.max()) + 1) + column
        if column is not moving[-1] and int(key.max()) > 2**31:
            key = np.unique(key, return_inverse=True)[1]
    of: Ints
    first: Ints
    changes = np.diff(key)
    if (changes >= 0).all():
        flags = np.concatenate([[True], changes > 0])
        of, first = np.cumsum(flags) - 1, np.flatnonzero(flags)
        monotone = True
    else:
        _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        of = inverse.astype(np.int64)
        monotone = bool((np.diff(of) >= 0).all())
    return States(of, len(first), monotone, np.stack([c[first] for c in columns], axis=1))
