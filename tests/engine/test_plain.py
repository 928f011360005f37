"""The plain path: candidates of models that cannot be traced. They share what they agree on, and get the numbers of
their deployed models, to the last bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import libraries
from bitfront.engine.evaluation import prefixes
from bitfront.engine.evaluation.fixed import Corrections, EvaluationJob, FixedEvaluator
from bitfront.engine.evaluation.spilling import Spill
from bitfront.engine.evaluation.verification import deployed_score
from bitfront.metrics.configured import configured_runner
from bitfront.transforms import exchange
from bitfront.transforms.direct import DirectProduct

INT = {"name": ["integer", "NA"], "data_in_width": [3, 8], "weight_width": [2, 4]}
AFFINE = {"name": ["affine", "NA"], "data_in_width": [3, 8], "weight_width": [2, 4], "weight_granularity": ["channel"]}


def evaluator(model, x, choices=INT, **settings):
    torch.manual_seed(1)
    y = torch.randint(5, (len(x),))
    job = EvaluationJob(
        model=model,
        sample=x[:2],
        space="graph/quantize/mixed_precision_ptq",
        by="name",
        choices={"default": choices},
        runners=(configured_runner("basic_evaluation"),),
        splits={"val": (x, y)},
        calibration=x[:16],
        **settings,
    )
    result = FixedEvaluator(job)
    assert result.space.graph.untraced
    return result


def check(evaluator, codes, note=""):
    """All candidates together, and some again in another order, have the numbers of their deployed models."""
    measured = evaluator.evaluate(codes)
    assert (note in measured.plain) if note else measured.plain.endswith(evaluator.space.graph.untraced)
    expected = [deployed_score(evaluator, code, "val") for code in codes]
    assert measured.errors == ("",) * len(codes)
    assert measured.values["loss"].tolist() == [score["loss"] for score in expected]
    assert measured.values["accuracy"].tolist() == [score["accuracy"] for score in expected]
    order = np.random.default_rng(0).permutation(len(codes))[: len(codes) // 2]
    assert evaluator.evaluate(codes[order]).values["loss"].tolist() == measured.values["loss"][order].tolist()


def mixed(space, n=24):
    """Neighbours in the order of the space, random candidates, and one twice."""
    rng = np.random.default_rng(0)
    start = int(rng.integers(0, min(space.size, 10**6) - n))
    random = space.sample(n // 2, rng)
    return np.concatenate([space.numbered(start, start + n), random, random[:1]])


@pytest.fixture
def calls(monkeypatch):
    """How many linear layers are computed."""
    counted = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: counted.append(1) or linear(*args))
    direct = DirectProduct.__call__

    def counting(self, x):
        result = direct(self, x)
        counted.extend([1] * (result is not None))
        return result

    monkeypatch.setattr(DirectProduct, "__call__", counting)
    return counted


class Untraceable(nn.Module):
    """A part of it decides by its input; `between` is what it does with the outputs of its parts."""

    def __init__(self, between=None, parts=None):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 8)
        self.parts = nn.ModuleList(parts() if parts else [Part() for _ in range(3)])
        self.head = nn.Linear(8, 5)
        self.between = between or (lambda self, h, out: h + out)

    def forward(self, x):
        h = self.first(x)
        for part in self.parts:
            h = self.between(self, h, part(h))
        return self.head(h) if x.sum() > -1e9 else x


class Part(nn.Module):
    """Which of its layers it calls first depends on its input."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        h = self.b(self.a(x).relu()) if x.sum() > 0 else self.a(self.b(x).relu())
        return self.norm(h)


