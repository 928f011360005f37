"""Rebuilds the quantized model of a trial of a run, or of ``[passes.quantize]`` of a file, and saves it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront import checkpoints
from bitfront.config import CalibrationTable, Config
from bitfront.engine.evaluation.fixed import FixedEvaluator, one_thread
from bitfront.engine.evaluation.interface import ONLY_CODE, ModelEvaluator
from bitfront.engine.planning.builder import make_plan
from bitfront.engine.planning.inputs import given_data, refuse_without_labels, weights_fingerprint, with_outputs
from bitfront.engine.planning.plan import Plan
from bitfront.engine.planning.runners import chosen_samples
from bitfront.engine.search.weights import open_inputs, trained_model
from bitfront.engine.storage import store as stores
from bitfront.engine.storage.folder import STORE, WEIGHTS, finetuned_weights, trial_weights
from bitfront.engine.storage.results import write_json
from bitfront.engine.storage.run import Run
from bitfront.engine.storage.trial import NOTHING, Trial
from bitfront.errors import RunError, UnknownNameError
from bitfront.events import Events
from bitfront.files import shown
from bitfront.formats.base import Format, Operand
from bitfront.formats.spelling import read, spelled
from bitfront.graph import Graph, capture
from bitfront.graph.baking import private_copy
from bitfront.learned_bits.smaller import Smaller, compared, without_idle_channels
from bitfront.passes import Passes, configured_passes
from bitfront.scoring import CHUNK, Evaluation, TaskEvaluation, measure
from bitfront.spaces.described import CandidateConfig
from bitfront.spaces.quantize import QuantizationSpace, single
from bitfront.tasks.configured import task_of
from bitfront.transforms import calibrate, quantize
from bitfront.transforms.correct import corrected
from bitfront.transforms.prune import Pruned, pruned

#: Number of calibration samples for ``[passes.quantize]``: the default of a search.
CALIBRATION_SAMPLES = CalibrationTable().num_samples
#: A candidate whose sites all stay in float.
IN_FLOAT: Mapping[str, Any] = {"by": "name", "default": {"config": {"name": "NA"}}}


@dataclass(frozen=True, eq=False)
class Transformed:
    """A quantized model.

    Attributes:
        model: in evaluation mode, with the quantized weights in its parameters.
        formats: site → operand → format, calibrated.
        graph: the captured float model, with what calibration corrected.
        config: the candidate spelled out.
        folder: the folder that the model is saved in, if it is saved.
        trial: the trial; None for ``[passes.quantize]``.
        evaluation: loss and metrics of the task, if requested: of a trial on the samples of its search, else on the
            validation split.
        widths: layer → (its multiplier, its output width), for layers whose width was searched.
        smaller: the network without the channels that do nothing, if requested.
        smaller_metrics: what it costs, by metric.
        pruned: site → (zeros, weights) of its quantized weight, where ``[passes.prune]`` was applied.
        reports: (name, file for its table, empty if none) of the passes that show something.
    """

    model: nn.Module
    formats: Mapping[str, Mapping[Operand, Format]]
    graph: Graph
    config: CandidateConfig
    folder: Path
    trial: Trial | None = None
    evaluation: Evaluation | TaskEvaluation | None = None
    widths: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    smaller: Smaller | None = None
    smaller_metrics: Mapping[str, float] = field(default_factory=dict)
    pruned: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    reports: tuple[tuple[str, str], ...] = ()


def transform_trial(
    run: Run | str | Path,
    number: int,
    *,
    check: bool = False,
    smaller: bool = False,
    save: bool = True,
    data: Any = None,
    model: nn.Module | None = None,
    events: Events | None = None,
) -> Transformed:
    """Rebuild the model of a trial from the run folder, and save it in a folder below it.

    Args:
        run: the run, or its folder.
        number: the number of the trial.
        check: whether to evaluate the model again, on the samples of the search.
        smaller: whether to make the network without the channels that do nothing too, for trials whose bits were
            learned. It is compared with the trial on every sample of the dataset, and saved beside it.
        save: whether to save it.
        data, model: the same objects that the search was given from Python, if it was; left out, they are those of the
            call that made `run`. A folder has none.
        events: receives notes.

    Raises:
        RunError: there is no such run or trial, or its model or data is missing or has changed since the search. Or
            `smaller` is not possible: bits were not learned, or outputs differ.
    """
    candidate = candidate_of(run, number, data=data, model=model, events=events)
    evaluator, code, trial = candidate.evaluator, candidate.code, candidate.trial
    graph, formats, corrections = evaluator.parts(code)
    graph = corrected(graph, corrections)
    rebuilt = evaluator.model(code, bake=True)
    evaluation = None
    if check:
        evaluation = evaluated(candidate, rebuilt)
        if evaluation is None:
            leading = evaluator.job.task.leading.name
            raise RunError(
                f"{shown(candidate.folder)}: this search measured no {leading}, so there is nothing to check"
            )
    saved = candidate.folder / "transformed" / f"trial-{trial.number}"
    widths = candidate.plan.space.layer_widths(np.array(trial.code, dtype=np.int64))
    result = Transformed(rebuilt, formats, graph, trial.config, saved, trial, evaluation, widths)
    result = _with_smaller(result, candidate) if smaller else result
    return _save(result) if save else result


def _with_smaller(result: Transformed, candidate: RebuiltTrial) -> Transformed:
    """The result with the network without the channels that do nothing, compared on every sample, and its costs."""
    plan, evaluator = candidate.plan, candidate.evaluator
    splits: dict[str, Tensor] = {name: plan.dataset.split(name)[0] for name in plan.dataset.splits}
    small = compared(without_idle_channels(result.graph, result.formats, splits["val"]), result.model, splits)
    alone = FixedEvaluator(
        evaluator.job.without_corrections(small.graph.model), QuantizationSpace.of_formats(small.graph, small.formats)
    )
    costs = alone.closed_form_values(ONLY_CODE[None], alone.closed_form)
    return replace(result, smaller=small, smaller_metrics={name: float(costs[name][0]) for name in sorted(costs)})


@dataclass(frozen=True, eq=False)
class RebuiltTrial:
    """A trial with its weights: `code` is its code in `evaluator`, whose model has these weights; `folder` is the run
    folder, as an absolute path."""

    trial: Trial
    plan: Plan
    evaluator: ModelEvaluator
    code: NDArray[np.int64]
    folder: Path


def evaluated(candidate: RebuiltTrial, model: nn.Module) -> Evaluation | TaskEvaluation | None:
    """Loss and metrics of a model for the task of a search, on its samples; None if the search measured neither.

    Args:
        candidate: a trial of the search.
        model: the deployed model of the trial, or one like it.
    """
    samples, evaluator = candidate.plan.evaluator.accuracy_samples, candidate.evaluator
    if samples is None:
        return None
    x, y = evaluator.samples(samples.split, samples.number)
    with one_thread():
        return measure(
            evaluator.job.task, model, x, y, batch_size=evaluator.chunk, outputs=evaluator.space.graph.outputs
        )


def candidate_of(
    run: Run | str | Path,
    number: int,
    *,
    data: Any = None,
    model: nn.Module | None = None,
    events: Events | None = None,
) -> RebuiltTrial:
    """A trial of a run with its weights. If they were not stored, it is trained again to the same weights.

    Args:
        run, number, data, model, events: as in ``transform_trial``.

    Raises:
        RunError: there is no such run or trial, or its model or data is missing or has changed since the search.
    """
    events = events or Events()
    given = run.given if isinstance(run, Run) else NOTHING
    folder = (
        run.folder if isinstance(run, Run) else Path(run)
    ).absolute()  # the model may change the working directory
    run = replace(Run.load(run.folder if isinstance(run, Run) else run), given=given)
    for note in run.notes:
        events.note(note)
    trial = run.trial(number)
    plan = searched_plan(run, f"trial {number} cannot be rebuilt", data=data, model=model, events=events)
    searched_code = np.array(trial.code, dtype=np.int64)
    plan.evaluator.recall(searched_code, trial.metrics, trial_weights(folder, number))
    evaluator, code = plan.evaluator.alone(searched_code)
    if trial.finetuned is not None and trial.finetuned.kept:
        evaluator, code = _finetuned(evaluator, folder, number), ONLY_CODE
    return RebuiltTrial(trial, plan, evaluator, code, folder)


def searched_plan(
    run: Run,
    failed: str,
    *,
    data: Any = None,
    model: nn.Module | None = None,
    events: Events,
) -> Plan:
    """The plan of a run, with its trained weights, samples and what calibration has learned.

    Args:
        run: the run.
        failed: what is not possible if the model or data changed, for the message.
        data, model: as in ``transform_trial``.
        events: receives notes.

    Raises:
        RunError: the model or data is missing, or has changed since the search.
    """
    folder = run.folder.absolute()
    model = run.given.model if model is None else model
    data = run.given.data if data is None else data
    # The weights of the search are in its folder, so those of a library are not asked for.
    update: dict[str, object] = {"project": folder.name, "project_dir": str(folder.parent), "weights": False}
    if not run.config.labels and model is None:
        # What candidates are compared with are the outputs of the weights that the search kept.
        update |= {"load_name": str(folder / WEIGHTS), "load_type": "pt"}
    config = run.config.model_copy(update=update)
    with _asking_for(run, failed, {"model": model, "dataset": data}):
        plan = make_plan(
            config,
            model=model,
            dataset=given_data(config, data, model, events),
            report=events.note,
            progress=events.downloading,
        )
    if model is None:
        searched = private_copy(plan.model)
        searched.load_state_dict(checkpoints.load_checkpoint(folder / WEIGHTS, searched))
        plan = plan.trained(searched)
    store = stores.read(folder / STORE)
    try:
        before, samples, length = store.meta("identity"), store.meta("num_samples"), store.meta("length")
    finally:
        store.close()
    now = plan.identity(weights_fingerprint(plan.model))
    for key, what in (("weights", "the trained weights"), ("data", "the data")):
        if before[key] != now[key]:
            raise RunError(f"{folder}: {what} changed since the search; {failed} from them")
    if "forward" in before and not stores.same_outputs(before["forward"], now["forward"]):
        raise RunError(
            f"{folder}: the code of the model changed since the search: its outputs on the same samples differ; "
            f"{failed} with it"
        )
    if samples is not None:
        plan = plan.sampled(samples)
    if length is not None:
        plan = plan.paced(**length)
    job = plan.evaluator.job
    if job.memory is not None:
        for note in job.memory.keep(folder, plan.space.graph, job.calibration, writes=False):
            events.note(note)
    plan.evaluator.keep_in(folder)
    return plan


@contextlib.contextmanager
def _asking_for(run: Run, failed: str, given: Mapping[str, object]) -> Iterator[None]:
    """Where a name of the configuration is unknown because the search was given an object, the error asks for it."""
    try:
        yield
    except UnknownNameError as error:
        (key, *_), names = error.key or ("",), {"model": run.config.model, "dataset": run.config.dataset}
        if given.get(key, error) is not None:
            raise
        raise RunError(
            f"{shown(run.folder)}: {failed}: the search was given its {'model' if key == 'model' else 'data'} "
            f"({names[key]!r}) from Python, and no file has it. Give it again from Python: model=... and data=..., as "
            "the search had them"
        ) from None


def _finetuned(evaluator: ModelEvaluator, folder: Path, number: int) -> ModelEvaluator:
    """The evaluator of the fine-tuned candidate, from the run folder's checkpoint."""
    path = finetuned_weights(folder, number)
    state, meta = checkpoints.load_checkpoint(path, evaluator.space.graph.model), checkpoints.read_meta(path)
    return evaluator.trained(state, read(meta["formats"]))


