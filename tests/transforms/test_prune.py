"""Pruning: exactly the share that is wanted, the smallest first, and what shares memory."""

import pytest
import torch
from torch import nn

from bitfront.graph import capture
from bitfront.transforms.prune import pruned


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize(("sparsity", "zeros"), [(0.0, 0), (0.3, 4), (0.5, 8), (0.99, 15)])
def test_tied_weights_are_pruned_once_and_stay_tied(sparsity, zeros):
    torch.manual_seed(0)
    model = Tied()
    graph = capture(model, torch.zeros(2, 4))
    result = pruned(graph, sparsity, "local")
    weight = result.graph.model.a.weight
    assert weight is result.graph.model.b.weight
    assert (weight == 0).sum() == zeros
    assert set(result.layers) == {"a", "b"}
    assert torch.equal(graph.model.a.weight, model.a.weight), "the captured model is not changed"


def test_of_equal_weights_the_first_go():
    model = nn.Linear(3, 2, bias=False)
    nn.init.constant_(model.weight, -0.5)
    wrapped = nn.Sequential(model)
    result = pruned(capture(wrapped, torch.zeros(2, 3)), 0.5, "global")
    assert result.graph.model[0].weight.tolist() == [[0, 0, 0], [-0.5, -0.5, -0.5]]
