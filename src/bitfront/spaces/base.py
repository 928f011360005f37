"""The arithmetic of a search space: codes, their order, their neighbours. This module knows nothing about models.

A space is a product of *groups*, one per site. A group has *branches*, of which a candidate takes one (a number format,
or none). A branch is a product of *choices*, one per operand. A code is a row of small integers. It has one column, or
*parameter*, for each group with several branches (which branch) and for each choice with several entries (which entry).
Columns of branches that are not taken have no effect. They are 0 in a canonical code, so that every candidate has
exactly one code and ``size`` counts distinct candidates.

An *option* of a group is a branch with an entry for each of its choices. Options are numbered 0, 1, ...: branches in
order, the last choice changing fastest. Candidates are numbered by their options, the last group changing fastest.
Therefore consecutive candidates have the same options at as many leading groups as possible.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int64]
#: Numbers of candidates from here on are not written in full.
LONG = 10**15


@dataclass(frozen=True)
class Choice:
    """A choice among some entries.

    Attributes:
        name: e.g. the operand.
        labels: one per entry, for people.
        steps: whether the entries are ordered, so that neighbouring ones are similar (widths).
    """

    name: str
    labels: tuple[str, ...]
    steps: bool = True


@dataclass(frozen=True)
class Branch:
    """One alternative of a group: a product of choices. A branch without choices is a single option."""

    label: str
    choices: tuple[Choice, ...] = ()

    @property
    def size(self) -> int:
        """Number of options."""
        return math.prod(len(c.labels) for c in self.choices)


@dataclass(frozen=True)
class Group:
    """The alternatives at one site: one or more branches."""

    name: str
    branches: tuple[Branch, ...]

    @property
    def size(self) -> int:
        """Number of options."""
        return sum(b.size for b in self.branches)

    def picks(self, option: int) -> tuple[int, tuple[int, ...]]:
        """The branch of an option and, for each of its choices, the entry: (branch, entries).

        Raises:
            IndexError: the group has no such option.
        """
        for index, branch in enumerate(self.branches):
            if option < branch.size:
                radices = [len(c.labels) for c in branch.choices]
                return index, tuple(int(i) for i in np.unravel_index(option, radices)) if radices else ()
            option -= branch.size
        raise IndexError(f"group {self.name} has {self.size} options, numbered from 0")


@dataclass(frozen=True)
class Parameter:
    """One column of a code.

    Attributes:
        name: e.g. ``seq_blocks_2/weight``; ``seq_blocks_2/name`` for the choice of a branch.
        labels: the meaning of each value, for people.
        steps: whether neighbouring values are similar (widths), so that ±1 is a small change.
        group: index of its group.
        branch: index of the branch that must be taken for it to have an effect; None if it always has one.
    """

    name: str
    labels: tuple[str, ...]
    steps: bool
    group: int
    branch: int | None


class Space:
    """A product of groups, with its codes. Immutable.

    Strategies, the loop and the store see a space as this alone, from several threads and for a million codes at a
    time: every method is a pure function of its arguments, and none of them changes an array that it is given. A kind
    of space does not override them; it says its groups, or its description (``spaces.model_space``).

    Args:
        groups: in the order in which the model executes their sites.

    Attributes:
        groups: as given.
        parameters: the columns of a code.
        cardinalities: number of values of each parameter, 2 or more, int64, shape (parameters,).
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)
        columns: list[Parameter] = []
        #: Per group: the column that selects the branch; None if there is one branch.
        self._selector: list[int | None] = []
        #: Per group and branch: the column of each choice; None if the choice has one entry.
        self._columns: list[list[list[int | None]]] = []
        for g, group in enumerate(self.groups):
            several = len(group.branches) > 1
            self._selector.append(len(columns) if several else None)
            if several:
                labels = tuple(b.label for b in group.branches)
                columns.append(Parameter(f"{group.name}/name", labels, False, g, None))
            per_branch: list[list[int | None]] = []
            named_by_branch = sum(1 for b in group.branches if b.choices) > 1
            for b, branch in enumerate(group.branches):
                per_choice: list[int | None] = []
                for choice in branch.choices:
                    per_choice.append(len(columns) if len(choice.labels) > 1 else None)
                    if len(choice.labels) > 1:
                        prefix = f"{group.name}/{branch.label}" if named_by_branch else group.name
                        condition = b if several else None
                        columns.append(Parameter(f"{prefix}/{choice.name}", choice.labels, choice.steps, g, condition))
                per_branch.append(per_choice)
            self._columns.append(per_branch)
        self.parameters = tuple(columns)
        self.cardinalities = np.array([len(p.labels) for p in columns], dtype=np.int64)
        self.cardinalities.setflags(write=False)

    @cached_property
    def size(self) -> int:
        """Number of distinct candidates, as an exact integer."""
        return math.prod(g.size for g in self.groups)

    def options(self, codes: Codes) -> Codes:
        """The option of each candidate at each group, int64, shape (candidates, groups).

        Args:
            codes: shape (candidates, parameters).
        """
        # In column order, since columns are read and written much more often than rows.
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
        """The canonical codes of candidates, int64, shape (candidates, parameters).

        Args:
            options: the option of each candidate at each group, shape (candidates, groups).
        """
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
        """The groups, divided into ranges whose options can be numbered in 62 bits: (groups, count of numbers)."""
        words: list[tuple[range, int]] = []
        start, count = 0, 1
        for g, group in enumerate(self.groups):
            if count * group.size >= 2**62:
                words.append((range(start, g), count))
                start, count = g, 1
            count *= group.size
        return (*words, (range(start, len(self.groups)), count))

    def keys(self, codes: Codes) -> Codes:
        """Keys that identify candidates: their numbers in the fixed order, int64, shape (candidates, words).

        Spaces of up to 2⁶² candidates need one word of 64 bits. In larger spaces each word numbers the options of a
        range of groups, the last word changing fastest.

        Args:
            codes: shape (candidates, parameters).
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
        """`codes` with every parameter that has no effect set to 0, int64, of the same shape."""
        return self.codes(self.options(codes))

    def check(self, codes: Codes) -> None:
        """Check the shape and the values of `codes`.

        Raises:
            ValueError: the shape is not (candidates, parameters), or a value is not one of its parameter.
        """
        if codes.ndim != 2 or codes.shape[1] != len(self.parameters):
            raise ValueError(f"codes have shape {codes.shape}; this space needs (n, {len(self.parameters)})")
        if len(codes) and ((codes < 0).any() or (codes >= self.cardinalities).any()):
            row, column = (int(i[0]) for i in np.nonzero((codes < 0) | (codes >= self.cardinalities)))
            raise ValueError(
                f"code {codes[row].tolist()}: {self.parameters[column].name} must be from 0 to "
                f"{self.cardinalities[column] - 1}"
            )

    def numbered(self, start: int, stop: int) -> Codes:
        """The codes of candidates `start` to `stop` − 1 in the fixed order, int64, shape (candidates, parameters).

        Numbers from `size` on are left out.
        """
        stop = min(stop, self.size)
        count = max(0, stop - start)
        options = np.empty((count, len(self.groups)), dtype=np.int64, order="F")
        #: What is added to the current word: the offset from `start`, then the carry from the word after it.
        more = np.arange(count, dtype=np.int64)
        for groups, size in reversed(self._words):
            more, rest = _divided(start % size + more, size)
            start //= size
            for g in reversed(groups):
                rest, options[:, g] = _divided(rest, self.groups[g].size)
        return self.codes(options)

    def sample(self, n: int, rng: np.random.Generator) -> Codes:
        """`n` random candidates, drawn uniformly over distinct candidates, with replacement; shape (n, parameters)."""
        options = np.stack([rng.integers(0, g.size, n) for g in self.groups], axis=1) if self.groups else None
        return self.codes(options if options is not None else np.zeros((n, 0), dtype=np.int64))

    def neighbours(self, code: Codes) -> Codes:
        """The candidates that differ from one in a single parameter: first those with a step of ±1; each once.

        Args:
            code: a canonical code, shape (parameters,).

        Returns:
            Canonical codes, int64, shape (neighbours, parameters).
        """
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
        """The codes, in the fixed order, that are not among `known`.

        Args:
            known: canonical codes, as bytes (``code.tobytes()``).

        Yields:
            int64, shape (parameters,).
        """
        for start in range(0, self.size, 4096):
            for row in self.numbered(start, start + 4096):
                if row.tobytes() not in known:
                    yield row


def counted(size: int) -> str:
    """How many candidates a space has, for messages: in full below 10^15, else as ``about 1.05e45``."""
    if size < LONG:
        return f"{size:,}"
    exponent = int(math.log10(size))  # it takes integers that no float holds
    exponent -= size < 10**exponent  # where the logarithm was rounded up
    return f"about {size // 10 ** (exponent - 3) / 1000:.3g}e{exponent}"


def _divided(numbers: Codes, by: int) -> tuple[Codes, Codes]:
    """(quotient, remainder), rounded down. In NumPy a division by a scalar is much faster than a remainder."""
    quotient = numbers // by
    return quotient, numbers - quotient * by
