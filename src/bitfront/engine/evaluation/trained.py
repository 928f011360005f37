"""The evaluator of candidates that are separate networks: their widths differ from the model's, or each is trained.

A candidate starts from the float model's weights, widened or cut to its widths (``transforms.widen``). Its costs are
those of that network, so they follow its shapes. If the search trains candidates, a network of other widths may first
be trained in float, once for all its candidates; formats learn their scales after that. Then each candidate is trained
with its formats in place and straight-through gradients, and evaluated in the same formats. Formats that were
calibrated again on the trained weights would differ from those that the weights have adapted to.

A candidate's training depends on its code and the settings alone: every candidate has the same seed and the same
samples in the same order. With halving, the number of epochs depends on its cohort too (``halving.py``). Candidates are
trained in groups (``bitfront.population``), each to the same bits as alone. So it does not matter which others are
trained, in which order or in which process.
"""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar, cast
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront import checkpoints
from bitfront.constraints import total
from bitfront.engine.evaluation.after_training import float_state, with_new_statistics
from bitfront.engine.evaluation.fixed import FixedEvaluator, one_thread, threads
from bitfront.engine.evaluation.halving import Halving, going_on
from bitfront.engine.evaluation.interface import (
    ONLY_CODE,
    BatchMetrics,
    CandidateTraining,
    EvaluationJob,
    Evaluator,
    joined,
)
from bitfront.engine.evaluation.keeping import bytes_of
from bitfront.engine.evaluation.learned_bits import LearnedBitsEvaluator
from bitfront.errors import EvaluationError, UserError, described
from bitfront.formats.base import Format, Operand
from bitfront.formats.spelling import read, spelled
from bitfront.graph import capture
from bitfront.interrupts import contained
from bitfront.kernels.losses import Outputs
from bitfront.learned_bits.space import LearnedBitsSpace
from bitfront.metrics.base import Kind, Scores, Values
from bitfront.population import train_population
from bitfront.spaces.base import Codes
from bitfront.spaces.model_space import ModelSpace
from bitfront.tasks.base import Results, Task
from bitfront.tasks.classification import CLASSIFICATION
from bitfront.training import StateDict
from bitfront.transforms.widen import Widths, widen

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
#: (positions of members in a cohort, their weights at a rung) → which of them go on, bool, shape (members,).
Selection = Callable[[Sequence[int], Sequence[StateDict]], NDArray[np.bool_]]
#: Noise that is added to copies of channels before training, as a share of the weights' standard deviation. Equal
#: copies would get equal gradients, and stay equal.
NOISE = 0.01
#: Size of the caches of networks and of trained states, in bytes of weights.
CACHE_BYTES = 2**28
#: Number of samples on which training checks that the loss is a number.
CHECKED_SAMPLES = 64


def open_evaluator(job: EvaluationJob, space: ModelSpace | None = None) -> Evaluator:
    """The evaluator that a job needs.

    Args:
        space: the job's space, if it is built already.
    """
    space = space or job.build_space()
    if isinstance(space, LearnedBitsSpace):
        return LearnedBitsEvaluator(job, space)
    if job.training is None and not space.changes_widths:
        return FixedEvaluator(job, space.quantization(space.graph))
    return TrainedEvaluator(job, space)


@dataclass(frozen=True, eq=False)
class TrainedCandidate:
    """A candidate after training: its float weights, number of epochs, and the formats it was trained in."""

    state: StateDict
    epochs: int
    formats: Mapping[str, Mapping[Operand, Format]]


