"""Whether a captured graph gives the outputs of the model it was captured from: to the last bit, in evaluation and in
training.

A model may do what no trace shows: keep count in a buffer, run under ``no_grad``, draw random numbers in Python. So
nobody believes a graph that was not run beside its model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitfront.graph.baking import private_copy
from bitfront.graph.base import Graph
from bitfront.graph.tracing import install, seeded
from bitfront.operations.lookup import tensors_in

#: Outputs of modules are kept, to say which is the first one that differs, as long as they take no more than this.
KEPT_BYTES = 256 << 20


def check_same(graph: Graph, model: nn.Module, sample: Tensor, *, training: bool = False, seed: int = 0) -> str:
    """What a captured graph computes otherwise than `model`, in words; empty where the bits are the same.

    Args:
        graph: captured from `model`.
        model: the user's model, any mode; it is not changed.
        sample: input samples, shape (samples, *features), on the model's device.
        training: compare in training mode: outputs, buffers afterwards, and gradients (not to the last bit).
        seed: both draw the same random numbers, from this seed.
    """
    return first_difference(private_copy(model), deployed(graph), sample, training=training, seed=seed)


def deployed(graph: Graph) -> nn.Module:
    """What the graph computes, as a module of its own: its GraphModule; the model itself where functions are no
    sites, because nothing is ever rebuilt as a GraphModule then."""
    model = copy.deepcopy(graph.model)
    if graph.fx_graph is None or graph.not_in_training:
        return model
    changed, by_name = copied_graph(graph)
    install(changed, by_name, graph.switches)
    return fx.GraphModule(model, changed).eval()


def copied_graph(graph: Graph) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """(a copy of the traced graph, its nodes by the names that they have in the traced graph)."""
    assert graph.fx_graph is not None
    new, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    new.output(new.graph_copy(graph.fx_graph, mapping))
    return new, {old.name: node for old, node in mapping.items()}


def first_difference(
    model: nn.Module, other: nn.Module, sample: Tensor, *, training: bool = False, seed: int = 0
) -> str:
    """What `other` computes otherwise than `model`, in words; empty where the bits are the same.

    Args:
        model, other: two forms of one network, with the same module paths; their modes and buffers change.
        sample, training, seed: as in ``check_same``.
    """
    one, error = _run(model, sample, training, seed)
    if one is None:
        return "" if training else f"the model fails: {error}"
    two, error = _run(other, sample, training, seed)
    if two is None:
        return f"the captured graph fails{' in training' if training else ''}: {error}"
    mode = " in training" if training else ""
    if not same_bits(one.output, two.output):
        if one.partly:
            return f"the output is another one{mode}"
        for path, outputs in one.outputs.items():
            others = two.outputs.get(path, outputs)
            if len(outputs) != len(others) or not all(map(same_bits, outputs, others)):
                return f"the output of {path} is another one{mode}"
        return f"the output is another one{mode}, and that of every module alone is the same"
    for name, value in one.buffers.items():
        if name in two.buffers and not same_bits(value, two.buffers[name]):
            return f"the buffer {name} is another one afterwards{mode}"
    for name, gradient in one.gradients.items():
        other_gradient = two.gradients.get(name, gradient)
        if (gradient is None) != (other_gradient is None):
            return f"{name} gets {'a' if gradient is None else 'no'} gradient{mode}"
        if gradient is not None and other_gradient is not None and not _near(gradient, other_gradient):
            return f"{name} gets another gradient{mode}"
    return ""


def _near(a: Tensor, b: Tensor) -> bool:
    """Whether two gradients are the same but for the order of sums."""
    return bool((a - b).abs().max() <= 1e-4 * a.abs().max()) if a.numel() else True


@dataclass(frozen=True, eq=False)
class _Outcome:
    """One run of a model: its output, those of its modules by path, its buffers, the gradients of its parameters.

    ``partly``: so many outputs of modules that not all of them were kept.
    """

    output: Tensor
    outputs: Mapping[str, list[Tensor]]
    buffers: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor | None]
    partly: bool = False


def _run(model: nn.Module, sample: Tensor, training: bool, seed: int) -> tuple[_Outcome | None, str]:
    outputs: dict[str, list[Tensor]] = {}
    left = KEPT_BYTES

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, result: Any) -> None:
            nonlocal left
            tensors = list(tensors_in(result))
            left -= sum(t.numel() * t.element_size() for t in tensors)
            if left >= 0:
                outputs.setdefault(path, []).extend(t.detach().clone() for t in tensors)

        return hook

    model.train(training).zero_grad()
    handles = [module.register_forward_hook(keep(path)) for path, module in model.named_modules() if path]
    try:
        with seeded(seed), torch.set_grad_enabled(training):
            output = model(sample.clone())
            if not isinstance(output, Tensor):
                return None, f"it returns {type(output).__name__}"
            if output.requires_grad:
                output.sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    finally:
        for handle in handles:
            handle.remove()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return _Outcome(output.detach(), outputs, dict(model.named_buffers()), gradients, left < 0), ""


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and values; NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(
        torch.equal(a, b)
        or (
            a.is_floating_point()
            and torch.equal(a.nan_to_num(), b.nan_to_num())
            and torch.equal(a.isnan(), b.isnan())
            and torch.equal(a.isinf(), b.isinf())
        )
    )
