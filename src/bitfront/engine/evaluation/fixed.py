"""The evaluator of candidates that all have the weights of one model.

``FixedEvaluator`` is built from a plain, picklable ``EvaluationJob``. It holds the captured model, the space, the
samples and the runners. Candidates of a traced model go through ``TreeScorer`` together. Where the model cannot be
traced, or the tree fails on a candidate, ``transforms.quantize`` rebuilds candidates one by one and each is run as a
whole model. This is the plain path, and the tree must give the same results.

The metrics of a candidate depend on the candidate alone. All candidates see the same samples in the same chunks, no
state is carried from one batch to the next, and each product is computed on one thread, because the last bits of a
floating-point sum depend on the number of threads.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront.engine.evaluation.calibration import Calibration, Corrections
from bitfront.engine.evaluation.interface import BatchMetrics, EvaluationJob, ModelEvaluator, joined
from bitfront.engine.evaluation.measured import measured, measured_once
from bitfront.engine.evaluation.parameters import RoundedParameters, count_nonzero
from bitfront.engine.evaluation.plain import PlainScorer, as_scores
from bitfront.engine.evaluation.range_loss import RangeLosses
from bitfront.engine.evaluation.tree.program import Program
from bitfront.engine.evaluation.tree.scorer import TreeScorer, WorkLimits
from bitfront.errors import EvaluationError, UserError, described
from bitfront.formats.base import Format, Operand
from bitfront.graph import Graph, Site
from bitfront.graph.capture import changes_in_place
from bitfront.interrupts import contained
from bitfront.metrics.base import Kind, ParameterFigure, Runner, Scores, Values
from bitfront.scoring import results, right_answers
from bitfront.spaces.base import Codes
from bitfront.spaces.model_space import FormatSpace
from bitfront.spaces.quantize import QuantizationSpace
from bitfront.tasks.base import Results
from bitfront.training import StateDict
from bitfront.transforms import SiteFormats, quantize
from bitfront.transforms.correct import Correction, corrected

#: Before a search, ranges are looked at if that takes no more than about a second: operations, and formats.
LOOKED_OPERATIONS, LOOKED_FORMATS = 5 * 10**9, 300


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Let torch use this number of threads; None leaves its number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, which is faster for small work and gives the same sums on every machine.

    On a GPU, convolutions compute in float32: TF32 has 10 bits of mantissa, too few for exact sums.
    """
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with threads(1):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = tf32


