"""The types that are stated for the nodes of a QONNX file hold every number that the nodes compute.

hls4ml takes these types; a number outside of one wraps around there without a word.
"""

import numpy as np
import pytest
import torch
from torch import nn

from bitfront.exporters.fixed import input_type, placed
from bitfront.exporters.lowering import lowered
from bitfront.exporters.qonnx_graph import qonnx_model
from bitfront.exporters.qonnx_parts import INPUT
from bitfront.exporters.targets.qonnx import suited
from bitfront.formats.fixed_map import FixedMap
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.transforms import calibrate
from bitfront.transforms.fold import folded
from random_networks import Depthwise, Network, Residual


class Bounded(nn.Module):
    """Bounds far inside of what the sums reach."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.six, self.tanh = nn.ReLU6(), nn.Hardtanh(-0.5, 0.75)
        for layer in self.layers:
            layer.weight.data *= 12

    def forward(self, x):
        x = self.six(self.layers[0](x))
        x = self.tanh(self.layers[1](x))
        return self.six(self.layers[2](x))


NETWORKS = {
    "bounded": (Bounded, (6,)),
    "residual": (lambda: Network([(Residual, 1)], True), Network.shape),
    "depthwise": (lambda: Network([(Depthwise, 1)], True), Network.shape),
}


def _formats(graph, x, kind):
    """Fixed point of six bits, or of a number of bits for each value."""
    generator = np.random.default_rng(0)
    wanted = {}
    for site in (s for s in graph.sites if s.weight or kind != "elements"):
        for operand in site.operands:
            signed = operand != "data_in" or site.negative_inputs_matter
            form = wanted.setdefault(site.name, {})
            if kind == "elements":
                shape = site.inputs[0] if operand == "data_in" else dict(site.shapes)[operand]
                widths, points = (generator.integers(a, b, shape).astype(np.int8) for a, b in ((1, 8), (1, 6)))
                inputs = operand == "data_in"
                form[operand] = FixedMap.of(
                    widths, points, signed=signed, samples=inputs, rounding="floor" if inputs else "even"
                )
            else:
                settings = {"width": 12 if operand == "bias" else 6, "frac_width": "auto"}
                form[operand] = Integer.parse(settings, site.operation.operand(operand).kind(), signed=signed)
    return calibrate(graph, wanted, x)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["fixed", "elements"])
@pytest.mark.parametrize("network", NETWORKS)
def test_types_hold_every_number_of_their_nodes(network, kind):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'bitfront[qonnx]'")
    pytest.importorskip("qonnx", reason="qonnx is not installed: pip install 'bitfront[qonnx]'")
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    build, shape = NETWORKS[network]
    torch.manual_seed(0)
    x = torch.randn(8, *shape)
    graph = folded(capture(build().eval(), x[:2]), x[:2]).graph
    program = lowered(graph, _formats(graph, x, kind))
    written = qonnx_model(program, "net", channels_last=True, for_hls=True)
    given, _ = input_type(program)
    # hls4ml's input saturates to its type.
    low, high = (np.ldexp(float(end), -given.point) for end in (-(2 ** (given.bits - 1)), 2 ** (given.bits - 1) - 1))
    outputs = {node.output[0]: node.name for node in written.model.graph.node}
    seen = 0
    for sample in x.clamp(low if given.signed else 0, high if given.signed else 2 * high).numpy():
        with suited(onnx):
            tensors = execute_onnx(ModelWrapper(written.model), {INPUT: placed(sample, True)[None]}, True)
        for tensor, name in outputs.items():
            if name not in written.types:
                continue
            held, codes = written.types[name], np.ldexp(tensors[tensor].astype(np.float64), written.types[name].point)
            least = -(2 ** (held.bits - 1)) if held.signed else 0
            assert codes.min() >= least, (name, held)
            assert codes.max() < least + 2**held.bits, (name, held)
            seen += 1
    assert seen > 8 * len(program.steps) / 2
