"""Formats written as JSON and read again: by their registered names, with everything they learned."""

import json
from dataclasses import dataclass

import pytest
import torch

from bitfront.errors import CheckpointError, UnknownNameError
from bitfront.formats import FORMATS
from bitfront.formats.affine import Affine
from bitfront.formats.base import WEIGHT
from bitfront.formats.integer import Integer
from bitfront.formats.spelling import read, spelled


@dataclass(frozen=True)
class MyFmt(Integer):
    """A format whose class is called otherwise than the format."""

    table: tuple[tuple[float, ...], ...] = ()


def through_json(formats):
    return read(json.loads(json.dumps(spelled(formats))))


def test_formats_survive_being_written():
    affine = FORMATS.get("affine").parse({"width": 8}, WEIGHT).calibrated(torch.randn(3, 5))
    formats = {"a": {"weight": Integer(4, -2, False), "data_in": affine}, "b": {"bias": Integer(8, "auto")}}
    assert through_json(formats) == formats


def test_a_registered_name_spells_a_format_and_not_its_class(formats):
    formats.register("my-format", "mine")(MyFmt)
    learned = {"a": {"weight": MyFmt(4, 2, True, ((0.5, 1.0), (2.0,)))}}
    assert spelled(learned)["a"]["weight"]["format"] == "my-format"
    assert through_json(learned) == learned


def test_what_older_runs_hold_is_read():
    """Before, the class's name in lower case stood there."""
    stored = {
        "a": {
            "data_in": {"format": "integer", "width": 6, "frac_width": 3, "signed": False},
            "weight": {
                "format": "affine",
                "width": 4,
                "symmetric": True,
                "granularity": "channel",
                "range": "minmax",
                "axis": 0,
                "scale": [0.5, 0.25],
                "zero_point": [0, 0],
            },
        }
    }
    weight = Affine(4, True, "channel", "minmax", 0, (0.5, 0.25), (0, 0))
    assert read(stored) == {"a": {"data_in": Integer(6, 3, False), "weight": weight}}


def test_a_format_that_is_registered_nowhere_is_not_written():
    with pytest.raises(
        UnknownNameError, match=r"the format 'MyFmt' \(.*test_spelling.py\) is not registered; decorate it"
    ):
        spelled({"a": {"weight": MyFmt(4, 2)}})


def test_a_format_that_is_not_installed_is_named():
    with pytest.raises(UnknownNameError, match=r"no format called 'my-format'.*must be installed, or its file"):
        read({"a": {"weight": {"format": "my-format", "width": 4}}})


def test_fields_that_the_installed_format_does_not_have_are_named():
    with pytest.raises(
        CheckpointError, match="'integer' has the fields width, point; allowed: width, frac_width, signed"
    ):
        read({"a": {"weight": {"format": "integer", "width": 4, "point": 2}}})