class FixedEvaluator(ModelEvaluator):
    """Evaluates the candidates of a job, which all have the weights of its model. Never changes that model.

    Args:
        job: everything the evaluation depends on.
        space: the job's space, if it is built already.
        limits: how work is cut; by default it fits the model and the machine.
        beside: the evaluator of the search, if this one measures the float model or candidates with trained weights.
            Runners and samples are shared with it.
        epochs: number of epochs these weights were trained for in the search.
    """

    def __init__(
        self,
        job: EvaluationJob,
        space: FormatSpace | None = None,
        limits: WorkLimits | None = None,
        beside: FixedEvaluator | None = None,
        epochs: int = 0,
    ) -> None:
        self.job = job
        if space is None:
            built = job.build_space()
            if built.changes_widths:
                raise ValueError("candidates with other widths than the model need a TrainedEvaluator")
            space = built.quantization(built.graph)
        self._space = space
        self.epochs = epochs
        self._searched = beside.searched if beside else space
        threads = job.threads or torch.get_num_threads()
        self.limits = limits or WorkLimits.fitting(space.graph, threads, job.device)
        # Runners are shared, so that nothing is timed twice.
        self.runners: tuple[Runner, ...] = beside.runners if beside else job.make_runners()
        self._calibration = Calibration(space.graph, job.calibration, job.corrections, beside is None, job.memory)
        self._parameters = RoundedParameters(space, self._calibration)
        self._resident: dict[tuple[str, int | None], tuple[Tensor, Tensor]] = beside._resident if beside else {}
        self._labels: dict[tuple[str, int | None], tuple[Tensor, int]] = beside._labels if beside else {}
        #: Per runner in closed form that computes candidates one by one, what it gave.
        self._kept: dict[Runner, dict[bytes, tuple[float, ...]]] = {}
        #: Why candidates take the plain path; empty if they do not.
        self.plain = ""

    @property
    def space(self) -> FormatSpace:
        """The space that the codes belong to."""
        return self._space

    @property
    def searched(self) -> FormatSpace:
        """The space of the search. It differs from `space` if this evaluator measures a single network beside it."""
        return self._searched

    def float_evaluator(self) -> FixedEvaluator:
        """An evaluator whose only candidate, the empty code, is the float model, with the batch norms of the user's."""
        graph = self.job.captured() if self.job.fold_batch_norm else self.space.graph
        return FixedEvaluator(self.job, QuantizationSpace.of_float(graph), self.limits, self)

    def with_splits(self, splits: Mapping[str, tuple[Tensor, Tensor]]) -> FixedEvaluator:
        """An evaluator of the same candidates on other samples."""
        return FixedEvaluator(replace(self.job, splits=splits), self._space)

    def alone(self, code: NDArray[np.int64]) -> tuple[FixedEvaluator, NDArray[np.int64]]:
        """This evaluator, and the code."""
        return self, code

    def evaluate(self, codes: Codes) -> BatchMetrics:
        """All metrics of a batch of candidates.

        A candidate that fails has an entry in ``errors``, and does not affect the others.
        """
        start = time.perf_counter()
        try:
            with contained():
                values, errors = self._evaluate(codes)
        except (UserError, KeyboardInterrupt):
            raise
        except Exception as error:
            if len(codes) == 1:
                nothing = {m: np.full(1, np.nan) for m in self.metrics}
                return BatchMetrics(nothing, (described(error),), (time.perf_counter() - start,))
            # Evaluated one by one, only the candidates that cause the error fail.
            return joined([self.evaluate(codes[i : i + 1]) for i in range(len(codes))])
        seconds = (time.perf_counter() - start) / max(1, len(codes))
        found = dict(self.inexact), self._why_plain, self._calibration.losses, self._held_memory()
        return BatchMetrics(values, errors, (seconds,) * len(codes), *found)

    def _held_memory(self) -> int:
        """Bytes that this process takes, where it may take less, although what was kept is forgotten; else 0."""
        taken = self.job.weights.hold()
        if taken and "_plain_scorer" in vars(self):
            self._plain_scorer.forget()
            taken = self.job.weights.hold()
        return taken

    def kinds(self) -> dict[str, tuple[Kind, str]]:
        """Metric → (how its values are obtained in this search, the reason if that is not the usual way)."""
        kinds: dict[str, tuple[Kind, str]] = {}
        for runner in self.runners:
            kinds.update(runner.kinds(_Context(self)))
        return kinds

    def closed_form_values(self, codes: Codes, metrics: Collection[str]) -> Mapping[str, Values]:
        """Some closed-form metrics of a batch of candidates. No candidate is evaluated for that."""
        values: dict[str, Values] = {}
        for runner in self.runners:
            if runner.closed_form and any(m.name in metrics for m in runner.produces):
                context, kept = _Context(self), self._kept.setdefault(runner, {})
                once = runner.one_by_one
                values.update(measured_once(runner, context, codes, kept) if once else measured(runner, context, codes))
        return {m: values[m] for m in metrics}

    def _evaluate(self, codes: Codes) -> tuple[dict[str, Values], tuple[str, ...]]:
        values: dict[str, Values] = {}
        context = _Context(self)
        with one_thread():
            of_runners = [(runner, measured(runner, context, codes)) for runner in self.runners]
        errors = list(context.errors) or [""] * len(codes)
        for runner, columns in of_runners:
            for name, column in columns.items():
                for i in np.flatnonzero(~np.isfinite(column)):
                    why = "" if errors[i] else runner.why_unmeasured(context, codes[i])
                    errors[i] = errors[i] or f"{name} is {column[i]}" + (f": {why}" if why else "")
                    column[i] = np.nan
            values.update(columns)
        return values, tuple(errors)

    def formats(self, code: NDArray[np.int64]) -> dict[str, dict[Operand, Format]]:
        """Site → operand → calibrated format of one candidate."""
        options = self.space.options(code[None])
        self._learn(options)
        chosen = self._chosen(options[0])
        return {site.name: self._calibration.formats(site, by_operand) for site, by_operand in chosen if by_operand}

    def option_formats(self) -> list[list[dict[Operand, Format]]]:
        """Per site and option: operand → calibrated format."""
        sizes = [group.size for group in self.space.groups]
        self._learn(np.minimum(np.arange(max(sizes))[:, None], np.array(sizes) - 1))
        of_sites = zip(self.space.sites, self.space.site_formats, strict=True)
        return [[self._calibration.formats(site, chosen) for chosen in options] for site, options in of_sites]

    def range_losses(self) -> RangeLosses:
        """What the formats of the space lose of the calibration samples; empty where it takes long to find out."""
        graph, x, memory = self.space.graph, self.job.calibration, self.job.memory
        calibration = Calibration(graph, x, Corrections(), looks=True, memory=memory)
        work = sum(n.operations or 0 for n in graph.nodes) * len(x)
        distinct = {
            (site, operand, form)
            for site, options in zip(self.space.sites, self.space.site_formats, strict=True)
            for formats in options
            for operand, form in formats.items()
        }
        if work > LOOKED_OPERATIONS or len(distinct) > LOOKED_FORMATS:
            return {}
        with one_thread():
            calibration.learn((site, {operand: form}) for site, operand, form in distinct)
        return calibration.losses

    def _chosen(self, options: Codes) -> Iterator[tuple[Site, SiteFormats]]:
        """Each site with the formats that one candidate has there, not calibrated.

        Args:
            options: the candidate's option at each site, shape (sites,).
        """
        for site, formats, option in zip(self.space.sites, self.space.site_formats, options.tolist(), strict=True):
            yield site, formats[option]

    def _learn(self, options: Codes) -> None:
        """Calibrate the options of some candidates, each once.

        On one thread: a correction is a mean of floats, which must come out the same wherever a model is rebuilt.
        """
        with one_thread():
            self._calibration.learn(
                (site, self.space.site_formats[g][option])
                for g, site in enumerate(self.space.sites)
                for option in np.unique(options[:, g]).tolist()
            )

    def nonzero(self, group: int, operand: Operand = "weight") -> NDArray[np.int64]:
        """How many values of a quantized weight of a site are not zero, under each option; shape (options,)."""
        return self.of_parameter(group, operand, count_nonzero).astype(np.int64)

    def of_parameter(self, group: int, operand: Operand, figure: ParameterFigure) -> Values:
        """A figure of a rounded parameter of a site, under each option; shape (options,)."""
        with one_thread():
            return self._parameters.table(group, operand, figure)

    def parts(self, code: NDArray[np.int64]) -> tuple[Graph, dict[str, dict[Operand, Format]], dict[str, Correction]]:
        """The parts of one candidate: (the float model, formats by site, corrections by site)."""
        formats = self.formats(code)
        chosen = self._chosen(self.space.options(code[None])[0])
        corrections = {site.name: self._calibration.correction(site, formats) for site, formats in chosen if formats}
        return self.space.graph, formats, corrections

    def trained(
        self, state: StateDict, formats: Mapping[str, Mapping[Operand, Format]], epochs: int = 0
    ) -> FixedEvaluator:
        """An evaluator for this network with trained weights. Its only candidate is the empty code.

        The formats are those that the network was trained in; they are not calibrated again. The weights contain the
        corrections already.

        Args:
            state: float weights, a state dict of the captured model.
            formats: site name → operand → calibrated format; sites that are absent stay in float.
            epochs: number of epochs it was trained for in the search.
        """
        model = copy.deepcopy(self.space.graph.model)
        model.load_state_dict(state)
        graph = replace(self.space.graph, model=model.eval())
        space = QuantizationSpace.of_formats(graph, formats)
        return FixedEvaluator(self.job.without_corrections(model), space, self.limits, self, epochs)

    def graph(self, code: NDArray[np.int64]) -> Graph:
        """The captured float model with what calibration corrects for one candidate."""
        graph, _, corrections = self.parts(code)
        return corrected(graph, corrections)

    def model(self, code: NDArray[np.int64], *, bake: bool = False) -> nn.Module:
        """The model of one candidate, in evaluation mode. Its parameters are copies."""
        graph, formats, corrections = self.parts(code)
        return quantize(graph, formats, corrections=corrections, bake=bake).to(self.job.device)

    @cached_property
    def _tree(self) -> TreeScorer | None:
        """The tree evaluator; None if the model cannot be evaluated node by node."""
        graph = self.space.graph
        if self.job.whole:
            self.plain = self.job.whole
            return None
        if graph.fx_graph is None:
            self.plain = f"the model cannot be traced: {graph.untraced}"
            return None
        culprit = changes_in_place(graph, self.job.sample.to(self.job.device))
        if culprit:
            self.plain = f"{culprit} changes its input in place"
            return None
        of_job = self.job.device, self.job.unmerged, self.job.weights
        program = Program(graph, self.space, self._calibration, *of_job)
        if site := program.undecided:
            self.plain = f"with integer_bias the bias of {site} depends on the format of its input, which varies"
            return None
        return TreeScorer(program, self.limits)

    @property
    def inexact(self) -> Mapping[str, str]:
        """Site → why its products are computed one by one; of the candidates evaluated so far."""
        return {} if self._tree is None else self._tree.program.inexact

    @property
    def _why_plain(self) -> str:
        note = self._plain_scorer.note if self.plain else ""
        return f"{self.plain}; {note}" if note else self.plain

    @property
    def chunk(self) -> int:
        """Number of samples that go through the model at a time. Sums of floats may depend on it in the last bit."""
        return self.limits.samples

    def scores(self, codes: Codes, split: str, num_samples: int | None) -> Scores:
        """Loss and metrics of the task of each candidate on fixed samples of `split`."""
        x, y = self.samples(split, num_samples)
        tree = self._tree
        if tree is not None and len(codes) and len(y):
            targets, classes = y, 0
            if self.job.task.classifies:
                targets, classes = self._int_labels(split, num_samples)
            if tree.program.steps[tree.program.output].shape[:1] >= (classes,):
                self._learn(self.space.options(codes))
                return self._tree_scores(tree, codes, (x, y, targets))
        return self._plain_scores(codes, x, y)

    def _tree_scores(self, tree: TreeScorer, codes: Codes, samples: tuple[Tensor, Tensor, Tensor]) -> Scores:
        (x, y, targets), task = samples, self.job.task
        try:
            with contained(), one_thread():
                options = self.space.options(codes)
                if not task.classifies:
                    return as_scores(tree.evaluations(options, x, targets, task), task, len(y))
                loss, correct = tree.scores(options, x, targets)
            return Scores(loss / len(y), correct, len(y), ("",) * len(codes))
        except (UserError, KeyboardInterrupt):
            raise
        except Exception as error:
            if len(codes) == 1:
                # The plain path is the reference: it says whether the candidate fails, and why.
                self.plain = f"the tree evaluator failed with {described(error)}"
                return self._plain_scores(codes, x, y)
        half = len(codes) // 2
        first, second = (self._tree_scores(tree, part, samples) for part in (codes[:half], codes[half:]))
        return Scores.joined([first, second], len(y))

    def _plain_scores(self, codes: Codes, x: Tensor, y: Tensor) -> Scores:
        self._learn(self.space.options(codes))
        with one_thread():
            return self._plain_scorer.scores(codes, x, y)

    @cached_property
    def _plain_scorer(self) -> PlainScorer:
        job, folder = self.job, self.job.memory.folder if self.job.memory else None
        how = job.device, self.chunk, self.model, job.task, job.weights.limit, folder
        return PlainScorer(self.space, self._calibration, *how)

    def answers(self, codes: Codes, split: str, start: int = 0, stop: int | None = None) -> NDArray[np.bool_]:
        """Which samples each candidate classifies correctly, bool, shape (candidates, samples).

        Candidates are run one by one as whole models. This is meant for the few that are compared at the end of a
        search. A candidate that fails has no correct answers.

        Args:
            start, stop: range of samples of the split, in the order in which ``num_samples`` counts them.
        """
        x, y = (t[start:stop] for t in self.samples(split, None))
        answers = np.zeros((len(codes), len(y)), dtype=bool)
        with one_thread():
            for row, code in zip(answers, codes, strict=True):
                with contextlib.suppress(RuntimeError, EvaluationError), contained():
                    row[:] = right_answers(self.model(code), x, y, batch_size=self.chunk)
        return answers

    def outputs(self, codes: Codes, x: Tensor) -> Tensor | None:
        """The outputs of candidates, float32, shape (candidates, samples, ...); None where the model is not evaluated
        node by node. Raises what the model raises, and TypeError where it does not return one tensor."""
        if self._tree is None:
            return None
        self._learn(self.space.options(codes))
        with contained(), one_thread():
            return self._tree.outputs(self.space.options(codes), x)

    def results(self, codes: Codes, split: str, num_samples: int | None) -> list[Results | None]:
        """The results per sample of each candidate, run alone as a whole model; None for one that fails."""
        (x, y), outputs = self.samples(split, num_samples), self.space.graph.outputs
        found: list[Results | None] = [None] * len(codes)
        with one_thread():
            for i, code in enumerate(codes):
                with contextlib.suppress(RuntimeError, EvaluationError), contained():
                    model = self.model(code)
                    found[i] = results(self.job.task, model, x, y, batch_size=self.chunk, outputs=outputs)
        return found

    def samples(self, split: str, num_samples: int | None) -> tuple[Tensor, Tensor]:
        """The samples (x, y) that ``scores`` uses."""
        key = (split, num_samples)
        if key not in self._resident:
            x, y = self.job.splits[split]
            self._resident[key] = (x[:num_samples].to(self.job.device), y[:num_samples].to(self.job.device))
        return self._resident[key]

    def _int_labels(self, split: str, num_samples: int | None) -> tuple[Tensor, int]:
        """(the labels as int32, the largest label plus one)."""
        key = (split, num_samples)
        if key not in self._labels:
            y = self.samples(split, num_samples)[1]
            self._labels[key] = (y.int().contiguous(), int(y.max()) + 1 if len(y) else 0)
        return self._labels[key]


