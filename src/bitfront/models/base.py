"""From a model's name, or from ``package.module:factory``, to an initialised ``nn.Module``.

The initial weights depend on the seed alone, not on random numbers drawn before. Building a model does not change the
random numbers drawn after it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from bitfront.errors import BitfrontError, ConfigError, UnknownNameError, UserError, nearest
from bitfront.models import MODELS
from bitfront.models.sources import SOURCES, source_of
from bitfront.models.sources.base import ModelRequest
from bitfront.preparation import Preparation
from bitfront.registry import import_object

#: Of one sample; where a model has several inputs, input → shape of one sample.
SampleShape = tuple[int, ...] | Mapping[str, tuple[int, ...]]
_FACTORY_ARGUMENTS = ("sample_shape", "num_classes")


def build_model(
    name: str, sample_shape: SampleShape, num_classes: int, seed: int, *, weights: bool = False
) -> nn.Module:
    """The model called `name`, initialised from `seed`, on the CPU, in float32.

    Args:
        name: a registered name (``"jsc-tiny"``); a model of a library (``"timm:resnet18"``), whose prefix is among
            ``models.sources.SOURCES``; or ``"package.module:factory"`` for the user's model: a
            function or an ``nn.Module`` class. It is called with `sample_shape` and `num_classes`: by keyword
            if its parameters have these names, by position if it requires two others, and without arguments
            if it requires none. The working directory is importable.
        sample_shape: shape of one sample, without the batch dimension.
        num_classes: number of outputs; 0 if it is not known, which is an error where the factory asks for it.
        seed: random seed of the initial weights.
        weights: whether with the weights of the library, for a model of one.

    Raises:
        UnknownNameError: no model is registered under `name`, or the library has none of this name.
        CheckpointError: the weights of the library are neither in its cache nor can be downloaded.
        MissingExtraError: the library is not installed.
        ConfigError: the factory cannot be imported or called, returns something else than an ``nn.Module``,
            or the model does not take samples of this shape.
    """
    found = source_of(name)
    if weights and found is None:
        raise ConfigError(
            f"weights = true is for a model of a library ({', '.join(f'{p}:NAME' for p in SOURCES.names())}), and "
            f"{name!r} is none; name a checkpoint with load_name",
            key=("weights",),
        )
    if found is not None:
        source, rest = found
        factory: Callable[[Any, int], nn.Module] = lambda shape, classes: source.build(  # noqa: E731
            rest, ModelRequest(shape, classes, weights)
        )
        if not weights:
            _check_outputs(name, num_classes)
    elif ":" in name:
        factory = _imported_factory(name)
    else:
        _check_outputs(name, num_classes)
        factory = _registered(name)
    return build_from_factory(factory, sample_shape, num_classes, seed, name)


def needs_of(name: str) -> Preparation | None:
    """What a model of a library needs of its samples; None for other models. Raises like ``ModelSource.needs``."""
    found = source_of(name)
    return None if found is None else found[0].needs(found[1])


def build_from_factory(
    factory: Callable[[Any, int], nn.Module],
    sample_shape: SampleShape,
    num_classes: int,
    seed: int,
    name: str,
) -> nn.Module:
    """The model that `factory` returns under `seed`. PyTorch's global random state stays as it is.

    Raises:
        ConfigError: the factory failed, or returned something else than an ``nn.Module``; the message calls
            the model `name`.
    """
    shape = dict(sample_shape) if isinstance(sample_shape, Mapping) else tuple(sample_shape)
    # Not torch.manual_seed, which would also seed every GPU.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        try:
            model: object = factory(shape, num_classes)
        except BitfrontError:
            raise
        except Exception as error:
            raise ConfigError(
                f"model {name!r} could not be built for samples of shape {shape} and "
                f"{num_classes} classes: it raised {type(error).__name__}: {error}",
                key=("model",),
            ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model {name!r}: the factory returned a {type(model).__name__}, but a torch.nn.Module is needed; does it "
            "return the model?",
            key=("model",),
        )
    model = model.to(device="cpu", dtype=torch.float32)
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        _give_shapes(model, sample_shape, seed, name)
    return model


def _registered(name: str) -> Callable[[Any, int], nn.Module]:
    """The registered model of that name. Raises UnknownNameError."""
    try:
        return MODELS.get(name)
    except UnknownNameError as error:
        if not nearest(name, MODELS.names()):
            prefixed = " or ".join(f"{prefix}:{name}" for prefix in SOURCES.names())
            error.message += f" For a model of a library write its prefix too: {prefixed}"
        raise


def models_with(layers: Collection[str], sample_shape: tuple[int, ...], num_classes: int) -> list[str]:
    """Names of the registered models for such samples in which all of `layers`, by fx name or path, have weights."""
    names = []
    for name in MODELS.names():
        weighted = weighted_layers(name, sample_shape, num_classes)
        if {layer.replace("_", ".") for layer in layers} <= {path.replace("_", ".") for path in weighted}:
            names.append(name)
    return names


def weighted_layers(name: str, sample_shape: tuple[int, ...], num_classes: int) -> dict[str, type[nn.Module]]:
    """Path → type of the layers with weights of a registered model, in its order; empty if it is for other samples, or
    cannot be made without weights."""
    try:
        with torch.device("meta"):
            model = MODELS.get(name)(sample_shape, num_classes)
    except (UserError, NotImplementedError):
        return {}
    return {path: type(module) for path, module in model.named_modules() if hasattr(module, "weight")}


def _check_outputs(name: str, num_classes: int) -> None:
    """Raises ConfigError where the number of outputs that a model is made for is not known."""
    if num_classes < 1:
        raise ConfigError(
            f"model {name!r} is made for a number of outputs, and data without labels does not say how many; set "
            "num_outputs in [task_settings]",
            key=("task_settings", "num_outputs"),
        )


def _give_shapes(model: nn.Module, sample_shape: SampleShape, seed: int, name: str) -> None:
    """Call a model with layers such as LazyLinear once, so that they get their weights, from the seed."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        try:
            model.eval()(torch.zeros(2, *sample_shape))
        except Exception as error:
            raise ConfigError(
                f"model {name!r} has lazy layers, and fails on an input of shape {(2, *sample_shape)}: "
                f"{type(error).__name__}: {error}",
                key=("model",),
            ) from error
    model.train()


