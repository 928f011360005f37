"""Datasets of the Hugging Face hub, its cache, or a folder: texts, images, or columns of numbers, with a label.

They are read by the library ``datasets``, which runs no code of a dataset. A folder is one that ``save_to_disk`` wrote,
or one with Parquet, CSV or JSON files. ``datasets`` reads Arrow files that are mapped, so with ``memory_map = true``
images and arrays larger than memory are never in it as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from bitfront import libraries
from bitfront.config import settings_of
from bitfront.data.base import DataRequest, Dataset, Split
from bitfront.data.images import SETTINGS, ImageSettings, preparation
from bitfront.data.items import Items, dataset_of_items
from bitfront.data.raw import Array
from bitfront.data.sources import SOURCES
from bitfront.data.splitting import known_split
from bitfront.data.tables import TableSettings, table_dataset
from bitfront.errors import BitfrontError, ConfigError, DataError, DownloadError, cause, one_of, require

#: Kinds of a column.
IMAGE, ARRAY, PLAIN = "image", "array", "plain"


class HubSettings(ImageSettings, TableSettings):
    """Settings of datasets of the hub: of images or of tables, and which part of the dataset."""

    subset: str | None = Field(None, description="the configuration of a dataset that has several, e.g. `sst2` of glue")


@SOURCES.register("hf", settings=HubSettings)
def hf(name: str, request: DataRequest) -> Dataset:
    """texts, images or numbers of the Hugging Face hub, e.g. hf:ag_news, or of a folder: hf:./mine (extra hf)

    Raises:
        DownloadError: it is neither in the cache of the hub nor can be downloaded.
        DataError: it has no column that can be used.
        ConfigError: which column is the label, or the text, is not clear.
        MissingExtraError: datasets is not installed.
    """
    library = require("datasets", "hf", f"dataset = 'hf:{name}'")
    settings = settings_of(HubSettings, request.settings, SETTINGS)
    parts = _parts(library, name, settings, request)
    source = f"hf:{name}"
    first = next(iter(parts.values()))
    kinds = {key: _kind(library, feature) for key, feature in first.features.items()}
    label, names = _label(library, first, settings, request, source)
    special = [key for key, kind in kinds.items() if kind != PLAIN and key != label]
    called = name.rstrip("/").rpartition("/")[2]
    if special:
        return _of_items(parts, special[0], kinds[special[0]], label, names, request, settings, called, source)
    if settings.memory_map:
        raise ConfigError(f"{source} has no images or arrays, and texts and tables are read into memory; remove it",
                          key=(*SETTINGS, "memory_map"))  # fmt: skip
    tables: dict[Split | None, Mapping[str, Array]] = {
        split: _columns(_few(part, settings, request), settings) for split, part in parts.items()
    }
    return table_dataset(tables, request, settings, name=called, source=source, target=label, class_names=names)


def _parts(library: Any, name: str, settings: HubSettings, request: DataRequest) -> dict[Split | None, Any]:
    """The parts by split; under None where there is one part. Raises DataError."""
    given = _opened(library, name, settings, request)
    if not isinstance(given, Mapping):
        return {None: given}
    parts: dict[Split | None, Any] = {}
    for key, part in given.items():
        if (split := known_split(key)) is not None:
            parts[split] = part
    if request.targets.given and "test" in parts:
        # Benchmarks hide the labels of their test split: they are all -1.
        hidden = _hidden(library, parts["test"])
        if hidden:
            del parts["test"]
    if len(given) == 1:
        return {None: next(iter(given.values()))}
    if "train" not in parts:
        raise DataError(f"hf:{name} has the splits {', '.join(given)}, and needed is train; write a factory")
    return parts


def _hidden(library: Any, part: Any) -> bool:
    return any(
        isinstance(feature, library.ClassLabel) and len(part) and max(part[key]) < 0
        for key, feature in part.features.items()
    )


def _opened(library: Any, name: str, settings: HubSettings, request: DataRequest) -> Any:
    """What ``datasets`` gives: of a folder, of the cache if it is there, else downloaded. Raises DownloadError."""
    if name.startswith((".", "/", "~")):
        return _of_folder(library, Path(name).expanduser(), settings)
    cache = str(request.path) if request.path is not None else None
    try:
        with libraries.without_output():
            return library.load_dataset(name, settings.subset, cache_dir=cache)
    except Exception as error:
        if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
            raise ConfigError(
                f"hf:{name}: {cause(error)}; set subset in [dataset_settings]", key=(*SETTINGS, "subset")
            ) from error
        remedy = (
            f"run `python -c \"import datasets; datasets.load_dataset('{name}').save_to_disk('FOLDER')\"` on a machine "
            "with one, copy that folder here, and write dataset = 'hf:./FOLDER'"
        )
        where = f"the cache {library.config.HF_DATASETS_CACHE}"
        raise DownloadError(libraries.offline(f"the files of hf:{name}", where, error, remedy)) from error


def _of_folder(library: Any, folder: Path, settings: HubSettings) -> Any:
    """The dataset in a folder. Raises DataError."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; write hf:NAME for a dataset of the hub")
    saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        with libraries.without_output():
            if saved:
                return library.load_from_disk(str(folder))
            return library.load_dataset(str(folder), settings.subset)
    except Exception as error:
        raise DataError(
            f"{folder} cannot be read by datasets: {cause(error)}; it is a folder that save_to_disk wrote, or one with "
            "Parquet, CSV or JSON files"
        ) from error


