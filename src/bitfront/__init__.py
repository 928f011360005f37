"""Bitfront finds the whole accuracy-against-cost front of a PyTorch model.

The map of the house, from the door inwards::

    cli          the command: parses, calls the API, prints
    api          the verbs: plan, search, compare, init, list
    report       tables, figures, the page; reads results
    engine       plan, train, evaluate, loop, store, front, run, rebuild, analyze, compare
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
    from bitfront.api import compare, plan, search
    from bitfront.checkpoints import load as load_checkpoint
    from bitfront.config import Config
    from bitfront.config import load as load_config
    from bitfront.data.arrays import from_arrays, from_splits
    from bitfront.data.base import Dataset
    from bitfront.data.loading import load_dataset
    from bitfront.engine.analysis import analyze
    from bitfront.engine.comparison.results import Comparison
    from bitfront.engine.rebuild import Transformed, transform_config, transform_trial
    from bitfront.engine.search.weights import test, train
    from bitfront.engine.storage.run import Run, Trial
    from bitfront.errors import BitfrontError, EvaluationError, UserError
    from bitfront.events import Events
    from bitfront.formats.base import Format
    from bitfront.graph import Graph, Site, capture
    from bitfront.models.base import build_model
    from bitfront.pareto import hypervolume, non_dominated
    from bitfront.report.convert import convert
    from bitfront.report.writing import Report, write_report
    from bitfront.transforms import calibrate, quantize

_HOMES = {
    "analyze": "bitfront.engine.analysis",
    "Events": "bitfront.events",
    "Transformed": "bitfront.engine.rebuild",
    "Comparison": "bitfront.engine.comparison.results",
    "compare": "bitfront.api",
    "plan": "bitfront.api",
    "search": "bitfront.api",
    "test": "bitfront.engine.search.weights",
    "train": "bitfront.engine.search.weights",
    "transform_config": "bitfront.engine.rebuild",
    "transform_trial": "bitfront.engine.rebuild",
    "load_checkpoint": "bitfront.checkpoints:load",
    "Config": "bitfront.config",
    "load_config": "bitfront.config:load",
    "from_arrays": "bitfront.data.arrays",
    "from_splits": "bitfront.data.arrays",
    "Dataset": "bitfront.data.base",
    "load_dataset": "bitfront.data.loading",
    "hypervolume": "bitfront.pareto",
    "non_dominated": "bitfront.pareto",
    "Run": "bitfront.engine.storage.run",
    "Trial": "bitfront.engine.storage.run",
    "BitfrontError": "bitfront.errors",
    "EvaluationError": "bitfront.errors",
    "UserError": "bitfront.errors",
    "Format": "bitfront.formats.base",
    "Graph": "bitfront.graph",
    "Site": "bitfront.graph",
    "capture": "bitfront.graph",
    "build_model": "bitfront.models.base",
    "convert": "bitfront.report.convert",
    "Report": "bitfront.report.writing",
    "write_report": "bitfront.report.writing",
    "calibrate": "bitfront.transforms",
    "quantize": "bitfront.transforms",
}

__all__ = [
    "BitfrontError",
    "Comparison",
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
    "compare",
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
