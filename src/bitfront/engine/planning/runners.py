"""The metric runners of a configuration: which, with which settings, and the samples that they need."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bitfront.config import SearchTable
from bitfront.constraints import DROP
from bitfront.data.base import Dataset, Split
from bitfront.errors import ConfigError
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import Side
from bitfront.metrics.configured import ConfiguredRunner, configured_runner

#: Samples that "auto" begins with; each step doubles them.
FIRST_SAMPLES = 512
SIDES: tuple[Side, ...] = ("sw_runner", "hw_runner")
Runners = tuple[ConfiguredRunner, ...]


def configured(search: SearchTable) -> tuple[Runners, list[str]]:
    """(the runners with their settings, the names of those that were added because a constraint needs them).

    Raises:
        ConfigError: there is none, one does not exist or has a wrong setting, or two produce one metric.
    """
    tables = {"sw_runner": search.strategy.sw_runner, "hw_runner": search.strategy.hw_runner}
    runners = [configured_runner(name, given, side) for side in SIDES for name, given in tables[side].items()]
    there = {runner.name for runner in runners}
    needed = {condition.removesuffix(DROP) for condition in search.constraints}
    added = [n for n in RUNNERS.names() if n not in there and needed & {m.name for m in RUNNERS.get(n).produces}]
    runners += map(configured_runner, added)
    produced: set[str] = set()
    for runner in runners:
        for metric in runner.produces:
            if metric.name in produced:
                raise ConfigError(f"two runners produce {metric.name}; leave one of them out", key=runner.where)
            produced.add(metric.name)
    if not runners:
        raise ConfigError(
            f"no metric runner is configured; known ones: {', '.join(RUNNERS.names())}",
            key=("search", "strategy", "sw_runner"),
        )
    return tuple(runners), added


def check_ready(runners: Iterable[ConfiguredRunner], device: str) -> None:
    """Ask each runner, before any work, whether it has what it needs. Raises ConfigError."""
    for runner in runners:
        try:
            runner.make().ready(device)
        except ConfigError as error:
            error.key = (*runner.where, *error.key)
            raise


def size_notes(dataset: Dataset, runners: Runners) -> list[str]:
    """Runners that ask for more samples than there are."""
    notes = []
    for runner in runners:
        samples = runner.settings.samples
        if samples is None or samples.number is None:
            continue
        there = len(dataset.split(samples.split)[1])
        if samples.number > there:
            notes.append(
                f"{runner.name}.num_samples = {samples.number:,}, and {samples.split} has {there:,} samples: all are "
                "used"
            )
    return notes


def auto_split(runners: Runners) -> Split | None:
    """The split of which a runner shall take as many samples as it needs; None where none asks for that."""
    own = (runner.settings.samples for runner in runners)
    return next((samples.split for samples in own if samples is not None and samples.auto), None)


def evaluation_samples(dataset: Dataset, runners: Runners, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Per split, the evaluation samples in the order in which ``num_samples`` takes them."""
    wanted: dict[Split, int | None] = {}
    for runner in runners:
        samples = runner.settings.samples
        if samples is None:
            continue
        # As many as settle the order of candidates are drawn from all of them.
        number = len(dataset.split(samples.split)[1]) if samples.auto else samples.number
        before = wanted.get(samples.split, 0)
        wanted[samples.split] = None if number is None or before is None else max(before, number)
    return {split: chosen_samples(dataset, split, number, seed) for split, number in wanted.items()}


def chosen_samples(dataset: Dataset, split: Split, number: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Fixed samples of a split, in the order in which ``num_samples`` takes them; None for all, as they stand."""
    x, y = dataset.split(split)
    if number is None or number > len(y):
        return x, y
    # The first rows of a file may be sorted by class; these are drawn once, the same for every candidate.
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:number]
    return x[order], y[order]
