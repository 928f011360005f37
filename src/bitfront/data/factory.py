"""The user's own data: ``dataset = "package.module:factory"``, or any object that holds samples.

The factory is called without arguments and returns (x, y), splits of such pairs, a torch ``Dataset`` or a
``DataLoader``, or splits of these. Samples are read into memory once, in the order they come, and a search
then runs on resident tensors. Features are used as the factory gives them (uint8 divided by 255): whoever
writes a factory has prepared the data for the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from bitfront.data.arrays import from_arrays, from_splits, split_name
from bitfront.data.base import GIB, DataRequest, Dataset, Split
from bitfront.errors import BitfrontError, ConfigError, DataError
from bitfront.registry import import_object, one_line

Array = npt.NDArray[Any]

RETURNS = (
    "allowed: (x, y); a dict {'train': ..., 'val': ..., 'test': ...} or a tuple (train, test) or (train, "
    "val, test) of "
    "such pairs; a torch Dataset or DataLoader of (x, y); or a dict or tuple of these"
)
FLOAT32_BYTES = 4


def load_factory(spec: str, request: DataRequest) -> Dataset:
    """The dataset that ``package.module:factory`` makes. The working directory is importable.

    Raises:
        ConfigError: `spec` is malformed, or its module or function does not exist.
        DataError: the module or the factory fails, or returns what cannot be read, or more than
            ``request.limit_bytes``.
    """
    if request.path is not None:
        raise DataError(
            f"dataset = {spec!r} is a factory, which finds its own files, but dataset_path is "
            f"{request.path}; leave "
            "dataset_path out"
        )
    factory = import_object(spec, "dataset")
    if not callable(factory):
        raise ConfigError(
            f"dataset {spec!r} is a {type(factory).__name__}; needed is a function that returns the data",
            key=("dataset",),
        )
    try:
        made = factory()
    except BitfrontError:
        raise
    except Exception as error:
        raise DataError(f"the factory {spec} failed: {one_line(error)}") from error
    return from_object(made, request, name=spec.partition(":")[2], source=spec)


def from_object(value: object, request: DataRequest | None = None, *, name: str, source: str) -> Dataset:
    """The dataset in `value`: (x, y), splits, a torch ``Dataset``, a ``DataLoader``, or a Bitfront
    ``Dataset``.

    A tuple is (x, y) when its parts are arrays and (train, test) or (train, val, test) when they are pairs,
    datasets or loaders. Splits that are missing are cut (see :mod:`bitfront.data.arrays`). A loader is
    iterated once, with torch seeded by the request, so its shuffling is the same every time.

    Raises:
        DataError: `value` is none of these, a sample is not (x, y) or has another shape than the first, or
            the samples take more than ``request.limit_bytes`` as float32.
    """
    request = request or DataRequest()
    if isinstance(value, Dataset):
        return value
    reader = _ItemReader(request, source)
    common: dict[str, Any] = {"name": name, "seed": request.seed, "source": source}
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
                raise DataError(f"{source}: the {split} split is given twice, as {', '.join(map(repr, value))}")
            parts[split] = part
        return parts
    if isinstance(value, tuple | list) and value and all(_is_part(part) for part in value):
        if len(value) in (2, 3):
            names: tuple[Split, ...] = ("train", "test") if len(value) == 2 else ("train", "val", "test")
            return dict(zip(names, value, strict=True))
        raise DataError(f"{source}: got a {type(value).__name__} of {len(value)} splits; {RETURNS}")
    return None


def _is_part(value: object) -> bool:
    """Whether `value` holds samples of its own: a dataset, a loader or a pair of arrays."""
    return isinstance(value, TorchDataset | DataLoader) or (
        isinstance(value, tuple | list) and len(value) == 2 and all(_is_array(v) for v in value)
    )


def _is_array(value: object) -> bool:
    return isinstance(value, torch.Tensor) or hasattr(value, "__array__")


class _ItemReader:
    """Reads parts into arrays, and keeps count of the memory they take together."""

    def __init__(self, request: DataRequest, source: str) -> None:
        self.request, self.source, self.taken = request, source, 0

    def pair(self, value: object, split: str) -> tuple[Any, Any]:
        """(x, y) of one part."""
        where = f"{self.source}, {split}" if split else self.source
        if isinstance(value, DataLoader):
            return self._samples(_batches(value, where), where, batched=True)
        if isinstance(value, TorchDataset):
            return self._samples(_items(value), where, batched=False, expected=_length(value))
        if isinstance(value, tuple | list) and len(value) == 2:
            x, y = value
            size = x.numel() if isinstance(x, torch.Tensor) else np.size(x) if _is_array(x) else 0
            self._take(size * FLOAT32_BYTES, where)
            return x, y
        got = f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple | list) else "")
        raise DataError(f"{where}: cannot read {got} as samples; {RETURNS}")

    def _samples(
        self, source: Iterable[object], where: str, *, batched: bool, expected: int | None = None
    ) -> tuple[Array, Array]:
        xs: list[Array] = []
        ys: list[Array] = []
        before, shape = self.taken, None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.request.seed)
            for number, item in enumerate(self._guarded(source, where)):
                x, y = _x_and_y(item, f"{where}: {'batch' if batched else 'sample'} {number}")
                own = x.shape[1:] if batched else x.shape
                if shape is None:
                    shape = own
                    if expected is not None and not batched:
                        self._check(expected * x.size * FLOAT32_BYTES, where)  # before reading what cannot fit
                if own != shape:
                    raise DataError(
                        f"{where}: {'samples of batch' if batched else 'sample'} {number} have the shape "
                        f"{own}, the "
                        f"first {shape}; every sample needs the same, so crop, pad or resize in the dataset"
                    )
                self._take(x.size * FLOAT32_BYTES, where)
                xs.append(x)
                ys.append(y)
        if not xs:
            raise DataError(f"{where} gave no samples; give at least a few of every class")
        x, y = (np.concatenate(xs), np.concatenate(ys)) if batched else (np.stack(xs), np.stack(ys))
        self.request.report(f"{where}: {len(x):,} samples, {(self.taken - before) / 1e6:.1f} MB read into memory")
        return x, y

    def _guarded(self, source: Iterable[object], where: str) -> Iterator[object]:
        """The items of the user's object; what goes wrong inside it is said to be there."""
        try:
            yield from source
        except BitfrontError:
            raise
        except Exception as error:
            raise DataError(f"{where}: reading the samples failed: {one_line(error)}") from error

    def _take(self, size_bytes: int, where: str) -> None:
        self._check(size_bytes, where)
        self.taken += size_bytes

    def _check(self, size_bytes: int, where: str) -> None:
        limit = self.request.limit_bytes
        if self.taken + size_bytes > limit:
            raise DataError(
                f"{where} needs more than {limit / GIB:.3g} GiB in memory "
                f"({(self.taken + size_bytes) / GIB:.3g} GiB "
                "so far), which is the limit (limit_bytes); give fewer or smaller samples, a subset is "
                "enough for a "
                "search"
            )


