"""What may be chosen: sites × options ↔ integer codes. One file per kind of space.

To add one, write a file here with a class that extends ``ModelSpace`` and is made of a ``SpaceRequest``, or a function
that takes one and gives a ``ModelSpace``, and decorate it with ``@SPACES.register("name")``; its first docstring line
is what ``bitfront list spaces`` shows. Run ``bitfront.testing.check_space`` on it in ``tests/spaces``. Nothing else
changes. Third parties register through the entry-point group ``bitfront.spaces``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bitfront.registry import Registry

if TYPE_CHECKING:
    from bitfront.spaces.model_space import ModelSpace
    from bitfront.spaces.request import SpaceRequest

SPACES: Registry[Callable[[SpaceRequest], ModelSpace]] = Registry("space", "bitfront.spaces")
