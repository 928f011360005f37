"""Trackers: one file for each tool in which a search is followed beside the run folder.

To add one, write a file here with a class that extends ``Tracker`` and decorate it with ``@TRACKERS.register("name")``;
its first docstring line is what ``bitfront list trackers`` shows. Its conformance suite is
``bitfront.testing.check_tracker``. Third parties register through the entry-point group ``bitfront.trackers``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitfront.registry import Registry

if TYPE_CHECKING:
    from bitfront.trackers.base import Tracker

TRACKERS: Registry[type[Tracker]] = Registry("tracker", "bitfront.trackers")
