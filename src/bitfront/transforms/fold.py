"""Batch norms folded into the layer before them: a new captured model that computes the same with fewer steps.

In evaluation a batch norm multiplies each channel by a number and adds another one, which the layer before it can do:
w' = w · g / sqrt(v + ε), b' = (b − m) · g / sqrt(v + ε) + h, with the norm's mean m, variance v, weight g and bias h
(Jacob et al. 2018, arXiv:1712.05877, section 3.2). The norm becomes an ``nn.Identity``, and a layer without a bias gets
one. Paths of modules stay as they are. Dropouts, which do nothing in evaluation, become identities too.

timm's MobileNets and EfficientNets have modules of a norm and an activation. A trace has their parts, the norm as a
function. What follows the norm in such a module stays.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bitfront.graph import Graph, capture
from bitfront.operations.lookup import hooks, unusual
from bitfront.transforms.correct import is_norm, norms_behind
from bitfront.transforms.equalise import LAYERS, layers_alone

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
#: Batch norms of images that do more: full name of the class → its children that follow the norm, in this order.
_WITH_MORE = {"timm.layers.norm_act.BatchNormAct2d": ("drop", "act")}
#: What such a module asks of its input, which changes no number.
_QUESTIONS = ("ndim", "shape", "dtype", "device")


@dataclass(frozen=True, eq=False)
class Folded:
    """A model without dropouts, and without the batch norms that could be folded.

    Attributes:
        graph: the captured model; that of before where nothing had to be changed.
        into: path of a batch norm → path of the layer that it was folded into.
        dropouts: paths of the dropouts.
        kept: path of a batch norm that is still one → why, in words.
    """

    graph: Graph
    into: dict[str, str]
    dropouts: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)


def folded(graph: Graph, sample: Tensor | None = None, *, dropouts: bool = True, training: bool = False) -> Folded:
    """The graph without dropouts, and with each batch norm folded into the linear layer or convolution before it, where
    that is possible.

    It is possible if the norm is the only reader of the layer, both are called once and share no parameters, and the
    norm keeps running statistics.

    Args:
        graph: a captured model; neither it nor its model is changed.
        sample: two samples, as the model takes them; None: random numbers will do.
        dropouts: whether dropouts go; otherwise they stay.
        training: as in ``capture``.
    """
    into = dict(_pairs(graph))
    kept = _reasons(graph, into)
    gone = tuple(path for path, m in graph.model.named_modules() if isinstance(m, _DROPOUTS) and not hooks(m))
    gone = gone if dropouts else ()
    if not into and not gone:
        return Folded(graph, {}, kept=kept)
    model = copy.deepcopy(graph.model)
    for norm, layer in into.items():
        _fold(model.get_submodule(layer), model.get_submodule(norm))
    for path in (*into, *gone):
        module = model.get_submodule(path)
        _replace(model, module, _left_of(module))
    if sample is None:
        # A capture looks at shapes, and compares its graph with the model: any two samples will do.
        sample = torch.randn(2, *graph.sample_shape, generator=torch.Generator().manual_seed(0))
    return Folded(capture(model, sample, training=training), into, gone, kept)


def _pairs(graph: Graph) -> list[tuple[str, str]]:
    """(path of a batch norm, path of the layer before it)."""
    if graph.fx_graph is None:
        return []
    pairs, readers = [], {node.name: len(node.users) for node in graph.fx_graph.nodes}
    for name, path in layers_alone(graph).items():
        site = graph.site(name)
        norms = norms_behind(graph, site)
        # The channels of a linear layer are the last dimension, those of a norm the first one of a sample.
        if len(norms) == 1 and readers[name] == 1 and (site.op != "linear" or len(site.output) == 1):
            pairs.append((norms[0], path))
        elif not norms and site.op == "conv2d" and (norm := _norm_with_more(graph, name)):
            pairs.append((norm, path))
    return pairs


def _norm_with_more(graph: Graph, layer: str) -> str:
    """Path of the module of ``_WITH_MORE`` that alone computes with a layer's output; empty if none does, or if it has
    hooks, keeps no statistics, or is called again."""
    assert graph.fx_graph is not None
    (node,) = (n for n in graph.fx_graph.nodes if n.name == layer)
    readers = _readers(node)
    path = _norm_of(readers[0]) if len(readers) == 1 and readers[0].args[:1] == (node,) else ""
    if not path or readers[0].name in {s.name for s in graph.sites}:
        return ""
    norm = graph.model.get_submodule(path)
    known = _followers(norm) is not None and not hooks(norm) and bool(getattr(norm, "track_running_stats", False))
    return path if known and len(_calls(graph, norm)) == 1 else ""


def _readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that compute with the output of a node."""
    return [n for n in node.users if not (n.target is getattr and n.args[1] in _QUESTIONS)]


