"""Operands that share the choice of another unless the file has keys for them, such as the projections of an attention."""

import numpy as np
import pytest
import torch
from torch import nn

from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.evaluation.interface import EvaluationJob
from bitfront.errors import ConfigError
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.metrics.configured import configured_runner
from bitfront.scoring import evaluate
from bitfront.spaces.quantize import QuantizationSpace
from bitfront.spaces.request import SpaceRequest
from bitfront.testing.spaces import check_space


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True, kdim=3)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = self.mix(x, x[..., :3], x)[0]
        h = h + nn.functional.scaled_dot_product_attention(h, h, h)
        return self.head(h.mean(1))


torch.manual_seed(0)
MODEL = Net().eval()
for p in MODEL.parameters():
    nn.init.normal_(p, std=0.5)
X = torch.randn(12, 5, 4)
GRAPH = capture(MODEL, X)
COMMON = {
    "name": "integer",
    "weight_width": [4, 6],
    "weight_frac_width": 3,
    "data_in_width": 8,
    "data_in_frac_width": 4,
    "bias_width": 5,
    "bias_frac_width": 3,
}


def space(by="type", key="attention", **more):
    return QuantizationSpace(SpaceRequest(GRAPH, by, {key: COMMON | more, "default": {"name": "NA"}}))


def formats(built, site, option=0):
    index = [s.name for s in built.sites].index(site)
    return built.site_formats[index][option]


@pytest.mark.parametrize(("by", "key"), [("type", "attention"), ("name", "mix"), ("regex_name", "mi.*")])
def test_one_key_is_for_all_projections_and_one_for_all_values(by, key):
    built = space(by, key)
    assert built.size == 2
    for option, width in enumerate((4, 6)):
        of = formats(built, "mix", option)
        assert {o for o, f in of.items() if f == Integer(width, 3)} == {
            "weight_query", "weight_key", "weight_value", "weight_out",
        }  # fmt: skip
        data = {"data_in", "data_in_key", "data_in_value", "query", "key", "value", "scores", "attention", "context"}
        assert {o for o, f in of.items() if f == Integer(8, 4)} == data
        assert {o for o, f in of.items() if f == Integer(5, 3)} == {"bias", "bias_out"}
    assert formats(built, "head") == formats(built, "scaled_dot_product_attention") == {}


def test_an_operand_with_keys_chooses_for_itself():
    built = space(weight_out_width=[2, 3, 5], weight_out_frac_width=1, attention_width=5, attention_frac_width=5)
    assert built.size == 6
    assert [p.name.split("/")[-1] for p in built.parameters] == ["weight", "weight_out"]
    of = formats(built, "mix", 5)
    assert (of["weight_query"], of["weight_out"], of["attention"]) == (Integer(6, 3), Integer(5, 1), Integer(5, 5))
    assert of["scores"] == Integer(8, 4)


def test_an_operand_can_stay_in_float_beside_others_that_share():
    built = space(scores_width="NA", weight_out_width=["NA", 3], weight_out_frac_width=1)
    of = formats(built, "mix", 1)
    assert of["weight_key"].bits == 4
    assert of["attention"].bits == 8
    assert not {"scores", "weight_out"} & {*of}
    # Chosen by its type, a function has the same keys.
    of = formats(
        space(key="scaled_dot_product_attention", key_width=4, key_frac_width=2), "scaled_dot_product_attention"
    )
    assert of == dict.fromkeys(("query", "value", "scores", "attention"), Integer(8, 4)) | {"key": Integer(4, 2)}


def test_too_many_options_are_refused_with_their_number():
    lists = {f"{o}_width": list(range(2, 12)) for o in ("query", "key", "value", "scores", "attention", "context")}
    fracs = {f"{o}_frac_width": 2 for o in ("query", "key", "value", "scores", "attention", "context")}
    with pytest.raises(ConfigError, match=r"mix \(MultiheadAttention\) would have 2,000,000 options"):
        space(**lists, **fracs)


def test_the_space_keeps_its_contract():
    seed = {
        "attention": COMMON | {"scores_width": ["NA", 5], "scores_frac_width": 2},
        "default": COMMON | {"name": ["integer", "NA"]},
    }
    check_space(QuantizationSpace(SpaceRequest(GRAPH, "type", seed)))


