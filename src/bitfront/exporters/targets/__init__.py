"""Targets: one file for each form in which a candidate leaves Bitfront.

To add one, write a file here with a class that extends ``Target`` and decorate it with
``@TARGETS.register("name")``; its first docstring line is what ``bitfront list targets`` shows.
Its conformance suite is ``bitfront.testing.check_target``. Third parties register through the entry-point group
``bitfront.exporters.targets``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitfront.registry import Registry

if TYPE_CHECKING:
    from bitfront.exporters.targets.base import Target

TARGETS: Registry[type[Target]] = Registry("target", "bitfront.exporters.targets")
