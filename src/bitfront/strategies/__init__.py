"""Strategies: they decide which candidates to evaluate next. One file per family of strategies.

To add a strategy, write a file here with a class that extends ``Strategy`` (its ``Settings`` and ``propose``).
Decorate it with ``@STRATEGIES.register("name")``; ``bitfront list strategies`` shows the first line of its docstring.
Test it with ``bitfront.testing.check_strategy`` in ``tests/strategies``. Nothing else changes. Third parties register
through the entry-point group ``bitfront.strategies``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitfront.registry import Registry

if TYPE_CHECKING:
    from bitfront.strategies.base import Strategy

STRATEGIES: Registry[type[Strategy]] = Registry("strategy", "bitfront.strategies")
