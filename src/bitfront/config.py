"""The TOML schema: every key with its default, its meaning and its check.

It contains all keys of MASE's search, so that MASE's files run unchanged. It is strict: an unknown key or a wrong value
is an error before any work starts. The error names the key, its line, what is allowed and the closest correct spelling.
The space checks what depends on the captured model (does this site exist?); a metric or a strategy checks its settings.
Their errors get file and line here too (:meth:`Config.locating`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from bitfront import tomlfile
from bitfront.config_older import check_load_type, understood
from bitfront.config_texts import check_texts
from bitfront.errors import ConfigError, nearest, one_of
from bitfront.files import short_name
from bitfront.registry import fact_in_source

Direction = Literal["maximize", "minimize"]
#: Keys of MASE that have no meaning here; they are accepted, and named in a note.
WITHOUT_EFFECT = frozenset(
    "auto_requeue cf_args cpu_num_workers debug disable_dataset_cache force_cpu github_ci is_pretrained "
    "is_to_auto_requeue log_level max_token_len no_warnings nodes num_devices num_nodes num_targets num_workers "
    "pretrained profile quant_config report_to run_emit skip_build skip_test strategy target to_debug "
    "trainer_precision trainer_strategy transform".split()
)

#: Passes that show something of the model.
REPORTS = ("summarize_quantization", "report_node_type", "report_node_shape", "report_node_meta_param")
#: The tables that ``[passes]`` may have.
PASSES = ("quantize", "prune", *REPORTS)


class Table(BaseModel):
    """A table of the TOML. Unknown keys are errors, and types are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class SpaceSetup(Table):
    """``[search.search_space.setup]``."""

    by: Literal["name", "type", "regex_name"] = Field("name", description="how the keys of `seed` name sites")
    default_for: Literal["usual", "all"] = Field("usual", description="which sites `default` means; see below")


class ChoicesTable(Table):
    """``[search.search_space.seed.<key>]`` and ``[passes.quantize.<key>]``."""

    config: dict[str, Any] = Field(description="format and parameters; in a search every value is a list of choices")


class SpacePart(Table):
    """``[search.search_space.quantize]`` and ``widths``."""

    setup: SpaceSetup = SpaceSetup()
    seed: dict[str, ChoicesTable] = Field(
        default={}, description="the choices per site name, type or pattern; `default` is for all others"
    )


class SearchSpace(SpacePart):
    """``[search.search_space]``."""

    name: str = Field("graph/quantize/mixed_precision_ptq", description="kind of space")
    quantize: SpacePart | None = Field(None, description="for `joint`: its formats, with a setup and a seed")
    widths: SpacePart | None = Field(None, description="for `joint`: its widths, with a setup and a seed")

    @property
    def parts(self) -> dict[str, SpacePart]:
        """The parts that the file has, by name."""
        both = {"quantize": self.quantize, "widths": self.widths}
        return {name: part for name, part in both.items() if part is not None}


class ExecutorTable(Table):
    """``[search.strategy.executor]``: what carries out the evaluations, and its settings.

    Its settings are checked later, by that executor (``executors.base``).
    """

    model_config = ConfigDict(extra="allow")

    name: str = Field("processes", description="executor; `bitfront list executors`")
    at: str = Field("", description="what follows the name and a colon on the command line, e.g. an address")

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, given: Any) -> Any:
        """``dask:local:8`` stands for a table."""
        if not isinstance(given, str):
            return given
        name, _, rest = given.partition(":")
        return {"name": name, "at": rest}

    @property
    def of_executor(self) -> dict[str, Any]:
        """The keys that are settings of the executor, unchecked."""
        return dict(self.model_extra or {})


