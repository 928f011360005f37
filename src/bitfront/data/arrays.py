"""From raw arrays to a :class:`Dataset`: every check, the split, the standardisation. Each dataset ends here.

The rules, once for all datasets:

* A split the data brings is kept, row for row. A missing one is cut: with no split at all, 70 % train, 15 %
  val and 15 % test; a missing val (or test) alone is 15 % of the train rows. Cuts are stratified by class and
  drawn from the seed, and identical rows stay in one split, so that nothing in test was trained on.
* uint8 features are images: they are divided by 255. Other features are used as they are, or standardised
  with the training split's mean and standard deviation where the dataset asks for it.
* Labels are class indices from 0, or class names, or one-hot rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch

from bitfront.data.base import SPLITS, Dataset, Scaler, Split
from bitfront.errors import DataError, nearest, one_of

Array: TypeAlias = npt.NDArray[Any]
ArrayLike: TypeAlias = Any
"""A numpy array, a torch tensor, or anything numpy can read as one."""

SHARES: Mapping[Split, float] = {"train": 0.70, "val": 0.15, "test": 0.15}
SPELLINGS: Mapping[str, Split] = {"validation": "val", "valid": "val", "training": "train", "testing": "test"}


def from_arrays(
    x: ArrayLike,
    y: ArrayLike,
    *,
    name: str = "arrays",
    class_names: Sequence[str] = (),
    feature_names: Sequence[str] = (),
    standardise: bool = False,
    seed: int = 0,
    source: str = "arrays in memory",
    notes: Sequence[str] = (),
) -> Dataset:
    """A dataset from one pair of arrays, split here: 70 % train, 15 % val, 15 % test, stratified, from
    `seed`.

    Args:
        x: ``(samples, *features)``, any real dtype; uint8 is divided by 255.
        y: (samples,) integers from 0 or class names, or (samples, classes) one-hot.
        class_names: by index; empty for "0", "1", ... or the names found in `y`, sorted.
        standardise: standardise the features with the training split's statistics.

    Raises:
        DataError: lengths differ, a value is not finite, a label is not a class, or there are too few
        samples.
    """
    return _guarded(
        source,
        lambda: _assemble({None: (x, y)}, name, class_names, feature_names, standardise, seed, source, notes),
    )


def from_splits(
    splits: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    name: str = "arrays",
    class_names: Sequence[str] = (),
    feature_names: Sequence[str] = (),
    standardise: bool | Scaler = False,
    seed: int = 0,
    source: str = "arrays in memory",
    notes: Sequence[str] = (),
    test_only: bool = False,
) -> Dataset:
    """A dataset from arrays that are already split: ``{"train": (x, y), "val": ..., "test": ...}``.

    A missing val or test is cut from train; the splits given are kept as they are. Arguments as in
    :func:`from_arrays`; `standardise` may be a :class:`Scaler` to use instead of the training statistics, and
    `test_only` allows data that has a test split and nothing else.

    Raises:
        DataError: as :func:`from_arrays`, or there is no train split, a split has an unknown name, shapes
            differ between splits, or val or test consists of training rows.
    """

    def build() -> Dataset:
        named: dict[Split | None, tuple[ArrayLike, ArrayLike]] = {}
        for key, pair in splits.items():
            split = split_name(key)
            if split in named:
                raise DataError(f"the {split} split is given twice: {one_of(splits)}")
            named[split] = pair
        if "train" not in named and not (test_only and set(named) == {"test"}):
            raise DataError(f"there is no train split among {sorted(map(str, splits))}; give one under 'train'")
        return _assemble(named, name, class_names, feature_names, standardise, seed, source, notes)

    return _guarded(source, build)


def split_name(key: object) -> Split:
    """The split that `key` means: train, val or test, with "validation", "valid" and the like accepted.

    Raises:
        DataError: it means none.
    """
    lowered = str(key).lower()
    found = SPELLINGS.get(lowered, lowered)
    for split in SPLITS:
        if found == split:
            return split
    raise DataError(f"there is no split called {key!r}; {one_of(SPLITS)}.{nearest(str(key), SPLITS)}")


def stratified_split(
    y: Array, shares: Mapping[Split, float] = SHARES, *, seed: int = 0, rows: Array | None = None
) -> dict[Split, Array]:
    """Row numbers per split, each class shared out by itself, each split shuffled. The same for the same
    arguments.

    Every class with at least as many samples as there are shares (three, by default) is in every split; train
    is served first, then test, then val.

    Args:
        y: class indices, shape (samples,).
        shares: the share of each split; must name "train", which gets what the others leave.
        rows: a number per sample, equal for identical samples; these stay in one split. Where more than half
            of the samples repeat another one (truth tables, categorical features) keeping them together would
            keep whole cases out of train, and `rows` is ignored.

    Raises:
        DataError: a split would stay empty.
    """
    others = [split for split in shares if split != "train"]
    if seed < 0:
        raise DataError(f"seed = {seed} cannot seed a split; allowed: 0 and above")
    rng = np.random.default_rng([seed, zlib.crc32(b"split")])

    group_of = first = np.arange(len(y))
    if rows is not None:
        _, first_seen, inverse = np.unique(rows, return_index=True, return_inverse=True)
        if len(first_seen) >= len(y) / 2:
            first, group_of = first_seen, inverse.reshape(-1)
    by_class = np.argsort(y[first], kind="stable")
    bounds = np.cumsum(np.bincount(y[first]))[:-1]

    home = np.zeros(len(first), dtype=np.int8)  # 0 is train, 1 the first of `others`, ...
    for members in np.split(by_class, bounds):
        counts = {split: max(1, round(shares[split] * len(members))) for split in others}
        while sum(counts.values()) > max(len(members) - 1, 0):
            # Of equal counts the first shrinks; "val" stands before "test".
            largest = max(others, key=lambda split: counts[split])
            counts[largest] -= 1
        shuffled, start = rng.permutation(members), 0
        for number, other in enumerate(others, start=1):
            home[shuffled[start : start + counts[other]]] = number
            start += counts[other]

    home_of_sample = home[group_of]
    parts: dict[Split, Array] = {}
    for number, split in enumerate(["train", *others]):
        part = np.flatnonzero(home_of_sample == number)
        if not len(part):
            raise DataError(
                f"{len(y)} samples are too few to cut {split} from: every split needs at least one sample, "
                "so give "
                f"at least {len(shares)} different samples of some class, or the splits themselves"
            )
        parts[cast(Split, split)] = rng.permutation(part)
    return parts


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
    """``(x - mean) / scale`` as float32, shaped like `x`; in float64: a mean may dwarf its deviation."""
    flat = x.reshape(len(x), -1)
    if len(scaler.mean) != flat.shape[1]:
        raise DataError(f"the scaler has {len(scaler.mean)} features and x has {flat.shape[1]}")
    out = np.empty(flat.shape, dtype=np.float32)
    mean, scale = np.array(scaler.mean), np.array(scaler.scale)
    with np.errstate(over="ignore", under="ignore"):
        for start in range(0, len(flat), 1 << 14):  # blocks that stay in the cache
            block = slice(start, start + (1 << 14))
            out[block] = (flat[block] - mean) / scale
    return out.reshape(x.shape)


def row_hashes(x: Array) -> Array:
    """A uint64 per sample of float `x`: equal for equal samples, and practically never otherwise.

    Comparable between arrays of one dtype: float64 samples are told apart where float32 would not tell them.
    """
    flat: Array = np.ascontiguousarray(x.reshape(len(x), -1))
    if flat.dtype not in (np.float32, np.float64):
        flat = flat.astype(np.float32)
    words = flat.shape[1] * flat.itemsize // 4
    keys = np.random.default_rng(0).integers(1, 2**63, size=words, dtype=np.uint64) | np.uint64(1)
    out = np.empty(len(flat), dtype=np.uint64)
    step = max(1, (1 << 20) // max(words, 1))
    for start in range(0, len(flat), step):
        block = flat[start : start + step] + flat.dtype.type(0)  # -0.0 becomes 0.0
        bits = block.view(np.uint32).astype(np.uint64)
        bits ^= bits >> np.uint64(16)  # small whole numbers have all their bits at the top; bring them down
        out[start : start + step] = (bits * keys).sum(axis=1, dtype=np.uint64)
    return out


def shared_rows(train: Array, other: Array) -> int:
    """How many rows of `other` also occur in `train`; both given as :func:`row_hashes`."""
    wanted, counts = np.unique(other, return_counts=True)
    place = np.minimum(np.searchsorted(wanted, train), len(wanted) - 1)
    found = np.unique(place[wanted[place] == train])
    return int(counts[found].sum())


def _guarded(source: str, build: Callable[[], Dataset]) -> Dataset:
    # The inner functions say what is wrong in one sentence; here, once, it is said of which data.
    try:
        return build()
    except DataError as error:
        raise DataError(f"{source}: {error}") from error.__cause__


def _assemble(
    given: Mapping[Split | None, tuple[ArrayLike, ArrayLike]],
    name: str,
    class_names: Sequence[str],
    feature_names: Sequence[str],
    standardise: bool | Scaler,
    seed: int,
    source: str,
    notes: Sequence[str],
) -> Dataset:
    notes = list(notes)
    xs = {split: _features(x, _called("x", split)) for split, (x, _) in given.items()}
    ys, names = _labels({split: y for split, (_, y) in given.items()}, class_names)
    for split, x in xs.items():
        if len(x) != len(ys[split]):
            raise DataError(
                f"{_called('x', split)} has {len(x)} samples and {_called('y', split)} has {len(ys[split])}; "
                "they must be as many"
            )
        reference, shape = next(iter(xs.items()))
        if x.shape[1:] != shape.shape[1:]:
            raise DataError(
                f"samples of {split} have the shape {x.shape[1:]}, those of {reference} {shape.shape[1:]}; "
                "every split needs the same"
            )

    x_of: dict[Split, Array] = {}
    y_of: dict[Split, Array] = {}
    if None in xs:
        parts = stratified_split(ys[None], seed=seed, rows=row_hashes(xs[None]))
        x_of = {split: xs[None][part] for split, part in parts.items()}
        y_of = {split: ys[None][part] for split, part in parts.items()}
        notes.append(f"split here: {_sizes(y_of)}, stratified, seed {seed}")
    else:
        x_of = {cast(Split, split): x for split, x in xs.items()}
        y_of = {cast(Split, split): y for split, y in ys.items()}
        if "train" in x_of:
            _refuse_training_rows(x_of, notes)
            missing = [split for split in SPLITS if split not in x_of]
            if missing:
                shares = {"train": 1 - sum(SHARES[s] for s in missing), **{s: SHARES[s] for s in missing}}
                x, y = x_of["train"], y_of["train"]
                for split, part in stratified_split(
                    y, cast(Mapping[Split, float], shares), seed=seed, rows=row_hashes(x)
                ).items():
                    x_of[split], y_of[split] = x[part], y[part]
                notes.append(f"{' and '.join(missing)} cut from train: {_sizes(y_of)}, stratified, seed {seed}")

    if "train" in y_of:
        absent = [names[c] for c in np.flatnonzero(np.bincount(y_of["train"], minlength=len(names)) == 0)]
        if absent and not class_names:
            raise DataError(
                f"the train split has no sample of class {', '.join(absent)}, yet the labels go up to "
                f"{len(names) - 1}; number the classes from 0 without gaps, or give class_names"
            )
        if absent:
            notes.append(f"no training sample of class {', '.join(absent)}")
    scaler = standardise if isinstance(standardise, Scaler) else fit_scaler(x_of["train"]) if standardise else None
    if feature_names and len(feature_names) != int(np.prod(next(iter(x_of.values())).shape[1:])):
        raise DataError(
            f"there are {len(feature_names)} feature names for samples of shape {next(iter(x_of.values())).shape[1:]}"
        )
    return Dataset(
        name=name,
        x={split: torch.from_numpy(_float32(x_of[split], scaler, split)) for split in SPLITS if split in x_of},
        y={split: torch.from_numpy(y_of[split]) for split in SPLITS if split in y_of},
        class_names=names,
        source=source,
        feature_names=tuple(map(str, feature_names)),
        notes=tuple(notes),
        scaler=scaler,
    )


def _refuse_training_rows(x: Mapping[Split, Array], notes: list[str]) -> None:
    """Raises where val or test is mostly training rows; a few shared rows, as real data has, become a note."""
    common = np.result_type(*x.values())  # hashes compare within one dtype
    hashes = {split: row_hashes(rows.astype(common, copy=False)) for split, rows in x.items()}
    for split in ("val", "test"):
        if split not in hashes:
            continue
        count, shared = len(hashes[split]), shared_rows(hashes["train"], hashes[split])
        # Where rows repeat anyway (truth tables, categorical features), meeting them again means nothing.
        if shared > count / 2 and len(np.unique(hashes["train"])) >= len(hashes["train"]) / 2:
            raise DataError(
                f"{shared:,} of the {count:,} {split} rows are training rows, so a score on them says nothing. "
                f"Give other rows as {split}, or leave {split} out and it is cut from train"
            )
        if shared:
            notes.append(f"{shared:,} of {count:,} {split} rows also occur in train")


def _sizes(y: Mapping[Split, Array]) -> str:
    return ", ".join(f"{split} {len(y[split]):,}" for split in SPLITS if split in y)


def _called(what: str, split: Split | None) -> str:
    return what if split is None else f"{what} of {split}"


def _numpy(value: ArrayLike, what: str) -> Array:
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:
        raise DataError(f"{what} cannot be read as an array: {error}") from error


def _features(value: ArrayLike, what: str) -> Array:
    x = _numpy(value, what)
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
        _refuse_where(
            np.abs(x) > np.finfo(np.float32).max, x, what, "it does not fit into float32; rescale the feature"
        )
    return x


def _float32(x: Array, scaler: Scaler | None, split: Split) -> Array:
    if scaler is None:
        return np.array(x, dtype=np.float32, order="C")  # a copy: later edits of the caller's array stay theirs
    out = apply_scaler(scaler, x)
    _refuse_where(~np.isfinite(out), x, f"x of {split}", "standardised it does not fit into float32; check the scale")
    return out


def _refuse_where(bad: Array, x: Array, what: str, advice: str) -> None:
    if bad.any():
        row, *feature = np.argwhere(bad)[0].tolist()
        place = feature[0] if len(feature) == 1 else tuple(feature)
        raise DataError(
            f"{what} is {x[(row, *feature)]} in row {row}, feature {place} (the first of {int(bad.sum()):,}); {advice}"
        )


def _labels(
    values: Mapping[Split | None, ArrayLike], class_names: Sequence[str]
) -> tuple[dict[Split | None, Array], tuple[str, ...]]:
    """int64 class indices per split, and the names of all classes."""
    names = tuple(str(n) for n in class_names)
    if len(set(names)) != len(names):
        raise DataError(f"class_names names a class twice: {', '.join(names)}")
    raw = {split: _one_column(_numpy(v, _called("y", split)), _called("y", split)) for split, v in values.items()}
    if any(y.dtype.kind in "US" for y in raw.values()):
        texts = {split: y.astype(str) for split, y in raw.items()}
        names = names or tuple(np.unique(np.concatenate(list(texts.values()))).tolist())
        return {split: by_name(y, names, _called("y", split)) for split, y in texts.items()}, names
    indices = {split: _indices(y, len(names), _called("y", split)) for split, y in raw.items()}
    widths = [y.shape[1] for y in map(_numpy, values.values(), map(str, values)) if y.ndim == 2]
    count = len(names) or max([*widths, *(int(y.max()) + 1 for y in indices.values())])
    if count < 2:
        raise DataError("every label is the same; a classifier needs at least two classes")
    return indices, names or tuple(str(c) for c in range(count))


def by_name(labels: Array, names: Sequence[str], what: str) -> Array:
    """int64 positions in `names` of the texts `labels`.

    Raises:
        DataError: a text is not among the names.
    """
    found, inverse = np.unique(labels, return_inverse=True)
    position = {name: index for index, name in enumerate(names)}
    unknown = [str(f) for f in found if str(f) not in position]
    if unknown:
        raise DataError(f"{what} has the label {unknown[0]!r}; {one_of(names)}")
    return np.array([position[str(f)] for f in found], dtype=np.int64)[inverse.reshape(-1)]


def _one_column(y: Array, what: str) -> Array:
    """`y` as one value per sample; one-hot rows become indices."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim == 2 and y.dtype.kind in "fiub":
        bad = ((y != 0) & (y != 1)).any(axis=1) | ((y == 1).sum(axis=1) != 1)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise DataError(
                f"{what} has the shape {y.shape}, and row {row} is not one-hot: {y[row].tolist()}; needed "
                "are class "
                "indices (samples,) or one-hot rows (samples, classes)"
            )
        indices: Array = np.argmax(y, axis=1)
        return indices
    if y.ndim != 1:
        raise DataError(
            f"{what} has the shape {y.shape}; needed are class indices (samples,) or one-hot rows (samples, classes)"
        )
    return y


def _indices(y: Array, classes: int, what: str) -> Array:
    if y.dtype.kind == "O" or y.dtype.kind not in "fiub":
        raise DataError(f"{what} has the dtype {y.dtype}; needed are integer class indices, or class names as text")
    if len(y) == 0:
        raise DataError(f"{what} is empty; every split needs at least one sample")
    if y.dtype.kind == "f":
        whole = np.isfinite(y) & (y == np.floor(y)) & (np.abs(y) < 2**31)
        if not whole.all():
            row = int(np.flatnonzero(~whole)[0])
            raise DataError(
                f"{what} is {y[row]} in row {row}, which is not a class index; Bitfront classifies: labels "
                "are "
                "integers from 0"
            )
    allowed = f"allowed: 0 to {classes - 1}" if classes else "allowed: integers from 0"
    wrong = (y < 0) | (y >= classes) if classes else y < 0
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(f"{what} is {y[row]} in row {row}, which is not a class index; {allowed}")
    if not classes and y.max() > 1_000_000:
        raise DataError(f"{what} goes up to {y.max()}, as if there were that many classes; {allowed}, without gaps")
    return y.astype(np.int64)
