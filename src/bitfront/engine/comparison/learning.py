"""A strategy that trains its networks (``trains_bits``), beside strategies that choose among candidates of a space.

They have model, data, samples and metrics in common, and no candidates. So each random seed has a training, and keeps
it in a folder in ``compare/``: the cycles, and what was measured of their networks. A comparison that is started again
goes on behind the last complete cycle. A time limit is spread over the whole range of pressures, as in a search.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bitfront.config import CalibrationTable
from bitfront.engine.comparison.cached import CachedEvaluator
from bitfront.engine.evaluation.trained import open_evaluator
from bitfront.engine.planning.builder import make_plan
from bitfront.engine.planning.feasibility import Feasibility
from bitfront.engine.planning.inputs import weights_fingerprint
from bitfront.engine.planning.learning import target_of
from bitfront.engine.planning.plan import Plan
from bitfront.engine.planning.training import configured_training
from bitfront.engine.search.session import bounds, float_metrics, keep_pace, open_dispatcher, with_length
from bitfront.engine.storage.store import Store
from bitfront.events import Events
from bitfront.learned_bits.trained import TrainedCourse
from bitfront.strategies.configured import ConfiguredStrategy
from bitfront.strategies.learned_bits import LearnedBitsSettings

#: The file of a training with what was measured of its networks.
MEASURED = "networks.sqlite"


@dataclass(frozen=True)
class LearnedRun:
    """What a run of such a strategy needs: its plan, its constraints, and the evaluator of its networks.

    Attributes:
        spent: seconds in which its length was determined, with the training of teachers; they count as its time.
    """

    plan: Plan
    limits: Feasibility
    cached: CachedEvaluator
    spent: float


def learning_plan(plan: Plan, strategy: ConfiguredStrategy) -> Plan:
    """The plan of a training with learned bits, with the model, the data and the metrics of a comparison.

    Training of candidates and corrections are left out: they belong to the strategies that do not train.

    Raises:
        ConfigError: the model cannot be trained so, or no objective depends on bits.
    """
    search = plan.settings
    training = configured_training(plan.runners)
    trains = {training[0].where[-1]} if training else set()
    kept = {name: table for name, table in search.strategy.sw_runner.items() if name not in trains}
    setup = search.strategy.setup.model_copy(update={"candidate_timeout": None})
    table = search.calibration
    calibration = CalibrationTable(num_samples=table.num_samples, equalisation=table.equalisation)
    changed = {
        "strategy": search.strategy.model_copy(update={"sw_runner": kept, "setup": setup}),
        "calibration": calibration,
    }
    config = plan.config.model_copy(update={"search": search.model_copy(update=changed)})
    learned = make_plan(config, model=plan.model, dataset=plan.dataset, strategy=strategy)
    samples = plan.evaluator.accuracy_samples
    if learned.auto_split is not None and samples is not None and samples.number is not None:
        learned = learned.sampled(samples.number)
    return _with_time(learned)


def _with_time(plan: Plan) -> Plan:
    """The plan, where a time limit says how many epochs the cycles have; `n_trials` still says how many cycles there
    are. In a search `n_trials` says the whole length. Here it is the budget of all strategies."""
    search, settings = plan.settings, plan.strategy.settings
    assert isinstance(settings, LearnedBitsSettings)
    if search.strategy.setup.timeout is None or settings.cycles is not None or settings.epochs is not None:
        return plan
    setup = search.strategy.setup.model_copy(update={"n_trials": None})
    strategy = search.strategy.model_copy(update={"setup": setup})
    search = search.model_copy(update={"strategy": strategy})
    return replace(plan, config=plan.config.model_copy(update={"search": search}))


def forget(folder: Path) -> None:
    """Delete all trainings of a comparison."""
    for file in folder.glob(f"*/{MEASURED}"):
        shutil.rmtree(file.parent)


@contextlib.contextmanager
def opened(plan: Plan, seed: int, folder: Path, events: Events) -> Iterator[LearnedRun]:
    """A training with another random seed, which goes on where an earlier session left it.

    Args:
        plan: from ``learning_plan``.
        seed: of the order of the samples, and of the members after the first one.
        folder: of the comparison.
        events: receives the progress of the training.

    Raises:
        RunError: the folder of this training belongs to another configuration.
    """
    folder = folder / f"{plan.strategy.title.replace(':', '-')}-{seed}"
    learning = plan.evaluator.job.learning
    assert learning is not None
    seeded = replace(learning, schedule=replace(learning.schedule, seed=seed), course=TrainedCourse())
    plan = replace(plan, evaluator=open_evaluator(replace(plan.evaluator.job, learning=seeded)))
    schedule = {"cycles": seeded.schedule.cycles, "epochs": seeded.schedule.epochs}
    identity = {**plan.identity(weights_fingerprint(plan.model)), "seed": seed, **schedule}
    store = Store.open(folder / MEASURED, plan.evaluator.metrics, len(plan.space.parameters), identity, plan.space.keys)
    try:
        plan.evaluator.keep_in(folder)
        with open_dispatcher(plan, store, events) as dispatcher:
            most, began = plan.n_trials, time.perf_counter()
            plan = with_length(plan, store, folder, events, dispatcher)
            plan = replace(plan, n_trials=min(most, plan.n_trials))
            spent = store.meta("spent")
            if spent is None:
                spent = time.perf_counter() - began
                store.set_meta("spent", spent)
            limits = bounds(plan, float_metrics(plan))
            plan.evaluator.steer(target_of(plan.evaluator, limits.constraints))
            seeded.course.on_epoch = events.learning
            seeded.course.elsewhere = dispatcher.elsewhere()
            # What was trained in earlier sessions took its time from this run too.
            keep_pace(plan, store, time.perf_counter() - spent - float(store.trials().duration.sum()))
            yield LearnedRun(plan, limits, CachedEvaluator(dispatcher, store, plan.space.keys), spent)
    finally:
        store.close()
