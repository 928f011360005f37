"""The reference models. One file per family.

To add one, write a file here with a function ``(sample_shape, num_classes) -> nn.Module`` and decorate it
with ``@MODELS.register("name")``; its first docstring line is what ``bitfront list models`` shows. Add a test
in ``tests/models`` that runs ``bitfront.testing.check_model`` on it. Nothing else changes. Third parties
register through the entry-point group ``bitfront.models``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bitfront.registry import Registry

if TYPE_CHECKING:
    from torch import nn

ModelFactory = Callable[[tuple[int, ...], int], "nn.Module"]
MODELS: Registry[ModelFactory] = Registry("model", "bitfront.models")
