"""The promise of every evaluation: whatever the space, the order, the batch, the chunks and the threads, a candidate has
the numbers that its deployed model has when it is evaluated alone."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from networks import (
    CLASSES,
    NETWORKS,
    Chain,
    Dense,
    DenseImages,
    EndsInReLU,
    Functional,
    FunctionalConv,
    Grouped,
    Heads,
    Images,
    Leaking,
    Logits,
    Normalised,
    Norms,
    Overflowing,
    Residual,
    ResidualImages,
    SharedLayer,
    Signals,
    Siteless,
    Smooth,
    Stubborn,
    StubbornAndShared,
    seeded_model,
)
from torch import nn

from bitfront.engine.evaluation.calibration import Corrections
from bitfront.engine.evaluation.fixed import EvaluationJob, FixedEvaluator, joined
from bitfront.engine.evaluation.tree.execution import Pass
from bitfront.engine.evaluation.tree.scorer import WorkLimits
from bitfront.errors import ConfigError
from bitfront.graph import capture
from bitfront.kernels import convolution
from bitfront.metrics.configured import configured_runner
from bitfront.scoring import evaluate
from bitfront.spaces.quantize import QuantizationSpace
from bitfront.spaces.request import SpaceRequest
from bitfront.transforms.correct import has_bias, norms_behind
from properties import max_examples

#: So many that chunks of 2, 7 and 14 samples leave a last chunk of one, which is a product of another shape.
SAMPLES = 15
WIDTHS = (2, 3, 4, 8)

per_network = pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.__name__)


# --- jobs, benches, the truth ----------------------------------------------------------------------------------------


def job_of(
    model,
    shape,
    seed,
    by="name",
    samples=SAMPLES,
    settings=None,
    y=None,
    x=None,
    corrections=Corrections(),  # noqa: B008
):
    generator = torch.Generator().manual_seed(0)
    calibration = 1.5 * torch.randn(64, *shape, generator=generator)
    if x is None:
        x = 1.5 * torch.randn(samples, *shape, generator=generator)
    if y is None:
        y = torch.randint(CLASSES, (len(x),), generator=generator)
    dtype = next((t.dtype for t in model.state_dict().values() if t.is_floating_point()), torch.float32)
    x, calibration = x.to(dtype), calibration.to(dtype)
    return EvaluationJob(
        model=model,
        sample=calibration[:2],
        space="graph/quantize/mixed_precision_ptq",
        by=by,
        choices=seed,
        runners=(configured_runner("basic_evaluation", settings),),
        splits={"val": (x, y), "train": (calibration, torch.arange(64) % CLASSES)},
        calibration=calibration,
        corrections=corrections,
    )


def evaluator_of(job, effort=None):
    """An evaluator with these work limits."""
    return FixedEvaluator(job, limits=None if effort is None else WorkLimits(**effort))


def alone(evaluator, codes):
    """(losses, accuracies, errors) of the deployed models, one after the other; each distinct candidate once."""
    x, y = evaluator.job.splits["val"]
    known = {}
    for code in codes:
        if code.tobytes() not in known:
            try:
                score = evaluate(evaluator.model(code), x, y, batch_size=evaluator.chunk)
            except Exception:
                known[code.tobytes()] = (np.nan, np.nan, True)
            else:
                fine = np.isfinite(score.loss)
                known[code.tobytes()] = (score.loss if fine else np.nan, score.accuracy, not fine)
    return [known[c.tobytes()] for c in codes]


def assert_as_alone(evaluator, codes, measured=None):
    measured = evaluator.evaluate(codes) if measured is None else measured
    expected = alone(evaluator, codes)
    assert [bool(e) for e in measured.errors] == [failed for *_, failed in expected]
    for i, (loss, accuracy, failed) in enumerate(expected):
        if failed:
            assert np.isnan(measured.values["loss"][i])
        else:
            assert measured.values["loss"][i] == loss
            assert measured.values["accuracy"][i] == accuracy
    return measured


def same(one, other):
    return [bool(e) for e in one.errors] == [bool(e) for e in other.errors] and all(
        np.array_equal(one.values[m], other.values[m], equal_nan=True) for m in one.values
    )


def part(measured, rows):
    """Those rows of a result, in that order."""
    return type(measured)(
        {m: v[rows] for m, v in measured.values.items()},
        tuple(measured.errors[i] for i in rows),
        tuple(measured.seconds[i] for i in rows),
    )


def bitwise(state):
    return {k: (t.dtype, tuple(t.shape), t.detach().contiguous().numpy().tobytes()) for k, t in state.items()}


# --- what hypothesis draws -------------------------------------------------------------------------------------------


@st.composite
def operands(draw, operand, names, wide):
    """Settings of one operand, as in the TOML, that fit the formats called `names`."""
    if "integer" in names and names.isdisjoint({"affine"}) and draw(st.integers(0, 4)) == 0:
        pairs = st.tuples(st.sampled_from(WIDTHS), st.integers(-1, 2) | st.just("auto"))
        tables = [{"width": w, "frac_width": f} for w, f in draw(st.lists(pairs, min_size=1, max_size=2, unique=True))]
        return {operand: tables}
    widths = draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=1 + wide, unique=True))
    settings = {f"{operand}_width": widths + ["NA"] * (draw(st.integers(0, 4)) == 0)}
    if "integer" in names:
        # More than one width may make some of the pairs contradict each other.
        fracs = st.lists(st.integers(-1, min(widths)), min_size=1, max_size=2, unique=True)
        frac = draw(st.none() | st.just("NA") | st.just("auto") | fracs | st.just(["auto", "NA"]))
        settings |= {} if frac is None else {f"{operand}_frac_width": frac}
    if "affine" in names:
        settings |= draw(
            st.fixed_dictionaries(
                {},
                optional={
                    f"{operand}_symmetric": st.sampled_from([True, False, [True, False]]),
                    f"{operand}_granularity": st.sampled_from(["tensor", "channel", "NA", "tensor"]),
                    f"{operand}_range": st.sampled_from(["minmax", "mse"]),
                },
            )
        )
    return settings


@st.composite
def configs(draw):
    """What stands under one key of the seed."""
    names = draw(
        st.sampled_from(
            [["integer"], ["integer"], ["integer", "NA"], ["affine"], ["affine", "NA"], ["integer", "affine", "NA"]]
        )
    )
    wide = draw(st.booleans())
    settings = {"name": names} | draw(operands("data_in", set(names), wide))
    if draw(st.integers(0, 3)):
        settings |= draw(operands("weight", set(names), True))
    if draw(st.booleans()):
        settings |= draw(operands("bias", set(names), False))
    return settings


@st.composite
def spaces(draw, graph):
    """(seed, by) of a space over `graph`."""
    by = draw(st.sampled_from(["name", "name", "type", "regex_name"]))
    everything = (*graph.sites, *graph.nameable)
    keys = {
        "name": [s.name for s in everything],
        "type": sorted({s.op for s in everything}),
        "regex_name": [".*[12].*", "(a|b|fc|heads?_.*)", ".*relu.*"],
    }[by]
    seed = {k: draw(configs() | st.just({"name": "NA"})) for k in draw(st.sets(st.sampled_from(keys), max_size=2))}
    seed["default"] = draw(configs())
    try:
        QuantizationSpace(SpaceRequest(graph, by, seed))
    except ConfigError:
        assume(False)
    return seed, by


@st.composite
def candidates(draw, space, most=7):
    """Codes in any order, with repeats; some agree on the first sites, some on the last."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, most))
    sizes = np.array([g.size for g in space.groups])
    rows = [rng.integers(0, sizes)]
    while len(rows) < count:
        row, fresh, cut = rows[rng.integers(len(rows))].copy(), rng.integers(0, sizes), rng.integers(0, len(sizes) + 1)
        rows.append(np.concatenate([row[:cut], fresh[cut:]] if rng.integers(3) else [fresh[:cut], row[cut:]]))
    return space.codes(np.stack(rows)[rng.permutation(count)])