def _batches(loader: DataLoader[Any], where: str) -> Iterator[object]:
    if loader.batch_size is None and loader.batch_sampler is None:
        raise DataError(f"{where}: the DataLoader has batch_size=None; give it a batch size, or give its dataset")
    yield from loader


def _items(dataset: TorchDataset[Any]) -> Iterator[object]:
    length = _length(dataset)
    if length is None:
        yield from cast(Iterable[object], dataset)
    else:
        # By index: iterating a map-style dataset relies on an IndexError at its end, which many do not raise.
        for index in range(length):
            yield dataset[index]


def _length(dataset: TorchDataset[Any]) -> int | None:
    return None if isinstance(dataset, torch.utils.data.IterableDataset) else len(cast(Sequence[object], dataset))


def _x_and_y(item: object, where: str) -> tuple[Array, Array]:
    if not isinstance(item, tuple | list) or len(item) != 2:
        keys = f" with the keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else ""
        many = f" of {len(item)}" if isinstance(item, tuple | list) else ""
        raise DataError(f"{where} is a {type(item).__name__}{many}{keys}; needed is (x, y), features and label")
    return _array(item[0], f"x of {where}"), _array(item[1], f"y of {where}")


def _array(value: object, what: str) -> Array:
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        # A copy: workers and datasets may reuse the memory of a sample.
        return np.array((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())
    array = np.array(value)
    if array.dtype.kind not in "fiubUS":
        raise DataError(f"{what} is a {type(value).__name__}, not numbers; convert it in the dataset")
    return array
