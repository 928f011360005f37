"""Where ranges come from: all samples, finite values, each operand's own values. Compared with what is worked out here by
hand, with rounding written out from docs/formats.md."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitfront as bf
from bitfront.engine.evaluation.range_loss import lost
from bitfront.errors import CaptureError
from bitfront.formats.base import ACTIVATION, FACTOR, Format
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.transforms import calibrate, quantize
from bitfront.transforms.observe import KEPT_VALUES, observe

#: Most of them search.
pytestmark = pytest.mark.slow


def fixed(x, width, frac, signed=True):
    low, high = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if signed else (0, 2**width - 1)
    return torch.clamp(torch.round(x * 2.0**frac), low, high) / 2.0**frac


def best_frac(x, width, signed=True):
    x = x[x.isfinite()].double()
    return min(range(-20, 20), key=lambda f: ((fixed(x, width, f, signed) - x) ** 2).sum())


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labelled(x, classes=3):
    y = torch.arange(len(x)) % classes
    a, b = len(x) * 2 // 3, len(x) * 5 // 6
    return {"train": (x[:a], y[:a]), "val": (x[a:b], y[a:b]), "test": (x[b:], y[b:])}


def searched(model, data, tmp_path, **space):
    heard = []

    class Heard(bf.Events):
        def note(self, text):
            heard.append(text)

    run = bf.search(
        model=model,
        data=data,
        space=space,
        metrics={"accuracy": "maximize", "total_bitops": "minimize"},
        strategy="brute_force",
        project_dir=str(tmp_path),
        project="r",
        events=Heard(),
    )
    rebuilt = bf.transform_trial(run.folder, 0, model=model, data=bf.from_splits(data), check=True)
    assert rebuilt.evaluation.loss == run.trial(0).metrics["loss"]
    return run, rebuilt, heard


def loss_by_hand(model, data):
    x, y = data["val"]
    with torch.no_grad():
        return F.cross_entropy(model(x), y).item()


# --- all samples -----------------------------------------------------------------------------------------------------


class Signals(nn.Module):
    """Linear layers on the steps of long signals."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(40, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.fc(x).relu().mean(1))


LARGE = {
    "images": (lambda: nn.Sequential(nn.Conv2d(3, 2, 9, stride=8), nn.Flatten(), nn.Linear(98, 3)), (3, 64, 64), "_0"),
    "volumes": (lambda: nn.Sequential(nn.Conv1d(5, 2, 9, stride=8), nn.Flatten(), nn.LazyLinear(3)), (5, 3000), "_0"),
    "steps": (Signals, (100, 40), "fc"),
    "rows": (lambda: nn.Sequential(nn.Linear(2_000, 3)), (2_000,), "_0"),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("place", [0, 100, 255])
def test_ranges_are_those_of_all_samples_whatever_the_size_of_one(name, place):
    make, shape, site = LARGE[name]
    model, x = make(), randn(256, *shape)
    assert x.numel() > KEPT_VALUES
    model(x[:2])
    x = x * torch.linspace(0.01, 1, 256).reshape(-1, *[1] * len(shape))  # sorted, as classes may be
    x[place].flatten()[7], x[place].flatten()[9] = 200.0, -90.0
    graph = capture(model, x[:2])
    for width, wanted in ((8, "minmax"), (16, "minmax")):
        found = calibrate(graph, {site: {"data_in": Integer(width, wanted)}}, x)[site]["data_in"]
        assert found.frac_width == width - 9
    affine = bf_format({"width": 8}, "affine")
    found = calibrate(graph, {site: {"data_in": affine}}, x)[site]["data_in"]
    assert found.scale == pytest.approx([290 / 255])
    channels = bf_format({"width": 8, "granularity": "channel"}, "affine")
    scales = calibrate(graph, {site: {"data_in": channels}}, x)[site]["data_in"].scale
    spans = x.movedim(1, 0).flatten(1)
    expected = (spans.amax(1).clamp(min=0) - spans.amin(1).clamp(max=0)) / 255
    assert np.allclose(scales, expected.numpy(), rtol=1e-6)


def bf_format(settings, name="integer", kind=ACTIVATION) -> Format:
    return bf.formats.FORMATS.get(name).parse(settings, kind)


@pytest.mark.parametrize("name", LARGE)
def test_what_is_drawn_is_like_all_of_it(name):
    make, shape, site = LARGE[name]
    model, x = make(), randn(256, *shape, seed=1)
    model(x[:2])
    x = x * torch.linspace(0.0, 1, 256).reshape(-1, *[1] * len(shape))
    graph = capture(model, x[:2])
    seen = observe(graph, [(site, "data_in")], x)[site, "data_in"]
    for q in (0.5, 0.9, 0.99):
        exact = np.quantile(x.abs().numpy(), q)
        assert np.quantile(seen.values.abs().numpy(), q) == pytest.approx(exact, rel=0.03)
    found = calibrate(graph, {site: {"data_in": Integer(4, "auto")}}, x)[site]["data_in"]
    assert found.frac_width == best_frac(x[torch.arange(256) % 5 == 0], 4)
    # The same in any order, whatever is drawn.
    backwards = calibrate(graph, {site: {"data_in": Integer(4, "auto")}}, x.flip(0))[site]["data_in"]
    assert backwards == found


def test_a_format_of_others_sees_the_ends_of_a_large_input(formats):
    class Widest(Integer):
        def calibrated(self, sample):
            return Integer(self.width, int(sample.abs().max()))

        calibrated_on = Format.calibrated_on

    x = torch.zeros(64, 3, 64, 64)
    x[60, 1, 5, 5] = -17.0
    graph = capture(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()), x[:2])
    assert calibrate(graph, {"_0": {"data_in": Widest(8, "auto")}}, x)["_0"]["data_in"] == Integer(8, 17)