class StrategySetup(Table):
    """``[search.strategy.setup]``: the keys of every search, and those of its strategy.

    The keys of a strategy are checked later, by that strategy (``strategies.configured``).
    """

    model_config = ConfigDict(extra="allow")

    n_jobs: int = Field(1, ge=1, le=4096, description="worker processes; the results do not depend on it")
    n_trials: int | None = Field(
        None,
        ge=1,
        description="budget in distinct candidates; none: the whole space for brute force, else 100",
    )
    batch: int | None = Field(
        None,
        ge=1,
        description="how many candidates the strategy proposes at a time, without results of the others. Many workers "
        "need many; it is a part of the search: with another number it finds others. Default: the strategy's",
    )
    timeout: float | None = Field(None, gt=0, description="seconds after which no new candidate is started")
    candidate_timeout: float | None = Field(
        None,
        gt=0,
        description="seconds that one candidate may take; one that takes longer is ended, and has failed. With it, "
        "candidates are evaluated in worker processes also where `n_jobs` is 1",
    )
    memory_limit: str | None = Field(
        None,
        description='memory that all processes of the search may take together, e.g. "8 GB"; no number depends on it. '
        "Default: three quarters of what is free. Where it cannot be held, the search does not start",
    )
    sum_scaled_metrics: bool = Field(
        False,
        description="true: one objective, the sum of the scaled metrics; false: one objective per metric, and a front",
    )
    direction: Direction | None = Field(None, description="of the sum; needed if `sum_scaled_metrics`")
    pkl_ckpt: str | None = Field(None, description="accepted, without effect: a run resumes from its run folder")
    save_every_n_trials: int | None = Field(None, description="accepted, without effect: every trial is saved")

    @property
    def of_strategy(self) -> dict[str, Any]:
        """The keys that are not among those of every search: the strategy's settings, unchecked."""
        return dict(self.model_extra or {})


class MetricSetup(Table):
    """``[search.strategy.metrics.<metric>]``."""

    scale: float = Field(1.0, description="factor of the scaled metric; a negative one reverses its direction")
    direction: Direction | None = Field(None, description="which way is better; default: that of the metric")


class StrategyTable(Table):
    """``[search.strategy]``."""

    name: str = Field("surrogate", description="strategy; with setup.sampler, `optuna`")
    eval_mode: bool = Field(True, description="false if candidates are trained; all are evaluated in eval mode")
    sw_runner: dict[str, dict[str, Any]] = Field(default={}, description="metrics that need data or a clock")
    hw_runner: dict[str, dict[str, Any]] = Field(default={}, description="metrics in closed form")
    setup: StrategySetup = StrategySetup()
    metrics: dict[str, MetricSetup] = Field(default={}, description="which metrics are objectives")
    executor: ExecutorTable | None = Field(
        None, description='what carries out the evaluations; `executor = "loky:8"` in `[search.strategy]` is the same'
    )

    @model_validator(mode="before")
    @classmethod
    def _of_a_sampler(cls, values: dict[str, Any]) -> dict[str, Any]:
        # A file that names a sampler, and no strategy, means that of samplers.
        setup = values.get("setup") if isinstance(values, dict) else None
        return {"name": "optuna", **values} if isinstance(setup, dict) and "sampler" in setup else values


class CalibrationTable(Table):
    """``[search.calibration]``."""

    num_samples: int = Field(512, ge=1, description="samples of the training split: what calibration learns from")
    bias_correction: bool = Field(
        False, description="subtract from each bias the mean error that the quantized weights cause in the output"
    )
    batch_norm: bool = Field(
        False, description="estimate the statistics of a batch norm that follows a site anew, for each of its options"
    )
    integer_bias: bool = Field(
        False,
        description="round each bias without a format to a multiple of its input's step times its weight's, as "
        "runtimes that add up in 32 bits hold it",
    )
    equalisation: bool = Field(False, description="scale channels so that neighbouring layers have similar weights")
    rounding: Literal["nearest", "adaptive"] = Field("nearest", description="`adaptive`: AdaRound learns it per weight")
    rounding_iterations: int = Field(1000, ge=1, description="how often adaptive rounding improves each weight")


