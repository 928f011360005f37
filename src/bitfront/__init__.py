"""Bitfront finds the whole accuracy-against-cost front of a PyTorch model.

The map of the house, from the door inwards::

    cli          the command: parses, calls the API, prints
    api          the verbs: plan, search, init, list
    report       tables, figures, the page; reads results
    engine       plan, train, evaluate, loop, store, front, run, rebuild, analyze
    population   many candidates trained together
    training     one training loop;  checkpoints: weights on disk
    strategies   what to try next             metrics     what a candidate is worth
    spaces       what may be chosen           transforms  (graph, formats) → a new model
    export       what runs without Bitfront   graph       a captured model
    formats      number formats               constraints conditions in plain words
    data         datasets                     models      reference models
    config       the TOML schema              registry    name → implementation
    errors       every error, in one tree

Everything below is loaded when it is first used: ``import bitfront`` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitfront.api import plan, search
    from bitfront.checkpoints import load as load_checkpoint
    from bitfront.config import Config
    from bitfront.config import load as load_config
    from bitfront.data.arrays import from_arrays, from_splits
    from bitfront.data.base import Dataset
    from bitfront.data.base import load as load_dataset
    from bitfront.engine.analysis import analyze
    from bitfront.engine.front import hypervolume, non_dominated
    from bitfront.engine.rebuild import Transformed, transform_config, transform_trial
    from bitfront.engine.run import Run, Trial
    from bitfront.engine.trained import test, train
    from bitfront.errors import BitfrontError, EvaluationError, UserError
    from bitfront.events import Events
    from bitfront.formats.base import Format
    from bitfront.graph import Graph, Site, capture
    from bitfront.models.base import build as build_model
    from bitfront.report.convert import convert
    from bitfront.report.writing import Report, write_report
    from bitfront.transforms import calibrate, quantize

_HOMES = {
    "analyze": "bitfront.engine.analysis",
    "Events": "bitfront.events",
    "Transformed": "bitfront.engine.rebuild",
    "plan": "bitfront.api",
    "search": "bitfront.api",
    "test": "bitfront.engine.trained",
    "train": "bitfront.engine.trained",
    "transform_config": "bitfront.engine.rebuild",
    "transform_trial": "bitfront.engine.rebuild",
    "load_checkpoint": "bitfront.checkpoints:load",
    "Config": "bitfront.config",
    "load_config": "bitfront.config:load",
    "from_arrays": "bitfront.data.arrays",
    "from_splits": "bitfront.data.arrays",
    "Dataset": "bitfront.data.base",
    "load_dataset": "bitfront.data.base:load",
    "hypervolume": "bitfront.engine.front",
    "non_dominated": "bitfront.engine.front",
    "Run": "bitfront.engine.run",
    "Trial": "bitfront.engine.run",
    "BitfrontError": "bitfront.errors",
    "EvaluationError": "bitfront.errors",
    "UserError": "bitfront.errors",
    "Format": "bitfront.formats.base",
    "Graph": "bitfront.graph",
    "Site": "bitfront.graph",
    "capture": "bitfront.graph",
    "build_model": "bitfront.models.base:build",
    "convert": "bitfront.report.convert",
    "Report": "bitfront.report.writing",
    "write_report": "bitfront.report.writing",
    "calibrate": "bitfront.transforms",
    "quantize": "bitfront.transforms",
}

__all__ = [
    "BitfrontError",
    "Config",
    "Dataset",
    "EvaluationError",
    "Events",
    "Format",
    "Graph",
    "Report",
    "Run",
    "Site",
    "Transformed",
    "Trial",
    "UserError",
    "analyze",
    "build_model",
    "calibrate",
    "capture",
    "convert",
    "from_arrays",
    "from_splits",
    "hypervolume",
    "load_checkpoint",
    "load_config",
    "load_dataset",
    "non_dominated",
    "plan",
    "quantize",
    "search",
    "test",
    "train",
    "transform_config",
    "transform_trial",
    "write_report",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'bitfront' has no attribute {name!r}")
    module, _, original = home.partition(":")
    value = getattr(importlib.import_module(module), original or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
