"""How a search with the strategy ``learned_bits`` trains: its samples, its cycles, and what a bit costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast

from torch import nn

from bitfront import checkpoints
from bitfront.config import Config
from bitfront.constraints import Constraint
from bitfront.data.base import Dataset
from bitfront.engine.evaluation.interface import BitsLearning, Evaluator
from bitfront.engine.planning.runners import Runners, chosen_samples
from bitfront.engine.planning.training import configured_training
from bitfront.errors import CheckpointError, ConfigError, one_of
from bitfront.learned_bits.course import Cost, Schedule
from bitfront.learned_bits.program import Granularities
from bitfront.learned_bits.steering import Target
from bitfront.objectives import Objectives
from bitfront.strategies.configured import SETUP, ConfiguredStrategy
from bitfront.strategies.learned_bits import LearnedBitsSettings

#: Steps of a cycle while all weights are alive, and how long a weight must be zero to be removed, where the file says
#: nothing: what served a classifier of 16 features well, in 12 and in 5 epochs of 270,000 samples.
STEPS, PATIENCE = 6300, 2640
#: What a bit costs, by metric: pairs of bits that are multiplied; bits of weights and biases that are stored.
COSTS = {
    "ebops": Cost(pairs=1.0, stored=0.0, biases=1.0),
    "bops": Cost(pairs=1.0, stored=0.0, biases=0.0),
    "model_size": Cost(pairs=0.0, stored=1.0, biases=1.0),
    "average_bitwidth": Cost(pairs=0.0, stored=1.0, biases=0.0),
}


def bits_learning(
    config: Config,
    strategy: ConfiguredStrategy,
    runners: Runners,
    objectives: Objectives,
    dataset: Dataset,
    model: nn.Module,
) -> BitsLearning | None:
    """How weights and bits are learned together; None with another strategy.

    Raises:
        ConfigError: the settings contradict other settings of the search; ``key`` names the setting.
    """
    settings = strategy.settings
    if not isinstance(settings, LearnedBitsSettings):
        return None
    _check_others(config, runners, dataset)
    cost: str | None = settings.cost or next((p.metric for p in objectives.parts if p.metric in COSTS), None)
    if cost is None:
        raise ConfigError(
            f"strategy 'learned_bits' needs a cost that depends on bits, and no objective is one; {one_of(COSTS)}. Add "
            "[search.strategy.hw_runner.ebops] and [search.strategy.metrics.ebops]",
            key=("search", "strategy", "metrics"),
        )
    samples = next((runner.settings.samples for runner in runners if runner.settings.samples is not None), None)
    if samples is None:
        raise ConfigError(
            "networks are chosen by their accuracy; add [search.strategy.sw_runner.basic_evaluation]", key=(*SETUP,)
        )
    x, y = chosen_samples(dataset, "train", None, config.seed)
    val_x, val_y = chosen_samples(dataset, samples.split, samples.number, config.seed)
    batch = settings.batch_size or _batch(len(y))
    steps = math.ceil(len(y) / batch)
    schedule = Schedule(
        cycles=_cycles(config, settings),
        epochs=settings.epochs or STEPS / steps,
        members=settings.members,
        networks=settings.networks,
        batch_size=batch,
        learning_rate=settings.learning_rate,
        bits_rate=settings.bits_rate,
        patience=settings.patience or max(1, round(PATIENCE / steps)),
        first=settings.first_pressure,
        last=settings.last_pressure,
        seed=config.seed,
    )
    default = Granularities(settings.weight, settings.data_in)
    named = {
        path: Granularities(table.get("weight", settings.weight), table.get("data_in", settings.data_in))
        for path, table in settings.layers.items()
    }
    return BitsLearning(
        *(x, y, val_x, val_y, schedule, cost, COSTS[cost], default, named),
        dataset.num_classes,
        _teacher(config, settings, model),
        settings.temperature,
        settings.float_epochs,
    )


def _teacher(
    config: Config, settings: LearnedBitsSettings, model: nn.Module
) -> Literal["none", "self", "ensemble"] | checkpoints.StateDict:
    if settings.teacher in ("none", "self", "ensemble"):
        return cast(Literal["none", "self", "ensemble"], settings.teacher)
    try:
        return checkpoints.load_checkpoint(config.path(settings.teacher), model)
    except CheckpointError as error:
        raise ConfigError(
            f"teacher = {settings.teacher!r}: {error}. Allowed: none, self, ensemble, or a checkpoint of the model",
            key=(*SETUP, "teacher"),
        ) from None


def target_of(evaluator: Evaluator, constraints: Sequence[Constraint]) -> Target:
    """What constraints say about the course of a training with learned bits.

    Args:
        evaluator: of the search.
        constraints: with absolute bounds. Those on other metrics than accuracy and the cost do not steer the training;
            its networks must fulfil them all the same.
    """
    learning = evaluator.job.learning
    assert learning is not None
    right, cost = None, None
    for constraint in constraints:
        if constraint.metric == "accuracy" and constraint.comparison in (">=", ">"):
            right = max(right or 0.0, constraint.bound * len(learning.val_y))
        if constraint.metric == learning.metric and constraint.comparison in ("<=", "<"):
            cost = min(cost or math.inf, constraint.bound)
    return Target(right, cost if _counts_as_reported(evaluator) else None)


def _batch(samples: int) -> int:
    """The power of two from 32 to 1,024 that is nearest to a 500th of the samples, in its logarithm."""
    exponent = round(math.log2(max(1, samples) / 500))
    return 1 << min(10, max(5, exponent))


def _counts_as_reported(evaluator: Evaluator) -> bool:
    """Whether the training counts its cost as it is reported: EBOPs, in their usual convention."""
    learning = evaluator.job.learning
    runners = [r for r in evaluator.job.runners if r.name == "ebops"]
    usual = all(runner.settings == type(runner.settings)() for runner in runners)
    return learning is not None and learning.metric == "ebops" and usual


def _check_others(config: Config, runners: Runners, dataset: Dataset) -> None:
    """Raises ConfigError for settings that would have no effect on networks whose bits are learned."""
    if dataset.inputs:
        raise ConfigError(
            "the strategy 'learned_bits' trains networks with one input, and the data has several "
            f"({', '.join(one.name for one in dataset.inputs)}); use another strategy",
            key=("search", "strategy", "name"),
        )
    assert config.search is not None
    search = config.search
    training, calibration = configured_training(runners), search.calibration
    where = ("search", "calibration")
    # (whether it is configured, its key, why it is not possible)
    others = (
        (
            search.strategy.setup.candidate_timeout is not None,
            (*SETUP, "candidate_timeout"),
            "candidates have no time of their own: they come out of one training",
        ),
        (training is not None, training[0].where if training else (), "networks are not trained a second time"),
        (calibration.bias_correction, (*where, "bias_correction"), "training learns what it corrects"),
        (calibration.batch_norm, (*where, "batch_norm"), "batch norms are folded into the layers before them"),
        (calibration.rounding == "adaptive", (*where, "rounding"), "training learns how weights are rounded"),
        (search.finetune.trials > 0, ("search", "finetune", "trials"), "networks are not trained a second time"),
    )
    for configured, key, why in others:
        if configured:
            raise ConfigError(
                f"this is not possible with strategy 'learned_bits': {why}; remove it, or use another strategy", key=key
            )


def _cycles(config: Config, settings: LearnedBitsSettings) -> int:
    """Number of cycles: those that give `n_trials` networks, so that any budget covers the range of pressures."""
    assert config.search is not None
    trials = config.search.strategy.setup.n_trials
    return settings.cycles if trials is None else max(1, -(-trials // (settings.members * settings.networks)))
