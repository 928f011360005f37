"""From the tables of the TOML to a space: who gets what, what collapses, and every mistake named with its key."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bitfront.errors import ConfigError
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.spaces import SPACES
from bitfront.spaces.described import DescribedSpace
from bitfront.spaces.quantize import QuantizationSpace, single
from bitfront.spaces.request import SpaceRequest
from bitfront.testing.spaces import check_space
from properties import max_examples

FLOAT = {"name": ["NA"]}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.body = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.body(self.norm(x)))


GRAPH = capture(Net(), torch.randn(2, 4))
SITES = ["body_0", "body_1", "head"]


def space(seed, by="name"):
    return QuantizationSpace(SpaceRequest(GRAPH, by, seed))


def labels(built, site, operand):
    """What `operand` may be at `site`, over all branches."""
    assignment = next(a for a in built.assignments if a.site.name == site)
    return [
        s.format.label if s.format else "float"
        for a in assignment.alternatives
        for o, ss in a.operands
        if o == operand
        for s in ss
    ]


def test_the_space_is_registered_under_the_name_mase_gives_it():
    assert SPACES.get("graph/quantize/mixed_precision_ptq") is QuantizationSpace


# --- choices ---------------------------------------------------------------------------------------------------------

WIDTHS = st.lists(st.sampled_from([1, 2, 4, 8, "NA"]), min_size=1, max_size=3)
FRACS = st.lists(st.sampled_from([-1, 0, 1, 2, "NA", "auto"]), min_size=1, max_size=3)


@st.composite
def seeds(draw):
    """Tables for `head` and `default`; at least one width that is no NA, and a frac width that fits it."""
    seed = {}
    for key in draw(st.sampled_from([["default"], ["head"], ["head", "default"], ["body.0", "head"]])):
        names = draw(
            st.sampled_from([["integer"], ["integer", "NA"], ["affine", "integer"], ["NA", "affine", "integer"]])
        )
        table = {"name": names}
        for operand in draw(st.sets(st.sampled_from(["data_in", "weight", "bias"]), min_size=1)):
            table[f"{operand}_width"] = [8, *draw(WIDTHS)] if draw(st.booleans()) else draw(WIDTHS)
            if "affine" in names:
                table[f"{operand}_width"] = [w for w in table[f"{operand}_width"] if w != 1] or [2]
            if draw(st.booleans()):
                table[f"{operand}_frac_width"] = [0, *draw(FRACS)]
        if draw(st.booleans()):
            table["bypass"] = [False, True]
        seed[key] = table
    return seed


@pytest.mark.slow
@max_examples(50, suite=12)
@given(seeds())
def test_spaces_of_random_tables_conform(seed):
    try:
        built = space(seed)
    except ConfigError as error:
        assert "every site stays in float" in str(error)
        return
    check_space(built)
    # The size counts distinct candidates: no two codes mean the same formats.
    if built.size <= 2000:
        meant = set()
        for options in built.options(built.numbered(0, built.size)):
            formats = built.formats(options)
            meant.add(tuple((s, o, f) for s, operands in sorted(formats.items()) for o, f in sorted(operands.items())))
        assert len(meant) == built.size


def test_every_frac_width_goes_with_every_width():
    built = space({"head": {"name": ["integer"], "weight_width": [4, 8, 16], "weight_frac_width": [2, 4, 6, 8]}})
    assert labels(built, "head", "weight") == [
        *("int4.2", "int4.4", "int4.6", "int4.8"),
        *("int8.2", "int8.4", "int8.6", "int8.8"),
        *("int16.2", "int16.4", "int16.6", "int16.8"),
    ]
    assert {a.site.name: a.excluded for a in built.assignments} == {"body_0": 0, "body_1": 0, "head": 0}
    assert built.size == 12


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"weight_width": [8, 8]}, ["int8.4"]),
        ({"weight_width": [8], "weight_frac_width": ["NA", 4]}, ["int8.4"]),
        (
            {"weight": [{"width": 8}, {"width": 8, "frac_width": 4}, {"width": 8, "frac_width": 6}]},
            ["int8.4", "int8.6"],
        ),
        ({"weight_width": [8, 4], "weight_frac_width": ["NA", 2]}, ["int4.2", "int8.4", "int8.2"]),
        ({"weight_width": ["NA", 4], "weight_frac_width": [1, 2]}, ["int4.1", "int4.2", "float"]),
        ({"weight": [{"width": 4}, {}]}, ["int4.2", "float"]),
        ({"weight_width": 4}, ["int4.2"]),
    ],
)
def test_settings_that_mean_the_same_are_one_and_narrow_ones_come_first(table, expected):
    assert labels(space({"head": {"name": ["integer", "fixed"], **table}}), "head", "weight") == expected


@pytest.mark.parametrize(
    ("table", "size"),
    [
        ({"name": ["integer", "NA"], "weight_width": [4, 8]}, 3),
        ({"name": ["integer"], "weight_width": [4, "NA"]}, 2),
        ({"name": ["integer", "NA"], "weight_width": [4, "NA"]}, 2),
        ({"name": ["integer"], "weight_width": [4], "bypass": [True, False]}, 2),
        ({"name": ["integer", "NA"], "weight_width": [4], "bypass": [True, False]}, 2),
        ({"name": ["integer", "affine"], "weight_width": [4, "NA"], "data_in_width": [4, "NA"]}, 7),
        ({"name": ["affine", "integer", "NA"], "weight_width": [4, "NA"]}, 3),
    ],
)
def test_float_is_one_candidate_however_it_is_spelled(table, size):
    built = space({"head": table})
    assert built.size == size
    check_space(built)
    everything = built.options(built.numbered(0, built.size))
    assert sum(not built.formats(o) for o in everything) == 1


def test_bypass_alone_is_float():
    built = space(
        {
            "head": {"name": ["integer"], "weight_width": [4], "bypass": [True]},
            "body_0": {"name": "integer", "weight_width": 4},
        }
    )
    assert built.size == 1
    assert list(built.formats(np.zeros(3, dtype=np.int64))) == ["body_0"]


def test_a_relu_quantizes_its_input_without_a_sign():
    built = space({"relu": {"name": ["integer"], "data_in_width": [4]}}, by="type")
    assert built.formats(np.zeros(3, dtype=np.int64)) == {"body_1": {"data_in": Integer(4, 2, signed=False)}}


def test_each_of_several_formats_takes_the_widths_that_it_has():
    table = {"name": ["integer", "binary", "ternary", "affine"], "weight_width": [1, 2, 4]}
    built = space({"head": table})
    check_space(built)
    assert labels(built, "head", "weight") == [
        *("int1.0", "int2.1", "int4.2", "binary", "ternary-sc", "affine2sc", "affine4sc"),
    ]
    with pytest.raises(ConfigError, match="width = 99 is not possible; allowed: a whole number from 1 to 32"):
        space({"head": {**table, "weight_width": [2, 99]}})
    with pytest.raises(ConfigError, match=r"no valid setting is left for weight of head .*: width = 4 is not possible"):
        space({"head": {**table, "weight_width": [4]}})


def test_a_format_ignores_the_parameters_of_the_others_it_stands_beside():
    table = {"name": ["integer", "affine"], "weight_width": [4], "weight_frac_width": [1, 2], "weight_range": ["mse"]}
    assert labels(space({"head": table}), "head", "weight") == ["int4.1", "int4.2", "affine4sc-mse"]


# --- who gets what ---------------------------------------------------------------------------------------------------

INT = {"name": ["integer"], "weight_width": [4], "data_in_width": [4]}


@pytest.mark.parametrize(
    ("by", "seed", "expected", "unused"),
    [
        ("name", {"head": INT, "default": FLOAT}, {"head"}, ()),
        ("name", {"body.0": INT}, {"body_0"}, ()),
        ("name", {"default": INT, "head": FLOAT}, {"body_0", "body_1"}, ()),
        ("name", {"head": INT, "linear": INT}, {"head"}, ("linear",)),
        ("type", {"linear": INT}, {"body_0", "head"}, ()),
        ("type", {"Linear": INT, "ReLU": FLOAT, "default": INT}, {"body_0", "head"}, ()),
        ("type", {"relu": INT, "head": INT}, {"body_1"}, ("head",)),
        ("regex_name", {"body_.*": INT}, {"body_0", "body_1"}, ()),
        ("regex_name", {r"body\.\d": INT}, {"body_0", "body_1"}, ()),
        ("regex_name", {"body_0": FLOAT, "body_.*": INT}, {"body_1"}, ()),
        ("regex_name", {"ody_0": INT, "head": INT}, {"head"}, ("ody_0",)),
    ],
)
def test_keys_name_sites_by_name_type_or_pattern(by, seed, expected, unused):
    built = space(seed, by)
    formats = built.formats(built.options(built.numbered(0, 1))[0])
    assert set(formats) == expected
    assert built.unused == unused
    check_space(built)


def test_every_site_knows_the_key_it_got_its_choices_from():
    built = space({"head": INT, "default": FLOAT})
    assert {a.site.name: a.key for a in built.assignments} == dict.fromkeys(SITES, "default") | {"head": "head"}


class Twice(nn.Module):
    """`fc` is called twice; `body_fc` has the name that the path `body.fc` would have."""

    def __init__(self):
        super().__init__()
        self.fc, self.body_fc, self.body = nn.Linear(4, 4), nn.Linear(4, 4), nn.Module()
        self.body.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.body_fc(self.body.fc(self.body.fc(self.fc(self.fc(x)))))


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("fc", {"fc"}),
        ("fc_1", {"fc_1"}),
        ("body.fc", {"body_fc", "body_fc_1"}),
        ("body_fc", {"body_fc"}),
        ("body_fc_1", {"body_fc_1"}),
    ],
)
def test_a_name_is_one_call_of_a_shared_module_and_a_path_is_all_of_them(key, expected, space_of):
    built = space_of(Twice(), (4,), {key: INT})
    assert [s.name for s in built.sites] == ["fc", "fc_1", "body_fc", "body_fc_1", "body_fc_2"]
    assert set(built.formats(np.zeros(5, dtype=np.int64))) == expected
    assert built.graph.site(key).name == min(expected)


def test_calls_of_a_shared_module_keep_separate_choices_when_spelled_out(space_of):
    check_space(space_of(Twice(), (4,), {"default": {"name": ["integer", "NA"], "weight_width": [4, 8]}}))


# --- whole candidates ------------------------------------------------------------------------------------------------


def test_uniform_candidates_give_every_site_the_nearest_width_equal_widths_first():
    built = space(
        {
            "body_0": {"name": ["integer"], "weight_width": [2, 8], "data_in_width": [4, 8]},
            "head": {"name": ["integer", "NA"], "weight_width": [4, 8], "data_in_width": [8], "bias_width": [2, 16]},
        }
    )
    bits = [
        tuple(f.bits for s in ("body_0", "head") for f in built.formats(o)[s].values())
        for o in built.options(built.uniform())
    ]
    # (data_in, weight) of body_0, then (data_in, weight, bias) of head; the bias is near the wider of the two.
    assert bits[:2] == [(4, 2, 8, 4, 2), (8, 8, 8, 8, 2)]
    assert len(set(bits)) == len(bits)
    check_space(built)


def test_the_float_space_has_the_float_model_alone():
    built = QuantizationSpace.of_float(GRAPH)
    assert built.size == 1
    assert built.uniform().shape == (0, 0)
    assert built.formats(np.zeros(3, dtype=np.int64)) == {}
    assert built.decode(built.numbered(0, 1)[0]) == {"by": "name", "default": {"config": {"name": "NA"}}}


def test_a_candidate_spelled_out_is_as_it_stands_in_the_toml():
    built = space(
        {"head": {"name": ["integer", "NA"], "weight_width": [8], "weight_frac_width": ["NA"], "data_in_width": [4, 8]}}
    )
    spelled = [built.decode(c) for c in built.numbered(0, built.size)]
    default = {"by": "name", "default": {"config": {"name": "NA"}}}
    assert spelled == [
        {
            **default,
            "head": {"config": {"name": "integer", "data_in_width": w, "weight_width": 8, "weight_frac_width": "NA"}},
        }
        for w in (4, 8)
    ] + [{**default, "head": {"config": {"name": "NA"}}}]
    # Without the model, from what a run folder keeps, the words are the same.
    kept = DescribedSpace(built.description)
    assert [kept.decode(c) for c in kept.numbered(0, kept.size)] == spelled


def test_candidates_of_another_space_are_refused_by_name():
    built = space({"head": INT})
    with pytest.raises(ConfigError, match=r"does not offer weight int8.4 at head \(Linear\)"):
        built.encode({"head": {"config": {"name": "integer", "weight_width": 8}}})


def test_one_configuration_is_one():
    with pytest.raises(ConfigError, match=r"leaves a choice at head/weight") as caught:
        single(GRAPH, {"head": {"config": {"name": "integer", "weight_width": [4, 8]}}}, ("passes", "quantize"))
    assert caught.value.key == ("passes", "quantize")
    with pytest.raises(ConfigError, match="'head' must be a table with a config"):
        single(GRAPH, {"head": "integer"})


def test_everything_float_is_a_candidate_where_it_is_said_and_a_mistake_where_nothing_matched():
    assert single(GRAPH, {"head": {"config": {"name": "NA"}}}).size == 1
    for config in ({"by": "type", "head": {"config": {"name": "integer", "weight_width": 4}}}, {}):
        with pytest.raises(ConfigError, match="every site stays in float"):
            single(GRAPH, config)


@pytest.mark.parametrize("operand", ["data_in", "weight", "bias"])
def test_bits_and_quantized_list_what_each_option_means(operand):
    built = space({"head": {"name": ["integer", "NA"], "weight_width": [4, "NA"], "data_in_width": [8, 2]}})
    for g, (bits, quantized) in enumerate(zip(built.bits(operand), built.quantized(operand), strict=True)):
        assert len(bits) == len(quantized) == built.groups[g].size
        for option in range(len(bits)):
            options = np.zeros(len(SITES), dtype=np.int64)
            options[g] = option
            form = built.formats(options).get(SITES[g], {}).get(operand)
            assert (bits[option], quantized[option]) == ((form.bits, True) if form else (32, False))


# --- mistakes --------------------------------------------------------------------------------------------------------

HEAD = ("search", "search_space", "seed", "head")
W4 = {"name": ["integer"], "weight_width": [4]}


@pytest.mark.parametrize(
    ("by", "seed", "key", "message"),
    [
        ("names", {"head": INT}, ("search", "search_space", "setup", "by"), r"by = 'names' is not possible; allowed: name, type, regex_name. Did you mean 'name'\?"),
        ("name", {"heat": INT}, (*HEAD[:-1], "heat"), r"the model has no site 'heat'; allowed: body_0, body_1, head. Did you mean 'head'\?"),
        ("type", {"linaer": INT}, (*HEAD[:-1], "linaer"), r"no type of site 'linaer'; allowed: add, .*conv1d, .*Did you mean 'linear'\?"),
        ("regex_name", {"body_(": INT}, (*HEAD[:-1], "body_("), r"'body_\(' is not a regular expression: "),
        ("name", {"head": {"weight_width": [4]}}, (*HEAD, "config"), r"'name' is missing: the number format, or 'NA'; allowed: affine, .*integer"),
        ("name", {"head": {"name": ["intger"]}}, (*HEAD, "config", "name"), r"no format 'intger'; allowed: affine, .*integer, .*NA. Did you mean 'integer'\?"),
        ("name", {"head": {"name": [8]}}, (*HEAD, "config", "name"), r"there is no format 8"),
        ("name", {"head": {"name": []}}, (*HEAD, "config", "name"), r"the list of choices is empty"),
        ("name", {"head": {**W4, "weight_width": []}}, (*HEAD, "config", "weight_width"), r"the list of choices is empty"),
        ("name", {"head": {**W4, "wieght_width": [4]}}, (*HEAD, "config", "wieght_width"), r"unknown key; allowed: name, bypass, data_in, .*Did you mean 'weight_width'\?"),
        ("name", {"head": {**W4, "weight_widht": [4]}}, (*HEAD, "config", "weight_widht"), r"unknown key; .*Did you mean 'weight_width'\?"),
        ("name", {"head": {**W4, "weight_range": ["mse"]}}, (*HEAD, "config", "weight_range"), r"unknown key"),
        ("name", {"head": {"name": ["NA"], "wieght_width": [4]}, "body_0": W4}, (*HEAD, "config", "wieght_width"), r"unknown key"),
        ("name", {"head": {**W4, "bypass": ["no"]}}, (*HEAD, "config", "bypass"), r"bypass = 'no' is not possible; allowed: true, false"),
        ("name", {"head": {**W4, "weight_width": [4, 99]}}, (*HEAD, "config", "weight_width"), r"width = 99 is not possible; allowed: a whole number from 1 to 32"),
        ("name", {"head": {**W4, "weight_width": ["4"]}}, (*HEAD, "config", "weight_width"), r"width = '4' is not possible"),
        ("name", {"head": {**W4, "weight_frac_width": ["most"]}}, (*HEAD, "config", "weight_frac_width"), r"frac_width = 'most' is not possible"),
        ("name", {"head": {**W4, "weight_frac_width": [5, 97]}}, (*HEAD, "config", "weight_frac_width"), r"frac_width = 97 is not possible; allowed: a whole number from -96 to 96"),
        ("name", {"head": {"name": ["integer"], "weight_frac_width": [2]}}, (*HEAD, "config", "weight_frac_width"), r"weight of head \(Linear\): needs 'width'"),
        ("name", {"head": {**W4, "weight": [{"width": 4}]}}, (*HEAD, "config", "weight"), r"weight is given both as complete settings and by single parameters"),
        ("name", {"head": {"name": ["integer"], "weight": [4, 8]}}, (*HEAD, "config", "weight"), r"4 is not possible: a choice among complete settings is a list of tables, such as weight = \[\{width = 4\}\]"),
        ("name", {"head": {"name": ["integer"], "weight": [{"width": 4, "frak": 2}]}}, (*HEAD, "config", "weight"), r"has no parameter 'frak'; allowed: width, frac_width, signed"),
        ("name", {"head": {"name": ["integer"], "weight": [{"width": 4, "frac_width": -97}]}}, (*HEAD, "config", "weight"), r"frac_width = -97 is not possible"),
        ("name", {"head": {"name": ["integer"], "weight": [{"frac_width": 5}]}}, (*HEAD, "config", "weight"), r"needs 'width'"),
        ("name", {"default": FLOAT}, HEAD[:-1], r"every site stays in float: no key with another name than 'NA' matches one of body_0, body_1, head by = 'name'\.$"),
        ("name", {"linear": INT}, HEAD[:-1], r"every site stays in float.* Unused keys: 'linear'\."),
        ("name", {"head": {"name": ["integer"]}}, HEAD, r"every site stays in float: no operand has a width; allowed: data_in_width, weight_width"),
        ("name", {"head": {**W4, "bypass": [True]}}, HEAD[:-1], r"every site stays in float"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_key(by, seed, key, message):
    with pytest.raises(ConfigError, match=message) as caught:
        space(seed, by)
    assert caught.value.key == key


def test_a_model_without_anything_to_configure_says_so():
    graph = capture(nn.Sequential(nn.Flatten(), nn.Softmax(1)), torch.randn(2, 4))
    with pytest.raises(ConfigError, match="nothing that could be configured: no Linear, Conv, Embedding, ReLU"):
        QuantizationSpace(SpaceRequest(graph, choices={"default": INT}))


def test_all_combinations_of_a_small_space_are_enumerated_in_the_order_of_the_model():
    built = space(
        {
            "body_0": {"name": ["integer"], "weight_width": [2, 4]},
            "head": {"name": ["integer"], "weight_width": [4, 8], "data_in_width": [8]},
        }
    )
    rows = [built.formats(o) for o in built.options(built.numbered(0, built.size))]
    widths = [(r["body_0"]["weight"].width, r["head"]["weight"].width) for r in rows]
    assert widths == list(itertools.product([2, 4], [4, 8]))
