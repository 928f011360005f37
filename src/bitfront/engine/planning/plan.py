"""From a configuration to everything a search needs, checked before any work starts.

A plan is made with the model as it is initialised, which is enough to know its sites, the space, the metrics and every
mistake in the file. Training comes after.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitfront import checkpoints, data, models  # noqa: F401  (their registries must exist before anything is looked up)
from bitfront.config import Config, SearchTable
from bitfront.constraints import Constraint
from bitfront.data.base import DataRequest, Dataset
from bitfront.data.base import load as load_dataset
from bitfront.engine.evaluation.calibration import Corrections
from bitfront.engine.evaluation.halving import Halving
from bitfront.engine.evaluation.interface import CandidateTraining, EvaluationJob, Evaluator
from bitfront.engine.evaluation.trained import open_evaluator
from bitfront.engine.planning import objectives as choosing
from bitfront.engine.planning.feasibility import check, read
from bitfront.engine.planning.objectives import Objectives
from bitfront.engine.planning.runners import (
    AUTO,
    Runners,
    asked_for,
    check_ready,
    chosen_samples,
    configured,
    evaluation_samples,
    size_notes,
)
from bitfront.engine.search.paired import FIRST
from bitfront.errors import ConfigError
from bitfront.graph import capture
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import Metric, Side
from bitfront.metrics.training import BasicTrain, BasicTrainSettings, HalvingSettings
from bitfront.models.base import build
from bitfront.spaces import SPACES
from bitfront.spaces.base import Codes
from bitfront.spaces.model_space import ModelSpace
from bitfront.spaces.quantize import QuantizationSpace
from bitfront.spaces.request import Part, SpaceRequest
from bitfront.strategies import STRATEGIES
from bitfront.strategies.base import Strategy
from bitfront.strategies.brute_force import BruteForce
from bitfront.strategies.optuna import SAMPLERS, OptunaStrategy, sampler_name
from bitfront.training import TrainSettings
from bitfront.transforms.correct import has_bias, norms_behind

DEFAULT_TRIALS = 100
#: More than that is not spent on knowing better what a candidate costs.
PROBE_SECONDS = 0.25
#: A first training that takes longer than that is not repeated to know better.
WARM_SECONDS = 5.0
#: Candidates that tell it; many share work where all of the space will be evaluated, few where a strategy picks.
CONSECUTIVE, RANDOM = 1024, 32


@dataclass(frozen=True, eq=False)
class Plan:
    """A search, checked, before any work.

    Attributes:
        model: the float model; initialised, not trained, unless the user brought his own.
        brings_weights: the user's own model object: used as it is.
        bench: evaluates candidates of that model; its space is the space of the search.
        notes: remarks for the user.
    """

    config: Config
    dataset: Dataset
    model: nn.Module
    brings_weights: bool
    evaluator: Evaluator
    objectives: Objectives
    sides: Mapping[str, Side]
    strategy: str
    sampler: str | None
    n_trials: int
    notes: tuple[str, ...]
    constraints: tuple[Constraint, ...] = ()

    @property
    def space(self) -> ModelSpace:
        """The space of the search."""
        return self.evaluator.space

    @property
    def exhaustive(self) -> bool:
        """Whether every candidate of the space will be evaluated in the space's order."""
        return STRATEGIES.get(self.strategy) is BruteForce and self.n_trials >= self.space.size

    @property
    def settings(self) -> SearchTable:
        """The ``[search]`` table."""
        assert self.config.search is not None
        return self.config.search

    def trained(self, model: nn.Module) -> Plan:
        """The same plan with the trained model in it."""
        job = replace(self.evaluator.job, model=model)
        return replace(self, model=model, evaluator=open_evaluator(job))

    @property
    def auto_split(self) -> str | None:
        """The split of which a runner shall take as many samples as it needs; None where none asks for that."""
        assert self.config.search is not None
        for _, name, settings in asked_for(self.config.search.strategy):
            if settings.get("num_samples") == AUTO:
                split: str = RUNNERS.get(name).Settings(**settings).split  # type: ignore[attr-defined]
                return split
        return None

    def sampled(self, number: int) -> Plan:
        """The same plan with `number` samples where a runner shall take as many as it needs."""
        assert self.config.search is not None
        asked = {
            RUNNERS.official(name)
            for _, name, settings in asked_for(self.config.search.strategy)
            if settings.get("num_samples") == AUTO
        }
        runners = tuple(
            (side, name, {**settings, "num_samples": number} if name in asked else settings)
            for side, name, settings in self.evaluator.job.runners
        )
        return replace(self, evaluator=open_evaluator(replace(self.evaluator.job, runners=runners), self.space))

    def make_strategy(self, seed: int | None = None) -> Strategy:
        """A fresh strategy; without `seed`, with that of the configuration."""
        kind, objectives = STRATEGIES.get(self.strategy), len(self.objectives.directions)
        seed = self.config.seed if seed is None else seed
        if kind is OptunaStrategy:
            return OptunaStrategy(self.space, objectives, seed, self.sampler or "tpe")
        return kind(self.space, objectives, seed)

    def identity(self, weights: str | None) -> dict[str, Any]:
        """What trials of this search depend on; a run folder holds trials of one identity only."""
        search = self.settings
        trains = not self.brings_weights and self.config.load_name is None
        return {
            "model": self.config.model,
            "dataset": self.config.dataset,
            "data": self.dataset.fingerprint,
            "seed": self.config.seed,
            "training": training_settings(self.config) if trains else "none, the weights are given",
            "search_space": search.search_space.model_dump(exclude_none=True),
            "calibration": search.calibration.model_dump(),
            "sw_runner": dict(search.strategy.sw_runner),
            "hw_runner": dict(search.strategy.hw_runner),
            "objectives": self.objectives.described(),
            "summed": self.objectives.summed,
            "constraints": [c.text for c in self.constraints],
            "strategy": self.strategy,
            "sampler": self.sampler,
            "parameters": [p.name for p in self.space.parameters],
            "weights": weights,
        }

    def seconds_per_candidate(self) -> float:
        """Measured on a few candidates, in this process: consecutive ones, which share most of the work, where every
        one of the space will be evaluated; else random ones."""
        count = CONSECUTIVE if self.exhaustive else RANDOM

        def timed(some: Codes) -> float:
            begin = time.perf_counter()
            self.evaluator.measure(some)
            return (time.perf_counter() - begin) / len(some)

        if self.evaluator.job.training is not None:
            # Measured again a candidate would not be trained again, so another one says what it takes without what
            # happens once; unless that would take long itself.
            middle = self.space.size // 2
            first = timed(self.space.numbered(middle, middle + 1))
            other = self.space.numbered(middle + 1, middle + 2)
            return timed(other) if len(other) and first < WARM_SECONDS else first
        few = self.space.numbered(0, count) if self.exhaustive else self.space.sample(count, np.random.default_rng(0))
        # The first one pays for what happens once, such as calibration.
        known, each = 1, timed(few[:1])
        spent = each
        if each < PROBE_SECONDS:
            each = timed(few[:1])
        # Eight times as many take less than eight times as long.
        while known < len(few) and spent < PROBE_SECONDS:
            known *= 8
            each = timed(few[:known])
            spent += each * known
        return each


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


