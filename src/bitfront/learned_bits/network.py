"""A network whose bits were learned, as everything else sees it: a state dict, and a format per operand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfront.formats.base import Format, Operand
from bitfront.formats.fixed_map import FixedMap
from bitfront.graph import Graph
from bitfront.learned_bits.state import LayerBits
from bitfront.training import StateDict


def state_of(graph: Graph, layers: Mapping[str, LayerBits], floats: Mapping[str, Tensor] | None = None) -> StateDict:
    """The state dict of the captured model with the learned weights, which lie on their grids.

    Args:
        layers: path of a layer → what was learned of it.
        floats: names in the state dict → values of what was trained in float beside.
    """
    state: dict[str, Tensor] = {name: tensor.clone() for name, tensor in graph.model.state_dict().items()}
    state |= {name: tensor.clone() for name, tensor in (floats or {}).items()}
    for path, learned in layers.items():
        prefix = f"{path}." if path else ""
        state[f"{prefix}weight"] = torch.from_numpy(learned.weight.copy())
        if learned.bias is not None:
            state[f"{prefix}bias"] = torch.from_numpy(learned.bias.copy())
    return state


def formats_of(graph: Graph, layers: Mapping[str, LayerBits]) -> dict[str, dict[Operand, Format]]:
    """Site → operand → its format."""
    sites = {site.path: site.name for site in graph.sites if site.path}
    return {sites[path]: _formats(learned) for path, learned in layers.items()}


def _formats(learned: LayerBits) -> dict[Operand, Format]:
    formats: dict[Operand, Format] = {
        "data_in": FixedMap.of(
            _with_sign(learned.data_bits, learned.signed),
            learned.data_fractions,
            signed=learned.signed,
            samples=True,
            rounding=learned.rounding,
        ),
        "weight": FixedMap.of(_with_sign(learned.weight_bits), learned.weight_fractions, signed=True, samples=False),
    }
    if learned.bias_bits is not None and learned.bias_fractions is not None:
        formats["bias"] = FixedMap.of(_with_sign(learned.bias_bits), learned.bias_fractions, signed=True, samples=False)
    return formats


def _with_sign(bits: NDArray[np.int8], signed: bool = True) -> NDArray[np.int8]:
    return np.where(bits > 0, bits + np.int8(signed), 0).astype(np.int8)
