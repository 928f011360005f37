"""An explanation, every number of it worked out again from the trials by other code.

The truth is known: all candidates of a small network on the digits were evaluated. A surrogate's run of the same network
has some of them, so that what it predicts can be compared.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest

import bitfront as bf
from bitfront.engine.explanation.model import Trials, fitted_model
from bitfront.engine.explanation.results import Estimate
from bitfront.engine.storage.records import OptionCosts
from bitfront.errors import ConfigError, RunError
from bitfront.report.explanation import sections
from bitfront.spaces.described import LEARNED_BITS, DescribedSpace
from synthetic_runs import choice, site, write

FILE = """
model = "digits-mlp"
dataset = "digits"
project = "{project}"
project_dir = "{folder}"
max_epochs = 20

[search.search_space.setup]
by = "type"

[search.search_space.seed.linear.config]
name = ["affine"]
weight_width = [2, 3, 4, 8]
data_in_width = [2, 4, 8]

[search.strategy]
{strategy}

[search.strategy.sw_runner.basic_evaluation]
[search.strategy.hw_runner.model_size]
[search.strategy.hw_runner.bops]

[search.strategy.metrics]
accuracy = {{ direction = "maximize" }}
model_size = {{ direction = "minimize" }}
"""


def searched(folder, project, strategy):
    path = folder / f"{project}.toml"
    path.write_text(FILE.format(project=project, folder=folder, strategy=strategy))
    return bf.search(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("explained")


@pytest.fixture(scope="module")
def truth(folder):
    """All 144 candidates."""
    return searched(folder, "all", 'name = "brute_force"')


@pytest.fixture(scope="module")
def some(folder, truth):
    """45 of them."""
    return searched(folder, "some", 'name = "surrogate"\nsetup = { n_trials = 45 }')


@pytest.fixture(scope="module")
def explained(truth):
    return truth.explain()


@pytest.fixture(scope="module")
def some_explained(some):
    return some.explain()


def by_config(run):
    """The choices of each trial, place → bits, as its config spells them → its metrics."""
    return {
        tuple(
            trial.config[layer]["config"][f"{operand}_width"]
            for layer in ("fc1", "fc2")
            for operand in ("data_in", "weight")
        ): trial
        for trial in run.trials
    }


PLACES = ("fc1/data_in", "fc1/weight", "fc2/data_in", "fc2/weight")
WIDTHS = ((2, 4, 8), (2, 3, 4, 8)) * 2


def changed(config, place, bits):
    at = PLACES.index(place)
    return (*config[:at], bits, *config[at + 1 :])


def number_of(option):
    return int(option.split()[0])


# -- layers


def test_costs_of_options_are_differences_of_trials(truth, explained):
    trials = by_config(truth)
    assert explained.costs == ("model_size",)
    assert [p.place for p in explained.effects] == list(PLACES)
    for place, widths in zip(explained.effects, WIDTHS, strict=True):
        assert [number_of(o.option) for o in place.options] == list(widths)
        for config, trial in trials.items():
            first = trials[changed(config, place.place, widths[0])]
            other = next(o for o in place.options if number_of(o.option) == config[PLACES.index(place.place)])
            assert other.costs["model_size"] == trial.metrics["model_size"] - first.metrics["model_size"]


@pytest.mark.parametrize("which", ["truth", "some"])
def test_a_search_stores_what_options_cost(which, request):
    run = request.getfixturevalue(which)
    assert sorted(run.option_costs) == ["bops", "model_size"]
    for name, kept in run.option_costs.items():
        assert [len(options) for options in kept.options] == [group.size for group in run.space.groups]
        for code, value in zip(run.columns.code, run.columns.metrics[name], strict=True):
            options = run.space.options(code[None])[0]
            added = sum(table[option] for table, option in zip(kept.options, options, strict=True))
            assert kept.first + added == pytest.approx(value, rel=1e-9)


def test_effects_are_those_of_the_trials_around(truth, explained):
    trials = by_config(truth)
    assert set(explained.around) <= {t.number for t in truth.front}
    around = [config for config, trial in trials.items() if trial.number in explained.around]
    true, told, inside = [], [], []
    for place in explained.effects:
        first = number_of(place.options[0].option)
        assert (place.options[0].effect.low, place.options[0].effect.high) == (0, 0)
        for option in place.options[1:]:
            bits = number_of(option.option)
            true.append(
                np.mean(
                    [
                        trials[changed(c, place.place, bits)].metrics["accuracy"]
                        - trials[changed(c, place.place, first)].metrics["accuracy"]
                        for c in around
                    ]
                )
            )
            told.append(option.effect.value)
            inside.append(option.effect.low <= true[-1] <= option.effect.high)
    assert np.abs(np.array(true) - told).max() < 0.01
    assert np.mean(inside) >= 0.8


def test_interactions_are_those_of_the_trials(truth, explained):
    trials = by_config(truth)
    (pair,) = explained.interactions
    assert pair.layers == ("fc1", "fc2")

    def accuracy(first, second):
        # A model_size of 2 or 8 bits, whatever the width of the inputs.
        return trials[2, 2 if first else 8, 2, 2 if second else 8].metrics["accuracy"]

    expected = accuracy(True, True) - accuracy(True, False) - accuracy(False, True) + accuracy(False, False)
    wide = pair.excess.high - pair.excess.low
    assert 0 < wide < 0.1
    assert pair.excess.low - wide / 2 <= expected <= pair.excess.high + wide / 2


@pytest.mark.parametrize("which", ["truth", "some"])
def test_alternatives_are_all_others_and_measured_where_they_were(which, request, truth):
    run = request.getfixturevalue(which)
    true, known = by_config(truth), by_config(run)
    number = run.front[len(run.front) // 2].number
    explained = run.explain(number)
    config = next(c for c, t in known.items() if t.number == number)
    here = known[config].metrics
    predicted = 0
    for place, widths in zip(explained.alternatives, WIDTHS, strict=True):
        assert number_of(place.option) == config[PLACES.index(place.place)]
        assert {number_of(a.option) for a in place.alternatives} == {*widths} - {number_of(place.option)}
        for other in place.alternatives:
            there = changed(config, place.place, number_of(other.option))
            assert other.costs["model_size"] == true[there].metrics["model_size"] - here["model_size"]
            assert other.difference == other.value.value - here["accuracy"]
            if there in known:
                accuracy = known[there].metrics["accuracy"]
                assert other.value == Estimate(accuracy, accuracy, accuracy, known[there].number)
            else:
                predicted += 1
                assert other.value.word == "predicted"
                assert other.value.low < other.value.value < other.value.high
                assert abs(other.value.value - true[there].metrics["accuracy"]) < 0.12
    assert (predicted > 0) == (which == "some")


# -- budgets


def test_prices_are_the_slopes_of_the_front(truth, explained):
    """From the cheapest on, a step goes where a unit of cost buys most."""
    (prices,) = explained.prices
    assert prices.exact
    points = {(t.metrics["model_size"], t.metrics["accuracy"]) for t in truth.trials}
    cost = min(c for c, _ in points)
    value = max(v for c, v in points if c == cost)
    for step in prices.steps:
        assert (step.cost, step.value.value) == (cost, value)
        assert prices.price(step.cost) == prices.price(step.cost + 1) == step.price
        slopes = {((v - value) / (c - cost), c, v) for c, v in points if c > cost and v > value}
        if not slopes:
            assert step.price == 0
            assert not step.changes
            break
        best = max(slopes)[0]
        assert step.price == pytest.approx(best)
        _, cost, value = max((s for s in slopes if s[0] == pytest.approx(best)), key=lambda s: s[1])
    else:
        pytest.fail("there are better trials than the last step")


def test_changes_of_a_step_lead_to_the_next_one(truth, explained):
    trials = by_config(truth)
    (prices,) = explained.prices
    for step, after in itertools.pairwise(prices.steps):
        config = next(c for c, t in trials.items() if t.number == step.value.trial)
        for place, (before, now) in step.changes.items():
            assert number_of(before) == config[PLACES.index(place)]
            config = changed(config, place, number_of(now))
        assert trials[config].number == after.value.trial


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "budgets",
    [
        ["model_size <= 1.2 kB"],
        ["model_size <= 1.2 kB", "bops <= 200_000"],
        ["bops <= 90_000"],
    ],
)
def test_with_all_trials_an_answer_is_the_best_of_them(truth, budgets, explained):
    answer = explained.answer(*budgets)
    best = truth.best(*budgets)
    assert answer.value.value == best.metrics["accuracy"]
    assert answer.costs["model_size"] == truth.trial(answer.value.trial).metrics["model_size"]
    assert answer.config == truth.trial(answer.value.trial).config
    assert answer.optimised == "accuracy"


def test_a_budget_on_accuracy_asks_for_the_least_cost(truth, explained):
    middle = sorted(t.metrics["accuracy"] for t in truth.front)[len(truth.front) // 2]
    answer = explained.answer(f"accuracy >= {middle}")
    best = truth.best(f"accuracy >= {middle}", minimize="model_size")
    assert (answer.optimised, answer.value.trial) == ("model_size", best.number)


def test_verifying_gives_what_the_search_would_have_measured(some, truth):
    known, true = by_config(some), by_config(truth)
    explained = bf.explain(some)
    bounds = itertools.product(np.linspace(1000, 2700, 25), np.linspace(30_000, 200_000, 25))
    pairs = ([f"model_size <= {size:.0f}", f"bops <= {bops:.0f}"] for size, bops in bounds)
    budgets = next(pair for pair in pairs if _predicted(explained, pair))
    answer = explained.answer(*budgets)
    assert answer.verified == {}
    (verified,) = bf.explain(some, budgets=budgets, verify=True).answers
    config = tuple(
        verified.config[layer]["config"][f"{operand}_width"]
        for layer in ("fc1", "fc2")
        for operand in ("data_in", "weight")
    )
    assert config not in known
    assert verified.verified == true[config].metrics
    assert verified.costs["model_size"] == true[config].metrics["model_size"]


def _predicted(explained, budgets):
    try:
        return explained.answer(*budgets).value.trial is None
    except RunError:
        return False


# -- the gap


def test_nothing_is_missing_when_all_were_evaluated(truth, explained):
    gap = explained.gap
    assert gap.proven
    assert (gap.evaluated, gap.failed, gap.candidates, gap.looked_at) == (144, 0, 144, 0)
    assert (gap.expected, gap.possible, gap.at) == (0, 0, None)
    assert gap.best.value == max(t.metrics["accuracy"] for t in truth.trials)


def test_the_gap_is_what_is_expected_beyond_the_trials(some, truth, some_explained):
    """At the candidate that the gap names, and against the trials that cost no more."""
    gap = some_explained.gap
    assert not gap.proven
    assert gap.evaluated == 45
    assert gap.best.value == max(t.metrics["accuracy"] for t in some.trials)
    assert 0 <= gap.expected <= gap.possible
    if gap.at is not None:
        known = by_config(some)
        assert gap.at.value.trial is None
        cheaper = [
            t.metrics["accuracy"] for t in known.values() if t.metrics["model_size"] <= gap.at.costs["model_size"]
        ]
        if gap.expected > 0:
            assert gap.expected == pytest.approx(gap.at.value.value - max(cheaper))
    # What is really missing at any cost within the focus is no more than what is said to be possible.
    floor = some.reference["accuracy"] - gap.focus / 100 if gap.focus else 0.0
    for trial in truth.trials:
        size, accuracy = trial.metrics["model_size"], trial.metrics["accuracy"]
        verified = [t.metrics["accuracy"] for t in some.trials if t.metrics["model_size"] <= size]
        if verified and accuracy >= floor:
            assert accuracy - max(verified) <= gap.possible + 0.02


def test_how_predictions_held_is_measured_on_trials_that_the_model_did_not_see(some, some_explained):
    held = some_explained.gap.held
    assert (held.fitted, held.predicted) == (30, 15)
    first = replace(some, columns=_first(some.columns, 30))
    results, predicted, inside = [], [], []
    for trial in some.trials[30:]:
        estimate = _estimate(first, trial.code)
        results.append(trial.metrics["accuracy"])
        predicted.append(estimate.value)
        inside.append(estimate.low <= trial.metrics["accuracy"] <= estimate.high)
    assert held.inside == pytest.approx(np.mean(inside))
    ranks = [_ranks(np.array(v)) for v in (results, predicted)]
    assert held.correlation == pytest.approx(np.corrcoef(*ranks)[0, 1])


def _ranks(values):
    """Ranks, equal values with the mean of theirs."""
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


def _first(columns, count):
    return replace(
        columns,
        number=columns.number[:count],
        packed=columns.packed[:count],
        metrics={m: v[:count] for m, v in columns.metrics.items()},
        complete=columns.complete[:count],
        duration=columns.duration[:count],
    )


def _model(run):
    trials = Trials.of(run, "accuracy", -1.0)
    return fitted_model(run, "accuracy", -1.0, trials, np.arange(len(run)), run.columns.metrics["model_size"])


def _estimate(run, code):
    """What the trials of a run predict of one candidate."""
    return _model(run).estimates(run.space.options(np.array([code])))[0]


def _chance(run, code, least, most):
    """How likely the result of one candidate is from `least` to `most`, as the trials of a run predict."""
    return _model(run).chance(run.space.options(np.array([code]))[0], least, most)


# -- runs of any shape

TWELVE = tuple(site(f"fc{i}", choice("weight", 2, 3, 4, 8)) for i in range(12))
BITS = np.array([2, 3, 4, 8])


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """(130 trials of a space of 4¹² candidates in which everything adds up, what an option loses and costs)."""
    rng = np.random.default_rng(3)
    lost = rng.uniform(0.005, 0.05, (12, 1)) * np.array([1.0, 0.45, 0.15, 0.0])
    cost = rng.integers(5, 60, (12, 1)) * BITS
    codes = np.concatenate([np.arange(4)[:, None].repeat(12, axis=1), rng.integers(0, 4, (126, 12))])
    run = write(
        tmp_path_factory.mktemp("large") / "run",
        codes,
        {
            "accuracy": 0.95 - lost[np.arange(12), codes].sum(axis=1),
            "model_size": 100 + cost[np.arange(12), codes].sum(axis=1),
        },
        space=TWELVE,
        objectives=(("accuracy", "maximize"), ("model_size", "minimize")),
        stopped="n_trials reached",
    )
    return run, lost, cost


def best_accuracy(lost, cost, bound):
    """The best of all candidates under a bound on the cost, by dynamic programming over whole costs."""
    least = {0: 0.0}
    for losses, costs in zip(lost, cost, strict=True):
        after = {}
        for (total, loss), (more, added) in itertools.product(least.items(), zip(costs, losses, strict=True)):
            if total + more <= bound - 100:
                after[total + more] = min(loss + added, after.get(total + more, np.inf))
        least = after
    return 0.95 - min(least.values())


def test_costs_of_a_run_without_stored_ones_follow_from_its_trials(large):
    run, _, cost = large
    assert run.option_costs == {}
    explained = run.explain()
    assert explained.costs == ("model_size",)
    for place, costs in zip(explained.effects, cost, strict=True):
        assert [o.costs["model_size"] for o in place.options] == pytest.approx(costs - costs[0])


def test_answers_in_a_large_space_are_the_best_where_everything_adds_up(large):
    run, lost, cost = large
    explained = run.explain()
    for bound in (1200, 1500, 1900, 2500):
        answer = explained.answer(f"model_size <= {bound} B")
        rows = np.arange(12), np.array(answer.code)
        assert answer.costs["model_size"] == pytest.approx(100 + cost[rows].sum())
        assert answer.costs["model_size"] <= bound
        assert not answer.exact
        assert 0.95 - lost[rows].sum() >= best_accuracy(lost, cost, bound) - 0.002
        assert answer.value.value == pytest.approx(0.95 - lost[rows].sum(), abs=0.004)
    assert explained.gap.held.correlation > 0.99
    assert explained.gap.held.how == "the last third of the trials, from those before them"
    assert explained.gap.expected > 0.01


def test_the_chance_to_keep_a_budget_is_that_of_the_interval(large):
    """What was not evaluated is within its own 90 % interval with 90 %, and at least in the middle of it with 50 %."""
    run, _, _ = large
    explained = run.explain()
    for bound in (0.8, 0.85, 0.9):
        budget = f"accuracy >= {bound}"
        answer = explained.answer(budget)
        value = answer.value
        assert (answer.optimised, value.trial) == ("model_size", None)
        assert _chance(run, answer.code, value.low, value.high) == pytest.approx(0.9, abs=0.001)
        assert _chance(run, answer.code, value.value, np.inf) == pytest.approx(0.5)
        assert 0.5 <= answer.chance == pytest.approx(_chance(run, answer.code, bound, np.inf))
        lines = [line for section in sections(run.explain(budgets=[budget])) for line in section.sentences]
        said = (
            f"It was not evaluated; --verify does that. The chance that it keeps this is {100 * answer.chance:.0f} %."
        )
        assert said in lines
    assert explained.answer("model_size <= 1500 B").chance is None
    measured = explained.answer(f"accuracy >= {max(trial.metrics['accuracy'] for trial in run.trials)}")
    assert measured.value.trial is not None
    assert measured.chance is None


def test_interactions_that_are_there_are_named(large, tmp_path):
    """Where everything adds up there is none; where two layers do not, it is theirs."""
    run, _, _ = large
    assert all(abs(i.excess.value) < 0.003 for i in run.explain().interactions)
    codes = run.columns.code
    together = 0.2 * (1 - codes[:, 3] / 3) * (1 - codes[:, 7] / 3)
    metrics = {**run.columns.metrics, "accuracy": run.columns.metrics["accuracy"] - together}
    objectives = (("accuracy", "maximize"), ("model_size", "minimize"))
    pair = write(tmp_path / "run", codes, metrics, space=TWELVE, objectives=objectives).explain().interactions[0]
    assert pair.layers == ("fc3", "fc7")
    assert pair.options == ("weight 2 bits", "weight 2 bits")
    assert pair.excess.value == pytest.approx(-0.2, abs=0.05)


def test_a_cost_that_does_not_add_up_is_left_out(large):
    run, _, _ = large
    wrong = replace(run, option_costs={"model_size": OptionCosts(100.0, ((0.0, 1.0, 2.0, 3.0),) * 12)})
    explained = wrong.explain()
    assert explained.costs == ()
    assert explained.prices == ()
    assert explained.notes == ("model_size of the trials is not the sum of what their options cost, so it is left out",)
    assert all(o.costs == {} for place in explained.effects for o in place.options)


def test_a_layer_with_several_formats_is_one_place(tmp_path):
    space = (site("fc1", choice("weight", 2, 4), optional=True), site("fc2", choice("weight", 2, 3, 4, 8)))
    codes = np.array([[*a, b] for a in ([0, 0], [1, 0], [1, 1]) for b in range(4)])
    bits = np.array([32, 2, 4])[codes[:, 0] + codes[:, 1]], BITS[codes[:, 2]]
    values = {"accuracy": 0.9 - 0.5 / bits[0] - 0.3 / bits[1], "model_size": bits[0] + 2 * bits[1]}
    objectives = (("accuracy", "maximize"), ("model_size", "minimize"))
    run = write(tmp_path / "twelve", codes, values, space=space, objectives=objectives)
    explained = run.explain(5)
    first = explained.effects[0]
    assert first.place == "fc1"
    assert [o.option for o in first.options] == ["integer, weight 2 bits", "integer, weight 4 bits", "float"]
    assert [o.costs["model_size"] for o in first.options] == pytest.approx([0, 2, 30])
    assert explained.alternatives[0].option == "integer, weight 2 bits"
    assert [(a.option, a.value.trial) for a in explained.alternatives[0].alternatives] == [
        ("integer, weight 4 bits", 9),
        ("float", 1),
    ]
    few = write(tmp_path / "nine", codes[:9], {m: v[:9] for m, v in values.items()}, space=space, objectives=objectives)
    with pytest.raises(RunError, match="it has 9 complete trials with accuracy, and an explanation needs 10"):
        few.explain()


def grid_run(folder, accuracy=None, **options):
    """All 27 candidates of three layers; the size is that of the weights."""
    space = tuple(site(f"fc{i}", choice("weight", 2, 4, 8)) for i in range(3))
    codes = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    bits = BITS[[0, 2, 3]][codes]
    accuracy = 0.9 - 0.1 * (bits == 2).sum(axis=1) - 0.01 * (bits == 4).sum(axis=1) if accuracy is None else accuracy
    options = {"objectives": (("accuracy", "maximize"), ("model_size", "minimize")), **options}
    return write(folder / "grid", codes, {"accuracy": accuracy, "model_size": bits.sum(axis=1)}, space=space, **options)


def test_failed_trials_are_left_out(tmp_path):
    errors = [""] * 27
    errors[5] = "it is broken"
    accuracy = np.linspace(0.5, 0.9, 27)
    accuracy[5] = np.nan
    run = grid_run(tmp_path, accuracy, errors=errors)
    explained = run.explain(4)
    assert (explained.gap.evaluated, explained.gap.failed) == (26, 1)
    known = {a.value.trial for place in explained.alternatives for a in place.alternatives}
    assert 5 not in known
    assert None in known
    with pytest.raises(RunError, match="trial 5 failed, so there is no result to explain: it is broken"):
        run.explain(5)


@pytest.mark.parametrize(
    ("options", "costs"),
    [
        ({"objectives": (("accuracy", "maximize"),)}, ("model_size",)),
        ({"summed": "maximize"}, ("model_size",)),
        (
            {"constraints": [{"text": "x", "metric": "model_size", "comparison": "<=", "bound": 12.0}]},
            ("model_size",),
        ),
    ],
)
def test_other_searches_are_explained_too(tmp_path, options, costs):
    run = grid_run(tmp_path, **options)
    explained = run.explain(13)
    assert explained.costs == costs
    assert explained.metric == "accuracy"
    best = max(
        (t for t in run.trials if t.metrics["model_size"] <= 12 or "constraints" not in options),
        key=lambda t: t.metrics["accuracy"],
    )
    assert explained.gap.best.value == best.metrics["accuracy"]
    answer = explained.answer("model_size <= 10")
    assert answer.value.value == run.best("model_size <= 10", maximize="accuracy").metrics["accuracy"]


def test_what_cannot_be_explained_is_refused(tmp_path):
    run = grid_run(tmp_path)
    learned = DescribedSpace([{"site": LEARNED_BITS, "alternatives": [{"name": LEARNED_BITS, "operands": []}]}])
    with pytest.raises(RunError, match="one training with learned bits"):
        replace(run, space=learned).explain()
    with pytest.raises(RunError, match="all objectives are known in closed form"):
        replace(run, objectives=replace(run.objectives, parts=run.objectives.parts[1:])).explain()
    with pytest.raises(ConfigError, match="'loss' is no metric that can be explained here"):
        run.explain(metric="loss")
    with pytest.raises(ConfigError, match="verify evaluates the answer for budgets"):
        bf.explain(run, verify=True)
    with pytest.raises(
        RunError, match=r"no candidate of the space fulfils 'model_size <= 5': its model_size is 6 to 24"
    ):
        run.explain(budgets=["model_size <= 5"])
    with pytest.raises(RunError, match=r"no candidate is expected to fulfil 'accuracy >= 0\.95'; the best accuracy"):
        run.explain(budgets=["accuracy >= 0.95"])
    with pytest.raises(RunError, match="there is no trial 99"):
        run.explain(99)
    with pytest.raises(RunError, match="accuracy is the same for all trials"):
        grid_run(tmp_path / "same", np.full(27, 0.5)).explain()


# -- the page


def test_the_page_has_the_explanation(truth, tmp_path, explained):
    page = bf.write_report(truth, tmp_path).page.read_text(encoding="utf-8")
    assert "Proven: every candidate of the space was evaluated, so the front is complete." in page
    for place in explained.effects:
        assert page.count(f">{place.place}<") >= len(place.options)


def test_the_page_says_why_there_is_no_explanation(tmp_path):
    accuracy = np.full(27, 0.5)
    page = bf.write_report(grid_run(tmp_path, accuracy), tmp_path / "out").page.read_text(encoding="utf-8")
    assert "There is no explanation: accuracy is the same for all trials, so there is nothing to explain." in page


def test_differences_of_a_loss_are_lower_or_higher(tmp_path):
    """A loss is no share, and less of it is better."""
    bits = BITS[[0, 2, 3]]
    loss = [1 / bits[a] + 2 / bits[b] + 3 / bits[c] for a, b, c in itertools.product(range(3), repeat=3)]
    space = tuple(site(f"fc{i}", choice("weight", 2, 4, 8)) for i in range(3))
    codes = np.array(list(itertools.product(range(3), repeat=3)))
    run = write(
        tmp_path / "run",
        codes,
        {"loss": loss, "model_size": bits[codes].sum(axis=1)},
        space=space,
        objectives=(("loss", "minimize"), ("model_size", "minimize")),
    )
    told = next(s for s in sections(run.explain(13)) if s.title == "Why trial 13 has its options")
    assert told.sentences[0] == (
        "fc0/weight has 4 bits: 2 bits would save 2 B and raise loss by 0.25 nats (measured, trial 4); "
        "8 bits would cost 4 B and lower loss by 0.125 nats (measured, trial 22)."
    )
    assert told.sentences[-1] == (
        "The best next step from here is fc2/weight to 8 bits: 4 B more for -0.375 nats (measured)."
    )