def test_calibration_samples_are_drawn_from_the_whole_training_split(tmp_path):
    x = torch.cat([randn(400, 5), 100 * randn(400, 5, seed=1)])  # sorted by class
    data = {"train": (x, torch.arange(800) // 400), "val": (randn(100, 5, seed=2), torch.arange(100) % 2)}
    model = nn.Sequential(nn.Linear(5, 2))
    own = {"name": "integer", "data_in_width": [8], "data_in_frac_width": "minmax"}
    _, rebuilt, _ = searched(model, data, tmp_path, linear=own)
    assert rebuilt.formats["_0"]["data_in"].frac_width in (-1, -2)


# --- finite values ---------------------------------------------------------------------------------------------------

BAD = {"nan": [torch.nan], "inf": [torch.inf], "-inf": [-torch.inf], "all": [torch.nan, torch.inf, -torch.inf]}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("large", [False, True])
def test_inputs_that_are_no_numbers_do_not_decide(bad, large):
    x = randn(300, 1000 if large else 6)
    graph = capture(nn.Sequential(nn.Linear(x.shape[1], 3)), x[:2])
    wanted = [Integer(8, "auto"), Integer(8, "minmax"), Integer(8, "percentile"), bf_format({"width": 8}, "affine")]
    clean = [calibrate(graph, {"_0": {"data_in": f}}, x)["_0"]["data_in"] for f in wanted]
    x[5, : len(BAD[bad])] = torch.tensor(BAD[bad])
    found = [calibrate(graph, {"_0": {"data_in": f}}, x)["_0"]["data_in"] for f in wanted]
    assert found[:3] == clean[:3]
    assert found[3].scale == pytest.approx(clean[3].scale)


def test_an_infinite_weight_saturates_and_the_others_are_as_without_it(tmp_path):
    model, x = nn.Sequential(nn.Linear(6, 3)), randn(60, 6)
    with torch.no_grad():
        model[0].weight[1, 2] = torch.inf
    weight, data = model[0].weight.detach(), labelled(x)
    own = {"name": "integer", "weight_width": [6], "weight_frac_width": "auto"}
    run, rebuilt, _ = searched(model, data, tmp_path, linear=own)
    frac = best_frac(weight, 6)
    assert rebuilt.formats["_0"]["weight"] == Integer(6, frac)
    hand = copy.deepcopy(model)
    hand[0].weight.data = fixed(weight, 6, frac)
    assert hand[0].weight[1, 2] == 31 / 2**frac
    assert run.trial(0).metrics["loss"] == pytest.approx(loss_by_hand(hand, data), abs=1e-6)


def test_corrections_do_not_take_up_what_is_not_finite():
    x = randn(80, 6)
    x[3, 2] = torch.inf
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).eval()
    from bitfront.engine.evaluation.calibration import Calibration, Corrections

    graph = capture(model, x[:2])
    own = {"weight": Integer(3, "auto"), "data_in": Integer(8, "auto"), "bias": Integer(8, "auto")}
    calibration = Calibration(graph, x, Corrections(bias=True, batch_norm=True))
    site = graph.site("_0")
    calibration.learn([(site, own)])
    correction = calibration.correction(site, own)
    assert correction.bias.isfinite().all()
    assert all(t.isfinite().all() for pair in correction.norms.values() for t in pair)
    error = fixed(model[0].weight, 3, best_frac(model[0].weight, 3)) - model[0].weight
    kept = x[[i for i in range(80) if i != 3]]
    assert torch.allclose(correction.bias, model[0].bias - (kept @ error.T).mean(0), atol=1e-6)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(6, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.fc(x))


@pytest.mark.parametrize("name", ["fc.weight", "fc.bias", "norm.running_mean"])
def test_nan_in_weights_is_refused_by_name_before_any_work(name, tmp_path):
    model, x = Net().eval(), randn(40, 6)
    model.state_dict()[name].view(-1)[1] = torch.nan
    number = model.state_dict()[name].numel()
    message = rf"{name} holds NaN in 1 of its {number} values"
    with pytest.raises(CaptureError, match=message):
        searched(model, labelled(x), tmp_path, linear={"name": "integer", "weight_width": [4]})
    assert not (tmp_path / "r").exists()
    graph = capture(model, x[:2])
    with pytest.raises(CaptureError, match=message):
        calibrate(graph, {"fc": {"weight": Integer(4, "auto")}}, x)


# --- tensors of any size ---------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("power", [-50, -12, -6, 6, 30])
@pytest.mark.parametrize("rule", ["auto", "minmax"])
def test_the_same_function_in_other_sizes_has_the_same_accuracy(power, rule, tmp_path):
    torch.manual_seed(1)
    usual = nn.Sequential(nn.Linear(6, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)).eval()
    scaled, k = copy.deepcopy(usual), 2.0**power
    with torch.no_grad():  # a batch norm undoes a power of two exactly
        scaled[0].weight.mul_(k)
        scaled[1].running_mean.mul_(k)
        scaled[1].running_var.mul_(k * k)
    for own in (usual, scaled):
        own[1].eps = 0.0
    data = labelled(randn(300, 6))
    space = {
        "name": "integer",
        "weight_width": [4],
        "weight_frac_width": rule,
        "data_in_width": [8],
        "data_in_frac_width": rule,
    }
    losses, fracs = [], []
    for number, own in enumerate((usual, scaled)):
        run, rebuilt, _ = searched(own, data, tmp_path / str(number), linear=space)
        losses.append(run.trial(0).metrics["loss"])
        fracs.append(rebuilt.formats["_0"]["weight"].frac_width)
    assert fracs[1] == fracs[0] - power
    assert losses[1] == pytest.approx(losses[0], abs=2e-6)


@pytest.mark.parametrize("frac", [-6, 3, 9, 20])
def test_any_frac_width_can_be_given_by_hand(frac, tmp_path):
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(6, 3)), labelled(randn(60, 6))
    with torch.no_grad():
        model[0].weight.mul_(2.0**-frac * 8)
    weight = model[0].weight.detach()
    space = {"name": "integer", "weight_width": [4], "weight_frac_width": [frac]}
    run, _, _ = searched(model, data, tmp_path, linear=space)
    hand = copy.deepcopy(model)
    hand[0].weight.data = fixed(weight, 4, frac)
    assert hand[0].weight.any()
    assert run.trial(0).metrics["loss"] == pytest.approx(loss_by_hand(hand, data), rel=1e-6, abs=1e-6)


