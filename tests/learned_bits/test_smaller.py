"""Networks without the channels that do nothing: equal to the larger ones to the bit, and as small as they can be."""

import numpy as np
import pytest
import torch
from test_layers import NETWORKS, Depthwise, Normed, Residual, clusters, model_of
from torch import nn

from bitfront.errors import RunError
from bitfront.formats import FORMATS
from bitfront.formats.base import WEIGHT
from bitfront.formats.fixed_map import FixedMap
from bitfront.graph import capture
from bitfront.learned_bits.smaller import compared, without_idle_channels
from bitfront.transforms import quantize
from bitfront.transforms.fold import folded


def bits_of(values, signed, width=6, point=4, samples=False):
    widths = np.full(values, width, dtype=np.int8)
    return FixedMap.of(widths, 0 * widths + np.int8(point), signed=signed, samples=samples)


def learned(model, shape, change=lambda model: None, point=4):
    """(a captured model whose parameters are on grids, the formats), after a change of the parameters."""
    graph = folded(capture(model, torch.randn(4, *shape, generator=torch.Generator().manual_seed(1)))).graph
    change(graph.model)
    formats = {}
    for site in graph.sites:
        if site.weight_shape:
            module = graph.model.get_submodule(site.path)
            formats[site.name] = {"data_in": bits_of(site.inputs[0], True, samples=True)}
            for name, parameter in module.named_parameters():
                form = bits_of(tuple(parameter.shape), True, 8, point)
                formats[site.name][name] = form
                with torch.no_grad():
                    parameter.copy_(form.round(parameter))
    return graph, formats


def smaller(graph, formats, shape):
    x, _ = clusters(shape, 500)
    result = without_idle_channels(graph, formats, x)
    assert compared(result, quantize(graph, formats, bake=True), {"x": x}).samples == 500
    return result


def shapes(result):
    return {path: now for path, (_, now) in result.layers.items()}


class Chain(nn.Sequential):
    shape = (6,)

    def __init__(self, bias=True):
        super().__init__(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7, bias), nn.ReLU(), nn.Linear(7, 3))


def chain(**settings):
    torch.manual_seed(0)
    return Chain(**settings)


def test_what_nobody_reads_leaves_and_what_it_read_too():
    def change(model):
        model[4].weight.data[:, [1, 5]] = 0
        model[2].weight.data[:, 3] = 0
        model[2].weight.data[[0, 2, 3, 4, 6], 6] = 0  # only the two that leave read it

    result = smaller(*learned(chain(), (6,), change), (6,))
    assert shapes(result) == {"0": (6, 6), "2": (5, 6), "4": (3, 5)}
    assert result.stays == ()
    assert [layer.weight.shape for layer in result.model if isinstance(layer, nn.Linear)] == [(6, 6), (5, 6), (3, 5)]


def test_constants_go_into_the_next_bias():
    def change(model):
        model[0].weight.data[[2, 4]] = 0
        model[0].bias.data[[2, 4]] = torch.tensor([1.0, -1.0])  # 1 after the ReLU, and 0

    graph, formats = learned(chain(), (6,), change)
    result = smaller(graph, formats, (6,))
    assert shapes(result) == {"0": (6, 6), "2": (7, 6), "4": (3, 7)}
    before, now = graph.model[2], result.model[2]
    assert torch.equal(now.bias, before.bias + before.weight[:, 2])


def test_a_bias_gets_the_bits_that_a_constant_needs():
    def change(model):
        model[0].weight.data[2], model[0].bias.data[2] = 0, 1 / 16

    graph, formats = learned(chain(), (6,), change)
    result = smaller(graph, formats, (6,))
    assert shapes(result)["0"] == (7, 6)
    assert torch.equal(result.model[2].bias, graph.model[2].bias + graph.model[2].weight[:, 2] / 16)
    assert result.formats["_2"]["bias"].points.max() == 8


def test_without_a_bias_a_constant_stays_and_is_named():
    def change(model):
        model[0].weight.data[[2, 4]] = 0
        model[0].bias.data[[2, 4]] = torch.tensor([1.0, -1.0])

    result = smaller(*learned(chain(bias=False), (6,), change), (6,))
    assert shapes(result)["0"] == (7, 6)
    assert len(result.stays) == 1
    assert "_2 has no bias" in result.stays[0]


def test_a_constant_that_would_change_a_bit_stays():
    """The sums of the layer then need more than 24 bits."""

    def change(model):
        model[0].weight.data[2], model[0].bias.data[2] = 0, 1.0

    graph, formats = learned(chain(), (6,), change)
    wide = np.full((8,), 23, dtype=np.int8)
    formats["_2"]["data_in"] = FixedMap.of(wide, wide - np.int8(4), signed=True, samples=True)
    result = smaller(graph, formats, (6,))
    assert shapes(result)["0"] == (8, 6)
    assert "more than the 24 bits" in result.stays[0]