efforts = st.fixed_dictionaries(
    {
        "samples": st.sampled_from([2, 4, 7, 14, SAMPLES, 1000]),
        "bytes": st.sampled_from([1, 400, 4_000, 10**8]),
        "threads": st.integers(1, 3),
    }
)


corrections = st.builds(Corrections, bias=st.booleans(), batch_norm=st.booleans())


def drawn(data, network, most=7):
    """A job over `network` and codes of its space."""
    model = seeded_model(network, data.draw(st.integers(0, 3), "weights"))
    seed, by = data.draw(spaces(capture(model, torch.zeros(2, *network.shape))), "space")
    job = job_of(model, network.shape, seed, by, corrections=data.draw(corrections, "corrections"))
    job = replace(job, default_for=data.draw(st.sampled_from(["usual", "usual", "all"]), "default for"))
    space = FixedEvaluator(job).space
    return job, data.draw(candidates(space, most), "codes")


# --- the properties --------------------------------------------------------------------------------------------------


@pytest.mark.sampled(4)
@per_network
@max_examples(12, suite=4, shrink=False)
@given(st.data())
def test_a_batch_has_the_numbers_of_each_candidate_alone(network, data):
    job, codes = drawn(data, network)
    assert_as_alone(evaluator_of(job, data.draw(efforts, "effort")), codes)


