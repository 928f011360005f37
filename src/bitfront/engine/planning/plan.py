"""The plan of a search, checked before any work. An immutable value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from bitfront.config import Config, SearchTable
from bitfront.constraints import Constraint
from bitfront.data.base import Dataset, Split
from bitfront.data.loading import is_path
from bitfront.engine.evaluation.interface import Evaluator
from bitfront.engine.evaluation.trained import open_evaluator
from bitfront.engine.evaluation.verification import Verification
from bitfront.engine.planning.inputs import brings_weights, training_settings
from bitfront.engine.planning.runners import Runners, auto_split
from bitfront.executors.base import Launcher
from bitfront.files import short_name
from bitfront.metrics.base import Side
from bitfront.metrics.coverage import of_no_site
from bitfront.objectives import Objectives
from bitfront.spaces.model_space import ModelSpace
from bitfront.strategies.base import Knowledge, Strategy
from bitfront.strategies.configured import ConfiguredStrategy
from bitfront.strategies.learned_bits import LearnedBitsSettings
from bitfront.tasks.configured import described
from bitfront.transforms.observe import piece_length

#: Counts up when the same settings give other ranges: trials with the ranges of before do not belong to this search.
RANGES = 2


def _without_place(name: str) -> str:
    """The name of a model or a dataset; of one that is a path, what is the same from every working directory."""
    *_, place = name.split(":")
    if place.startswith((".", "/", "~")):
        return short_name(name)
    return Path(name).stem if is_path(name) else name


@dataclass(frozen=True, eq=False)
class Plan:
    """The plan of a search, checked before any work.

    Attributes:
        config: the configuration of the search.
        dataset: the data, all splits in memory.
        model: the float model. It is initialised but not trained, unless the user passed a model object.
        brings_weights: whether the user passed a model object; its weights are used as they are.
        evaluator: evaluates candidates of that model; its space is the space of the search.
        runners: the metric runners as configured; ``num_samples = "auto"`` is not replaced by a number.
        objectives: what is optimised.
        strategy: the strategy with its settings.
        n_trials: the largest number of distinct candidates to evaluate.
        notes: remarks for the user.
        launcher: starts the executor that evaluates; None: this process does, or worker processes by need.
        constraints: what every result must fulfil. Bounds relative to the float model are not resolved yet.
        forward: the forward fingerprint of `model` before any training.
    """

    config: Config
    dataset: Dataset
    model: nn.Module
    brings_weights: bool
    evaluator: Evaluator
    runners: Runners
    objectives: Objectives
    strategy: ConfiguredStrategy
    n_trials: int
    notes: tuple[str, ...]
    launcher: Launcher | None = None
    constraints: tuple[Constraint, ...] = ()
    forward: tuple[float, ...] = ()

    def _repr_html_(self) -> str:
        import bitfront  # loads what draws when it is used

        return bitfront._html(self)

    @property
    def space(self) -> ModelSpace:
        """The space of the search."""
        return self.evaluator.space

    @property
    def sides(self) -> dict[str, Side]:
        """Metric → the table of its runner, ``sw_runner`` or ``hw_runner``."""
        return {metric.name: runner.side for runner in self.runners for metric in runner.produces}

    @property
    def workers(self) -> int:
        """How many workers evaluate at a time; 1 for this process."""
        given = self.launcher.settings.workers if self.launcher is not None else None
        return given or self.settings.strategy.setup.n_jobs

    @property
    def exhaustive(self) -> bool:
        """Whether every candidate of the space will be evaluated, in the space's order."""
        return self.strategy.kind.exhaustive and self.n_trials >= self.space.size

    @property
    def settings(self) -> SearchTable:
        """The ``[search]`` table."""
        assert self.config.search is not None
        return self.config.search

    def trained(self, model: nn.Module) -> Plan:
        """The same plan with a trained model."""
        job = replace(self.evaluator.job, model=model)
        return replace(self, model=model, evaluator=open_evaluator(job))

    def verified(self, verification: Verification) -> Plan:
        """The same plan without the fast paths whose results differ from the deployed model's."""
        job = verification.applied(self.evaluator.job)
        notes = (*self.notes, *verification.notes)
        return replace(self, notes=notes, evaluator=open_evaluator(job, self.space))

    @property
    def auto_split(self) -> Split | None:
        """The split of the runner with ``num_samples = "auto"``; None if there is no such runner."""
        return auto_split(self.runners)

    def sampled(self, number: int) -> Plan:
        """The same plan with `number` samples for runners with ``num_samples = "auto"``."""
        runners = tuple(
            replace(runner, settings=runner.settings.with_samples(number)) if auto_split((runner,)) else runner
            for runner in self.runners
        )
        return replace(self, evaluator=open_evaluator(replace(self.evaluator.job, runners=runners), self.space))

    def constrained(self, constraints: tuple[Constraint, ...]) -> Plan:
        """The same plan, whose halving goes by constraints: those of the plan, with resolved bounds."""
        training = self.evaluator.job.training
        if training is None or training.halving is None or not constraints:
            return self
        training = replace(training, halving=replace(training.halving, constraints=constraints))
        return replace(self, evaluator=open_evaluator(replace(self.evaluator.job, training=training), self.space))

    @property
    def chooses_length(self) -> bool:
        """Whether the length of a training with learned bits is chosen here: the file says no number for it."""
        settings, setup = self.strategy.settings, self.settings.strategy.setup
        if not isinstance(settings, LearnedBitsSettings):
            return False
        return settings.cycles is None and settings.epochs is None and setup.n_trials is None

    def paced(self, cycles: int, epochs: float) -> Plan:
        """The same plan of a training with learned bits, of another length."""
        job = self.evaluator.job
        assert job.learning is not None
        schedule = replace(job.learning.schedule, cycles=cycles, epochs=epochs)
        learning = replace(job.learning, schedule=schedule)
        if learning.course.course is not None:
            learning.course.course = replace(learning.course.course, schedule=schedule)
        evaluator = open_evaluator(replace(job, learning=learning))
        return replace(self, evaluator=evaluator, n_trials=evaluator.space.size)

    def make_strategy(self, knowledge: Knowledge, seed: int | None = None) -> Strategy:
        """A new strategy object.

        Args:
            knowledge: what is known before any evaluation.
            seed: its random seed; None for that of the configuration.
        """
        seed = self.config.seed if seed is None else seed
        return self.strategy.make(self.space, len(self.objectives.directions), seed, knowledge)

    @property
    def _counts_others(self) -> bool:
        """Whether `average_bitwidth` counts weights of no site."""
        return "average_bitwidth" in self.sides and of_no_site(self.space.quantization(self.space.graph))

    @property
    def _halves_by_constraints(self) -> bool:
        """Whether constraints say which candidates are trained on."""
        training = self.evaluator.job.training
        return bool(self.constraints) and training is not None and training.halving is not None

    @property
    def _batch(self) -> dict[str, int]:
        """The size of the batch that costs are of, where they are not of a sample."""
        return next(({"batch": size} for r in self.runners if (size := r.settings.batch)), {})

    @property
    def _in_pieces(self) -> bool:
        samples = len(self.evaluator.job.calibration)
        return piece_length(self.space.graph, samples) < samples

    def identity(self, weights: str | None) -> dict[str, Any]:
        """Everything that the trials of this search depend on. A run folder holds trials of one identity only.

        Args:
            weights: fingerprint of the float model's weights; None if it is not known yet.
        """
        search = self.settings
        table = search.calibration
        # Runs from before there were these keys have no entry for them.
        newer = set() if table.equalisation else {"equalisation"}
        newer |= set() if table.integer_bias else {"integer_bias"}
        newer |= set() if table.rounding == "adaptive" else {"rounding", "rounding_iterations"}
        library = self.config.weights and not self.brings_weights
        trains = not (self.brings_weights or self.config.load_name or brings_weights(self.config, self.dataset))
        return {
            "model": _without_place(self.config.model),
            "dataset": _without_place(self.config.dataset),
            "data": self.dataset.fingerprint,
            "seed": self.config.seed,
            "training": training_settings(self.config) if trains else "none, the weights are given",
            "search_space": search.search_space.model_dump(exclude_none=True),
            "calibration": table.model_dump(exclude=newer),
            "ranges": RANGES,
            "sw_runner": dict(search.strategy.sw_runner),
            "hw_runner": dict(search.strategy.hw_runner),
            "objectives": self.objectives.described(),
            "summed": self.objectives.summed,
            "constraints": [c.text for c in self.constraints],
            **self.strategy.identity,
            "parameters": [p.name for p in self.space.parameters],
            "weights": weights,
            "forward": list(self.forward),
            # An earlier version counted the weights of sites alone, which are often all that there are.
            **({"bitwidth": "of all weights"} if self._counts_others else {}),
            # An earlier version looked at all calibration samples at once.
            **({"calibrated": "in pieces"} if self._in_pieces else {}),
            # An earlier version counted signs, and no biases.
            **({"ebops_count": "as HGQ2"} if "ebops" in self.sides else {}),
            # An earlier version did not look at constraints there.
            **({"halving": "by constraints"} if self._halves_by_constraints else {}),
            **described(self.config),
            **self._batch,
            **({"folded": "batch_norm"} if search.fold_batch_norm else {}),
            **({"library_weights": True} if library else {}),
            # Of logits there is nothing to say, as before there were other outputs.
            **({} if self.space.graph.outputs == "logits" else {"outputs": self.space.graph.outputs}),
        }
