"""What to try next. One file per strategy family.

To add one, write a file here with a class that extends ``Strategy`` (its ``Settings`` and ``propose``) and decorate it
with ``@STRATEGIES.register("name")``; its first docstring line is what ``bitfront list strategies`` shows. Run
``bitfront.testing.check_strategy`` on it in ``tests/strategies``. Nothing else changes. Third parties register through
the entry-point group ``bitfront.strategies``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitfront.registry import Registry

if TYPE_CHECKING:
    from bitfront.strategies.base import Strategy

STRATEGIES: Registry[type[Strategy]] = Registry("strategy", "bitfront.strategies")
