"""Formats of a whole model as JSON, with everything they learned, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitfront.formats import FORMATS
from bitfront.formats.base import Format, Operand


def spelled(formats: Mapping[str, Mapping[Operand, Format]]) -> dict[str, dict[str, Any]]:
    """Site → operand → ``{"format": name, field: value}``."""
    return {
        site: {operand: {"format": type(f).__name__.lower(), **_plain(f)} for operand, f in own.items()}
        for site, own in formats.items()
    }


def read(document: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[Operand, Format]]:
    """What ``spelled`` was given. Raises UnknownNameError for a format that is not installed."""
    found: dict[str, dict[Operand, Format]] = {}
    for site, own in document.items():
        for operand, entry in own.items():
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items() if k != "format"}
            found.setdefault(site, {})[operand] = FORMATS.get(entry["format"])(**fields)
    return found


def _plain(value: Format) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(value).items()}
