"""Builds a plan from a configuration: everything a search needs, checked before any work starts.

A plan is built with the initialised model. That is enough to know its sites, the space and the metrics, and to find
every mistake in the file. Training comes later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from bitfront.config import CalibrationTable, Config, StrategySetup
from bitfront.constraints import Constraint
from bitfront.data.base import Dataset
from bitfront.engine.evaluation.calibration import Corrections
from bitfront.engine.evaluation.interface import EvaluationJob, Evaluator
from bitfront.engine.evaluation.memory import Memory
from bitfront.engine.evaluation.range_loss import remarks as range_remarks
from bitfront.engine.evaluation.trained import open_evaluator
from bitfront.engine.planning import objectives as choosing
from bitfront.engine.planning.feasibility import check, read
from bitfront.engine.planning.inputs import (
    brings_weights,
    checked_data,
    choose_device,
    for_data,
    forward_fingerprint,
    load_weights,
    open_data,
    open_model,
    refuse_without_labels,
    with_outputs,
)
from bitfront.engine.planning.learning import bits_learning, unused_settings
from bitfront.engine.planning.memory import limit_memory
from bitfront.engine.planning.notes import default_model_notes, folding_notes, remarks
from bitfront.engine.planning.outweighed import outweighed
from bitfront.engine.planning.plan import Plan
from bitfront.engine.planning.renaming import renamed_layers
from bitfront.engine.planning.runners import (
    FIRST_SAMPLES,
    Runners,
    check_both_kinds,
    check_ready,
    chosen_samples,
    configured,
    evaluation_samples,
)
from bitfront.engine.planning.training import candidate_training, configured_training
from bitfront.errors import ConfigError
from bitfront.executors.base import Launcher, configured_launcher
from bitfront.graph import Graph, capture
from bitfront.graph.baking import private_copy
from bitfront.graph.capture import check_weights
from bitfront.graph.readiness import halves_note, in_float32
from bitfront.metrics.base import Metric
from bitfront.models import MODELS
from bitfront.models.base import models_with
from bitfront.objectives import Objectives
from bitfront.spaces import SPACES
from bitfront.spaces.base import counted
from bitfront.spaces.model_space import ModelSpace
from bitfront.spaces.request import Choices, Part, SpaceRequest
from bitfront.strategies.configured import SETUP, ConfiguredStrategy, configured_strategy, without_effect
from bitfront.tasks.base import Task
from bitfront.tasks.classification import CLASSIFICATION
from bitfront.tasks.configured import task_of
from bitfront.transforms.equalise import equalised
from bitfront.transforms.fold import Folded, folded

DEFAULT_TRIALS = 100


def workers_here(launcher: Launcher | None, setup: StrategySetup) -> int:
    """How many workers share the memory of this machine."""
    if launcher is None:
        return setup.n_jobs if setup.n_jobs > 1 or setup.candidate_timeout else 0
    return (launcher.settings.workers or setup.n_jobs) if launcher.local else 0


def make_plan(
    config: Config,
    *,
    model: nn.Module | None = None,
    dataset: Dataset | None = None,
    strategy: ConfiguredStrategy | None = None,
    executor: Launcher | None = None,
    insecure: bool = False,
    report: Any = None,
    progress: Any = None,
) -> Plan:
    """Check a configuration and build the plan of its search.

    Args:
        config: the configuration; it must have a ``[search]`` table.
        model, dataset, strategy, executor: used in place of those that the configuration names.
        insecure: whether the user has typed that connections to workers need not be encrypted.
        report, progress: as in ``DataRequest``.

    Raises:
        UserError: something in the configuration, the data or the model cannot be used; the message says what.
    """
    if config.search is None:
        raise ConfigError("there is no [search] in this configuration; `bitfront init` writes one that runs")
    task, setup = task_of(config), config.search.strategy.setup
    with config.locating():
        ignored: list[str] = []
        if strategy is None:
            strategy = configured_strategy(config.search.strategy.name, setup.of_strategy)
            ignored = without_effect(strategy, setup.of_strategy)
            if not strategy.kind.trains_bits:
                strategy = replace(strategy, batch=setup.batch)
        launcher = _checked_launcher(executor or configured_launcher(config.search.strategy.executor), setup, insecure)
        runners, added, objectives = _measured(config, strategy, task)
        constraints = read(config.search.constraints, [m for runner in runners for m in runner.produces])
    network, dataset = _checked_model(config, dataset or open_data(config, report, progress), model, task)
    of_model = default_model_notes(config) if model is None else halves_note(model)
    device, warning = choose_device(config.accelerator)
    with config.locating():
        _check_device(device, dataset)
        check_ready(runners, device)
    config, renamed = (config, []) if model is not None else renamed_layers(config, dataset)
    sample, trains = dataset.split("train")[0][:2].clone(), _trains(config, runners)
    original = capture(network, sample, training=trains)
    changed = _folded(config, original, sample, strategy, trains=trains)
    graph = original if changed is None else changed.graph
    with config.locating():
        space = None if strategy.kind.trains_bits else _fitting_space(config, graph, dataset)
        job = _job(config, original, dataset, runners, objectives, device, strategy, task)
        evaluator = _evaluator(config, job, graph, space)
        n_trials = _budget(setup, strategy, evaluator.space.size)
        _check_bounds(config, evaluator, constraints)
        remarked = remarks(config, dataset, evaluator, added, warning)
        here = workers_here(launcher, setup)
        remembered = limit_memory(evaluator, setup, here, trains_first=model is None, noise=strategy.kind.uses_noise)
    lost = [] if model is None else [*range_remarks(evaluator.range_losses()), *unused_settings(config, strategy)]
    plan = Plan(
        config=config,
        dataset=dataset,
        model=network,
        brings_weights=model is not None,
        evaluator=evaluator,
        runners=runners,
        objectives=objectives,
        strategy=strategy,
        n_trials=n_trials,
        launcher=launcher,
        notes=(
            *renamed,
            *remarked,
            *folding_notes(config, changed, trains=trains),
            *ignored,
            *of_model,
            *remembered,
            *lost,
            *outweighed(evaluator, objectives),
            *_of_strategy(strategy, objectives, config, task, trained=trains),
        ),
        constraints=constraints,
        forward=tuple(forward_fingerprint(_without_weights(config, network, dataset, given=model), _first(dataset))),
    )
    # The number of samples that "auto" means depends on the weights. Until they are known, it is a first guess.
    return plan if plan.auto_split is None else plan.sampled(FIRST_SAMPLES)


def _first(dataset: Dataset) -> Tensor:
    return dataset.split("train")[0]


def _without_weights(config: Config, network: nn.Module, dataset: Dataset, given: nn.Module | None) -> nn.Module:
    """The model whose outputs show that the code of a model has changed: one of a library with its initial weights, so
    that a trial can be rebuilt where the library's weights are not at hand."""
    if given is not None or not config.weights:
        return network
    return open_model(config.model_copy(update={"weights": False}), dataset)


