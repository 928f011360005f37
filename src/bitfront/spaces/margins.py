"""What each option of a space alone does to the outputs for some samples: numbers that a run folder keeps."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Singles = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Margins:
    """What each option alone does to the margins of some samples: by how much other classes are above the label.

    They are relative to the float model.

    Attributes:
        base: the margins of the float model, float32, shape (classes, samples): the output of each of a few other
            classes minus that of the label. A sample is wrong if one of them is above 0.
        effects: per group what an option adds to them, float32, shape (options, classes, samples).
        weights: the share of all samples that each sample stands for, float32, shape (samples,).
    """

    base: Singles
    effects: tuple[Singles, ...]
    weights: Singles

    def as_json(self) -> dict[str, Any]:
        """The same as JSON."""
        arrays = {"base": self.base, "effects": np.concatenate(self.effects), "weights": self.weights}
        written = {name: base64.b64encode(a.astype("<f4").tobytes()).decode() for name, a in arrays.items()}
        sizes = [len(effect) for effect in self.effects]
        return {**written, "shape": self.base.shape, "options": sizes}

    @staticmethod
    def from_json(kept: Mapping[str, Any] | None) -> Margins | None:
        """What ``as_json`` gave; None where there are no margins."""
        if not kept or "base" not in kept:
            return None
        read = {name: np.frombuffer(base64.b64decode(kept[name]), "<f4") for name in ("base", "effects", "weights")}
        base, effects = (read[name].reshape(-1, *kept["shape"]) for name in ("base", "effects"))
        return Margins(base[0], tuple(np.split(effects, np.cumsum(kept["options"])[:-1])), read["weights"])
