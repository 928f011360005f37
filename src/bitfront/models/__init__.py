"""The reference models. One file per family.

To add one, write a file here with a function ``(sample_shape, num_classes) -> nn.Module`` and decorate it
with ``@MODELS.register("name")``; its first docstring line is what ``bitfront list models`` shows. Add a test
in ``tests/models`` that runs ``bitfront.testing.check_model`` on it. Nothing else changes. Third parties
register through the entry-point group ``bitfront.models``.

The function is called when a configuration names the model: for a plan, for training, and for a trial that is rebuilt,
so it must make the same layers each time. It is called with the shape of one sample, without the batch dimension, and
the number of classes, under a random seed of PyTorch's generator for the CPU, which is all that initial weights may be
drawn from. It raises ConfigError, with ``key=("model",)``, where the model cannot take such samples. What it returns
takes a float32 tensor of shape (samples, *sample_shape) and gives logits of shape (samples, classes); a sample's logits
in eval mode depend on that sample alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bitfront.registry import Registry

if TYPE_CHECKING:
    from torch import nn

ModelFactory = Callable[[tuple[int, ...], int], "nn.Module"]
MODELS: Registry[ModelFactory] = Registry("model", "bitfront.models")
