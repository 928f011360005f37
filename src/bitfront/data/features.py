"""Features as finite real numbers, standardised where asked, and as float32 at the end."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bitfront.data.base import Scaler, Split
from bitfront.data.raw import Array, ArrayLike, array_name, to_numpy
from bitfront.errors import DataError

#: Splits with fewer values are not compared in size; nor is a difference of less than this factor worth a note.
_COMPARED, _APART = 64, 32.0


def real_features(value: ArrayLike, what: str) -> Array:
    """`value` as floats, shape ``(samples, *features)``: uint8 divided by 255, other integers as float64.

    Raises:
        DataError: it is empty, has another shape, or a value is not a finite number that fits into float32.
    """
    x = to_numpy(value, what)
    if x.dtype.kind not in "fiub":
        raise DataError(f"{what} has the dtype {x.dtype}; needed are real numbers, as floats or integers")
    if x.ndim < 2:
        raise DataError(
            f"{what} has the shape {x.shape}; needed is (samples, *features). For one feature: x.reshape(-1, 1)"
        )
    if 0 in x.shape:
        raise DataError(f"{what} is empty: its shape is {x.shape}; every split needs at least one sample")
    if x.dtype == np.uint8:
        return x.astype(np.float32) / np.float32(255)
    if x.dtype.kind != "f":
        return x.astype(np.float64)
    _refuse_where(~np.isfinite(x), x, what, "only finite values are allowed; drop the row or fill the value in")
    if x.dtype.itemsize > 4:
        too_large = np.abs(x) > np.finfo(np.float32).max
        _refuse_where(too_large, x, what, "it does not fit into float32; rescale the feature")
    return x


def refuse_mixed_scales(values: Mapping[Split | None, ArrayLike]) -> None:
    """Raises DataError where splits have dtypes that mean other scales: uint8, which is divided by 255, beside anything
    else; or integers beside floats that are no whole numbers, which somebody has scaled. Widths of floats may differ.

    Args:
        values: the features of each split, as they were given.
    """
    arrays = {split: to_numpy(value, array_name("x", split)) for split, value in values.items()}
    images = {split for split, x in arrays.items() if x.dtype == np.uint8}
    whole = {split for split, x in arrays.items() if x.dtype.kind in "iub"}
    if images and len(images) < len(arrays):
        why = "uint8 is divided by 255, and other dtypes are used as they are"
    elif whole and any(x.dtype.kind == "f" and not (x == np.floor(x)).all() for x in arrays.values()):
        why = "whole numbers beside fractions: one of them seems to be scaled already"
    else:
        return
    given = ", ".join(f"{array_name('x', split)} {x.dtype}" for split, x in arrays.items())
    raise DataError(
        f"the splits have different dtypes ({given}): {why}. Give every split the same dtype and the same scale, for "
        "example x.astype(np.float32) / 255 for images"
    )


def scale_notes(values: Mapping[Split | None, Array]) -> list[str]:
    """A note where the features of splits differ so much in size that one seems to be scaled, and another not.

    Args:
        values: the features of each split, as ``real_features`` gives them.
    """
    sizes = {split: _typical(x) for split, x in values.items() if x.size >= _COMPARED}
    sizes = {split: size for split, size in sizes.items() if size > 0}
    if not sizes or max(sizes.values()) <= _APART * min(sizes.values()):
        return []
    given = ", ".join(f"{array_name('x', split)} {size:.3g}" for split, size in sizes.items())
    return [
        f"the splits differ in the size of their features (median of absolute values, without zeros: {given}): is one "
        "of them scaled, and another not?"
    ]


def _typical(x: Array) -> float:
    """The median of the absolute values that are not zero, of at most about 100,000 values; 0 where all are zero."""
    rows = x[:: max(1, x.size // 100_000)] if len(x) > 1000 else x
    size = np.abs(rows[rows != 0])
    return float(np.median(size)) if size.size else 0.0


def to_float32(x: Array, scaler: Scaler | None, split: Split) -> Array:
    """A float32 copy of the features `x` of `split`, standardised where there is a `scaler`.

    Raises:
        DataError: a standardised value does not fit into float32.
    """
    if scaler is None:
        return np.array(x, dtype=np.float32, order="C")  # a copy: the caller may edit the array later
    out = apply_scaler(scaler, x)
    advice = "standardised it does not fit into float32; check the scale"
    _refuse_where(~np.isfinite(out), x, array_name("x", split), advice)
    return out


def fit_scaler(x: Array) -> Scaler:
    """Mean and standard deviation (population, float64) of each feature of `x`; scale 1 where constant."""
    flat = x.reshape(len(x), -1)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        mean = flat.mean(axis=0, dtype=np.float64)
        scale = flat.std(axis=0, dtype=np.float64)
    # The exact test: the deviation of a constant such as 0.1 comes out as a rounding error, not as zero.
    constant = (flat == flat[0]).all(axis=0)
    mean = np.where(constant, flat[0], mean)
    scale = np.where(constant | ~np.isfinite(scale) | (scale == 0), 1.0, scale)
    return Scaler(tuple(mean.tolist()), tuple(scale.tolist()))


def apply_scaler(scaler: Scaler, x: Array) -> Array:
    """``(x - mean) / scale`` as float32, with the shape of `x`.

    Computed in float64, because a mean can be far larger than the deviation.

    Raises:
        DataError: the scaler is for another number of features.
    """
    flat = x.reshape(len(x), -1)
    if len(scaler.mean) != flat.shape[1]:
        raise DataError(f"the scaler has {len(scaler.mean)} features and x has {flat.shape[1]}; they must be equal")
    out = np.empty(flat.shape, dtype=np.float32)
    mean, scale = np.array(scaler.mean), np.array(scaler.scale)
    with np.errstate(over="ignore", under="ignore"):
        for start in range(0, len(flat), 1 << 14):  # blocks that stay in the CPU's cache
            block = slice(start, start + (1 << 14))
            out[block] = (flat[block] - mean) / scale
    return out.reshape(x.shape)


def _refuse_where(wrong: Array, x: Array, what: str, advice: str) -> None:
    """Raises DataError naming the first value of `x` where `wrong` is true."""
    if wrong.any():
        row, *feature = np.argwhere(wrong)[0].tolist()
        place = feature[0] if len(feature) == 1 else tuple(feature)
        count = int(wrong.sum())
        raise DataError(
            f"{what} is {x[(row, *feature)]} in row {row}, feature {place} (the first of {count:,}); {advice}"
        )