def _evaluator(config: Config, job: EvaluationJob, graph: Graph, space: ModelSpace | None) -> Evaluator:
    """The evaluator of a job.

    Args:
        config: the configuration.
        job: the job.
        graph: the captured model.
        space: its space; None for that of a training with learned bits.

    Raises:
        ConfigError: the configuration asks for what this model does not allow.
    """
    assert config.search is not None
    built = space or _learned_space(job, graph)
    if config.search.calibration.equalisation:
        graph = _equalised(graph, built)
        built = _learned_space(job, graph) if space is None else _space(config, graph)
    # Where batch norms are folded, the job keeps the model that has them: it is what is reported beside.
    return open_evaluator(job if job.fold_batch_norm else replace(job, model=graph.model), built)


def _of_strategy(
    strategy: ConfiguredStrategy, objectives: Objectives, config: Config, task: Task, *, trained: bool
) -> list[str]:
    """What the strategy says about this search."""
    assert config.search is not None
    named = [] if objectives.summed else [part.metric for part in objectives.parts]
    constrained = bool(config.search.constraints)
    return list(strategy.settings.remarks(named, constrained, task.leading, trained=trained))


def _folded(
    config: Config, graph: Graph, sample: Tensor, strategy: ConfiguredStrategy, *, trains: bool
) -> Folded | None:
    """The network with folded batch norms, if the configuration wants it; None where a training folds them anyway."""
    assert config.search is not None
    wanted = config.search.fold_batch_norm and not strategy.kind.trains_bits
    return folded(graph, sample, dropouts=False, training=trains) if wanted else None


def _checked_launcher(launcher: Launcher | None, setup: StrategySetup, insecure: bool) -> Launcher | None:
    """The launcher, if it can be used for this search. Raises UserError."""
    if launcher is None:
        return None
    launcher.check(insecure=insecure)
    if setup.candidate_timeout and not launcher.replaces:
        raise ConfigError(
            f"candidate_timeout ends the worker of a candidate, and {launcher.title} does not replace it; "
            "leave one of the two out, or use processes, loky or dask",
            key=(*SETUP, "candidate_timeout"),
        )
    return launcher


