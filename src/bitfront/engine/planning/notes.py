"""Remarks on a plan: what the user should know before the search starts, and is not an error."""

from __future__ import annotations

from bitfront.config import Config
from bitfront.data.base import Dataset
from bitfront.engine.evaluation.interface import EvaluationJob, Evaluator
from bitfront.engine.planning.coverage import in_float
from bitfront.engine.planning.inputs import library_note
from bitfront.engine.planning.runners import Runners, size_notes
from bitfront.engine.planning.training import configured_training
from bitfront.errors import first_few
from bitfront.graph import Graph
from bitfront.graph.capture import parameter
from bitfront.graph.memory import stored_tensors
from bitfront.graph.outputs import outputs_note
from bitfront.learned_bits.space import LearnedBitsSpace
from bitfront.metrics.training import BasicTrainSettings
from bitfront.spaces.model_space import ModelSpace
from bitfront.tasks.base import Task
from bitfront.transforms.correct import has_bias, norms_behind
from bitfront.transforms.equalise import pairs_of
from bitfront.transforms.fold import Folded
from bitfront.transforms.reestimate import norms_of
from bitfront.transforms.rounding import estimated_seconds, has_two_sides, learns_rounding

#: Of a list of layers so many are named.
NAMED = 6


def remarks(config: Config, dataset: Dataset, evaluator: Evaluator, added: list[str], warning: str | None) -> list[str]:
    """All remarks on a plan, one text each.

    Args:
        config: the configuration of the search.
        dataset: its dataset.
        evaluator: its evaluator.
        added: names of runners that a constraint needs and the file does not name.
        warning: a warning about the device; None if there is none.
    """
    assert config.search is not None
    job, space = evaluator.job, evaluator.space
    notes = [*config.notes, *([warning] if warning else []), *dataset.notes]
    notes += [text] if (text := library_note(config, dataset)) else []
    notes += [f"[search.constraints] needs runner {name}: it was added with its defaults" for name in added]
    notes += [f"{k!r} of the seed names nothing here (by = {job.by!r}), and is not used" for k in space.unused]
    notes += [*_graph_notes(space, job.task), *_departure_notes(space, job.trains)]
    notes += [*_objective_notes(config), *size_notes(dataset, job.runners), *_sharing_notes(space)]
    notes += [text] if (text := in_float(space).text) else []
    notes += [*_correction_notes(space, job), *_kind_notes(evaluator)]
    notes += _rounding_notes(space, job.corrections.rounding)
    notes += [
        *space.notes,
        *_training_notes(config, dataset, space, job.runners, job.training is not None, job.learning is not None),
    ]
    return notes


def default_model_notes(config: Config) -> list[str]:
    """That neither the file nor a flag names a model; nothing where one does."""
    if config.names_model:
        return []
    return [f"no model is named, so this is about {config.model} on {config.dataset}; model = ... names yours"]


def folding_notes(config: Config, changed: Folded | None, *, trains: bool) -> list[str]:
    """What ``fold_batch_norm`` folded into what, and what it could not fold.

    Args:
        changed: None where nothing was to be folded.
        trains: whether candidates are trained.
    """
    assert config.search is not None
    if changed is None:
        what = "fold_batch_norm = true has no effect: strategy 'learned_bits' folds batch norms in any case"
        return [what] if config.search.fold_batch_norm else []
    notes = []
    if changed.into:
        pairs = first_few([f"{norm} into {layer}" for norm, layer in changed.into.items()], NAMED)
        training = "; where candidates are trained, they are trained without them" if trains else ""
        notes.append(
            f"batch norms are folded into the layers before them, and this network is searched and deployed: {pairs}"
            f"{training}. The float model that is reported beside is yours, with its batch norms"
        )
    for why in dict.fromkeys(changed.kept.values()):
        paths = [path for path, reason in changed.kept.items() if reason == why]
        one = f"the batch norm {paths[0]} is not folded, and stays in float"
        many = f"{len(paths)} batch norms are not folded, and stay in float ({first_few(paths, NAMED)})"
        notes.append(f"{one if len(paths) == 1 else many}: {why}")
    return notes or ["fold_batch_norm = true has no effect: the model has no batch norm"]


def ending_note(graph: Graph, task: Task) -> str:
    """What the user should know about the outputs of a captured model, for its task; empty if there is nothing."""
    if task.classifies:
        return outputs_note(graph)
    if graph.outputs == "logits" or not task.endings:
        return ""
    what = graph.outputs.replace("_", " ")
    if graph.outputs in task.endings:
        return f"the network ends in {graph.ending}: its outputs are {what}, no logits. `loss` and training go by them"
    allowed = ", ".join(ending.replace("_", " ") for ending in task.endings)
    return (
        f"the network ends in {graph.ending}: its outputs are {what}, and this task knows logits and {allowed}. They "
        "are taken for logits"
    )


