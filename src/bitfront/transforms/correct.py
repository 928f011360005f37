"""Corrections for the mean error of a quantized site: of its bias, and of the batch norms that follow it.

Bias correction subtracts from the bias the mean error that the quantized weights cause in each output channel (Nagel et
al. 2019, arXiv:1906.04721, section 4.2, with the expectation taken over calibration samples). Correcting a batch norm
gives it the statistics of the quantized site's output (Nagel et al. 2022, arXiv:2203.11086, for whole models). Both use
the inputs that the site has in the float model, so that they depend only on the formats of this site.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitfront.formats.base import Format, Operand
from bitfront.graph import Graph, Site
from bitfront.graph.capture import apply_site, node_of, owns_parameters, parameter
from bitfront.graph.memory import stored_tensors
from bitfront.operations.lookup import hooks, of_module
from bitfront.transforms.arguments import rounded_result

#: (mean, variance) per channel, each of shape (channels,).
Statistics = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Correction:
    """The corrections of one site, computed when its formats are applied.

    Attributes:
        bias: the corrected bias before it is quantized; None if the bias is not corrected.
        norms: module path of a batch norm behind the site → running mean and running variance, each of shape
            (channels,).
        weight: the weight with learned rounding: its format rounds it to itself; None if each value is rounded to the
            nearest one.
    """

    bias: Tensor | None = None
    norms: Mapping[str, Statistics] = field(default_factory=dict)
    weight: Tensor | None = None

    @property
    def parameters(self) -> dict[Operand, Tensor]:
        """Operand → what takes the place of its parameter."""
        replaced = {"weight": self.weight, "bias": self.bias}
        return {operand: value for operand, value in replaced.items() if value is not None}


def has_bias(graph: Graph, site: Site) -> bool:
    """Whether the site's bias can be corrected: the site is a layer with a weight and a bias among its parameters, and
    nobody else uses this bias."""
    if site.bias is None or not owns_parameters(site, node_of(graph, site)):
        return False
    (stored,) = (tensor for tensor in stored_tensors(graph) if site.bias in tensor.names)
    return len(stored.uses) == 1 and not stored.floats


def corrected(graph: Graph, corrections: Mapping[str, Correction]) -> Graph:
    """The graph with corrected parameters and statistics, in a new model; itself where nothing is corrected.

    Args:
        corrections: site name → its corrections.
    """
    changes = {name: c for name, c in corrections.items() if c.parameters or c.norms}
    if not changes:
        return graph
    model = copy.deepcopy(graph.model)
    with torch.no_grad():
        for name, correction in changes.items():
            site = graph.site(name)
            for operand, value in correction.parameters.items():
                held = site.parameter(operand)
                assert held is not None
                parameter(model, held[0]).copy_(value)
            for path, statistics in correction.norms.items():
                for what, value in zip(("running_mean", "running_var"), statistics, strict=True):
                    parameter(model, f"{path}.{what}").copy_(value)
    return replace(graph, model=model)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm with running statistics, which can be replaced, and nothing beside."""
    operation = None if hooks(module) else of_module(module)
    merges = operation is not None and operation.merge is not None and operation.merge.kind == "norm"
    return merges and bool(getattr(module, "track_running_stats", False))


def norms_behind(graph: Graph, site: Site) -> tuple[str, ...]:
    """Module paths of the batch norms whose only input is the output of the site, and that are called only there.

    Empty if the site is not a layer with parameters, or the model could not be traced.
    """
    if graph.fx_graph is None or not owns_parameters(site, node_of(graph, site)):
        return ()
    if site.path and hooks(graph.model.get_submodule(site.path)):
        return ()  # a hook may change what the batch norm gets
    # A batch norm that is a site has formats, and keeps its statistics.
    named = {s.name for s in graph.sites}
    calls = [n for n in graph.fx_graph.nodes if n.op == "call_module" and n.name not in named]
    modules: list[Any] = [graph.model.get_submodule(str(n.target)) for n in calls]
    return tuple(
        str(n.target)
        for n, module in zip(calls, modules, strict=True)
        if is_norm(module)
        and [a.name for a in n.all_input_nodes] == [site.name]
        and sum(other is module for other in modules) == 1
    )


