"""Adaptive rounding: which weights of a layer are rounded up and which down, learned from its inputs.

Rounding each weight to the nearest value is best for the weights, not for the output of the layer: errors of weights
add up over its inputs. AdaRound (Nagel et al. 2020, arXiv:2004.10568) learns a number h from 0 to 1 for each weight,
which is then ``step · (⌊w / step⌋ + h)``. It lowers the mean squared error of the layer's output plus a regulariser,
which drives every h to 0 or 1 (their equations 21 to 24). Here

* the error of the output is a quadratic form of the errors of the weights, so that it is computed from the second
  moments of the inputs, for all samples in every iteration, and no samples are drawn;
* each output channel counts relative to its error under nearest rounding, so that the balance of error and regulariser
  depends neither on the scale of inputs nor on that of weights;
* a channel whose error would not be lower keeps its nearest values.

Inputs are those of the float model, so a learned weight depends on its site and its format alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitfront.formats.base import Format
from bitfront.graph import Graph, Site
from bitfront.graph.capture import apply_site, node_of, owns_parameters, parameter
from bitfront.graph.memory import stored_tensors
from bitfront.operations.lookup import operand_nodes

#: The rectified sigmoid is ``clamp(sigmoid(v) · (HIGH − LOW) + LOW, 0, 1)``, which reaches 0 and 1.
LOW, HIGH = -0.1, 1.1
#: Its regulariser is ``1 − |2h − 1|^β``: flat at first, steep in the end. It starts after this part of the iterations.
FIRST_BETA, LAST_BETA, WARM = 20.0, 2.0, 0.2
#: Weight of the regulariser, per weight, beside the relative error of its channel; and the learning rate of Adam.
PENALTY, LEARNING_RATE = 3.0, 0.03
#: So many values of inputs are laid out at a time.
LAID_VALUES = 2**24
#: What an iteration takes: at least, for each weight, and for each weight and each factor of its sum.
SECONDS, SECONDS_PER_VALUE, SECONDS_PER_PRODUCT = 2e-4, 3e-8, 5e-11


def learns_rounding(graph: Graph, site: Site) -> bool:
    """Whether the rounding of the site's weight can be learned: the site sums products of its input and a weight among
    its parameters, and nobody else uses this weight."""
    node = node_of(graph, site)
    if not owns_parameters(site, node) or site.weight is None or not (site.path or node):
        return False
    weight = parameter(graph.model, site.weight)
    if weight.dtype != torch.float32 or tuple(weight.shape) != tuple(site.weight_shape):
        return False  # the site takes a view of it
    if not site.path and node is not None and operand_nodes(node, site.operation)["weight"].op != "get_attr":
        return False
    (stored,) = (tensor for tensor in stored_tensors(graph) if site.weight in tensor.names)
    return len(stored.uses) == 1 and not stored.floats


def has_two_sides(form: Format) -> bool:
    """Whether a calibrated format rounds a value to one of two neighbours on a grid: there is something to learn."""
    return form.grid is not None and form.grid.complete


@dataclass(frozen=True)
class _Layout:
    """How a weight holds the factors of each sum.

    Attributes:
        shape: of the weight.
        groups: of channels, each with inputs to itself.
        channels: the dimension of the output channels, 0 or 1; at 1, inputs are at 0, through all groups.
    """

    shape: tuple[int, ...]
    groups: int
    channels: int

    def rows(self, weight: Tensor) -> Tensor:
        """A tensor like the weight as shape (groups, channels of a group, factors of a sum)."""
        cut = weight.reshape(self.groups, -1, *self.shape[1:])
        return (cut if self.channels == 0 else cut.transpose(1, 2)).flatten(2)

    def weight(self, rows: Tensor) -> Tensor:
        """What ``rows`` laid out, as it was; the number of channels may be another."""
        if self.channels == 0:
            return rows.reshape(-1, *self.shape[1:])
        cut = rows.reshape(self.groups, rows.shape[1], self.shape[0] // self.groups, *self.shape[2:])
        return cut.transpose(1, 2).reshape(self.shape[0], rows.shape[1], *self.shape[2:])


def adaptive_weight(graph: Graph, site: Site, form: Format, inputs: Sequence[Tensor], iterations: int) -> Tensor:
    """The weight of a site in a format, each value rounded up or down as is best for the site's output.

    Args:
        graph: the float model.
        site: one for which ``learns_rounding`` is true.
        form: the calibrated format of the weight; ``has_two_sides`` is true of it.
        inputs: the inputs of the site in the float model: one tensor per call. Values that are not finite are left out.
        iterations: how often all h are improved.

    Returns:
        A tensor of the shape and dtype of the weight, that `form` rounds to itself.
    """
    assert site.weight is not None
    with torch.no_grad():
        weight = parameter(graph.model, site.weight)
        nearest = form.round(weight)
        if not len(inputs) or not inputs[0].numel() or not bool(weight.isfinite().all()):
            return nearest
        layout = _layout_of(graph, site, weight, inputs[0])
        moments = _moments(graph, site, layout, inputs)
        steps = _Steps.of(form, weight, layout)
        error = ((layout.rows(nearest) - steps.weight) * moments(layout.rows(nearest) - steps.weight)).sum(-1)
        learned = steps.values(_learned(steps, moments, error, iterations))
        change = learned - steps.weight
        better = (change * moments(change)).sum(-1, keepdim=True) < error[..., None]
        return form.round(layout.weight(torch.where(better, learned, layout.rows(nearest))))


@dataclass(frozen=True, eq=False)
class _Steps:
    """A weight between its neighbours on a grid; all of the shape that ``_Layout.rows`` gives.

    Attributes:
        weight: in float.
        below: the number of steps below it, without zero points.
        step: the step of each value.
        low, high: the smallest and the largest number of steps.
    """

    weight: Tensor
    below: Tensor
    step: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, form: Format, weight: Tensor, layout: _Layout) -> _Steps:
        grid = form.grid
        assert grid is not None
        zero = grid.along(0.0 if grid.zero is None else grid.zero, weight)
        entries = (
            grid.along(grid.step, weight),
            grid.along(grid.low, weight) - zero,
            grid.along(grid.high, weight) - zero,
        )
        step, low, high = (layout.rows(entry.expand_as(weight)) for entry in entries)
        rows = layout.rows(weight)
        return cls(rows, torch.floor(rows / step), step, low, high)

    def values(self, up: Tensor) -> Tensor:
        """The values for numbers from 0 (down) to 1 (up)."""
        return torch.clamp(self.below + up, self.low, self.high) * self.step

    def inside(self, up: Tensor) -> Tensor:
        """Where values change with `up`, as 0 or 1."""
        steps = self.below + up
        return ((steps >= self.low) & (steps <= self.high)).to(up.dtype)


#: Errors of weights, shape (groups, channels, factors) → their products with the second moments of the inputs.
_Moments = Callable[[Tensor], Tensor]


def _learned(steps: _Steps, moments: _Moments, nearest: Tensor, iterations: int) -> Tensor:
    """Which weights are rounded up, as 0 or 1.

    Args:
        nearest: the squared error of each channel's output under nearest rounding, shape (groups, channels).
    """
    part = (steps.weight / steps.step - steps.below).clamp(0.0, 1.0)
    up = torch.logit((part - LOW) / (HIGH - LOW)).requires_grad_()
    # The error of a channel counts as much as all of its weights do in the regulariser.
    scale = torch.where(nearest > 0, steps.weight.shape[-1] / nearest, torch.zeros_like(nearest))[..., None]
    adam = torch.optim.Adam([up], lr=LEARNING_RATE)
    warm = int(iterations * WARM)
    for i in range(iterations):
        sigmoid = torch.sigmoid(up.detach())
        stretched = sigmoid * (HIGH - LOW) + LOW
        h = stretched.clamp(0.0, 1.0)
        gradient = 2 * scale * moments(steps.values(h) - steps.weight) * steps.step * steps.inside(h)
        if i >= warm:
            beta = LAST_BETA + (FIRST_BETA - LAST_BETA) * (1 - (i - warm) / max(1, iterations - warm))
            away = 2 * h - 1
            gradient -= PENALTY * 2 * beta * away.sign() * away.abs() ** (beta - 1)
        within = (stretched >= 0) & (stretched <= 1)
        up.grad = gradient * (HIGH - LOW) * sigmoid * (1 - sigmoid) * within
        adam.step()
    return (up.detach() >= 0).to(up.dtype)


def _layout_of(graph: Graph, site: Site, weight: Tensor, x: Tensor) -> _Layout:
    rule = site.operation.product
    assert rule is not None
    if rule.channels == 0:
        return _Layout(tuple(weight.shape), x.shape[rule.output] // weight.shape[1], 0)
    out = apply_site(graph.model, site, node_of(graph, site), {"data_in": x[:1], "weight": weight})
    return _Layout(tuple(weight.shape), out.shape[rule.output] // weight.shape[1], 1)


def _moments(graph: Graph, site: Site, layout: _Layout, inputs: Sequence[Tensor]) -> _Moments:
    """The product with E[x xᵀ], where x are the factors of a sum. The mean is over samples and positions."""
    few = math.prod(layout.shape) // (layout.groups if layout.channels else 1) // layout.shape[layout.channels]
    parts, total, number, like = [], torch.zeros(()), 0, inputs[0]
    for x in _factors(graph, site, layout, inputs):
        number += x.shape[-1]
        if number <= few:
            parts.append(x)
            continue
        for part in (*parts, x):
            total = total + part.double() @ part.double().transpose(1, 2)
        parts = []
    if number > few:
        moments = (total / number).to(like.dtype)
        return lambda errors: errors @ moments
    rows = torch.cat(parts, dim=-1) / math.sqrt(max(1, number))
    return lambda errors: (errors @ rows) @ rows.transpose(1, 2)


def _factors(graph: Graph, site: Site, layout: _Layout, inputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """The factors of sums, shape (groups, factors, sums). They are what the site computes with weights that take one
    factor each."""
    rule, node = site.operation.product, node_of(graph, site)
    assert rule is not None
    plain = len(layout.shape) == 2
    count = layout.rows(torch.zeros(layout.shape)).shape[-1]
    one_each = None if plain else layout.weight(torch.eye(count).expand(layout.groups, count, count))
    for x in inputs:
        each = (
            x[:1].numel() if plain else math.prod(x.shape[1:]) // max(1, x.shape[rule.output]) * count * layout.groups
        )
        for some in torch.split(x, max(1, LAID_VALUES // max(1, each))):
            if one_each is None:
                laid = some
            else:
                given = {"data_in": some, "weight": one_each.to(some)}
                laid = apply_site(graph.model, site, node, given)
            factors = laid.movedim(rule.output, 0).reshape(layout.groups, count, -1)
            yield factors[..., factors.isfinite().all(dim=0).all(dim=0)]


def estimated_seconds(site: Site, iterations: int) -> float:
    """About how long ``adaptive_weight`` takes, on one thread of a usual processor."""
    rule = site.operation.product
    assert rule is not None
    values = math.prod(site.weight_shape)
    factors = values // site.weight_shape[rule.channels]
    return iterations * (SECONDS + values * (SECONDS_PER_VALUE + factors * SECONDS_PER_PRODUCT))
