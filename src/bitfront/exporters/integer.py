"""From a graph and a format per operand to a torch module that computes in bytes, with oneDNN's kernels, on a CPU.

Sites with an input and a weight of at most 8 bits become modules that round their input to unsigned bytes, multiply and
add up in 32-bit integers, and return floats: the computation that ``transforms.quantize`` simulates. Everything between
them stays in float. This works for operations whose record names a kernel (Linear, Conv1d, Conv2d, ReLU). For any other
site ``obstacle`` returns the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitfront.errors import ExportError
from bitfront.exporters.packing import Packing, instead, otherwise, packing
from bitfront.formats.base import Format, Operand
from bitfront.graph import Graph, Site
from bitfront.graph.capture import parameter
from bitfront.kernels import onednn
from bitfront.operations.base import DATA_OUT
from bitfront.operations.lookup import hooks, operand_nodes

SiteFormats = Mapping[Operand, Format]


def obstacle(graph: Graph, site: Site, formats: SiteFormats) -> str:
    """Why torch has no kernel of bytes for a site in these formats; empty if it has one, or if the site stays in float.
    Formats must be calibrated."""
    needed = [o for o in site.specs if o.role != "bias"]
    if DATA_OUT in formats:
        return f"its result has a format ({DATA_OUT}), and no kernel of bytes rounds one: leave it out, or write ONNX"
    if not any(o.name in formats for o in needed):
        return ""
    if graph.fx_graph is None:
        return f"the model cannot be traced: {graph.untraced}"
    beside = hooks(graph.model.get_submodule(site.path)) if site.path else ""
    if beside:
        return f"{beside}, which no kernel of bytes runs"
    kernel = _KERNELS.get(site.operation.kernel or "")
    if kernel is None:
        return f"there is no kernel of bytes for {site.op}"
    for operand in needed:
        rounding = formats.get(operand.name)
        if rounding is None:
            return f"{operand.name} stays in float"
        held = packing(rounding, activation=operand.role == "activation" and kernel.unsigned)
        if held is None:
            return f"{operand.name} is {rounding.label}, which no kernel of bytes takes"
        if operand.role == "activation" and (why := otherwise(rounding, operand.name)):
            return why
        if operand.role == "activation" and held.axis is not None:
            return "an input with a scale per channel cannot be summed as integers"
        if operand.role == "weight" and not (held.signed and held.symmetric):
            return f"its weight is {rounding.label}: the kernels take signed weights without a zero point"
        if not kernel.unsigned and not held.symmetric:
            return "its input has a zero point other than 0"
    return kernel.obstacle(graph, site)


def _no_product(_graph: Graph, site: Site) -> str:
    """Why oneDNN cannot multiply here, whatever the formats."""
    if not site.weight:
        return "its weight is computed, not a parameter"
    return "" if onednn.exact() else "this processor or build of torch has no exact kernels of bytes"


def _no_convolution(graph: Graph, site: Site) -> str:
    module = graph.model.get_submodule(site.path) if site.path else None
    if site.weight and (module is None or module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return "only convolution modules padded with a number of zeros have a kernel of bytes"
    return _no_product(graph, site)


def integer_model(graph: Graph, formats: Mapping[str, SiteFormats]) -> nn.Module:
    """A new model in evaluation mode that computes `formats` in bytes; sites that are absent stay in float. Biases
    alone may have any format: they are added as float.

    Raises:
        ExportError: a site has an ``obstacle``; the message names it.
    """
    for site in graph.sites:
        of_site = formats.get(site.name, {})
        why = obstacle(graph, site, of_site)
        if why:
            remedy = next(filter(None, map(instead, of_site.values())), "")
            raise ExportError(f"{site.title}: {why}{remedy}")
    if graph.fx_graph is None:
        return copy.deepcopy(graph.model)
    model = copy.deepcopy(graph.model)
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    new.output(new.graph_copy(graph.fx_graph, mapping))
    by_name = {old.name: node for old, node in mapping.items()}
    for site in graph.sites:
        site_formats = formats.get(site.name, {})
        if "data_in" not in site_formats:
            continue
        node = by_name[site.name]
        source = node.args[0] if site.path else operand_nodes(node, site.operation)["data_in"]
        target = f"{site.name}_integer"
        model.add_module(target, _built(graph, site, site_formats))
        with new.inserting_after(node):
            replacement = new.call_module(target, (source,))
        node.replace_all_uses_with(replacement)
        new.erase_node(node)
    new.lint()
    return fx.GraphModule(model, new).eval()


def _built(graph: Graph, site: Site, formats: SiteFormats) -> nn.Module:
    kernel = _KERNELS[site.operation.kernel or ""]
    held = packing(formats["data_in"], activation=kernel.unsigned)
    assert held is not None
    return kernel.build(graph, site, formats, held)


def _rectifier(_graph: Graph, _site: Site, _formats: SiteFormats, held: Packing) -> nn.Module:
    return IntegerReLU(held)


def _linear(graph: Graph, site: Site, formats: SiteFormats, held: Packing) -> nn.Module:
    return IntegerLinear(held, *_parameters(graph, site, formats))


def _convolution(graph: Graph, site: Site, formats: SiteFormats, held: Packing) -> nn.Module:
    return IntegerConv(held, *_parameters(graph, site, formats), graph.model.get_submodule(site.path))


def _parameters(graph: Graph, site: Site, formats: SiteFormats) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weight as bytes, its step per output, and the bias."""
    held = packing(formats["weight"], activation=False)
    assert held is not None
    assert site.weight is not None
    weight = torch.from_numpy(held.pack(parameter(graph.model, site.weight)))
    steps = torch.from_numpy(held.scale).reshape(-1).expand(len(weight)).contiguous()
    bias = parameter(graph.model, site.bias) if site.bias else None
    if bias is not None and "bias" in formats:
        bias = formats["bias"].quantize(bias)
    return weight, steps, bias


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


@dataclass(frozen=True)
class _ByteKernel:
    """A kernel of bytes. Records of operations refer to it by name.

    Attributes:
        build: (graph, site, formats, packing of its input) → the module.
        obstacle: (graph, site) → why the site has no kernel in any format; "" if it has one.
        unsigned: whether it takes unsigned bytes in any case; otherwise it requires a zero point of 0.
    """

    build: Callable[[Graph, Site, SiteFormats, Packing], nn.Module]
    obstacle: Callable[[Graph, Site], str]
    unsigned: bool = True


_KERNELS: Mapping[str, _ByteKernel] = {
    "linear": _ByteKernel(_linear, _no_product),
    "convolution": _ByteKernel(_convolution, _no_convolution),
    "rectifier": _ByteKernel(_rectifier, lambda _graph, _site: "", unsigned=False),
}
