"""New statistics for batch norms after training: those of the quantized network, whatever the old ones were."""

import pytest
import torch
from torch import nn

from bitfront.formats.affine import Affine
from bitfront.formats.base import ACTIVATION, WEIGHT
from bitfront.graph import capture
from bitfront.transforms.observe import calibrate
from bitfront.transforms.reestimate import norms_of, reestimated

X = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A batch norm that is called, and one that is not."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.unused = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.fc(x)).relu()


def network(**statistics):
    torch.manual_seed(0)
    model = Net().eval()
    for name, value in statistics.items():
        getattr(model.norm, name).fill_(value)
    graph = capture(model, X[:2])
    forms = {"data_in": Affine.parse({"width": 4}, ACTIVATION), "weight": Affine.parse({"width": 3}, WEIGHT)}
    return graph, calibrate(graph, {"fc": forms}, X)


def test_they_are_the_means_over_batches_of_what_the_formats_give():
    graph, formats = network()
    new = reestimated(graph, formats, X, batch_size=20)
    fc, form = graph.model.fc, formats["fc"]
    outputs = [
        form["data_in"].quantize(part) @ form["weight"].quantize(fc.weight).T + fc.bias
        for part in X.split((17, 17, 16))
    ]
    assert set(new) == {"norm.running_mean", "norm.running_var"}
    torch.testing.assert_close(new["norm.running_mean"], torch.stack([h.mean(0) for h in outputs]).mean(0))
    torch.testing.assert_close(new["norm.running_var"], torch.stack([h.var(0) for h in outputs]).mean(0))


def test_the_old_statistics_do_not_matter_and_the_model_stays_as_it_is():
    first, second = network(), network(running_mean=5.0, running_var=0.1)
    before = {k: v.clone() for k, v in second[0].model.state_dict().items()}
    one, two = (reestimated(graph, formats, X, 16) for graph, formats in (first, second))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(before[k], v) for k, v in second[0].model.state_dict().items())
    assert not second[0].model.norm.training


def test_a_channel_without_a_finite_value_keeps_its_statistics():
    graph, formats = network(running_mean=5.0)
    with torch.no_grad():
        graph.model.fc.bias[2] = torch.inf
    new = reestimated(graph, formats, X, 16)
    assert new["norm.running_mean"][2] == 5.0
    assert new["norm.running_mean"].isfinite().all()
    assert new["norm.running_var"].isfinite().all()


@pytest.mark.parametrize(("module", "expected"), [(Net(), ("norm", "unused")), (nn.Sequential(nn.LayerNorm(3)), ())])
def test_which_batch_norms_have_statistics(module, expected):
    assert norms_of(module) == expected