# --- channels --------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Products of two activations, in heads or not."""

    def __init__(self, product, heads):
        super().__init__()
        self.q, self.k, self.v, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(48, 3)
        self.product, self.heads = product, heads

    def split(self, x):
        return x.unflatten(-1, (2, 4)).transpose(1, 2) if self.heads else x

    def forward(self, x):
        q, k, v = (self.split(m(x)) for m in (self.q, self.k, self.v))
        scores = self.product(q, k.transpose(-2, -1)).softmax(-1)
        out = self.product(scores, v)
        return self.head((out.transpose(1, 2).flatten(2) if self.heads else out).flatten(1))


class Gram(nn.Module):
    """A linear layer whose weight is computed from its input."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(36, 3)

    def forward(self, x):
        y = self.fc(x)
        return self.head((y @ y.mT).flatten(1))


PRODUCTS = {
    "matmul": lambda: Attention(torch.matmul, False),
    "bmm": lambda: Attention(torch.bmm, False),
    "@": lambda: Attention(lambda a, b: a @ b, False),
    "heads": lambda: Attention(torch.matmul, True),
    "gram": Gram,
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("granularity", [None, "tensor", "channel"])
@pytest.mark.parametrize("symmetric", ["NA", False])
def test_a_product_of_activations_depends_on_no_order_and_number_of_samples(name, granularity, symmetric, tmp_path):
    torch.manual_seed(0)
    model, x = PRODUCTS[name](), randn(90, 6, 8)
    op = "bmm" if name == "bmm" else "matmul"
    own = {"name": "affine", "data_in_width": [8], "weight_width": [8], "weight_symmetric": symmetric}
    own |= {"weight_granularity": granularity} if granularity else {}
    data = labelled(x)
    run, rebuilt, _ = searched(model, data, tmp_path, **{op: own})
    scales = [len(f["weight"].scale) for f in rebuilt.formats.values()]
    assert granularity == "channel" or set(scales) == {1}
    with torch.no_grad():
        whole = rebuilt.model(x)
        order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
        assert torch.equal(rebuilt.model(x[order]), whole[order])
        for n in (1, 37):
            assert torch.allclose(rebuilt.model(x[:n]), whole[:n], atol=1e-6)
    assert run.trial(0).metrics["loss"] == pytest.approx(loss_by_hand(rebuilt.model, data), abs=1e-6)


class Computed(nn.Module):
    """A weight that is computed from parameters alone: its rows are channels."""

    def __init__(self):
        super().__init__()
        self.weight, self.gain = nn.Parameter(randn(3, 6)), nn.Parameter(torch.tensor([[0.01], [1.0], [40.0]]))

    def forward(self, x):
        return F.linear(x, self.weight * self.gain)


def test_a_weight_computed_from_parameters_keeps_its_channels(tmp_path):
    model, data = Computed(), labelled(randn(60, 6))
    _, rebuilt, _ = searched(model, data, tmp_path, linear={"name": "affine", "weight_width": [8]})
    (form,) = [f["weight"] for f in rebuilt.formats.values() if "weight" in f]
    largest = (model.weight * model.gain).detach().abs().amax(1) / 127
    assert form.scale == pytest.approx(largest.tolist())


def test_quantize_takes_what_calibrate_gives():
    model, x = PRODUCTS["heads"]().eval(), randn(20, 6, 8)
    graph = capture(model, x[:2])
    formats = calibrate(graph, {"matmul": {"weight": bf_format({"width": 8}, "affine", FACTOR)}}, x)
    with torch.no_grad():
        assert torch.allclose(quantize(graph, formats)(x), model(x), atol=0.1)


# --- two inputs ------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two inputs far apart in size meet in one operation; `form` says how it is written."""

    def __init__(self, meet, gain=2.0**-9):
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.meet, self.gain = meet, gain
        with torch.no_grad():
            self.right.weight.mul_(gain)
            self.right.bias.mul_(gain)

    def meeting(self, x, rounded=lambda a, b: (a, b)):
        return self.meet(*rounded(self.left(x), self.right(x)))

    def forward(self, x):
        return self.head(self.meeting(x) / self.gain)