class _Context:
    """What the runners see of an evaluator during one batch. Several runners share one forward pass."""

    def __init__(self, evaluator: FixedEvaluator) -> None:
        self._evaluator = evaluator
        self._scores: dict[tuple[str, int | None], Scores] = {}

    @property
    def space(self) -> FormatSpace:
        return self._evaluator.space

    @property
    def searched(self) -> FormatSpace:
        return self._evaluator.searched

    @property
    def sample(self) -> Tensor:
        return self._evaluator.sample

    @property
    def device(self) -> str:
        return self._evaluator.device

    @property
    def epochs(self) -> int:
        return self._evaluator.epochs

    def formats(self, code: NDArray[np.int64]) -> Mapping[str, Mapping[Operand, Format]]:
        return self._evaluator.formats(code)

    def graph(self, code: NDArray[np.int64]) -> Graph:
        return self._evaluator.graph(code)

    def model(self, code: NDArray[np.int64]) -> nn.Module:
        return self._evaluator.model(code)

    def nonzero(self, group: int, operand: Operand = "weight") -> NDArray[np.int64]:
        return self._evaluator.nonzero(group, operand)

    def of_parameter(self, group: int, operand: Operand, figure: ParameterFigure) -> Values:
        return self._evaluator.of_parameter(group, operand, figure)

    @property
    def errors(self) -> Sequence[str]:
        """Per candidate the first error of any forward pass; empty if there was none."""
        columns = [s.errors for s in self._scores.values() if any(s.errors)]
        if not columns:
            return []
        return [next((e for e in row if e), "") for row in zip(*columns, strict=True)]

    def scores(self, codes: Codes, split: str, num_samples: int | None) -> Scores:
        key = (split, num_samples)
        if key not in self._scores:
            self._scores[key] = self._evaluator.scores(codes, split, num_samples)
        return self._scores[key]
