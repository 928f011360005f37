"""What a user should know about a plan before the search starts: remarks that are no errors."""

from __future__ import annotations

from bitfront.config import Config
from bitfront.data.base import Dataset
from bitfront.engine.evaluation.calibration import Corrections
from bitfront.engine.evaluation.interface import Evaluator
from bitfront.engine.planning.runners import Runners, size_notes
from bitfront.engine.planning.training import asked_training
from bitfront.spaces.model_space import ModelSpace
from bitfront.transforms.correct import has_bias, norms_behind


def remarks(config: Config, dataset: Dataset, evaluator: Evaluator, added: list[str], warning: str | None) -> list[str]:
    """Every remark on a plan.

    Args:
        added: runners that a constraint needs, and that the file does not name.
        warning: about the device.
    """
    assert config.search is not None
    job, space = evaluator.job, evaluator.space
    notes = [*config.notes, *([warning] if warning else []), *dataset.notes]
    notes += [f"[search.constraints] needs runner {name}: it was added with its defaults" for name in added]
    notes += [f"{k!r} of the seed names nothing here (by = {job.by!r}), and is not used" for k in space.unused]
    notes += _graph_notes(space)
    notes += [*_objective_notes(config), *size_notes(dataset, job.runners), *_weight_notes(space)]
    notes += [*_correction_notes(space, job.corrections), *_kind_notes(evaluator)]
    return [*notes, *space.notes, *_training_notes(config, dataset, space, job.runners, job.training is not None)]


def _graph_notes(space: ModelSpace) -> list[str]:
    notes, graph = [], space.graph
    if graph.untraced:
        notes.append(
            f"torch.fx cannot trace this model, so its modules alone are sites and candidates are evaluated whole; "
            f"the tracer stopped at {graph.untraced}"
        )
    if graph.uncounted:
        notes.append("operations not counted: " + ", ".join(n.title for n in graph.uncounted))
    return notes


def _training_notes(config: Config, dataset: Dataset, space: ModelSpace, runners: Runners, trains: bool) -> list[str]:
    """What the user should know about what is trained, and what is not."""
    assert config.search is not None
    if not trains:
        notes = []
        if not config.search.strategy.eval_mode:
            notes.append("eval_mode = false has no effect: candidates are evaluated in eval mode")
        if space.changes_widths:
            notes.append(
                "networks of other widths are not trained, they have the float model's weights, widened or cut; "
                "sw_runner.basic_train trains each candidate"
            )
        return notes
    found, there = asked_training(runners), len(dataset.split("train")[1])
    if found is not None and (asked := found[1].num_samples) is not None and asked > there:
        return [f"{found[0].name}.num_samples = {asked:,}, and train has {there:,} samples: all are used"]
    return []


def _objective_notes(config: Config) -> list[str]:
    assert config.search is not None
    setup = config.search.strategy.setup
    if not setup.sum_scaled_metrics:
        return [
            f"metrics.{name}.scale is negative, which turns the metric round: {own.direction} means the other way here"
            for name, own in config.search.strategy.metrics.items()
            if own.scale < 0 and own.direction is not None
        ]
    return [
        f"metrics.{name}.direction = {own.direction!r} has no effect: with sum_scaled_metrics the sum is what is "
        f"{setup.direction}d; turn the metric round with a negative scale"
        for name, own in config.search.strategy.metrics.items()
        if own.direction is not None and own.direction != setup.direction and own.scale > 0
    ]


def _kind_notes(evaluator: Evaluator) -> list[str]:
    """Metrics whose values come about in another way in this search than they usually do."""
    found: dict[tuple[str, str], list[str]] = {}
    usual = {m.name: m.kind for runner in evaluator.runners for m in runner.produces}
    for name, (kind, why) in evaluator.kinds().items():
        if kind != usual[name]:
            found.setdefault((kind, why), []).append(name)
    return [f"{', '.join(names)}: {kind}, not measured ({why})" for (kind, why), names in found.items()]


def _weight_notes(space: ModelSpace) -> list[str]:
    """What average_bitwidth does not see: weights of layers that are no site."""
    model, seen = space.graph.model, {name for site in space.graph.sites for name in site.parameters}
    outside = {n: p.numel() for n, p in model.named_parameters() if n not in seen and p.dim() > 1}
    if not outside:
        return []
    layers = ", ".join(dict.fromkeys(name.rpartition(".")[0] or name for name in outside))
    total = sum(p.numel() for p in model.parameters())
    return [
        f"{sum(outside.values()):,} of {total:,} parameters are weights of layers that cannot be configured "
        f"({layers}): they stay in float, model_size counts them, average_bitwidth does not"
    ]


def _correction_notes(space: ModelSpace, asked: Corrections) -> list[str]:
    """Corrections that are asked for and find nothing to correct."""
    graph, notes = space.graph, []
    if asked.bias and not any(has_bias(graph, s) for s in graph.sites):
        notes.append("bias_correction = true has no effect: no layer that can be configured has a bias")
    if asked.batch_norm and not any(norms_behind(graph, s) for s in graph.sites):
        why = "the model cannot be traced" if graph.untraced else "no batch norm is right behind a layer with weights"
        notes.append(f"batch_norm = true has no effect: {why}")
    return notes
