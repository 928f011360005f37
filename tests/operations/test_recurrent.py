"""Recurrent layers with formats, against torch's modules with operands quantized by hand and against steps written out
here, and through whole searches."""

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront.engine.analysis import analyze
from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.evaluation.interface import EvaluationJob
from bitfront.errors import ConfigError
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.metrics.configured import configured_runner
from bitfront.scoring import evaluate
from bitfront.spaces.quantize import QuantizationSpace
from bitfront.spaces.request import SpaceRequest
from bitfront.training import TrainSettings, train
from bitfront.transforms import calibrate, quantize

DATA, WEIGHT, BIAS, STATE, CELL = Integer(6, 3), Integer(5, 4), Integer(7, 5), Integer(5, 4), Integer(8, 5)
#: Steps and features of a sample; units.
STEPS, FEATURES, UNITS = 6, 4, 3
KINDS = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "tanh": lambda *a, **k: nn.RNN(*a, **k, nonlinearity="tanh"),
    "relu": lambda *a, **k: nn.RNN(*a, **k, nonlinearity="relu"),
}


class Last(nn.Module):
    """A keyword spotter: a layer on features, a recurrent layer, its last step, classes."""

    def __init__(self, layer, directions=1, units=UNITS):
        super().__init__()
        self.embed, self.layer, self.head = nn.Linear(FEATURES, FEATURES), layer, nn.Linear(units * directions, 3)

    def forward(self, x):
        h = self.embed(x)
        if getattr(self.layer, "batch_first", True):
            return self.head(self.layer(h)[0][:, -1])
        return self.head(self.layer(h.transpose(0, 1))[0][-1])


def samples(number, seed=0):
    return torch.randn(number, STEPS, FEATURES, generator=torch.Generator().manual_seed(seed))


def rounded_by_hand(x, form):
    return torch.clamp(torch.round(x * 2.0**form.frac_width), *form_range(form)) / 2.0**form.frac_width


def form_range(form):
    return -(2 ** (form.width - 1)), 2 ** (form.width - 1) - 1


def layer_of(kind, layers=1, both=False, batch_first=True, **more):
    torch.manual_seed(3)
    return KINDS[kind](FEATURES, UNITS, num_layers=layers, bidirectional=both, batch_first=batch_first, **more).eval()


def with_weights_by_hand(module):
    """A copy of torch's module whose parameters are quantized."""
    hand = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in hand.named_parameters():
            parameter.copy_(rounded_by_hand(parameter, WEIGHT if "weight" in name else BIAS))
    return hand


def twin(module, formats, units=UNITS):
    """The layer of a quantized model."""
    directions = 1 + module.bidirectional
    return quantize(capture(Last(module, directions, units).eval(), samples(2)), {"layer": formats}).layer