class FinetuneTable(Table):
    """``[search.finetune]``."""

    trials: int = Field(
        0,
        ge=0,
        description="how many trials are fine-tuned: spread evenly over the front, or the best of one objective",
    )
    max_epochs: int = Field(10, ge=1, description="epochs of each; the best epoch on the validation split is kept")
    learning_rate: float = Field(1e-3, gt=0, description="initial; follows a cosine down to 1e-6")
    batch_size: int | None = Field(None, ge=1, description="samples per training step; default: that of the training")
    patience: int | None = Field(None, ge=1, description="stop after this many epochs without a better validation loss")


class SearchTable(Table):
    """``[search]``."""

    search_space: SearchSpace = SearchSpace()
    strategy: StrategyTable
    constraints: dict[str, str] = Field(
        default={},
        description='conditions on every result: metric = "<= 2 kB"; `accuracy_drop` compares with the float model',
    )
    calibration: CalibrationTable = CalibrationTable()
    finetune: FinetuneTable = FinetuneTable()
    fold_batch_norm: bool = Field(
        False,
        description="search the network whose batch norms are folded into the layers before them, where that is "
        "possible; it is what is deployed",
    )
    tensorboard: bool = Field(
        False, description="log trials and progress to `tensorboard/` in the run folder; the same as that tracker"
    )
    track: dict[str, dict[str, Any]] = Field(
        default={},
        description="[trackers](#trackers) that follow the search: a name, a list of names, or tables with settings",
    )

    @field_validator("track", mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        return _tables(value)


def _tables(names: object) -> object:
    """A name or a list of names as a mapping to empty tables; anything else as it is."""
    if isinstance(names, str):
        return {names: {}}
    if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
        return {name: {} for name in names}
    return names


def _working_directory() -> Path:
    try:
        return Path.cwd()
    except OSError:  # it was deleted
        return Path()


class Config(Table):
    """The top level of the file."""

    model: str = Field(
        "digits-cnn", description="a model's name, that of a library as `timm:NAME`, or package.module:factory"
    )
    dataset: str = Field(
        "digits",
        description="a dataset's name, that of a library as `torchvision:NAME`, a path, or package.module:factory; "
        "default: the one that the model is made for",
    )
    dataset_path: str | None = Field(None, description="file or folder of the data")
    dataset_settings: dict[str, Any] | None = Field(None, description="the settings of the dataset; see below")
    limit_bytes: int = Field(
        4 * 2**30, ge=1, description="memory in bytes that data of a factory or a library, images and tables may take"
    )
    weights: bool = Field(
        False, description="`true`: a model of a library starts from its pretrained weights; see below"
    )
    class_names: list[str] | None = Field(
        None,
        description="the name of each class, by index, for data that does not name them: arrays, a factory; classes "
        "that no training sample has count too",
    )
    task: str = Field("cls", description="what a sample is: the name of a task, or package.module:name")
    task_settings: dict[str, Any] | None = Field(None, description="the settings of the task; see below")
    labels: bool = Field(
        True,
        description="`false`: the data needs no labels, and candidates are compared with, and trained towards, the "
        "outputs of the float model",
    )
    max_epochs: int = Field(20, ge=1, description="epochs of training")
    accumulate_grad_batches: int = Field(1, ge=1, description="batches whose gradients are averaged for one step")
    max_steps: int = Field(-1, ge=-1, description="training steps at most; -1: no limit")
    batch_size: int = Field(128, ge=1, description="samples per training step")
    learning_rate: float = Field(1e-3, gt=0, description="initial; follows a cosine down to 1e-6")
    weight_decay: float = Field(0.0, ge=0, description="as the optimizer defines it")
    training_optimizer: Literal["adam", "adamw", "sgd"] = Field(
        "adam", description="optimizer of the training; sgd has Nesterov momentum 0.9"
    )
    patience: int | None = Field(None, ge=1, description="stop after this many epochs without a better validation loss")
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = Field("auto", description="where to compute")
    project: str | None = Field(None, description="name of the run folder; default: <model>-<dataset>")
    project_dir: str = Field("runs", description="folder of the run folders")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="root of all randomness: split, training, search")
    log_every_n_steps: int = Field(50, ge=1, description="how often the training bar is updated")
    load_name: str | None = Field(None, description="checkpoint to start from, instead of training")
    load_type: Literal["pt", "pl"] = Field("pt", description="a state dict, or a Lightning checkpoint")
    passes: dict[str, dict[str, Any]] = Field(default={}, description="for `transform`; see below")
    search: SearchTable | None = Field(None, description="for `search`, `compare` and `plan`")

    _document: tomlfile.Document = PrivateAttr(tomlfile.Document("the configuration", {}))
    _notes: tuple[str, ...] = PrivateAttr(())
    #: The working directory when this was made: later a model may change it.
    _base: Path = PrivateAttr(default_factory=_working_directory)
    _names_dataset: bool = PrivateAttr(True)
    _names_model: bool = PrivateAttr(True)
    #: Dotted keys whose values come from overrides, not from the document.
    _overridden: frozenset[str] = PrivateAttr(frozenset())

    @property
    def names_dataset(self) -> bool:
        """Whether the file or a flag names the data; if not, `dataset` is what the model is made for."""
        return self._names_dataset

    @property
    def names_model(self) -> bool:
        """Whether the file or a flag names the model; if not, it is the default."""
        return self._names_model

    @property
    def notes(self) -> tuple[str, ...]:
        """One-line remarks about the file, for the user."""
        return self._notes

    @property
    def run_name(self) -> str:
        """Name of the run folder."""
        return self.project or f"{short_name(self.model)}-{short_name(self.dataset)}"

    @property
    def run_folder(self) -> Path:
        """The run folder, ``project_dir/project``, from the root: whatever the working directory becomes."""
        return self._base / self.project_dir / self.run_name

    def path(self, given: str) -> Path:
        """A file that the configuration names, from the root. Raises ConfigError where ``~`` stands for nothing."""
        try:
            return self._base / Path(given).expanduser()
        except RuntimeError:
            raise ConfigError(f"{given}: there is no home directory that ~ could stand for; set HOME") from None

    def effective(self) -> dict[str, Any]:
        """All values in effect, defaults included, without unset ones; can be written as TOML and read again."""
        return _without_none(self.model_dump())

    @property
    def replaced_model(self) -> str | None:
        """The model that the file names, if another one is given beside the file."""
        own = self._document.values.get("model")
        return own if "model" in self._overridden and isinstance(own, str) and own != self.model else None

    @contextmanager
    def locating(self) -> Iterator[None]:
        """A context in which ConfigErrors get the file and the line of their key."""
        try:
            yield
        except ConfigError as error:
            # An overridden value is not in the file, and nor is what is in it.
            above = {".".join(error.key[:length]) for length in range(1, len(error.key) + 1)}
            if error.file is None and error.key and not above & self._overridden:
                error.located(self._document.name, self._document.line(error.key))
            raise