def transform_config(config: Config, *, check: bool = False, events: Events | None = None) -> Transformed:
    """Apply ``[passes]`` to the trained model of `config`, and save the result in the run folder.

    Weights are pruned first, whatever the order of the tables, so that formats are calibrated on what is deployed.

    Args:
        config: the configuration.
        check: whether to evaluate the result on the validation split.
        events: receives notes and the progress of a training.

    Raises:
        UserError: the configuration, the data or the checkpoint cannot be used; the message says why.
    """
    events = events or Events()
    passes = configured_passes(config)
    dataset, model = open_inputs(config, events)
    sample = dataset.split("train")[0][:2]
    with config.locating():
        _space_of(passes, capture(model, sample))
        if config.load_name is None:
            refuse_without_labels(config, "the float model needs weights; name them with load_name")
        trained = trained_model(config, model, dataset, events).model
        graph = capture(trained, sample)
        prune = passes.prune
        cut = None if prune is None else pruned(graph, prune.sparsity, prune.scope)
        graph = graph if cut is None else cut.graph
        space = _space_of(passes, graph)
        graph = space.graph
    for key in space.unused:
        by = (passes.quantize or IN_FLOAT).get("by", "name")
        events.note(f"{key!r} of [passes.quantize] names nothing here (by = {by!r}), and is not used")
    if cut is not None and cut.skipped:
        events.note(f"[passes.prune] leaves {', '.join(cut.skipped)} as they are: they share memory in part")
    chosen = space.formats(np.zeros(len(space.groups), dtype=np.int64))
    formats = calibrate(graph, chosen, chosen_samples(dataset, "train", CALIBRATION_SAMPLES, config.seed)[0])
    rebuilt = quantize(graph, formats, bake=True)
    task = task_of(config)
    dataset = with_outputs(config, dataset, trained, task)
    chunk, val = CHUNK if task.classifies else config.batch_size, dataset.split("val")
    evaluation = measure(task, rebuilt, *val, batch_size=chunk, outputs=graph.outputs) if check else None
    saved = config.run_folder / "transformed" / ("quantize" if passes.quantize else "prune" if cut else "float")
    zeros = {} if cut is None else _zeros(rebuilt, cut)
    spelled_out = passes.quantize or IN_FLOAT
    result = Transformed(
        rebuilt, formats, graph, spelled_out, saved, None, evaluation, pruned=zeros, reports=passes.reports
    )
    return _save(result)


