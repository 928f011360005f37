"""What is known of each operation: one frozen record that answers every question any part of Bitfront has about it.

A record says which modules, functions and methods are the operation, what its operands are, how many operations and
products a call does, and how it is called with quantized operands. What it may also say (how the tree merges it, how
channels follow, how a population trains it, how it is exported) makes the operation fast or exportable. A record that
says nothing there falls to a general path that is correct: the module's own call for each distinct state, fixed widths,
a candidate trained alone, an export refused by name.

To add an operation, write a file here that makes a record with ``define`` (``operations/base.py`` describes its
fields); ``bitfront list operations`` shows it. Run ``bitfront.testing.check_operation`` on it in ``tests/operations``.
Nothing else changes. Third parties register through the entry-point group ``bitfront.operations``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitfront.registry import Registry

if TYPE_CHECKING:
    from bitfront.operations.base import Operation

OPERATIONS: Registry[Operation] = Registry("operation", "bitfront.operations")
