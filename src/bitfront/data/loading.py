"""Opens a dataset: by its registered name, of a library, by its path, or from the user's factory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitfront.data import DATASETS
from bitfront.data.base import DataRequest, Dataset
from bitfront.data.factory import load_factory
from bitfront.data.sources import SOURCES
from bitfront.errors import ConfigError, DataError, UnknownNameError, nearest

#: Ending of a file → the dataset that reads it.
FILES = {".npz": "npz", ".csv": "csv", ".parquet": "parquet"}


def load_dataset(name: str, request: DataRequest | None = None) -> Dataset:
    """The dataset called `name`.

    Args:
        name: as ``bitfront list datasets`` shows it; ``prefix:name`` of a library (``torchvision:CIFAR10``), whose
            prefix is among ``data.sources.SOURCES``; the path of a folder of images or of ``.npy`` files, or of
            an ``.npz``, ``.csv`` or ``.parquet`` file; or ``package.module:factory`` for the user's data.
        request: from where, and split by which seed; the defaults of :class:`DataRequest` where None.

    Raises:
        UnknownNameError: no dataset has that name.
        ConfigError: the factory's module or function does not exist, or a setting is not one of this dataset.
        DataError: the data does not exist, or cannot be read or split.
        MissingExtraError: the library is not installed.
    """
    request = request or DataRequest()
    if request.path is not None:
        request = replace(request, path=request.path.expanduser())
    prefix, colon, rest = name.partition(":")
    if colon and prefix in SOURCES.names():
        return _noted(SOURCES.get(prefix)(rest, request), request, prepares=True)
    if is_path(name):
        if request.path is not None:
            raise DataError(f"dataset = {name!r} is a path, and dataset_path is {request.path}; leave one of them out")
        path = Path(name).expanduser()
        name, request = reader_of(path), replace(request, path=path)
    elif colon:
        _refuse_settings(name, request)
        return _noted(load_factory(name, request), request)
    reader = _registered(name)
    if "settings" not in DATASETS.facts(name):
        _refuse_settings(name, request)
    return _noted(reader(request), request, prepares="settings" in DATASETS.facts(name))


def _registered(name: str) -> Callable[[DataRequest], Dataset]:
    """The registered dataset of that name. Raises UnknownNameError."""
    try:
        return DATASETS.get(name)
    except UnknownNameError as error:
        if not nearest(name, DATASETS.names()):
            prefixes = " or ".join(f"{prefix}:" for prefix in SOURCES.names())
            here = [path.name for path in Path.cwd().iterdir() if path.is_dir()]
            error.message += f" There is no folder {name!r} here either.{nearest(name, here)}"
            error.message += f" Data of a library has a prefix, {prefixes}, such as torchvision:CIFAR100"
        raise


def is_path(name: str) -> bool:
    """Whether the name of a dataset is a path: of a folder or file that is there, or written as one."""
    if name in DATASETS:
        return False
    try:
        there = Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, or not a name of a file at all
        return False
    if ":" in name or not ("/" in name or Path(name).suffix.lower() in FILES):
        return there
    return True


def reader_of(path: Path) -> str:
    """The name of the dataset that reads a path, by its ending or by what is in the folder. Raises DataError."""
    if path.suffix.lower() in FILES and not path.is_dir():
        return FILES[path.suffix.lower()]
    if not path.is_dir():
        raise DataError(
            f"there is no folder {path}, and as a file it is none of {', '.join(FILES)}; a dataset is a name "
            "(bitfront list datasets), a path, or package.module:factory"
        )
    names = [entry.name.lower() for entry in path.iterdir()]
    if "x_train.npy" in names:
        return "npy"
    return next((FILES[ending] for ending in (".csv", ".parquet") if f"train{ending}" in names), "image-folder")


def _refuse_settings(name: str, request: DataRequest) -> None:
    if request.settings:
        given = ", ".join(request.settings)
        raise ConfigError(
            f"dataset {name!r} has no settings, and [dataset_settings] has {given}; remove the table",
            key=("dataset_settings",),
        )


def _noted(dataset: Dataset, request: DataRequest, *, prepares: bool = False) -> Dataset:
    """The dataset, with a note where a model needs other samples than it is given."""
    needs: Any = request.needs
    if needs is None or prepares or needs.tokenizer or not needs.mean:
        return dataset
    mean, std = (" ".join(f"{v:g}" for v in values) for values in (needs.mean, needs.std))
    note = (
        f"{needs.origin} takes images of {needs.size[0]} x {needs.size[1]} pixels less a mean of {mean}, divided by "
        f"{std}; the samples of {dataset.name!r} are used as they are"
    )
    return replace(dataset, notes=(*dataset.notes, note))
