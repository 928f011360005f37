"""Numbers of bits as both trainers have them: learned ones, and the supported ones that take their place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bitfront.kernels import bits as compiled

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]


def magnitudes(widths: Sequence[int], signed: bool, removable: bool) -> int:
    """Supported widths without their signs, as a set of bits: bit k is set if k is one. 0 for no widths: any.

    Args:
        removable: adds 0.
    """
    if not widths:
        return 0
    lengths = {max(0, width - signed) for width in widths} | ({0} if removable else set())
    return sum(1 << length for length in lengths)


def whole(bits: Floats) -> Indices:
    """Learned numbers of bits as whole numbers."""
    return clipped(np.rint(bits).astype(np.int64))


def clipped(bits: Indices) -> Indices:
    """Numbers of bits within what the compiled steps can do."""
    within: Indices = np.clip(bits, -compiled.MOST_BITS, compiled.MOST_BITS)
    return within


def supported(lengths: Indices, widths: int) -> Indices:
    """The supported width at or above each length, else the largest; `widths` as of ``magnitudes``."""
    if not widths:
        return lengths
    each = np.array([k for k in range(widths.bit_length()) if widths >> k & 1])
    return each[np.minimum(np.searchsorted(each, lengths), len(each) - 1)]


def in_widths(
    values: Floats, fractions: Indices, groups: Indices | None, widths: int
) -> tuple[NDArray[np.floating], Indices, Indices]:
    """(whole numbers of some values; per group its fractional bits, its width), as the compiled steps have them.

    Args:
        fractions: learned fractional bits of each group.
        groups: of each value; None: each has bits of its own.
        widths: the supported ones, as of ``magnitudes``.
    """
    groups = np.arange(len(values)) if groups is None else groups
    codes = np.rint(np.ldexp(values, fractions[groups]))
    least = -2 * compiled.MOST_BITS if widths else 0
    each = _lengths(codes)
    if widths:
        # A value below its grid: more fractional bits bring it back.
        below = np.where(values == 0, least, np.clip(fractions[groups] + _lengths(values), least, 0))
        each = np.where(codes == 0, below, each)
    lengths = np.full(len(fractions), least, dtype=np.int64)
    np.maximum.at(lengths, groups, each)
    if not widths:
        return codes, fractions, lengths
    chosen = supported(lengths, widths)
    fractions = clipped(fractions + chosen - lengths)
    high = (2.0**chosen - 1)[groups]
    codes = np.clip(np.rint(np.ldexp(values, fractions[groups])), -high, high)
    return codes, fractions, chosen


def _lengths(codes: NDArray[np.floating]) -> Indices:
    """Bits of the magnitudes of numbers before the binary point; below 1 negative ones, of 0 none."""
    lengths: Indices = np.frexp(np.abs(codes))[1].astype(np.int64)
    return lengths
