"""Search spaces: sites × options ↔ integer codes. One file per kind of space.

To add a kind of space, write a file here with a class that extends ``ModelSpace`` and takes a ``SpaceRequest``, or with
a function from a ``SpaceRequest`` to a ``ModelSpace``. Decorate it with ``@SPACES.register("name")``; ``bitfront list
spaces`` shows the first line of its docstring. Test it with ``bitfront.testing.check_space`` in ``tests/spaces``.
Nothing else changes. Third parties register through the entry-point group ``bitfront.spaces``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bitfront.registry import Registry

if TYPE_CHECKING:
    from bitfront.spaces.model_space import ModelSpace
    from bitfront.spaces.request import SpaceRequest

SPACES: Registry[Callable[[SpaceRequest], ModelSpace]] = Registry("space", "bitfront.spaces")