def _space_of(passes: Passes, graph: Graph) -> QuantizationSpace:
    """The space whose only candidate has the formats of ``[passes.quantize]``. Raises ConfigError."""
    if passes.quantize is None:
        return QuantizationSpace.of_float(graph)
    return single(graph, passes.quantize, ("passes", "quantize"))


def _zeros(model: nn.Module, cut: Pruned) -> dict[str, tuple[int, int]]:
    """Site → (zeros, weights) in the deployed model."""
    state = model.state_dict()
    return {
        site: (int((state[name] == 0).sum()), state[name].numel()) for site, name in cut.layers.items() if name in state
    }


def _save(result: Transformed) -> Transformed:
    """Save the state dict, as PyTorch's file and as safetensors, and the formats of each site beside it."""
    for ending in ("pt", "safetensors"):
        checkpoints.save_checkpoint(result.model.state_dict(), result.folder / f"model.{ending}")
    document = {"config": dict(result.config), "formats": spelled(result.formats)}
    write_json(result.folder / "quantization.json", document)
    if result.smaller is not None:
        folder, small = result.folder / "smaller", result.smaller
        checkpoints.save_checkpoint(small.model.state_dict(), folder / "model.pt")
        document = {
            "weights": {path: now for path, (_, now) in small.layers.items()},
            "formats": spelled(small.formats),
        }
        write_json(folder / "quantization.json", document)
    return replace(result, folder=shown(result.folder))