def masked(a, b):
    """An additive mask, as attention has it."""
    mask = torch.where(b > 0, 0.0, -torch.inf)
    return (a + mask).softmax(-1)


MEETINGS = {
    "add": (torch.add, "add"),
    "+": (lambda a, b: a + b, "add"),
    "sub": (torch.sub, "sub"),
    "-": (lambda a, b: b - a, "sub"),
    "mul": (torch.mul, "mul"),
    "alone": (lambda a, b: a + b.mean(1, keepdim=True), "add"),
}


@pytest.mark.parametrize("name", MEETINGS)
@pytest.mark.parametrize("rule", ["auto", "minmax"])
def test_each_input_has_a_frac_width_of_its_own(name, rule, tmp_path):
    torch.manual_seed(2)
    meet, op = MEETINGS[name]
    model, data = Two(meet), labelled(randn(200, 6))
    space = {"name": "integer", "data_in_width": [6, 8], "data_in_frac_width": rule}
    run, rebuilt, _ = searched(model, data, tmp_path, **{op: space})
    assert run.space.size == 2  # the second input has no choice of its own
    (own,) = rebuilt.formats.values()
    x = data["train"][0]
    with torch.no_grad():
        a, b = model.left(x), model.right(x)
    first, second = (b, a) if name == "-" else (a, b.mean(1, keepdim=True) if name == "alone" else b)
    assert own["data_in"].width == own["data_in_2"].width == 6
    if rule == "auto":
        assert own["data_in"].frac_width == best_frac(first, 6)
        assert own["data_in_2"].frac_width == best_frac(second, 6)
    assert abs(own["data_in"].frac_width - own["data_in_2"].frac_width) > 5

    class Hand(Two):
        def forward(self, x):
            a, b = self.left(x), self.right(x)
            small = own["data_in"] if name == "-" else own["data_in_2"]
            large = own["data_in_2"] if name == "-" else own["data_in"]
            a = fixed(a, 6, large.frac_width)
            if name == "alone":
                return self.head((a + fixed(b.mean(1, keepdim=True), 6, small.frac_width)) / self.gain)
            return self.head(self.meet(a, fixed(b, 6, small.frac_width)) / self.gain)

    hand = Hand(meet)
    hand.load_state_dict(model.state_dict())
    assert run.trial(0).metrics["loss"] == pytest.approx(loss_by_hand(hand, data), rel=1e-5)


