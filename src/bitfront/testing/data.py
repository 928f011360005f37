"""The conformance suite of datasets. In the test of a new dataset: ``check_dataset(load_dataset("mine"))``."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import torch

from bitfront.data.base import SPLITS, Dataset
from bitfront.data.splitting import row_hashes, shared_rows


def check_dataset(dataset: Dataset, *, max_overlap: float = 0.02, test_only: bool = False) -> None:
    """Assert that `dataset` keeps the contract of :class:`bitfront.data.base.Dataset`.

    Args:
        dataset: a dataset, loaded.
        max_overlap: the largest allowed share of val or test rows that also occur in train, 0 to 1. Real data repeats
            a few rows; data with few distinct rows repeats many.
        test_only: whether the dataset has a test split only, on purpose.

    Raises:
        AssertionError: the contract is broken; the message says how.
    """
    assert isinstance(dataset, Dataset), f"a dataset must be a Dataset, this is a {type(dataset).__name__}"
    title = f"dataset {dataset.name!r}"
    assert dataset.name, "a dataset needs a name"
    assert dataset.source, f"{title} must say where it comes from (source)"
    expected = ("test",) if test_only else SPLITS
    assert dataset.splits == expected, f"{title} has the splits {dataset.splits}; needed: {expected}"
    _check_tensors(dataset, title)
    if not test_only:
        _check_splits(dataset, title, max_overlap)
    _check_fingerprint(dataset, title)
    _check_frozen(dataset, title)


def _check_tensors(dataset: Dataset, title: str) -> None:
    names = dataset.class_names
    assert len(set(names)) == len(names) == dataset.num_classes >= 2, f"{title}: class names are {names}"
    count = int(np.prod(dataset.sample_shape))
    assert len(dataset.feature_names) in (0, count), (
        f"{title} has {len(dataset.feature_names)} feature names for {count} features"
    )
    for split in dataset.splits:
        x, y = dataset.split(split)
        assert x.dtype == torch.float32, f"{title}: x of {split} is {x.dtype}, not float32"
        assert y.dtype == torch.int64, f"{title}: y of {split} is {y.dtype}, not int64"
        assert x.ndim >= 2, f"{title}: x of {split} has the shape {tuple(x.shape)}, not (samples, *features)"
        assert y.shape == x.shape[:1], f"{title}: {split} has {len(x)} samples and labels {tuple(y.shape)}"
        assert tuple(x.shape[1:]) == dataset.sample_shape, f"{title}: samples of {split} have another shape"
        assert len(x) > 0, f"{title}: {split} is empty"
        assert x.is_contiguous(), f"{title}: x of {split} is not contiguous, so batches would be copies"
        assert y.is_contiguous(), f"{title}: y of {split} is not contiguous"
        assert not x.requires_grad, f"{title}: x of {split} requires gradients"
        assert bool(torch.isfinite(x).all()), f"{title}: x of {split} has values that are not finite"
        assert int(y.min()) >= 0, f"{title}: {split} has a negative label"
        assert int(y.max()) < dataset.num_classes, f"{title}: {split} has the label {int(y.max())}, which is no class"
    if dataset.scaler is not None:
        assert len(dataset.scaler.mean) == len(dataset.scaler.scale) == count, f"{title}: the scaler has other features"
        assert all(s > 0 for s in dataset.scaler.scale), f"{title}: a scale is not positive"


def _check_splits(dataset: Dataset, title: str, max_overlap: float) -> None:
    present = torch.bincount(dataset.y["train"], minlength=dataset.num_classes) > 0
    absent = [name for name, there in zip(dataset.class_names, present.tolist(), strict=True) if not there]
    assert not absent, f"{title}: train has no sample of class {', '.join(absent)}"
    hashes = {split: row_hashes(dataset.x[split].numpy()) for split in SPLITS}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = shared_rows(hashes[one], hashes[other])  # type: ignore[index]
        share = shared / len(hashes[other])  # type: ignore[index]
        assert share <= max_overlap, (
            f"{title}: {shared} rows of {other} ({share:.1%}) also occur in {one}; allowed: {max_overlap:.1%}"
        )


def _check_fingerprint(dataset: Dataset, title: str) -> None:
    again = dataclasses.replace(dataset, name="another name")
    assert again.fingerprint == dataset.fingerprint, f"{title}: equal tensors have two fingerprints"
    restored = pickle.loads(pickle.dumps(dataset))  # noqa: S301 (bytes of this process; a worker process gets the same)
    assert restored.fingerprint == dataset.fingerprint, f"{title}: pickling changes the content"
    split = dataset.splits[-1]
    changed = copy.deepcopy(dataset.x[split])
    changed.view(-1)[0] += 1
    other = dataclasses.replace(dataset, x={**dataset.x, split: changed})
    assert other.fingerprint != dataset.fingerprint, f"{title}: another value has the same fingerprint"


def _check_frozen(dataset: Dataset, title: str) -> None:
    try:
        dataset.name = "changed"  # type: ignore[misc]
    except dataclasses.FrozenInstanceError:
        pass
    else:
        raise AssertionError(f"{title} can be changed")
    try:
        dataset.x["train"] = torch.zeros(1, 1)  # type: ignore[index]
    except TypeError:
        return
    raise AssertionError(f"{title}: its splits can be replaced")
