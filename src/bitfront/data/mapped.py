"""Arrays larger than memory: ``dataset = "npy"`` with a folder of ``.npy`` files, which are mapped and not read.

The folder has ``x_train.npy``, ``y_train.npy``, and the same of val and test. The features must be float32 as the model
takes them: nothing is divided, standardised or split, since that would be a copy. A batch of a training reads its rows;
the samples that candidates are evaluated on are copied out once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from bitfront.config import Table, settings_of
from bitfront.data import DATASETS
from bitfront.data.base import SPLITS, DataRequest, Dataset, Split, mapped_tensor
from bitfront.data.raw import Array
from bitfront.errors import DataError, parsing

#: Values that are looked at together.
_BLOCK = 1 << 24


class MappedSettings(Table):
    """Settings of arrays that are mapped."""

    class_names: list[str] = Field([], description="the name of each class, by index; default: their numbers")


@DATASETS.register("npy", settings=MappedSettings)
def npy(request: DataRequest) -> Dataset:
    """Arrays larger than memory: a folder with x_train.npy (float32), y_train.npy and so on: dataset_path names it.

    Raises:
        DataError: a file is missing or no array, features are not float32, or a value is not finite.
    """
    folder = request.path
    if folder is None or not folder.is_dir():
        raise DataError(
            'dataset = "npy" needs dataset_path, a folder with x_train.npy, y_train.npy, x_val.npy, y_val.npy, '
            f"x_test.npy and y_test.npy{f'; {folder} is none' if folder else ''}"
        )
    settings = settings_of(MappedSettings, request.settings, ("dataset_settings",))
    files = {path.name.lower(): path for path in folder.iterdir()}
    missing = [name for split in SPLITS for name in _needed(split, request) if name not in files]
    if missing:
        raise DataError(
            f"{folder} lacks {', '.join(missing)}. Arrays that are mapped are not split here: save every split with "
            "numpy.save"
        )
    x: dict[Split, Tensor] = {split: _features(files[f"x_{split}.npy"]) for split in SPLITS}
    labels: dict[str | None, Array] = {
        split: _read(files[f"y_{split}.npy"]) if request.targets.given else np.zeros((len(x[split]), 0), np.float32)
        for split in SPLITS
    }
    y, names = request.targets.read(labels, settings.class_names)
    size = sum(tensor.numel() for tensor in x.values()) * 4
    return Dataset(
        name=folder.name,
        x=x,
        y={split: torch.from_numpy(np.array(y[split])) for split in SPLITS},
        class_names=names,
        source=str(folder),
        notes=(f"{size / 1e6:,.0f} MB of features are mapped, as they are; rows that splits share are not looked for",),
        targets=request.targets,
        mapped={split: files[f"x_{split}.npy"] for split in SPLITS},
    )


def _needed(split: Split, request: DataRequest) -> tuple[str, ...]:
    return (f"x_{split}.npy", f"y_{split}.npy") if request.targets.given else (f"x_{split}.npy",)


def _features(path: Path) -> Tensor:
    """The features as a tensor over the file. Raises DataError."""
    array = _opened(path)
    if array.dtype != np.float32 or array.ndim < 2 or not array.flags.c_contiguous or not len(array):
        raise DataError(
            f"{path} is {array.dtype} {array.shape}; needed is float32 (samples, *features), in C order. Convert it "
            "once: numpy.lib.format.open_memmap writes one piece after the other"
        )
    flat = array.reshape(-1)
    for start in range(0, len(flat), _BLOCK):
        if not np.isfinite(flat[start : start + _BLOCK]).all():
            row = start + int(np.flatnonzero(~np.isfinite(flat[start : start + _BLOCK]))[0])
            raise DataError(f"{path} is not finite in row {row // array[0].size}; leave that row out")
    return mapped_tensor(path)


def _opened(path: Path) -> Any:
    with parsing(DataError, f"{path} cannot be read as an .npy file", "write it with numpy.save"):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def _read(path: Path) -> Array:
    return np.array(_opened(path))
