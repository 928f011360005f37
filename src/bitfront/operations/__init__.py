"""Operations: one frozen record per operation, with everything that Bitfront needs to know about it.

A record says which modules, functions and methods are the operation, what its operands are, how many operations and
products a call does, and how it is called with quantized operands. Other fields are optional (how the tree merges it,
how channels follow, how a population trains it, how it is exported). They make the operation fast or exportable.
Without them a general, correct path is taken: one call of the module per distinct state, fixed widths, a candidate
trained alone, an export refused with the name of the operation.

To add an operation, write a file here that creates a record with ``define`` (``operations/base.py`` describes its
fields); ``bitfront list operations`` shows it. Run ``bitfront.testing.check_operation`` on it in ``tests/operations``.
Nothing else changes. Third parties register through the entry-point group ``bitfront.operations``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitfront.registry import Registry

if TYPE_CHECKING:
    from bitfront.operations.base import Operation

#: The name of what an operation gives, where that has a format.
DATA_OUT = "data_out"
OPERATIONS: Registry[Operation] = Registry("operation", "bitfront.operations")
