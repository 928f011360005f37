"""Which states of each node a batch of candidates needs.

The value of a node depends on the options of the sites before it and on nothing else. So over a batch each node has as
many distinct *states* as there are distinct combinations of those options: for a chain that is a prefix tree, for any
other graph whatever its shape makes of it.
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
    """The distinct states of one step over a batch.

    Attributes:
        of: which state each candidate is in, shape (candidates,).
        count: how many there are.
        monotone: whether `of` never falls: then a range of candidates needs a range of states.
        parents: per state the state of each input, shape (states, inputs).
        data: per state which data option, parameters: which parameter option; empty where there is none.
        rounded: linear and conv steps: per state which rounded input; `rounded_parent` and `rounded_data` describe
            those, shape (rounded inputs,).
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
        """The states of candidates start to stop − 1, in order, each once."""
        if self.monotone:
            return np.arange(self.of[start], self.of[stop - 1] + 1)
        return np.unique(self.of[start:stop])


class Schedule:
    """What a batch of candidates, sorted so that neighbours share as much as possible, needs at every step."""

    def __init__(self, program: Program, options: Codes) -> None:
        varying = np.flatnonzero((options != options[:1]).any(axis=0))
        self.order = np.lexsort(options[:, varying[::-1]].T) if len(varying) else np.arange(len(options))
        options = options[self.order]
        self.states: list[States] = []
        for step in program.steps:
            self.states.append(self._states(program, step, options))

    def __len__(self) -> int:
        return len(self.order)

    def _states(self, program: Program, step: Step, options: Codes) -> States:
        inputs = [self.states[i] for i in step.inputs]
        if step.group is None:
            return _combined([s.of for s in inputs], len(options))
        site_options = program.options[step.group]
        program.prepare(step, site_options.data[options[:, step.group]])
        data, parameters = site_options.data[options[:, step.group]], site_options.parameters[options[:, step.group]]
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
        # The other inputs are parameters, which have one state.
        states.parents = np.zeros((states.count, len(inputs)), dtype=np.int64)
        states.parents[:, 0] = states.rounded_parent[states.rounded]
        return states


def _combined(columns: Sequence[Ints], count: int) -> States:
    """Distinct rows of `columns`, numbered in lexicographic order."""
    columns = [np.asarray(c) for c in columns]
    moving = [c for c in columns if len(c) and (c[0] != c).any()]
    if not moving:
        only = np.array([[c[0] for c in columns]], dtype=np.int64).reshape(1, len(columns))
        return States(np.zeros(count, dtype=np.int64), 1, True, only)
    key = np.zeros(count, dtype=np.int64)
    for column in moving:
        # Numbered afresh after every column, so that the key cannot overflow.
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
