"""The user's data: ``dataset = "package.module:factory"``, or any object that holds samples.

The factory is called without arguments. It returns (x, y), a torch ``Dataset`` or a ``DataLoader``, or splits
of these. Samples are read into memory once, in their order; a search then runs on these tensors. Features are
used as the factory gives them (uint8 divided by 255): whoever writes a factory prepares the data for the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from bitfront.data.arrays import from_arrays, from_splits
from bitfront.data.base import GIB, DataRequest, Dataset, Split
from bitfront.data.raw import Array, to_numpy
from bitfront.data.splitting import split_name
from bitfront.errors import BitfrontError, ConfigError, DataError
from bitfront.registry import import_object, one_line

#: The same where the targets are the float model's outputs.
UNLABELLED = (
    "allowed without labels: x, where x may be several inputs by name, or (x, y), whose y is left out; a dict "
    "{'train': ..., 'val': ..., 'test': ...} of these; a torch Dataset or DataLoader of x or (x, y)"
)
RETURNS = (
    "allowed: (x, y), where x may be several inputs by name; "
    "a dict {'train': ..., 'val': ..., 'test': ...} or a tuple (train, test) or (train, val, "
    "test) of such pairs; a torch Dataset or DataLoader of (x, y); or a dict or tuple of these"
)
FLOAT32_BYTES = 4


def load_factory(spec: str, request: DataRequest) -> Dataset:
    """The dataset that the function ``package.module:factory`` returns. The working directory is importable.

    Raises:
        ConfigError: `spec` is malformed, or its module or function does not exist.
        DataError: the factory fails, or returns what cannot be read, or more than ``request.limit_bytes``.
    """
    if request.path is not None:
        raise DataError(
            f"dataset = {spec!r} is a factory, which opens its files itself, but dataset_path is {request.path}; "
            "leave dataset_path out"
        )
    factory = import_object(spec, "dataset")
    if not callable(factory):
        raise ConfigError(
            f"dataset {spec!r} is a {type(factory).__name__}; needed is a function that returns the data",
            key=("dataset",),
        )
    try:
        samples = factory()
    except BitfrontError:
        raise
    except Exception as error:
        raise DataError(f"the factory {spec} failed: {one_line(error)}") from error
    return from_object(samples, request, name=spec.partition(":")[2], source=spec)


def from_object(value: object, request: DataRequest | None = None, *, name: str, source: str) -> Dataset:
    """The samples in `value` as a dataset: (x, y), splits, a torch ``Dataset`` or a ``DataLoader``.

    A tuple is (x, y) if its parts are arrays. It is (train, test) or (train, val, test) if they are pairs,
    datasets or loaders. Missing splits are cut (see :mod:`bitfront.data.arrays`). A loader is iterated once,
    with torch seeded by the request, so its shuffling is the same every time. A Bitfront ``Dataset`` is
    returned as it is.

    Args:
        value: the samples.
        request: seed of the split and limit of memory; the defaults of :class:`DataRequest` where None.
        name: what the dataset is called in tables and reports.
        source: where the data comes from, for the run folder and for messages.

    Raises:
        DataError: `value` is none of these, a sample is not (x, y) or has another shape than the first, or
            the samples take more than ``request.limit_bytes`` as float32.
    """
    request = request or DataRequest()
    if isinstance(value, Dataset):
        return value
    reader = _ItemReader(request, source)
    common: dict[str, Any] = {
        "name": name,
        "seed": request.seed,
        "source": source,
        "targets": request.targets,
        "class_names": request.class_names,
        "gaps": request.gaps,
    }
    if not request.targets.given and isinstance(value, Mapping) and not _all_splits(value):
        parts = None  # several inputs by name
    else:
        parts = _splits(value, source)
    if parts is None:
        x, y = reader.pair(value, "")
        return from_arrays(x, y, **common)
    return from_splits({split: reader.pair(part, split) for split, part in parts.items()}, **common)


def _splits(value: object, source: str) -> dict[Split, object] | None:
    """The parts by split, or None where `value` is all samples together."""
    if isinstance(value, Mapping):
        parts: dict[Split, object] = {}
        for key, part in value.items():
            try:
                split = split_name(key)
            except DataError as error:
                raise DataError(f"{source}: {error}; {RETURNS}") from None
            if split in parts:
                raise DataError(
                    f"{source}: the {split} split is given twice, among {', '.join(map(repr, value))}; give it under "
                    "one name"
                )
            parts[split] = part
        return parts
    if isinstance(value, tuple | list) and value and all(_is_part(part) for part in value):
        if len(value) in (2, 3):
            names: tuple[Split, ...] = ("train", "test") if len(value) == 2 else ("train", "val", "test")
            return dict(zip(names, value, strict=True))
        raise DataError(f"{source}: got a {type(value).__name__} of {len(value)} splits; {RETURNS}")
    return None


def _is_part(value: object) -> bool:
    """Whether `value` holds the samples of one split: a dataset, a loader or a pair of arrays."""
    return isinstance(value, TorchDataset | DataLoader) or (
        isinstance(value, tuple | list) and len(value) == 2 and _is_features(value[0]) and _is_array(value[1])
    )


def _is_features(value: object) -> bool:
    """Whether `value` is an array, or several by name."""
    return _is_array(value) or (isinstance(value, Mapping) and bool(value) and all(map(_is_array, value.values())))


def _all_splits(value: Mapping[Any, object]) -> bool:
    """Whether all keys are names of splits."""
    try:
        return all(split_name(key) for key in value)
    except DataError:
        return False


def _is_array(value: object) -> bool:
    return isinstance(value, torch.Tensor) or hasattr(value, "__array__")


class _ItemReader:
    """Reads the samples of each split into arrays, and counts the memory that all of them take."""

    def __init__(self, request: DataRequest, source: str) -> None:
        self.request, self.source, self.bytes_read = request, source, 0

    def pair(self, value: object, split: str) -> tuple[Any, Any]:
        """(x, y) of one split, or of everything where `split` is empty."""
        where = f"{self.source}, {split}" if split else self.source
        given = self.request.targets.given
        if not given and _is_features(value):
            value = (value, None)
        if isinstance(value, DataLoader):
            return self._samples(_batches(value, where), where, batched=True)
        if isinstance(value, TorchDataset):
            return self._samples(_items(value), where, batched=False, expected=_length(value))
        if isinstance(value, tuple | list) and len(value) == 2:
            x, y = value
            for array in x.values() if isinstance(x, Mapping) else (x,):
                size = array.numel() if isinstance(array, torch.Tensor) else np.size(array) if _is_array(array) else 0
                self._count(size * FLOAT32_BYTES, where)
            return x, y
        got = f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple | list) else "")
        raise DataError(f"{where}: cannot read {got} as samples; {RETURNS if given else UNLABELLED}")

    def _samples(
        self, source: Iterable[object], where: str, *, batched: bool, expected: int | None = None
    ) -> tuple[Array, Array]:
        xs: list[Array] = []
        ys: list[Array] = []
        before, shape = self.bytes_read, None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.request.seed)
            for number, item in enumerate(_with_errors(source, where)):
                what = f"{where}: {'batch' if batched else 'sample'} {number}"
                x, y = _x_and_y(item, what) if self.request.targets.given else (_x_alone(item, what), np.zeros(0))
                sample_shape = x.shape[1:] if batched else x.shape
                if shape is None:
                    shape = sample_shape
                    if expected is not None and not batched:
                        self._check(expected * x.size * FLOAT32_BYTES, where)  # before reading what cannot fit
                if sample_shape != shape:
                    which = f"the samples of batch {number} have" if batched else f"sample {number} has"
                    raise DataError(
                        f"{where}: {which} the shape {sample_shape}, the first has {shape}; every sample needs the "
                        "same, so crop, pad or resize in the dataset"
                    )
                self._count(x.size * FLOAT32_BYTES, where)
                xs.append(x)
                ys.append(y)
        if not xs:
            raise DataError(f"{where} gave no samples; give at least a few of every class")
        x, y = (np.concatenate(xs), np.concatenate(ys)) if batched else (np.stack(xs), np.stack(ys))
        self.request.report(f"{where}: {len(x):,} samples, {(self.bytes_read - before) / 1e6:.1f} MB read into memory")
        return x, y

    def _count(self, size_bytes: int, where: str) -> None:
        self._check(size_bytes, where)
        self.bytes_read += size_bytes

    def _check(self, size_bytes: int, where: str) -> None:
        limit, total = self.request.limit_bytes, self.bytes_read + size_bytes
        if total > limit:
            raise DataError(
                f"{where} needs more than {limit / GIB:.3g} GiB in memory ({total / GIB:.3g} GiB so far), which is the "
                "limit (limit_bytes); give fewer or smaller samples, a subset is enough for a search"
            )


def _with_errors(source: Iterable[object], where: str) -> Iterator[object]:
    """The items of the user's object; an error raised inside it becomes a DataError that says where."""
    try:
        yield from source
    except BitfrontError:
        raise
    except Exception as error:
        raise DataError(f"{where}: reading the samples failed: {one_line(error)}") from error


