"""What options alone do to margins: against whole models with one quantized site, run by torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import nn

from bitfront.engine.evaluation import margins as of_margins
from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.engine.evaluation.interface import EvaluationJob
from bitfront.engine.evaluation.margins import evaluations, margins
from bitfront.engine.evaluation.sensitivity import sensitivities
from bitfront.engine.search.knowledge import noise_and_margins
from bitfront.engine.storage.store import Store
from bitfront.metrics.configured import configured_runner
from bitfront.transforms.quantize import quantize

CHOICES = {"name": ["affine"], "weight_width": [2, 4, 8], "data_in_width": [4, 8]}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    return nn.Sequential(*layers).eval()


def evaluator_of(model: nn.Module, samples: int = 300, choices: dict[str, object] | None = None) -> FixedEvaluator:
    x = torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    y[::7] = (y[::7] + 1) % 5  # some of its answers are wrong
    table = dict.fromkeys(("conv2d", "linear"), choices or CHOICES)
    runners = (configured_runner("basic_evaluation"),)
    return FixedEvaluator(
        EvaluationJob(
            model, x[:2], "graph/quantize/mixed_precision_ptq", "type", table, runners, {"val": (x, y)}, x[:64]
        )
    )


def margins_by_hand(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """By how much the best other class is above the label, shape (samples,)."""
    others = logits.clone()
    others[torch.arange(len(labels)), labels] = -torch.inf
    return others.max(dim=1).values - logits[torch.arange(len(labels)), labels]


def test_they_are_those_of_models_with_one_quantized_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_margins, "CLASSES", 4)  # all others
    evaluator = evaluator_of(network())
    found = margins(evaluator, sensitivities(evaluator))
    assert found is not None
    assert found.base.shape == (4, 300)
    x, y = evaluator.samples("val", None)
    graph = evaluator.space.graph
    with torch.no_grad():
        of_float = margins_by_hand(graph.model(x), y)
        assert_allclose(np.sort(found.base.max(axis=0)), np.sort(of_float.numpy()), rtol=1e-5)
        for effects, site, options in zip(found.effects, graph.sites, evaluator.option_formats(), strict=True):
            assert len(effects) == len(options)
            for effect, formats in zip(effects, options, strict=True):
                model = quantize(graph, {site.name: formats}) if formats else graph.model
                expected = margins_by_hand(model(x), y)
                # Samples are in another order: their margins in float say which is which.
                order, here = torch.argsort(of_float).numpy(), np.argsort(found.base.max(axis=0))
                assert_allclose((found.base + effect).max(axis=0)[here], expected.numpy()[order], rtol=1e-3, atol=1e-4)


def test_few_samples_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_margins, "MOST", 100)
    evaluator = evaluator_of(network())
    found = margins(evaluator, sensitivities(evaluator))
    assert found is not None
    assert found.base.shape[1] == 100
    assert found.weights.sum() == pytest.approx(1.0, rel=1e-5)
    nearest = found.weights == found.weights.min()
    assert nearest.sum() == 75
    of_float = margins_by_hand(
        evaluator.space.graph.model(evaluator.samples("val", None)[0]).detach(), evaluator.samples("val", None)[1]
    )
    assert_allclose(
        np.sort(np.abs(found.base.max(axis=0)[nearest])), of_float.abs().sort().values[:75].numpy(), rtol=1e-5
    )


def test_none_where_there_is_nothing_to_choose_or_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    one = evaluator_of(network(), choices={"name": ["affine"], "weight_width": [4], "data_in_width": [8]})
    assert margins(one, sensitivities(one)) is None
    assert evaluations(one, sensitivities(one)) == 0
    evaluator = evaluator_of(network())
    noise = sensitivities(evaluator)
    assert margins(evaluator, noise) is not None
    # Half a dozen options at each of two sites, on all samples, with half of the network for each.
    assert evaluations(evaluator, noise) == pytest.approx(6, abs=1)
    monkeypatch.setattr(of_margins, "EVALUATIONS", 1)  # a hundred samples for a dozen options
    assert margins(evaluator, noise) is None
    assert evaluations(evaluator, noise) == 0


def test_they_are_measured_once_and_not_for_trials_without_them(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = evaluator_of(network())
    parameters = len(evaluator.space.parameters)
    stores = [
        Store.open(tmp_path / f"{i}.sqlite", evaluator.metrics, parameters, {}, evaluator.space.keys) for i in (0, 1)
    ]
    said: list[float] = []
    noise, first = noise_and_margins(evaluator, stores[0], replays=False, begins=said.append)
    assert noise is not None
    assert first is not None
    assert noise_and_margins(evaluator, stores[1], replays=True, begins=said.append)[1] is None
    monkeypatch.setattr(of_margins, "margins", None)  # nothing is measured from now on
    monkeypatch.setattr("bitfront.engine.search.knowledge.margins", None)
    again = noise_and_margins(evaluator, stores[0], replays=True, begins=said.append)[1]
    assert said == [evaluations(evaluator, noise)]
    assert again is not None
    np.testing.assert_array_equal(again.base, first.base)
    assert noise_and_margins(evaluator, stores[1], replays=False)[1] is None
    for store in stores:
        store.close()


def test_outputs_of_many_classes_are_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = evaluator_of(network())
    noise = sensitivities(evaluator)
    whole = margins(evaluator, noise)
    monkeypatch.setattr(of_margins, "TOGETHER", 300 * 5 * 3)  # three options at a time
    parts = margins(evaluator, noise)
    assert whole is not None
    assert parts is not None
    np.testing.assert_array_equal(parts.base, whole.base)
    for one, other in zip(parts.effects, whole.effects, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_search_goes_on_where_they_fail(tmp_path) -> None:
    evaluator = evaluator_of(network())
    y = evaluator.samples("val", None)[1]
    y[5] = 7  # of five classes
    store = Store.open(
        tmp_path / "1.sqlite", evaluator.metrics, len(evaluator.space.parameters), {}, evaluator.space.keys
    )
    noise, found = noise_and_margins(evaluator, store, replays=False)
    assert noise is not None
    assert found is None
    assert "a label is 7, and there are 5 outputs" in store.meta("margins")["failed"]
    store.close()
