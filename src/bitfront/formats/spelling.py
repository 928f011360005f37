"""Calibrated formats as JSON, and back. A run folder stores the formats of a trained candidate in this form.

A format is stored as the name it is registered under and the values of its fields, never as code. Tuples become lists
in JSON and are tuples again when they are read, because the fields of a format are hashable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bitfront.errors import CheckpointError, UnknownNameError, one_of
from bitfront.formats import FORMATS
from bitfront.formats.base import Format, Operand

#: The entry that holds the registered name; the others are fields.
NAME = "format"


def spelled(formats: Mapping[str, Mapping[Operand, Format]]) -> dict[str, dict[str, Any]]:
    """Site → operand → what ``as_json`` gives. Raises like it."""
    return {site: {operand: as_json(f) for operand, f in of_site.items()} for site, of_site in formats.items()}


def read(document: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[Operand, Format]]:
    """The inverse of ``spelled``. Raises like ``from_json``."""
    formats: dict[str, dict[Operand, Format]] = {}
    for site, of_site in document.items():
        for operand, entry in of_site.items():
            formats.setdefault(site, {})[operand] = from_json(entry)
    return formats


def as_json(form: Format) -> dict[str, Any]:
    """``{"format": registered name, field: value}``.

    Raises:
        UnknownNameError: the class of the format is not registered.
    """
    fields = {f.name: _listed(getattr(form, f.name)) for f in dataclasses.fields(form) if f.init}
    return {NAME: FORMATS.name_of(type(form)), **fields}


def from_json(entry: Mapping[str, Any]) -> Format:
    """The inverse of ``as_json``.

    Raises:
        UnknownNameError: no format of that name is registered.
        CheckpointError: the format of that name has other fields.
    """
    name = entry[NAME]
    try:
        family = FORMATS.get(name)
    except UnknownNameError as error:
        raise UnknownNameError(
            f"{error.message} A format of another package must be installed, or its file imported first."
        ) from None
    given = {k: _tupled(v) for k, v in entry.items() if k != NAME}
    try:
        return family(**given)
    except TypeError:
        known = one_of(f.name for f in dataclasses.fields(family) if f.init)
        raise CheckpointError(
            f"the stored format {name!r} has the fields {', '.join(given)}; {known}. Another version of this format "
            "wrote it: install that one, or search again."
        ) from None


def _listed(value: object) -> object:
    return [_listed(v) for v in value] if isinstance(value, tuple) else value


def _tupled(value: object) -> object:
    return tuple(_tupled(v) for v in value) if isinstance(value, list) else value