Settings = TypeVar("Settings", bound=Table)


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration in the file at `path`, changed by `overrides`.

    Args:
        path: a TOML file; None for the defaults.
        overrides: dotted keys, e.g. ``{"search.strategy.setup.n_trials": 10}``; None values are skipped.

    Raises:
        ConfigError: the file or a value is wrong.
    """
    document = tomlfile.read(Path(path)) if path is not None else tomlfile.Document("the configuration", {})
    return from_document(document, overrides)


def _without_sampler(values: dict[str, Any], changes: Mapping[str, Any]) -> list[str]:
    """Remove the file's sampler where a strategy that is given beside the file takes its place. Returns notes."""
    name = changes.get("search.strategy.name")
    if not name or str(name).partition(":")[0] == "optuna" or "search.strategy.setup.sampler" in changes:
        return []
    sampler = values.get("search", {}).get("strategy", {}).get("setup", {}).pop("sampler", None)
    return [] if sampler is None else [f"strategy {name} takes the place of the file's sampler {sampler!r}"]


def _with_trackers(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes, where trackers that are named beside the file go together with those of the file."""
    search = values.get("search")
    if isinstance(search, dict) and "track" in search:
        search["track"] = _tables(search["track"])
    given = _tables(changes.get("search.track", {}))
    if not isinstance(given, Mapping):
        return dict(changes)  # the validation reports it
    in_file = search.get("track") if isinstance(search, dict) else None
    known = in_file if isinstance(in_file, Mapping) else {}
    others = {key: value for key, value in changes.items() if key != "search.track"}
    return others | {f"search.track.{name}": table or known.get(name, {}) for name, table in given.items()}


def from_document(document: tomlfile.Document, overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration in a parsed document, changed by `overrides`.

    Args:
        document: the parsed TOML, with the lines of its keys.
        overrides: as in :func:`load_config`.

    Raises:
        ConfigError: a key or a value is wrong.
    """
    document, notes = understood(document, frozenset(Config.model_fields) | WITHOUT_EFFECT)
    values: dict[str, Any] = _deep_copy(document.values)
    ignored = sorted(k for k in values if k in WITHOUT_EFFECT)
    notes += [f"{document.name}: {key} has no effect here" for key in ignored]
    for key in ignored:
        del values[key]
    paths = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in (overrides or {}).items()}
    changes = {k: v for k, v in paths.items() if v is not None and k not in WITHOUT_EFFECT}
    notes += [f"{k} has no effect here" for k, v in paths.items() if v is not None and k in WITHOUT_EFFECT]
    if "search.strategy.setup.sampler" in changes:
        # A sampler belongs to the strategy optuna, whichever strategy the file names.
        changes.setdefault("search.strategy.name", "optuna")
    changes = _with_trackers(values, changes)
    _override(values, changes, document)
    notes += _without_sampler(values, changes)
    check_texts(values, (), document, changes)
    values = _without_na(values)
    try:
        notes += check_load_type(values)
        config = Config.model_validate(values)
    except ValidationError as error:
        raise _translated(error, document, changes) from None
    except ConfigError as error:
        if ".".join(error.key) not in changes:
            error.located(document.name, document.line(error.key))
        raise
    if config.project is not None and (Path(config.project).name != config.project or config.project == ".."):
        raise ConfigError(
            f"{config.project!r} is not the name of a folder; project_dir says where run folders are",
            key=("project",),
            file=None if "project" in changes else document.name,
            line=None if "project" in changes else document.line(("project",)),
        )
    config._names_dataset, config._names_model = "dataset" in values, "model" in values
    if "dataset" not in values and (natural := fact_in_source("bitfront.models", config.model, "data")):
        # Says so as a value of the file would, so that it is among the values in effect.
        config = config.model_copy(update={"dataset": natural})
    config._document = document
    config._notes = tuple(notes)
    config._overridden = frozenset(changes)
    _check_passes(config)
    return config


