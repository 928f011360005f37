"""Opens a dataset by its registered name, or from the user's factory."""

from __future__ import annotations

from dataclasses import replace

from bitfront.data import DATASETS
from bitfront.data.base import DataRequest, Dataset
from bitfront.data.factory import load_factory


def load_dataset(name: str, request: DataRequest | None = None) -> Dataset:
    """The dataset called `name`: a registered one, or ``package.module:factory``.

    Args:
        name: as ``bitfront list datasets`` shows it, or ``package.module:factory`` for the user's data.
        request: from where, and split by which seed; the defaults of :class:`DataRequest` where None.

    Raises:
        UnknownNameError: no dataset has that name.
        ConfigError: the factory's module or function does not exist.
        DataError: the data does not exist, or cannot be read or split.
    """
    request = request or DataRequest()
    if request.path is not None:
        request = replace(request, path=request.path.expanduser())
    if ":" in name:
        return load_factory(name, request)
    return DATASETS.get(name)(request)