def bias_in_steps(bias: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """(a bias rounded to a multiple of a step, half to even, as runtimes that add up in 32 bits hold it, same dtype;
    the whole numbers, int32), both of shape (channels,).

    Args:
        bias: float, shape (channels,).
        step: of the sums that the bias is added to, float32, shape () or (channels,).
    """
    codes = torch.clamp(torch.round(bias.double() / step.double()), -(2**31), 2**31 - 1)
    return (codes * step.double()).to(bias.dtype), codes.to(torch.int32)


def step_of_sums(site: Site, formats: Mapping[Operand, Format]) -> Tensor | None:
    """The step of a layer's sums of products, float32, shape () or (output channels,): that of its input times those of
    its weight. None where they have no grids, or other ones than one step per tensor or output channel.

    Args:
        formats: calibrated.
    """
    if "data_in" not in formats or "weight" not in formats:
        return None
    data, weight = formats["data_in"].grid, formats["weight"].grid
    if data is None or weight is None or not data.uniform or not (weight.uniform or weight.axis == 0):
        return None
    if site.operation.operand("weight").channel_axis != 0:
        return None
    steps = [torch.as_tensor(grid.step, dtype=torch.float64).to(torch.float32).reshape(-1) for grid in (data, weight)]
    return steps[0] * steps[1]


def corrected_bias(graph: Graph, site: Site, quantized: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """The corrected bias b − E[W_q x − W x], per output channel; the mean is over samples and positions.

    Args:
        graph: the float model.
        site: one for which ``has_bias`` is true.
        quantized: the quantized weight W_q.
        inputs: the inputs x of the site in the float model: one tensor per call.

    Returns:
        A tensor of the shape and dtype of the site's bias.
    """
    assert site.weight is not None
    assert site.bias is not None
    float_weight, bias = parameter(graph.model, site.weight), parameter(graph.model, site.bias)
    error = quantized - float_weight
    # The dimension of the channels: the last one for a linear layer, the one before the positions for a convolution.
    assert site.operation.product is not None
    channels = site.operation.product.output
    assert channels is not None
    node = node_of(graph, site)
    with torch.no_grad():
        outputs = [apply_site(graph.model, site, node, {"data_in": x, "weight": error}).double() for x in inputs]
    rows = torch.cat([output.movedim(channels, 0).flatten(1) for output in outputs], dim=1)
    # A channel without a finite value, as behind an infinite weight, keeps its bias.
    return (bias.double() - _over_finite(rows)[0].nan_to_num(0.0)).to(bias.dtype)


def output_statistics(
    graph: Graph, site: Site, formats: Mapping[Operand, Format], replaced: Mapping[Operand, Tensor], x: Tensor
) -> Statistics:
    """Mean and variance of the site's output per channel, over samples and positions.

    Args:
        graph: the float model.
        site: a layer with a weight.
        formats: the calibrated formats of its operands; operands without one stay in float.
        replaced: operand → what takes the place of its parameter before it is quantized.
        x: the inputs of the site in the float model.

    Returns:
        Each float64, shape (channels,). Channels are the second dimension of the output, as for a batch norm.
    """
    assert site.weight is not None
    held = {operand: parameter(graph.model, name) for operand, name in site.operand_parameters}
    operands: dict[Operand, Tensor | None] = {"data_in": x, "bias": None, **held, **replaced}
    for operand, form in formats.items():
        value = operands.get(operand)
        operands[operand] = None if value is None else form.round(value)
    with torch.no_grad():
        out = rounded_result(site.specs, formats, apply_site(graph.model, site, node_of(graph, site), operands))
    rows = out.double().movedim(1, 0).flatten(1)
    return _over_finite(rows)


def _over_finite(rows: Tensor) -> Statistics:
    """Mean and variance of each row's finite values; NaN for a row without any."""
    if bool(rows.isfinite().all()):
        return rows.mean(dim=1), rows.var(dim=1, correction=0)
    known = rows.where(rows.isfinite(), torch.nan)
    mean = known.nanmean(dim=1)
    return mean, (known - mean[:, None]).square().nanmean(dim=1)


def rescaled_statistics(norm: Any, floating: Statistics, quantized: Statistics) -> Statistics:
    """The running mean and variance of a batch norm, corrected for a quantized site before it.

    With them the output of the batch norm has the same mean per channel as in the float model and, up to ``eps``, the
    same variance.

    The running statistics come from training, on more data than the calibration samples. So they are not replaced by
    estimates, but shifted and scaled by the change that quantization causes: with r = var_q / var_float, the new
    variance is var · r, and the new mean is as many standard deviations from the samples' mean as before. If a channel
    is constant, before or after quantization, its variance stays; if it has no finite value, so does its mean.

    Args:
        norm: the batch norm of the float model.
        floating: mean and variance of its input in the float model, float64, each of shape (channels,).
        quantized: the same with the site quantized.

    Returns:
        (running mean, running variance), each with the shape and dtype of the batch norm's buffer.
    """
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    varies = (floating[1] > 0) & (quantized[1] > 0)
    ratio = torch.where(varies, quantized[1] / floating[1], torch.ones_like(quantized[1]))
    scale = torch.sqrt((variance * ratio + norm.eps) / (variance + norm.eps))
    shifted = quantized[0] - scale * (floating[0] - mean)
    shifted = torch.where(shifted.isnan(), mean, shifted)
    return shifted.to(norm.running_mean.dtype), (variance * ratio).to(norm.running_var.dtype)