@pytest.mark.sampled(4)
@per_network
@max_examples(6, suite=2, shrink=False)
@given(st.data())
def test_numbers_depend_on_no_order_no_batch_no_effort_and_nothing_before(network, data):
    job, codes = drawn(data, network)
    evaluator = evaluator_of(job)
    whole = evaluator.evaluate(codes)
    order = data.draw(st.permutations(range(len(codes))), "order")
    assert same(evaluator.evaluate(codes[order]), part(whole, order))
    # How many samples go through together is fixed by the model: float sums may depend on it in the last bit.
    other = evaluator_of(job, data.draw(efforts, "effort") | {"samples": evaluator.chunk})
    cuts = sorted(data.draw(st.sets(st.integers(1, len(codes))), "cuts"))
    batches = [c for c in np.split(codes, cuts) if len(c)]
    assert same(joined([other.evaluate(c) for c in batches]), whole)
    assert same(other.evaluate(codes), whole)
    assert same(evaluator.evaluate(codes), whole)


@pytest.mark.sampled(6)
@pytest.mark.slow
@per_network
@max_examples(4, shrink=False)
@given(st.data())
def test_nothing_is_changed_by_measuring(network, data):
    job, codes = drawn(data, network, most=5)
    evaluator = evaluator_of(job, data.draw(efforts, "effort"))
    # A candidate whose formats cannot be calibrated has no model.
    models = [evaluator.model(c) for c, (*_, failed) in zip(codes, alone(evaluator, codes), strict=True) if not failed]
    tensors = {"x": job.splits["val"][0], "y": job.splits["val"][1], "c": job.calibration, "s": job.sample}
    watched = [
        tensors,
        job.model.state_dict(),
        evaluator.space.graph.model.state_dict(),
        *(m.state_dict() for m in models),
    ]
    before = [bitwise(w) for w in watched]
    given_codes, training = codes.copy(), [m.training for m in job.model.modules()]
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    first = evaluator.evaluate(codes)
    assert same(evaluator.evaluate(codes), first)
    assert [bitwise(w) for w in watched] == before
    assert np.array_equal(codes, given_codes)
    assert [m.training for m in job.model.modules()] == training
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    # Nor does what is done to the model of a candidate come back.
    with torch.no_grad():
        for model in models:
            for tensor in model.state_dict().values():
                tensor.zero_()
    assert same(evaluator.evaluate(codes), first)


@pytest.mark.sampled(6)
@pytest.mark.slow
@per_network
@max_examples(4, shrink=False)
@given(st.data())
def test_a_pickled_job_is_the_same_job(network, data):
    job, codes = drawn(data, network)
    effort = data.draw(efforts, "effort")
    first = evaluator_of(job, effort).evaluate(codes)
    fresh = evaluator_of(pickle.loads(pickle.dumps(job)), effort)  # noqa: S301
    assert same(fresh.evaluate(codes[::-1]), part(first, range(len(codes))[::-1]))


@per_network
def test_the_float_model_is_as_it_was_given(network):
    model = seeded_model(network)
    seed = {"default": {"name": "integer", "data_in_width": 4}}
    job = job_of(model, network.shape, seed, corrections=Corrections(True, True))
    floating = evaluator_of(job).float_evaluator()
    measured = floating.evaluate(floating.space.numbered(0, 1))
    score = evaluate(copy.deepcopy(model), *job.splits["val"], batch_size=floating.chunk)
    assert (measured.values["loss"][0], measured.values["accuracy"][0]) == (score.loss, score.accuracy)
    assert measured.errors == ("",)


