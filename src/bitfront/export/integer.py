"""A graph and a format per operand → a torch module that computes in bytes, with oneDNN's kernels.

Sites with an input and a weight of at most 8 bits become modules that round their input to unsigned bytes, multiply and
add up in 32-bit integers, and give floats, as ``transforms.quantize`` simulates it; everything between them stays in
float. For Linear, Conv1d, Conv2d and ReLU on a CPU; ``obstacle`` says why not, for any other.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitfront.errors import ExportError
from bitfront.export.packing import Packing, packing
from bitfront.formats.base import Format, Operand
from bitfront.graph import Graph, Site
from bitfront.graph.capture import parameter
from bitfront.kernels import onednn
from bitfront.operations.lookup import operand_nodes

SiteFormats = Mapping[Operand, Format]
OPS = ("linear", "conv1d", "conv2d", "relu")


def obstacle(graph: Graph, site: Site, formats: SiteFormats) -> str:
    """Why torch has no kernel of bytes for a site in these formats; empty where it has one, or where the site is left
    in float. Formats must be calibrated."""
    if not any(o != "bias" for o in formats):
        return ""
    if graph.fx_graph is None:
        return f"the model cannot be traced: {graph.untraced}"
    if site.op not in OPS:
        return f"there is no kernel of bytes for {site.op}"
    for operand in ("data_in", "weight") if site.op != "relu" else ("data_in",):
        own = formats.get(operand)
        if own is None:
            return f"{operand} stays in float"
        held = packing(own, activation=operand == "data_in" and site.op != "relu")
        if held is None:
            return f"{operand} is {own.label}, which no kernel of bytes takes"
        if operand == "data_in" and held.axis is not None:
            return "an input with a scale per channel cannot be summed as integers"
        if operand == "weight" and not (held.signed and held.symmetric):
            return f"its weight is {own.label}: the kernels take signed weights without a zero point"
        if site.op == "relu" and not held.symmetric:
            return "its input has a zero point other than 0"
    if site.op != "relu":
        if not site.weight:
            return "its weight is computed, not a parameter"
        module = graph.model.get_submodule(site.path) if site.path else None
        if site.op != "linear" and (
            module is None or module.padding_mode != "zeros" or isinstance(module.padding, str)
        ):
            return "only convolution modules padded with a number of zeros have a kernel of bytes"
        if not onednn.exact():
            return "this processor or build of torch has no exact kernels of bytes"
    return ""


def integer_model(graph: Graph, formats: Mapping[str, SiteFormats]) -> nn.Module:
    """A new model in evaluation mode that computes `formats` in bytes; sites that are absent stay in float. Biases
    alone may have any format: they are added as float.

    Raises:
        ExportError: a site has an ``obstacle``; names it.
    """
    for site in graph.sites:
        why = obstacle(graph, site, formats.get(site.name, {}))
        if why:
            raise ExportError(f"{site.title}: {why}")
    if graph.fx_graph is None:
        return copy.deepcopy(graph.model)
    model = copy.deepcopy(graph.model)
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    new.output(new.graph_copy(graph.fx_graph, mapping))
    by_name = {old.name: node for old, node in mapping.items()}
    for site in graph.sites:
        own = formats.get(site.name, {})
        if "data_in" not in own:
            continue
        node = by_name[site.name]
        source = node.args[0] if site.path else operand_nodes(node, site.operation)["data_in"]
        target = f"{site.name}_integer"
        model.add_module(target, _built(graph, site, own))
        with new.inserting_after(node):
            replacement = new.call_module(target, (source,))
        node.replace_all_uses_with(replacement)
        new.erase_node(node)
    new.lint()
    return fx.GraphModule(model, new).eval()


def _built(graph: Graph, site: Site, formats: SiteFormats) -> nn.Module:
    held = packing(formats["data_in"], activation=site.op != "relu")
    assert held is not None
    if site.op == "relu":
        return IntegerReLU(held)
    weight_held = packing(formats["weight"], activation=False)
    assert weight_held is not None
    assert site.weight is not None
    weight = torch.from_numpy(weight_held.pack(parameter(graph.model, site.weight)))
    steps = torch.from_numpy(weight_held.scale).reshape(-1).expand(len(weight)).contiguous()
    bias = parameter(graph.model, site.bias) if site.bias else None
    if bias is not None and "bias" in formats:
        bias = formats["bias"].quantize(bias)
    if site.op == "linear":
        return IntegerLinear(held, weight, steps, bias)
    return IntegerConv(held, weight, steps, bias, graph.model.get_submodule(site.path))


class _Input(nn.Module):
    """Rounds an input to bytes."""

    def __init__(self, held: Packing) -> None:
        super().__init__()
        self.scale, self.zero, self.low, self.high = float(held.scale), int(held.zero), held.low, held.high
        self.dtype = torch.int8 if held.signed else torch.uint8

    def packed(self, x: Tensor) -> Tensor:
        """Float → bytes, same shape."""
        return (x / self.scale).round_().add_(self.zero).clamp_(self.low, self.high).to(self.dtype)


class IntegerReLU(_Input):
    """ReLU of bytes."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, same shape."""
        return self.packed(x).clamp_min_(0).float().mul_(self.scale)


class IntegerLinear(_Input):
    """Linear of bytes: weight int8, shape (out, in), with a step per output; bias float."""

    def __init__(self, held: Packing, weight: Tensor, steps: Tensor, bias: Tensor | None) -> None:
        super().__init__(held)
        self.kernel = onednn.LinearKernel.of(weight, steps, bias, self.scale, self.zero)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., in) → (..., out)."""
        q = self.packed(x)
        out = self.kernel(q if q.dim() == 2 else q.reshape(-1, q.shape[-1]))
        return out if q.dim() == 2 else out.reshape(*q.shape[:-1], -1)


class IntegerConv(_Input):
    """Conv1d or Conv2d of bytes: weight int8, with a step per output channel; bias float."""

    def __init__(self, held: Packing, weight: Tensor, steps: Tensor, bias: Tensor | None, module: Any) -> None:
        super().__init__(held)
        self.flat = weight.dim() == 3
        # A Conv1d is a Conv2d of height 1.
        stride, padding, dilation = (
            [fill, *given] if self.flat else list(given)
            for given, fill in ((module.stride, 1), (module.padding, 0), (module.dilation, 1))
        )
        weight = weight.unsqueeze(2) if self.flat else weight
        geometry = (stride, padding, dilation)
        self.kernel = onednn.ConvolutionKernel.of(
            weight, steps, bias, self.scale, self.zero, geometry, int(module.groups)
        )

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Conv1d and nn.Conv2d."""
        q = self.packed(x.unsqueeze(2) if self.flat else x)
        out = self.kernel(q.contiguous(memory_format=torch.channels_last))
        return out.squeeze(2) if self.flat else out