def test_the_second_input_may_have_keys_of_its_own(tmp_path):
    torch.manual_seed(2)
    model, data = Two(torch.add), labelled(randn(100, 6))
    space = {"name": "integer", "data_in_width": [4, 8], "data_in_2_width": [3, 6], "data_in_2_frac_width": "auto"}
    run, rebuilt, _ = searched(model, data, tmp_path, add=space)
    assert run.space.size == 4
    (own,) = rebuilt.formats.values()
    assert (own["data_in"], own["data_in_2"].width) == (Integer(4, 2), 3)
    numbers = {t.number: t for t in run.trials}
    bits = {n: [t.config["add"]["config"][f"data_in{k}_width"] for k in ("", "_2")] for n, t in numbers.items()}
    for number, trial in numbers.items():
        again = bf.transform_trial(run.folder, number, model=model, data=bf.from_splits(data), check=True)
        assert again.evaluation.loss == trial.metrics["loss"]
        (own,) = again.formats.values()
        assert [own["data_in"].width, own["data_in_2"].width] == bits[number]
    costs = {n: t.metrics["total_bitops"] for n, t in numbers.items()}
    widest = {n: max(b) for n, b in bits.items()}
    assert all((costs[a] > costs[b]) == (widest[a] > widest[b]) for a in numbers for b in numbers)
    left = {"name": "integer", "data_in_width": [4, 8], "data_in_2_width": ["NA", 4], "data_in_2_frac_width": 1}
    run, rebuilt, _ = searched(model, data, tmp_path / "left", add=left)
    for trial in run.trials:
        again = bf.transform_trial(run.folder, trial.number, model=model, data=bf.from_splits(data), check=True)
        assert again.evaluation.loss == trial.metrics["loss"]
        (own,) = again.formats.values()
        assert ("data_in_2" in own) == (trial.config["add"]["config"]["data_in_2_width"] != "NA")
    alone = {"name": "integer", "data_in_2_width": [4]}
    _, rebuilt, _ = searched(model, data, tmp_path / "alone", add=alone)
    assert list(next(iter(rebuilt.formats.values()))) == ["data_in_2"]