def _imported_factory(spec: str) -> Callable[[Any, int], nn.Module]:
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

    def build(sample_shape: SampleShape, num_classes: int) -> Any:
        args, kwargs = _arguments(spec, call, sample_shape, num_classes)
        return call(*args, **kwargs)

    return build


def _arguments(
    spec: str, call: Callable[..., Any], sample_shape: SampleShape, num_classes: int
) -> tuple[tuple[object, ...], Mapping[str, object]]:
    """Positional and keyword arguments for the user's factory `call`, by its signature."""
    parameters = inspect.signature(call).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p for p in parameters if p.default is p.empty and p.kind not in variadic]
    values = dict(zip(_FACTORY_ARGUMENTS, (sample_shape, num_classes), strict=True))
    named = {p.name: values[p.name] for p in parameters if p.name in values and p.kind not in variadic}
    if "num_classes" in named or len(required) == 2:
        _check_outputs(spec, num_classes)
    if all(p.name in named and p.kind is not inspect.Parameter.POSITIONAL_ONLY for p in required):
        return (), named
    if len(required) == 2 and all(p.kind in positional for p in required):
        return tuple(values.values()), {}
    raise ConfigError(
        f"model {spec!r} requires ({', '.join(p.name for p in required)}), but Bitfront calls it with (sample_shape, "
        "num_classes), or without arguments if it requires none. Write a function that takes these two and returns "
        "the model.",
        key=("model",),
    )