def _override(values: dict[str, Any], changes: Mapping[str, Any], document: tomlfile.Document) -> None:
    """Set dotted keys in `values`, in place."""
    of_search = [key for key in changes if key.startswith("search.")]
    if of_search and "search" not in values:
        raise ConfigError(
            f"{of_search[0]} belongs to a search, and there is no [search] in this configuration; add one, or leave "
            f"{of_search[0]} out",
            file=document.name,
            arguments=of_search[:1],
        )
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        table = values
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                break  # a value where a table is needed; the validation reports it
        else:
            table[last] = value


def _check_passes(config: Config) -> None:
    with config.locating():
        for name in config.passes:
            if name not in PASSES:
                raise ConfigError(
                    f"there is no pass {name!r}; {one_of(PASSES)}.{nearest(name, PASSES)}", key=("passes", name)
                )


def quantize_pass(config: Config) -> dict[str, Any]:
    """``[passes.quantize]``: ``{"by": ..., key: {"config": {...}}}``.

    Raises:
        ConfigError: there is none.
    """
    table = config.passes.get("quantize")
    if table is None:
        raise ConfigError(
            "there is no [passes.quantize] in this configuration; add one with the format of each site",
            file=config._document.name,
        )
    return {k: v for k, v in table.items() if k != "report"}