def _graph_notes(space: ModelSpace, task: Task) -> list[str]:
    notes, graph = [], space.graph
    if graph.untraced:
        notes.append(
            "torch.fx cannot trace this model. So only its modules and products are sites, and candidates are "
            f"evaluated one by one as whole models. The reason: {graph.untraced}"
        )
    notes += [note] if (note := ending_note(graph, task)) else []
    if graph.uncounted:
        notes.append("operations not counted: " + ", ".join(n.title for n in graph.uncounted))
    return notes


def _departure_notes(space: ModelSpace, trains: bool) -> list[str]:
    """Where the captured model is not the user's model layer by layer, or a layer stays in float because of what it
    does."""
    graph, notes = space.graph, []
    if graph.baked:
        notes.append(
            f"weights that are computed from other parameters get their formats as what they are in evaluation: "
            f"{', '.join(graph.baked)}"
        )
    if graph.baked and trains:
        notes.append(
            "candidates are trained with these as plain weights: not through what computes them, and where a mask made "
            "weights zero, they do not stay zero"
        )
    if graph.unfused:
        notes.append(
            "torch's TransformerEncoderLayer computes in one fused kernel in evaluation. Here it calls its layers, so "
            "that they can have formats; the float model differs from yours in its last bits"
        )
    for layer in graph.left_out:
        notes.append(
            f"{layer.path} ({layer.type}) stays in float, 32 bits per weight: {layer.why}. To give it formats, let "
            f"it be a layer of torch.nn with a plain parameter, and do the rest in the forward of a module around it"
        )
    if graph.not_in_training:
        notes.append(
            f"functions in forward stay in float, and modules alone are sites: candidates are trained, and "
            f"{graph.not_in_training}"
        )
    return notes


def _training_notes(
    config: Config, dataset: Dataset, space: ModelSpace, runners: Runners, trains: bool, learns: bool
) -> list[str]:
    """Remarks on the training of candidates."""
    assert config.search is not None
    if not trains:
        notes = []
        if learns and config.search.strategy.setup.n_jobs > 1:
            notes.append("n_jobs has no effect: learned bits are trained in one process, a member on each core")
        table = config.search.search_space
        if isinstance(space, LearnedBitsSpace) and (table.seed or table.parts) and not space.fixed:
            notes.append(
                "[search.search_space] has no effect: bits are learned, and what learns no bits stays in float"
            )
        if not config.search.strategy.eval_mode:
            notes.append("eval_mode = false has no effect: candidates are evaluated in eval mode")
        if space.changes_widths and not learns:
            notes.append(
                "networks of other widths are not trained: they have the float model's weights, widened or cut. "
                "sw_runner.basic_train trains each candidate"
            )
        return notes
    training = configured_training(runners)
    return [] if training is None else _settings_notes(training[0].name, training[1], len(dataset.split("train")[1]))


def _settings_notes(name: str, settings: BasicTrainSettings, available: int) -> list[str]:
    """Remarks on the settings of the runner `name` that trains candidates; `available`: the training samples."""
    notes, number = [], settings.num_samples
    if number is not None and number > available:
        notes.append(f"{name}.num_samples = {number:,}, and train has {available:,} samples: all are used")
    if settings.name is not None:
        notes.append(f"{name}.name has no effect: [search.strategy.metrics] says what is measured")
    if settings.lr_scheduler is not None or settings.gradient_accumulation_steps > 1:
        key = "gradient_accumulation_steps" if settings.lr_scheduler is None else "lr_scheduler"
        notes.append(f"candidates are trained one by one, which is slow: populations of networks have no {key}")
    return notes


def _objective_notes(config: Config) -> list[str]:
    assert config.search is not None
    setup = config.search.strategy.setup
    if not setup.sum_scaled_metrics:
        return [
            f"metrics.{name}.scale is negative, which reverses the metric: {objective.direction} means the opposite "
            "here"
            for name, objective in config.search.strategy.metrics.items()
            if objective.scale < 0 and objective.direction is not None
        ]
    return [
        f"metrics.{name}.direction = {objective.direction!r} has no effect: with sum_scaled_metrics the sum is "
        f"{setup.direction}d; reverse the metric with a negative scale"
        for name, objective in config.search.strategy.metrics.items()
        if objective.direction is not None and objective.direction != setup.direction and objective.scale > 0
    ]


def _kind_notes(evaluator: Evaluator) -> list[str]:
    """Metrics whose values are obtained in another way in this search than usual."""
    unusual: dict[tuple[str, str], list[str]] = {}
    usual = {m.name: m.kind for runner in evaluator.runners for m in runner.produces}
    for name, (kind, why) in evaluator.kinds().items():
        if kind != usual[name]:
            unusual.setdefault((kind, why), []).append(name)
    return [f"{', '.join(names)}: {kind}, not measured ({why})" for (kind, why), names in unusual.items()]


