"""The metric runners of a configuration: their settings, and the samples that they need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from bitfront.config import SearchTable
from bitfront.constraints import compared_metric
from bitfront.data.base import Dataset, Split
from bitfront.errors import ConfigError
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import Side
from bitfront.metrics.configured import ConfiguredRunner, configured_runner
from bitfront.tasks.base import Task
from bitfront.tasks.classification import CLASSIFICATION

#: Number of samples that "auto" starts with; each step doubles it.
FIRST_SAMPLES = 512
SIDES: tuple[Side, ...] = ("sw_runner", "hw_runner")
Runners = tuple[ConfiguredRunner, ...]


def configured(
    search: SearchTable, objectives: Iterable[str] = (), task: Task = CLASSIFICATION
) -> tuple[Runners, list[str]]:
    """(the runners with their settings, the names of those that were added because a constraint needs them).

    Args:
        search: the table of the search.
        objectives: metrics that are objectives without being named in the file; their runners are added too.
        task: what the samples are.

    Raises:
        ConfigError: there is no runner, one does not exist or has a wrong setting, or two produce the same metric.
    """
    tables = {"sw_runner": search.strategy.sw_runner, "hw_runner": search.strategy.hw_runner}
    runners = [configured_runner(name, given, side, task) for side in SIDES for name, given in tables[side].items()]
    names = {runner.name for runner in runners}
    needed = set(map(compared_metric, search.constraints))

    def producing(metrics: set[str]) -> list[str]:
        produced = {n: {m.name for m in RUNNERS.get(n).of_task(task)} for n in RUNNERS.names() if n not in names}
        return [name for name, of in produced.items() if metrics & of]

    usual = producing(set(objectives))
    runners += [configured_runner(name, task=task) for name in usual]
    names.update(usual)
    added = producing(needed)
    runners += [configured_runner(name, task=task) for name in added]
    produced: set[str] = set()
    for runner in runners:
        for metric in runner.produces:
            if metric.name in produced:
                raise ConfigError(f"two runners produce {metric.name}; remove one of them", key=runner.where)
            produced.add(metric.name)
    if not runners:
        raise ConfigError(
            f"no metric runner is configured; known ones: {', '.join(RUNNERS.names())}",
            key=("search", "strategy", "sw_runner"),
        )
    return tuple(runners), added


def check_ready(runners: Iterable[ConfiguredRunner], device: str) -> None:
    """Let each runner check, before any work, whether it has what it needs. Raises ConfigError."""
    for runner in runners:
        try:
            runner.make().ready(device)
        except ConfigError as error:
            error.key = (*runner.where, *error.key)
            raise


def size_notes(dataset: Dataset, runners: Runners) -> list[str]:
    """Remarks on runners whose ``num_samples`` is larger than their split."""
    notes = []
    for runner in runners:
        samples = runner.settings.samples
        if samples is None or samples.number is None:
            continue
        available = len(dataset.split(samples.split)[1])
        if samples.number > available:
            notes.append(
                f"{runner.name}.num_samples = {samples.number:,}, and {samples.split} has {available:,} samples: all "
                "are used"
            )
    return notes


def auto_split(runners: Runners) -> Split | None:
    """The split of the runner with ``num_samples = "auto"``; None if there is no such runner."""
    choices = (runner.settings.samples for runner in runners)
    return next((samples.split for samples in choices if samples is not None and samples.auto), None)


def evaluation_samples(dataset: Dataset, runners: Runners, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Split → (x, y): its evaluation samples, in the order in which ``num_samples`` counts them."""
    wanted: dict[Split, int | None] = {}
    for runner in runners:
        samples = runner.settings.samples
        if samples is None:
            continue
        # "auto" may need any number of samples, up to the whole split.
        number = len(dataset.split(samples.split)[1]) if samples.auto else samples.number
        before = wanted.get(samples.split, 0)
        wanted[samples.split] = None if number is None or before is None else max(before, number)
    return {split: chosen_samples(dataset, split, number, seed) for split, number in wanted.items()}


def check_both_kinds(splits: Mapping[str, tuple[Tensor, Tensor]], runners: Runners) -> None:
    """Raises ConfigError where candidates would be evaluated on normal samples alone, or on anomalies alone.

    Args:
        splits: split → (x, y), from ``evaluation_samples``, of data with anomalies.
        runners: of the search.
    """
    for runner in runners:
        samples = runner.settings.samples
        if samples is None:
            continue
        flags = splits[samples.split][1][:, 0]
        if bool(flags.min() < flags.max()):
            continue
        count = len(flags)
        why = "training sees normal samples only: use val_dataloader" if samples.split == "train" else "use more"
        raise ConfigError(
            f"the {count:,} samples of {samples.split} that candidates are evaluated on are all of one kind, and so "
            f"cannot say how well anomalies are told apart; {why}",
            key=(*runner.where, "data_loader" if samples.split == "train" else "num_samples"),
        )


def chosen_samples(dataset: Dataset, split: Split, number: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """The first `number` samples (x, y) of a split in a random order that depends on the seed alone.

    All samples in their stored order if `number` is None or larger than the split.
    """
    x, y = dataset.split(split)
    if number is None or number > len(y):
        return x, y
    # A file may be sorted by class, so the samples are drawn at random: once, the same for every candidate.
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:number]
    return x[order], y[order]
