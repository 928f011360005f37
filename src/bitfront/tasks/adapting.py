"""A user's model as everything here calls it: with one tensor, for one tensor.

A model may take several inputs by name, and may return a tuple, a mapping or an object such as the ``ModelOutput`` of
transformers. A copy of it gets hooks, which hand it the inputs that a row of the data holds, and pick the output that
the task is about. Hooks are traced, copied and sent to other processes with the model, so no other part knows of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitfront.data.packing import PackedInput
from bitfront.errors import CaptureError, ConfigError, nearest, one_of
from bitfront.graph.baking import private_copy, untouched

#: Names of the output that a task is about, where a model returns several and the settings do not say which.
USUAL = ("logits", "out", "output", "prediction")


@dataclass(frozen=True)
class Unpacked:
    """A hook that hands a model its inputs by name. Called in another way than with packed rows, it is as ever."""

    inputs: tuple[PackedInput, ...]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ARG002
        """The arguments of the model."""
        if kwargs or len(args) != 1:
            return None
        (given,) = args
        if isinstance(given, Mapping):
            return (), dict(given)
        return (), {one.name: one.unpacked(given) for one in self.inputs}


@dataclass(frozen=True)
class Picked:
    """A hook that picks one of several outputs."""

    key: str | int

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG002
        """The output."""
        return _part(output, self.key)


@dataclass(frozen=True)
class AsColumn:
    """A hook that gives one number per sample an axis of outputs: (samples,) becomes (samples, 1)."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG002
        """The output."""
        return output.unsqueeze(1)


def adapted(
    model: nn.Module, sample: Tensor, inputs: Sequence[PackedInput] = (), output: str | int | None = None
) -> nn.Module:
    """A copy of `model` that takes one tensor and returns one; `model` itself where it does already.

    Args:
        model: the user's model, on the CPU; it is not changed.
        sample: two or more samples, as the data has them.
        inputs: what a row of the data holds; empty if it is the model's input.
        output: which output the task is about, if the model returns several: a key or a place.

    Raises:
        CaptureError: the model fails on its inputs, or returns no tensor.
        ConfigError: `output` is none of its outputs, or there are several and it is not given.
    """
    copied = private_copy(model)
    if inputs:
        copied.register_forward_pre_hook(Unpacked(tuple(inputs)), with_kwargs=True)
    modes = [(module, module.training) for module in copied.modules()]
    try:
        with torch.no_grad(), untouched(copied):
            given = copied.eval()(sample.clone())
    except Exception as error:
        if not inputs:
            return model  # capture says what is wrong
        shapes = ", ".join(f"{i.name} {tuple(i.unpacked(sample).shape)} {i.dtype}" for i in inputs)
        raise CaptureError(f"the model fails on its inputs {shapes}: {type(error).__name__}: {error}") from error
    for module, training in modes:
        module.training = training
    if not isinstance(given, Tensor):
        key = _chosen(given, len(sample), output)
        copied.register_forward_hook(Picked(key))
        given = _part(given, key)
    elif output is not None:
        raise ConfigError("the model returns one tensor; remove this key", key=("task_settings", "output"))
    elif not inputs and given.ndim != 1:
        return model
    if given.ndim == 1 and len(given) == len(sample):
        copied.register_forward_hook(AsColumn())
    return copied


def _part(output: Any, key: str | int) -> Any:
    if isinstance(output, Mapping | tuple | list):
        return output[key]  # type: ignore[index]
    return getattr(output, str(key))


def _chosen(given: object, samples: int, output: str | int | None) -> str | int:
    """The key of the output that the task is about."""
    names: list[Any]
    if isinstance(given, Mapping):
        names = list(given)
    elif isinstance(given, tuple | list):
        names = list(range(len(given)))
    else:
        names = [name for name in getattr(given, "__dict__", {}) if not name.startswith("_")]
    known = [n for n in names if isinstance(part := _part(given, n), Tensor) and part.ndim and len(part) == samples]
    if not known:
        raise CaptureError(f"the model returns a {type(given).__name__} without a tensor that has a row per sample")
    if output is not None:
        if output not in known:
            hint = nearest(str(output), list(map(str, known)))
            raise ConfigError(
                f"the model has no output {output!r}; {one_of(map(str, known))}.{hint}", key=("task_settings", "output")
            )
        return output
    usual = [name for name in USUAL if name in known]
    if len(known) == 1 or usual:
        chosen: str | int = usual[0] if usual else known[0]
        return chosen
    raise ConfigError(
        f"the model returns several outputs ({', '.join(map(str, known))}); say which one the task is about with "
        f"output = {known[0]!r} in [task_settings]",
        key=("task_settings", "output"),
    )
