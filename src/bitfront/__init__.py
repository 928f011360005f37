"""Bitfront finds the whole accuracy-against-cost front of a PyTorch model.

The map of the house, from the door inwards. Imports point downwards only::

    cli           the command: parses, calls the API, prints
    api           the verbs: plan, search, compare, init
    listing       the kinds of things with names, and the members of each
    report        tables, figures, the page; a run as other tools read it
    engine        comparison    several strategies on one space
                  analysis      what a model costs, module by module
                  explanation   what the trials of a run tell
                  rebuild       a trial → its model again
                  search        the loop, weights, fine-tuning, the front on the test split
                  planning      configuration → plan: reports every mistake
                  evaluation    a batch of codes → metrics;  tree: many candidates through one graph
                  storage       trials on disk, a run folder read back
    population    many networks trained together
    training      one training loop                 checkpoints  weights on disk
    scoring       loss and accuracy on some samples
    tasks         what a sample is: targets, results per sample, metrics, losses
    strategies    what to try next                  metrics      what a candidate costs
    spaces        what may be chosen: sites × options ↔ codes
    exporters     (graph, formats) → files and modules that run without Bitfront
    transforms    (graph, formats) → a new model
    graph         a captured model: its sites       data, models   datasets; reference models
    operations    what is known of each layer and function: a record each
    formats       number formats                    kernels      rounding and scoring in C++, and the same in torch
    objectives    what is optimised                 pareto       the front, its hypervolume
    config        the TOML schema                   constraints  conditions in plain words
    registry      name → implementation             errors       every error, in one tree
    testing       conformance suites: what each format, metric, strategy, space, model and dataset must do

docs/architecture.md is the same with a walk through one search, docs/glossary.md has the words.

What stands in ``__all__`` is public: the verbs, and what they take and return. It is loaded when it is first used:
``import bitfront`` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitfront.api import compare, plan, search
    from bitfront.checkpoints import load_checkpoint
    from bitfront.config import Config, load_config
    from bitfront.data.arrays import from_arrays, from_splits
    from bitfront.data.base import Dataset
    from bitfront.data.loading import load_dataset
    from bitfront.engine.analysis import Analysis, analyze
    from bitfront.engine.comparison.results import Comparison, StrategyResult, StrategyRun
    from bitfront.engine.deployment import export
    from bitfront.engine.explanation.explain import explain
    from bitfront.engine.explanation.results import Explanation
    from bitfront.engine.planning.plan import Plan
    from bitfront.engine.rebuild import Transformed, transform_config, transform_trial
    from bitfront.engine.search.weights import Trained, test, train
    from bitfront.engine.storage.records import Finetuned, InFloat, Optimism, PairedComparison
    from bitfront.engine.storage.run import Run
    from bitfront.engine.storage.trial import FromPython, Trial, Trials
    from bitfront.engine.storage.trials import TrialColumns
    from bitfront.errors import BitfrontError, EvaluationError, UserError
    from bitfront.events import Events
    from bitfront.exporters.exporting import Exported
    from bitfront.formats.base import Format
    from bitfront.graph import Graph, Site, capture
    from bitfront.learned_bits.smaller import Smaller
    from bitfront.models.base import build_model
    from bitfront.objectives import Objectives
    from bitfront.pareto import hypervolume, non_dominated
    from bitfront.report.convert import Converted, convert
    from bitfront.report.notebook import html, plot
    from bitfront.report.writing import Report, write_report
    from bitfront.scoring import Evaluation, TaskEvaluation
    from bitfront.transforms.observe import calibrate
    from bitfront.transforms.quantize import quantize

    _html, _plot = html, plot

_HOMES = {
    "Analysis": "bitfront.engine.analysis",
    "analyze": "bitfront.engine.analysis",
    "BitfrontError": "bitfront.errors",
    "build_model": "bitfront.models.base",
    "calibrate": "bitfront.transforms",
    "capture": "bitfront.graph",
    "compare": "bitfront.api",
    "Comparison": "bitfront.engine.comparison.results",
    "Config": "bitfront.config",
    "convert": "bitfront.report.convert",
    "Converted": "bitfront.report.convert",
    "Dataset": "bitfront.data.base",
    "Evaluation": "bitfront.scoring",
    "EvaluationError": "bitfront.errors",
    "Events": "bitfront.events",
    "explain": "bitfront.engine.explanation.explain",
    "Explanation": "bitfront.engine.explanation.results",
    "export": "bitfront.engine.deployment",
    "Exported": "bitfront.exporters.exporting",
    "Finetuned": "bitfront.engine.storage.records",
    "Format": "bitfront.formats.base",
    "from_arrays": "bitfront.data.arrays",
    "from_splits": "bitfront.data.arrays",
    "FromPython": "bitfront.engine.storage.trial",
    "Graph": "bitfront.graph",
    "hypervolume": "bitfront.pareto",
    "InFloat": "bitfront.engine.storage.records",
    "load_checkpoint": "bitfront.checkpoints",
    "load_config": "bitfront.config",
    "load_dataset": "bitfront.data.loading",
    "non_dominated": "bitfront.pareto",
    "Objectives": "bitfront.objectives",
    "Optimism": "bitfront.engine.storage.records",
    "PairedComparison": "bitfront.engine.storage.records",
    "plan": "bitfront.api",
    "Plan": "bitfront.engine.planning.plan",
    "quantize": "bitfront.transforms",
    "Report": "bitfront.report.writing",
    "Run": "bitfront.engine.storage.run",
    "search": "bitfront.api",
    "Site": "bitfront.graph",
    "Smaller": "bitfront.learned_bits.smaller",
    "StrategyResult": "bitfront.engine.comparison.results",
    "StrategyRun": "bitfront.engine.comparison.results",
    "TaskEvaluation": "bitfront.scoring",
    "test": "bitfront.engine.search.weights",
    "train": "bitfront.engine.search.weights",
    "Trained": "bitfront.engine.search.weights",
    "transform_config": "bitfront.engine.rebuild",
    "transform_trial": "bitfront.engine.rebuild",
    "Transformed": "bitfront.engine.rebuild",
    "Trial": "bitfront.engine.storage.trial",
    "TrialColumns": "bitfront.engine.storage.trials",
    "Trials": "bitfront.engine.storage.trial",
    "UserError": "bitfront.errors",
    "write_report": "bitfront.report.writing",
}

#: What methods of results call, such as ``run.plot()``: it stands above them, and is no verb.
_OF_METHODS = {"_html": "bitfront.report.notebook:html", "_plot": "bitfront.report.notebook:plot"}

__all__ = [
    "Analysis",
    "BitfrontError",
    "Comparison",
    "Config",
    "Converted",
    "Dataset",
    "Evaluation",
    "EvaluationError",
    "Events",
    "Explanation",
    "Exported",
    "Finetuned",
    "Format",
    "FromPython",
    "Graph",
    "InFloat",
    "Objectives",
    "Optimism",
    "PairedComparison",
    "Plan",
    "Report",
    "Run",
    "Site",
    "Smaller",
    "StrategyResult",
    "StrategyRun",
    "TaskEvaluation",
    "Trained",
    "Transformed",
    "Trial",
    "TrialColumns",
    "Trials",
    "UserError",
    "analyze",
    "build_model",
    "calibrate",
    "capture",
    "compare",
    "convert",
    "explain",
    "export",
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
    home = _HOMES.get(name) or _OF_METHODS.get(name)
    if home is None:
        raise AttributeError(f"module 'bitfront' has no attribute {name!r}")
    module, _, original = home.partition(":")
    value = getattr(importlib.import_module(module), original or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