def _norm_of(node: fx.Node) -> str:
    """Path of the module whose running mean a call of the function ``batch_norm`` takes; empty for another node."""
    mean = node.args[1] if node.target is F.batch_norm and len(node.args) > 1 else None
    known = isinstance(mean, fx.Node) and mean.op == "get_attr"
    return str(mean.target).rpartition(".")[0] if known and isinstance(mean, fx.Node) else ""


def _calls(graph: Graph, norm: nn.Module) -> list[fx.Node]:
    """The nodes that call a norm, as a module or as a function."""
    assert graph.fx_graph is not None
    paths = {n: str(n.target) if n.op == "call_module" else _norm_of(n) for n in graph.fx_graph.nodes}
    return [n for n, path in paths.items() if path and graph.model.get_submodule(path) is norm]


def _followers(norm: nn.Module) -> tuple[str, ...] | None:
    """Names of the children that follow the norm in a module of ``_WITH_MORE``; None for any other module."""
    kind = type(norm)
    return None if "forward" in vars(norm) else _WITH_MORE.get(f"{kind.__module__}.{kind.__qualname__}")


def _left_of(module: nn.Module) -> nn.Module:
    """What takes the place of a folded norm, or of a dropout."""
    names = _followers(module)
    return nn.Identity() if names is None else nn.Sequential(OrderedDict((n, module.get_submodule(n)) for n in names))


def _reasons(graph: Graph, into: Collection[str]) -> dict[str, str]:
    """Path of a batch norm that is not folded → why."""
    norms = {path: m for path, m in graph.model.named_modules() if isinstance(m, _BatchNorm) and path not in into}
    return {path: _reason(graph, norm) for path, norm in norms.items()}


def _reason(graph: Graph, norm: _BatchNorm) -> str:
    """Why a batch norm is not folded."""
    if graph.fx_graph is None:
        return "the model cannot be traced"
    if beside := hooks(norm):
        return beside
    if not norm.track_running_stats:
        return "it keeps no running statistics"
    if not is_norm(norm) and _followers(norm) is None:
        return unusual(norm) or f"{type(norm).__name__} is not a batch norm of torch.nn"
    calls = _calls(graph, norm)
    if len(calls) != 1:
        return "it is called several times" if calls else "the model does not call it"
    source = calls[0].all_input_nodes[0]
    site = next((s for s in graph.sites if s.name == source.name), None)
    if site is None or site.op not in LAYERS or not site.path:
        return f"it follows {_title(graph, source)}, and not a linear layer or a convolution of a fixed weight"
    if len(_readers(source)) > 1:
        return f"others read the output of {site.path} too"
    if source.name not in layers_alone(graph):
        return f"{site.path} is called several times, shares its parameters, or has a hook"
    return f"the channels of {site.path} are another dimension than those of the norm"


def _title(graph: Graph, node: fx.Node) -> str:
    """What users know a node by."""
    if node.op == "placeholder":
        return "the input"
    if node.op == "call_module":
        return f"{node.target} ({type(graph.model.get_submodule(str(node.target))).__name__})"
    return node.name


def _fold(layer: Any, norm: Any) -> None:
    with torch.no_grad():
        weight = layer.weight.double()
        ones = torch.ones(len(weight), dtype=torch.float64)
        scale = (ones if norm.weight is None else norm.weight.double()) / (norm.running_var.double() + norm.eps).sqrt()
        before = 0 * ones if layer.bias is None else layer.bias.double()
        shift = 0 * ones if norm.bias is None else norm.bias.double()
        bias = (before - norm.running_mean.double()) * scale + shift
        weight = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
        kind, trained = layer.weight.dtype, layer.weight.requires_grad
    layer.weight = nn.Parameter(weight.to(kind), requires_grad=trained)
    layer.bias = nn.Parameter(bias.to(kind), requires_grad=trained)


def _replace(model: nn.Module, gone: nn.Module, left: nn.Module) -> None:
    """Put a module in the place of another one, under all its names."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if child is gone:
                setattr(module, name, left)