def settings_of(kind: type[Settings], values: Mapping[str, Any], where: tuple[str, ...]) -> Settings:
    """The settings of a metric runner or a strategy, from the keys of its table; checked and frozen.

    Args:
        kind: the type of the settings.
        values: key → value, as in the TOML.
        where: path of the table, for messages.

    Raises:
        ConfigError: a key is unknown, missing or has a wrong value; `key` is its path.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        key, message = _problem(error, kind)
        # For a union type or a list, pydantic's path has parts after the key; they are cut off. A table of tables with
        # free names has none of its own.
        depth = next(
            (i for i in range(1, len(key)) if not (_table_at(key[:i], kind) or _table_at((*key[:i], ""), kind))),
            len(key),
        )
        raise ConfigError(message, key=(*where, *key[:depth])) from None
    except ConfigError as error:
        error.key = (*where, *error.key)
        raise


def _translated(error: ValidationError, document: tomlfile.Document, changes: Mapping[str, Any]) -> ConfigError:
    key, message = _problem(error, Config)
    if ".".join(key) in changes:
        return ConfigError(message, key=key)
    return ConfigError(message, key=key, file=document.name, line=document.line(key))


def _problem(error: ValidationError, root: type[Table]) -> tuple[tuple[str, ...], str]:
    """(path of the wrong key below `root`, what is wrong with it and what is allowed)."""
    # A misspelt key can also be a missing one; its spelling is reported first.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    key = tuple(str(part) for part in first["loc"])
    parent = _table_at(key[:-1], root)
    value = first.get("input")
    match first["type"]:
        case "extra_forbidden":
            fields = list(parent.model_fields) if parent else []
            known = one_of(fields) if fields else "nothing can be set here"
            message = f"unknown key; {known}.{nearest(key[-1], fields)}"
        case "literal_error":
            allowed = _literals(parent, key[-1])
            message = f"{value!r} is not possible; {one_of(allowed)}.{nearest(str(value), allowed)}"
        case "missing":
            message = "this key is missing"
        case "string_type" if key[:2] == ("search", "constraints"):
            message = f"{value!r} is no condition; write it like {json.dumps(f'<= {value}')}"
        case kind if kind.endswith("_type"):
            message = f"{value!r} is of the wrong type: {first['msg'][0].lower() + first['msg'][1:]}"
        case _:
            message = f"{value!r} is not possible: {first['msg'][0].lower() + first['msg'][1:]}"
    return key, message


def _table_at(path: tuple[str, ...], root: type[Table]) -> type[Table] | None:
    """The table at a path of keys below `root`; None where there is none. Free names (of seed, metrics) are skipped."""
    table: Any = root
    for part in path:
        if not (isinstance(table, type) and issubclass(table, Table)):
            table = table[1] if table and len(table) > 1 else None  # the value type of a dict of tables
            continue
        if part not in table.model_fields:
            return None
        annotation = table.model_fields[part].annotation
        inner = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, Table)]
        if inner and not str(annotation).startswith("dict"):
            table = inner[0]
        else:
            table = get_args(annotation)
    return table if isinstance(table, type) and issubclass(table, Table) else None


def _literals(table: type[Table] | None, name: str) -> list[str]:
    if table is None or name not in table.model_fields:
        return []
    annotation = table.model_fields[name].annotation
    words: list[str] = []
    for part in (annotation, *get_args(annotation)):
        words += [a for a in get_args(part) if isinstance(a, str)] or ([part] if isinstance(part, str) else [])
    return list(dict.fromkeys(words))


def _deep_copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _deep_copy(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def _without_na(values: Mapping[str, Any]) -> dict[str, Any]:
    """Removes values "NA", which mean the default. In a seed, and in a pass, "NA" is one of the choices and stays."""
    return {
        k: _without_na(v) if isinstance(v, Mapping) and k not in ("seed", "passes") else v
        for k, v in values.items()
        if not (isinstance(v, str) and v == "NA")
    }


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _without_none(v) if isinstance(v, Mapping) else v for k, v in values.items() if v is not None}
