"""The inputs of a search, opened from their names in the configuration: device, dataset, model and weights."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bitfront import checkpoints, data, models  # noqa: F401  (registers the datasets and models that files name)
from bitfront.config import Config
from bitfront.data import DATASETS
from bitfront.data.base import DataRequest, Dataset
from bitfront.data.factory import from_object
from bitfront.data.loading import is_path, load_dataset
from bitfront.data.targets import CLASSES, Targets
from bitfront.engine.storage.folder import WEIGHTS
from bitfront.errors import CaptureError, CheckpointError, ConfigError, DataError
from bitfront.events import Events
from bitfront.files import shown
from bitfront.graph.baking import private_copy
from bitfront.graph.capture import holding_nan
from bitfront.models.base import build_model, needs_of
from bitfront.registry import canonical
from bitfront.scoring import outputs_of
from bitfront.strategies import STRATEGIES
from bitfront.tasks.adapting import adapted
from bitfront.tasks.base import Task
from bitfront.tasks.configured import task_of

#: The name of a dataset from memory.
ARRAYS = "arrays"
#: Samples, and values of their outputs, in a forward fingerprint.
FINGERPRINT_SAMPLES, FINGERPRINT_VALUES = 4, 64


def training_settings(config: Config) -> dict[str, Any]:
    """The keys of the configuration that training depends on, with their values."""
    keys = "max_epochs max_steps batch_size learning_rate weight_decay training_optimizer patience".split()
    # Runs from before there was this key have no entry for it.
    newer = {} if config.accumulate_grad_batches == 1 else {"accumulate_grad_batches": config.accumulate_grad_batches}
    return {k: getattr(config, k) for k in keys} | newer


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256, in hexadecimal, over the names, shapes, dtypes and values of a model's state dict."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def forward_fingerprint(model: nn.Module, x: Tensor) -> list[float]:
    """The outputs of a model for some samples. They change when the code of ``forward`` changes.

    Args:
        model: the model with its weights before any training; not changed.
        x: samples, shape ``(samples, *features)``; the first few are used.

    Returns:
        Outputs in evaluation mode, then in training mode with a fixed random seed where the model runs in it, rounded
        to six digits. Compare with ``storage.store.same_outputs``.
    """
    values: list[float] = []
    for training in (False, True):
        copied = private_copy(model).cpu().train(training)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                out = copied(x[:FINGERPRINT_SAMPLES].cpu().clone())
        except Exception as error:
            if training:  # some models run in evaluation mode only; such a model is not trained
                break
            raise CaptureError(f"the model fails on its input: {type(error).__name__}: {error}") from error
        if isinstance(out, Tensor):
            few = torch.nan_to_num(out.detach().double()).flatten()[:FINGERPRINT_VALUES]
            values += [float(f"{v:.6g}") for v in few.tolist()]
    return values


def choose_device(accelerator: str) -> tuple[str, str | None]:
    """The PyTorch device for a value of the key ``accelerator``.

    Args:
        accelerator: ``auto``, ``cpu``, ``gpu``, ``cuda`` or ``mps``.

    Returns:
        (``cuda``, ``mps`` or ``cpu``; a warning, if the accelerator is missing and the CPU takes its place, or None).
    """
    with warnings.catch_warnings():
        # Without a driver torch prints a warning of several lines; the one returned here replaces it.
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
        f"accelerator = {accelerator!r}: PyTorch finds none on this machine; computing on the CPU",
    )


def open_data(config: Config, report: Any = None, progress: Any = None) -> Dataset:
    """Open the dataset of a configuration.

    Args:
        config: the configuration.
        report: called with each note of the loader, as text.
        progress: called while a file is downloaded; see ``DataRequest``.

    Raises:
        ConfigError: there is no such dataset, or no such task.
        DataError: the data cannot be read or downloaded, or has other targets than the task.
    """
    task = task_of(config)
    with config.locating():
        needs = needs_of(config.model)
        if needs is not None and not config.names_dataset:
            raise ConfigError(
                f"model = {config.model!r} does not say which data it is for; name it, e.g. dataset = "
                "'path/to/folder/of/images' (`bitfront list datasets`)",
                key=("dataset",),
            )
        request = DataRequest(
            path=config.path(config.dataset_path) if config.dataset_path else None,
            seed=config.seed,
            **({"report": report} if report else {}),
            progress=progress,
            limit_bytes=config.limit_bytes,
            targets=task.targets,
            class_names=tuple(config.class_names or ()),
            settings=config.dataset_settings or {},
            needs=needs,
        )
        name = str(config.path(config.dataset)) if is_path(config.dataset) else config.dataset
        try:
            return checked_data(load_dataset(name, request), task, config)
        except ConfigError as error:
            error.key = error.key or ("dataset",)
            raise


def stand_in(config: Config) -> Dataset | None:
    """Two samples of random numbers of the shape that the model is made for, where the configuration names no data and
    the model says its shape; else None. The numbers are drawn with the seed.

    Raises:
        UnknownNameError: there is no such model.
    """
    if config.names_dataset or config.dataset_path is not None or not task_of(config).classifies:
        return None
    with config.locating():
        needs = needs_of(config.model)
    if needs is not None and needs.sample_shape is not None:
        shape, classes = needs.sample_shape, needs.num_classes or 1000
        side = (config.dataset_settings or {}).get("image_size")
        shape = (shape[0], side, side) if isinstance(side, int) else shape
    elif needs is None and ":" not in config.model and (facts := DATASETS.facts(config.dataset)).get("sample_shape"):
        shape, classes = facts["sample_shape"], facts["num_classes"]
    else:
        return None
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(config.seed))
    names = tuple(map(str, range(classes)))
    y = torch.zeros(2, dtype=torch.int64)
    return Dataset("no data", {"train": x}, {"train": y}, names, f"random numbers of shape {shape}")


def given_data(config: Config, given: object, model: nn.Module | None, events: Events) -> Dataset | None:
    """The dataset of what a search was given from Python, as its configuration says; None where a name says it.

    Args:
        config: the configuration.
        given: as ``dataset_of`` takes it.
        model: the trained model that was given too: it says how many classes there are, so a part of the data may lack
            some of them, unless something is trained on it. None if a name says it.
        events: receives notes.

    Raises:
        DataError: it is none of these, or cannot be used.
    """
    request = DataRequest(
        seed=config.seed,
        report=events.note,
        limit_bytes=config.limit_bytes,
        targets=task_of(config).targets,
        class_names=tuple(config.class_names or ()),
        gaps=model is not None and not _trains(config),
    )
    return _from_memory(given, request)


def _trains(config: Config) -> bool:
    """Whether the search of a configuration trains anything. Names that are unknown are reported later."""
    if config.search is None:
        return False
    strategy, runners = config.search.strategy.name, config.search.strategy.sw_runner
    learns = strategy in STRATEGIES and STRATEGIES.get(strategy).trains_bits
    return learns or config.search.finetune.trials > 0 or canonical("basic_train") in map(canonical, runners)


def dataset_of(
    given: object, seed: int = 0, events: Events | None = None, targets: Targets = CLASSES
) -> Dataset | None:
    """The dataset of an argument `data`: arrays, splits, a torch Dataset or DataLoader; None for a name.

    Raises:
        DataError: it is none of these, or cannot be used.
    """
    return _from_memory(given, DataRequest(seed=seed, report=(events or Events()).note, targets=targets))


def _from_memory(given: object, request: DataRequest) -> Dataset | None:
    if given is None or isinstance(given, str):
        return None
    return from_object(given, request, name=ARRAYS, source="objects in memory")


def checked_data(dataset: Dataset, task: Task, config: Config) -> Dataset:
    """A dataset with the targets of the task; without labels, if the search is without. Raises DataError where they are
    others."""
    if not task.targets.given:
        return _without_labels(dataset, task)
    if config.class_names is not None and list(dataset.class_names) != config.class_names:
        names = ", ".join(dataset.class_names)
        raise DataError(f"dataset {dataset.name!r} names its classes itself ({names}); leave class_names out")
    if wrong := task.unfit(dataset.num_classes):
        with config.locating():
            raise ConfigError(wrong, key=("task_settings",))
    if dataset.targets is not task.targets:
        raise DataError(
            f"dataset {dataset.name!r} has {dataset.targets.name} as targets, and task = {config.task!r} needs "
            f"{task.targets.name}: {task.targets.needed}; give other data, or another task (`bitfront list tasks`)"
        )
    return dataset


def _without_labels(dataset: Dataset, task: Task) -> Dataset:
    """A dataset without its targets. Raises DataError where features are ids and the task needs numbers, or the other
    way round."""
    tokens = dataset.dtype == torch.int64
    if not dataset.inputs and tokens != task.targets.of_tokens:
        raise DataError(
            f"the samples of dataset {dataset.name!r} are {'ids of tokens' if tokens else 'numbers'}, and this task "
            f"needs {'ids' if task.targets.of_tokens else 'numbers'}; name another task (`bitfront list tasks`)"
        )
    wanted = task.settings.num_outputs
    names = dataset.class_names if wanted is None else tuple(map(str, range(wanted)))
    nothing = {split: torch.zeros(len(x), 0) for split, x in dataset.x.items()}
    return replace(dataset.with_outputs(nothing, task.targets), class_names=names)


def with_outputs(config: Config, dataset: Dataset, model: nn.Module, task: Task) -> Dataset:
    """Data without labels with the outputs of the float model as its targets; other data as it is.

    Args:
        config: the configuration.
        dataset: from ``checked_data``.
        model: with the weights of the search.
        task: what the samples are.

    Raises:
        DataError: the outputs take too much memory.
        CaptureError: the model fails.
    """
    if task.targets.given:
        return dataset
    size, limit = config.batch_size, config.limit_bytes
    y = {split: outputs_of(model, x, batch_size=size, limit_bytes=limit) for split, x in dataset.x.items()}
    return dataset.with_outputs(y, task.targets)


def refuse_without_labels(config: Config, verb: str) -> None:
    """Raises ConfigError where something needs labels, and the configuration says that there are none.

    Args:
        config: the configuration.
        verb: what needs them, and what to do.
    """
    if not config.labels:
        raise ConfigError(f"labels = false, and {verb}", key=("labels",))


def open_model(config: Config, dataset: Dataset) -> nn.Module:
    """Build the model of a configuration for a dataset, initialised from the configuration's random seed.

    It takes one tensor of the dataset, and returns the one that the task is about.

    Raises:
        ConfigError: there is no such model, or it does not fit the data.
    """
    with config.locating():
        try:
            model = build_model(
                config.model, dataset.model_shape, dataset.num_classes, config.seed, weights=config.weights
            )
        except ConfigError as error:
            error.key = error.key or ("model",)
            raise
    return for_data(model, config, dataset)


def brings_weights(config: Config, dataset: Dataset) -> bool:
    """Whether the model of the configuration has the weights of its library, classifier included: then nothing is
    trained. A classifier of other classes is new, and the model is trained from these weights."""
    if not config.weights:
        return False
    needs = needs_of(config.model)
    return needs is not None and needs.num_classes is not None and dataset.num_classes in (0, needs.num_classes)


def library_note(config: Config, dataset: Dataset) -> str:
    """Which weights a model of a library starts from; empty if it has none of its library."""
    if not config.weights:
        return ""
    if config.load_name is not None:
        return f"weights = true has no effect: load_name = {config.load_name!r} takes their place"
    if brings_weights(config, dataset):
        return (
            f"{config.model} has the weights of its library, and nothing is trained: the {dataset.num_classes:,} "
            "classes of the data are taken for those of the library, in its order"
        )
    return (
        f"{config.model} has the weights of its library, and a new classifier for {dataset.num_classes} outputs: it is "
        "trained from them"
    )


def for_data(model: nn.Module, config: Config, dataset: Dataset) -> nn.Module:
    """A model as everything here calls it (``tasks.adapting``). Raises ConfigError or CaptureError."""
    with config.locating():
        sample = next(iter(dataset.x.values()))[:2]
        return adapted(model, sample, dataset.inputs, task_of(config).settings.output)


def load_weights(config: Config, model: nn.Module) -> checkpoints.Loaded:
    """Read the checkpoint that ``load_name`` names; it must not be None.

    Where that file is gone, the weights that an earlier search took from it are still in its run folder.

    Raises:
        CheckpointError: the file cannot be read, does not fit `model`, or holds NaN.
    """
    assert config.load_name is not None
    path, kept = config.path(config.load_name), config.run_folder / WEIGHTS
    if path.exists() or not kept.exists() or checkpoints.read_meta(kept).get("load_name") != str(path):
        loaded = checkpoints.read_checkpoint(path, model, config.load_type)
    else:
        note = f"{config.load_name} is gone; the weights that an earlier search took from it are in {shown(kept)}"
        loaded = checkpoints.Loaded(checkpoints.load_checkpoint(kept, model), (note,))
    bad = holding_nan(loaded.state)
    if bad:
        raise CheckpointError(f"{path}: {bad}; load weights from before they became NaN", arguments=["load_name=..."])
    return loaded
