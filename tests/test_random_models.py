"""Random models with hooks, extra arguments, shared and computed weights: every number of a trial is true."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import event, given, note

import bitfront as bf
from properties import max_examples
from random_models import by_hand, choices, network, plans, samples

TRIALS = 3


def score(logits, y):
    return F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).float().mean().item()


def calls_of(graph, formats):
    """(path of a module → formats of each of its calls, formats of each call of a function), in the graph's order."""
    calls, functions = {}, []
    for site in graph.sites:
        if site.op not in ("linear", "conv2d"):
            continue
        if site.path:
            calls.setdefault(site.path, []).append(formats.get(site.name, {}))
        else:
            functions.append(formats.get(site.name, {}))
    return calls, functions if graph.fx_graph is not None else None


@pytest.mark.slow
@given(plans())
@max_examples(60, shrink=False)
def test_every_number_is_that_of_the_network(tmp_path_factory, plan):
    note(plan)
    folder, data = tmp_path_factory.mktemp("run"), samples(plan)
    model = network(plan)
    x, y = data["val"]
    with torch.no_grad():
        before = model(x.clone())
    run = bf.search(
        model=model,
        data=data,
        space=choices(plan),
        metrics={"accuracy": "maximize", "loss": "minimize"},
        strategy="optuna:random",
        n_trials=TRIALS,
        project_dir=str(folder),
        project="r",
    )
    with torch.no_grad():
        assert torch.equal(model(x.clone()), before)  # the user's model is as it was
    reference = run.reference
    assert reference["loss"] == pytest.approx(score(before, y)[0], rel=1e-5)
    for number in range(len(run)):
        trial = run.trial(number)
        rebuilt = bf.transform_trial(run.folder, number, model=model, data=bf.from_splits(data))
        with torch.no_grad():
            deployed = score(rebuilt.model(x.clone()), y)
        hand = score(by_hand(network(plan), *calls_of(rebuilt.graph, rebuilt.formats), x), y)
        reported = trial.metrics["loss"], trial.metrics["accuracy"]
        note(f"trial {number}: reported {reported}, deployed {deployed}, by hand {hand}")
        for got in (deployed, hand):
            assert math.isclose(reported[0], got[0], rel_tol=1e-5, abs_tol=1e-6)
            assert np.isclose(reported[1], got[1], atol=1e-6)
    event(f"{plan['input']}, {plan['format']}")
