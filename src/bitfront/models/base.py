"""From a model's name, or from ``package.module:factory``, to an initialised ``nn.Module``.

The initial weights depend on the seed alone: neither on what drew random numbers before, nor does building a
model change what is drawn after.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from bitfront.errors import BitfrontError, ConfigError
from bitfront.models import MODELS
from bitfront.registry import import_object

_OFFERED = ("sample_shape", "num_classes")


def build(name: str, sample_shape: tuple[int, ...], num_classes: int, seed: int) -> nn.Module:
    """The model called `name`, freshly initialised from `seed`, on the CPU, in float32.

    Args:
        name: a registered name (``"jsc-tiny"``), or ``"package.module:factory"`` for the user's own: a
            function or an ``nn.Module`` class. It is given `sample_shape` and `num_classes`, by keyword where
            it has parameters of these names, by position where it requires two others; and nothing where it
            requires nothing. The working directory is importable.
        sample_shape: shape of one sample, without the batch dimension.
        num_classes: number of outputs.

    Raises:
        UnknownNameError: no model is registered under `name`.
        ConfigError: the factory cannot be imported or called, returns something else than an ``nn.Module``,
            or the model does not take samples of this shape.
    """
    factory = _imported_factory(name) if ":" in name else MODELS.get(name)
    return initialised(factory, sample_shape, num_classes, seed, name)


def initialised(
    factory: Callable[[tuple[int, ...], int], nn.Module],
    sample_shape: tuple[int, ...],
    num_classes: int,
    seed: int,
    name: str,
) -> nn.Module:
    """What `factory` makes under `seed`, with PyTorch's global random state left as it was.

    Raises:
        ConfigError: it raised, or made something else than an ``nn.Module``; `name` stands in the message.
    """
    # The CPU's own generator is seeded, not torch.manual_seed, which would also reseed every GPU.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        try:
            model: object = factory(tuple(sample_shape), num_classes)
        except BitfrontError:
            raise
        except Exception as error:
            raise ConfigError(
                f"model {name!r} could not be built for samples of shape {tuple(sample_shape)} and "
                f"{num_classes} classes: it raised {type(error).__name__}: {error}",
                key=("model",),
            ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model {name!r} made a {type(model).__name__}, but a torch.nn.Module is needed; "
            "does the factory return the model?",
            key=("model",),
        )
    return model.to(device="cpu", dtype=torch.float32)


def _imported_factory(spec: str) -> Callable[[tuple[int, ...], int], nn.Module]:
    factory = import_object(spec, "model")
    if isinstance(factory, nn.Module):
        raise ConfigError(
            f"model {spec!r} is a finished model, so its initial weights cannot follow the seed; name its "
            "class, or a function that returns a new model",
            key=("model",),
        )
    if not callable(factory):
        raise ConfigError(
            f"model {spec!r} is a {type(factory).__name__}; name an nn.Module class or a function that returns one",
            key=("model",),
        )
    call: Callable[..., Any] = factory

    def made(sample_shape: tuple[int, ...], num_classes: int) -> Any:
        args, kwargs = _arguments(spec, call, sample_shape, num_classes)
        return call(*args, **kwargs)

    return made


def _arguments(
    spec: str, call: Callable[..., Any], sample_shape: tuple[int, ...], num_classes: int
) -> tuple[tuple[object, ...], Mapping[str, object]]:
    parameters = inspect.signature(call).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p for p in parameters if p.default is p.empty and p.kind not in variadic]
    offered = dict(zip(_OFFERED, (sample_shape, num_classes), strict=True))
    named = {p.name: offered[p.name] for p in parameters if p.name in offered and p.kind not in variadic}
    if all(p.name in named and p.kind is not inspect.Parameter.POSITIONAL_ONLY for p in required):
        return (), named
    if len(required) == 2 and all(p.kind in positional for p in required):
        return tuple(offered.values()), {}
    raise ConfigError(
        f"model {spec!r} requires ({', '.join(p.name for p in required)}); Bitfront gives it (sample_shape, "
        "num_classes), or nothing if it requires nothing. Write a small function that takes these and returns the "
        "model.",
        key=("model",),
    )
