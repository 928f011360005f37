"""How a search with the strategy ``learned_bits`` trains: its samples, its cycles, and what a bit costs."""

from __future__ import annotations

from bitfront.config import Config
from bitfront.data.base import Dataset
from bitfront.engine.evaluation.interface import BitsLearning
from bitfront.engine.planning.runners import Runners, chosen_samples
from bitfront.errors import ConfigError
from bitfront.learned_bits.course import Cost, Schedule
from bitfront.learned_bits.program import Granularities
from bitfront.strategies.configured import SETUP, ConfiguredStrategy
from bitfront.strategies.learned_bits import LearnedBitsSettings

#: What a bit costs, by metric: pairs of bits that are multiplied; bits of weights and biases that are stored.
COSTS = {
    "ebops": Cost(pairs=1.0, stored=0.0, biases=1.0),
    "bops": Cost(pairs=1.0, stored=0.0, biases=0.0),
    "model_size": Cost(pairs=0.0, stored=1.0, biases=1.0),
}


def bits_learning(
    config: Config, strategy: ConfiguredStrategy, runners: Runners, dataset: Dataset
) -> BitsLearning | None:
    """How weights and bits are learned together; None with another strategy.

    Raises:
        ConfigError: the settings contradict other settings of the search; ``key`` names the setting.
    """
    settings = strategy.settings
    if not isinstance(settings, LearnedBitsSettings):
        return None
    metrics = {metric.name for runner in runners for metric in runner.produces}
    if settings.cost not in metrics:
        raise ConfigError(
            f"cost = {settings.cost!r} needs this metric; add [search.strategy.hw_runner.{settings.cost}]",
            key=(*SETUP, "cost"),
        )
    samples = next((runner.settings.samples for runner in runners if runner.settings.samples is not None), None)
    if samples is None:
        raise ConfigError(
            "networks are chosen by their accuracy; add [search.strategy.sw_runner.basic_evaluation]", key=(*SETUP,)
        )
    x, y = chosen_samples(dataset, "train", None, config.seed)
    val_x, val_y = chosen_samples(dataset, samples.split, samples.number, config.seed)
    schedule = Schedule(
        cycles=settings.cycles,
        epochs=settings.epochs,
        members=settings.members,
        networks=settings.networks,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        bits_rate=settings.bits_rate,
        patience=settings.patience,
        first=settings.first_pressure,
        last=settings.last_pressure,
        seed=config.seed,
    )
    default = Granularities(settings.weight, settings.data_in)
    named = {
        path: Granularities(table.get("weight", settings.weight), table.get("data_in", settings.data_in))
        for path, table in settings.layers.items()
    }
    return BitsLearning(x, y, val_x, val_y, schedule, COSTS[settings.cost], default, named)
