"""What a configuration names, opened: the device, the dataset, the model and its weights."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitfront import checkpoints, data, models  # noqa: F401  (registers the datasets and models that files name)
from bitfront.config import Config
from bitfront.data.base import DataRequest, Dataset
from bitfront.data.loading import load_dataset
from bitfront.errors import ConfigError
from bitfront.models.base import build


def training_settings(config: Config) -> dict[str, Any]:
    """The keys of the configuration that training depends on."""
    keys = "max_epochs max_steps batch_size learning_rate weight_decay training_optimizer patience".split()
    return {k: getattr(config, k) for k in keys}


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names and values of a model's state dict."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def choose_device(accelerator: str) -> tuple[str, str | None]:
    """(device, warning or None): where to compute. A missing accelerator is a warning, and then the CPU."""
    with warnings.catch_warnings():
        # Without a driver torch warns in several lines; ours is one.
        warnings.simplefilter("ignore")
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if accelerator in ("gpu", "cuda", "auto") and cuda:
        return "cuda", None
    if accelerator in ("gpu", "mps", "auto") and mps:
        return "mps", None
    if accelerator in ("auto", "cpu"):
        return "cpu", None
    return (
        "cpu",
        f"accelerator = {accelerator!r}: this machine has none that PyTorch can use; computing on the CPU",
    )


def open_data(config: Config, report: Any = None, progress: Any = None) -> Dataset:
    """The dataset of a configuration. Raises DataError, ConfigError."""
    request = DataRequest(
        path=Path(config.dataset_path).expanduser() if config.dataset_path else None,
        seed=config.seed,
        **({"report": report} if report else {}),
        progress=progress,
    )
    with config.locating():
        try:
            return load_dataset(config.dataset, request)
        except ConfigError as error:
            error.key = error.key or ("dataset",)
            raise


def open_model(config: Config, dataset: Dataset) -> nn.Module:
    """The model of a configuration, initialised from its seed. Raises ConfigError."""
    with config.locating():
        try:
            return build(config.model, dataset.sample_shape, dataset.num_classes, config.seed)
        except ConfigError as error:
            error.key = error.key or ("model",)
            raise


def load_weights(config: Config, model: nn.Module) -> dict[str, Tensor]:
    """The state dict that ``load_name`` names, which fits `model`. Raises CheckpointError."""
    assert config.load_name is not None
    return checkpoints.load(Path(config.load_name).expanduser(), model, config.load_type)
