"""The formats that a space offers at each site, and the settings of each operand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitfront.formats.base import FLOAT_BITS, Format, Operand
from bitfront.graph import Site


@dataclass(frozen=True)
class Setting:
    """One way to treat an operand.

    Attributes:
        written: parameter → value, as in the TOML.
        format: the format, not calibrated; None if the operand stays in float.
    """

    written: tuple[tuple[str, object], ...]
    format: Format | None

    @property
    def bits(self) -> int:
        """Bits per value."""
        return self.format.bits if self.format else FLOAT_BITS

    def described(self) -> dict[str, Any]:
        """Its entry in the description of a space (``spaces.described``)."""
        written = {key: "NA" if value is None else value for key, value in self.written}
        return {"label": self.format.label if self.format else "float", "set": written, "bits": self.bits}


#: Of an operand that the table does not name.
UNSAID = Setting((), None)


@dataclass(frozen=True)
class Alternative:
    """One branch at a site: a format by name (``NA``: float), and the settings to choose from per operand. The name of
    an operand may stand for several, which take the same setting (``OperandSpec.format_of``)."""

    name: str
    operands: tuple[tuple[Operand, tuple[Setting, ...]], ...] = ()


FLOAT = Alternative("NA")


@dataclass(frozen=True)
class Assignment:
    """What a space offers at a site.

    Attributes:
        site: the site.
        key: the key of the table of choices that applies; ``default`` if no other does.
        alternatives: the branches.
        excluded: number of settings that were left out because their parameters contradict each other.
        why: the format's message about the last of them.
    """

    site: Site
    key: str
    alternatives: tuple[Alternative, ...]
    excluded: int = 0
    why: str = ""

    def options(self) -> Iterator[tuple[tuple[Operand, Setting], ...]]:
        """Every option of the site, in the order in which a space numbers them: the setting of each operand. Operands
        that share a choice have the same format, not yet calibrated."""
        for alternative in self.alternatives:
            names = [name for name, _ in alternative.operands]
            said = [name for name, settings in alternative.operands if settings != (UNSAID,)]
            own = [name for name in names if self.site.has(name)]
            sharing = [s for s in self.site.specs if s.name not in names]
            for picks in itertools.product(*(settings for _, settings in alternative.operands)):
                chosen = dict(zip(names, picks, strict=True))
                by_table = {name: chosen[name] for name in said}
                shared = ((s.name, s.chosen(by_table) or UNSAID) for s in sharing)
                yield (
                    *((name, chosen[name]) for name in own),
                    *((name, Setting((), setting.format)) for name, setting in shared),
                )

    def nearest_option(self, name: str, target: Mapping[str, int]) -> int:
        """The number of the option whose bits are nearest to a target.

        Args:
            name: the name of the format. A site that does not offer it takes its only format, or, if it has several,
                its first option.
            target: operand → bits.
        """
        offset = 0
        for alternative in self.alternatives:
            radices = [len(settings) for _, settings in alternative.operands]
            if alternative.name == name or len(self.alternatives) == 1:
                picks = [
                    min(range(len(settings)), key=lambda i: _distance(settings[i], self._target(operand, target), i))
                    for operand, settings in alternative.operands
                ]
                return offset + int(np.ravel_multi_index(picks, radices) if radices else 0)
            offset += int(np.prod(radices, dtype=np.int64)) if radices else 1
        return 0

    def _target(self, operand: str, target: Mapping[str, int]) -> int:
        role = self.site.operand(operand).role
        return target[role if role in ("weight", "bias") else "data_in"]

    def described(self) -> dict[str, Any]:
        """Its entry in the description of a space (``spaces.described``)."""
        alternatives = []
        for alternative in self.alternatives:
            operands = [
                {"operand": operand, "settings": [setting.described() for setting in settings]}
                for operand, settings in alternative.operands
            ]
            alternatives.append({"name": alternative.name, "operands": operands})
        return {"site": self.site.name, "alternatives": alternatives}


def _distance(setting: Setting, target: int, index: int) -> tuple[float, float, int]:
    """The sorting key of a setting: distance in bits, then the format's rank, then its position."""
    return abs(setting.bits - target), setting.format.rank if setting.format else 0.0, index
