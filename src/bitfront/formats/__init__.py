"""Number formats: one file per family, each a pure function of a tensor and a few parameters.

To add one, write a file here with a frozen dataclass that extends ``Format`` and decorate it with
``@FORMATS.register("name")``; its first docstring line is what ``bitfront list formats`` shows. Add its name to the
conformance suite in ``tests/formats`` (``bitfront.testing.formats``). Nothing else changes. Third parties register
through the entry-point group ``bitfront.formats``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitfront.registry import Registry

if TYPE_CHECKING:
    from bitfront.formats.base import Format

#: Bits of a value that is not quantized.
FLOAT_BITS = 32
FORMATS: Registry[type[Format]] = Registry("format", "bitfront.formats")
