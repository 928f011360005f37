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
from bitfront.learned_bits.course import Schedule
from bitfront.learned_bits.program import Granularities
from bitfront.learned_bits.space import LearnedBitsSpace
from bitfront.learned_bits.state import Cost
from bitfront.learned_bits.steering import Target
from bitfront.objectives import Objectives
from bitfront.strategies.configured import SETUP, ConfiguredStrategy
from bitfront.strategies.learned_bits import LayerSettings, LearnedBitsSettings
from bitfront.tasks.base import Task, TaskMetric

#: Steps of a cycle while all weights are alive, and how long a weight must be zero to be removed, where the file says
#: nothing: what served a classifier of 16 features well, in 12 and in 5 epochs of 270,000 samples.
STEPS, PATIENCE = 6300, 2640
#: Cycles, where the file says nothing.
CYCLES = 20
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
    device: str,
    task: Task,
) -> BitsLearning | None:
    """How weights and bits are learned together; None with another strategy.

    Raises:
        ConfigError: the settings contradict other settings of the search; ``key`` names the setting.
    """
    settings = strategy.settings
    if not isinstance(settings, LearnedBitsSettings):
        return None
    _check_others(config, runners, dataset)
    # What is measured beside the objectives presses too, as ebops does where the objective is lut.
    measured = [*(p.metric for p in objectives.parts), *(m.name for runner in runners for m in runner.produces)]
    cost: str | None = settings.cost or next((name for name in measured if name in COSTS), None)
    if cost is None:
        raise ConfigError(
            f"strategy 'learned_bits' needs a cost that depends on bits, and no metric is one; {one_of(COSTS)}. Add "
            "[search.strategy.hw_runner.ebops] and [search.strategy.metrics.ebops]",
            key=("search", "strategy", "metrics"),
        )
    samples = next((runner.settings.samples for runner in runners if runner.settings.samples is not None), None)
    if samples is None:
        raise ConfigError(
            f"networks are chosen by {task.leading.name}; add [search.strategy.sw_runner.basic_evaluation]", key=SETUP
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
    default = _granularities(settings, Granularities(data_in=settings.weight), "default", SETUP)
    where = (*SETUP, "layers")
    named = {key: _granularities(table, default, key, (*where, key)) for key, table in settings.layers.items()}
    return BitsLearning(
        *(x, y, val_x, val_y, schedule, cost, COSTS[cost], default, named),
        dataset.num_classes,
        _teacher(config, settings, model, task),
        settings.temperature,
        settings.float_epochs,
        device=device,
        task=task,
    )


def unused_settings(config: Config, strategy: ConfiguredStrategy) -> list[str]:
    """Notes on settings of the float training that were given for a model that needs none, where those of the training
    with learned bits may be meant."""
    settings = strategy.settings
    if not isinstance(settings, LearnedBitsSettings):
        return []
    return [
        f"{key} = {getattr(config, key)} has no effect: it is that of the float training, and the model has weights. "
        f"Learned bits are trained with {'.'.join(SETUP)}.{key} = {getattr(settings, key) or 'its default'}"
        for key in ("batch_size", "learning_rate")
        if key in config.model_fields_set
    ]


def _granularities(
    table: LearnedBitsSettings | LayerSettings, default: Granularities, rule: str, where: tuple[str, ...]
) -> Granularities:
    """Which values share bits, and their widths; what the table does not say is as in `default`. Raises ConfigError."""

    def widths(key: str, otherwise: tuple[int, ...]) -> tuple[int, ...]:
        given: list[int] | None = getattr(table, key)
        if given is None:
            return otherwise
        if 1 in given:
            raise ConfigError("1 bit is that of the sign, and leaves none; allowed: 0, and 2 to 20", key=(*where, key))
        if not any(given):
            raise ConfigError(
                f"{given} removes everything; name the widths that remain, e.g. [0, 4, 8]", key=(*where, key)
            )
        return tuple(sorted(set(given)))

    shared = Granularities(
        table.weight or default.weight,
        table.data_in or default.data_in,
        widths("weight_width", default.weight_width),
        widths("data_in_width", default.data_in_width),
        widths("bias_width", default.bias_width),
        rule,
        table.data_in_rounding or default.data_in_rounding,
    )
    for operand in ("weight", "data_in"):
        listed = getattr(shared, f"{operand}_width")
        if getattr(shared, operand) == "element" and listed:
            key = f"{operand}_width" if getattr(table, f"{operand}_width") is not None else operand
            raise ConfigError(
                f"{operand} = 'element' gives each value bits of its own, and {operand}_width = {list(listed)} is for "
                f"values that share a width; set {operand} = 'channel' or 'layer', or remove {operand}_width",
                key=(*where, key),
            )
    return shared


def _teacher(
    config: Config, settings: LearnedBitsSettings, model: nn.Module, task: Task
) -> Literal["none", "self", "ensemble"] | checkpoints.StateDict:
    if settings.teacher != "none" and not task.plainly_trained:
        raise ConfigError(
            f"teacher = {settings.teacher!r}: a teacher answers in place of labels where the loss is the plain cross "
            "entropy, and this task has another one; remove it. With labels = false the float model is the teacher of "
            "any task",
            key=(*SETUP, "teacher"),
        )
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
        constraints: with absolute bounds. Those on accuracy (or what leads in another task) steer the training, and
            those on metrics that are counted and fall (or rise) with the bits. Its networks must fulfil the others all
            the same.
    """
    learning, task = evaluator.job.learning, evaluator.job.task
    assert learning is not None
    leading, classifies = task.leading, task.classifies
    counted = {m.name: m.direction for runner in evaluator.runners if runner.closed_form for m in runner.produces}
    better = {"minimize": ("<=", "<"), "maximize": (">=", ">")}
    right, cost, others = None, None, []
    for constraint in constraints:
        if constraint.metric == leading.name and constraint.comparison in better[leading.direction]:
            bound = _least_right(constraint.bound, leading, len(learning.val_y) if classifies else None)
            right = bound if right is None else max(right, bound)
        elif constraint.comparison in better.get(counted.get(constraint.metric, ""), ()):
            if constraint.metric == learning.metric and _counts_as_reported(evaluator):
                cost = min(cost or math.inf, constraint.bound)
            else:
                others.append(constraint)
    return Target(right, cost, tuple(others))


def _least_right(bound: float, leading: TaskMetric, samples: int | None) -> float:
    """How good a network must be, as a training counts it, for a bound on the metric that leads.

    Args:
        bound: of the constraint.
        leading: the metric.
        samples: how many there are, of a classification, whose right answers are counted; None for other tasks.
    """
    if samples is not None:
        # Less than an answer, for bounds that are not exact.
        return bound * samples - 1e-6
    return (bound if leading.direction == "maximize" else -bound) - 1e-9 * max(1.0, abs(bound))


def _batch(samples: int) -> int:
    """The power of two from 32 to 1,024 that is nearest to a 500th of the samples, in its logarithm."""
    exponent = round(math.log2(max(1, samples) / 500))
    return 1 << min(10, max(5, exponent))


def _counts_as_reported(evaluator: Evaluator) -> bool:
    """Whether the training counts its cost as it is reported: EBOPs, in their usual convention, of whole networks."""
    learning, space = evaluator.job.learning, evaluator.space
    if isinstance(space, LearnedBitsSpace) and space.program.float_macs:
        return False
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
        (calibration.integer_bias, (*where, "integer_bias"), "training learns the biases, with their bits"),
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
    return settings.cycles or CYCLES if trials is None else max(1, -(-trials // (settings.members * settings.networks)))
