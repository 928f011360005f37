"""The files of a training with learned bits, ``checkpoints/cycle-N.pt``, as whoever reads a finished run sees them.

``learned_bits.trained`` writes them; they also hold what the training needs to go on. Here only the bits are read, and
no trainer is imported.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitfront import checkpoints
from bitfront.errors import CheckpointError, parsing


def cycle_file(folder: Path, cycle: int) -> Path:
    """The file of a complete cycle, from 0 on, in a run folder."""
    return folder / "checkpoints" / f"cycle-{cycle + 1}.pt"


@dataclass(frozen=True, eq=False)
class LearnedLayer:
    """The bits of a layer, without signs.

    Attributes:
        path: of the layer.
        weight: bits of each weight, int8, the shape of the weight; 0 for a weight that is zero.
        data_in: bits of each value of the input, int8, the shape of a sample; 0 for a value that nobody reads.
    """

    path: str
    weight: NDArray[np.int8]
    data_in: NDArray[np.int8]

    @property
    def pruned(self) -> float:
        """Share of the weights that are zero, 0 to 1."""
        return float((self.weight == 0).mean()) if self.weight.size else 0.0

    @property
    def weight_bits(self) -> float:
        """Mean bits of the weights that are not zero; 0 if all are."""
        return _mean_of_others(self.weight)

    @property
    def data_in_bits(self) -> float:
        """Mean bits of the values of the input that are read; 0 if none is."""
        return _mean_of_others(self.data_in)


@dataclass(frozen=True, eq=False)
class LearnedNetwork:
    """A network that a cycle gave.

    Attributes:
        layers: in the order in which they compute.
        pressure: in nats per unit of the cost.
    """

    layers: tuple[LearnedLayer, ...]
    pressure: float

    @property
    def summary(self) -> dict[str, dict[str, float]]:
        """Layer → mean bits of its weights that are not zero, share of the others, mean bits of its input."""
        return {
            layer.path: {
                "weight_bits": round(layer.weight_bits, 4),
                "pruned": round(layer.pruned, 4),
                "data_in_bits": round(layer.data_in_bits, 4),
            }
            for layer in self.layers
        }


def learned_network(folder: Path, config: Mapping[str, Any]) -> LearnedNetwork | None:
    """The network of a trial; None if its file is not there, or its bits were not learned.

    Args:
        folder: the run folder.
        config: the trial's, spelled out.

    Raises:
        CheckpointError: the file is damaged.
    """
    table = config.get("learned_bits", {}).get("config", {})
    places = [int(table.get(f"{name}_number", 1)) - 1 for name in ("cycle", "member", "network")]
    path = cycle_file(folder, places[0])
    if not table or not path.exists():
        return None
    cycle = _read(path, path.stat().st_mtime_ns)
    with parsing(CheckpointError, f"{path} cannot be read", "start the search again with --restart"):
        return cycle[places[1]][places[2]]


@functools.lru_cache(maxsize=64)
def _read(path: Path, _changed: int) -> list[list[LearnedNetwork]]:
    """Per member, the networks of a cycle."""
    tensors, meta = checkpoints.read_tensors(path), checkpoints.read_meta(path)
    with parsing(CheckpointError, f"{path} cannot be read", "start the search again with --restart"):
        return [
            [
                LearnedNetwork(
                    tuple(
                        LearnedLayer(
                            layer,
                            np.where(tensors[f"{m}.{n}.{i}.weight"] == 0, 0, tensors[f"{m}.{n}.{i}.weight_bits"]),
                            tensors[f"{m}.{n}.{i}.data_bits"].numpy(),
                        )
                        for i, layer in enumerate(meta["layers"])
                    ),
                    float(entry["pressure"]),
                )
                for n, entry in enumerate(of_member)
            ]
            for m, of_member in enumerate(meta["networks"])
        ]


def _mean_of_others(bits: NDArray[np.int8]) -> float:
    """The mean of what is not 0; 0 if nothing is."""
    others = bits[bits > 0]
    return float(others.mean(dtype=np.float64)) if others.size else 0.0