@pytest.mark.parametrize("name", ["integer", "affine"])
def test_an_additive_mask_of_infinities_is_rounded_like_a_mask(name, tmp_path):
    torch.manual_seed(2)
    model, data = Two(masked, gain=1.0), labelled(randn(200, 6))
    rule = {"data_in_frac_width": "auto"} if name == "integer" else {"data_in_symmetric": True}
    run, rebuilt, _ = searched(model, data, tmp_path, add={"name": name, "data_in_width": [8]} | rule)
    (own,) = rebuilt.formats.values()
    assert own["data_in_2"].round(torch.tensor([0.0, -torch.inf])).tolist()[0] == 0.0
    assert np.isfinite(run.trial(0).metrics["loss"])
    with torch.no_grad():
        a = model.left(data["train"][0])
    if name == "integer":
        assert own["data_in"].frac_width == best_frac(a, 8)
    else:
        assert own["data_in"].scale[0] == pytest.approx(a.abs().max().item() / 127)


class Positions(nn.Module):
    """A residual sum, and one with a parameter."""

    def __init__(self):
        super().__init__()
        self.fc, self.place, self.head = nn.Linear(8, 8), nn.Parameter(1e-3 * randn(1, 6, 8)), nn.Linear(48, 3)

    def forward(self, x):
        x = x + self.place
        return self.head((x + self.fc(x)).flatten(1))


def test_a_parameter_that_is_added_has_its_own_range(tmp_path):
    model, data = Positions(), labelled(randn(90, 6, 8))
    own = {"name": "integer", "data_in_width": [8], "data_in_frac_width": "auto"}
    _, rebuilt, _ = searched(model, data, tmp_path, add=own)
    place = rebuilt.formats["add"]["data_in_2"]
    assert place.frac_width == best_frac(model.place.detach(), 8) > 12
    assert rebuilt.formats["add_1"]["data_in"].frac_width < 8


# --- what is said of it ----------------------------------------------------------------------------------------------


def said(notes, start):
    return [n for n in notes if n.startswith(start)]


@pytest.mark.parametrize(
    ("space", "start", "named"),
    [
        ({"weight_width": 4, "weight_frac_width": -8}, "all zeros once rounded: ", "weight of _0 (Linear) as int4.-8"),
        ({"data_in_width": 4, "data_in_frac_width": -9}, "all zeros", "data_in of _0 (Linear) as int4.-9"),
        ({"bias_width": 4, "bias_frac_width": -3}, "all zeros", "bias of _0 (Linear) as int4.-3"),
        ({"data_in_width": 4, "data_in_frac_width": 6}, "more than 1 %", "data_in of _0 (Linear) as int4.6 ("),
        ({"weight_width": 4, "weight_frac_width": 9}, "more than 1 %", "weight of _0 (Linear) as int4.9 ("),
    ],
)
def test_what_a_range_loses_is_noted_in_the_plan_and_in_the_run(space, start, named, tmp_path):
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(6, 3)), labelled(randn(90, 6))
    run, _, heard = searched(model, data, tmp_path, linear={"name": "integer"} | space)
    for notes in (heard, run.notes):
        (line,) = said(notes, start)
        assert named in line