def make_plan(
    config: Config,
    *,
    model: nn.Module | None = None,
    dataset: Dataset | None = None,
    report: Any = None,
    progress: Any = None,
) -> Plan:
    """Check everything, and lay out the search.

    Args:
        model, dataset: the user's own, instead of those the configuration names.
        report, progress: as in ``DataRequest``.

    Raises:
        UserError: whatever is wrong, named before any work.
    """
    if config.search is None:
        raise ConfigError("there is no [search] in this configuration; `bitfront init` writes one that runs")
    with config.locating():
        own_strategy = config.search.strategy
        strategy, sampler = named_strategy(own_strategy.name, own_strategy.setup.sampler)
        runners, metrics, sides, added = configured(config)
        objectives = _objectives(config, metrics)
    dataset = dataset or open_data(config, report, progress)
    own = model if model is not None else open_model(config, dataset)
    if model is None and config.load_name is not None:
        load_weights(config, own)  # thrown away: it only must not fail later
    device, warning = choose_device(config.accelerator)
    with config.locating():
        check_ready(runners, device)
    sample = dataset.split("train")[0][:2]
    graph = capture(own, sample)
    seed = {k: v.config for k, v in config.search.search_space.seed.items()}
    by = config.search.search_space.setup.by
    with config.locating():
        try:
            build_space = SPACES.get(config.search.search_space.name)
        except ConfigError as error:
            error.key = ("search", "search_space", "name")
            raise
        parts = _parts(config)
        space = build_space(SpaceRequest(graph, by, seed, parts=parts))
        assert isinstance(space, ModelSpace)
        n_trials = _budget(config, strategy, space)
        training = _training(config, runners, dataset, objectives)
    job = EvaluationJob(
        model=graph.model,
        sample=sample,
        space=config.search.search_space.name,
        by=by,
        seed=seed,
        runners=runners,
        splits=evaluation_samples(dataset, runners, config.seed),
        calibration=chosen_samples(dataset, "train", config.search.calibration.num_samples, config.seed)[0],
        device=device,
        corrections=Corrections(config.search.calibration.bias_correction, config.search.calibration.batch_norm),
        parts=parts,
        training=training,
    )
    evaluator = open_evaluator(job, space)
    with config.locating():
        if config.search.finetune.trials and "accuracy" not in evaluator.metrics:
            raise ConfigError(
                "what is trained on is judged by its accuracy, and no runner measures it; add "
                "[search.strategy.sw_runner.basic_evaluation]",
                key=("search", "finetune", "trials"),
            )
        constraints = read(config.search.constraints, evaluator)
        check(evaluator, constraints, trained=False)
    notes = [*config.notes, *([warning] if warning else []), *dataset.notes]
    notes += [f"[search.constraints] needs runner {name}: it was added with its defaults" for name in added]
    notes += [f"{k!r} of the seed names nothing here (by = {by!r}), and is not used" for k in space.unused]
    if graph.untraced:
        notes.append(
            f"torch.fx cannot trace this model, so its modules alone are sites and candidates are evaluated whole; "
            f"the tracer stopped at {graph.untraced}"
        )
    if graph.uncounted:
        notes.append("operations not counted: " + ", ".join(n.title for n in graph.uncounted))
    notes += [*_objective_notes(config), *size_notes(dataset, runners), *_weight_notes(space)]
    notes += _correction_notes(space, job.corrections)
    notes += _kind_notes(evaluator)
    notes += [*space.notes, *_training_notes(config, dataset, space, training)]
    layout = Plan(
        config=config,
        dataset=dataset,
        model=own,
        brings_weights=model is not None,
        evaluator=evaluator,
        objectives=objectives,
        sides=sides,
        strategy=strategy,
        sampler=sampler,
        n_trials=n_trials,
        notes=tuple(notes),
        constraints=constraints,
    )
    # How many samples "auto" means is known once there are weights; until then it is a guess.
    return layout if layout.auto_split is None else layout.sampled(FIRST)


