"""Recurrent layers: LSTM, GRU, RNN, and their cells."""

from __future__ import annotations

import math
from typing import Any

from bitfront.operations.base import Call, Count, classes, define


def _recurrent(call: Call) -> Count:
    """Products of both weights of each layer and direction at every step; then, per unit, the operations of the gates.

    An LSTM's unit adds 4 pairs of sums, has 5 nonlinearities, 3 products and 1 sum; a GRU's 3, 3, 3 and 2; an RNN's
    1 and 1.
    """
    module: Any = call.module
    kind = type(module).__name__.removesuffix("Cell")
    steps = math.prod(call.tensors[0][:-1])
    per_unit = {"LSTM": 13, "GRU": 11, "RNN": 2}[kind]
    # Cells have one layer and one direction.
    layers, directions = getattr(module, "num_layers", 1), 2 if getattr(module, "bidirectional", False) else 1
    matrices = [p for name, p in module.named_parameters() if "weight" in name]
    macs = steps * sum(p.numel() for p in matrices)
    return Count(macs + steps * layers * directions * module.hidden_size * per_unit, macs)


RECURRENT = define(
    "recurrent",
    "LSTM, GRU and RNN, and their cells.",
    modules=classes("LSTM GRU RNN LSTMCell GRUCell RNNCell"),
    count=_recurrent,
)
