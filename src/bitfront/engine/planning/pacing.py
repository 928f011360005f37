"""How long a training with learned bits is, where a timeout is the only limit: as many epochs as there is time for.

The whole range of pressures is covered in the time. What comes from a clock is another number in every run, so a search
keeps it in its run folder before it trains by it, and trains the same after any end. Cycles that take longer than
planned make those after them shorter, and fewer if need be.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from bitfront.engine.evaluation.learned_bits import LearnedBitsEvaluator
from bitfront.engine.planning.plan import Plan
from bitfront.learned_bits.course import Pace, Schedule
from bitfront.learned_bits.space import LearnedBitsSpace

#: The share of the time that is planned; the rest is for cycles that take longer than those before.
PLANNED = 0.9
#: Cycles at least: one at each end of the range of pressures.
FEWEST = 2


def fitting(schedule: Schedule, seconds: float, epoch: float, network: float) -> Schedule:
    """The schedule that takes about so long: of as many epochs as fit, and of fewer cycles if not even one epoch per
    network does.

    Args:
        seconds: that there are.
        epoch: seconds of an epoch of all members.
        network: seconds in which a network is measured.
    """
    beside = schedule.members * schedule.networks * network
    epochs = (PLANNED * seconds / schedule.cycles - beside) / epoch
    if epochs >= schedule.networks:
        return replace(schedule, epochs=float(f"{epochs:.3g}"))
    cycles = int(PLANNED * seconds / (schedule.networks * epoch + beside))
    fewest = min(FEWEST, schedule.cycles)
    return replace(schedule, cycles=min(schedule.cycles, max(fewest, cycles)), epochs=float(schedule.networks))


def measured_schedule(plan: Plan, timeout: float) -> tuple[Schedule, float]:
    """(the schedule that takes about `timeout` seconds from this call on; the measured seconds of an epoch)."""
    begin, evaluator = time.perf_counter(), plan.evaluator
    assert isinstance(evaluator, LearnedBitsEvaluator)
    epoch, network = evaluator.measured_pace()
    left = max(0.0, timeout - (time.perf_counter() - begin))
    return fitting(evaluator.learning.schedule, left, epoch, network), epoch


def pacemaker(
    schedule: Schedule, end: float, known: dict[int, Pace], keep: Callable[[dict[int, Pace]], None]
) -> Callable[[int], Pace]:
    """Says of each cycle, when it begins, how far it goes, so that the last pressure is reached in time.

    Args:
        schedule: as planned; no cycle is longer.
        end: when time is up, by ``time.perf_counter``.
        known: number of a cycle → what was said of it, in this session or an earlier one; it grows.
        keep: called with `known` when something was added, before it is used.
    """
    before: tuple[int, float] | None = None

    def pace(number: int) -> Pace:
        nonlocal before
        now = time.perf_counter()
        if number not in known:
            known[number] = Pace(schedule.epochs, schedule.cycles - number)
            if before is not None and before[0] == number - 1:
                per_epoch = (now - before[1]) / known[number - 1].epochs
                known[number] = _in_time(schedule, number, end - now, per_epoch)
            keep(known)
        before = number, now
        return known[number]

    return pace


def _in_time(schedule: Schedule, number: int, seconds: float, per_epoch: float) -> Pace:
    """How far a cycle goes if there are `seconds` left, and an epoch takes `per_epoch` with all that is beside it."""
    left, least = schedule.cycles - number, float(schedule.networks)
    if left * schedule.epochs * per_epoch <= seconds:
        return Pace(schedule.epochs, left)
    epochs = PLANNED * seconds / per_epoch / left
    if epochs >= least:
        return Pace(float(f"{min(schedule.epochs, epochs):.3g}"), left)
    return Pace(min(schedule.epochs, least), min(left, max(1, int(seconds / (least * per_epoch)))))


def with_timeout(plan: Plan, epoch: float) -> Plan:
    """The plan of about the length that a search would choose; the same if it chooses none.

    Args:
        epoch: seconds of an epoch of one member.
    """
    learning, timeout = plan.evaluator.job.learning, plan.settings.strategy.setup.timeout
    if learning is None or timeout is None or not plan.chooses_length:
        return plan
    threads, space = plan.evaluator.job.threads or torch.get_num_threads(), plan.space
    assert isinstance(space, LearnedBitsSpace)
    schedule = learning.schedule
    beside = epoch * schedule.members / space.program.at_a_time(threads, schedule.members)
    schedule = fitting(schedule, timeout, beside, 0.0)
    return plan.paced(schedule.cycles, schedule.epochs)


def described(schedule: Schedule, timeout: float, epoch: float) -> str:
    """The schedule of a timeout as a note for the user."""
    text = (
        f"the timeout of {timeout:g} s is spent on {schedule.cycles} cycles of {schedule.epochs:g} epochs (an epoch "
        f"takes {1000 * epoch:.2g} ms, measured); cycles, epochs or n_trials would set another length"
    )
    least = schedule.cycles * schedule.networks * epoch
    return text if least <= timeout else f"{text}. It is too short for that: they take about {least:.2g} s"