def named_strategy(name: str, asked: str | None) -> tuple[str, str | None]:
    """(official name of a strategy, that of its sampler if it has one). Raises ConfigError."""
    try:
        name = STRATEGIES.official(name)
    except ConfigError as error:
        error.key = ("search", "strategy", "name")
        if name in SAMPLERS:
            raise ConfigError(
                f"{name!r} is a sampler of strategy 'optuna': name that one, and setup.sampler (--sampler) {name!r}",
                key=error.key,
            ) from None
        raise
    where = ("search", "strategy", "setup", "sampler")
    try:
        sampler = sampler_name(asked or "tpe")
    except ConfigError as error:
        error.key = where
        raise
    if STRATEGIES.get(name) is not OptunaStrategy:
        if asked is not None and sampler != name:
            raise ConfigError(f"a sampler belongs to strategy 'optuna', and this one is {name!r}", key=where)
        return name, None
    # Optuna's own brute force costs 100 ms per proposal at 3,000 trials, and does not survive batches.
    return ("brute_force", None) if sampler == "brute_force" else (name, sampler)


def _parts(config: Config) -> dict[str, Part]:
    """The tables of a space that is made of others."""
    assert config.search is not None
    own = config.search.search_space
    where = ("search", "search_space")
    if SPACES.official(own.name) != "joint":
        for name in own.parts:
            raise ConfigError(
                f"only a space with name = 'joint' has parts, and this one is {own.name!r}", key=(*where, name)
            )
    elif own.seed:
        raise ConfigError("a joint space has its seeds in the tables quantize and widths", key=(*where, "seed"))
    return {name: Part(p.setup.by, {k: v.config for k, v in p.seed.items()}) for name, p in own.parts.items()}


