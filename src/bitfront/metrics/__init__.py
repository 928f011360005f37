"""What a candidate is worth: runners that turn a batch of candidates into named numbers.

To add one, write a file here with a class that extends ``Runner`` (its ``Settings``, the metrics it ``produces``, and
``measure``) and decorate it with ``@RUNNERS.register("name")``; ``bitfront list metrics`` shows it. Run
``bitfront.testing.check_runner`` on it in ``tests/metrics``. Nothing else changes. Third parties register through the
entry-point group ``bitfront.metrics``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitfront.registry import Registry

if TYPE_CHECKING:
    from bitfront.metrics.base import Runner

RUNNERS: Registry[type[Runner]] = Registry("metric runner", "bitfront.metrics")
