"""Layers that a file names as those of its own model, where another bundled model is given beside the file.

Users of the system before this one kept one file per network, and the same network in several forms: with activations
between its layers or without, so that the same layer has another name. ``--model`` names the other form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bitfront.config import Config
from bitfront.data.base import Dataset
from bitfront.models import MODELS
from bitfront.models.base import weighted_layers


def renamed_layers(config: Config, dataset: Dataset) -> tuple[Config, list[str]]:
    """The configuration with the names of the given model's layers in ``[search.search_space.seed]``, and a note.

    Layers are renamed where the file names some that the given model does not have, and both models have as many layers
    of the same types: the first stands for the first. Otherwise the configuration is returned as it is, without a note.

    Args:
        config: with a ``[search]`` table.
        dataset: the samples that the models are made for.
    """
    assert config.search is not None
    table, own = config.search.search_space, config.replaced_model
    named = [key for key in table.seed if key != "default"]
    if own is None or table.setup.by != "name" or own not in MODELS or config.model not in MODELS:
        return config, []
    before, after = _layers(own, dataset), _layers(config.model, dataset)
    if set(named) <= set(after) or not set(named) <= set(before):
        return config, []
    names: dict[str, str] = {}
    for kind in {before[name] for name in named}:
        old, new = ([name for name, other in layers.items() if other == kind] for layers in (before, after))
        if len(old) != len(new):
            return config, []
        names |= dict(zip(old, new, strict=True))
    seed = {
        names.get(key, key): value.model_copy(update={"config": _renamed(value.config, names)})
        for key, value in table.seed.items()
    }
    space = table.model_copy(update={"seed": seed})
    search = config.search.model_copy(update={"search_space": space})
    pairs = ", ".join(f"{name} is {names[name]}" for name in named if name != names[name])
    note = f"the file names layers of {own}; in {config.model}, {pairs}"
    return config.model_copy(update={"search": search}), [note]


def _layers(name: str, dataset: Dataset) -> dict[str, type[nn.Module]]:
    """Name → type of the layers with weights of a bundled model, in its order."""
    layers = weighted_layers(name, dataset.sample_shape, dataset.num_classes)
    return {path.replace(".", "_"): kind for path, kind in layers.items()}


def _renamed(choices: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The settings of a layer, in which ``parent_block_name`` lists layers."""
    parents = choices.get("parent_block_name")
    if not isinstance(parents, list):
        return dict(choices)
    return {**choices, "parent_block_name": [names.get(p, p) for p in parents]}
