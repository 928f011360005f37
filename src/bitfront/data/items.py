"""Samples that are read one by one, from files or a library: into memory, or into a file that is mapped.

In memory they go the usual way (``arrays.py``). Where they are larger than memory, they are written once as float32
into ``.npy`` files in the cache, and these are mapped: a batch of a training reads its rows, and the samples that
candidates are evaluated on are copied out once. What is mapped is the same tensor for everything else.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from bitfront.cache import cache_dir
from bitfront.config import Table
from bitfront.data.arrays import from_arrays, from_splits
from bitfront.data.base import GIB, SPLITS, DataRequest, Dataset, Split, mapped_tensor
from bitfront.data.raw import Array
from bitfront.data.splitting import SHARES, stratified_split
from bitfront.data.targets import CLASSES
from bitfront.errors import DataError

_FLOAT32 = 4


class ItemSettings(Table):
    """Settings of data whose samples are read one by one."""

    samples: int | None = Field(None, ge=1, description="at most so many of each split, drawn with the seed")
    memory_map: bool = Field(
        False,
        description="for data larger than memory: samples are written once as float32 into files in the cache, and "
        "read from there; identical samples are not looked for",
    )


@dataclass(frozen=True)
class Items:
    """The samples of one split, which are not read yet.

    Attributes:
        y: their targets, shape ``(samples, ...)``; of classes, indices or names.
        read: position → features of the sample, float32, always of one shape.
        identity: what the samples depend on, as text: paths with sizes and times, or the fingerprint of a library.
    """

    y: Array
    read: Callable[[int], Array]
    identity: str = ""


def dataset_of_items(
    splits: Mapping[Split | None, Items],
    request: DataRequest,
    settings: ItemSettings,
    *,
    name: str,
    source: str,
    class_names: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Dataset:
    """A dataset of samples that are read one by one; missing splits are cut as in ``arrays.py``.

    Args:
        splits: the samples by split, or all under None.
        request: seed, limit of memory and targets.
        settings: how many samples, and whether they are mapped.
        name, source, class_names, notes: as in ``from_arrays``.

    Raises:
        DataError: there are no samples, they differ in shape, or take more memory than ``request.limit_bytes``.
    """
    chosen = {split: _subset(items, settings.samples, request.seed) for split, items in splits.items()}
    if not all(len(rows) for rows in chosen.values()):
        raise DataError(f"{source}: a split has no samples; give at least a few of every class")
    shape = next(iter(splits.values())).read(int(next(iter(chosen.values()))[0])).shape
    size = sum(len(rows) for rows in chosen.values()) * int(np.prod(shape)) * _FLOAT32
    taken = [f"at most {settings.samples:,} samples of each split, drawn with the seed"] if settings.samples else []
    about: dict[str, Any] = {"name": name, "source": source, "class_names": class_names}
    if settings.memory_map:
        return _mapped(splits, chosen, request, shape, [*notes, *taken], about)
    if size > request.limit_bytes:
        raise DataError(
            f"{source} takes {size / GIB:.3g} GiB in memory as samples of shape {shape}, and the limit is "
            f"{request.limit_bytes / GIB:.3g} GiB. In [dataset_settings], samples = 1000 takes fewer, a smaller "
            "image_size makes them smaller, and memory_map = true reads them from the disk; limit_bytes raises the "
            "limit"
        )
    pairs = {split: _in_memory(items, chosen[split], shape, source) for split, items in splits.items()}
    request.report(f"{source}: {sum(map(len, chosen.values())):,} samples, {size / 1e6:.1f} MB read into memory")
    common: dict[str, Any] = {"seed": request.seed, "targets": request.targets, "notes": [*notes, *taken], **about}
    if None in pairs:
        return from_arrays(*pairs[None], **common)
    return from_splits({str(split): pair for split, pair in pairs.items()}, **common)


def _subset(items: Items, number: int | None, seed: int) -> Array:
    """Positions of the samples that are taken, in their order."""
    count = len(items.y)
    if number is None or number >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng([seed, count]).permutation(count)[:number])


def _in_memory(items: Items, rows: Array, shape: tuple[int, ...], source: str) -> tuple[Array, Array]:
    x = np.empty((len(rows), *shape), dtype=np.float32)
    _fill(x, items, rows, source)
    return x, items.y[rows]


def _fill(x: Array, items: Items, rows: Array, source: str) -> None:
    """Read samples into an array. Raises DataError where one has another shape, or a value that is not finite."""
    for place, row in enumerate(rows.tolist()):
        sample = items.read(row)
        if sample.shape != x.shape[1:]:
            raise DataError(
                f"{source}: sample {row} has the shape {sample.shape}, and the first has {x.shape[1:]}; every sample "
                "needs the same: for images, set image_size in [dataset_settings]"
            )
        if not np.isfinite(sample).all():
            raise DataError(f"{source}: sample {row} has values that are not finite; leave it out")
        x[place] = sample


def _mapped(
    splits: Mapping[Split | None, Items],
    chosen: Mapping[Split | None, Array],
    request: DataRequest,
    shape: tuple[int, ...],
    notes: Sequence[str],
    about: Mapping[str, Any],
) -> Dataset:
    """The dataset over files in the cache, which are written if they are not there."""
    if request.targets is not CLASSES and request.targets.given:
        raise DataError(f"{about['source']}: memory_map = true is for classes as targets, or for labels = false")
    parts = _cut(splits, chosen, request.seed)
    y, names = CLASSES.read({split: splits[split].y for split in splits}, about["class_names"])
    key = {
        "identity": [items.identity for items in splits.values()],
        "rows": {split: hashlib.sha256(rows.tobytes()).hexdigest() for split, (_, rows) in parts.items()},
        "shape": shape,
        "notes": list(notes),
        "version": 1,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    folder = cache_dir() / "mapped" / digest
    if not folder.is_dir():
        _write(folder, splits, parts, shape, request, about["source"])
    sizes = ", ".join(f"{split} {len(rows):,}" for split, (_, rows) in parts.items())
    told = [f"read from files that are mapped, {folder}: {sizes}; identical samples of splits are not looked for"]
    files: dict[Split, Path] = {split: folder / f"{split}.npy" for split in parts}
    labels = {split: torch.from_numpy(y[given][rows].copy()) for split, (given, rows) in parts.items()}
    targets = request.targets
    return Dataset(
        name=about["name"],
        x={split: mapped_tensor(path) for split, path in files.items()},
        y=labels if targets.given else {s: torch.zeros(len(rows), 0) for s, (_, rows) in parts.items()},
        class_names=names,
        source=about["source"],
        notes=(*notes, *told),
        targets=targets,
        mapped=files,
    )


def _cut(
    splits: Mapping[Split | None, Items], chosen: Mapping[Split | None, Array], seed: int
) -> dict[Split, tuple[Split | None, Array]]:
    """Split → (the given split that it is of, positions in it); missing splits are cut, stratified by class."""
    given: Split | None = None if None in splits else "train"
    if given not in splits:
        raise DataError(f"there is no train split among {', '.join(map(str, splits))}; give one")
    missing = [split for split in SPLITS if split not in splits]
    found: dict[Split, tuple[Split | None, Array]] = {
        split: (split, rows) for split, rows in chosen.items() if split is not None
    }
    if missing:
        shares: dict[Split, float] = {s: SHARES[s] for s in SPLITS if s in missing or s == "train"}
        shares["train"] = 1 - sum(SHARES[s] for s in missing if s != "train")
        rows = chosen[given]
        _, classes = np.unique(splits[given].y[rows], return_inverse=True)
        for split, part in stratified_split(classes, shares, seed=seed).items():
            found[split] = (given, rows[part])
    return {split: found[split] for split in SPLITS}


def _write(
    folder: Path,
    splits: Mapping[Split | None, Items],
    parts: Mapping[Split, tuple[Split | None, Array]],
    shape: tuple[int, ...],
    request: DataRequest,
    source: str,
) -> None:
    """Write the samples of each split into a folder of the cache, which gets its name when it is complete."""
    size = sum(len(rows) for _, rows in parts.values()) * int(np.prod(shape)) * _FLOAT32
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if size > free:
            raise DataError(
                f"{source} takes {size / GIB:.3g} GiB on the disk, and {folder.parent} has {free / GIB:.3g} GiB free; "
                "set BITFRONT_CACHE to a folder with enough room"
            )
        request.report(f"{source}: writing {size / GIB:.3g} GiB to {folder}, once")
        part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            for split, (given, rows) in parts.items():
                file = np.lib.format.open_memmap(
                    part / f"{split}.npy", mode="w+", dtype=np.float32, shape=(len(rows), *shape)
                )
                _fill(file, splits[given], rows, source)
                file.flush()
            # Another process may have finished first: then its files are the same.
            if not folder.is_dir():
                part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"cannot write to {folder}: {error.strerror or error}; set BITFRONT_CACHE to a folder with enough room"
        ) from error
