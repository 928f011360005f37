"""Models of torchvision: classifiers and segmentation networks, with or without their weights from pytorch.org."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from bitfront import libraries
from bitfront.errors import CheckpointError, UnknownNameError
from bitfront.models.sources import SOURCES
from bitfront.models.sources.base import ModelRequest, ModelSource, fitting
from bitfront.preparation import Interpolation, Preparation

#: Networks whose second classifier, for training alone, would be a second output.
_WITH_AUXILIARY = ("googlenet", "inception_v3")


@SOURCES.register("torchvision")
class Torchvision(ModelSource):
    """an image classifier or segmentation network of torchvision, e.g. torchvision:resnet18 (extra torchvision)"""

    def needs(self, name: str) -> Preparation:
        """Size, crop, mean and std of the transforms of its default weights."""
        models = _models(name)
        weights = models.get_model_weights(name).DEFAULT
        transforms = weights.transforms()
        crop, shorter = getattr(transforms, "crop_size", None), transforms.resize_size[0]
        kind = transforms.interpolation.value
        return Preparation(
            origin=f"torchvision's {name}",
            size=(shorter, shorter) if crop is None else (crop[0], crop[0]),
            shorter=shorter,
            mean=tuple(transforms.mean),
            std=tuple(transforms.std),
            interpolation=cast(Interpolation, kind) if kind in ("nearest", "bilinear", "bicubic") else "bilinear",
            num_classes=len(weights.meta["categories"]),
        )

    def build(self, name: str, request: ModelRequest) -> nn.Module:
        """``torchvision.models.get_model``, for the classes of the data."""
        models = _models(name)
        request.image_shape(f"torchvision:{name}")
        known = models.get_model_weights(name).DEFAULT
        settings: dict[str, Any] = {"num_classes": request.num_classes or len(known.meta["categories"])}
        if name in models.list_models(module=models.segmentation):
            settings |= (
                {"weights_backbone": None, "aux_loss": False} if "lraspp" not in name else {"weights_backbone": None}
            )
        if name in _WITH_AUXILIARY:
            settings |= {"aux_logits": False, "init_weights": True, "transform_input": request.weights}
        model: nn.Module = models.get_model(name, weights=None, **settings)
        if request.weights:
            state = fitting(_state(name, known), model)
            model.load_state_dict({**model.state_dict(), **state})
        return model


def _models(name: str) -> ModuleType:
    """``torchvision.models``. Raises UnknownNameError where it has no such classifier or segmentation network."""
    models = libraries.torchvision(f"model = 'torchvision:{name}'", "torchvision.models")
    known = [*models.list_models(module=models), *models.list_models(module=models.segmentation)]
    if name not in known:
        hint = libraries.near(name, known, "torchvision.models.list_models()")
        raise UnknownNameError(f"torchvision has no classifier or segmentation network {name!r}.{hint}", key=("model",))
    return models


def _state(name: str, known: Any) -> dict[str, Any]:
    """The state dict of a model's weights, from torch's cache, or downloaded into it and compared with its checksum."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / known.url.rpartition("/")[2]
    try:
        with libraries.without_output():
            state: dict[str, Any] = known.get_state_dict(
                progress=False, check_hash=True, weights_only=True, map_location="cpu"
            )
    except Exception as error:
        remedy = (
            f"download {known.url} on another machine and put it at {file} (TORCH_HOME names another folder); or give "
            "a file of weights as load_name; or leave weights = true out, and the model is trained from its initial "
            "weights"
        )
        raise CheckpointError(
            libraries.offline(f"the weights of torchvision:{name}", f"{file.parent}", error, remedy)
        ) from error
    return state
