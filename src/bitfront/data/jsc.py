"""LHC jet substructure classification: 16 features of a jet, 5 kinds of particle that can cause it.

Two published data sets and one re-simulation share these columns: OpenML 42468 as ARFF, CERNBox's
``t_allpar_new`` table as HDF5, and .npz. All of them are read here. They must not be mixed in one table of
results; the name and the source of the dataset say which one it is.

* **Classes are always g, q, w, z, t.** OpenML orders them g, q, t, w, z. A label is therefore mapped by the
  *name* of its class, and a file that does not name its classes is refused. A wrong order would show as 33 %
  accuracy.
* Features are taken by name too, into the order of ``FEATURES``; a leading ``j_`` is dropped.
* Features are standardised with the training split's statistics. A file with ``train_mean`` and
  ``train_scale`` brings the published scaler: its rows are a test split, standardised with that scaler, and
  there is no train split.
* Repeated rows are kept, because the published figures count them. They stay together when the split is cut
  here.

The file comes from ``dataset_path`` (a file or a folder), else from the folder ``BITFRONT_DATA``, else from the
cache folder; else it is downloaded to the cache folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bitfront.cache import cache_dir
from bitfront.data import DATASETS
from bitfront.data.arrays import from_arrays, from_splits
from bitfront.data.base import DataRequest, Dataset
from bitfront.data.download import download, fetch_json
from bitfront.data.jsc_columns import CLASSES, FEATURES
from bitfront.data.jsc_files import read_jets
from bitfront.errors import DataError, DownloadError, one_of

OPENML_URL = "https://www.openml.org/api/v1/json/data/42468"
ARFF_NAME = "hls4ml_lhc_jets_hlf.arff"
FILE_NAMES = (
    "jsc.npz",
    ARFF_NAME,
    "jsc.arff",
    "processed-pythia82-lhc13-all-pt1-50k-r1_h022_e0175_t220_nonu_truth.z",
    "jsc.h5",
    "jsc.hdf5",
)


@DATASETS.register("jsc", "jet-substructure", sample_shape=(16,), num_classes=5)
def jsc(request: DataRequest) -> Dataset:
    """LHC jet substructure: 16 features, classes g, q, w, z, t; from a local file, or downloaded once.

    x is (samples, 16), standardised. Splits of the file are kept; otherwise 70/15/15, stratified, from the
    seed.

    Raises:
        DataError: there is no such file, or a feature or class is missing in it.
        DownloadError: there is no local file, and the download failed.
        MissingExtraError: the file is HDF5 and h5py is not installed.
    """
    path = _file(request)
    table = read_jets(path, request.report)
    common: dict[str, Any] = {
        "name": table.name,
        "class_names": CLASSES,
        "feature_names": FEATURES,
        "source": str(path),
    }
    if table.scaler is not None:
        pairs = list(table.splits.values())
        note = "test only: standardised with the scaler in the file"
        return from_splits({"test": pairs[0]}, standardise=table.scaler, test_only=True, notes=[note], **common)
    if None in table.splits:
        return from_arrays(*table.splits[None], standardise=True, seed=request.seed, **common)
    splits = {str(split): pair for split, pair in table.splits.items()}
    return from_splits(splits, standardise=True, seed=request.seed, **common)


def _file(request: DataRequest) -> Path:
    """The local file, downloaded where there is none."""
    if request.path is not None:
        return request.path if not request.path.is_dir() else _in_dataset_path(request.path)
    variable = os.environ.get("BITFRONT_DATA")
    if variable:
        folder = Path(variable).expanduser()
        if not folder.is_dir():
            raise DataError(
                f"BITFRONT_DATA is {variable!r}, which is not a folder; name the folder that holds the data"
            )
        path = _first_known(folder)
        if path is not None:
            return path
    return _first_known(cache_dir()) or _download(request)


def _first_known(folder: Path) -> Path | None:
    return next((folder / name for name in FILE_NAMES if (folder / name).is_file()), None)


def _in_dataset_path(folder: Path) -> Path:
    path = _first_known(folder)
    if path is None:
        raise DataError(
            f"dataset_path is the folder {folder}, which holds no file of the jet data; {one_of(FILE_NAMES)}. Or name "
            "the file itself"
        )
    return path


def _download(request: DataRequest) -> Path:
    target = cache_dir() / ARFF_NAME
    advice = (
        f"Without a network: get {ARFF_NAME} (OpenML data set 42468) on another machine and put it at {target}, or "
        "give its path as dataset_path, or put it in a folder and set BITFRONT_DATA to that folder"
    )
    page = os.environ.get("BITFRONT_OPENML_URL") or OPENML_URL
    description = fetch_json(page, advice=advice).get("data_set_description")
    url = description.get("url") if isinstance(description, dict) else None
    if not isinstance(description, dict) or not isinstance(url, str):
        raise DownloadError(f"{page} names no file to download (data_set_description.url). {advice}")
    md5 = description.get("md5_checksum")
    request.report(f"downloading the jet data (OpenML 42468) from {url} to {target}")
    checksum = f"md5:{md5.lower()}" if isinstance(md5, str) and md5 else None
    return download(url, target, checksum=checksum, progress=request.progress, advice=advice)
