"""Executors: one file for each engine that carries out the calls of a search, on this machine or on others.

To add one, write a file here with a class that extends ``Launcher`` and decorate it with
``@EXECUTORS.register("name")``; its first docstring line is what ``bitfront list executors`` shows. Its conformance
suite is ``bitfront.testing.check_executor``. Third parties register through the entry-point group
``bitfront.executors``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitfront.registry import Registry

if TYPE_CHECKING:
    from bitfront.executors.base import Launcher

EXECUTORS: Registry[type[Launcher]] = Registry("executor", "bitfront.executors")
