"""Spaces of formats that have no parameter called ``width``, or none at all: chosen, spelled out and understood again."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

import bitfront as bf
from bitfront.data.arrays import from_arrays
from bitfront.errors import ConfigError
from bitfront.formats.base import Format, FormatError, FormatParameter
from bitfront.spaces.described import DescribedSpace, Size
from bitfront.spaces.quantize import single
from bitfront.testing import check_format, check_space


@dataclass(frozen=True)
class Half(Format):
    """IEEE's half precision, saturating."""

    parameters: ClassVar[Mapping[str, FormatParameter]] = {}
    bits_parameter = None
    bits = 16
    label = "half"

    @classmethod
    def _build(cls, values, kind, signed):
        return cls()

    def round(self, x):
        return x.clamp(-65504, 65504).half().to(x.dtype)

    def bounds(self, x):
        return -65504.0, 65504.0


@dataclass(frozen=True)
class Parts(Format):
    """Tenths or hundredths between −1 and 1; the number of bits says which."""

    size: int
    parts: int

    bits_parameter = "size"
    parameters: ClassVar[Mapping[str, FormatParameter]] = {
        "size": FormatParameter("bits of a value", low=5, high=8),
        "parts": FormatParameter("parts of 1", low=10, high=100, default=10),
    }

    @classmethod
    def _build(cls, values, kind, signed):
        if 2 * values["parts"] + 1 > 2 ** values["size"]:
            raise FormatError(f"{values['size']} bits do not hold {2 * values['parts'] + 1} values")
        return cls(values["size"], values["parts"])

    @property
    def bits(self):
        return self.size

    @property
    def rank(self):
        return float(self.parts == 10)

    @property
    def label(self):
        return f"parts{self.size}.{self.parts}"

    def round(self, x):
        return torch.clamp(torch.round(x * self.parts), -self.parts, self.parts) / self.parts

    def bounds(self, x):
        return -1.0, 1.0


@pytest.fixture
def others(formats):
    formats.register("half")(Half)
    formats.register("parts")(Parts)


SEED = {
    "fc1": {"name": ["half", "parts", "integer"], "weight_size": [5, 8], "weight_parts": [10, 100], "weight_width": 4},
    "relu": {"name": ["half", "NA"], "data_in": [{}]},
    "fc2": {"name": "parts", "data_in": [{"size": 8}, {"size": "NA"}], "bias": [{"size": 8, "parts": 100}]},
}


def test_they_keep_the_contract(others):
    check_format("half", {})
    check_format("parts", {"size": 8, "parts": 100})


def test_each_candidate_is_spelled_out_and_understood(others, space_of, tiny_mlp):
    space = space_of(tiny_mlp, (4,), SEED)
    check_space(space)
    assert [g.size for g in space.groups] == [5, 2, 2]
    offers = {o.site: o.choices for o in space.offers()}
    assert "1 left out, e.g. 5 bits do not hold 201 values" in offers["fc1"]
    assert offers["fc2"] == "parts (data_in: parts8.10 float; weight: float; bias: parts8.100)"
    seen = set()
    for code in space.numbered(0, space.size):
        config = space.decode(code)
        formats = space.formats(space.options(code[None])[0])
        assert single(space.graph, config).formats(np.zeros(3, dtype=np.int64)) == formats
        seen |= {form for of_site in formats.values() for form in of_site.values()}
    assert {Half(), Parts(5, 10), Parts(8, 10), Parts(8, 100)} <= seen


def test_among_equal_bits_the_lowest_rank_is_tried_first(others, space_of, tiny_mlp):
    space = space_of(tiny_mlp, (4,), {"fc1": {"name": "parts", "weight_size": 8, "weight_parts": [10, 50, 100]}})
    (first,) = space.uniform()
    assert space.formats(space.options(first[None])[0]) == {"fc1": {"weight": Parts(8, 50)}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": ["parts", "half"]}, "no operand has a size or format; allowed: data_in_size, .*weight, "),
        ({"name": "half", "weight_width": 4}, "unknown key; allowed: name, bypass, "),
        ({"name": "half", "weight": [4]}, r"a list of tables, such as weight = \[\{\}\]"),
    ],
)
def test_mistakes_are_named_in_the_words_of_the_format(config, message, others, space_of, tiny_mlp):
    with pytest.raises(ConfigError, match=message):
        space_of(tiny_mlp, (4,), {"fc1": config})


def test_what_a_choice_means_is_read_from_the_description(others, space_of, tiny_mlp):
    space = space_of(tiny_mlp, (4,), SEED)
    bits = {"float": 32, "half": 16, "parts5.10": 5, "parts8.10": 8, "parts8.100": 8, "int4.2": 4}
    read = DescribedSpace(json.loads(json.dumps(space.description)))
    assert read.sizes == {label: Size("bits", b) for label, b in bits.items()}
    last = {"name": "parts", "data_in_size": 8, "bias": [{"size": 8, "parts": 100}]}
    code = space.encode({"fc1": {"config": {"name": "parts", "weight_size": 5}}, "fc2": {"config": last}})
    assert read.operand_bits(code) == {"fc1": {"weight": 5}, "fc2": {"data_in": 8, "bias": 8}}

    # Older run folders do not say the bits: the format does, where it is installed.
    for setting in (
        s for e in read.description for a in e["alternatives"] for o in a["operands"] for s in o["settings"]
    ):
        del setting["bits"]
    older = DescribedSpace(read.description)
    assert (older.sizes, older.operand_bits(code)) == (read.sizes, read.operand_bits(code))
    for alternative in (a for e in older.description for a in e["alternatives"] if a["name"] == "parts"):
        alternative["name"] = "gone"
    older = DescribedSpace(older.description)
    assert set(older.sizes) == {"float", "half", "int4.2"}
    assert older.operand_bits(code) == {"fc1": {"weight": None}, "fc2": {"data_in": None, "bias": None}}


def test_a_search_finds_and_rebuilds_them(others, tiny_mlp, tmp_path):
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    data = from_arrays(x, (x.sum(1) > 0).long())
    run = bf.search(
        model=tiny_mlp,
        data=data,
        space={"by": "name", **SEED},
        metrics={"accuracy": "maximize", "average_bitwidth": "minimize"},
        strategy="brute_force",
        project_dir=str(tmp_path),
    )
    assert len(run) == 20
    for trial in run.front:
        rebuilt = bf.transform_trial(run.folder, trial.number, check=True, data=data, model=tiny_mlp)
        assert rebuilt.evaluation.loss == trial.metrics["loss"]