SAMPLES = torch.randn(40, 12, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("choices", [INT, AFFINE], ids=["integer", "affine"])
@pytest.mark.parametrize("chunk", [16, 64])
def test_candidates_share_what_they_agree_on(choices, chunk, calls):
    one = evaluator(Untraceable(), SAMPLES, choices)
    one.limits = replace(one.limits, samples=chunk)
    codes = mixed(one.space)
    check(one, codes)
    calls.clear()
    neighbours = codes[:24]
    one.evaluate(neighbours)
    everything = len(neighbours) * 8 * -(-len(SAMPLES) // chunk)
    assert len(calls) < everything / 3


def added_in_place(self, h, out):
    out += h
    return out


def changed_views(self, h, out):
    h.view(-1)[0] += 1
    out[:, :4].mul_(2)
    return out


def reads_the_weight(self, h, out):
    return out + nn.functional.linear(h, self.head.weight).mean(1, keepdim=True)


def calls_forward(self, h, out):
    return out + self.first.forward(nn.functional.pad(h, (0, 4)))


def calls_a_part_again(self, h, out):
    return self.parts[0](out)


class Within(nn.Module):
    """Changes its input in place, beside its output."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        x.relu_()
        return self.fc(x)


class Same(nn.Module):
    """Returns its input."""

    def forward(self, x):
        return x


class Listed(nn.Module):
    """Returns something that can be changed."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return {"out": self.fc(x), "more": [x]}


class Remembering(nn.Module):
    """Leaves something beside its output."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        self.last = self.fc(x)
        return self.last.relu()


def linears(*others):
    return lambda: [nn.Linear(8, 8), *(o() for o in others), nn.Linear(8, 8)]


MODELS = {
    "outputs changed in place": lambda: Untraceable(added_in_place),
    "views of outputs changed in place": lambda: Untraceable(changed_views),
    "a weight read by a function": lambda: Untraceable(reads_the_weight),
    "a weight read by another module": lambda: Untraceable(lambda self, h, out: out, a_layer_and_its_reader),
    "forward called": lambda: Untraceable(calls_forward),
    "parts called twice": lambda: Untraceable(calls_a_part_again),
    "inputs changed in place": lambda: Untraceable(parts=linears(Within, Within)),
    "inputs returned": lambda: Untraceable(added_in_place, linears(Same, Same)),
    "mappings": lambda: Untraceable(lambda self, h, out: out["out"] if isinstance(out, dict) else out, linears(Listed)),
    "attributes": lambda: Untraceable(
        lambda self, h, out: out + self.parts[0].last, lambda: [Remembering(), nn.Linear(8, 8), nn.Linear(8, 8)]
    ),
    "an encoder layer": lambda: Untraceable(
        lambda self, h, out: out,
        lambda: [Unsqueezed(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), nn.Linear(8, 8)],
    ),
    "a recurrent layer": lambda: Untraceable(
        lambda self, h, out: out, lambda: [Unsqueezed(nn.LSTM(8, 8, batch_first=True)), nn.Linear(8, 8)]
    ),
}


class Reading(nn.Module):
    """Reads the weight of another module."""

    def __init__(self, other):
        super().__init__()
        self.other, self.fc = [other], nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) + self.other[0].weight.exp().mean(0)


def a_layer_and_its_reader():
    layer = nn.Linear(8, 8)
    return [layer, Reading(layer)]


class Unsqueezed(nn.Module):
    """A layer of sequences, of length one."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        out = self.layer(x[:, None])
        return (out[0] if isinstance(out, tuple) else out)[:, 0]


@pytest.mark.parametrize("name", MODELS)
def test_what_modules_do_beside_their_output_counts(name):
    one = evaluator(MODELS[name](), SAMPLES)
    check(one, mixed(one.space))


class Collecting(nn.Module):
    """A list that begins with each sample batch is filled by its parts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.seen = []
        self.parts = nn.ModuleList([Collected(self.seen) for _ in range(3)])
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        self.seen.clear()
        for part in self.parts:
            x = part(x)
        return self.head(sum(self.seen)) if x.sum() > -1e9 else x


class Collected(nn.Module):
    def __init__(self, seen):
        super().__init__()
        self.fc = nn.Linear(12, 12)
        self.seen = seen

    def forward(self, x):
        out = self.fc(x)
        self.seen.append(out)
        return out


def test_what_cannot_be_kept_is_noticed_and_said():
    one = evaluator(Collecting(), SAMPLES)
    check(one, mixed(one.space), note="outputs of layers are not kept, because a candidate has")


@pytest.mark.parametrize("limit", ["kept outputs", "kept weights"])
def test_memory_is_limited(limit, monkeypatch, calls):
    one = evaluator(Untraceable(), SAMPLES)
    monkeypatch.setattr(
        *{"kept outputs": (prefixes, "PREFIX_BYTES"), "kept weights": (exchange, "KEPT_BYTES")}[limit], 0
    )
    monkeypatch.setattr(Spill, "pays", lambda *_: False)  # it depends on the clock
    codes = mixed(one.space)
    check(one, codes)
    calls.clear()
    one.evaluate(codes[:24])
    assert (len(calls) >= 24 * 8) == (limit == "kept outputs")


def test_a_candidate_that_fails_does_not_touch_the_others():
    def fails_sometimes(self, h, out):
        seen.append(float(out.abs().max()))
        if seen[-1] < limit:
            raise ValueError("too small")
        return out

    limit, seen = 0.0, []
    one = evaluator(Untraceable(fails_sometimes), SAMPLES)
    codes = mixed(one.space)
    for code in codes:
        deployed_score(one, code, "val")
    limit = float(np.quantile(seen, 0.2))
    expected = np.array([deployed_score(one, code, "val")["loss"] for code in codes])
    assert 0 < np.isnan(expected).sum() < len(codes)
    measured = one.evaluate(codes)
    assert np.array_equal(measured.values["loss"], expected, equal_nan=True)
    assert {e for e in measured.errors if e} == {"ValueError: too small"}


def test_corrected_biases_are_exchanged_too():
    one = evaluator(Untraceable(), SAMPLES, corrections=Corrections(bias=True))
    check(one, mixed(one.space))


def test_a_kept_call_that_is_another_one_switches_keeping_off(monkeypatch):
    known = prefixes.Prefixes._known

    def confused(self, number, module, path):
        if number in self._kept:
            raise prefixes.UnshareableError("the calls are others")
        return known(self, number, module, path)

    monkeypatch.setattr(prefixes.Prefixes, "_known", confused)
    one = evaluator(Untraceable(), SAMPLES)
    check(one, mixed(one.space), note="outputs of layers are not kept, because the calls are others")


def test_wrong_numbers_of_exchanged_formats_are_noticed(monkeypatch):
    put = exchange.Exchange.put

    def forgetful(self, site, formats, correction=None):
        if site.name != "head":
            put(self, site, formats, correction)

    monkeypatch.setattr(exchange.Exchange, "put", forgetful)
    one = evaluator(Untraceable(), SAMPLES)
    check(one, mixed(one.space), note="every candidate is rebuilt, because a candidate has a loss of")


class Bert(nn.Module):
    """A classifier of 16 tokens."""

    def __init__(self, transformers):
        super().__init__()
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
        self.bert, self.head = transformers.BertModel(config), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.bert(input_ids=x.long()).pooler_output)


class Gpt2(nn.Module):
    """A classifier of 16 tokens, by the last one."""

    def __init__(self, transformers):
        super().__init__()
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=3, n_head=2)
        self.gpt, self.head = transformers.GPT2Model(config), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.gpt(input_ids=x.long()).last_hidden_state[:, -1])


@pytest.mark.parametrize("kind", [Bert, Gpt2])
def test_transformers_share_their_first_layers(kind, calls):
    libraries.torchvision()  # transformers asks for it
    transformers = pytest.importorskip("transformers", exc_type=ModuleNotFoundError)
    x = torch.randint(50, (24, 16), generator=torch.Generator().manual_seed(3)).float()
    one = evaluator(kind(transformers).eval(), x)
    codes = mixed(one.space)
    check(one, codes)
    calls.clear()
    one.evaluate(codes[:1])
    whole = len(calls)
    one.evaluate(codes[:24])
    assert len(calls) - whole < whole * 24 / 4 if kind is Bert else len(calls)
