"""Dimensions as sequences of channel groups: the arithmetic behind ``bitfront.graph.channels``.

A dimension of a tensor is a tuple of pieces ``(variable, repeat)``. A variable stands for a number of channels that may
change. A piece holds ``repeat`` elements of each of these channels, one channel after the other. A map of shape
(C, H, W), flattened, is one piece with repeat H·W; a concatenation is one piece per part.

Variables are unknowns that are solved while the graph is followed from node to node. ``unify`` says that two dimensions
have the same elements. Variables of equal width then become one (union-find). A variable that corresponds to several
pieces is bound to that sequence, and cut where the pieces are cut. A dimension that no sequence can express is fixed:
it keeps its width, and a reason is kept with it.
"""

from __future__ import annotations

from bitfront.operations.layout import Dim, Piece


class Variables:
    """The unknowns: their widths, the sequences they are bound to, and the reasons why some are fixed."""

    def __init__(self) -> None:
        self._width: list[int] = []
        self._bound: list[Dim | None] = []
        self._fixed: list[str] = []

    def new(self, size: int, fixed: str = "") -> Dim:
        """A dimension of `size` elements that is one new variable; `fixed` is the reason why it may not change."""
        if size == 0:
            return ()
        self._width.append(size)
        self._bound.append(None)
        self._fixed.append(fixed)
        return ((len(self._width) - 1, 1),)

    def width(self, variable: int) -> int:
        """The number of channels of a variable."""
        return self._width[variable]

    def reason(self, variable: int) -> str:
        """Why an unbound variable is fixed; empty if it is free."""
        return self._fixed[variable]

    def size(self, dim: Dim) -> int:
        """The number of elements of a dimension."""
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
        """Whether no part of a dimension may change."""
        return all(self._fixed[v] for v, _ in self.resolve(dim))

    def same(self, a: Dim, b: Dim) -> bool:
        """Whether two dimensions always have the same elements, for any widths."""
        return self.resolve(a) == self.resolve(b)

    def fix(self, dim: Dim, reason: str) -> None:
        """Fix the size of `dim`. A variable that is fixed already keeps its first reason."""
        for variable, _ in self.resolve(dim):
            self._fixed[variable] = self._fixed[variable] or reason

    def unify(self, a: Dim, b: Dim, where: str) -> None:
        """State that `a` and `b` have the same elements, in the same order.

        Both are fixed where their sizes differ, or where no sequence of variables can express it (3 channels of 2
        elements and 2 channels of 3).

        Args:
            a: one dimension.
            b: the other.
            where: the node that needs it; named in the reason of a fixed dimension.
        """
        if self.size(a) != self.size(b):
            self._fix_both(a, b, where)
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
                self._fix_both(a, b, where)
                return
            left, right = list(self.resolve(tuple(left))), list(self.resolve(tuple(right)))

    def _fix_both(self, a: Dim, b: Dim, where: str) -> None:
        for dim in (a, b):
            self.fix(dim, f"its channels do not line up with what they meet at {where}")

    def _matches(self, one: Piece, other: Piece) -> bool:
        """Bind one of two pieces of equal size to the other; false if neither repeat divides the other."""
        coarse, fine = sorted((one, other), key=lambda piece: (-piece[1], piece[0]))
        if coarse[1] % fine[1]:
            return False
        self._bind(fine[0], ((coarse[0], coarse[1] // fine[1]),))
        return True

    def _cut(self, piece: Piece, at: int) -> bool:
        """Cut a piece after `at` elements; false if that is not between two channels."""
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
