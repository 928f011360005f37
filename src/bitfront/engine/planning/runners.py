"""The metric runners of a configuration: which, with which settings, and the samples that they need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from bitfront.config import Config
from bitfront.constraints import DROP
from bitfront.data.base import Dataset, Split
from bitfront.errors import ConfigError, nearest, one_of
from bitfront.metrics import RUNNERS
from bitfront.metrics.base import Metric, Side

#: What a runner's ``num_samples`` may say instead of a number.
AUTO = "auto"
#: Samples that "auto" begins with; each step doubles them.
FIRST_SAMPLES = 512
#: (table, name, settings) of each runner.
Runners = tuple[tuple[Side, str, Mapping[str, Any]], ...]


def configured(
    config: Config,
) -> tuple[Runners, list[Metric], dict[str, Side], list[str]]:
    """The runners with their settings, the metrics they produce, where these are reported, and which runners were
    added because a constraint needs them."""
    assert config.search is not None
    runners: list[tuple[Side, str, Mapping[str, Any]]] = []
    metrics: list[Metric] = []
    sides: dict[str, Side] = {}
    given = asked_for(config.search.strategy)
    there = {RUNNERS.official(name) for _, name, _ in given if name in RUNNERS}
    added = []
    for name in RUNNERS.names():
        produced = {m.name for m in RUNNERS.get(name).produces}
        if name not in there and produced & {c.removesuffix(DROP) for c in config.search.constraints}:
            given.append((RUNNERS.get(name).side, name, {}))
            added.append(name)
    for side, name, settings in given:
        where = ("search", "strategy", side, name)
        try:
            runner, official = RUNNERS.get(name), RUNNERS.official(name)
        except ConfigError as error:
            error.key = where
            raise
        settings = {k: (None if v == "NA" else v) for k, v in settings.items()}
        try:
            runner.Settings(**settings)
        except ValidationError as error:
            raise _error(error, runner.Settings.model_fields, where) from None
        for metric in runner.produces:
            if metric.name in sides:
                raise ConfigError(f"two runners produce {metric.name}; leave one of them out", key=where)
            sides[metric.name] = side
            metrics.append(metric)
        runners.append((side, official, settings))
    if not runners:
        raise ConfigError(
            f"no metric runner is configured; known ones: {', '.join(RUNNERS.names())}",
            key=("search", "strategy", "sw_runner"),
        )
    return tuple(runners), metrics, sides, added


def asked_for(own: Any) -> list[tuple[Side, str, dict[str, Any]]]:
    """(table, name, settings) of each runner as the user gave it."""
    tables: tuple[tuple[Side, dict[str, dict[str, Any]]], ...] = (
        ("sw_runner", own.sw_runner),
        ("hw_runner", own.hw_runner),
    )
    return [(side, name, settings) for side, table in tables for name, settings in table.items()]


def check_ready(runners: Runners, device: str) -> None:
    """What a runner needs and does not have is found here, before any work."""
    for side, name, given in runners:
        runner = RUNNERS.get(name)
        try:
            runner.ready(runner.Settings(**given), device)
        except ConfigError as error:
            error.key = ("search", "strategy", side, name, *error.key)
            raise


def _error(error: ValidationError, fields: Mapping[str, Any], where: tuple[str, ...]) -> ConfigError:
    first = error.errors()[0]
    key = tuple(str(part) for part in first["loc"][:1])
    if first["type"] == "extra_forbidden":
        allowed = list(fields)
        hint = one_of(allowed) if allowed else "this runner has no settings"
        return ConfigError(f"unknown key; {hint}.{nearest(key[0], allowed)}", key=(*where, *key))
    message = first["msg"][0].lower() + first["msg"][1:]
    return ConfigError(f"{first.get('input')!r} is not possible: {message}", key=(*where, *key))


def size_notes(dataset: Dataset, runners: Runners) -> list[str]:
    """Runners that ask for more samples than there are."""
    notes = []
    for _, name, given in runners:
        settings: Any = RUNNERS.get(name).Settings(**given)
        asked, split = getattr(settings, "num_samples", None), getattr(settings, "split", None)
        if isinstance(asked, int) and split is not None and asked > len(dataset.split(split)[1]):
            there = len(dataset.split(split)[1])
            notes.append(f"{name}.num_samples = {asked:,}, and {split} has {there:,} samples: all are used")
    return notes


def evaluation_samples(dataset: Dataset, runners: Runners, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Per split, the evaluation samples in the order in which ``num_samples`` takes them."""
    wanted: dict[Split, int | None] = {}
    for _, name, given in runners:
        settings = RUNNERS.get(name).Settings(**given)
        split = getattr(settings, "split", None)
        if split is None:
            continue
        number = getattr(settings, "num_samples", None)
        number = len(dataset.split(split)[1]) if number == AUTO else number
        before = wanted.get(split, 0)
        wanted[split] = None if number is None or before is None else max(before, number)
    return {split: chosen_samples(dataset, split, number, seed) for split, number in wanted.items()}


def chosen_samples(dataset: Dataset, split: Split, number: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Fixed samples of a split, in the order in which ``num_samples`` takes them; None for all, as they stand."""
    x, y = dataset.split(split)
    if number is None or number > len(y):
        return x, y
    # The first rows of a file may be sorted by class; these are drawn once, the same for every candidate.
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:number]
    return x[order], y[order]
