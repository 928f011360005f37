"""Libraries that models come from: ``model = "timm:mobilenetv3_small_100"``. One file per library.

To add one, write a file here with a class that inherits from ``ModelSource`` and decorate it with
``@SOURCES.register("prefix")``; the first line of its docstring is what ``bitfront list models`` shows. Nothing else
changes. Third parties register through the entry-point group ``bitfront.models.sources``.

The word before the colon decides. If it is a registered prefix, the rest is a name of that library; else it is the
user's module, ``package.module:factory``. Nothing of the name is evaluated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitfront.registry import Registry

if TYPE_CHECKING:
    from bitfront.models.sources.base import ModelSource

SOURCES: Registry[type[ModelSource]] = Registry("source of models", "bitfront.models.sources")


def source_of(name: str) -> tuple[ModelSource, str] | None:
    """(the source, the name in it) of a model ``prefix:name``; None for every other model."""
    prefix, colon, rest = name.partition(":")
    # Letter by letter: a module of the user may be called like a prefix in another spelling.
    if not colon or prefix not in SOURCES.names():
        return None
    return SOURCES.get(prefix)(), rest
