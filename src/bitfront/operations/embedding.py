"""Rows of a table, looked up by index."""

from __future__ import annotations

from torch import nn

from bitfront.operations.base import define, free

EMBEDDING = define("embedding", "Rows of a table, by index.", modules=(nn.Embedding,), names=("embedding",), count=free)
