"""Widths of layers as a space: choices, widths that follow, and tables that contradict the model."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import bitfront.models  # noqa: F401  (its registry must exist)
from bitfront.errors import ConfigError
from bitfront.graph import capture
from bitfront.models.base import build_model
from bitfront.spaces import SPACES
from bitfront.spaces.described import DescribedSpace
from bitfront.spaces.request import Part, SpaceRequest
from bitfront.spaces.widths import WidthSpace
from bitfront.testing.spaces import check_space
from bitfront.transforms import widen
from engine.networks import Residual, ResidualImages, seeded_model

THREE = capture(build_model("jsc-three-linear-layers", (16,), 5, seed=0), torch.zeros(2, 16))
INT = {"name": ["integer"], "data_in_width": [8], "weight_width": [4, 8], "bias_width": [8]}


def space(seed, graph=THREE, by="name"):
    return WidthSpace(SpaceRequest(graph, by, seed))


def out(*multipliers, **more):
    return {"name": ["output_only"], "channel_multiplier": list(multipliers), **more}


def sizes(built, code):
    """Output features of each Linear of a candidate."""
    model = widen(built.graph, built.widths(built.split(code[None])[0][0]))
    return [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]


def test_it_is_registered_under_the_name_mase_gives_it_and_a_short_one():
    assert SPACES.get("graph/quantize/channel_size_modifier") is WidthSpace
    assert SPACES.get("channel_size") is WidthSpace


def test_an_input_only_layer_spells_settings_that_are_the_same_network():
    seed = {
        "default": {"name": ["NA"], "channel_multiplier": [1]},
        "seq_blocks_2": out(1, 2, parent_block_name=["seq_blocks_1"]),
        "seq_blocks_4": {"name": ["both"], "channel_multiplier": [1, 2, 3], "parent_block_name": ["seq_blocks_2"]},
        "seq_blocks_6": {"name": ["input_only"], "channel_multiplier": [1, 2], "parent_block_name": ["seq_blocks_4"]},
    }
    built = space(seed)
    assert (built.spelled_size, built.size) == (12, 6)
    check_space(built)
    codes = built.numbered(0, 6)
    assert [sizes(built, c) for c in codes] == [[a, b, 5] for a in (16, 32) for b in (16, 32, 48)]
    assert [o.choices for o in built.offers()] == ["16 → 16 or 32", "16 → 16 or 32 or 48", "5, as it is"]


def test_each_layer_has_a_multiplier_so_that_16_32_64_5_is_reachable():
    built = space({"seq_blocks_2": out(1, 2), "seq_blocks_4": out(1, 4)})
    assert [32, 64, 5] in [sizes(built, c) for c in built.numbered(0, built.size)]


def test_a_candidate_spelled_out_is_that_candidate_again():
    built = space(
        {"seq_blocks_2": out(0.3, 1, 1.7, divisor=4), "seq_blocks.4": out(1, 2, parent_block_name="seq_blocks_2")}
    )
    kept = DescribedSpace(built.description)
    for code in built.numbered(0, built.size):
        config = built.decode(code)
        assert np.array_equal(built.encode(config), code)
        assert kept.decode(code) == config
        widths = [w for _, w in kept.layer_widths(code).values()]
        assert widths == sizes(built, code)[:2]
    assert config["seq_blocks_4"]["config"] == {
        "name": "output_only",
        "channel_multiplier": 2,
        "parent_block_name": "seq_blocks_2",
    }
    assert config["seq_blocks_2"]["config"] == {"name": "output_only", "channel_multiplier": 1.7, "divisor": 4}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"seq_blocks_2": {"config": out(3)}}, "no such width of seq_blocks_2 (Linear); allowed: 16, 32"),
        (
            {"seq_blocks_4": {"config": out(2)}},
            "changes the width of a layer without a choice in this space; allowed: seq_blocks_2",
        ),
        ({"seq_blocks_2": {"config": out(1, 2)}}, "leaves a choice at seq_blocks_2/channel"),
        ({"seq_blocks_2": 3}, "must be a table"),
    ],
)
def test_a_candidate_of_another_space_is_refused(config, message):
    with pytest.raises(ConfigError) as caught:
        space({"seq_blocks_2": out(1, 2)}).encode(config)
    assert message in str(caught.value)


def test_multipliers_that_round_to_the_same_width_are_one():
    built = space({"seq_blocks_2": out(1, 1.01, 1.9, 2, divisor=8)})
    assert built.parameters[0].labels == ("x1", "x1.9")
    assert (built.size, built.spelled_size) == (2, 4)


def test_a_choice_between_widening_and_not_is_one_among_multipliers():
    built = space({"seq_blocks_2": {"name": ["NA", "both"], "channel_multiplier": [2, 0.5]}})
    assert [sizes(built, c)[0] for c in built.numbered(0, built.size)] == [8, 16, 32]


def test_uniform_candidates_multiply_every_layer_alike_and_the_model_as_it_is_comes_first():
    built = space({"seq_blocks_2": out(0.5, 1, 2), "seq_blocks_4": out(1, 2, 4)})
    assert [sizes(built, c)[:2] for c in built.uniform()] == [[16, 16], [8, 16], [32, 32], [32, 64]]


def test_layers_that_are_added_share_their_widths():
    graph = capture(seeded_model(Residual), torch.zeros(2, 6))
    built = space({"second": out(1, 2), "project": out(1, 2)}, graph)
    assert built.size == 2
    assert {o.site: o.choices for o in built.offers()}["second"] in ("5 → 5 or 10", "as project")
    assert space({"second": out(1, 2)}, graph).size == 2
    with pytest.raises(ConfigError, match=r"share their channels.*Give both the same") as caught:
        space({"second": out(1, 2), "project": out(1, 3)}, graph)
    assert "second" in str(caught.value)
    assert "project" in str(caught.value)


def test_convolutions_have_widths_too():
    graph = capture(seeded_model(ResidualImages), torch.zeros(2, 2, 5, 5))
    built = space({"b": out(1, 3)}, graph)
    check_space(built)
    model = widen(graph, built.widths(built.split(built.numbered(1, 2))[0][0]))
    assert (model.b.out_channels, model.project.out_channels, model.head.in_features) == (12, 12, 12)


def test_a_rule_for_many_layers_leaves_those_that_cannot_change():
    built = space({"linear": out(1, 2)}, by="type")
    assert built.notes == ("the width of seq_blocks_6 is 5 and cannot change: the model's output",)
    for ruled in (built, space({"default": out(1, 2)}), space({r"seq_blocks_[24]": out(1, 2)}, by="regex_name")):
        widths = [sizes(ruled, code) for code in ruled.numbered(0, ruled.size)]
        assert widths == [[a, b, 5] for a in (16, 32) for b in (16, 32)]


# --- contradictions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "key", "message"),
    [
        ({"seq_blocks_6": out(1, 2)}, "seq_blocks_6.config.channel_multiplier", "is 5 and cannot change"),
        ({"seq_blocks_3": out(1, 2)}, "seq_blocks_3", "ReLU) cannot be chosen: it follows the layers before it; allowed: seq_blocks_2"),
        ({"seq_blocks_8": out(1, 2)}, "seq_blocks_8", "no layer 'seq_blocks_8'"),
        ({"seq_blocks_2": out(0)}, "seq_blocks_2.config.channel_multiplier", "numbers above 0"),
        ({"seq_blocks_2": out("2")}, "seq_blocks_2.config.channel_multiplier", "numbers above 0"),
        ({"seq_blocks_2": out(True)}, "seq_blocks_2.config.channel_multiplier", "numbers above 0"),
        ({"seq_blocks_2": out(math.inf)}, "seq_blocks_2.config.channel_multiplier", "numbers above 0"),
        ({"seq_blocks_2": out()}, "seq_blocks_2.config.channel_multiplier", "empty"),
        ({"seq_blocks_2": out(2, divisor=[2, 4])}, "seq_blocks_2.config.divisor", "one whole number"),
        ({"seq_blocks_2": out(2, divisor=1.5)}, "seq_blocks_2.config.divisor", "one whole number"),
        ({"seq_blocks_2": {"name": ["outputs"]}}, "seq_blocks_2.config.name", "'output_only'?"),
        ({"seq_blocks_2": out(2, multiplier=2)}, "seq_blocks_2.config.multiplier", "unknown key"),
        (
            {"seq_blocks_6": {"name": "input_only", "parent_block_name": ["seq_blocks_2"]}},
            "seq_blocks_6.config.parent_block_name",
            "does not come from 'seq_blocks_2', but from seq_blocks_4",
        ),
        (
            {"seq_blocks_2": out(2, parent_block_name="seq_blocks_4")},
            "seq_blocks_2.config.parent_block_name",
            "does not come from 'seq_blocks_4', but from the input of the model",
        ),
        (
            {"seq_blocks_2": out(2, parent_block_name="seq_blocks_9")},
            "seq_blocks_2.config.parent_block_name",
            "no node 'seq_blocks_9'",
        ),
        ({"seq_blocks_2": out(1)}, "", "there is no choice of widths"),
        ({"linear": out(2)}, "", "No layer matches 'linear' (by = 'name')"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_an_error_that_names_the_key(seed, key, message):
    with pytest.raises(ConfigError) as caught:
        space(seed)
    assert caught.value.key == ("search", "search_space", "seed", *filter(None, key.split(".")))
    assert message in str(caught.value)


def test_one_other_width_is_a_space_of_one_candidate():
    only = space({"seq_blocks_2": out(2)})
    assert only.size == 1
    assert list(only.widths(only.options(only.uniform())[0]).values()) == [32]


@pytest.mark.parametrize("parent", ["seq_blocks_2", "seq_blocks.2", "seq_blocks_3", ["seq_blocks_3"], "NA"])
def test_a_parent_is_the_layer_before_or_a_node_between(parent):
    built = space({"seq_blocks_4": out(1, 2, parent_block_name=parent)})
    assert [sizes(built, code) for code in built.numbered(0, built.size)] == [[16, 16, 5], [16, 32, 5]]


def test_of_a_sum_both_sides_are_parents():
    graph = capture(seeded_model(Residual), torch.zeros(2, 6))
    for parent in ("project", "second"):
        assert space({"second": out(1, 2), "head": {"name": "NA", "parent_block_name": parent}}, graph).size == 2


def test_a_bad_regular_expression_is_named():
    with pytest.raises(ConfigError, match="not a regular expression"):
        space({"(": out(1, 2)}, by="regex_name")


# --- joint -----------------------------------------------------------------------------------------------------------


def joint(graph=THREE, **parts):
    return SPACES.get("joint")(SpaceRequest(graph, parts={name: Part(by, seed) for name, (by, seed) in parts.items()}))


def test_a_joint_space_is_the_product_of_both():
    built = joint(
        widths=("name", {"seq_blocks_2": out(1, 2), "seq_blocks_4": out(1, 3)}), quantize=("type", {"linear": INT})
    )
    assert built.size == 4 * 8
    check_space(built)
    kept = DescribedSpace(built.description)
    for code in built.numbered(0, built.size):
        config = built.decode(code)
        assert set(config) == {"widths", "quantize"}
        assert kept.decode(code) == config
        assert np.array_equal(built.encode(config), code)
        options, formats = built.split(code[None])
        assert built.of_formats.decode(formats[0]) == config["quantize"]
        assert built.of_widths.encode(config["widths"]).tolist() == built.of_widths.codes(options)[0].tolist()
    layers = ("seq_blocks_2", "seq_blocks_4", "seq_blocks_6")
    uniform = [
        (
            [c["widths"][layer]["config"]["channel_multiplier"] for layer in layers[:2]],
            [c["quantize"][layer]["config"]["weight_width"] for layer in layers],
        )
        for c in map(built.decode, built.uniform())
    ]
    # Every format at the widths of the model, and every other widening in the last format.
    assert uniform == [([1, 1], [8] * 3), ([1, 1], [4] * 3), ([2, 1], [4] * 3), ([2, 3], [4] * 3)]


@pytest.mark.parametrize("missing", ["widths", "quantize"])
def test_a_joint_space_needs_both_tables(missing):
    parts = {"widths": ("name", {"seq_blocks_2": out(1, 2)}), "quantize": ("type", {"linear": INT})}
    del parts[missing]
    with pytest.raises(ConfigError) as caught:
        joint(**parts)
    assert caught.value.key == ("search", "search_space", missing)


def test_errors_in_a_part_name_its_table():
    with pytest.raises(ConfigError) as caught:
        joint(widths=("name", {"seq_blocks_6": out(2)}), quantize=("type", {"linear": INT}))
    assert caught.value.key[:5] == ("search", "search_space", "widths", "seed", "seq_blocks_6")
    with pytest.raises(ConfigError) as caught:
        joint(widths=("name", {"seq_blocks_2": out(1, 2)}), quantize=("type", {"linear": {**INT, "weigth_width": [2]}}))
    assert caught.value.key == ("search", "search_space", "quantize", "seed", "linear", "config", "weigth_width")
