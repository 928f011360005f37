"""Random models with hooks, extra arguments, shared and computed weights: every number of a trial is true."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import event, given, note

import bitfront as bf
from bitfront.graph import capture
from by_hand import by_hand
from properties import max_examples
from random_models import OPERANDS, choices, hooked, network, plans, samples

TRIALS = 3


def score(logits, y):
    return F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean().item()


def calls_of(graph, formats):
    """(path of a module → formats of each of its calls, operation and formats of each call of a function), in the
    graph's order."""
    calls, functions, untraced = {}, [], {}
    for site in graph.sites:
        if site.path:
            calls.setdefault(site.path, []).append(formats.get(site.name, {}))
        elif site.op in OPERANDS:
            functions.append((site.op, formats.get(site.name, {})))
            untraced[site.caller, site.op, site.earlier_calls] = formats.get(site.name, {})
        else:
            assert site.name not in formats
    if graph.fx_graph is None:
        return calls, untraced
    return calls, None if graph.not_in_training else functions


def searched(plan, model, data, folder):
    """The run of a search over the formats of a plan."""
    graph = capture(model, data["train"][0][:2], training=plan["train"])
    space = choices(plan, [(site.name, site.op) for site in graph.sites])
    if len(space) == 1:
        return None
    runners = {"basic_evaluation": {}, **({"basic_train": {"max_epochs": 1}} if plan["train"] else {})}
    return bf.search(
        model=model,
        data=data,
        space=space,
        metrics={"accuracy": "maximize", "loss": "minimize"},
        strategy={"name": "optuna", "sw_runner": runners, "setup": {"sampler": "random", "n_jobs": plan["jobs"]}},
        n_trials=TRIALS,
        batch_size=8,
        project_dir=str(folder),
        project="r",
    )


@pytest.mark.slow
@given(plans())
@max_examples(30, suite=8, shrink=False)
def test_every_number_is_that_of_the_network(tmp_path_factory, plan):
    note(plan)
    with hooked(plan):
        check(tmp_path_factory.mktemp("run"), plan)
    event(f"{plan['input']}, {plan['format']}")


def trainable(plan):
    """Whether torch alone can train the network of a plan."""
    x, y = samples(plan)["train"]
    try:
        with torch.random.fork_rng():
            F.cross_entropy(network(plan).train()(x.clone()), y).backward()
    except RuntimeError:
        return False
    return True


def check(folder, plan):
    data, model = samples(plan), network(plan)
    x, y = data["val"]
    with torch.no_grad():
        before = network(plan)(x.clone())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        run = searched(plan, model, data, folder)
    except bf.BitfrontError:
        if plan["train"] and not trainable(plan):
            return
        raise
    if run is None:
        return
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert run.reference["loss"] == pytest.approx(score(before, y)[0], rel=1e-5)
    for number in range(len(run)):
        trial = run.trial(number)
        rebuilt = bf.transform_trial(run.folder, number, model=model, data=bf.from_splits(data))
        with torch.no_grad():
            deployed = score(rebuilt.model(x.clone()), y)
        calls, functions = calls_of(rebuilt.graph, rebuilt.formats)
        reported, numbers = (trial.metrics["loss"], trial.metrics["accuracy"]), [deployed]
        if not plan["train"]:
            numbers.append(score(by_hand(network(plan), calls, functions, x), y))
        note(f"trial {number}: reported {reported}, deployed and by hand {numbers}")
        for got in numbers:
            assert math.isclose(reported[0], got[0], rel_tol=1e-5, abs_tol=1e-6), f"{reported} {numbers}"
            assert np.isclose(reported[1], got[1], atol=1e-6), f"{reported} {numbers}"
