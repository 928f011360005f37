"""Linear systems without BLAS, whose last bits depend on the number of threads.

A search that is resumed with another number of threads must propose the same candidates. NumPy's einsum adds in one
fixed order, so what a search uses is built from it. Reports may differ in the last bit, and have a quicker one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

#: (symmetric positive definite matrix, right) → (``matrix⁻¹ · right``, logarithm of the determinant of the matrix).
Solver = Callable[[Floats, Floats], tuple[Floats, float]]
#: Columns that are eliminated before all others are updated.
PANEL = 16


def solve(matrix: Floats, right: Floats) -> Floats:
    """``matrix⁻¹ · right`` for a symmetric positive definite matrix, by Gaussian elimination.

    Args:
        matrix: shape (rows, rows).
        right: shape (rows, columns).

    Returns:
        Shape (rows, columns).
    """
    return solve_with_determinant(matrix, right)[0]


def solve_with_determinant(matrix: Floats, right: Floats) -> tuple[Floats, float]:
    """``matrix⁻¹ · right`` and the logarithm of the determinant of `matrix`, which is symmetric positive definite.

    It works in panels of `PANEL` columns, so that the columns to the right of a panel are updated once per panel.

    Args:
        matrix: shape (rows, rows).
        right: shape (rows, columns).

    Returns:
        The solution, shape (rows, columns); the logarithm, NaN where a pivot is not positive.
    """
    size = len(matrix)
    a = np.concatenate([matrix, right], axis=1)
    inverted = right.shape == matrix.shape and np.array_equal(right, np.eye(size))
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        # Of an identity, the columns behind are still zero in the rows of this panel, so nothing would be subtracted.
        end = size + stop if inverted else a.shape[1]
        factors = np.zeros((size - start, stop - start))
        for i in range(start, stop):
            factor = a[i + 1 :, i] / a[i, i]
            factors[i + 1 - start :, i - start] = factor
            a[i + 1 :, i:stop] -= factor[:, None] * a[i, i:stop]
            a[i + 1 : stop, stop:end] -= factor[: stop - i - 1, None] * a[i, stop:end]
        a[stop:, stop:end] -= np.einsum("ik,kj->ij", factors[stop - start :], a[start:stop, stop:end])
    pivots = np.diagonal(a)
    logarithm = float(np.log(pivots).sum()) if (pivots > 0).all() else float("nan")
    # Contiguous, and with the products in one place: this loop is bound by memory.
    solution, columns = np.ascontiguousarray(a[:, size:]), np.ascontiguousarray(a[:, :size].T)
    products = np.empty_like(solution)
    for i in range(size - 1, -1, -1):
        solution[i] /= pivots[i]
        np.multiply(columns[i, :i, None], solution[i], out=products[:i])
        solution[:i] -= products[:i]
    return solution, logarithm


def quick_solve_with_determinant(matrix: Floats, right: Floats) -> tuple[Floats, float]:
    """``solve_with_determinant`` for reports alone: its last bits depend on BLAS."""
    sign, logarithm = np.linalg.slogdet(matrix)
    solution: Floats = np.asarray(np.linalg.solve(matrix, right), dtype=np.float64)
    return solution, float(logarithm) if sign > 0 else float("nan")
