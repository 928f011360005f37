"""Train, val and test: their names, the cut of data that brings no split, and rows that occur in two splits."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import cast

import numpy as np

from bitfront.data.base import SPLITS, Split
from bitfront.data.raw import Array
from bitfront.errors import DataError, nearest, one_of

SHARES: Mapping[Split, float] = {"train": 0.70, "val": 0.15, "test": 0.15}
SPELLINGS: Mapping[str, Split] = {"validation": "val", "valid": "val", "training": "train", "testing": "test"}


def split_name(key: object) -> Split:
    """The split that `key` means: train, val or test, with "validation", "valid" and the like accepted.

    Raises:
        DataError: it means none.
    """
    split = known_split(str(key))
    if split is not None:
        return split
    raise DataError(f"there is no split called {key!r}; {one_of(SPLITS)}.{nearest(str(key), SPLITS)}")


def known_split(key: str) -> Split | None:
    """The split that `key` means; None if it means none."""
    name = SPELLINGS.get(key.lower(), key.lower())
    return next((split for split in SPLITS if split == name), None)


def stratified_split(
    y: Array, shares: Mapping[Split, float] = SHARES, *, seed: int = 0, rows: Array | None = None
) -> dict[Split, Array]:
    """Row numbers by split: every class is divided in the same shares, and each split is shuffled.

    The same arguments give the same rows. A class with at least as many samples as there are shares (three,
    by default) is in every split. A smaller class goes to train first, then to test, then to val.

    Args:
        y: class indices, shape (samples,).
        shares: the share of each split, in (0, 1); must name "train", which gets what the others leave.
        seed: 0 and above.
        rows: a number per sample, equal for identical samples; these stay in one split. Where more than half
            of the samples repeat another one (truth tables, categorical features), keeping them together
            would keep whole cases out of train, so `rows` is ignored.

    Raises:
        DataError: a split would stay empty, or the seed is negative.
    """
    others = [split for split in shares if split != "train"]
    if seed < 0:
        raise DataError(f"seed = {seed} cannot seed a split; allowed: 0 and above")
    rng = np.random.default_rng([seed, zlib.crc32(b"split")])

    group_of_sample = first_of_group = np.arange(len(y))
    if rows is not None:
        _, first_seen, inverse = np.unique(rows, return_index=True, return_inverse=True)
        if len(first_seen) >= len(y) / 2:
            first_of_group, group_of_sample = first_seen, inverse.reshape(-1)
    split_of_group = _stratified_groups(y[first_of_group], [shares[split] for split in others], rng)

    split_of_sample = split_of_group[group_of_sample]
    parts: dict[Split, Array] = {}
    for number, split in enumerate(["train", *others]):
        part = np.flatnonzero(split_of_sample == number)
        if not len(part):
            raise DataError(
                f"{len(y)} samples are too few to cut {split} from: every split needs at least one sample. Give at "
                f"least {len(shares)} different samples of some class, or give the splits themselves"
            )
        parts[cast(Split, split)] = rng.permutation(part)
    return parts


def _stratified_groups(classes: Array, shares: list[float], rng: np.random.Generator) -> Array:
    """For each group of identical samples its split: 0 is train, 1 the first of `shares`, and so on."""
    by_class = np.argsort(classes, kind="stable")
    bounds = np.cumsum(np.bincount(classes))[:-1]
    split_of_group = np.zeros(len(classes), dtype=np.int8)
    for members in np.split(by_class, bounds):
        counts = [max(1, round(share * len(members))) for share in shares]
        while sum(counts) > max(len(members) - 1, 0):
            counts[counts.index(max(counts))] -= 1  # of equal counts the first shrinks; "val" stands before "test"
        shuffled, start = rng.permutation(members), 0
        for number, count in enumerate(counts, start=1):
            split_of_group[shuffled[start : start + count]] = number
            start += count
    return split_of_group


def row_hashes(x: Array) -> Array:
    """A uint64 per sample of float `x`: equal for equal samples, and practically never for others.

    Compare hashes of arrays of one dtype only: float64 samples can differ where their float32 values do not.
    """
    flat: Array = np.ascontiguousarray(x.reshape(len(x), -1))
    if flat.dtype not in (np.float32, np.float64):
        flat = flat.astype(np.float32)
    words = flat.shape[1] * flat.itemsize // 4
    keys = np.random.default_rng(0).integers(1, 2**63, size=words, dtype=np.uint64) | np.uint64(1)
    hashes = np.empty(len(flat), dtype=np.uint64)
    step = max(1, (1 << 20) // max(words, 1))
    for start in range(0, len(flat), step):
        block = flat[start : start + step] + flat.dtype.type(0)  # -0.0 becomes 0.0
        bits = block.view(np.uint32).astype(np.uint64)
        bits ^= bits >> np.uint64(16)  # small whole numbers have all their bits at the top; bring them down
        hashes[start : start + step] = (bits * keys).sum(axis=1, dtype=np.uint64)
    return hashes


def shared_rows(train: Array, other: Array) -> int:
    """How many rows of `other` also occur in `train`; both given as :func:`row_hashes`."""
    if not len(train):
        return 0
    known, wanted = np.sort(train), np.sort(other)  # in order, because a search in disorder misses the cache each time
    place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return int((known[place] == wanted).sum())


def refuse_training_rows(x: Mapping[Split, Array]) -> list[str]:
    """Notes about val and test rows that also occur in train, as happens in real data.

    Args:
        x: features by split, shape ``(samples, *features)``; with a train split.

    Raises:
        DataError: more than half of the rows of val or test are training rows.
    """
    common = np.result_type(*x.values())  # hashes compare within one dtype
    hashes = {split: row_hashes(rows.astype(common, copy=False)) for split, rows in x.items()}
    notes = []
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
    return notes
