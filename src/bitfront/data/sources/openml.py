"""Tables of OpenML, by their number or name: read, cached and downloaded by scikit-learn's ``fetch_openml``."""

from __future__ import annotations

import warnings
from typing import Any
from urllib.error import HTTPError, URLError

import numpy as np

from bitfront import libraries
from bitfront.config import settings_of
from bitfront.data.base import DataRequest, Dataset
from bitfront.data.raw import Array
from bitfront.data.sources import SOURCES
from bitfront.data.tables import SETTINGS, TableSettings, table_dataset
from bitfront.errors import DataError, DownloadError, UnknownNameError, cause, require


@SOURCES.register("openml", settings=TableSettings)
def openml(name: str, request: DataRequest) -> Dataset:
    """a table of OpenML by number or name, e.g. openml:42468 (extra openml)

    Raises:
        UnknownNameError: OpenML has no such table.
        DownloadError: it is not in scikit-learn's cache, and cannot be downloaded.
        DataError: a column has gaps, or cannot be used.
        MissingExtraError: scikit-learn or pandas is not installed.
    """
    purpose = f"dataset = 'openml:{name}'"
    library = require("sklearn.datasets", "openml", purpose)
    require("pandas", "openml", purpose)
    settings = settings_of(TableSettings, request.settings, SETTINGS)
    home = str(request.path) if request.path is not None else library.get_data_home()
    wanted: dict[str, Any] = {"data_id": int(name)} if name.isdigit() else {"name": name, "version": "active"}
    # A target that the settings name may be any column: then all are features first.
    target = {"target_column": None} if settings.target_column else {}
    try:
        with libraries.without_output(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of retries; the error below says what happened
            table = library.fetch_openml(**wanted, **target, as_frame=True, parser="auto", data_home=home)
    except (HTTPError, ValueError) as error:
        raise UnknownNameError(f"OpenML has no table {name!r}: {cause(error)}", key=("dataset",)) from error
    except (URLError, OSError) as error:
        remedy = (
            f'run `python -c "from sklearn.datasets import fetch_openml; fetch_openml({_call(wanted)})"` on a machine '
            "with one and copy scikit_learn_data/openml there to the same folder here (SCIKIT_LEARN_DATA or "
            "dataset_path names another one)"
        )
        raise DownloadError(
            libraries.offline(f"the files of openml:{name}", f"{home}/openml", error, remedy)
        ) from error
    frame = table.frame
    usual = None if settings.target_column else _target(table, name)
    columns = {
        str(key): _column(frame[key], str(key), name) for key in frame.columns if key not in settings.drop_columns
    }
    return table_dataset(
        {None: columns},
        request,
        settings,
        name=str(table.details.get("name", name)),
        source=f"OpenML {table.details.get('id', name)}",
        target=usual,
    )


def _call(wanted: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in wanted.items())


def _target(table: Any, name: str) -> str | None:
    """The column that OpenML says is the target; None if it names none. Raises DataError where it names several."""
    given = list(table.target_names or [])
    if len(given) > 1:
        raise DataError(f"openml:{name} has several targets ({', '.join(given)}); name one: target_column = ...")
    return given[0] if given else None


def _column(series: Any, key: str, name: str) -> Array:
    """The values of a column. Raises DataError where one is missing."""
    empty = series.isna().to_numpy()
    if empty.any():
        raise DataError(
            f"openml:{name}: column {key!r} has no value in row {int(np.flatnonzero(empty)[0])} (the first of "
            f"{int(empty.sum()):,}); leave the column out with drop_columns in [dataset_settings]"
        )
    values = series.to_numpy()
    if values.dtype.kind in "fiub":
        return np.asarray(values)
    return np.asarray(values).astype(str)