def test_one_channel_stays_where_all_do_nothing():
    def change(model):
        for layer in (0, 2, 4):
            model[layer].weight.data[:] = 0

    result = smaller(*learned(chain(), (6,), change), (6,))
    assert shapes(result) == {"0": (1, 6), "2": (1, 1), "4": (3, 1)}
    assert all("a layer needs one" in note for note in result.stays)


def test_an_input_without_bits_is_not_read():
    graph, formats = learned(chain(), (6,))
    widths = formats["_2"]["data_in"].widths.copy()
    widths[[1, 4]] = 0
    formats["_2"]["data_in"] = FixedMap.of(widths, 0 * widths, signed=True, samples=True)
    assert shapes(smaller(graph, formats, (6,))) == {"0": (6, 6), "2": (7, 6), "4": (3, 7)}
    none = 0 * formats["_4"]["data_in"].widths
    formats["_4"]["data_in"] = FixedMap.of(none, none, signed=True, samples=True)
    assert shapes(smaller(graph, formats, (6,))) == {"0": (6, 6), "2": (1, 6), "4": (3, 1)}


def test_channels_beside_padding():
    """A constant that padding makes another number at the border stays; one of 0 leaves."""

    def change(model):
        model.conv1.weight.data[[1, 3]] = 0
        model.conv1.bias.data[[1, 3]] = torch.tensor([1.0, -1.0])

    result = smaller(*learned(model_of(Residual), Residual.shape, change), Residual.shape)
    assert shapes(result)["conv1"] == (5, 6, 3, 3)
    assert "beside its padding" in result.stays[0]


def test_blocks_of_a_grouped_convolution_stay_equal():
    def change(model):
        model.grouped.weight.data[:, 1] = 0  # channel 1 of each block
        model.grouped.weight.data[:4, 2] = 0  # channel 2 of the first block only
        model.fc.weight.data[:, :4] = 0  # what the first output channel gives

    result = smaller(*learned(model_of(Depthwise), Depthwise.shape, change), Depthwise.shape)
    assert shapes(result)["point"] == (6, 16, 1, 1)
    assert shapes(result)["grouped"] == (8, 3, 3, 1)
    assert any("cuts its channels into equal blocks" in note for note in result.stays)


def test_a_depthwise_channel_leaves_with_what_it_reads():
    def change(model):
        model.deep.weight.data[4:6], model.deep.bias.data[4:6] = 0, torch.tensor([-1.0, 0.5])
        model.point.weight.data[:, 10:12] = 0

    result = smaller(*learned(model_of(Depthwise), Depthwise.shape, change), Depthwise.shape)
    assert shapes(result)["stem"] == (6, 3, 3, 3)
    assert shapes(result)["deep"] == (12, 1, 3, 3)
    assert shapes(result)["point"] == (8, 12, 1, 1)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("seed", range(4))
def test_networks_with_empty_rows_and_columns(network, seed):
    """Rows and columns are emptied at random, and biases beside them."""
    draw = np.random.default_rng(seed)

    def change(model):
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                rows = draw.random(len(module.weight)) < 0.4
                columns = draw.random(module.weight.shape[1]) < 0.3
                module.weight.data[rows] = 0
                module.weight.data[:, columns] = 0
                if module.bias is not None:
                    module.bias.data[draw.random(len(rows)) < 0.5] = 0

    graph, formats = learned(model_of(network), network.shape, change)
    result = smaller(graph, formats, network.shape)
    assert sum(map(np.prod, shapes(result).values())) < sum(np.prod(before) for before, _ in result.layers.values())
    # Nothing is left to do, and the weights that were not zero are all there or were of no use.
    again = smaller(result.graph, result.formats, network.shape)
    assert shapes(again) == shapes(result)


def test_other_formats_are_refused():
    graph, formats = learned(chain(), (6,))
    form = FORMATS.get("integer").parse({"width": 8, "frac_width": 4}, WEIGHT)
    with pytest.raises(RunError, match=r"only where bits were learned .*weight of _0 is"):
        without_idle_channels(graph, {**formats, "_0": {**formats["_0"], "weight": form}}, torch.zeros(1, 6))


def test_a_difference_is_an_error():
    graph, formats = learned(model_of(Normed), Normed.shape)
    x, _ = clusters(Normed.shape, 50)
    result = without_idle_channels(graph, formats, x)
    other = quantize(graph, formats, bake=True)
    other.fc3.bias.data[:] += 1
    with pytest.raises(RunError, match="sample 0 of val, so it is not saved"):
        compared(result, other, {"val": x})
