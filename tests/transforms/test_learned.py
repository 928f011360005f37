"""Ranges that are learned: what they round to, where their gradients point, and what is frozen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bitfront.formats import FORMATS
from bitfront.formats.affine import Affine, LearnedAffine
from bitfront.formats.base import WEIGHT
from bitfront.formats.integer import Integer, LearnedInteger
from bitfront.formats.spelling import spelled
from bitfront.graph import capture
from bitfront.transforms.learned import frozen, learning_model, settle, shadow
from bitfront.transforms.quantize import quantize


def affine(width=4, **settings):
    return FORMATS.get("affine").parse({"width": width, **settings}, WEIGHT)


@given(st.integers(2, 8), st.integers(-4, 8), st.booleans(), st.integers(0, 10**6))
def test_until_something_is_learned_it_rounds_as_the_format_does(width, frac, signed, seed):
    start = Integer(width, min(frac, width), signed)
    x = 4 * torch.randn(50, generator=torch.Generator().manual_seed(seed))
    learned = LearnedInteger(start)
    torch.testing.assert_close(learned.quantize(x).detach(), start.quantize(x), rtol=0, atol=0)
    assert learned.frozen() == start


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_affine_formats_too(granularity, symmetric):
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    start = affine(granularity=granularity, symmetric=symmetric).calibrated(x)
    learned = LearnedAffine(start)
    torch.testing.assert_close(learned.quantize(x).detach(), start.quantize(x), rtol=1e-5, atol=1e-6)
    back = learned.frozen()
    assert back.zero_point == start.zero_point
    assert back.scale == pytest.approx(start.scale, rel=1e-6)


@pytest.mark.parametrize(
    ("start", "better"),
    [
        (Integer(4, 4), lambda f: f.frac_width < 4),  # clips nearly everything: the range must grow
        (Integer(4, -4), lambda f: f.frac_width > -4),  # rounds everything to zero: it must shrink
        (Affine(4, True, "tensor", "minmax", 0, (20.0,), (0,)), lambda f: f.scale[0] < 10),
        (Affine(4, True, "tensor", "minmax", 0, (0.01,), (0,)), lambda f: f.scale[0] > 0.05),
    ],
)
def test_ranges_move_to_where_the_error_is_smaller(start, better):
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    learned = start.learned_range()
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.05)
    before = float(((start.quantize(x) - x) ** 2).mean())
    for _ in range(300):
        optimizer.zero_grad()
        loss = ((learned.quantize(x) - x) ** 2).mean()
        loss.backward()
        optimizer.step()
    final = learned.frozen()
    assert better(final)
    assert float(((final.quantize(x) - x) ** 2).mean()) < 0.3 * before
    assert final.bits == start.bits


def test_a_frac_width_stays_what_a_configuration_can_say():
    learned = LearnedInteger(Integer(4, 2))
    for exponent, expected in ((-9.0, 9), (-200.0, 96), (200.0, -96), (-1.4, 1)):
        with torch.no_grad():
            learned.exponent.fill_(exponent)
        assert learned.frozen().frac_width == expected
        assert learned.quantize(torch.ones(1)).isfinite().all()


def test_a_model_with_learned_ranges_computes_what_the_quantized_one_does():
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    graph = capture(net, x[:2])
    before = {k: v.clone() for k, v in graph.model.state_dict().items()}
    formats = {
        "_0": {"data_in": Integer(6, 3), "weight": Integer(4, 3), "bias": Integer(8, 5)},
        "_3": {"data_in": Integer(6, 3), "weight": affine().calibrated(net[3].weight.detach())},
    }
    model, rounds = learning_model(graph, formats, {})
    torch.testing.assert_close(model(x), quantize(graph, formats)(x), rtol=1e-5, atol=1e-6)
    assert spelled(frozen({k: v for k, v in rounds.items() if k == "_0"})) == spelled({"_0": formats["_0"]})
    # Weights and ranges are all trained; the captured model is never touched.
    names = {n for n, _ in model.named_parameters()}
    assert {"0.weight", "0.data_in_range.exponent", "3.weight_range.exponent"} <= names
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    state = shadow(graph, model.state_dict())
    assert set(state) == set(before)
    assert all(torch.equal(v, before[k]) for k, v in graph.model.state_dict().items())
    again = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    again.load_state_dict(state)
    deployed = quantize(capture(again, x[:2]), frozen(rounds))
    torch.testing.assert_close(deployed(x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_settled_range_stays_whatever_its_exponent_does():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    graph = capture(net, x[:2])
    formats = {"_0": {"weight": Integer(4, 3)}, "_2": {"weight": affine().calibrated(net[2].weight.detach())}}
    model, rounds = learning_model(graph, formats, {})
    exponent, scale = model[0].weight_range.exponent, model[2].weight_range.exponent
    with torch.no_grad():
        exponent.add_(0.6)
    assert frozen(rounds)["_0"]["weight"].frac_width == 2
    state = {k: v.clone() for k, v in model.state_dict().items()}
    settle(rounds)
    before = model(x)
    with torch.no_grad():
        exponent.add_(2.0)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert frozen(rounds)["_0"]["weight"].frac_width == 2
    model(x).square().sum().backward()
    assert exponent.grad == 0
    assert scale.grad.abs().sum() > 0, "scales that are no powers of two are learned to the end"
    # What was best before goes back to what it was then.
    settled = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    with torch.no_grad():
        exponent.add_(1.0)
    assert frozen(rounds)["_0"]["weight"].frac_width == 1
    model.load_state_dict(settled)
    assert frozen(rounds)["_0"]["weight"].frac_width == 2
