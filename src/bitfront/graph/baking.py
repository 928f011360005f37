"""Copies of a user's model; in the copy, weights that are computed from other parameters become plain parameters.

``torch.nn.utils`` computes a weight from others in two ways: parametrizations (``weight_norm``, ``spectral_norm``, any
of the user's), and the older hooks (``weight_norm``, ``spectral_norm``, masks of ``prune``). In evaluation such a
weight is a constant. What is deployed is that constant, so it is what gets a format.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm


def private_copy(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model that holds tensors with a history, as hooks leave them after a step of training."""
    memo: dict[int, object] = {}
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Afterwards the modules of `model` have the attributes and the buffers that they had before, so that a counter has
    not counted what was tried out."""
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):  # what was not written may be expanded: it cannot be
                    buffer.copy_(value)
        for module, attributes, buffers in before:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def has_computed_weights(model: nn.Module) -> bool:
    """Whether ``bake`` would look at anything."""
    return any(True for module in model.modules() for _ in _computed(module))


def bake(model: nn.Module) -> tuple[str, ...]:
    """Make parameters of the computed weights of `model`, a private copy in evaluation mode.

    Those of a module one of which is not the same when it is computed twice stay as they are.

    Returns:
        What became a parameter, each as "path.weight (weight_norm)".
    """
    with torch.no_grad():
        found = [
            (path, module, name, how, compute())
            for path, module in model.named_modules()
            if all(torch.equal(compute(), compute()) for _, _, compute in _computed(module))
            for name, how, compute in _computed(module)
        ]
        # Two weights may be computed from one parameter: all are computed before the first one is replaced.
        for _, module, name, _, value in found:
            trained = any(p.requires_grad for p in module.parameters())
            if parametrize.is_parametrized(module):
                _unparametrize(module)
            elif f"{name}_orig" in module._parameters or f"{name}_g" in module._parameters:
                _remove_hook(module, name)
            setattr(module, name, nn.Parameter(value.detach().clone(), requires_grad=trained))
    return tuple(f"{path + '.' if path else ''}{name} ({how})" for path, _, name, how, _ in found)


def _computed(module: nn.Module) -> Iterator[tuple[str, str, Callable[[], Tensor]]]:
    """(name, by what, how to compute it) of each tensor of a module that is computed from its parameters."""
    if parametrize.is_parametrized(module):
        for name, chain in cast("Mapping[str, Iterable[nn.Module]]", module.parametrizations).items():
            kinds = ", ".join(type(each).__name__.lstrip("_") for each in chain)
            yield name, kinds, partial(getattr, module, name)
    for hook in cast("Iterable[Any]", module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            yield hook.name, "weight_norm", partial(hook.compute_weight, module)
        elif isinstance(hook, SpectralNorm):
            yield hook.name, "spectral_norm", partial(hook.compute_weight, module, False)
        elif isinstance(hook, prune.BasePruningMethod):
            yield hook._tensor_name, "prune", partial(hook.apply_mask, module)


def _unparametrize(module: nn.Module) -> None:
    # What torch offers for this takes properties off the class, which a copy shares with the user's module.
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]


def _remove_hook(module: nn.Module, name: str) -> None:
    if prune.is_pruned(module):
        prune.remove(module, name)  # type: ignore[no-untyped-call]
    elif f"{name}_g" in module._parameters:
        remove_weight_norm(module, name)
    else:
        remove_spectral_norm(module, name)
        # torch leaves this one, and no state dict could be loaded any more.
        left = module._load_state_dict_pre_hooks
        for key, hook in list(left.items()):
            if isinstance(getattr(hook, "hook", hook), SpectralNormLoadStateDictPreHook):
                del left[key]
