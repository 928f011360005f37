"""What quantizing a site moves on average, put right in what follows: its bias, and the batch norms behind it.

Bias correction takes from the bias what the error of the weights adds to each output channel on average (Nagel et al.
2019, arXiv:1906.04721, section 4.2, with the expectation taken over calibration samples). Re-estimation gives a batch
norm the statistics of what the quantized site sends it (Nagel et al. 2022, arXiv:2203.11086, for whole models). Both
see the inputs that the site has in the float model, so that they depend on the site's own formats alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitfront.formats.base import Format, Operand
from bitfront.graph import Graph, Site
from bitfront.graph.capture import apply_site, node_of, owns_parameters, parameter
from bitfront.operations.lookup import of_module

#: Per index of the second dimension, float64.
Statistics = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Correction:
    """What changes in a model beside the formats of one of its sites.

    Attributes:
        bias: the site's bias, before it is quantized; None where it stays as it is.
        norms: path of a batch norm behind the site → running mean and running variance, each of shape (channels,).
    """

    bias: Tensor | None = None
    norms: Mapping[str, Statistics] = field(default_factory=dict)


def has_bias(graph: Graph, site: Site) -> bool:
    """Whether the site's bias can be corrected: a linear layer or convolution with parameters, one of them a bias."""
    return site.bias is not None and owns_parameters(site, node_of(graph, site))


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm with statistics of its own: in evaluation mode it treats every channel alone, so
    that they can be estimated again."""
    operation = of_module(module)
    merges = operation is not None and operation.merge is not None and operation.merge.kind == "norm"
    return merges and bool(getattr(module, "track_running_stats", False))


def norms_behind(graph: Graph, site: Site) -> tuple[str, ...]:
    """Paths of the batch norms that take the output of the site, a linear layer or convolution with parameters, and are
    called nowhere else. None where the model could not be traced."""
    if graph.fx_graph is None or not owns_parameters(site, node_of(graph, site)):
        return ()
    calls = [n for n in graph.fx_graph.nodes if n.op == "call_module"]
    modules: list[Any] = [graph.model.get_submodule(str(n.target)) for n in calls]
    return tuple(
        str(n.target)
        for n, module in zip(calls, modules, strict=True)
        if is_norm(module)
        and [a.name for a in n.all_input_nodes] == [site.name]
        and sum(other is module for other in modules) == 1
    )


def corrected_bias(graph: Graph, site: Site, weight: Format, inputs: Sequence[Tensor]) -> Tensor:
    """b − E[W_q x − W x] per output channel, over samples and positions, padding included.

    Args:
        site: one that ``has_bias``.
        weight: the format that makes W_q, calibrated.
        inputs: x, as the float model has it: one tensor for each call.

    Returns:
        Shape and dtype of the site's bias.
    """
    assert site.weight is not None
    assert site.bias is not None
    float_weight, bias = parameter(graph.model, site.weight), parameter(graph.model, site.bias)
    error = weight.round(float_weight) - float_weight
    # Features are the last dimension of a linear layer's output; positions follow the channels of a convolution.
    channels = site.operation.output_channels
    assert channels is not None
    node = node_of(graph, site)
    with torch.no_grad():
        moved = [apply_site(graph.model, site, node, {"data_in": x, "weight": error}).double() for x in inputs]
    rows = torch.cat([m.movedim(channels, 0).flatten(1) for m in moved], dim=1)
    return (bias.double() - rows.mean(dim=1)).to(bias.dtype)


def output_statistics(
    graph: Graph, site: Site, formats: Mapping[Operand, Format], bias: Tensor | None, x: Tensor
) -> Statistics:
    """Mean and variance of what the site sends to a batch norm, over samples and positions.

    Args:
        formats: of its operands, calibrated; an operand that is absent stays as it is.
        bias: in place of the site's own, before it is quantized; None for its own.
        x: its inputs in the float model.

    Returns:
        Each float64, shape (channels,): channels are the second dimension, as a batch norm counts them.
    """
    assert site.weight is not None
    own = parameter(graph.model, site.bias) if site.bias is not None and bias is None else bias
    operands: dict[Operand, Tensor | None] = {"data_in": x, "weight": parameter(graph.model, site.weight), "bias": own}
    for operand, form in formats.items():
        value = operands[operand]
        operands[operand] = None if value is None else form.round(value)
    with torch.no_grad():
        out = apply_site(graph.model, site, node_of(graph, site), operands)
    rows = out.double().movedim(1, 0).flatten(1)
    return rows.mean(dim=1), rows.var(dim=1, correction=0)


def restated(norm: Any, floating: Statistics, own: Statistics) -> Statistics:
    """Running mean and variance with which a batch norm makes of the quantized site's output what it made of the float
    one's: the same mean, and up to ``eps`` the same variance, per channel.

    The statistics that training left are those of more data than the calibration samples. So they are not replaced by
    estimates, but moved and scaled as quantizing moves and scales what is seen: with r = var_q / var_float, the
    variance becomes var · r, and the mean lies as many standard deviations from the samples' mean as it did before. A
    channel that does not vary, before or after, keeps its variance: there is nothing to scale.

    Args:
        norm: the batch norm of the float model.
        floating, own: statistics of its input in the float model, and with the site quantized.
    """
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    ratio = torch.where((floating[1] > 0) & (own[1] > 0), own[1] / floating[1], torch.ones_like(own[1]))
    scale = torch.sqrt((variance * ratio + norm.eps) / (variance + norm.eps))
    moved = own[0] - scale * (floating[0] - mean)
    return moved.to(norm.running_mean.dtype), (variance * ratio).to(norm.running_var.dtype)