def _measured(config: Config, strategy: ConfiguredStrategy, task: Task) -> tuple[Runners, list[str], Objectives]:
    """(the runners, names of those that are not in the file, the objectives). Raises ConfigError."""
    assert config.search is not None
    usual = () if config.search.strategy.metrics else strategy.kind.usual_objectives
    usual = tuple(task.leading.name if name == CLASSIFICATION.leading.name else name for name in usual)
    runners, added = configured(config.search, usual, task)
    runners = tuple(replace(r, settings=r.settings.with_batch(config.batch_size)) for r in runners)
    return runners, added, _objectives(config, [m for runner in runners for m in runner.produces], usual)


def _checked_model(config: Config, dataset: Dataset, given: nn.Module | None, task: Task) -> tuple[nn.Module, Dataset]:
    """(the model that was given, or that of the configuration, as it is initialised; the data with the targets of the
    task, which are the outputs of the float model if there are no labels). Raises UserError."""
    dataset = checked_data(dataset, task, config)
    if given is not None:
        check_weights(given)
        network = for_data(in_float32(given), config, dataset)
        return network, with_outputs(config, dataset, network, task)
    model = open_model(config, dataset)
    if config.load_name is None and brings_weights(config, dataset):
        return model, with_outputs(config, dataset, model, task)
    if config.load_name is None:
        with config.locating():
            refuse_without_labels(
                config,
                "the float model would have to be trained, which needs them; name its weights with load_name, or give "
                "a trained model from Python",
            )
        return model, dataset
    loaded = load_weights(config, model)  # now, to see whether the checkpoint can be read
    trained = private_copy(model)
    trained.load_state_dict(loaded.state)
    return model, with_outputs(config, dataset, trained, task)


def _check_device(device: str, dataset: Dataset) -> None:
    """Raises ConfigError where several inputs cannot be brought to the device."""
    if device == "mps" and dataset.inputs:
        raise ConfigError(
            "several inputs travel as float64, which this accelerator does not have; use accelerator = 'cpu'",
            key=("accelerator",),
        )


def _trains(config: Config, runners: Runners) -> bool:
    """Whether candidates are trained, in the search or after it."""
    assert config.search is not None
    return configured_training(runners) is not None or config.search.finetune.trials > 0


def _choices(config: Config) -> Choices:
    """The tables of choices, ``[search.search_space.seed.*]``."""
    assert config.search is not None
    return {k: v.config for k, v in config.search.search_space.seed.items()}


def _fitting_space(config: Config, graph: Graph, dataset: Dataset) -> ModelSpace:
    """The space of the captured model. Raises ConfigError, which names the models that the layers in the file fit."""
    assert config.search is not None
    try:
        return _space(config, graph)
    except ConfigError as error:
        table = config.search.search_space
        named = [key for key in table.seed if key != "default"]
        seed = ("search", "search_space", "seed")
        if error.key[: len(seed)] == seed and table.setup.by == "name" and named and config.model in MODELS:
            fitting = models_with(named, dataset.sample_shape, dataset.num_classes)
            if others := [name for name in fitting if name != MODELS.official(config.model)]:
                stop = "" if error.message.endswith("?") else "."
                error.message += f"{stop} The file names layers of model {' or '.join(others)} ({', '.join(named)})"
        raise


def _space(config: Config, graph: Graph) -> ModelSpace:
    """The space of the captured model. Raises ConfigError."""
    assert config.search is not None
    table = config.search.search_space
    try:
        build_space = SPACES.get(table.name)
    except ConfigError as error:
        error.key = ("search", "search_space", "name")
        raise
    setup = table.setup
    request = SpaceRequest(graph, setup.by, _choices(config), parts=_parts(config), default_for=setup.default_for)
    return build_space(request)


def _learned_space(job: EvaluationJob, graph: Graph) -> ModelSpace:
    """The space of a training with learned bits. Raises ConfigError."""
    return job.learned_space(graph)


