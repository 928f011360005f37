"""From arrays to a :class:`Dataset`: the two functions a user calls, and the steps behind them.

Every dataset is built here, by the same rules:

* A split in the data is kept, row for row. A missing one is cut: with no split at all, 70 % train,
  15 % val and 15 % test; a missing val (or test) alone is 15 % of the train rows. Cuts are stratified by class
  and drawn from the seed. Identical rows stay in one split, so that no test row was trained on.
* uint8 features are images: they are divided by 255. Splits of which one is scaled so and another is not are refused.
  Other features are used as they are, or standardised
  with the training split's mean and standard deviation if the dataset is defined so.
* Labels are class indices from 0, or class names, or one-hot rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from bitfront.data.base import SPLITS, Dataset, Scaler, Split
from bitfront.data.features import fit_scaler, real_features, refuse_mixed_scales, scale_notes, to_float32
from bitfront.data.packing import PackedInput, packed
from bitfront.data.raw import Array, ArrayLike, array_name
from bitfront.data.splitting import SHARES, refuse_training_rows, row_hashes, split_name, stratified_split
from bitfront.data.targets import CLASSES, Targets, targets_named, token_ids, with_features
from bitfront.errors import DataError, first_few

#: Classes that a message names; there may be a thousand.
NAMED = 12


@dataclass(frozen=True)
class _Description:
    """The facts about a dataset besides its arrays; the fields are arguments of :func:`from_arrays`."""

    name: str
    class_names: Sequence[str]
    feature_names: Sequence[str]
    standardise: bool | Scaler
    seed: int
    source: str
    notes: Sequence[str]
    targets: Targets
    gaps: bool


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
    targets: Targets | str = CLASSES,
    gaps: bool = False,
) -> Dataset:
    """A dataset from one pair of arrays, split here: 70 % train, 15 % val, 15 % test, stratified by class.

    Args:
        x: ``(samples, *features)``, any real dtype; uint8 is divided by 255. Or name → array, for a model with several
            inputs, by the names of its forward's arguments; integers stay integers.
        y: (samples,) integers from 0 or class names, or (samples, classes) one-hot; for another task what its targets
            are; None where they are not in the data.
        name: the name in tables and reports.
        class_names: by index; empty for "0", "1", ... or the sorted names that occur in `y`.
        feature_names: one per feature, or empty.
        standardise: standardise the features with the training split's statistics.
        seed: random seed of the split, 0 or more.
        source: where the data comes from, for the run folder and for messages.
        notes: facts that a reader of the results must know.
        targets: what `y` is: "classes", or what another task has, such as "numbers". Only classes are stratified.
        gaps: whether a class between others may have no training sample, although `class_names` does not name it: of a
            part of the data for a trained model.

    Raises:
        DataError: lengths differ, a value is not finite, a label is not a class, or there are too few
            samples.
    """
    description = _Description(
        name, class_names, feature_names, standardise, seed, source, notes, targets_named(targets), gaps
    )
    return _with_source(source, lambda: _assemble({None: (x, y)}, description))


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
    targets: Targets | str = CLASSES,
    gaps: bool = False,
    test_only: bool = False,
) -> Dataset:
    """A dataset from arrays that are already split: ``{"train": (x, y), "val": ..., "test": ...}``.

    A missing val or test is cut from train; the splits given are kept as they are. Arguments as in
    :func:`from_arrays`; `standardise` may be a :class:`Scaler` to use instead of the training statistics, and
    `test_only` allows data that has a test split and nothing else.

    Raises:
        DataError: as :func:`from_arrays`; or there is no train split, a split has an unknown name, shapes
            differ between splits, dtypes of them mean different scales, or most rows of val or test are training rows.
    """
    description = _Description(
        name, class_names, feature_names, standardise, seed, source, notes, targets_named(targets), gaps
    )

    def build() -> Dataset:
        pairs: dict[Split | None, tuple[ArrayLike, ArrayLike]] = {}
        for key, pair in splits.items():
            split = split_name(key)
            if split in pairs:
                raise DataError(
                    f"the {split} split is given twice, among {', '.join(map(repr, splits))}; give it under one name"
                )
            pairs[split] = pair
        if "train" not in pairs and not (test_only and set(pairs) == {"test"}):
            raise DataError(f"there is no train split among {sorted(map(str, splits))}; give one under 'train'")
        return _assemble(pairs, description)

    return _with_source(source, build)


def _with_source(source: str, build: Callable[[], Dataset]) -> Dataset:
    # The functions called by `build` say what is wrong; which data it is about is added here, once.
    try:
        return build()
    except DataError as error:
        raise DataError(f"{source}: {error}") from error.__cause__


def _assemble(pairs: Mapping[Split | None, tuple[ArrayLike, ArrayLike]], description: _Description) -> Dataset:
    """The dataset of (x, y) by split, or under None if the samples are not split yet."""
    targets = description.targets
    x, inputs = _features({split: features for split, (features, _) in pairs.items()}, targets)
    plain = not (targets.of_tokens or inputs)
    labels: dict[str | None, ArrayLike] = {split: y for split, (_, y) in pairs.items()}
    if not targets.given:
        labels = {split: np.zeros((len(rows), 0), dtype=np.float32) for split, rows in x.items()}
    y, class_names = targets.read(labels, description.class_names)
    _check_shapes(x, y)
    x_by_split, y_by_split, split_notes = _split(x, y, description.seed, targets.stratified)
    named = bool(description.class_names)
    if targets.of_tokens and targets.given and not named and not inputs:
        # A token that never comes next is one of the vocabulary, too.
        class_names = tuple(map(str, range(max(len(class_names), *(int(ids.max()) + 1 for ids in x.values())))))
    class_notes = _absent_classes(y_by_split, class_names, named or description.gaps) if targets is CLASSES else []
    scaler = description.standardise if isinstance(description.standardise, Scaler) else None
    if description.standardise and not plain:
        raise DataError("standardise is for features that are one array of numbers; leave it out")
    if description.standardise and scaler is None:
        seen = x_by_split["train"]
        scaler = fit_scaler(seen[y_by_split["train"] == 0] if targets.with_features else seen)
    shape = next(iter(x_by_split.values())).shape[1:]
    if description.feature_names and len(description.feature_names) != int(np.prod(shape)):
        raise DataError(
            f"there are {len(description.feature_names)} feature names for samples of shape {shape}; give "
            f"{int(np.prod(shape))} names, or none"
        )
    final = {s: _final(x_by_split[s], scaler, s, plain) for s in SPLITS if s in x_by_split}
    if targets.with_features:
        if not plain:
            raise DataError(
                "anomalies are found in features that are one array of numbers, and here are several inputs"
            )
        final, y_by_split, normal_notes = _normal(final, y_by_split)
        split_notes = [*split_notes, *normal_notes]
    return Dataset(
        name=description.name,
        x={split: torch.from_numpy(rows) for split, rows in final.items()},
        y={split: torch.from_numpy(y_by_split[split]) for split in final},
        class_names=class_names,
        source=description.source,
        feature_names=tuple(map(str, description.feature_names)),
        notes=(*description.notes, *split_notes, *class_notes, *(scale_notes(x) if plain else [])),
        scaler=scaler,
        targets=targets,
        inputs=inputs,
    )


def _normal(
    x: Mapping[Split, Array], y: Mapping[Split, Array]
) -> tuple[dict[Split, Array], dict[Split, Array], list[str]]:
    """(x, y) by split, where train has normal samples only, and the features are part of the targets; and a note."""
    kept = {split: flags == 0 if split == "train" else np.ones(len(flags), dtype=bool) for split, flags in y.items()}
    if "train" in kept and not kept["train"].any():
        raise DataError("the train split has no normal sample (0 in y), and training needs them")
    for split, flags in y.items():
        if split != "train" and len(np.unique(flags)) < 2:
            raise DataError(
                f"every sample of {split} is {'anomalous' if flags[0] else 'normal'}, which does not say how "
                "well the two are told apart; give samples of both"
            )
    rows = {split: features[kept[split]] for split, features in x.items()}
    left_out = int((~kept["train"]).sum()) if "train" in kept else 0
    notes = [f"{left_out:,} anomalies of train are left out: training sees normal samples only"] if left_out else []
    return rows, {split: with_features(y[split][kept[split]], of) for split, of in rows.items()}, notes


def _features(
    given: Mapping[Split | None, ArrayLike], targets: Targets
) -> tuple[dict[Split | None, Array], tuple[PackedInput, ...]]:
    """(the features by split, what a row of them holds if they are several inputs by name)."""
    named = [split for split, features in given.items() if isinstance(features, Mapping)]
    if named and len(named) < len(given):
        raise DataError(f"x of {named[0]} is a mapping, and that of other splits is not; every split needs the same")
    if named:
        rows, inputs = packed(cast(Mapping[str | None, Any], given))
        return cast(dict[Split | None, Array], rows), inputs
    if targets.of_tokens:
        return {split: token_ids(features, array_name("x", split)) for split, features in given.items()}, ()
    refuse_mixed_scales(given)
    return {split: real_features(features, array_name("x", split)) for split, features in given.items()}, ()


def _final(x: Array, scaler: Scaler | None, split: Split, plain: bool) -> Array:
    """A copy of the features of a split as a dataset holds them; ids and packed rows as they are."""
    return to_float32(x, scaler, split) if plain else np.array(x, order="C")


def _check_shapes(x: Mapping[Split | None, Array], y: Mapping[str | None, Array]) -> None:
    """Raises DataError where x and y differ in length, or samples differ in shape between splits."""
    first_split, first = next(iter(x.items()))
    for split, features in x.items():
        if len(features) != len(y[split]):
            raise DataError(
                f"{array_name('x', split)} has {len(features)} samples and {array_name('y', split)} has "
                f"{len(y[split])}; they must be equally many"
            )
        if features.shape[1:] != first.shape[1:]:
            raise DataError(
                f"samples of {split} have the shape {features.shape[1:]}, those of {first_split} {first.shape[1:]}; "
                f"every split needs the same{_channels_moved(first.shape[1:], features.shape[1:])}"
            )


def _channels_moved(first: tuple[int, ...], other: tuple[int, ...]) -> str:
    """What to do where one shape has the channels first and the other has them last; else empty."""
    if len(first) < 2 or len(first) != len(other):
        return ""
    if other == (*first[1:], first[0]):
        return ". One has the channels last: np.moveaxis(x, -1, 1) puts them first"
    if first == (*other[1:], other[0]):
        return ". One has the channels first: np.moveaxis(x, 1, -1) puts them last"
    return ""


def _split(
    x: Mapping[Split | None, Array], y: Mapping[str | None, Array], seed: int, stratified: bool
) -> tuple[dict[Split, Array], dict[Split, Array], list[str]]:
    """x and y by split, with the missing splits cut from the samples given; and notes about that."""
    how = "stratified" if stratified else "at random"

    def strata(values: Array) -> Array:
        return values if stratified else np.zeros(len(values), dtype=np.int64)

    if None in x:
        parts = stratified_split(strata(y[None]), seed=seed, rows=row_hashes(x[None]))
        x_by_split = {split: x[None][rows] for split, rows in parts.items()}
        y_by_split = {split: y[None][rows] for split, rows in parts.items()}
        return x_by_split, y_by_split, [f"split here: {_sizes(y_by_split)}, {how}, seed {seed}"]
    x_by_split = {cast(Split, split): features for split, features in x.items()}
    y_by_split = {cast(Split, split): labels for split, labels in y.items()}
    if "train" not in x_by_split:
        return x_by_split, y_by_split, []
    notes = refuse_training_rows(x_by_split)
    missing = [split for split in SPLITS if split not in x_by_split]
    if missing:
        x_train, y_train = x_by_split["train"], y_by_split["train"]
        shares: dict[Split, float] = {"train": 1 - sum(SHARES[s] for s in missing), **{s: SHARES[s] for s in missing}}
        for split, rows in stratified_split(strata(y_train), shares, seed=seed, rows=row_hashes(x_train)).items():
            x_by_split[split], y_by_split[split] = x_train[rows], y_train[rows]
        notes.append(f"{' and '.join(missing)} cut from train: {_sizes(y_by_split)}, {how}, seed {seed}")
    return x_by_split, y_by_split, notes


def _absent_classes(y: Mapping[Split, Array], class_names: Sequence[str], allowed: bool) -> list[str]:
    """A note about classes without a training sample; an error where they are not allowed."""
    if "train" not in y:
        return []
    counts = np.bincount(y["train"], minlength=len(class_names))
    absent = [name for name, count in zip(class_names, counts, strict=True) if count == 0]
    if absent and not allowed:
        raise DataError(
            f"the train split has no sample of class {first_few(absent, NAMED)}, yet the labels go up to "
            f"{len(class_names) - 1}; number the classes from 0 without gaps, or give class_names"
        )
    return [f"no training sample of class {first_few(absent, NAMED)}"] if absent else []


def _sizes(y: Mapping[Split, Array]) -> str:
    return ", ".join(f"{split} {len(y[split]):,}" for split in SPLITS if split in y)