@pytest.mark.skipif(not convolution.exact(), reason="no C++ compiler here")
@pytest.mark.parametrize("form", ["integer", "affine"])
@pytest.mark.parametrize("network", [Images, ResidualImages, Grouped])
def test_without_the_kernel_convolutions_have_the_same_bits(network, form, monkeypatch):
    seed = {"default": {"name": [form], "data_in_width": [4, 8, 12], "weight_width": [2, 4, 8]}}
    job = job_of(seeded_model(network), network.shape, seed, samples=200)
    codes = evaluator_of(job).space.sample(20, np.random.default_rng(0))
    calls, convolve = [], convolution.convolve
    monkeypatch.setattr(convolution, "convolve", lambda *a: calls.append(a) or convolve(*a))
    evaluator = evaluator_of(job)
    compiled = assert_as_alone(evaluator, codes)
    assert calls or not convolution.fast_bytes()
    assert not evaluator.plain
    calls.clear()
    monkeypatch.setattr(convolution, "exact", lambda: False)
    monkeypatch.setattr(convolution, "fast_bytes", lambda: False)
    assert same(evaluator_of(job).evaluate(codes), compiled)
    assert not calls


@pytest.mark.sampled(5)
@pytest.mark.slow
@per_network
@pytest.mark.parametrize("samples", [1, 5])
def test_the_smallest_memory_is_enough(network, samples):
    seed = {"default": {"name": ["integer", "NA"], "data_in_width": [3, 8], "weight_width": [2, 4, "NA"]}}
    job = job_of(seeded_model(network), network.shape, seed, samples=samples)
    chunk = FixedEvaluator(job).chunk
    evaluator = evaluator_of(job, {"samples": chunk, "bytes": 1, "threads": 1})
    codes = evaluator.space.sample(3, np.random.default_rng(0))
    assert same(assert_as_alone(evaluator, codes), evaluator_of(job).evaluate(codes))