def _training(config: Config, runners: Runners, dataset: Dataset, objectives: Objectives) -> CandidateTraining | None:
    """How candidates are trained; None where no runner asks for it."""
    assert config.search is not None
    given = [(s, n, g) for s, n, g in runners if RUNNERS.get(n) is BasicTrain]
    if not given:
        return None
    calibration = config.search.calibration
    for key in ("bias_correction", "batch_norm"):
        if getattr(calibration, key):
            raise ConfigError(
                f"{key} has no place where candidates are trained: what it corrects is learned in training; leave "
                "it out, or basic_train",
                key=("search", "calibration", key),
            )
    for side, name, table in runners:
        split = getattr(RUNNERS.get(name).Settings(**table), "split", None)
        if split == "train":
            raise ConfigError(
                "candidates are trained on the training split, so they must be evaluated on another: val_dataloader",
                key=("search", "strategy", side, name, "data_loader"),
            )
    side, name, table = given[0]
    own = BasicTrainSettings.model_validate({k: (None if v == "NA" else v) for k, v in table.items()})
    x, y = chosen_samples(dataset, "train", own.num_samples, config.seed)
    settings = TrainSettings(
        max_epochs=own.max_epochs,
        batch_size=own.batch_size or config.batch_size,
        learning_rate=own.learning_rate or config.learning_rate,
        weight_decay=config.weight_decay if own.weight_decay is None else own.weight_decay,
        optimizer=own.optimizer or config.training_optimizer,
        seed=config.seed,
    )
    halving = None
    if own.halving is not None:
        halving = _halving(
            runners, own.halving, own.max_epochs, objectives, ("search", "strategy", side, name, "halving")
        )
    return CandidateTraining(x, y, dataset.num_classes, settings, own.init, own.float_epochs, halving)


def _halving(
    runners: Runners, own: HalvingSettings, epochs: int, objectives: Objectives, where: tuple[str, ...]
) -> Halving:
    """How candidates are compared while they are trained."""
    produced = {m.name: RUNNERS.get(name) for _, name, _ in runners for m in RUNNERS.get(name).produces}
    if "accuracy" not in produced:
        raise ConfigError("candidates are compared by their accuracy; add sw_runner.basic_evaluation", key=where)
    if own.rungs != sorted(set(own.rungs)) or not 0 < own.rungs[0] <= own.rungs[-1] < epochs:
        raise ConfigError(
            f"{own.rungs} is not possible; allowed: ascending whole numbers from 1 to {epochs - 1}, before max_epochs",
            key=(*where, "rungs"),
        )
    # A negative scale turns a metric round.
    costs = tuple(
        (p.metric, (1.0 if (objectives.summed or p.direction) == "minimize" else -1.0) * np.sign(p.scale))
        for p in objectives.parts
        if produced[p.metric].closed_form
    )
    return Halving(tuple(own.rungs), own.keep, own.cohort, costs)


def _training_notes(
    config: Config, dataset: Dataset, space: ModelSpace, training: CandidateTraining | None
) -> list[str]:
    """What the user should know about what is trained, and what is not."""
    assert config.search is not None
    if training is None:
        notes = []
        if not config.search.strategy.eval_mode:
            notes.append("eval_mode = false has no effect: candidates are evaluated in eval mode")
        if not isinstance(space, QuantizationSpace):
            notes.append(
                "networks of other widths are not trained, they have the float model's weights, widened or cut; "
                "sw_runner.basic_train trains each candidate"
            )
        return notes
    for _, name, own in asked_for(config.search.strategy):
        asked, there = own.get("num_samples"), len(dataset.split("train")[1])
        if RUNNERS.get(name) is BasicTrain and isinstance(asked, int) and asked > there:
            return [f"{name}.num_samples = {asked:,}, and train has {there:,} samples: all are used"]
    return []


