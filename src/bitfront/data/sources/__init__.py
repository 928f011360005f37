"""Libraries that data comes from: ``dataset = "torchvision:CIFAR10"``. One file per library.

To add one, write a file here with a function ``(name, DataRequest) -> Dataset`` and decorate it with
``@SOURCES.register("prefix", settings=MySettings)``: the table that checks ``[dataset_settings]``. Its first docstring
line is what ``bitfront list datasets`` shows. Nothing else changes. Third parties register through the entry-point
group ``bitfront.data.sources``.

The word before the colon decides. If it is a registered prefix, the rest is a name of that library; else it is the
user's module, ``package.module:factory``. Nothing of the name is evaluated, and no code that comes with data is run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bitfront.registry import Registry

if TYPE_CHECKING:
    from bitfront.data.base import DataRequest, Dataset

SOURCES: Registry[Callable[[str, DataRequest], Dataset]] = Registry("source of data", "bitfront.data.sources")
