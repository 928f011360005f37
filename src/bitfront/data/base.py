"""What a dataset is: tensors in memory, split once, standardised once, with a fingerprint of their content.

A search evaluates thousands of candidates on the same samples, so there is no ``DataLoader`` here: a split is
two tensors, and a batch is a slice of them. :func:`bitfront.load_dataset` opens one by its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from bitfront.data.packing import PackedInput
from bitfront.data.targets import CLASSES, Targets
from bitfront.errors import DataError, one_of
from bitfront.preparation import Preparation

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

GIB = 2**30


def _silent(message: str) -> None:
    """The default of ``DataRequest.report``: does nothing."""


@dataclass(frozen=True)
class DataRequest:
    """The user's request for a dataset: its location, and the seed of its split.

    Attributes:
        path: a local file or folder (``dataset_path``), or None for the dataset's default location.
        seed: random seed of the split, if the data has no splits; 0 or more.
        report: called with one-line messages worth showing ("downloading ...", "12 MB read into memory").
        progress: called during a download with (bytes done, total bytes); the total is None if the server
            does not send it.
        limit_bytes: the largest memory, in bytes as float32, that the data may take.
        targets: what the targets are; the task says it. Of targets that are not ``given`` nothing is read: data may
            have labels or not.
        settings: ``[dataset_settings]``, which the dataset checks.
        needs: what the model needs of its samples, where it comes from a library.
        class_names: the name of each class, by index, for data that does not name them; empty: the labels say it.
        gaps: whether a class between others may be without a training sample, although nobody named it.
    """

    path: Path | None = None
    seed: int = 0
    report: Callable[[str], None] = _silent
    progress: Callable[[int, int | None], None] | None = None
    limit_bytes: int = 4 * GIB
    targets: Targets = CLASSES
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs: Preparation | None = None
    class_names: tuple[str, ...] = ()
    gaps: bool = False


def mapped_tensor(path: Path) -> Tensor:
    """The array of an ``.npy`` file as a tensor over the file. Raises ValueError or OSError where it is none.

    What is written into the tensor does not reach the file.
    """
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))


@dataclass(frozen=True)
class Scaler:
    """``(x - mean) / scale`` per feature: how raw features become the tensors of a dataset.

    Attributes:
        mean: one number per feature (features of any shape, flattened).
        scale: the same length; 1 for a feature that is constant in the training split.
    """

    mean: tuple[float, ...]
    scale: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Dataset:
    """The tensors of one dataset, in memory. Immutable; two datasets are equal if their fingerprints are.

    Attributes:
        name: the name in tables and reports.
        x: by split, float32, shape ``(samples, *features)``; int64 ids where the targets are tokens.
        y: by split, the targets as `targets` has them: for classes int64 indices, shape (samples,).
        class_names: the name of each class, by index; of other targets the name of each output.
        source: where the data came from, for the run folder ("scikit-learn's load_digits", a path ...).
        feature_names: the name of each feature, or empty.
        notes: facts that a reader of the results must know ("val was cut from train ...").
        scaler: the standardisation of the features; None if they are not standardised.
        targets: what the targets are: classes, numbers ...
        inputs: the inputs by name that a row of `x` holds, which is then float64 (``data/packing.py``); empty if `x` is
            the input.
        mapped: by split the ``.npy`` file that `x` is mapped from, because it may be larger than memory; empty if it is
            in memory. Nobody moves it as a whole, and other processes map the files themselves.

    Raises:
        DataError: on construction, if the tensors are not as described here.
    """

    name: str
    x: Mapping[Split, Tensor]
    y: Mapping[Split, Tensor]
    class_names: tuple[str, ...]
    source: str
    feature_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    scaler: Scaler | None = None
    targets: Targets = CLASSES
    inputs: tuple[PackedInput, ...] = ()
    mapped: Mapping[Split, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.x or set(self.x) != set(self.y) or not set(self.x) <= set(SPLITS):
            raise DataError(
                f"dataset {self.name!r}: x has the splits {sorted(self.x)} and y has {sorted(self.y)}; "
                f"both need the same ones, {one_of(SPLITS)}"
            )
        for split, x in self.x.items():
            y = self.y[split]
            axes = self.targets.axes or max(2, y.ndim)
            fits = y.dtype == self.targets.dtype and y.ndim == axes and len(y) == len(x)
            if x.dtype != self.dtype or x.ndim < 2 or not fits:
                raise DataError(
                    f"dataset {self.name!r}: x of {split} is {x.dtype} {tuple(x.shape)} and y is {y.dtype} "
                    f"{tuple(y.shape)}; needed are {self._dtype_name} (samples, *features) and {self.targets.needed}"
                )
            if wrong := self.targets.wrong(y, len(self.class_names)):
                raise DataError(f"dataset {self.name!r}: {split} has {wrong}")
        self._freeze()

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {len(y):,}" for split, y in self.y.items())
        what = "classes" if self.targets is CLASSES else "outputs"
        return f"Dataset({self.name!r}: {sizes}; samples {self.sample_shape}, {self.num_classes} {what})"

    def with_outputs(self, y: Mapping[Split, Tensor], targets: Targets) -> Dataset:
        """The same samples with the outputs of a model in place of their targets, or with none yet.

        Args:
            y: float32, ``(samples, ...)`` by split.
            targets: those that are not in the data.
        """
        assert not targets.given
        return replace(self, y=y, targets=targets)

    def _freeze(self) -> None:
        for attribute in ("x", "y", "mapped"):
            object.__setattr__(self, attribute, MappingProxyType(dict(getattr(self, attribute))))

    def __getstate__(self) -> dict[str, Any]:
        # A read-only mapping cannot be pickled, and datasets travel to worker processes.
        x = {} if self.mapped else dict(self.x)
        return {**self.__dict__, "x": x, "y": dict(self.y), "mapped": dict(self.mapped)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.mapped:
            self.__dict__["x"] = {split: mapped_tensor(path) for split, path in self.mapped.items()}
        self._freeze()

    def split(self, name: Split) -> tuple[Tensor, Tensor]:
        """(x, y) of one split.

        Raises:
            DataError: the dataset has no such split (a test-only file has no train, for instance).
        """
        if name not in self.x:
            raise DataError(
                f"dataset {self.name!r} ({self.source}) has no {name!r} split; {one_of(self.splits)}. To train or "
                "search, give a dataset that has a train split; this one serves for a final test only"
            )
        return self.x[name], self.y[name]

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits this dataset has, in the order train, val, test. Nearly always all three."""
        return tuple(split for split in SPLITS if split in self.x)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch dimension."""
        return tuple(next(iter(self.x.values())).shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the features."""
        if self.inputs:
            return torch.float64
        return torch.int64 if self.targets.of_tokens else torch.float32

    @property
    def model_shape(self) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
        """What a factory of models gets as ``sample_shape``: that of a sample, or input → that of its samples."""
        return {one.name: one.shape for one in self.inputs} if self.inputs else self.sample_shape

    @property
    def _dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def num_classes(self) -> int:
        """Number of outputs that a model of this data has: of classes, or of numbers per sample."""
        return len(self.class_names)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all tensors, as hex: equal content gives an equal fingerprint, whatever its source. Outputs of a
        model do not count: they follow from it, and their last bits from the machine."""
        digest = hashlib.sha256(repr(self.inputs).encode() if self.inputs else b"")
        for split in self.splits:
            for tensor in (self.x[split], self.y[split]) if self.targets.given else (self.x[split],):
                digest.update(f"{split}{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(tensor.contiguous().cpu().numpy())  # type: ignore[arg-type]
        return digest.hexdigest()