def _job(
    config: Config,
    graph: Graph,
    dataset: Dataset,
    runners: Runners,
    objectives: Objectives,
    device: str,
    strategy: ConfiguredStrategy,
    task: Task,
) -> EvaluationJob:
    """The evaluation job of the search, with the initialised model."""
    assert config.search is not None
    search = config.search
    with config.locating():
        training = candidate_training(config, runners, dataset, objectives, task)
        splits = evaluation_samples(dataset, runners, config.seed)
        if dataset.targets.with_features:
            check_both_kinds(splits, runners)
        learning = bits_learning(config, strategy, runners, objectives, dataset, graph.model, device, task)
    return EvaluationJob(
        model=graph.model,
        sample=dataset.split("train")[0][:2].clone(),  # a view would travel to workers with all of its data
        space=search.search_space.name,
        by=search.search_space.setup.by,
        choices=_choices(config),
        default_for=search.search_space.setup.default_for,
        runners=runners,
        splits=splits,
        calibration=chosen_samples(dataset, "train", search.calibration.num_samples, config.seed)[0],
        device=device,
        corrections=_corrections(search.calibration),
        parts=_parts(config),
        training=training,
        trains=_trains(config, runners),
        memory=Memory(),
        equalise=search.calibration.equalisation,
        fold_batch_norm=search.fold_batch_norm and not strategy.kind.trains_bits,
        learning=learning,
        task=task,
    )


def _corrections(table: CalibrationTable) -> Corrections:
    iterations = table.rounding_iterations if table.rounding == "adaptive" else 0
    return Corrections(table.bias_correction, table.batch_norm, iterations, table.integer_bias)


def _equalised(graph: Graph, space: ModelSpace) -> Graph:
    """The graph with equalised weights. Raises ConfigError where candidates have other widths."""
    if space.changes_widths:
        raise ConfigError(
            "equalisation = true is for candidates that start from one model's weights, and here they have other "
            "widths: which channels a narrower layer keeps depends on the size of its weights; remove it",
            key=("search", "calibration", "equalisation"),
        )
    return equalised(graph)


def _check_bounds(config: Config, evaluator: Evaluator, constraints: Sequence[Constraint]) -> None:
    """Raises ConfigError if no candidate can fulfil one of the constraints, or nothing measures what fine-tuning
    compares."""
    assert config.search is not None
    leading = evaluator.job.task.leading.name
    if config.search.finetune.trials and leading not in evaluator.metrics:
        raise ConfigError(
            f"fine-tuning compares candidates by {leading}, and no runner measures {leading}; add "
            "[search.strategy.sw_runner.basic_evaluation]",
            key=("search", "finetune", "trials"),
        )
    check(evaluator, constraints, trained=False)


def _parts(config: Config) -> dict[str, Part]:
    """The tables of the parts of a joint space; empty for other spaces. Raises ConfigError."""
    assert config.search is not None
    table = config.search.search_space
    where = ("search", "search_space")
    if SPACES.official(table.name) != "joint":
        for name in table.parts:
            raise ConfigError(
                f"only a space with name = 'joint' has parts, and this one is {table.name!r}", key=(*where, name)
            )
    elif table.seed:
        raise ConfigError("a joint space has its seeds in the tables quantize and widths", key=(*where, "seed"))
    return {
        name: Part(p.setup.by, {k: v.config for k, v in p.seed.items()}, p.setup.default_for)
        for name, p in table.parts.items()
    }


def _objectives(config: Config, metrics: list[Metric], usual: tuple[str, ...]) -> Objectives:
    assert config.search is not None
    table = config.search.strategy
    summed = table.setup.direction if table.setup.sum_scaled_metrics else None
    if table.setup.sum_scaled_metrics and summed is None:
        raise ConfigError(
            "sum_scaled_metrics = true needs direction = 'maximize' or 'minimize'",
            key=("search", "strategy", "setup", "sum_scaled_metrics"),
        )
    named = {n: (m.scale, m.direction) for n, m in table.metrics.items()} or dict.fromkeys(usual, (1.0, None))
    return choosing.choose(named, metrics, summed)


def _budget(setup: StrategySetup, strategy: ConfiguredStrategy, size: int) -> int:
    """The largest number of candidates to evaluate. Raises ConfigError if the strategy needs one and none is given."""
    if setup.n_trials is not None:
        return setup.n_trials
    largest, limit = strategy.largest, strategy.kind.limit
    if largest is not None and size > largest:
        raise ConfigError(
            f"the space has {counted(size)} candidates, and {strategy.words} stops at {limit} = {largest:,}. Remove "
            f"choices, set {limit} or n_trials, or use another strategy, e.g. name = 'surrogate'",
            key=(*SETUP, limit),
        )
    return size if strategy.kind.exhaustive else DEFAULT_TRIALS
