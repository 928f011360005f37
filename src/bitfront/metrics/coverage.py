"""All weights and multiply-accumulates of a model, and which of them candidates leave in float.

A weight is whatever the model stores or computes as a factor or as a table of values. Biases and the vectors of norms,
scales and shifts are none: they have one dimension and take no part in a multiply-accumulate. This is the one place
that says so: the mean bits per weight and the shares in float count the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bitfront.formats.base import FLOAT_BITS
from bitfront.graph.base import Graph, Node, Site
from bitfront.graph.capture import parameter
from bitfront.metrics.base import EvaluationContext, Metric, Runner, Side, Values
from bitfront.metrics.stored import StoredForms, stored_forms
from bitfront.operations.base import Shape
from bitfront.spaces.base import Codes
from bitfront.spaces.model_space import FormatSpace


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight of a model.

    Attributes:
        name: of the parameter or buffer; of the layer, if the weight is computed from several.
        elements: how many values it has.
        offered: whether some candidate has it in a format, wherever it is used.
        bits: options of candidates → bits of all values, scales included, shape (candidates,).
        quantized: options of candidates → 1 where it is in a format wherever it is used, else 0; shape (candidates,).
    """

    name: str
    elements: int
    offered: bool
    bits: Callable[[Codes], NDArray[np.int64]]
    quantized: Callable[[Codes], NDArray[np.float64]]


def all_weights(space: FormatSpace) -> tuple[Weight, ...]:
    """The weights of all layers and functions, whether they are sites or not, and whether they are used or not."""
    graph = space.graph
    sites = {site.name: site for site in space.sites}
    sources = {name for site in space.sites for name in site.computed_from}
    stored = [form for form in stored_forms(space) if _is_weight(form, graph, sites, sources)]
    found = [_stored(form) for form in stored]
    covered = {use.site for form in stored for use in form.tensor.uses if use.role == "weight"}
    for g, site in enumerate(space.sites):
        if site.stored_weights and site.name not in covered and _is_factor(site, site.weight_shape):
            found.append(_computed(space, g))
    for layer in graph.left_out:
        # Its weight may be no parameter, but a tensor that its code keeps.
        inside = (f for f in stored if any(name.startswith(f"{layer.path}.") for name in f.tensor.names))
        missing = layer.weights - sum(form.tensor.elements for form in inside)
        if missing > 0:
            found.append(_in_float(f"{layer.path}.weight", missing))
    return tuple(found)


def of_no_site(space: FormatSpace) -> bool:
    """Whether the model has weights that belong to no site, nor to a layer that only its code keeps from being one."""
    sites = {site.name: site for site in space.sites}
    sources = {name for site in space.sites for name in site.computed_from}
    left_out = tuple(f"{layer.path}." for layer in space.graph.left_out)
    return any(
        _is_weight(form, space.graph, sites, sources)
        for form in stored_forms(space)
        if not form.tensor.uses and not any(name.startswith(left_out) for name in form.tensor.names)
    )


def _is_weight(form: StoredForms, graph: Graph, sites: Mapping[str, Site], sources: set[str]) -> bool:
    tensor = form.tensor
    as_weight = [use for use in tensor.uses if use.role == "weight"]
    if as_weight:
        return any(_is_factor(sites[use.site], use.shape) for use in as_weight)
    if tensor.uses or not tensor.parameter or sources.intersection(tensor.names):
        return False
    return parameter(graph.model, tensor.names[0]).dim() > 1


def _is_factor(site: Site, shape: Shape) -> bool:
    """Whether the weight of a site is more than the scale of a norm or of an activation."""
    return site.macs > 0 or len(shape) > 1


def _stored(form: StoredForms) -> Weight:
    tensor = form.tensor
    offered = not tensor.as_it_is and all(table.any() for table in form.formatted[: len(form.groups)])
    return Weight(tensor.names[0], tensor.elements, offered, form.stored_bits, form.quantized)


def _computed(space: FormatSpace, group: int) -> Weight:
    site = space.sites[group]
    bits = site.stored_weights * space.bits("weight")[group]
    quantized = space.quantized("weight")[group].astype(np.float64)
    return Weight(
        site.path or site.name,
        site.stored_weights,
        bool(quantized.any()),
        lambda options: bits[options[:, group]],
        lambda options: quantized[options[:, group]],
    )


def _in_float(name: str, elements: int) -> Weight:
    bits = elements * FLOAT_BITS
    return Weight(
        name,
        elements,
        False,
        lambda options: np.full(len(options), bits, dtype=np.int64),
        lambda options: np.zeros(len(options)),
    )


@dataclass(frozen=True, eq=False)
class Products:
    """The multiply-accumulates of a node.

    Attributes:
        group: of the node's site; None if it is no site.
        in_float: how many of them have no factor in a format, under each option; shape (options,).
    """

    node: Node
    group: int | None
    in_float: NDArray[np.float64]


def all_products(space: FormatSpace) -> Iterator[Products]:
    """The multiply-accumulates of every node that has any."""
    groups = {site.name: g for g, site in enumerate(space.sites)}
    for node in space.graph.nodes:
        if not node.macs:
            continue
        g = groups.get(node.name)
        if g is None or not isinstance(node, Site):
            yield Products(node, None, np.array([float(node.macs)]))
            continue
        factors = [({p.weight, p.data}, p.macs) for p in node.products]
        factors = factors or [({spec.name for spec in node.specs if spec.role != "bias"}, node.macs)]
        total = sum(macs for _, macs in factors)
        left = [sum(m for names, m in factors if not names & option.keys()) for option in space.site_formats[g]]
        yield Products(node, g, np.array(left, dtype=np.float64) * (node.macs / max(total, 1)))


class FloatShares(Runner):
    """The shares of the weights and of the multiply-accumulates that candidates leave in float.

    It is no metric of a search: the engine asks it about the results of one.
    """

    side: ClassVar[Side] = "hw_runner"
    closed_form: ClassVar[bool] = True
    produces = (
        Metric("float_weights", "", "minimize", "modelled", "share of the weights that stay in float"),
        Metric("float_macs", "", "minimize", "modelled", "share of the multiply-accumulates without a format"),
    )

    def measure(self, context: EvaluationContext, codes: Codes) -> Mapping[str, Values]:
        """Both shares of each candidate, 0 to 1; 0 for a model without any."""
        space = context.space
        options = space.options(codes)
        weights, macs = np.zeros(len(codes)), np.zeros(len(codes))
        counted = all_weights(space)
        for weight in counted:
            weights += weight.elements * (1.0 - weight.quantized(options))
        for products in all_products(space):
            g = products.group
            macs += products.in_float[0] if g is None else products.in_float[options[:, g]]
        elements = sum(weight.elements for weight in counted)
        total = math.fsum(float(node.macs) for node in space.graph.nodes)
        return {"float_weights": weights / max(elements, 1), "float_macs": macs / max(total, 1.0)}
