"""Candidates that are networks to be trained: alike whatever is trained beside them, with costs by their shapes."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import bitfront as bf
from bitfront import config, tomlfile
from bitfront.data.arrays import from_arrays
from bitfront.engine.evaluation import trained as training_bench
from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.evaluation.halving import going_on
from bitfront.engine.evaluation.trained import open_evaluator
from bitfront.engine.planning.builder import make_plan
from bitfront.errors import ConfigError
from bitfront.graph import capture
from bitfront.scoring import evaluate
from bitfront.spaces.quantize import QuantizationSpace
from engine.networks import Functional, Residual, SharedLayer, seeded_model

pytestmark = pytest.mark.slow

TOP = """
model = "jsc-three-linear-layers"
project = "widths"
accelerator = "cpu"
max_epochs = 2
batch_size = 64
learning_rate = 1e-2
"""
WIDTHS = """
[search.search_space]
name = "channel_size"
[search.search_space.seed.seq_blocks_2.config]
name = ["output_only"]
channel_multiplier = [1, 2]
[search.search_space.seed.seq_blocks_4.config]
name = ["both"]
channel_multiplier = [0.5, 1, 4]
"""
FORMATS = """
name = ["integer"]
data_in_width = [8]
data_in_frac_width = ["auto"]
weight_width = [2, 4]
weight_frac_width = ["auto"]
bias_width = [8]
"""
QUANTIZE = f"""
[search.search_space.setup]
by = "type"
[search.search_space.seed.linear.config]
{FORMATS}
"""
JOINT = f"""
[search.search_space]
name = "joint"
[search.search_space.widths.seed.seq_blocks_4.config]
name = "output_only"
channel_multiplier = [1, 2]
[search.search_space.quantize.setup]
by = "type"
[search.search_space.quantize.seed.linear.config]
{FORMATS}
"""
TRAIN = """
[search.strategy.sw_runner.basic_train]
max_epochs = 2
num_samples = 200
"""
REST = """
[search.strategy]
name = "brute_force"
[search.strategy.sw_runner.basic_evaluation]
[search.strategy.hw_runner.basic_computation]
[search.strategy.hw_runner.model_size]
[search.strategy.hw_runner.ebops]
[search.strategy.hw_runner.peak_memory]
[search.strategy.metrics]
accuracy.scale = 1.0
total_bitops.scale = 1.0
"""


@pytest.fixture(scope="module")
def dataset():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 16, generator=generator)
    y = (x @ torch.randn(16, 5, generator=generator)).argmax(1)
    return from_arrays(x, y)


def configured(*parts, **more):
    return config.from_document(tomlfile.parse(TOP + "".join(parts) + REST, "test.toml"), more)


def plan_of(dataset, *parts, model=None, **more):
    return make_plan(configured(*parts, **more), dataset=dataset, model=model)


def everything(plan):
    return plan.space.numbered(0, plan.space.size)


def same(first, second):
    assert first.errors == second.errors
    for name, column in first.values.items():
        np.testing.assert_array_equal(column, second.values[name], err_msg=name)


def states_equal(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[k], second[k]) for k in first)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts", [(WIDTHS, TRAIN), (JOINT, TRAIN), (QUANTIZE, TRAIN)], ids=["widths", "joint", "formats"]
)
def test_a_result_depends_on_no_other_candidate(dataset, parts):
    """Another batch, another order, an evaluator that was sent elsewhere: the same bits."""
    plan = plan_of(dataset, *parts)
    codes = everything(plan)
    first = plan.evaluator.evaluate(codes)
    assert not any(first.errors)
    assert (first.values["trained_epochs"] == 2).all()
    sent = open_evaluator(pickle.loads(pickle.dumps(plan.evaluator.job)))  # noqa: S301
    torch.manual_seed(12345)  # whatever the global random state is
    same(first, Reversed(sent).evaluate(codes))
    alone = open_evaluator(plan.evaluator.job, plan.space).evaluate(codes[-1:])
    for name, column in alone.values.items():
        assert column[0] == first.values[name][-1], name


class Reversed:
    """An evaluator that is asked for candidates in the opposite order, two at a time."""

    def __init__(self, evaluator):
        self.evaluator = evaluator

    def evaluate(self, codes):
        order = np.arange(len(codes))[::-1]
        parts = [self.evaluator.evaluate(codes[order[i : i + 2]]) for i in range(0, len(codes), 2)]
        joined = training_bench.joined(parts)
        back = np.argsort(order)
        return training_bench.replace(
            joined,
            values={m: v[back] for m, v in joined.values.items()},
            errors=tuple(joined.errors[i] for i in back),
        )


def weights(plan, code):
    """What a candidate was trained to, in float."""
    return plan.evaluator.alone(code)[0].space.graph.model.state_dict()


def test_training_changes_the_weights_and_learns(dataset):
    plan = plan_of(dataset, WIDTHS, TRAIN)
    untrained = plan_of(dataset, WIDTHS)
    codes = everything(plan)
    before, after = untrained.evaluator.evaluate(codes).values, plan.evaluator.evaluate(codes).values
    assert (after["loss"] < before["loss"]).all(), "the float model is not trained, its candidates are"
    assert "trained_epochs" not in before


def test_a_quantized_candidate_is_trained_in_its_formats(dataset, monkeypatch):
    """Straight-through: the twin that is trained computes in the formats; what is kept is the float weights."""
    seen = []
    train = training_bench._train

    def watched(models, *more):
        seen.extend(models)
        return train(models, *more)

    monkeypatch.setattr(training_bench, "_train", watched)
    plan = plan_of(dataset, QUANTIZE, TRAIN)
    code = plan.space.numbered(0, 1)[0]
    state = weights(plan, code)
    (twin,) = seen
    assert [f.bits for f in twin.seq_blocks[2].formats.values()] == [8, 2, 8]
    assert state.keys() == plan.model.state_dict().keys()
    assert len(state["seq_blocks.2.weight"].unique()) > 4, "these are not yet quantized"
    inner, inner_code = plan.evaluator.alone(code)
    baked = inner.model(inner_code, bake=True)
    assert all(len(m.weight.unique()) <= 4 for m in baked.modules() if isinstance(m, nn.Linear))
    x, y = plan.evaluator.samples("val", None)
    assert (
        evaluate(baked, x, y, batch_size=inner.chunk).accuracy
        == plan.evaluator.evaluate(code[None]).values["accuracy"][0]
    )


def test_training_in_the_formats_is_better_than_rounding_afterwards(dataset):
    # The float model first, so that both begin with the same good weights.
    model = plan_of(dataset, QUANTIZE).model
    settings = training_bench.CandidateTraining(*dataset.split("train"), 5, bf_settings(20))
    ((state, _),) = training_bench._train([model], settings, "cpu", [20], "logits")
    model.load_state_dict(state)
    rounded = plan_of(dataset, QUANTIZE, model=model)
    learned = plan_of(dataset, QUANTIZE, TRAIN.replace("max_epochs = 2", "max_epochs = 10"), model=model)
    coarsest = rounded.space.numbered(0, 1)  # 2 bits everywhere
    assert (
        learned.evaluator.evaluate(coarsest).values["loss"][0] < rounded.evaluator.evaluate(coarsest).values["loss"][0]
    )


def test_a_candidate_is_judged_in_the_formats_it_was_trained_in(dataset):
    """Formats that were learned again from the trained weights would be others."""
    plan = plan_of(dataset, QUANTIZE, TRAIN.replace("max_epochs = 2", "max_epochs = 10"))
    relearned = 0
    for code in everything(plan):
        (_, untrained, codes), *_ = plan.evaluator._untrained_networks(code[None])
        trained, only = plan.evaluator.alone(code)
        assert trained.formats(only) == untrained.formats(codes[0])
        again = plan_of(dataset, QUANTIZE, model=trained.space.graph.model).evaluator
        relearned += again.formats(code) != trained.formats(only)
    assert relearned, "this test sees nothing"


FIRST = "float_epochs = 3\n"


def test_other_widths_are_trained_in_float_first_once_for_all_their_candidates(dataset, monkeypatch):
    seen = []
    train_population = training_bench.train_population

    def watched(models, few, settings, **more):
        seen.extend((model.seq_blocks[4].out_features, settings.max_epochs) for model in models)
        return train_population(models, few, settings, **more)

    monkeypatch.setattr(training_bench, "train_population", watched)
    plan = plan_of(dataset, JOINT, TRAIN + FIRST)
    codes = everything(plan)
    measured = plan.evaluator.evaluate(codes)
    first = [width for width, epochs in seen if epochs == 3]
    as_it_is = plan.model.seq_blocks[4].out_features
    assert len(first) == len(set(first))
    assert set(first) == {width for width, _ in seen} - {as_it_is}
    # Formats are learned from what that gave; a candidate alone is the same; without it, it is another.
    code = next(c for c in codes if plan.evaluator.alone(c)[0].space.graph.model.seq_blocks[4].out_features != as_it_is)
    row = [c.tobytes() for c in codes].index(code.tobytes())
    alone = plan_of(dataset, JOINT, TRAIN + FIRST).evaluator.evaluate(code[None])
    without = plan_of(dataset, JOINT, TRAIN).evaluator.evaluate(code[None])
    assert alone.values["loss"][0] == measured.values["loss"][row] != without.values["loss"][0]


def test_what_is_known_needs_no_training_not_even_in_float(dataset, monkeypatch, tmp_path):
    plan = plan_of(dataset, JOINT, TRAIN + FIRST)
    codes = everything(plan)
    measured = plan.evaluator.evaluate(codes)
    plan.evaluator.keep(codes[-1], tmp_path / "kept.pt")
    elsewhere = plan_of(dataset, JOINT, TRAIN + FIRST).evaluator
    elsewhere.recall(codes[-1], {"trained_epochs": 2.0}, tmp_path / "kept.pt")

    def nobody(*more, **others):
        raise AssertionError("nothing is to be trained")

    monkeypatch.setattr(training_bench, "train_population", nobody)
    again = elsewhere.evaluate(codes[-1:])
    assert again.errors == ("",)
    assert again.values["loss"][0] == measured.values["loss"][-1]
    x, y = plan.evaluator.samples("val", None)
    moved = plan.evaluator.with_splits({"val": (x, y)})
    np.testing.assert_array_equal(moved.scores(codes, "val", None).loss, measured.values["loss"])


def bf_settings(epochs):
    from bitfront.training import TrainSettings

    return TrainSettings(max_epochs=epochs, batch_size=64, learning_rate=1e-2)


def test_batch_norm_is_evaluated_with_what_training_left_in_it(dataset):
    plan = plan_of(dataset, WIDTHS, TRAIN)
    evaluator, _ = plan.evaluator.alone(plan.space.numbered(0, 1)[0])
    norm = evaluator.space.graph.model.seq_blocks[0]
    assert not norm.training
    assert not torch.equal(norm.running_mean, plan.model.seq_blocks[0].running_mean)


def test_fresh_weights_owe_nothing_to_the_float_model(dataset):
    fresh = TRAIN + "init = 'fresh'\n"
    other = plan_of(dataset, WIDTHS).model
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.3)
    for parts, equal in (((WIDTHS, fresh), True), ((WIDTHS, TRAIN), False)):
        one, two = plan_of(dataset, *parts), plan_of(dataset, *parts, model=other)
        first, second = (m.evaluator.evaluate(everything(m)).values["loss"] for m in (one, two))
        assert np.array_equal(first, second) == equal
        assert len(set(first)) == len(first)


def test_the_captured_model_stays_as_it_is(dataset):
    plan = plan_of(dataset, JOINT, TRAIN)
    before = {k: v.clone() for k, v in plan.space.graph.model.state_dict().items()}
    plan.evaluator.evaluate(everything(plan)[:3])
    assert states_equal(before, plan.space.graph.model.state_dict())


def test_a_candidate_whose_training_diverges_fails_alone(dataset, monkeypatch):
    train_population = training_bench.train_population

    def failing(models, few, settings, **more):
        members = train_population(models, few, settings, **more)
        return [
            replace(member, error="training diverged") if model.seq_blocks[2].out_features == 32 else member
            for model, member in zip(models, members, strict=True)
        ]

    plan = plan_of(dataset, WIDTHS, TRAIN)
    whole = plan.evaluator.evaluate(everything(plan))
    monkeypatch.setattr(training_bench, "train_population", failing)
    measured = open_evaluator(plan.evaluator.job, plan.space).evaluate(everything(plan))
    assert [bool(e) for e in measured.errors] == [False] * 3 + [True] * 3
    np.testing.assert_array_equal(measured.values["accuracy"][:3], whole.values["accuracy"][:3])


def test_an_interrupted_training_is_no_result(dataset, monkeypatch):
    plan = plan_of(dataset, WIDTHS, TRAIN)
    train_population = training_bench.train_population

    def interrupted(models, few, settings, **more):
        def stop(epoch, records, state):
            raise KeyboardInterrupt

        return train_population(models, few, settings, **{**more, "keep": stop})

    monkeypatch.setattr(training_bench, "train_population", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plan.evaluator.evaluate(everything(plan))


@pytest.mark.parametrize("network", [Functional, SharedLayer, Residual])
def test_functional_and_shared_sites_are_trained_too(network):
    """Their twins have other names than what they stand for."""
    model = seeded_model(network)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, *network.shape, generator=generator)
    data = from_arrays(x, x[:, :4].argmax(1))
    formats = QUANTIZE.replace('by = "type"', 'by = "regex_name"').replace("seed.linear.", "seed.'.*'.")
    plan = plan_of(data, formats, TRAIN, model=model)
    code = plan.space.numbered(0, 1)[0]
    state, before = weights(plan, code), model.state_dict()
    assert state.keys() == before.keys()
    moved = [k for k in state if not torch.equal(state[k], before[k])]
    assert moved == [k for k in state if k in dict(model.named_parameters())]
    assert not any(plan.evaluator.evaluate(code[None]).errors)


# --- halving ---------------------------------------------------------------------------------------------------------

HALVING = TRAIN.replace("max_epochs = 2", "max_epochs = 3") + "halving = {rungs = [1, 2], keep = 0.4, cohort = 5}\n"


def test_of_a_cohort_the_front_goes_on_and_the_best_of_the_others():
    losses = np.array([[-9.0, 5], [-8, 5], [-7, 1], [-6, 4], [-5, 2], [np.nan, 0]])
    assert going_on(losses, 0.1).tolist() == [True, False, True, False, False, False]
    assert going_on(losses, 0.5).tolist() == [True, True, True, False, False, False]
    assert going_on(losses[:1], 0.5).tolist() == [True]


def test_of_a_cohort_with_constraints_those_go_on_that_fulfil_them_or_nearly_do():
    losses = np.array([[-9.0, 5], [-8, 4], [-7, 1], [-6, 4], [-5, 2], [np.nan, 0]])
    violation = np.array([0.4, 0, 0, 0.1, 0, 0])
    assert going_on(losses, 0.1, violation).tolist() == [False, True, True, False, False, False]
    # The others that fulfil them, then the rest by its distance from the bounds.
    assert going_on(losses, 0.5, violation).tolist() == [False, True, True, False, True, False]
    assert going_on(losses, 0.6, violation).tolist() == [False, True, True, True, True, False]
    assert going_on(losses, 0.1, violation + 0.3).tolist() == [False, True, False, False, False, False]
    assert going_on(losses, 0.9, np.zeros(6)).tolist() == going_on(losses, 0.9).tolist()


@pytest.mark.long
def test_halving_trains_on_what_meets_the_constraints(dataset, tmp_path, monkeypatch):
    """A bound that is known before any training, and one on trained weights, which is looked at on each rung."""
    judged, trained, real, population = [], [], training_bench.going_on, training_bench.train_population
    monkeypatch.setattr(training_bench, "going_on", lambda *a: judged.append((*a, real(*a))) or judged[-1][-1])
    monkeypatch.setattr(
        training_bench,
        "train_population",
        lambda models, *a, **k: trained.append(len(models)) or population(models, *a, **k),
    )
    plan = plan_of(dataset, JOINT)
    costs = plan.evaluator.closed_form_values(everything(plan), ["model_size", "ebops"])
    most = float(np.sort(costs["model_size"])[-4])
    bounds = {"model_size": f"<= {most}", "ebops": f"<= {np.median(costs['ebops'])}"}

    def searched(folder, n_jobs=1, **more):
        file = configured(JOINT, HALVING, project_dir=str(tmp_path / folder), **{"search.constraints": bounds})
        return bf.search(file, data=dataset, n_jobs=n_jobs, **more)

    bound = searched("bound")
    assert len(bound) == (costs["model_size"] <= most).sum()
    assert (bound.columns.metrics["model_size"] <= most).all()
    assert sum(trained) == len(bound) + 2, "and those whose time is measured"
    cohorts = [of for of in judged if len(of[0]) > 1]
    assert any((violation > 0).any() and not stays.all() for _, _, violation, stays in cohorts)
    for losses, keep, violation, stays in cohorts:
        worst = violation[stays].max()
        assert not ((violation < worst) & ~stays).any(), "who is closer to the bounds goes first"
        assert stays.sum() >= keep * len(losses)
    assert searched("parts", events=Stopping(3)).stopped == "interrupted"
    parts = searched("parts", n_jobs=2)
    for name, column in bound.columns.metrics.items():
        np.testing.assert_array_equal(column, parts.columns.metrics[name], err_msg=name)


class Stopping(bf.Events):
    """Interrupts a search after some candidates."""

    def __init__(self, count):
        self.count = count

    def progress(self, progress, plan):
        if progress.done >= self.count:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("quick_workers")
def test_halving_stops_who_is_hopeless_and_changes_nothing_for_the_others(dataset, tmp_path):
    whole = bf.search(
        configured(JOINT, HALVING[: HALVING.index("halving")], project_dir=str(tmp_path / "whole")), data=dataset
    )
    runs = [
        bf.search(configured(JOINT, HALVING, project_dir=str(tmp_path / str(n))), data=dataset, n_jobs=n)
        for n in (1, 2)
    ]
    epochs = runs[0].columns.metrics["trained_epochs"]
    assert set(epochs) == {1, 2, 3}
    for start in range(0, len(epochs), 5):
        cohort = epochs[start : start + 5]
        assert (cohort >= 2).sum() >= 0.4 * len(cohort)
    to_the_end = epochs == 3
    for name, column in runs[0].columns.metrics.items():
        np.testing.assert_array_equal(column, runs[1].columns.metrics[name], err_msg=name)
        np.testing.assert_array_equal(column[to_the_end], whole.columns.metrics[name][to_the_end], err_msg=name)
    for wanted in (1, 2, 3):
        number = int(np.flatnonzero(epochs == wanted)[0])
        rebuilt = bf.transform_trial(runs[0].folder, number, check=True, data=dataset)
        assert rebuilt.evaluation.accuracy == runs[0].trial(number).metrics["accuracy"]


@pytest.mark.long
def test_a_search_with_halving_goes_on_where_it_stopped(dataset, tmp_path):
    def searched(folder, **more):
        return bf.search(configured(JOINT, HALVING, project_dir=str(tmp_path / folder)), data=dataset, **more)

    whole = searched("whole")
    assert len(searched("parts", events=Stopping(6))) == 10
    parts = searched("parts")
    for name, column in whole.columns.metrics.items():
        np.testing.assert_array_equal(column, parts.columns.metrics[name], err_msg=name)


# --- costs -----------------------------------------------------------------------------------------------------------


def test_costs_follow_the_widened_shapes(dataset):
    """Each candidate costs what its network costs when that is captured and measured alone."""
    plan = plan_of(dataset, JOINT, TRAIN)
    codes = everything(plan)
    measured = plan.evaluator.evaluate(codes).values
    priced = plan.evaluator.closed_form_values(codes, ["total_flops", "total_bitops", "model_size", "peak_memory"])
    for row in (0, 3, len(codes) - 1):
        evaluator, code = plan.evaluator.alone(codes[row])
        graph = capture(evaluator.space.graph.model, evaluator.job.sample)
        space = QuantizationSpace.of_formats(graph, evaluator.formats(code))
        alone = FixedEvaluator(training_bench.replace(evaluator.job, model=graph.model), space)
        expected = alone.evaluate(code[None]).values
        for name in ("total_flops", "total_bitops", "model_size", "peak_memory", "ebops", "loss", "accuracy"):
            assert measured[name][row] == expected[name][0], name
        for name, column in priced.items():
            assert column[row] == expected[name][0], name
    # BatchNorm 4·16, ReLUs 16 + 16 + h + 5, products 16·16 + 16·h + h·5
    flops = {64 + 16 + 16 + h + 5 + 256 + 21 * h for h in (16, 32)}
    assert set(measured["total_flops"].tolist()) == flops


def test_what_is_of_trained_weights_is_not_known_before(dataset):
    assert "ebops" not in plan_of(dataset, WIDTHS, TRAIN).evaluator.closed_form
    assert "ebops" in plan_of(dataset, WIDTHS).evaluator.closed_form
    with_bound = plan_of(dataset, WIDTHS, TRAIN, **{"search.constraints.total_flops": "<= 600"})
    assert with_bound.constraints[0].metric == "total_flops"


def test_without_training_wider_networks_compute_what_the_model_does(dataset):
    plan = plan_of(dataset, WIDTHS)
    assert any("are not trained" in note for note in plan.notes)
    measured = plan.evaluator.evaluate(everything(plan)).values
    wide = [i for i, c in enumerate(everything(plan)) if plan.space.layer_widths(c)["seq_blocks_4"][1] >= 16]
    np.testing.assert_allclose(measured["loss"][wide], measured["loss"][wide[0]], atol=1e-5)
    # Fewer channels are another function.
    assert len(set(np.round(measured["loss"], 4))) > 1


# --- with corrections ------------------------------------------------------------------------------------------------


CORRECTED = {"search.calibration.bias_correction": True, "search.calibration.batch_norm": True}


def a_normalised_network():
    """Two layers that equalisation changes, and a batch norm behind a layer that has formats."""
    torch.manual_seed(0)
    layers = (
        *(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8)),
        *(nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)),
    )
    model = nn.Sequential(*layers)
    model(torch.randn(200, 16))  # statistics that are not those of a new batch norm
    return model.eval()


@pytest.mark.parametrize("more", [CORRECTED, CORRECTED | {"search.calibration.equalisation": True}])
def test_corrected_candidates_are_alike_together_alone_in_another_process_and_as_deployed(dataset, more):
    plan = plan_of(dataset, QUANTIZE, TRAIN, model=a_normalised_network(), **more)
    assert not [note for note in plan.notes if "has no effect" in note]
    codes = everything(plan)[:4]
    together = plan.evaluator.evaluate(codes)
    assert together.errors == ("",) * 4
    for i in range(4):
        job = pickle.loads(pickle.dumps(plan.evaluator.job))  # noqa: S301
        alone = open_evaluator(job).evaluate(codes[i : i + 1])
        assert alone.values["loss"][0] == together.values["loss"][i]
    x, y = plan.evaluator.samples("val", None)
    for i in (0, 3):
        evaluator, code = plan.evaluator.alone(codes[i])
        deployed = evaluate(evaluator.model(code, bake=True), x, y, batch_size=evaluator.chunk)
        assert deployed.loss == together.values["loss"][i]


def test_batch_norms_get_the_statistics_of_the_trained_weights_in_their_formats(dataset):
    plain, corrected = (
        plan_of(dataset, QUANTIZE, TRAIN, model=a_normalised_network(), **more)
        for more in ({}, {"search.calibration.batch_norm": True})
    )
    code = everything(plain)[0]
    (before, _), (after, empty) = (plan.evaluator.alone(code) for plan in (plain, corrected))
    one, two = (e.space.graph.model.state_dict() for e in (before, after))
    assert {name for name in one if not torch.equal(one[name], two[name])} == {"3.running_mean", "3.running_var"}
    formats = after.formats(empty)
    linear = (after.space.graph.model[0], after.space.graph.model[2])
    means, variances = [], []
    samples = corrected.evaluator.job.calibration
    for part in samples.tensor_split(-(-len(samples) // 64)):
        h = part
        for layer, name in zip(linear, ("_0", "_2"), strict=True):
            of = formats[name]
            h = of["data_in"].quantize(h) @ of["weight"].quantize(layer.weight).T + of["bias"].quantize(layer.bias)
            h = h.relu() if name == "_0" else h
        means.append(h.mean(0))
        variances.append(h.var(0))
    torch.testing.assert_close(two["3.running_mean"], torch.stack(means).mean(0))
    torch.testing.assert_close(two["3.running_var"], torch.stack(variances).mean(0))


def test_a_trained_candidate_begins_with_corrected_biases(dataset, monkeypatch):
    begun = []
    real = training_bench.train_population

    def recorded(models, *args, **more):
        begun.extend({k: v.clone() for k, v in model.state_dict().items()} for model in models)
        return real(models, *args, **more)

    monkeypatch.setattr(training_bench, "train_population", recorded)
    for more in ({}, {"search.calibration.bias_correction": True}):
        plan = plan_of(dataset, QUANTIZE, TRAIN, model=a_normalised_network(), **more)
        plan.evaluator.evaluate(everything(plan)[:1])
    plain, corrected = begun
    assert {name for name in plain if not torch.equal(plain[name], corrected[name])} == {"0.bias", "2.bias", "5.bias"}


def test_stored_weights_of_a_corrected_candidate_are_taken_up_to_the_bit(dataset, tmp_path):
    plan = plan_of(dataset, QUANTIZE, TRAIN, model=a_normalised_network(), **CORRECTED)
    code = everything(plan)[1]
    measured = plan.evaluator.evaluate(code[None])
    plan.evaluator.keep(code, tmp_path / "trial.pt")
    other = open_evaluator(plan.evaluator.job)
    other.recall(code, {m: float(v[0]) for m, v in measured.values.items()}, tmp_path / "trial.pt")
    assert other.scores(code[None], "val", None).loss[0] == measured.values["loss"][0]


def test_halving_compares_networks_with_the_statistics_that_they_are_measured_with(dataset, monkeypatch):
    renewed = []
    real = training_bench.with_new_statistics
    monkeypatch.setattr(training_bench, "with_new_statistics", lambda *a: renewed.append(real(*a)) or renewed[-1])
    halved = TRAIN + "halving = {rungs = [1], keep = 0.5, cohort = 4}\n"
    plan = plan_of(dataset, QUANTIZE, halved, model=a_normalised_network(), **CORRECTED)
    codes = everything(plan)[:4]
    measured = plan.evaluator.evaluate(codes)
    epochs = measured.values["trained_epochs"].tolist()
    assert set(epochs) == {1.0, 2.0}
    at_rung, at_end = renewed[:4], renewed[4:]
    assert len(at_end) == 4
    for epoch, first, last in zip(epochs, at_rung, at_end, strict=True):
        assert states_equal(first, last) == (epoch == 1)


# --- what the file may ask for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "more", "key"),
    [
        ((WIDTHS, TRAIN), {"search.calibration.rounding": "adaptive"}, "search.calibration.rounding"),
        ((WIDTHS, TRAIN), {"search.calibration.equalisation": True}, "search.calibration.equalisation"),
        (
            (QUANTIZE, TRAIN + "init = 'fresh'\n"),
            {"search.calibration.equalisation": True},
            "search.calibration.equalisation",
        ),
        (
            (QUANTIZE, TRAIN),
            {"search.calibration.batch_norm": True, "search.calibration.num_samples": 1},
            "search.calibration.num_samples",
        ),
        (
            (QUANTIZE,),
            {
                "search.calibration.batch_norm": True,
                "search.calibration.num_samples": 1,
                "search.finetune.trials": 1,
            },
            "search.calibration.num_samples",
        ),
        (
            (WIDTHS, TRAIN),
            {"search.strategy.sw_runner.basic_evaluation.data_loader": "train"},
            "search.strategy.sw_runner.basic_evaluation.data_loader",
        ),
        ((WIDTHS, TRAIN.replace("200", "0")), {}, "search.strategy.sw_runner.basic_train.num_samples"),
        ((WIDTHS, TRAIN + "epochs = 3\n"), {}, "search.strategy.sw_runner.basic_train.epochs"),
        ((WIDTHS, TRAIN + "halving.rungs = [2]\n"), {}, "search.strategy.sw_runner.basic_train.halving.rungs"),
        ((WIDTHS, TRAIN + "halving.rungs = [1, 1]\n"), {}, "search.strategy.sw_runner.basic_train.halving.rungs"),
        ((WIDTHS, TRAIN + "halving.keep = 1.0\n"), {}, "search.strategy.sw_runner.basic_train.halving.keep"),
        ((JOINT.replace("joint", "channel_size"),), {}, "search.search_space.quantize"),
        ((JOINT, QUANTIZE.replace("[search.search_space.setup]\nby = \"type\"", "")), {}, "search.search_space.seed"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for_is_named_before_any_work(dataset, parts, more, key):
    with pytest.raises(ConfigError) as caught:
        plan_of(dataset, *parts, **more)
    asked = ".".join(caught.value.key)
    assert asked == key, caught.value


def test_eval_mode_false_means_that_candidates_are_trained(dataset):
    note = "eval_mode = false has no effect: candidates are evaluated in eval mode"
    false = {"search.strategy.eval_mode": False}
    assert note in plan_of(dataset, WIDTHS, **false).notes
    assert note not in plan_of(dataset, WIDTHS, TRAIN, **false).notes


def test_settings_that_are_left_out_are_those_of_the_top(dataset):
    training = plan_of(dataset, WIDTHS, TRAIN, weight_decay=0.5).evaluator.job.training
    assert (training.settings.batch_size, training.settings.learning_rate) == (64, 1e-2)
    assert (training.settings.weight_decay, training.settings.optimizer, len(training.y)) == (0.5, "adam", 200)
    settings = "optimizer = 'sgd'\nlearning_rate = 0.5\nbatch_size = 7\nweight_decay = 0.0\n"
    training = plan_of(dataset, WIDTHS, TRAIN + settings, weight_decay=0.5).evaluator.job.training
    assert (training.settings.batch_size, training.settings.learning_rate) == (7, 0.5)
    assert (training.settings.weight_decay, training.settings.optimizer) == (0.0, "sgd")


# --- a whole search --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [(WIDTHS, TRAIN), (JOINT, TRAIN), (QUANTIZE, TRAIN), (WIDTHS,)], ids=range(4))
def test_any_trial_is_rebuilt_exactly(dataset, tmp_path, parts):
    """Those of the front from the weights that were kept, the others by training them again."""
    run = bf.search(configured(*parts, project_dir=str(tmp_path)), data=dataset)
    front = {t.number for t in run.front}
    kept = {int(p.stem.split("-")[1]) for p in (run.folder / "checkpoints").glob("trial-*.pt")}
    assert kept == (front if TRAIN in parts else set())
    others = [t.number for t in run.trials if t.number not in front]
    for number in [*sorted(front)[:2], *others[:2]]:
        rebuilt = bf.transform_trial(run.folder, number, check=True, data=dataset)
        assert rebuilt.evaluation.accuracy == run.trial(number).metrics["accuracy"]
        assert rebuilt.evaluation.loss == run.trial(number).metrics["loss"]
    if TRAIN in parts:
        number = min(front)
        state = torch.load(run.folder / "transformed" / f"trial-{number}" / "model.pt")
        (run.folder / "checkpoints" / f"trial-{number}.pt").unlink()
        bf.transform_trial(run.folder, number, data=dataset)
        again = torch.load(run.folder / "transformed" / f"trial-{number}" / "model.pt")
        assert states_equal(state, again)


def test_a_trained_trial_is_trained_on(dataset, tmp_path):
    """``finetune`` begins with the trained weights of the candidate, in its widths."""
    more = {"search.finetune.trials": 1, "search.finetune.max_epochs": 2, "project_dir": str(tmp_path)}
    run = bf.search(configured(JOINT, TRAIN, **more), data=dataset)
    (number,) = [t.number for t in run.trials if t.finetuned]
    tuned = run.trial(number).finetuned
    rebuilt = bf.transform_trial(run.folder, number, check=True, data=dataset)
    expected = tuned.metrics if tuned.kept else run.trial(number).metrics
    assert rebuilt.evaluation.accuracy == expected["accuracy"]
    assert tuned.metrics["total_bitops"] == run.trial(number).metrics["total_bitops"]


@pytest.mark.usefixtures("quick_workers")
def test_any_number_of_processes_gives_the_same_run(dataset, tmp_path):
    runs = [
        bf.search(configured(JOINT, TRAIN, project_dir=str(tmp_path / str(n))), data=dataset, n_jobs=n) for n in (1, 2)
    ]
    logs = [(r.folder / "best.json").read_bytes() for r in runs]
    assert logs[0] == logs[1]
    assert all((runs[0].columns.metrics[m] == runs[1].columns.metrics[m]).all() for m in runs[0].columns.metrics)


def test_the_summary_says_which_widths_were_chosen(dataset, tmp_path):
    from bitfront.report import remarks

    run = bf.search(configured(JOINT, TRAIN, project_dir=str(tmp_path)), data=dataset)
    lines = remarks.summary(run)
    assert any("what they chose, bits of data_in/weight/bias in integer and widths:" in line for line in lines)
    number = run.front[0].number
    label, width = run.space.layer_widths(np.array(run.front[0].code))["seq_blocks_4"]
    (line,) = [line for line in lines if line.startswith(f"  {number}: ")]
    assert line.startswith(f"  {number}: seq_blocks_4 {label} ({width}), seq_blocks_2 8/")


def test_latency_is_measured_per_widths(dataset):
    """What a time is remembered by includes the shapes: a network twice as wide is another one."""
    runner = "[search.strategy.sw_runner.latency]\nseconds = 0.01\n"
    plan = plan_of(dataset, WIDTHS.replace("[0.5, 1, 4]", "[1, 64]"), runner)
    codes = everything(plan)
    latency = plan.evaluator.evaluate(codes).values["latency"]
    assert len(set(latency)) == len(codes)
    np.testing.assert_array_equal(plan.evaluator.evaluate(codes).values["latency"], latency)


def test_a_search_goes_on_where_it_stopped(dataset, tmp_path):
    class Stopping(bf.Events):
        def progress(self, progress, plan):
            if progress.done >= 3:
                raise KeyboardInterrupt

    def searched(folder, **more):
        return bf.search(configured(JOINT, TRAIN, project_dir=str(tmp_path / folder)), data=dataset, **more)

    whole = searched("whole")
    assert 3 <= len(searched("parts", events=Stopping())) < len(whole)
    assert (searched("parts").folder / "best.json").read_bytes() == (whole.folder / "best.json").read_bytes()


def test_beginning_again_throws_the_weights_of_trials_away(dataset, tmp_path):
    run = bf.search(configured(WIDTHS, TRAIN, project_dir=str(tmp_path)), data=dataset)
    stale = run.folder / "checkpoints" / "trial-5.pt"
    stale.write_bytes((run.folder / "checkpoints" / f"trial-{run.front[0].number}.pt").read_bytes())
    again = bf.search(configured(WIDTHS, TRAIN, project_dir=str(tmp_path)), data=dataset, n_trials=2, restart=True)
    before = {t.code: t.metrics for t in run.trials}
    assert [t.metrics for t in again.trials] == [before[t.code] for t in again.trials]
    assert [t.number for t in again.trials] == [0, 1]
    assert not stale.exists()


def test_a_joint_search_from_python(dataset, tmp_path):
    space = {
        "name": "joint",
        "widths": {"by": "name", "0": {"name": "both", "channel_multiplier": [1, 2]}},
        "quantize": {"linear": {"name": "integer", "weight_width": [2, 8]}},
    }
    run = bf.search(
        model=nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5)),
        data=dataset,
        space=space,
        metrics={"accuracy": "maximize", "total_bitops": "minimize", "trained_epochs": "maximize"},
        strategy="brute_force",
        project_dir=str(tmp_path),
    )
    codes = run.columns.code
    assert np.array_equal(codes, run.space.numbered(0, run.space.size))
    spelled = [t.config for t in run.trials]
    assert {c["widths"]["_0"]["config"]["channel_multiplier"] for c in spelled} == {1, 2}
    assert len({str(c) for c in spelled}) == 2 * 4
    assert set(run.front[0].config) == {"widths", "quantize"}
