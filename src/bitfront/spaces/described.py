"""A space as text: enough to spell out its candidates without the model. A run folder stores a space in this form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bitfront.errors import UnknownNameError
from bitfront.formats import FLOAT_BITS, FORMATS
from bitfront.spaces.base import Branch, Choice, Group, Space

#: A candidate spelled out as in the TOML: {"by": "name", "default": {...}, site: {"config": {...}}}.
CandidateConfig = Mapping[str, Any]
#: The only site and the only alternative of a space whose candidates are positions of a training with learned bits.
LEARNED_BITS = "learned_bits"


@dataclass(frozen=True)
class Size:
    """The size of a setting: bits per value (``bits``), or the multiplier of a layer's width (``width``)."""

    kind: Literal["bits", "width"]
    amount: float


class DescribedSpace(Space):
    """A space as text: enough to spell out its candidates without the model.

    Args:
        description: JSON, per site ``{"site": name, "alternatives": [{"name": format, "operands": [{"operand": name,
            "settings": [{"label": text, "set": {parameter: value}}]}]}]}``. Optional keys: ``part`` of an entry, the
            name of the table in which it is spelled out; ``also`` of an alternative, more keys that are spelled out
            with it; ``bits`` of a setting, its bits per value; ``width`` of a setting, the layer's output width.
    """

    def __init__(self, description: Sequence[Mapping[str, Any]]) -> None:
        self.description = description
        groups = []
        for entry in description:
            branches: list[Branch] = []
            for a in entry["alternatives"]:
                # If the settings of a format are not a plain product, the format has several branches.
                before = sum(b.label.split("#")[0] == a["name"] for b in branches)
                choices = (Choice(o["operand"], tuple(s["label"] for s in o["settings"])) for o in a["operands"])
                branches.append(Branch(f"{a['name']}#{before + 1}" if before else a["name"], tuple(choices)))
            groups.append(Group(entry["site"], tuple(branches)))
        super().__init__(groups)

    def decode(self, code: NDArray[np.int64]) -> CandidateConfig:
        """The candidate spelled out, as ``[passes.quantize]`` takes it, without sites that can only be float.

        If the space has parts, the result maps the name of each part to its table.

        Args:
            code: a canonical code, int64, shape (parameters,).
        """
        tables: dict[str, dict[str, Any]] = {}
        options = self.options(code[None])[0].tolist()
        for g, (group, entry) in enumerate(zip(self.groups, self.description, strict=True)):
            table = tables.setdefault(entry.get("part", ""), {"by": "name", "default": {"config": {"name": "NA"}}})
            written = self._written(g, options[g])
            if group.size > 1 or entry["alternatives"][0]["name"] != "NA":
                table[entry["site"]] = {"config": dict(written)}
        spelled: CandidateConfig = tables.get("", tables)
        return spelled

    def _written(self, g: int, option: int) -> Mapping[str, object]:
        """One option of a site as the TOML spells it: key → value."""
        known = self._spelled.get((g, option))
        if known is None:
            alternative, chosen = self._chosen(g, option)
            known = {"name": "NA"}
            if any(setting["label"] != "float" for _, setting in chosen):
                known = {"name": alternative["name"], **alternative.get("also", {})}
                for operand, setting in chosen:
                    known |= {f"{operand}_{key}": value for key, value in setting["set"].items()}
                    if not setting["set"] and setting["label"] != "float":
                        known[operand] = [{}]  # a format without parameters
            self._spelled[g, option] = known
        return known

    def _chosen(self, g: int, option: int) -> tuple[Mapping[str, Any], list[tuple[str, Mapping[str, Any]]]]:
        """(the alternative, the pair (operand, setting) of each operand) of one option of a site."""
        branch, picks = self.groups[g].picks(option)
        alternative = self.description[g]["alternatives"][branch]
        pairs = zip(alternative["operands"], picks, strict=True)
        return alternative, [(o["operand"], o["settings"][i]) for o, i in pairs]

    @cached_property
    def _spelled(self) -> dict[tuple[int, int], dict[str, object]]:
        return {}

    @property
    def learned(self) -> bool:
        """Whether candidates are positions on the course of a training with learned bits, and no choices per layer."""
        names = [(entry["site"], a["name"]) for entry in self.description for a in entry["alternatives"]]
        return names == [(LEARNED_BITS, LEARNED_BITS)]

    def layer_widths(self, code: NDArray[np.int64]) -> dict[str, tuple[str, int]]:
        """Layer → (label of its multiplier, its output width), for the layers whose width is chosen."""
        options = self.options(code[None])[0].tolist()
        return {
            entry["site"]: (setting["label"], setting["width"])
            for g, entry in enumerate(self.description)
            for _, setting in self._chosen(g, options[g])[1]
            if "width" in setting
        }

    def operand_bits(self, code: NDArray[np.int64]) -> dict[str, dict[str, int | None]]:
        """Site → operand → bits per value, for operands that have a format; None if the bits are not known."""
        options = self.options(code[None])[0].tolist()
        bits: dict[str, dict[str, int | None]] = {}
        for g, entry in enumerate(self.description):
            alternative, chosen = self._chosen(g, options[g])
            for operand, setting in chosen:
                if setting["label"] != "float" and "width" not in setting:
                    bits.setdefault(entry["site"], {})[operand] = _bits(alternative["name"], setting)
        return bits

    @cached_property
    def sizes(self) -> Mapping[str, Size]:
        """Label of a setting → its size. A label whose size is not known is absent."""
        sizes = {"float": Size("bits", FLOAT_BITS)}
        alternatives = [a for entry in self.description for a in entry["alternatives"]]
        for name, operand in ((a["name"], o) for a in alternatives for o in a["operands"]):
            for setting in (s for s in operand["settings"] if s["label"] not in sizes):
                if "width" in setting:
                    sizes[setting["label"]] = Size("width", setting["set"]["multiplier"])
                elif (bits := _bits(name, setting)) is not None:
                    sizes[setting["label"]] = Size("bits", bits)
        return sizes


def _bits(name: str, setting: Mapping[str, Any]) -> int | None:
    """Bits per value under a setting; None if an older run folder lacks them and the format is not installed."""
    if "bits" in setting:
        return int(setting["bits"])
    from bitfront.formats.base import WEIGHT, FormatError  # it loads torch, which few run folders need to be read

    try:
        # Bits do not depend on the kind of operand.
        return FORMATS.get(name).parse(setting["set"], WEIGHT).bits
    except (UnknownNameError, FormatError):
        return None