def _batches(loader: DataLoader[Any], where: str) -> Iterator[object]:
    if loader.batch_size is None and loader.batch_sampler is None:
        raise DataError(f"{where}: the DataLoader has batch_size=None; give it a batch size, or give its dataset")
    yield from loader


def _items(dataset: TorchDataset[Any]) -> Iterator[object]:
    length = _length(dataset)
    if length is None:
        yield from cast(Iterable[object], dataset)
    else:
        # By index: iterating over a map-style dataset relies on an IndexError at its end, which many do not raise.
        for index in range(length):
            yield dataset[index]


def _length(dataset: TorchDataset[Any]) -> int | None:
    return None if isinstance(dataset, torch.utils.data.IterableDataset) else len(cast(Sequence[object], dataset))


def _x_and_y(item: object, where: str) -> tuple[Array, Array]:
    if not isinstance(item, tuple | list) or len(item) != 2:
        keys = f" with the keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else ""
        length = f" of {len(item)}" if isinstance(item, tuple | list) else ""
        raise DataError(f"{where} is a {type(item).__name__}{length}{keys}; needed is (x, y), features and label")
    return _copied(item[0], f"x of {where}"), _copied(item[1], f"y of {where}")


def _x_alone(item: object, where: str) -> Array:
    """The features of an item that is x, or (x, ...)."""
    return _copied(item[0] if isinstance(item, tuple | list) and item else item, f"x of {where}")


def _copied(value: object, what: str) -> Array:
    """A copy of `value` as an array: workers and datasets may reuse the memory of a sample."""
    array = np.array(to_numpy(value, what))
    if isinstance(value, torch.Tensor):
        return array
    if array.dtype.kind not in "fiubUS":
        raise DataError(f"{what} is a {type(value).__name__}, not numbers; convert it in the dataset")
    return array
