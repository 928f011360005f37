"""The reference models. One file per family.

To add one, write a file here with a function ``(sample_shape, num_classes) -> nn.Module`` and decorate it
with ``@MODELS.register("name")``; its first docstring line is what ``bitfront list models`` shows. Add a test
in ``tests/models`` that runs ``bitfront.testing.check_model`` on it. Nothing else changes. Third parties
register through the entry-point group ``bitfront.models``. With ``data="name"`` the decorator says which dataset is
meant where the user names none. Models of libraries are in ``sources/``.

The function is called when a configuration names the model: for a plan, for training, and when a trial is rebuilt. It
must create the same layers each time. Its arguments are the shape of one sample, without the batch dimension, and the
number of classes. PyTorch's CPU generator is seeded before the call; initial weights may be drawn from it only. If the
model cannot take such samples, the function raises ConfigError with ``key=("model",)``. The model takes a float32
tensor of shape (samples, *sample_shape) and returns logits of shape (samples, classes); in eval mode the logits of a
sample depend on this sample alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bitfront.registry import Registry

if TYPE_CHECKING:
    from torch import nn

ModelFactory = Callable[[tuple[int, ...], int], "nn.Module"]
MODELS: Registry[ModelFactory] = Registry("model", "bitfront.models")
