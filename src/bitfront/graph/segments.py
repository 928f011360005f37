"""Dimensions as sequences of channel groups: the arithmetic behind ``bitfront.graph.channels``.

A dimension of a tensor is a tuple of pieces ``(variable, repeat)``. A variable stands for a number of channels that may
change; a piece holds ``repeat`` elements of each of them, the channels one after the other. A map of shape (C, H, W)
flattened is one piece with repeat H·W; a concatenation is one piece per part.

Variables are unknowns that get solved as the model is walked through. ``unify`` says that two dimensions have the same
elements: variables of equal width become one (union-find), and a variable that faces several pieces is bound to that
sequence, cut where the others are cut. What no sequence can express is fixed: it keeps its width, for a reason.
"""

from __future__ import annotations

from bitfront.operations.layout import Dim, Piece


class Variables:
    """The unknowns: their widths, what they are bound to, and why some of them are fixed."""

    def __init__(self) -> None:
        self._width: list[int] = []
        self._bound: list[Dim | None] = []
        self._fixed: list[str] = []

    def new(self, size: int, fixed: str = "") -> Dim:
        """A dimension of `size` elements that is one new variable; with a reason, it never changes."""
        if size == 0:
            return ()
        self._width.append(size)
        self._bound.append(None)
        self._fixed.append(fixed)
        return ((len(self._width) - 1, 1),)

    def width(self, variable: int) -> int:
        """How many channels that is."""
        return self._width[variable]

    def reason(self, variable: int) -> str:
        """Why an unbound variable is fixed; empty if it is free."""
        return self._fixed[variable]

    def size(self, dim: Dim) -> int:
        """The number of elements."""
        return sum(self._width[v] * r for v, r in dim)

    def resolve(self, dim: Dim) -> Dim:
        """The same dimension in terms of unbound variables."""
        pieces: list[Piece] = []
        for variable, repeat in dim:
            bound = self._bound[variable]
            if bound is None:
                pieces.append((variable, repeat))
            else:
                pieces.extend((v, r * repeat) for v, r in self.resolve(bound))
        return tuple(pieces)

    def is_fixed(self, dim: Dim) -> bool:
        """Whether no part of it may change."""
        return all(self._fixed[v] for v, _ in self.resolve(dim))

    def same(self, a: Dim, b: Dim) -> bool:
        """Whether both are known to have the same elements, however their widths change."""
        return self.resolve(a) == self.resolve(b)

    def fix(self, dim: Dim, reason: str) -> None:
        """From now on `dim` keeps its size. The first reason given for a variable is the one that is kept."""
        for variable, _ in self.resolve(dim):
            self._fixed[variable] = self._fixed[variable] or reason

    def unify(self, a: Dim, b: Dim, where: str) -> None:
        """Both have the same elements, in the same order.

        Where no sequence of variables can express that (3 channels of 2 elements beside 2 of 3), or where the sizes
        differ, both are fixed; `where` is named in the reason.
        """
        if self.size(a) != self.size(b):
            self._give_up(a, b, where)
            return
        left, right = list(self.resolve(a)), list(self.resolve(b))
        while left and right:
            one, other = left[0], right[0]
            if one == other:
                left, right = left[1:], right[1:]
                continue
            short, long = sorted((one, other), key=lambda piece: self.size((piece,)))
            size = self.size((short,))
            equal = size == self.size((long,))
            if not (self._matches(short, long) if equal else self._cut(long, size)):
                self._give_up(a, b, where)
                return
            left, right = list(self.resolve(tuple(left))), list(self.resolve(tuple(right)))

    def _give_up(self, a: Dim, b: Dim, where: str) -> None:
        for dim in (a, b):
            self.fix(dim, f"its channels do not line up with what they meet at {where}")

    def _matches(self, one: Piece, other: Piece) -> bool:
        """Bind one of two pieces of equal size to the other, if one's repeat divides the other's."""
        coarse, fine = sorted((one, other), key=lambda piece: (-piece[1], piece[0]))
        if coarse[1] % fine[1]:
            return False
        self._bind(fine[0], ((coarse[0], coarse[1] // fine[1]),))
        return True

    def _cut(self, piece: Piece, at: int) -> bool:
        """Cut a piece after `at` elements, if that is between two channels."""
        variable, repeat = piece
        if at % repeat:
            return False
        first = at // repeat
        self._bind(variable, self.new(first) + self.new(self._width[variable] - first))
        return True

    def _bind(self, variable: int, dim: Dim) -> None:
        self._bound[variable] = dim
        if self._fixed[variable]:
            self.fix(dim, self._fixed[variable])