def _objectives(config: Config, metrics: list[Metric]) -> Objectives:
    assert config.search is not None
    own = config.search.strategy
    summed = own.setup.direction if own.setup.sum_scaled_metrics else None
    if own.setup.sum_scaled_metrics and summed is None:
        raise ConfigError(
            "sum_scaled_metrics = true needs direction = 'maximize' or 'minimize'",
            key=("search", "strategy", "setup", "sum_scaled_metrics"),
        )
    return choosing.choose({n: (m.scale, m.direction) for n, m in own.metrics.items()}, metrics, summed)


def _objective_notes(config: Config) -> list[str]:
    assert config.search is not None
    setup = config.search.strategy.setup
    if not setup.sum_scaled_metrics:
        return [
            f"metrics.{name}.scale is negative, which turns the metric round: {own.direction} means the other way here"
            for name, own in config.search.strategy.metrics.items()
            if own.scale < 0 and own.direction is not None
        ]
    return [
        f"metrics.{name}.direction = {own.direction!r} has no effect: with sum_scaled_metrics the sum is what is "
        f"{setup.direction}d; turn the metric round with a negative scale"
        for name, own in config.search.strategy.metrics.items()
        if own.direction is not None and own.direction != setup.direction and own.scale > 0
    ]


def _kind_notes(evaluator: Evaluator) -> list[str]:
    """Metrics whose values come about in another way in this search than they usually do."""
    found: dict[tuple[str, str], list[str]] = {}
    usual = {m.name: m.kind for runner in evaluator.runners for m in runner.produces}
    for name, (kind, why) in evaluator.kinds().items():
        if kind != usual[name]:
            found.setdefault((kind, why), []).append(name)
    return [f"{', '.join(names)}: {kind}, not measured ({why})" for (kind, why), names in found.items()]


def _weight_notes(space: ModelSpace) -> list[str]:
    """What average_bitwidth does not see: weights of layers that are no site."""
    model, seen = space.graph.model, {name for site in space.graph.sites for name in site.parameters}
    outside = {n: p.numel() for n, p in model.named_parameters() if n not in seen and p.dim() > 1}
    if not outside:
        return []
    layers = ", ".join(dict.fromkeys(name.rpartition(".")[0] or name for name in outside))
    total = sum(p.numel() for p in model.parameters())
    return [
        f"{sum(outside.values()):,} of {total:,} parameters are weights of layers that cannot be configured "
        f"({layers}): they stay in float, model_size counts them, average_bitwidth does not"
    ]


def _correction_notes(space: ModelSpace, asked: Corrections) -> list[str]:
    """Corrections that are asked for and find nothing to correct."""
    graph, notes = space.graph, []
    if asked.bias and not any(has_bias(graph, s) for s in graph.sites):
        notes.append("bias_correction = true has no effect: no layer that can be configured has a bias")
    if asked.batch_norm and not any(norms_behind(graph, s) for s in graph.sites):
        why = "the model cannot be traced" if graph.untraced else "no batch norm is right behind a layer with weights"
        notes.append(f"batch_norm = true has no effect: {why}")
    return notes


def _budget(config: Config, strategy: str, space: ModelSpace) -> int:
    assert config.search is not None
    setup = config.search.strategy.setup
    if STRATEGIES.get(strategy) is not BruteForce:
        return setup.n_trials or DEFAULT_TRIALS
    if setup.n_trials is None and space.size > setup.max_size:
        raise ConfigError(
            f"the space has {space.size:,} candidates, and brute force stops at max_size = {setup.max_size:,}. Take "
            "choices out, set max_size (or n_trials) yourself, or use another strategy, e.g. name = 'optuna'",
            key=("search", "strategy", "setup", "max_size"),
        )
    return setup.n_trials or space.size
