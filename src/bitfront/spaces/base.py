"""The arithmetic of a search space: codes, their order, their neighbours. It knows nothing of models.

A space is a product of *groups* (a group is what is chosen at one site). A group offers *branches*, of which one is
taken (a number format, or none); a branch is a product of *choices* (one per operand). A code is a row of small
integers with one column, or *parameter*, for every place where there is more than one thing to choose: which branch,
and within each branch which choice. The columns of branches not taken have no effect and are 0 in a canonical code,
so that every candidate has exactly one code and ``size`` counts distinct candidates.

Within a group, options are numbered 0, 1, ... (branches in order, the last choice running fastest); candidates are
numbered by their options, the last group running fastest. Consecutive candidates therefore agree on as many leading
groups as possible.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int64]


@dataclass(frozen=True)
class Choice:
    """One thing to choose from a list: `labels` says what each entry is; `steps` whether neighbours are alike."""

    name: str
    labels: tuple[str, ...]
    steps: bool = True


@dataclass(frozen=True)
class Branch:
    """One alternative of a group: a product of choices. Without choices it is a single option."""

    label: str
    choices: tuple[Choice, ...] = ()

    @property
    def size(self) -> int:
        """Number of options."""
        return math.prod(len(c.labels) for c in self.choices)


@dataclass(frozen=True)
class Group:
    """What is chosen at one site."""

    name: str
    branches: tuple[Branch, ...]

    @property
    def size(self) -> int:
        """Number of options."""
        return sum(b.size for b in self.branches)

    def picks(self, option: int) -> tuple[int, tuple[int, ...]]:
        """(branch, index within each of its choices) of an option."""
        for index, branch in enumerate(self.branches):
            if option < branch.size:
                radices = [len(c.labels) for c in branch.choices]
                return index, tuple(int(i) for i in np.unravel_index(option, radices)) if radices else ()
            option -= branch.size
        raise IndexError(f"group {self.name} has {self.size} options")


@dataclass(frozen=True)
class Parameter:
    """One column of a code.

    Attributes:
        name: e.g. ``seq_blocks_2/weight``, or ``seq_blocks_2/name`` for the choice of a branch.
        labels: what each value means.
        steps: whether neighbouring values are alike (widths), so that a step of ±1 is a small change.
        group: index of its group.
        branch: index of the branch under which it has an effect; None if it always has.
    """

    name: str
    labels: tuple[str, ...]
    steps: bool
    group: int
    branch: int | None


class Space:
    """A product of groups, with its codes. Immutable.

    Args:
        groups: in the order of the model's execution.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)
        columns: list[Parameter] = []
        #: Per group: the column that picks the branch, or None.
        self._selector: list[int | None] = []
        #: Per group and branch: for each choice its column, or None where there is nothing to choose.
        self._columns: list[list[list[int | None]]] = []
        for g, group in enumerate(self.groups):
            several = len(group.branches) > 1
            self._selector.append(len(columns) if several else None)
            if several:
                labels = tuple(b.label for b in group.branches)
                columns.append(Parameter(f"{group.name}/name", labels, False, g, None))
            per_branch: list[list[int | None]] = []
            wordy = sum(1 for b in group.branches if b.choices) > 1
            for b, branch in enumerate(group.branches):
                own: list[int | None] = []
                for choice in branch.choices:
                    own.append(len(columns) if len(choice.labels) > 1 else None)
                    if len(choice.labels) > 1:
                        name = f"{group.name}/{branch.label}/{choice.name}" if wordy else f"{group.name}/{choice.name}"
                        columns.append(Parameter(name, choice.labels, choice.steps, g, b if several else None))
                per_branch.append(own)
            self._columns.append(per_branch)
        self.parameters = tuple(columns)
        self.cardinalities = np.array([len(p.labels) for p in columns], dtype=np.int64)
        self.cardinalities.setflags(write=False)

    @cached_property
    def size(self) -> int:
        """Number of distinct candidates, exactly."""
        return math.prod(g.size for g in self.groups)

    def options(self, codes: Codes) -> Codes:
        """Which option each candidate takes at each group, shape (candidates, groups)."""
        # One group after the other lies together in memory: a column is read and written many times more often than
        # a row.
        out = np.empty((len(codes), len(self.groups)), dtype=np.int64, order="F")
        for g, group in enumerate(self.groups):
            selector = self._selector[g]
            offset = 0
            for b, branch in enumerate(group.branches):
                index: Codes = np.full(len(codes), offset, dtype=np.int64)
                stride = branch.size
                for choice, column in zip(branch.choices, self._columns[g][b], strict=True):
                    stride //= len(choice.labels)
                    if column is not None:
                        index += codes[:, column] if stride == 1 else codes[:, column] * stride
                if selector is None or b == 0:
                    out[:, g] = index
                else:
                    np.copyto(out[:, g], index, where=codes[:, selector] == b)
                offset += branch.size
        return out

    def codes(self, options: Codes) -> Codes:
        """The canonical codes of candidates given by their options, shape (candidates, parameters)."""
        out = np.zeros((len(options), len(self.parameters)), dtype=np.int64)
        for g, group in enumerate(self.groups):
            selector = self._selector[g]
            offset = 0
            for b, branch in enumerate(group.branches):
                rest = options[:, g] - offset
                here = None if selector is None else (rest >= 0) & (rest < branch.size)
                if here is not None and b:
                    out[:, selector] += here * b
                for choice, column in reversed(list(zip(branch.choices, self._columns[g][b], strict=True))):
                    if column is not None:
                        rest, pick = _divided(rest, len(choice.labels))
                        out[:, column] = pick if here is None else pick * here
                offset += branch.size
        return out

    @cached_property
    def _words(self) -> tuple[tuple[range, int], ...]:
        """The groups, cut into stretches whose options can be numbered in 62 bits: (groups, how many numbers)."""
        words: list[tuple[range, int]] = []
        start, count = 0, 1
        for g, group in enumerate(self.groups):
            if count * group.size >= 2**62:
                words.append((range(start, g), count))
                start, count = g, 1
            count *= group.size
        return (*words, (range(start, len(self.groups)), count))

    def keys(self, codes: Codes) -> Codes:
        """What tells candidates apart, compactly: their numbers in the fixed order, shape (candidates, words).

        One word of 64 bits is enough for spaces of up to 2⁶² candidates; of larger ones each word numbers a stretch of
        the groups, the last one running fastest.
        """
        options = self.options(codes)
        out = np.zeros((len(codes), len(self._words)), dtype=np.int64)
        for w, (groups, _) in enumerate(self._words):
            number = np.zeros(len(codes), dtype=np.int64)
            for g in groups:
                number *= self.groups[g].size
                number += options[:, g]
            out[:, w] = number
        return out

    def canonical(self, codes: Codes) -> Codes:
        """`codes` with everything that has no effect set to 0."""
        return self.codes(self.options(codes))

    def check(self, codes: Codes) -> None:
        """Raises ValueError unless `codes` has this space's shape and values."""
        if codes.ndim != 2 or codes.shape[1] != len(self.parameters):
            raise ValueError(f"codes have shape {codes.shape}; this space needs (n, {len(self.parameters)})")
        if len(codes) and ((codes < 0).any() or (codes >= self.cardinalities).any()):
            row, column = (int(i[0]) for i in np.nonzero((codes < 0) | (codes >= self.cardinalities)))
            raise ValueError(
                f"code {codes[row].tolist()}: {self.parameters[column].name} must be from 0 to "
                f"{self.cardinalities[column] - 1}"
            )

    def numbered(self, start: int, stop: int) -> Codes:
        """Candidates number `start` to `stop` − 1 in the fixed order; any prefix of it is a valid search."""
        stop = min(stop, self.size)
        count = max(0, stop - start)
        options = np.empty((count, len(self.groups)), dtype=np.int64, order="F")
        #: What is added to the word at hand: the place in the stretch, then what is carried over.
        more = np.arange(count, dtype=np.int64)
        for groups, size in reversed(self._words):
            more, rest = _divided(start % size + more, size)
            start //= size
            for g in reversed(groups):
                rest, options[:, g] = _divided(rest, self.groups[g].size)
        return self.codes(options)

    def sample(self, n: int, rng: np.random.Generator) -> Codes:
        """`n` candidates, each distinct candidate equally likely, drawn with replacement."""
        options = np.stack([rng.integers(0, g.size, n) for g in self.groups], axis=1) if self.groups else None
        return self.codes(options if options is not None else np.zeros((n, 0), dtype=np.int64))

    def neighbours(self, code: Codes) -> Codes:
        """All candidates that differ from one code in one parameter, ±1 steps first; each once."""
        near: list[Codes] = []
        far: list[Codes] = []
        for column, count in enumerate(self.cardinalities):
            for value in range(int(count)):
                distance = abs(value - int(code[column]))
                if distance:
                    changed = code.copy()
                    changed[column] = value
                    step = distance == 1 or not self.parameters[column].steps
                    (near if step else far).append(changed)
        if not near and not far:
            return np.zeros((0, len(code)), dtype=np.int64)
        canonical = self.canonical(np.array(near + far, dtype=np.int64))
        first = {row.tobytes(): i for i, row in reversed(list(enumerate(canonical)))}
        first.pop(code.tobytes(), None)
        return canonical[sorted(first.values())]

    def unseen(self, known: Sequence[bytes] | set[bytes] | dict[bytes, int]) -> Iterator[NDArray[np.int64]]:
        """Candidates, in the fixed order, whose code is not among `known` (the bytes of canonical codes)."""
        for start in range(0, self.size, 4096):
            for row in self.numbered(start, start + 4096):
                if row.tobytes() not in known:
                    yield row


def _divided(numbers: Codes, by: int) -> tuple[Codes, Codes]:
    """(quotient, remainder), both rounded down; NumPy divides by one number quickly, and takes remainders slowly."""
    quotient = numbers // by
    return quotient, numbers - quotient * by