class TrainedEvaluator(Evaluator):
    """Evaluates candidates that each have different weights.

    Attributes:
        candidates: code → the trained candidate, for those used last.
        stopped: code → number of epochs, for candidates that halving has judged.
    """

    def __init__(self, job: EvaluationJob, space: ModelSpace) -> None:
        self.job = job
        self._space = space
        #: The job of the evaluators of single networks.
        self._network_job = replace(job, training=None)
        self._float = FixedEvaluator(self._network_job, space.quantization(space.graph))
        self.runners = self._float.runners
        size = bytes_of(job.model)
        capacity = max(8, CACHE_BYTES // max(1, size))
        self.candidates: _RecentlyUsed[bytes, TrainedCandidate] = _RecentlyUsed(capacity)
        self.stopped: dict[bytes, int] = {}
        self._networks: _RecentlyUsed[tuple[tuple[int, int], ...], FixedEvaluator] = _RecentlyUsed(capacity)
        #: The evaluator of an untrained network → the evaluator of that network after training in float.
        self._trained_in_float: WeakKeyDictionary[FixedEvaluator, FixedEvaluator] = WeakKeyDictionary()

    @property
    def space(self) -> ModelSpace:
        """The space of the search."""
        return self._space

    @property
    def closed_form(self) -> frozenset[str]:
        """Metrics that are known before a candidate is evaluated; if it is trained, none that look at its weights."""
        return super().closed_form - (self.of_weights if self.job.training else frozenset())

    def kinds(self) -> dict[str, tuple[Kind, str]]:
        """Metric → (how its values are obtained, the reason if that is not the usual way); as for the float model."""
        return self._float.kinds()

    def float_evaluator(self) -> FixedEvaluator:
        """An evaluator whose only candidate, the empty code, is the float model."""
        return self._float.float_evaluator()

    def with_splits(self, splits: Mapping[str, tuple[Tensor, Tensor]]) -> TrainedEvaluator:
        """An evaluator of the same candidates on other samples. Trained candidates are not trained again."""
        other = TrainedEvaluator(replace(self.job, splits=splits), self._space)
        other.candidates, other.stopped = self.candidates, self.stopped
        return other

    def samples(self, split: str, num_samples: int | None) -> tuple[Tensor, Tensor]:
        """The samples (x, y) that ``scores`` uses."""
        return self._float.samples(split, num_samples)

    def alone(self, code: NDArray[np.int64]) -> tuple[FixedEvaluator, NDArray[np.int64]]:
        """(the evaluator of one candidate's network with its weights, the candidate's code in that evaluator)."""
        (_, evaluator, codes), *_ = self._trained_networks(code[None])
        return evaluator, codes[0]

    def recall(self, code: NDArray[np.int64], metrics: Mapping[str, float], path: Path) -> None:
        """Take over one candidate's number of epochs from `metrics`, and its weights if ``keep`` wrote them to `path`.

        Raises:
            CheckpointError: the file is damaged, or belongs to another network.
        """
        if self.job.training is None:
            return
        epochs = int(metrics["trained_epochs"])
        self.stopped[code.tobytes()] = epochs
        if path.exists():
            (_, evaluator, _), *_ = self._untrained_networks(code[None])
            state, meta = checkpoints.load_checkpoint(path, evaluator.space.graph.model), checkpoints.read_meta(path)
            self.candidates.put(code.tobytes(), TrainedCandidate(state, epochs, read(meta["formats"])))

    def keep(self, code: NDArray[np.int64], path: Path) -> None:
        """Write the trained weights and formats of one candidate to `path`, if the file does not exist."""
        if self.job.training is not None and not path.exists():
            evaluator, network_code = self.alone(code)
            checkpoints.save_checkpoint(
                evaluator.space.graph.model.state_dict(), path, {"formats": spelled(evaluator.formats(network_code))}
            )

    def evaluate(self, codes: Codes) -> BatchMetrics:
        """All metrics of a batch of candidates, each trained first if the search trains candidates."""
        start = time.perf_counter()
        try:
            with contained():
                networks = self._trained_networks(codes, is_cohort=True)
                parts = [(rows, evaluator.evaluate(network_codes)) for rows, evaluator, network_codes in networks]
        except (UserError, KeyboardInterrupt):
            raise
        except Exception as error:
            seconds = time.perf_counter() - start
            if len(codes) == 1:
                nothing = {m: np.full(1, np.nan) for m in self.metrics}
                return BatchMetrics(nothing, (described(error),), (seconds,))
            # Training failed. Evaluated one by one, only the candidates that cause the error fail.
            return joined([self.evaluate(codes[i : i + 1]) for i in range(len(codes))])
        seconds = (time.perf_counter() - start) / max(1, len(codes))
        measured = joined([metrics for _, metrics in parts])
        order = np.argsort(np.concatenate([rows for rows, _ in parts])) if parts else np.zeros(0, dtype=np.int64)
        return replace(
            measured,
            values={m: v[order] for m, v in measured.values.items()},
            errors=tuple(measured.errors[i] for i in order),
            seconds=(seconds,) * len(codes),
        )

    def closed_form_values(self, codes: Codes, metrics: Collection[str]) -> Mapping[str, Values]:
        """Some closed-form metrics of a batch of candidates. None is trained for that."""
        values = {m: np.full(len(codes), np.nan) for m in metrics}
        for rows, evaluator, network_codes in self._untrained_networks(codes):
            for name, column in evaluator.closed_form_values(network_codes, metrics).items():
                values[name][rows] = column
        return values

    def scores(self, codes: Codes, split: str, num_samples: int | None) -> Scores:
        """Loss and metrics of the task of each candidate on fixed samples of `split`."""
        order, parts = list[int](), list[Scores]()
        for rows, evaluator, network_codes in self._trained_networks(codes):
            order += rows.tolist()
            parts.append(evaluator.scores(network_codes, split, num_samples))
        return Scores.joined(parts, len(self.samples(split, num_samples)[1])).taken(np.argsort(order))

    def answers(self, codes: Codes, split: str, start: int = 0, stop: int | None = None) -> NDArray[np.bool_]:
        """Which samples each candidate classifies correctly, bool, shape (candidates, samples)."""
        count = len(self.samples(split, None)[1][start:stop])
        answers = np.zeros((len(codes), count), dtype=bool)
        for rows, evaluator, network_codes in self._trained_networks(codes):
            answers[rows] = evaluator.answers(network_codes, split, start, stop)
        return answers

    def results(self, codes: Codes, split: str, num_samples: int | None) -> list[Results | None]:
        """The results per sample of each candidate."""
        found: list[Results | None] = [None] * len(codes)
        for rows, evaluator, network_codes in self._trained_networks(codes):
            given = evaluator.results(network_codes, split, num_samples)
            for row, results in zip(rows.tolist(), given, strict=True):
                found[row] = results
        return found

    # --- networks ----------------------------------------------------------------------------------------------------

    def _trained_networks(
        self, codes: Codes, *, is_cohort: bool = False
    ) -> Iterator[tuple[NDArray[np.int64], FixedEvaluator, Codes]]:
        """Per network (its rows of `codes`, its evaluator with its weights, the codes of these rows there).

        Args:
            is_cohort: `codes` are a cohort: with halving, the worst are not trained to the end. Otherwise each
                candidate's number of epochs is known already.
        """
        training = self.job.training
        if training is None:
            yield from self._untrained_networks(codes)
            return
        keys = [code.tobytes() for code in codes]
        halving = training.halving if is_cohort else None
        # A separate table, because a batch may be larger than the cache.
        known = {row: None if halving else self.candidates.get(key) for row, key in enumerate(keys)}
        unknown = np.array([row for row, value in known.items() if not self._fits(keys[row], value)], dtype=np.int64)
        missing = [
            (int(unknown[i]), evaluator, code)
            for rows, evaluator, network_codes in self._starting_networks(codes[unknown], training)
            for i, code in zip(rows, network_codes, strict=True)
        ]
        most = [training.settings.max_epochs if halving else self._epochs(keys[row]) for row, _, _ in missing]
        with one_thread():
            twins = [evaluator.model(code) for _, evaluator, code in missing]
            formats = [evaluator.formats(code) for _, evaluator, code in missing]

        def select(members: Sequence[int], states: Sequence[StateDict]) -> NDArray[np.bool_]:
            assert halving is not None
            evaluators = [
                network.trained(self._finished(network, state, formats[i]), formats[i])
                for i, state in zip(members, states, strict=True)
                for network in (missing[i][1],)
            ]
            return going_on(*self._at_rung(evaluators, halving))

        with threads(self.job.threads):
            outputs, chosen = self._space.graph.outputs, select if halving else None
            trained = _train(twins, training, self.job.device, most, outputs, chosen, self.job.task) if twins else []
        for (row, evaluator, _), site_formats, (state, epochs) in zip(missing, formats, trained, strict=True):
            known[row] = TrainedCandidate(self._finished(evaluator, state, site_formats), epochs, site_formats)
        networks = {int(row): evaluator for rows, evaluator, _ in self._untrained_networks(codes) for row in rows}
        for row, evaluator in sorted(networks.items()):
            candidate = known[row]
            assert candidate is not None
            self.candidates.put(keys[row], candidate)
            if halving:
                self.stopped[keys[row]] = candidate.epochs
            network = evaluator.trained(candidate.state, candidate.formats, candidate.epochs)
            yield np.array([row]), network, ONLY_CODE[None]

    def _finished(
        self, network: FixedEvaluator, twin: StateDict, formats: Mapping[str, Mapping[Operand, Format]]
    ) -> StateDict:
        """The float weights of a network from those of its trained twin, with what is corrected after training."""
        training, state = self.job.training, float_state(network.space.graph, twin)
        assert training is not None
        if not self.job.corrections.batch_norm:
            return state
        return with_new_statistics(network, state, formats, training.settings.batch_size)

    def _epochs(self, key: bytes) -> int:
        """Number of epochs for a candidate that is not part of a cohort."""
        assert self.job.training is not None
        return self.stopped.get(key, self.job.training.settings.max_epochs)

    def _fits(self, key: bytes, known: TrainedCandidate | None) -> bool:
        return known is not None and known.epochs == self._epochs(key)

    def _at_rung(
        self, members: Sequence[FixedEvaluator], halving: Halving
    ) -> tuple[NDArray[np.float64], float, NDArray[np.float64]]:
        """The arguments of ``going_on`` for a cohort. The losses, smaller is better, are − correct answers (or what
        leads in another task), then costs."""
        samples, violation = self.accuracy_samples, np.zeros(len(members))
        leading = self.job.task.leading
        assert samples is not None, "the plan checks that"
        names, rows = {c.metric for c in halving.constraints}, []
        for i, member in enumerate(members):
            scores = member.scores(ONLY_CODE[None], samples.split, samples.number)
            value = float(scores.correct[0] if self.job.task.classifies else scores.of_task[leading.name][0])
            loss = value if leading.direction == "minimize" else -value
            wanted = {name for name, _ in halving.costs} | (names & member.closed_form)
            values = {**member.closed_form_values(ONLY_CODE[None], wanted), **scores.of_task}
            signed = [sign * float(values[name][0]) for name, sign in halving.costs]
            rows.append([np.inf if np.isnan(loss) else loss, *signed])
            if known := [c for c in halving.constraints if c.metric in values]:
                violation[i] = np.inf if scores.errors[0] else total(known, values)[0]
        return np.array(rows), halving.keep, violation

    def _untrained_networks(self, codes: Codes) -> Iterator[tuple[NDArray[np.int64], FixedEvaluator, Codes]]:
        """Per distinct widths (their rows of `codes`, the evaluator of the untrained network, the codes of these rows
        there)."""
        widths, formats = self._space.split(codes)
        if not len(codes):
            return
        distinct, which = np.unique(widths, axis=0, return_inverse=True)
        for index, options in enumerate(distinct):
            rows = np.flatnonzero(which.reshape(-1) == index)
            yield rows, self._network(self._space.widths(options)), formats[rows]

    def _starting_networks(
        self, codes: Codes, training: CandidateTraining
    ) -> Iterator[tuple[NDArray[np.int64], FixedEvaluator, Codes]]:
        """As ``_untrained_networks``, but networks of other widths are trained in float if the settings ask for it.
        The networks of a batch are trained together."""
        parts = list(self._untrained_networks(codes))
        other = (
            [evaluator for _, evaluator, _ in parts if evaluator is not self._float] if training.float_epochs else []
        )
        missing = [evaluator for evaluator in other if evaluator not in self._trained_in_float]
        if missing:
            settings = replace(training.settings, max_epochs=training.float_epochs)
            with threads(self.job.threads):
                models = [evaluator.space.graph.model for evaluator in missing]
                epochs = [training.float_epochs] * len(models)
                own_settings, device = replace(training, settings=settings), self.job.device
                trained = _train(models, own_settings, device, epochs, self._space.graph.outputs, task=self.job.task)
            for evaluator, (state, _) in zip(missing, trained, strict=True):
                model = copy.deepcopy(evaluator.space.graph.model)
                model.load_state_dict(state)
                graph = replace(evaluator.space.graph, model=model.eval())
                job, space = self._network_job.of_network(model), self._space.quantization(graph)
                self._trained_in_float[evaluator] = FixedEvaluator(job, space, evaluator.limits, self._float)
        for rows, evaluator, network_codes in parts:
            yield rows, self._trained_in_float.get(evaluator, evaluator), network_codes

    def _network(self, widths: Mapping[int, int]) -> FixedEvaluator:
        """The evaluator of the network of these widths, with the weights that it starts from."""
        training = self.job.training
        key = tuple(sorted(widths.items()))
        known = self._networks.get(key)
        fresh = training is not None and training.init == "fresh"
        if known is not None or (not widths and not fresh):
            return known or self._float
        with one_thread():
            model = widen(
                self._space.graph,
                cast(Widths, widths),
                init="fresh" if fresh else "inherit",
                seed=training.settings.seed if training else 0,
                noise=NOISE if training else 0.0,
            )
            graph = capture(model, self.job.sample, training=self.job.trains)
        job = self._network_job.of_network(graph.model)
        network = FixedEvaluator(job, self._space.quantization(graph), beside=self._float)
        self._networks.put(key, network)
        return network


class _RecentlyUsed(Generic[Key, Value]):
    """A cache of limited size. If it is full, the value that was not used for the longest time is dropped."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """The value of a key; None if it is not in the cache."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: Key, value: Value) -> None:
        """Store a value."""
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._capacity:
            self._values.popitem(last=False)


def _train(
    models: Sequence[nn.Module],
    training: CandidateTraining,
    device: str,
    epochs: Sequence[int],
    outputs: Outputs,
    select: Selection | None = None,
    task: Task = CLASSIFICATION,
) -> list[tuple[StateDict, int]]:
    """(weights, epochs) of each model after training, each the same as if it were trained alone.

    Args:
        epochs: number of epochs of each model. The learning rate's schedule always covers all epochs of the settings.
        outputs: what the models' outputs are.
        select: which models go on at a rung; the others stop there.

    Raises:
        EvaluationError: the training of a model diverged.
    """
    # The weights of the last epoch are used. To choose the best epoch would need samples that are used neither for
    # training nor for evaluation. So the validation split here has only the few samples that check the loss.
    few = training.dataset(task.targets, CHECKED_SAMPLES)
    rungs = training.halving.rungs if select and training.halving else ()
    stops = list(epochs)

    def keep(epoch: int, _: object, state: Callable[[int], StateDict]) -> list[bool]:
        going = [i for i, stop in enumerate(stops) if stop > epoch]
        if select and epoch in rungs:
            for i, goes_on in zip(going, select(going, [state(i) for i in going]), strict=True):
                stops[i] = stops[i] if goes_on else epoch
        return [stop > epoch for stop in stops]

    members = train_population(
        models,
        few,
        training.settings,
        device=device,
        outputs=outputs,
        task=task,
        keep=keep,
        alone=training.separately,
    )
    for member in members:
        if member.error:
            raise EvaluationError(member.error)
    return [(member.state, stop) for member, stop in zip(members, stops, strict=True)]