def test_candidates_and_their_costs():
    seed = {
        "default": COMMON
        | {"weight_out_width": [3, 5], "weight_out_frac_width": 2, "scores_width": ["NA", 5], "scores_frac_width": 2}
    }
    names = ("basic_evaluation", "model_size", "average_bitwidth", "bops", "ebops", "basic_computation", "sparsity")
    y = torch.arange(12) % 3
    job = EvaluationJob(
        model=MODEL,
        sample=X[:2],
        space="graph/quantize/mixed_precision_ptq",
        by="name",
        choices=seed,
        runners=tuple(map(configured_runner, names)),
        splits={"val": (X, y)},
        calibration=X,
    )
    evaluator = FixedEvaluator(job)
    codes = evaluator.space.sample(16, np.random.default_rng(0))
    measured = evaluator.evaluate(codes)
    assert not any(measured.errors)
    options = evaluator.space.options(codes)
    for i, code in enumerate(codes):
        alone = evaluate(evaluator.model(code), X, y, batch_size=evaluator.chunk)
        assert measured.values["loss"][i] == alone.loss
        chosen = evaluator.space.formats(options[i])
        bits = {o: f.bits for o, f in chosen["mix"].items()}
        sizes = {"weight_query": 16, "weight_key": 12, "weight_value": 16, "weight_out": 16}
        stored = sum(-(-n * bits[o] // 8) for o, n in sizes.items()) + -(-12 * 5 // 8) + -(-4 * 5 // 8)
        head = {o: f.bits for o, f in chosen["head"].items()}
        assert measured.values["model_size"][i] == stored + -(-12 * head["weight"] // 8) + -(-3 * 5 // 8)
        weights = sum(n * bits[o] for o, n in sizes.items()) + 12 * head["weight"]
        assert measured.values["average_bitwidth"][i] == pytest.approx(weights / 72)
        # total_bitops: every product by the bits of its two operands, everything else by those of its input.
        pairs = [(5 * 16, 8, bits["weight_query"]), (5 * 12, 8, bits["weight_key"]), (5 * 16, 8, bits["weight_value"])]
        pairs += [(5 * 5 * 4, 8, 8), (5 * 5 * 4, 8, 8), (5 * 16, 8, bits["weight_out"])]
        mix = sum(n * a * b for n, a, b in pairs) + 5 * 5 * 5 * 2 * 8
        dot = 5 * 5 * 4 * 2 * 64 + 5 * 5 * 5 * 8
        linear, add, mean = 12 * 8 * head["weight"], 20 * 8, 20 * 32
        assert measured.values["total_bitops"][i] == mix + dot + linear + add + mean
        assert measured.values["ebops"][i] == pytest.approx(effective(chosen))


#: (operand, the one that it is multiplied with, multiply-accumulates) of each product of the attention.
PRODUCTS = [
    ("data_in", "weight_query", 80),
    ("data_in_key", "weight_key", 60),
    ("data_in_value", "weight_value", 80),
    ("query", "key", 100),
    ("attention", "value", 100),
    ("context", "weight_out", 80),
]
HELD = {
    "weight_query": "q_proj_weight",
    "weight_key": "k_proj_weight",
    "weight_value": "v_proj_weight",
    "weight_out": "out_proj.weight",
}


def effective(chosen):
    """EBOPs of MODEL: of each product its bits times bits, for the weights that are not zero, and the bits of biases
    that are not zero, once per output; all without their signs."""

    def share(weight, form):
        return float((form.quantize(weight) != 0).double().mean())

    held, mix, head = dict(MODEL.mix.named_parameters()), chosen["mix"], chosen["head"]
    total = 12 * 7 * (head["weight"].bits - 1) * share(MODEL.head.weight, head["weight"]) + 5 * 5 * 4 * 2 * 49
    biases = ((3, MODEL.head.bias, head["bias"]), (60, held["in_proj_bias"], mix["bias"]))
    for outputs, bias, form in (*biases, (20, held["out_proj.bias"], mix["bias_out"])):
        total += outputs * 4 * share(bias, form)
    for data, weight, macs in PRODUCTS:
        density = share(held[HELD[weight]], mix[weight]) if weight in HELD else 1
        total += macs * (mix[data].bits - 1) * (mix[weight].bits - 1) * density
    return total
