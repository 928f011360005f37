"""Datasets of torchvision that are images with a class: read, and downloaded, by torchvision's own classes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from bitfront import libraries
from bitfront.cache import cache_dir
from bitfront.config import settings_of
from bitfront.data.base import DataRequest, Dataset, Split
from bitfront.data.images import SETTINGS, ImageSettings, Prepared, preparation
from bitfront.data.items import Items, dataset_of_items
from bitfront.data.sources import SOURCES
from bitfront.errors import DownloadError, UnknownNameError

Arguments = Mapping[str, Any]
_FLAG: Mapping[Split | None, Arguments] = {"train": {"train": True}, "test": {"train": False}}


def _splits(
    train: str = "train", val: str | None = None, test: str | None = "test"
) -> Mapping[Split | None, Arguments]:
    named: dict[Split | None, str | None] = {"train": train, "val": val, "test": test}
    return {split: {"split": word} for split, word in named.items() if word is not None}


#: Class → the arguments of each split; under None where it has no splits.
KNOWN: Mapping[str, Mapping[Split | None, Arguments]] = MappingProxyType(
    {
        **dict.fromkeys(("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "QMNIST", "USPS"), _FLAG),
        **dict.fromkeys(("SVHN", "STL10", "Food101", "GTSRB"), _splits()),
        **dict.fromkeys(("Flowers102", "DTD", "PCAM", "FGVCAircraft", "RenderedSST2"), _splits(val="val")),
        "OxfordIIITPet": _splits("trainval"),
        "Country211": _splits(val="valid"),
        "Imagenette": _splits(val="val", test=None),
        **{name: {None: {}} for name in ("EuroSAT", "SEMEION")},
    }
)


@SOURCES.register("torchvision", settings=ImageSettings)
def torchvision(name: str, request: DataRequest) -> Dataset:
    """images of torchvision, e.g. torchvision:CIFAR10 (extra torchvision)

    Raises:
        UnknownNameError: torchvision has no such classification of images.
        DownloadError: the files are not there, and cannot be downloaded.
        MissingExtraError: torchvision is not installed.
    """
    library = libraries.torchvision(f"dataset = 'torchvision:{name}'", "torchvision.datasets")
    if name not in KNOWN:
        hint = libraries.near(name, KNOWN, "torchvision.datasets")
        raise UnknownNameError(
            f"torchvision has no dataset {name!r} that is a classification of images.{hint} For others write a "
            "factory: dataset = 'my_data:make'",
            key=("dataset",),
        )
    settings = settings_of(ImageSettings, request.settings, SETTINGS)
    how = preparation(settings, request)
    opened = {split: _opened(library, name, arguments, request) for split, arguments in KNOWN[name].items()}
    names = [str(n) for n in getattr(next(iter(opened.values())), "classes", ())]
    splits = {split: _items(data, how) for split, data in opened.items()}
    source = f"torchvision's {name}"
    return dataset_of_items(splits, request, settings, name=name, source=source, class_names=names, notes=[how.note])


def _opened(library: Any, name: str, arguments: Arguments, request: DataRequest) -> Any:
    """One split, from its folder or downloaded into it. Raises DownloadError."""
    root = request.path or cache_dir() / "torchvision"
    kind = getattr(library, name)
    with libraries.without_output():
        try:
            return kind(str(root), download=False, **arguments)
        except (RuntimeError, FileNotFoundError):
            request.report(f"downloading torchvision's {name} to {root}")
        try:
            root.mkdir(parents=True, exist_ok=True)
            return kind(str(root), download=True, **arguments)
        except Exception as error:
            remedy = (
                f"run `python -c \"import torchvision; torchvision.datasets.{name}('FOLDER', download=True)\"` on a "
                f"machine with one, and copy that folder to {root}, or name it with dataset_path"
            )
            raise DownloadError(
                libraries.offline(f"the files of torchvision's {name}", str(root), error, remedy)
            ) from error


def _items(data: Any, how: Prepared) -> Items:
    labels = _labels(data)
    return Items(labels, lambda row: how.sample(data[row][0]), f"{type(data).__name__} {len(data)} {data.root}")


def _labels(data: Any) -> np.ndarray[Any, Any]:
    """The class of each sample; without reading the images where torchvision keeps classes beside them."""
    for attribute in ("targets", "labels", "_labels"):
        values = getattr(data, attribute, None)
        if values is not None and np.ndim(values) == 1 and len(values) == len(data):
            return np.asarray(values)
    return np.array([int(data[row][1]) for row in range(len(data))])
