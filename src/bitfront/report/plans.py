"""What a search would do, as text: the choices of each site, the size of the space, the expected time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitfront.report.tables import Sheet, duration, number
from bitfront.spaces.base import counted

if TYPE_CHECKING:
    from bitfront.engine.planning.plan import Plan


def plan_sites(plan: Plan) -> Sheet:
    """The choices of each site, and the key of the configuration that they come from."""
    rows = [[o.site, o.type, o.rule, o.choices, f"{o.options:,}"] for o in plan.space.offers()]
    return Sheet(["site", "type", "rule", "choices", "options"], rows, right=["options"])


def learning_summary(plan: Plan, seconds: float | None) -> list[str]:
    """What a training with learned bits will do and about how long it takes, one per line.

    Args:
        seconds: measured time of an epoch; None: it was not measured, and no time is said.
    """
    learning = plan.evaluator.job.learning
    assert learning is not None
    schedule = learning.schedule
    members = f" of {schedule.members} members" if schedule.members > 1 else ""
    directions = zip(plan.objectives.names, plan.objectives.directions, strict=True)
    epochs = max(schedule.epochs, schedule.networks)
    teacher = learning.teacher if isinstance(learning.teacher, str) else "the network of a checkpoint"
    timeout = plan.settings.strategy.setup.timeout
    whole = (seconds or 0.0) * schedule.cycles * epochs * schedule.members
    limit = [f"constraints: {', '.join(c.text for c in plan.constraints)}"] if plan.constraints else []
    if timeout is not None and plan.chooses_length:
        limit += [f"the timeout of {duration(timeout)} is spent on that; the search measures once more"]
    elif timeout is not None and whole > timeout:
        limit += [f"the timeout of {duration(timeout)} ends it before that"]
    cost = [] if seconds is None else [_cost_of_learning(plan, seconds, whole)]
    return [
        f"learned bits: {schedule.cycles} cycles{members}, each of {number(epochs)} epochs while all weights are "
        f"alive, and of more later; {min(plan.n_trials, plan.space.size):,} networks",
        f"trained by: {plan.evaluator.trainer}",
        f"pressed on: {learning.metric}; teacher: {teacher}",
        f"objectives: {', '.join(f'{name} ({d})' for name, d in directions)}",
        *cost,
        *limit,
    ]


def _cost_of_learning(plan: Plan, seconds: float, whole: float) -> str:
    """The time of an epoch, and of the whole training, in seconds."""
    learning = plan.evaluator.job.learning
    assert learning is not None
    threads = ", on one thread" if learning.schedule.members > 1 else ""
    return (
        f"cost: {number(float(f'{1000 * seconds:.2g}'))} ms per epoch (measured on one), about {duration(whole)} of "
        f"training in all (estimated{threads}), and the time in which networks are measured"
        + (", and the training of teachers" if learning.teacher == "ensemble" else "")
    )


def plan_summary(plan: Plan, seconds: float | None = None) -> list[str]:
    """Size of the space, strategy, objectives and expected time, one per line.

    Args:
        seconds: measured time per candidate; with learned bits, per epoch of their training. None: it was not measured,
            and no time is said.
    """
    if plan.evaluator.job.learning is not None:
        return learning_summary(plan, seconds)
    size, n = plan.space.size, min(plan.n_trials, plan.space.size)
    variant = plan.strategy.variant
    method = plan.strategy.name + (f" ({variant})" if variant else "")
    directions = ", ".join(
        f"{name} ({d})" for name, d in zip(plan.objectives.names, plan.objectives.directions, strict=True)
    )
    jobs, where = plan.workers, "processes" if plan.launcher is None else f"workers of {plan.launcher.title}"
    spelled = plan.space.spelled_size
    lines = [
        f"space: {counted(size)} distinct candidates, {len(plan.space.parameters)} parameters"
        if spelled == size
        else f"space: {counted(spelled)} settings, {counted(size)} distinct networks, "
        f"{len(plan.space.parameters)} parameters",
        f"strategy: {method}, {n:,} candidates" + (f" in {jobs} {where}" if jobs > 1 or plan.launcher else ""),
        f"objectives: {directions}",
    ]
    if seconds is None:
        return lines
    lines.append(
        f"cost: {number(float(f'{1000 * seconds:.2g}'))} ms per candidate (measured), "
        f"about {duration(seconds * n / jobs)} in all" + (", and the time of the sampler" if variant else "")
    )
    timeout = plan.settings.strategy.setup.timeout
    if timeout is not None and seconds * n / jobs > timeout:
        lines.append(f"the timeout of {duration(timeout)} ends it before that")
    return lines