def _sharing_notes(space: ModelSpace) -> list[str]:
    """Weights that several use: in float and in a format, or each in a format of its choice."""
    notes, offered = [], space.quantization(space.graph)
    options = dict(zip((site.name for site in offered.sites), offered.site_formats, strict=True))
    for tensor in stored_tensors(space.graph):
        shared, users = " = ".join(tensor.names), dict.fromkeys(use.site for use in tensor.uses)
        formats = {use.site: {option.get(use.operand) for option in options[use.site]} for use in tensor.uses}
        floats = [*tensor.floats, *(site for site in users if formats[site] == {None})]
        formatted = [site for site in users if site not in floats]
        if formatted and floats:
            notes.append(
                f"{shared} is used by {', '.join(formatted)} in a format and by {', '.join(floats)} in float: it is "
                "stored in float, whatever formats the sites get"
            )
        elif len(set().union(*formats.values())) > 1 and len(users) > 1:
            notes.append(
                f"{shared} is used by {' and '.join(formatted)}, and each rounds the float values in its format. Where "
                "these formats are not the same, the weight is stored once in each of them, and the sizes count that"
            )
    return notes


def _correction_notes(space: ModelSpace, job: EvaluationJob) -> list[str]:
    """Configured corrections that have no effect in this model."""
    graph, corrections, notes = space.graph, job.corrections, list[str]()
    if corrections.bias and not any(has_bias(graph, s) for s in graph.sites):
        notes.append("bias_correction = true has no effect: no layer that can be configured has a bias")
    if corrections.integer_bias:
        notes += _integer_bias_notes(space)
    if job.equalise and not any(pairs_of(graph)):
        notes.append("equalisation = true has no effect: no two layers have nothing but a ReLU between them")
    if corrections.batch_norm and job.training is not None:
        if not norms_of(graph.model):
            notes.append("batch_norm = true has no effect: the model has no batch norm with running statistics")
    elif corrections.batch_norm and not any(norms_behind(graph, s) for s in graph.sites):
        why = "the model cannot be traced" if graph.untraced else "no batch norm directly follows a layer with weights"
        notes.append(f"batch_norm = true has no effect: {why}")
    return notes


def _integer_bias_notes(space: ModelSpace) -> list[str]:
    """Layers whose biases have formats, which go before steps of the sums."""
    offered = space.quantization(space.graph)
    options = list(zip(offered.sites, offered.site_formats, strict=True))
    formatted = [site.title for site, of in options if any("bias" in option for option in of)]
    summed = [s for s, of in options if has_bias(space.graph, s) and any("bias" not in o and "weight" in o for o in of)]
    notes = [] if not formatted else [f"integer_bias does not change biases with a format: {', '.join(formatted)}"]
    return notes if summed else [*notes, "integer_bias = true has no effect: no layer in formats has a bias in float"]


def _rounding_notes(space: ModelSpace, iterations: int) -> list[str]:
    """Which weights adaptive rounding leaves to the nearest value, and how long the others take."""
    if not iterations:
        return []
    graph, kept, seconds, learned = space.graph, dict[str, list[str]](), 0.0, 0
    offered = space.quantization(graph)
    for site, options in zip(offered.sites, offered.site_formats, strict=True):
        weights = {o for o in site.operands if o != "bias" and site.parameter(o)}
        formats = dict.fromkeys(option[o] for option in options for o in option if o in weights)
        if formats and not learns_rounding(graph, site):
            why = "it is not multiplied with an input, or others use it too"
            kept.setdefault(why, []).append(site.title)
            continue
        for form in formats:
            weight = parameter(graph.model, str(site.weight))
            corner = weight[tuple(slice(2) for _ in weight.shape)]
            if has_two_sides(form.calibrated(corner)):
                seconds, learned = seconds + estimated_seconds(site, iterations), learned + 1
            else:
                kept.setdefault(f"{form.label} has no grid of which every number is a value", []).append(site.title)
    notes = [f"the weight of {', '.join(of)} is rounded to nearest: {why}" for why, of in kept.items()]
    if not learned:
        return [*notes, "rounding = 'adaptive' has no effect: there is no weight and format for which it is learned"]
    what = "one weight in one format" if learned == 1 else f"{learned:,} pairs of a weight and a format, each once"
    each = ", for each network of other widths" if space.changes_widths else ""
    about = f"{max(1, round(seconds))} s" if seconds < 120 else f"{round(seconds / 60):,} min"
    return [*notes, f"rounding is learned for {what}{each}: about {about} in all, beside the time of the candidates"]