def test_infinite_calibration_values_are_noted_with_their_site(tmp_path):
    torch.manual_seed(2)
    model, data = Two(masked, gain=1.0), labelled(randn(200, 6))
    run, *_ = searched(model, data, tmp_path, add={"name": "integer", "data_in_width": 8, "data_in_frac_width": "auto"})
    (line,) = said(run.notes, "NaN or infinite values")
    assert "data_in_2 of add (add)" in line
    assert "data_in of" not in line


def test_many_losses_are_one_line_and_few_are_none(tmp_path):
    torch.manual_seed(0)
    data = labelled(randn(90, 6))
    deep = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(6, 6), nn.Identity())], nn.Linear(6, 3))
    run, *_ = searched(deep, data, tmp_path, linear={"name": "integer", "weight_width": 4, "weight_frac_width": -8})
    (line,) = said(run.notes, "all zeros")
    assert line.endswith(" and 4 more")
    fine = {"name": "integer", "weight_width": 8, "weight_frac_width": "minmax", "data_in_width": 8}
    run, *_ = searched(deep, data, tmp_path / "fine", linear=fine | {"data_in_frac_width": "minmax"})
    assert not [n for n in run.notes if n.startswith(("all zeros", "more than 1 %", "NaN"))]


def test_a_search_that_loads_its_weights_says_it_at_the_end(tmp_path):
    torch.manual_seed(0)
    x, y = randn(300, 6), torch.arange(300) % 3
    np.savez(tmp_path / "data.npz", X_train=x, y_train=y, X_val=randn(60, 6, seed=1), y_val=y[:60])
    text = """
model = "jsc-tiny"
dataset = "npz"
dataset_path = "DATA"
max_epochs = 1
[search.search_space]
seed.linear.config = {name = "integer", weight_width = 4, weight_frac_width = -8}
[search.search_space.setup]
by = "type"
[search.strategy]
name = "brute_force"
[search.strategy.sw_runner.basic_evaluation]
[search.strategy.metrics]
accuracy.direction = "maximize"
accuracy.scale = 1.0
""".replace("DATA", str(tmp_path / "data.npz"))
    (tmp_path / "s.toml").write_text(text)
    run = bf.search(tmp_path / "s.toml", project_dir=str(tmp_path), project="r")
    assert len(said(run.notes, "all zeros once rounded")) == 1


def test_relus_are_meant_to_cut_off_what_is_negative():
    assert lost(Integer(8, 4, signed=False), randn(1000), negative_matters=False) == {}
    assert lost(Integer(8, 4, signed=False), randn(1000), negative_matters=True)["saturated"] > 0.4
    assert lost(Integer(8, 4), torch.zeros(9), negative_matters=True) == {}
    assert lost(Integer(8, 4), torch.full((9,), 8.0 - 2**-5), negative_matters=True) == {}


class Scaled(nn.Module):
    """A number, far smaller than 1, is an operand."""

    def __init__(self):
        super().__init__()
        self.fc, self.small = nn.Linear(4, 3), nn.Parameter(torch.tensor(1e-6))

    def forward(self, x):
        return self.fc(x) * self.small


def test_a_number_is_calibrated_as_an_operand_of_its_own():
    x = randn(20, 4)
    graph = capture(Scaled().eval(), x[:2])
    (site,) = (s for s in graph.sites if s.op == "mul")
    form = Integer(8, "auto")
    formats = calibrate(graph, {site.name: {"data_in": form, "data_in_2": form}}, x)
    frac = formats[site.name]["data_in_2"].frac_width
    assert abs(frac - 26) <= 1  # 2^26 * 1e-6 = 67
    assert fixed(graph.model.small.detach(), 8, frac).item() == pytest.approx(1e-6, rel=0.01)
    assert quantize(graph, formats)(x).isfinite().all()