def by_steps(module, x, state_form=None, cell_form=None):
    """The outputs of a layer with one input, step by step in double precision where nothing is rounded; shape of x:
    (samples, steps, features). Written from torch's documentation, not from the record."""
    held = {name: p.detach().double() for name, p in module.named_parameters()}
    x, size = x.double(), module.hidden_size
    state = (lambda h: rounded_by_hand(h, state_form)) if state_form else (lambda h: h)
    memory = (lambda c: rounded_by_hand(c, cell_form)) if cell_form else (lambda c: c)
    for layer in range(module.num_layers):
        outputs = []
        for end in ("", "_reverse") if module.bidirectional else ("",):
            w, u, b, d = (held[f"{n}_l{layer}{end}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            h, c, hs = torch.zeros(len(x), u.shape[1]).double(), torch.zeros(len(x), size).double(), {}
            for t in reversed(range(x.shape[1])) if end else range(x.shape[1]):
                a, r = x[:, t] @ w.T + b, h @ u.T + d
                if module.mode == "LSTM":
                    i, f, g, o = (a + r).split(size, 1)
                    c = memory(f.sigmoid() * c + i.sigmoid() * g.tanh())
                    h = o.sigmoid() * c.tanh()
                    h = h @ held[f"weight_hr_l{layer}{end}"].T if module.proj_size else h
                elif module.mode == "GRU":
                    (ar, az, an), (rr, rz, rn) = a.split(size, 1), r.split(size, 1)
                    z, n = (az + rz).sigmoid(), (an + (ar + rr).sigmoid() * rn).tanh()
                    h = (1 - z) * n + z * h
                else:
                    h = (a + r).tanh() if module.mode == "RNN_TANH" else (a + r).relu()
                h = state(h)
                hs[t] = h
            outputs.append(torch.stack([hs[t] for t in range(x.shape[1])], 1))
        x = torch.cat(outputs, 2)
    return x


CASES = list(itertools.product(KINDS, (1, 2), (False, True)))


@pytest.mark.parametrize(("kind", "layers", "both"), CASES)
def test_weights_and_input_are_those_of_torch_quantized_by_hand(kind, layers, both):
    for batch_first in (True, False):
        module, x = layer_of(kind, layers, both, batch_first), samples(10)
        x = x if batch_first else x.transpose(0, 1).contiguous()
        between = {"data_in_l1": Integer(24, 16)} if layers == 2 else {}
        model = twin(module, {"weight": WEIGHT, "bias": BIAS, "data_in": DATA, **between})
        hand = with_weights_by_hand(module)
        expected = hand(rounded_by_hand(x, DATA))
        if layers == 1:
            assert torch.equal(model(x)[0], expected[0])
            flat = [v if isinstance(v, tuple) else (v,) for v in (model(x)[1], expected[1])]
            assert all(torch.equal(a, b) for a, b in zip(*flat, strict=True))
        else:  # the input of the second layer is rounded to 2⁻¹⁶
            torch.testing.assert_close(model(x)[0], expected[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kind", "layers", "both"), CASES)
def test_states_are_rounded_after_each_step(kind, layers, both):
    module, x = layer_of(kind, layers, both), samples(40)
    formats = {"weight": WEIGHT, "bias": BIAS, "state": STATE, **({"cell_state": CELL} if kind == "LSTM" else {})}
    out = twin(module, {**formats, "data_in": DATA})(x)[0]
    expected = by_steps(with_weights_by_hand(module), rounded_by_hand(x, DATA), STATE, CELL).float()
    # A value in the middle between two may be rounded to the other one.
    same = (out == expected).all(2).all(1)
    assert same.float().mean() > 0.9
    assert torch.equal(out, rounded_by_hand(out, STATE))
    unrounded = by_steps(with_weights_by_hand(module), rounded_by_hand(x, DATA)).float()
    assert (out - unrounded).abs().max() > 2.0**-STATE.frac_width / 4


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projections_are_rounded_as_the_state():
    module, x = layer_of("LSTM", 2, True, proj_size=2), samples(40)
    out, (h, c) = twin(module, {"weight": WEIGHT, "bias": BIAS, "state": STATE}, units=2)(x)
    expected = by_steps(with_weights_by_hand(module), x, STATE, STATE).float()
    assert out.shape == (40, STEPS, 4)
    assert (h.shape, c.shape) == ((4, 40, 2), (4, 40, 3))
    assert (out == expected).all(2).all(1).float().mean() > 0.9


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_are_torchs_with_operands_quantized_by_hand(cell):
    torch.manual_seed(5)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell(FEATURES, UNITS)

        def forward(self, x):
            state = x[:, :UNITS]
            out = self.cell(x, (state, state) if cell is nn.LSTMCell else state)
            return torch.cat(out, 1) if cell is nn.LSTMCell else out

    model, x = Twice().eval(), samples(9)[:, 0]
    graph = capture(model, x[:2])
    states = {"state": STATE, "cell_state": STATE} if cell is nn.LSTMCell else {"state": STATE}
    out = quantize(graph, {"cell": {"weight": WEIGHT, "bias": BIAS, "data_in": DATA, **states}})(x)
    hand, state = with_weights_by_hand(model.cell), rounded_by_hand(x[:, :UNITS], STATE)
    if cell is not nn.LSTMCell:
        assert torch.equal(out, rounded_by_hand(hand(rounded_by_hand(x, DATA), state), STATE))
        return
    _, c = hand(rounded_by_hand(x, DATA), (state, state))
    o = (rounded_by_hand(x, DATA) @ hand.weight_ih.T + hand.bias_ih + state @ hand.weight_hh.T + hand.bias_hh)[
        :, -UNITS:
    ]
    memory = rounded_by_hand(c, STATE)
    assert torch.equal(out, torch.cat([rounded_by_hand(o.sigmoid() * memory.tanh(), STATE), memory], 1))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_given_state_and_a_single_sequence(kind):
    module, x = layer_of(kind, 1, True), samples(1)[0]
    state = torch.randn(2, UNITS, generator=torch.Generator().manual_seed(1))
    given = (state, state + 1) if kind == "LSTM" else state

    out, last = twin(module, {"state": Integer(20, 16)})(x, hx=given)
    expected, after = module(x, given)
    assert out.shape == expected.shape
    for ours, torchs in zip(last if kind == "LSTM" else (last,), after if kind == "LSTM" else (after,), strict=True):
        assert ours.shape == torchs.shape
        torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-3)


def assignment_of(module, table):
    graph = capture(Last(module, 1 + module.bidirectional).eval(), samples(2))
    space = QuantizationSpace(
        SpaceRequest(graph, "name", {"default": {"name": "NA"}, "layer": {"name": "integer", **table}})
    )
    (assignment,) = (a for a in space.assignments if a.site.op == "recurrent")
    return space, assignment


def test_one_key_is_one_choice_for_all_layers_and_directions():
    module = layer_of("LSTM", 2, True)
    space, assignment = assignment_of(module, {"weight_ih_width": [4, 8], "weight_ih_l1_width": 6})
    assert space.size == 2
    assert [p.name for p in space.parameters] == ["layer/weight_ih"]
    for option, width in zip(assignment.options(), (4, 8), strict=True):
        widths = {o: s.format.width for o, s in option if s.format is not None}
        assert widths == {
            "weight_ih_l0": width, "weight_ih_l0_reverse": width, "weight_ih_l1": 6, "weight_ih_l1_reverse": width,
        }  # fmt: skip


def test_the_most_exact_key_counts():
    table = {
        "weight_width": 8,
        "weight_hh_width": [2, 3],
        "state_width": 7,
        "data_in_width": 5,
        "cell_state_width": "NA",
    }
    space, assignment = assignment_of(layer_of("LSTM", 2), table)
    assert space.size == 2
    first = {o: s.format.width if s.format else None for o, s in next(iter(assignment.options()))}
    assert (first["weight_ih_l1"], first["weight_hh_l1"], first["bias_ih_l0"]) == (8, 2, None)
    assert (first["state_l0"], first["state_l1"], first["cell_state_l0"]) == (7, 7, None)
    # The second layer takes the first one's state as it is; without a format of the state, it is rounded as an input.
    assert (first["data_in"], first["data_in_l1"]) == (5, 7)
    _, other = assignment_of(layer_of("LSTM", 2), {"data_in_width": 5})
    assert dict(next(iter(other.options())))["data_in_l1"].format.width == 5


def test_a_key_for_a_layer_that_is_not_there_is_an_error():
    with pytest.raises(ConfigError, match="weight_ih_l1_width"):
        assignment_of(layer_of("LSTM"), {"weight_ih_l1_width": 8})


TABLES = {
    "all": {"weight_width": [3, 8], "bias_width": [8], "data_in_width": [4, 8], "state_width": [4, "NA"]},
    "exact": {"weight_ih_width": [4, 8], "weight_hh_l0_width": ["NA", 3], "cell_state_width": [6], "state_width": 5},
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layers", "both", "batch_first"), [("LSTM", 2, True, True), ("GRU", 1, False, False)])
@pytest.mark.parametrize("table", TABLES)
def test_candidates_together_have_the_loss_of_each_alone(kind, layers, both, batch_first, table):
    model = Last(layer_of(kind, layers, both, batch_first), 1 + both).eval()
    x, y = samples(48), torch.arange(48) % 3
    choices = {
        "default": {"name": ["integer", "NA"], "data_in_width": [3, 8], "weight_width": [4, 8], "bias_width": 8},
        "recurrent": {"name": ["integer", "NA"], **TABLES[table]},
    }
    job = EvaluationJob(
        model=model,
        sample=x[:2],
        space="graph/quantize/mixed_precision_ptq",
        by="type",
        choices=choices,
        runners=(configured_runner("basic_evaluation"), configured_runner("average_bitwidth")),
        splits={"val": (x, y)},
        calibration=x,
    )
    evaluator = FixedEvaluator(job)
    codes = evaluator.space.sample(20, np.random.default_rng(0))
    values = evaluator.evaluate(codes).values
    assert not evaluator.plain
    for i, code in enumerate(codes):
        deployed = evaluator.model(code)
        assert evaluate(deployed, x, y, batch_size=evaluator.chunk).loss == values["loss"][i]
        formats = evaluator.formats(code)
        bits = total = 0
        for name, p in model.named_parameters():
            path, _, operand = name.rpartition(".")
            if "weight" in operand:
                form = formats.get(path, {}).get(operand)
                bits, total = bits + p.numel() * (form.bits if form else 32), total + p.numel()
        assert values["average_bitwidth"][i] == pytest.approx(bits / total)


def test_counts_and_costs_by_hand():
    model = Last(layer_of("LSTM", 1, True), 2).eval()
    formats = {"name": "integer", "data_in_width": 8, "weight_ih_width": 4, "weight_hh_width": 2, "state_width": 6}
    config = {"by": "name", "default": {"config": {"name": "NA"}}, "layer": {"config": formats}}
    result = analyze(model, samples(2), 1, config)
    (row,) = (r for r in result.rows if r.name == "layer")
    ih, hh = STEPS * 2 * 4 * UNITS * FEATURES, STEPS * 2 * 4 * UNITS * UNITS
    others = STEPS * 2 * UNITS * 13
    assert (row.macs, row.operations) == (ih + hh, ih + hh + others)
    assert row.bitops == ih * 8 * 4 + hh * 6 * 2 + others * 8
    hand = with_weights_by_hand(model.layer)
    with torch.no_grad():
        for name, p in hand.named_parameters():
            if "weight" in name:
                p.copy_(rounded_by_hand(getattr(model.layer, name), Integer(4, 2) if "ih" in name else Integer(2, 1)))
    count = {
        k: sum(int((p != 0).sum()) for n, p in hand.named_parameters() if f"weight_{k}" in n) for k in ("ih", "hh")
    }
    biases = sum(31 * p.numel() for n, p in hand.named_parameters() if "bias" in n)
    assert row.ebops == STEPS * (count["ih"] * 7 * 3 + count["hh"] * 5 * 1 + biases)
    assert row.parameter_bytes == sum(
        -(-p.numel() * (4 if "weight_ih" in n else 2 if "weight_hh" in n else 32) // 8)
        for n, p in model.layer.named_parameters()
    )


@pytest.mark.slow
@pytest.mark.parametrize("by", ["default", "name", "type", "regex_name", "NA"])
def test_a_search_finds_and_rebuilds_candidates(by, tmp_path):
    model = Last(layer_of("LSTM", 2), 1)
    y = torch.arange(90) % 3
    x = samples(90) + y[:, None, None]
    data = {"train": (x[:60], y[:60]), "val": (x[60:75], y[60:75]), "test": (x[75:], y[75:])}
    table = {"name": "integer", "data_in_width": 8, "weight_width": [4, 8], "bias_width": 8, "state_width": 8}
    key = {"default": "default", "name": "layer", "type": "lstm", "regex_name": "lay.*", "NA": "layer"}[by]
    if by == "NA":
        table = {"name": ["integer", "NA"], "weight_width": 4}
    run = bf.search(
        model=model,
        data=bf.from_splits(data),
        space={"by": by if by in ("type", "regex_name") else "name", key: table},
        metrics={"accuracy": "maximize", "average_bitwidth": "minimize", "model_size": "minimize"},
        strategy="brute_force",
        project_dir=str(tmp_path),
        project="r",
    )
    assert run.space.size == (4 if by == "default" else 2) * (2 if by == "default" else 1)
    for trial in run.trials:
        again = bf.transform_trial(run.folder, trial.number, model=model, data=bf.from_splits(data), check=True)
        assert again.evaluation.loss == trial.metrics["loss"]


def test_gradients_go_straight_through():
    module, x = layer_of("LSTM", 2, dropout=0.5), samples(12)
    graph = capture(Last(module), x[:2])
    wanted = {"layer": {"weight": Integer(4, "auto"), "bias": BIAS, "state": STATE, "data_in": DATA}}
    model = quantize(graph, calibrate(graph, wanted, x)).train()
    model(x).square().sum().backward()
    for name, parameter in model.layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_training_in_formats_learns():
    y = torch.arange(60) % 3
    x = samples(60) / 2 + y[:, None, None]
    graph = capture(Last(layer_of("GRU", 1, True), 2).eval(), x[:2])
    model = quantize(graph, {"layer": {"weight": WEIGHT, "bias": BIAS, "state": STATE, "data_in": DATA}})
    data = SimpleNamespace(name="samples", mapped=False, split=lambda _: (x, y), num_classes=3)
    before = evaluate(model, x, y).loss
    trained = train(model, data, TrainSettings(max_epochs=8, batch_size=20, learning_rate=0.03, optimizer="adam"))
    model.load_state_dict(trained.last_state)
    assert evaluate(model.eval(), x, y).loss < before - 0.2


def test_packed_sequences_are_refused():
    module, x = layer_of("LSTM"), samples(4)
    model = twin(module, {"weight": WEIGHT})
    packed = nn.utils.rnn.pack_padded_sequence(x, [6, 5, 3, 2], batch_first=True)
    with pytest.raises(TypeError, match="PackedSequence"):
        model(packed)
