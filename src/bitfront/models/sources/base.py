"""What a source of models is: it builds models by name, and says what they need of their samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from bitfront.errors import ConfigError
from bitfront.preparation import Preparation


@dataclass(frozen=True)
class ModelRequest:
    """Which model is wanted.

    Attributes:
        sample_shape: of one sample; input → shape where a model has several.
        num_classes: number of outputs, 1 or more; 0 if it is not known: then as many as the library's weights have.
        weights: whether with the library's weights. Layers that do not fit `num_classes` keep their initial ones.
    """

    sample_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]]
    num_classes: int
    weights: bool = False

    def image_shape(self, model: str) -> tuple[int, int, int]:
        """(channels, height, width) of a sample. Raises ConfigError where samples are no images."""
        shape = self.sample_shape
        if isinstance(shape, Mapping) or len(shape) != 3:
            given = dict(shape) if isinstance(shape, Mapping) else tuple(shape)
            raise ConfigError(
                f"model {model!r} takes images, of shape (channels, height, width); the samples of this dataset have "
                f"shape {given}. Name a dataset of images, such as a folder of images or torchvision:CIFAR10",
                key=("model",),
            )
        return shape[0], shape[1], shape[2]


class ModelSource(ABC):
    """Builds models of a library.

    **What it does.** ``needs`` says what a model needs of its samples, without its weights and without a network where
    the library knows it. ``build`` makes the model: the same layers for the same request, with initial weights from
    PyTorch's CPU generator, which is seeded before the call, or with the library's weights.

    **What it may not do.** Run code that comes with weights, or evaluate a part of the name.
    """

    @abstractmethod
    def needs(self, name: str) -> Preparation:
        """What the model called `name` needs of its samples.

        Raises:
            UnknownNameError: the library has no such model; the message lists near names.
            MissingExtraError: the library is not installed.
        """

    @abstractmethod
    def build(self, name: str, request: ModelRequest) -> nn.Module:
        """The model called `name`.

        Raises:
            UnknownNameError: the library has no such model; the message lists near names.
            ConfigError: it does not fit the samples.
            CheckpointError: its weights are neither in the library's cache nor can be downloaded; says what to do.
            MissingExtraError: the library is not installed.
        """


def fitting(state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The entries of a state dict that `model` has in the same shape: all but those of another classifier."""
    wanted = model.state_dict()
    return {key: value for key, value in state.items() if key in wanted and value.shape == wanted[key].shape}
