"""Datasets: resident tensors with train, val and test splits. One file per dataset.

To add one, write a file here with a function ``(DataRequest) -> Dataset`` and decorate it with
``@DATASETS.register("name")``; its first docstring line is what ``bitfront list datasets`` shows. Add a test
in ``tests/data`` that runs ``bitfront.testing.data.check_dataset`` on it. Nothing else changes. Third parties
register through the entry-point group ``bitfront.data``.

The function is called once by each verb that needs the data, before any other work, and again when a trial is rebuilt.
For the same request it must return the same tensors, to the bit: the run folder has their fingerprint. If the data has
no splits, it draws them from ``request.seed``. It reports slow steps with ``request.report`` and a download with
``request.progress``, writes only to Bitfront's cache, and raises DataError if something cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bitfront.registry import Registry

if TYPE_CHECKING:
    from bitfront.data.base import DataRequest, Dataset

DATASETS: Registry[Callable[[DataRequest], Dataset]] = Registry("dataset", "bitfront.data")