def _kind(library: Any, feature: Any) -> str:
    if isinstance(feature, library.Image):
        return IMAGE
    return PLAIN if isinstance(feature, library.Value | library.ClassLabel) else ARRAY


def _label(
    library: Any, part: Any, settings: HubSettings, request: DataRequest, source: str
) -> tuple[str | None, list[str]]:
    """(the column that is the label, names of classes). Raises ConfigError where it is not clear."""
    if not request.targets.given:
        return settings.target_column, []
    classes = [key for key, feature in part.features.items() if isinstance(feature, library.ClassLabel)]
    if settings.target_column is not None:
        label = settings.target_column
        if label not in part.features:
            raise ConfigError(f"{source} has no column {label!r}; {one_of(part.features)}",
                              key=(*SETTINGS, "target_column"))  # fmt: skip
    elif len(classes) == 1:
        label = classes[0]
    elif "label" in part.features:
        label = "label"
    else:
        raise ConfigError(
            f"{source}: which column is the label is not clear; name it with target_column ({one_of(part.features)})",
            key=(*SETTINGS, "target_column"),
        )
    feature = part.features[label]
    return label, list(feature.names) if isinstance(feature, library.ClassLabel) else []


def _few(part: Any, settings: HubSettings, request: DataRequest) -> Any:
    """At most ``samples`` rows of a table, drawn with the seed."""
    count = len(part)
    if settings.samples is None or settings.samples >= count:
        return part
    rows = np.random.default_rng([request.seed, count]).permutation(count)[: settings.samples]
    return part.select(np.sort(rows).tolist())


def _columns(part: Any, settings: HubSettings) -> dict[str, Array]:
    table = part.with_format(None)
    return {key: np.array(list(table[key])) for key in part.column_names if key not in settings.drop_columns}


def _of_items(
    parts: Mapping[Split | None, Any],
    column: str,
    kind: str,
    label: str | None,
    names: list[str],
    request: DataRequest,
    settings: HubSettings,
    name: str,
    source: str,
) -> Dataset:
    """A dataset of images, or of arrays of one shape."""
    how = preparation(settings, request) if kind == IMAGE else None
    splits: dict[Split | None, Items] = {}
    for split, part in parts.items():

        def read(row: int, part: Any = part) -> Array:
            try:
                value = part[row][column]
            except Exception as error:
                if isinstance(error, BitfrontError):
                    raise
                raise DataError(f"{source}: row {row} cannot be read: {cause(error)}") from error
            return how.sample(value) if how is not None else np.asarray(value, dtype=np.float32)

        y = np.array(list(part[label])) if label else np.zeros(len(part), dtype=np.int64)
        splits[split] = Items(y, read, f"{part._fingerprint} {len(part)} {column}")
    notes = [how.note] if how is not None else [f"column {column!r}, as it is"]
    return dataset_of_items(splits, request, settings, name=name, source=source, class_names=names, notes=notes)
