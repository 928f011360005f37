"""Models of transformers: classifiers and regressions of texts or images, from the hub, its cache, or a folder.

Code that comes with a model is never run: ``trust_remote_code`` stays off, and a model that needs it is refused.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from torch import nn

from bitfront import libraries
from bitfront.errors import (
    BitfrontError,
    CheckpointError,
    ConfigError,
    MissingExtraError,
    UnknownNameError,
    cause,
    nearest,
    require,
)
from bitfront.models.sources import SOURCES
from bitfront.models.sources.base import ModelRequest, ModelSource
from bitfront.preparation import Preparation

TEXTS, IMAGES = "AutoModelForSequenceClassification", "AutoModelForImageClassification"


@SOURCES.register("hf")
class HuggingFace(ModelSource):
    """a classifier of texts or images of transformers, e.g. hf:prajjwal1/bert-tiny, or hf:./mine (extra hf)"""

    def needs(self, name: str) -> Preparation:
        """The tokenizer of a model of texts; size, mean and std of the image processor of one of images."""
        library = _library(name)
        found = _config(library, name)
        origin = f"{name} of transformers"
        classes = found.num_labels if _has_classifier(found) else None
        if _kind(library, name, found) == TEXTS:
            return Preparation(origin, tokenizer=name, num_classes=classes)
        settings = _image_processor(name)
        size: Any = settings.get("crop_size") or settings.get("size") or getattr(found, "image_size", 224)
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge") or 224
        height = size[0] if isinstance(size, list | tuple) else int(size)
        shortest = settings.get("size")
        shorter = shortest.get("shortest_edge") if isinstance(shortest, dict) else None
        return Preparation(
            origin,
            size=(height, height),
            shorter=shorter or height,
            channels=getattr(found, "num_channels", 3),
            mean=tuple(settings.get("image_mean") or ()),
            std=tuple(settings.get("image_std") or ()),
            num_classes=classes,
        )

    def build(self, name: str, request: ModelRequest) -> nn.Module:
        """``AutoModelForSequenceClassification`` or ``AutoModelForImageClassification``."""
        library = _library(name)
        found = _config(library, name)
        kind = _kind(library, name, found)
        self._check(name, kind, request)
        # The configuration of the checkpoint: a number of labels that differs makes a new classifier.
        found.num_labels = request.num_classes or found.num_labels
        auto = getattr(library, kind)
        if not request.weights:
            model: nn.Module = auto.from_config(found, trust_remote_code=False)
            return model
        settings = {"config": found, "trust_remote_code": False, "ignore_mismatched_sizes": True}
        try:
            loaded: nn.Module = _cache_first(auto, name, **settings)
        except Exception as error:
            raise CheckpointError(_offline(f"the weights of hf:{name}", name, error)) from error
        return loaded.float()

    def _check(self, name: str, kind: str, request: ModelRequest) -> None:
        """Raises ConfigError where the samples are no texts, or no images."""
        if kind == IMAGES:
            request.image_shape(f"hf:{name}")
        elif isinstance(request.sample_shape, tuple) or "input_ids" not in request.sample_shape:
            raise ConfigError(
                f"model 'hf:{name}' takes texts as ids of tokens, and the samples of this dataset have shape "
                f"{request.sample_shape}. Name a dataset of texts, such as hf:ag_news or a CSV file with a column of "
                "texts, or one with input_ids and attention_mask",
                key=("model",),
            )


def _library(name: str) -> Any:
    purpose = f"model = 'hf:{name}'"
    with contextlib.suppress(MissingExtraError):
        libraries.torchvision(purpose)  # transformers imports it where it is installed
    return require("transformers", "hf", purpose)


def _place(name: str) -> str:
    """A folder as its path, and a name of the hub as it is. Raises UnknownNameError where there is no such folder."""
    if not name.startswith((".", "/", "~")):
        return name
    path = Path(name).expanduser()
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise UnknownNameError(f"there is no folder {name}.{nearest(path.name, siblings)}", key=("model",))
    return str(path.absolute())


def _cache_first(kind: Any, name: str, **settings: Any) -> Any:
    """What ``kind.from_pretrained`` gives: of the files in the cache if they are there, else downloaded."""
    place = _place(name)
    with libraries.without_output():
        try:
            return kind.from_pretrained(place, local_files_only=True, **settings)
        except OSError:
            return kind.from_pretrained(place, **settings)


def _config(library: Any, name: str) -> Any:
    """The ``PretrainedConfig`` of a model. Raises UnknownNameError or ConfigError."""
    try:
        return _cache_first(library.AutoConfig, name, trust_remote_code=False)
    except BitfrontError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error) or "remote code" in str(error):
            raise ConfigError(
                f"model 'hf:{name}' needs code that comes with it, which Bitfront never runs (trust_remote_code is "
                "off). Write a factory of your own that does, and name it: model = 'my_models:factory'",
                key=("model",),
            ) from error
        hint = libraries.near(name, _cached(), "the cache of the hub")
        raise UnknownNameError(f"{_offline(f'the files of hf:{name}', name, error)}.{hint}", key=("model",)) from error


def _kind(library: Any, name: str, found: Any) -> str:
    """The class of transformers that builds it. Raises ConfigError where it is neither for texts nor for images."""
    for kind, mapping in (
        (TEXTS, "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING"),
        (IMAGES, "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"),
    ):
        if type(found) in getattr(library, mapping):
            return kind
    raise ConfigError(
        f"model 'hf:{name}' is a {found.model_type}, which classifies neither texts nor images in transformers. Write "
        "a factory that returns it, and name it: model = 'my_models:factory'",
        key=("model",),
    )


def _has_classifier(found: Any) -> bool:
    """Whether the checkpoint has a classifier, or only what stands before it."""
    return any("Classification" in str(name) for name in found.architectures or ())


def _image_processor(name: str) -> dict[str, Any]:
    """The settings of the image processor; empty where there are none."""
    try:
        module = require("transformers.image_processing_base", "hf", f"model = 'hf:{name}'")
        settings: dict[str, Any] = module.ImageProcessingMixin.get_image_processor_dict(
            _place(name), local_files_only=True
        )[0]
    except OSError:
        return {}
    return settings


def _cached() -> list[str]:
    """Names of the models in the cache of the hub."""
    hub = require("huggingface_hub", "hf", "models of the hub")
    try:
        return [repo.repo_id for repo in hub.scan_cache_dir().repos if repo.repo_type == "model"]
    except hub.errors.CacheNotFound:
        return []


def _offline(what: str, name: str, error: Exception) -> str:
    cache = require("huggingface_hub.constants", "hf", "models of the hub").HF_HUB_CACHE
    if Path(_place(name)).is_dir():
        return f"{what} cannot be read from {_place(name)}: {cause(error)}"
    remedy = (
        f"run `hf download {name}` on a machine with one and copy that folder here (HF_HOME names it), or copy the "
        f"model's files into a folder and write model = 'hf:./FOLDER'"
    )
    return libraries.offline(what, f"the cache {cache}", error, remedy)