@pytest.mark.parametrize("network", [Chain, Smooth, Stubborn])
@pytest.mark.parametrize("effort", [None, {"samples": 4096, "bytes": 10**6, "threads": 2}])
def test_more_samples_than_any_chunk(network, effort):
    seed = {"default": {"name": ["integer", "affine", "NA"], "data_in_width": [3, 8], "weight_width": [2, 4]}}
    job = job_of(seeded_model(network), network.shape, seed, samples=8192 + 1)
    evaluator = evaluator_of(job, effort)
    assert_as_alone(evaluator, evaluator.space.sample(8, np.random.default_rng(0)))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_outside_are_no_matter_and_stay_as_they_are(threads):
    seed = {"default": {"name": ["integer", "NA"], "data_in_width": [3, 8], "weight_width": [2, 4]}}
    job = job_of(seeded_model(Smooth), Smooth.shape, seed, samples=2000)
    evaluator = evaluator_of(job, {"samples": 500, "bytes": 10**6, "threads": threads})
    codes = evaluator.space.sample(8, np.random.default_rng(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        measured = evaluator.evaluate(codes)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert_as_alone(evaluator, codes, measured)


def test_every_candidate_of_a_space_in_the_order_of_brute_force():
    seed = {"default": {"name": "integer", "data_in_width": [3, 8], "weight_width": [2, 4]}, "[13]": {"name": "NA"}}
    evaluator = evaluator_of(job_of(seeded_model(Chain), Chain.shape, seed, by="regex_name"))
    assert evaluator.space.size == 4**3
    codes = evaluator.space.numbered(0, evaluator.space.size)
    assert_as_alone(evaluator, codes)


@pytest.mark.parametrize("behind", ["linear", "convolution", "pooling", "depthwise"])
def test_a_ceiling_below_the_largest_number_of_the_format_behind_it(behind):
    """Many values are above 6, and the formats behind the ReLU6 have numbers up to 31."""
    shape = (4,) if behind == "linear" else (1, 8, 8)
    first = nn.Linear(4, 8) if behind == "linear" else nn.Conv2d(1, 4, 3)
    rest = {
        "linear": [nn.Linear(8, CLASSES)],
        "convolution": [nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, CLASSES)],
        "pooling": [nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(36, CLASSES)],
        "depthwise": [nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(64, CLASSES)],
    }[behind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nn.init.normal_(first.weight, std=8)
        model = nn.Sequential(first, nn.ReLU6(), *rest).eval()
    table = {"name": ["integer"], "weight_width": [6, 8], "weight_frac_width": [4]}
    table |= {"data_in_width": [6], "data_in_frac_width": [0, 1]}
    seed = {"linear": table, "conv2d": table}
    evaluator = evaluator_of(job_of(model, shape, seed, by="type"))
    assert (first(evaluator.samples("val", None)[0]) > 6).float().mean() > 0.2
    assert_as_alone(evaluator, evaluator.space.numbered(0, evaluator.space.size)[::5])


def test_no_candidates_and_no_choice():
    seed = {"default": {"name": "integer", "data_in_width": 4, "weight_width": 4}}
    evaluator = evaluator_of(job_of(seeded_model(Chain), Chain.shape, seed))
    assert evaluator.space.size == 1
    nothing = evaluator.evaluate(evaluator.space.numbered(0, 0))
    assert len(nothing) == 0
    assert {m: v.shape for m, v in nothing.values.items()} == {"loss": (0,), "accuracy": (0,)}
    assert_as_alone(evaluator, np.zeros((3, 0), dtype=np.int64))


def test_a_model_without_sites_is_refused():
    with pytest.raises(ConfigError, match="nothing that could be configured"):
        evaluator_of(job_of(Siteless(), (CLASSES,), {"default": {"name": "integer", "data_in_width": 4}}))


@pytest.mark.parametrize("network", [Chain, Smooth])
def test_a_model_in_double_precision(network):
    seed = {"default": {"name": ["integer", "affine", "NA"], "data_in_width": [3, 8], "weight_width": [2, 4]}}
    evaluator = evaluator_of(
        job_of(seeded_model(network).double(), network.shape, seed), {"samples": 7, "bytes": 2000, "threads": 2}
    )
    assert_as_alone(evaluator, evaluator.space.sample(12, np.random.default_rng(0)))


def test_the_samples_asked_for_are_the_samples_used():
    seed = {"default": {"name": ["integer", "NA"], "data_in_width": [3, 8], "weight_width": [2, 4]}}
    model = seeded_model(Chain)
    few = evaluator_of(job_of(model, Chain.shape, seed, settings={"num_samples": 13}))
    job = job_of(model, Chain.shape, seed)
    x, y = (t[:13] for t in job.splits["val"])
    codes = few.space.sample(8, np.random.default_rng(0))
    assert same(few.evaluate(codes), assert_as_alone(evaluator_of(job_of(model, Chain.shape, seed, x=x, y=y)), codes))
    assert few.scores(codes, "val", 13).samples == 13
    # Another split in between does not matter.
    few.scores(codes, "train", None)
    assert np.array_equal(few.scores(codes, "val", 13).loss, few.evaluate(codes).values["loss"])


@pytest.mark.parametrize("strided", ["every second", "transposed", "expanded"])
def test_samples_may_lie_in_memory_as_they_like(strided):
    x = torch.randn(2 * SAMPLES, 6, generator=torch.Generator().manual_seed(1))
    views = {"every second": x[::2], "transposed": x[:SAMPLES].t().contiguous().t(), "expanded": x[:1].expand(9, 6)}
    seed = {"default": {"name": ["integer", "NA"], "data_in_width": [3, 8], "weight_width": [2, 4]}}
    evaluator = evaluator_of(
        job_of(seeded_model(Chain), (6,), seed, x=views[strided]), {"samples": 7, "bytes": 2000, "threads": 2}
    )
    assert_as_alone(evaluator, evaluator.space.sample(8, np.random.default_rng(0)))


@pytest.mark.parametrize("network", [Chain, Images])
def test_samples_may_begin_anywhere_in_memory(network):
    """Where a float tensor begins decides how a product of it is rounded; the deployed model gets a copy."""
    seed = {"default": {"name": ["NA", "affine"], "weight_width": [3, 4], "weight_granularity": "channel"}}
    size = 64 * int(np.prod(network.shape))
    for shift in (1, 4, 9):
        x = torch.randn(size + shift, generator=torch.Generator().manual_seed(shift))[shift:].view(64, *network.shape)
        evaluator = evaluator_of(
            job_of(seeded_model(network), network.shape, seed, x=x), {"samples": 7, "bytes": 2000, "threads": 1}
        )
        assert_as_alone(evaluator, evaluator.space.sample(8, np.random.default_rng(0)))


# --- what is no number -----------------------------------------------------------------------------------------------


@max_examples(30, suite=8, shrink=False)
@given(st.data())
def test_a_candidate_that_overflows_is_an_error_and_leaves_the_others_alone(data):
    formats = {"name": ["integer", "NA"], "data_in_width": [3, 8], "weight_width": [4, 8, "NA"]}
    job = job_of(seeded_model(Overflowing), Overflowing.shape, {"default": formats})
    evaluator = evaluator_of(job, data.draw(efforts, "effort"))
    codes = data.draw(candidates(evaluator.space, 14), "codes")
    measured = assert_as_alone(evaluator, codes)
    for error, loss, accuracy in zip(measured.errors, *measured.values.values(), strict=True):
        assert (error == "") == bool(np.isfinite(loss))
        assert error == "" or (error in ("loss is nan", "loss is inf") and np.isfinite(accuracy))
    for i, code in enumerate(codes):
        assert same(evaluator.evaluate(code[None]), part(measured, [i]))


def test_some_overflow_and_some_do_not():
    formats = {"name": ["integer", "NA"], "data_in_width": [3, 8], "weight_width": [4, "NA"]}
    evaluator = evaluator_of(job_of(seeded_model(Overflowing), Overflowing.shape, {"default": formats}))
    measured = assert_as_alone(evaluator, evaluator.space.sample(60, np.random.default_rng(0)))
    assert 10 < sum(map(bool, measured.errors)) < 50


@pytest.mark.parametrize("form", ["integer", "affine"])
def test_a_sample_that_is_no_number_is_none_in_convolutions_of_bytes(form):
    """A byte cannot hold it, so the step is computed in floats."""
    seed = {"default": {"name": [form, "NA"], "data_in_width": [8], "weight_width": [4, 8]}}
    x = torch.randn(9, *Images.shape, generator=torch.Generator().manual_seed(0))
    for place, value in ((None, 0.0), (4, torch.nan), (8, torch.nan)):
        samples = x.clone()
        if place is not None:
            samples[place, 0, 1, 1] = value
        evaluator = evaluator_of(job_of(seeded_model(Images), Images.shape, seed, x=samples))
        measured = assert_as_alone(evaluator, evaluator.space.sample(6, np.random.default_rng(0)))
        assert [bool(error) for error in measured.errors] == [place is not None] * len(measured.errors)


#: Ties, differences that leave nothing of the others, and what has no exponential.
VALUES = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-40, 15.5, 88.0, -88.0, 104.0, 1e4, -1e4, 3e38, -3e38)


@max_examples(50, shrink=False)
@given(
    st.lists(st.lists(st.sampled_from(VALUES), min_size=CLASSES, max_size=CLASSES), min_size=1, max_size=12),
    st.integers(0, 2**32 - 1),
    st.booleans(),
    efforts,
)
@example([[0.0] * CLASSES] * 5, 0, False, {"samples": 2, "bytes": 1, "threads": 1})
@example([[3e38, -3e38, 0.0, 1.0]] * 3, 0, True, {"samples": 2, "bytes": 1, "threads": 1})
@example([[0.0, -np.inf, 1.0, -np.inf]] * 3, 0, True, {"samples": 2, "bytes": 1, "threads": 1})
@example([[0.0, -np.inf, 1.0, -np.inf]] * 9, 0, False, {"samples": 2, "bytes": 1, "threads": 1})
@example([[np.inf, 0.0, 1.0, 2.0]], 0, False, {"samples": 2, "bytes": 1, "threads": 1})
@example([[-np.inf] * CLASSES], 0, False, {"samples": 2, "bytes": 1, "threads": 1})
@example([[1.0, 2.0, 3.0, 4.0], [np.nan, 0.0, 1.0, 2.0]], 0, False, {"samples": 2, "bytes": 1, "threads": 1})
def test_extreme_logits_and_ties(rows, seed, right, effort):
    x = torch.tensor(rows, dtype=torch.float32)
    best = np.argmax(x.numpy(), axis=1)  # the lowest index among equals
    y = best if right else np.random.default_rng(seed).integers(0, CLASSES, len(x))
    formats = {"name": ["integer", "NA"], "data_in_width": [2, 8], "data_in_frac_width": [0, 2]}
    job = job_of(Logits(), Logits.shape, {"default": formats}, x=x, y=torch.from_numpy(y.astype(np.int64)))
    evaluator = evaluator_of(job, effort)
    codes = evaluator.space.numbered(0, evaluator.space.size)[::-1]
    measured = assert_as_alone(evaluator, np.concatenate([codes, codes[:2]]))
    floating = int(np.flatnonzero([not evaluator.formats(c) for c in codes])[0])
    if not measured.errors[floating]:
        assert measured.values["accuracy"][floating] == np.mean(best == y)


@pytest.mark.parametrize("label", range(CLASSES))
def test_all_samples_of_one_class(label):
    seed = {"default": {"name": ["integer", "NA"], "data_in_width": [2, 8], "weight_width": [2, 4]}}
    evaluator = evaluator_of(job_of(seeded_model(Chain), Chain.shape, seed, y=torch.full((SAMPLES,), label)))
    assert_as_alone(evaluator, evaluator.space.sample(10, np.random.default_rng(0)))


def test_labels_that_the_model_has_no_output_for_are_an_error_of_every_candidate():
    seed = {"default": {"name": ["integer", "NA"], "data_in_width": [2, 8], "weight_width": [2, 4]}}
    evaluator = evaluator_of(job_of(seeded_model(Chain), Chain.shape, seed, y=torch.full((SAMPLES,), CLASSES)))
    measured = assert_as_alone(evaluator, evaluator.space.sample(3, np.random.default_rng(0)))
    assert all("logits of shape" in e for e in measured.errors)


EXACT = (Chain, EndsInReLU, Images, Grouped, Residual, ResidualImages, Dense, DenseImages, Heads, SharedLayer, Leaking)


@pytest.mark.parametrize("network", EXACT, ids=lambda n: n.__name__)
@max_examples(10, suite=3, shrink=False)
@given(st.data())
def test_what_is_exact_depends_on_no_number_of_samples(network, data):
    """Every product of fixed-point numbers, every sum within 24 bits: nothing that happens matters."""
    weights = {"weight_width": [2, 4, 6], "bias_width": [6]}
    seed = {"default": {"name": ["integer"], "data_in_width": [3, 5, 8]} | weights}
    model = seeded_model(network, data.draw(st.integers(0, 3), "weights"))
    job = job_of(model, network.shape, seed, corrections=data.draw(corrections, "corrections"))
    evaluator = evaluator_of(job)
    codes = data.draw(candidates(evaluator.space), "codes")
    other = evaluator_of(job, data.draw(efforts, "effort"))
    assert same(other.evaluate(codes), evaluator.evaluate(codes))
    assert not evaluator.inexact


WIDE = {"data_in_width": [2, 3, 8], "weight_width": [2, 4, "NA"], "weight_frac_width": "auto"}
BOTH = {"name": ["integer", "NA"], **WIDE, "bias_width": [4, "NA"], "bias_frac_width": ["auto", "NA"]}
CORRECTED = {
    # network: how many sites have a bias that is corrected, how many batch norms are re-estimated.
    Normalised: (2, 2),
    Images: (2, 1),
    Signals: (3, 1),
    ResidualImages: (3, 1),
    Norms: (3, 3),
    Functional: (1, 0),
    FunctionalConv: (2, 0),
    SharedLayer: (1, 0),
    StubbornAndShared: (2, 0),
}


@pytest.mark.sampled(2)
@pytest.mark.slow
@pytest.mark.parametrize("network", CORRECTED, ids=lambda n: n.__name__)
@pytest.mark.parametrize("which", [(True, False), (False, True), (True, True)], ids=["bias", "norm", "both"])
def test_corrected_candidates_have_the_numbers_of_their_corrected_models(network, which):
    corrections = Corrections(*which)
    job = job_of(seeded_model(network), network.shape, {"default": BOTH}, corrections=corrections)
    evaluator, plain = evaluator_of(job), evaluator_of(job_of(seeded_model(network), network.shape, {"default": BOTH}))
    codes = evaluator.space.sample(12, np.random.default_rng(0))
    measured = assert_as_alone(evaluator, codes)
    graph = evaluator.space.graph
    correctable = sum(has_bias(graph, s) for s in graph.sites), sum(len(norms_behind(graph, s)) for s in graph.sites)
    assert correctable == CORRECTED[network]
    # It makes a difference, wherever there is something to correct.
    expected = (corrections.bias and correctable[0] > 0) or (corrections.batch_norm and correctable[1] > 0)
    assert same(measured, plain.evaluate(codes)) is not expected
    tiny = evaluator_of(job, {"samples": evaluator.chunk, "bytes": 1, "threads": 2})
    assert same(joined([tiny.evaluate(c) for c in np.split(codes[::-1], 6)]), part(measured, range(len(codes))[::-1]))


class Cancelling(nn.Module):
    """Behind a ReLU, positive and negative weights that are equal: no part of a sum is as large as all of it."""

    def __init__(self, rectifies=True):
        super().__init__()
        self.first, self.last = nn.Linear(6, 32), nn.Linear(32, CLASSES, bias=False)
        self.between = nn.Sequential(nn.ReLU() if rectifies else nn.Tanh(), nn.Dropout(), nn.Flatten())
        with torch.no_grad():
            self.last.weight[:] = torch.tensor([1.0, -1.0]).repeat(16) * (0.6 + 0.4 * torch.rand(CLASSES, 32))

    def forward(self, x):
        return self.last(self.between(self.first(x)))


def test_sums_of_what_is_not_negative_need_fewer_bits():
    """Σ|w|·max|x| needs more than 24 bits here; behind a ReLU no part of a sum is larger than about half of it."""
    auto = {"data_in_frac_width": "auto", "weight_frac_width": "auto"}
    space = {"last": {"name": "integer", "data_in_width": 11, "weight_width": [2, 11], **auto}}
    for rectifies in (True, False):
        torch.manual_seed(0)
        model = Cancelling(rectifies).eval()
        evaluator = evaluator_of(job_of(model, (6,), space))
        codes = evaluator.space.numbered(0, evaluator.space.size)
        assert_as_alone(evaluator, codes)
        form = evaluator.formats(codes[-1])["last"]
        whole = form["weight"].quantize(model.last.weight.detach()).double() * 2.0 ** form["weight"].frac_width
        assert float(whole.abs().sum(dim=1).max()) * 2**10 > 2**24
        products = evaluator._tree._products
        (step,) = [s for s in products._program.steps if s.site is not None and s.site.name == "last"]
        kinds = {products.kind(step, d, p) for g, d, p in products._kinds if g == step.group}
        assert ("long" not in kinds) is rectifies


class InPlace(nn.Module):
    """Changes what it is given."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x.add_(1)
        return self.fc(x)


def test_a_model_that_changes_its_input_goes_the_plain_way():
    job = job_of(InPlace(), (6,), {"default": {"name": "integer", "data_in_width": [2, 4, 8], "weight_width": 6}})
    x = job.splits["val"][0].clone()
    evaluator = evaluator_of(job)
    codes = evaluator.space.numbered(0, evaluator.space.size)
    first = assert_as_alone(evaluator, codes)
    assert same(part(first, [2, 1, 0]), evaluator.evaluate(codes[::-1]))
    assert "in place" in evaluator.plain
    assert torch.equal(job.splits["val"][0], x)


@pytest.mark.slow
@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_runs_out_halves_the_work_and_goes_on(error, monkeypatch):
    seed = {"default": {"name": ["integer"], "data_in_width": [3, 5], "weight_width": [2, 4], "bias_width": [6]}}
    job = job_of(seeded_model(Images), Images.shape, seed)
    codes = FixedEvaluator(job).space.sample(20, np.random.default_rng(0))
    fine = evaluator_of(job).evaluate(codes)
    real = Pass._step
    refused = []

    def scarce(self, i, needed, live):
        if len(needed) * self.samples > 12:
            refused.append(len(needed) * self.samples)
            raise error
        return real(self, i, needed, live)

    monkeypatch.setattr(Pass, "_step", scarce)
    assert same(evaluator_of(job, {"samples": 64, "bytes": 10**6, "threads": 1}).evaluate(codes), fine)
    assert refused
    monkeypatch.setattr(Pass, "_step", lambda *_: (_ for _ in ()).throw(error))
    monkeypatch.setattr(Pass, "run", lambda *_: (_ for _ in ()).throw(error))
    evaluator = evaluator_of(job)
    assert same(evaluator.evaluate(codes), fine), "the plain path is left"
    assert "no room" in evaluator.plain or "allocate" in evaluator.plain or "fit" in evaluator.plain
