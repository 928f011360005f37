"""Models of timm: image classifiers, with or without their weights from the Hugging Face hub."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, cast

from torch import nn

from bitfront import libraries
from bitfront.errors import BitfrontError, CheckpointError, UnknownNameError, one_of, require
from bitfront.models.sources import SOURCES
from bitfront.models.sources.base import ModelRequest, ModelSource
from bitfront.preparation import Interpolation, Preparation


@SOURCES.register("timm")
class Timm(ModelSource):
    """an image classifier of timm, e.g. timm:mobilenetv3_small_100 (extra timm)"""

    def needs(self, name: str) -> Preparation:
        """Size, crop, mean and std of its ``data_config``."""
        library = _library(name)
        of_model = require("timm.data", "timm", f"model = 'timm:{name}'").resolve_data_config(
            pretrained_cfg=_known(library, name).to_dict()
        )
        _, height, width = of_model["input_size"]
        kind = of_model["interpolation"]
        return Preparation(
            origin=f"timm's {name}",
            size=(height, width),
            shorter=math.floor(min(height, width) / of_model["crop_pct"]),
            channels=of_model["input_size"][0],
            mean=tuple(of_model["mean"]),
            std=tuple(of_model["std"]),
            interpolation=cast(Interpolation, kind) if kind in ("nearest", "bilinear", "bicubic") else "bilinear",
            num_classes=_known(library, name).num_classes,
        )

    def build(self, name: str, request: ModelRequest) -> nn.Module:
        """``timm.create_model``, for the images of the data."""
        library = _library(name)
        known = _known(library, name)
        channels, height, width = request.image_shape(f"timm:{name}")
        settings: dict[str, Any] = {"num_classes": request.num_classes or known.num_classes, "in_chans": channels}
        if known.fixed_input_size and (height, width) != tuple(known.input_size[1:]):
            settings["img_size"] = (height, width)
        if request.weights and (file := _cached(known)):
            # From the cache without a question to the hub, which takes long where there is no network.
            settings["pretrained_cfg_overlay"] = {"file": file}
        try:
            with libraries.without_output():
                model: nn.Module = library.create_model(name, pretrained=request.weights, **settings)
        except BitfrontError:
            raise
        except Exception as error:
            if not request.weights or isinstance(error, TypeError | AssertionError):
                raise  # about the shape of samples
            remedy = (
                f"run `python -c \"import timm; timm.create_model('{name}', pretrained=True)\"` on a machine with one "
                "and copy that folder here (HF_HOME names it); or give a file of weights as load_name; or leave "
                "weights = true out, and the model is trained from its initial weights"
            )
            raise CheckpointError(
                libraries.offline(f"the weights of timm:{name}", f"the cache {_cache()}", error, remedy)
            ) from error
        return model


def _library(name: str) -> ModuleType:
    purpose = f"model = 'timm:{name}'"
    libraries.torchvision(purpose, extra="timm")  # timm imports it
    return require("timm", "timm", purpose)


def _known(library: ModuleType, name: str) -> Any:
    """The ``PretrainedCfg`` of a model. Raises UnknownNameError."""
    architecture, _, tag = name.partition(".")
    if not library.is_model(architecture):
        hint = libraries.near(architecture, library.list_models(), "timm.list_models()")
        raise UnknownNameError(f"timm has no model {name!r}.{hint}", key=("model",))
    tags = [n.partition(".")[2] for n in library.list_pretrained(f"{architecture}.*")] if tag else []
    if tag and tag not in tags:
        raise UnknownNameError(
            f"timm's {architecture} has no weights called {tag!r}; {one_of(tags or ['none'])}", key=("model",)
        )
    return library.get_pretrained_cfg(name)


def _cached(known: Any) -> str:
    """The file of a model's weights in the cache of the hub, as safetensors; empty if it is not there."""
    if not known.hf_hub_id:
        return ""
    hub = require("huggingface_hub", "timm", "the weights of timm")
    file = hub.try_to_load_from_cache(known.hf_hub_id, known.hf_hub_filename or "model.safetensors")
    return file if isinstance(file, str) and file.endswith(".safetensors") else ""


def _cache() -> str:
    constants = require("huggingface_hub.constants", "timm", "the weights of timm")
    return str(constants.HF_HUB_CACHE)
