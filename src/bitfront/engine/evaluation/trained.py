"""Candidates that are networks of their own: of other widths than the model, or each trained before it is evaluated.

A candidate begins with the float model's weights, widened or cut to its widths (``transforms.widen``); its costs are
those of that network, so they follow the shapes. Where the search trains its candidates, a network of other widths may
be trained in float first, once for all its candidates; formats learn their scales from what it is then. Each candidate
is trained with its formats in place and straight-through gradients, and evaluated, in evaluation mode, in the same
formats: learned anew from the weights that come out, they would be others than those that the weights have adapted to.
Whatever happens to a candidate hangs on its code and the settings alone
(with halving: how long it is trained also on its cohort, see ``halving.py``);
it is trained from the same seed, on the same samples in the same order, together with others (``bitfront.population``)
but as if alone, to the last bit. So it does not matter which others are trained, in which order,
or in which process.
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
from bitfront.data.base import Dataset
from bitfront.engine.evaluation.fixed import FixedEvaluator, described, one_thread, threads
from bitfront.engine.evaluation.halving import Halving, going_on
from bitfront.engine.evaluation.interface import (
    ONLY_CODE,
    BatchMetrics,
    CandidateTraining,
    EvaluationJob,
    Evaluator,
    joined,
)
from bitfront.errors import EvaluationError, UserError
from bitfront.formats.base import Format, Operand
from bitfront.formats.spelling import read, spelled
from bitfront.graph import Graph, capture
from bitfront.metrics.base import Kind, Scores, Values
from bitfront.population import train_population
from bitfront.spaces.base import Codes
from bitfront.spaces.model_space import ModelSpace
from bitfront.training import StateDict
from bitfront.transforms.widen import Widths, widen

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
#: (members of a cohort by their places, their weights at a rung) → which of them go on.
Judge = Callable[[Sequence[int], Sequence[StateDict]], NDArray[np.bool_]]
#: What is added to copies of channels before training, as a share of the weights' standard deviation: copies that are
#: equal would get equal gradients, and stay equal for ever.
NOISE = 0.01
#: Networks, and trained states, that are kept for the next question, in bytes of their weights.
KEPT_BYTES = 2**28
#: Samples on which training looks for a loss that is no number.
WATCHED = 64


def open_evaluator(job: EvaluationJob, space: ModelSpace | None = None) -> Evaluator:
    """The evaluator that a job needs.

    Args:
        space: where it is built already.
    """
    space = space or job.build_space()
    if job.training is None and not space.changes_widths:
        return FixedEvaluator(job, space.quantization(space.graph))
    return TrainedEvaluator(job, space)


@dataclass(frozen=True, eq=False)
class TrainedCandidate:
    """What training made of a candidate: float weights, for how long, and the formats it was trained in."""

    state: StateDict
    epochs: int
    formats: Mapping[str, Mapping[Operand, Format]]


class TrainedEvaluator(Evaluator):
    """Evaluates candidates each of which has weights of its own.

    Attributes:
        candidates: code → what training made of it, of those that were trained last.
    """

    def __init__(self, job: EvaluationJob, space: ModelSpace) -> None:
        self.job = job
        self._space = space
        #: Everything that the candidates' own evaluators take from the job.
        self._plain = replace(job, training=None)
        self._float = FixedEvaluator(self._plain, space.quantization(space.graph))
        self.runners = self._float.runners
        size = sum(t.numel() * t.element_size() for t in job.model.state_dict().values())
        kept = max(8, KEPT_BYTES // max(1, size))
        self.candidates: _Recent[bytes, TrainedCandidate] = _Recent(kept)
        #: Code → epochs of candidates that are known to have been stopped early.
        self.stopped: dict[bytes, int] = {}
        self._networks: _Recent[tuple[tuple[int, int], ...], FixedEvaluator] = _Recent(kept)
        #: The evaluator of a network → the same after it was trained in float; as long as the first is there.
        self._begun: WeakKeyDictionary[FixedEvaluator, FixedEvaluator] = WeakKeyDictionary()

    @property
    def space(self) -> ModelSpace:
        """The space of the search."""
        return self._space

    @property
    def closed_form(self) -> frozenset[str]:
        """Of candidates that are trained, what depends on the weights is not known before."""
        return super().closed_form - (self.of_weights if self.job.training else frozenset())

    def kinds(self) -> dict[str, tuple[Kind, str]]:
        """As of a search among the formats of the model as it is."""
        return self._float.kinds()

    def float_evaluator(self) -> FixedEvaluator:
        """The float model, which candidates inherit from."""
        return self._float.float_evaluator()

    def with_splits(self, splits: Mapping[str, tuple[Tensor, Tensor]]) -> TrainedEvaluator:
        """The same candidates on other samples. Those that are trained are not trained again."""
        other = TrainedEvaluator(replace(self.job, splits=splits), self._space)
        other.candidates, other.stopped = self.candidates, self.stopped
        return other

    def samples(self, split: str, num_samples: int | None) -> tuple[Tensor, Tensor]:
        """The samples (x, y) that ``scores`` uses."""
        return self._float.samples(split, num_samples)

    def alone(self, code: NDArray[np.int64]) -> tuple[FixedEvaluator, NDArray[np.int64]]:
        """(the evaluator of one candidate's network, in its weights; its code there)."""
        (_, evaluator, codes), *_ = self._networks_of(code[None])
        return evaluator, codes[0]

    def recall(self, code: NDArray[np.int64], metrics: Mapping[str, float], path: Path) -> None:
        """Take for known how long one candidate was trained, and what that gave, where ``keep`` wrote it to `path`."""
        if self.job.training is None:
            return
        epochs = int(metrics["trained_epochs"])
        self.stopped[code.tobytes()] = epochs
        if path.exists():
            (_, evaluator, _), *_ = self._untrained(code[None])
            state, meta = checkpoints.load_checkpoint(path, evaluator.space.graph.model), checkpoints.read_meta(path)
            self.candidates.put(code.tobytes(), TrainedCandidate(state, epochs, read(meta["formats"])))

    def keep(self, code: NDArray[np.int64], path: Path) -> None:
        """Write what training made of one candidate to `path`, where it is not there yet."""
        if self.job.training is not None and not path.exists():
            evaluator, own = self.alone(code)
            checkpoints.save_checkpoint(
                evaluator.space.graph.model.state_dict(), path, {"formats": spelled(evaluator.formats(own))}
            )

    def evaluate(self, codes: Codes) -> BatchMetrics:
        """All metrics of a batch of candidates, each trained first where the search trains."""
        start = time.perf_counter()
        try:
            parts = [(rows, evaluator.evaluate(own)) for rows, evaluator, own in self._networks_of(codes, judged=True)]
        except (UserError, KeyboardInterrupt):
            raise
        except Exception as error:
            seconds = time.perf_counter() - start
            if len(codes) == 1:
                nothing = {m: np.full(1, np.nan) for m in self.metrics}
                return BatchMetrics(nothing, (described(error),), (seconds,))
            # Training failed, and whose it was is found one by one.
            return joined([self.evaluate(codes[i : i + 1]) for i in range(len(codes))])
        seconds = (time.perf_counter() - start) / max(1, len(codes))
        found = joined([measured for _, measured in parts])
        back = np.argsort(np.concatenate([rows for rows, _ in parts])) if parts else np.zeros(0, dtype=np.int64)
        return replace(
            found,
            values={m: v[back] for m, v in found.values.items()},
            errors=tuple(found.errors[i] for i in back),
            seconds=(seconds,) * len(codes),
        )

    def closed_form_values(self, codes: Codes, metrics: Collection[str]) -> Mapping[str, Values]:
        """Costs of the networks, without training them."""
        values = {m: np.full(len(codes), np.nan) for m in metrics}
        for rows, evaluator, own in self._untrained(codes):
            for name, column in evaluator.closed_form_values(own, metrics).items():
                values[name][rows] = column
        return values

    def scores(self, codes: Codes, split: str, num_samples: int | None) -> Scores:
        """Loss and correct answers of each candidate on fixed samples of `split`."""
        loss, correct = np.full(len(codes), np.nan), np.zeros(len(codes), dtype=np.int64)
        errors = [""] * len(codes)
        for rows, evaluator, own in self._networks_of(codes):
            found = evaluator.scores(own, split, num_samples)
            loss[rows], correct[rows] = found.loss, found.correct
            for row, error in zip(rows.tolist(), found.errors, strict=True):
                errors[row] = error
        return Scores(loss, correct, len(self.samples(split, num_samples)[1]), tuple(errors))

    def answers(self, codes: Codes, split: str, start: int = 0, stop: int | None = None) -> NDArray[np.bool_]:
        """Which of the samples each candidate answers rightly, shape (candidates, samples)."""
        there = len(self.samples(split, None)[1][start:stop])
        found = np.zeros((len(codes), there), dtype=bool)
        for rows, evaluator, own in self._networks_of(codes):
            found[rows] = evaluator.answers(own, split, start, stop)
        return found

    # --- networks ----------------------------------------------------------------------------------------------------

    def _networks_of(
        self, codes: Codes, *, judged: bool = False
    ) -> Iterator[tuple[NDArray[np.int64], FixedEvaluator, Codes]]:
        """(rows of `codes`, the evaluator of their network in its weights, their codes there).

        Args:
            judged: `codes` are a cohort, in which who is hopeless is not trained to the end; else how long a candidate
                was trained is known.
        """
        training = self.job.training
        if training is None:
            yield from self._untrained(codes)
            return
        keys = [code.tobytes() for code in codes]
        halving = training.halving if judged else None
        # Held here: a batch may be larger than what is kept.
        known = {row: None if halving else self.candidates.get(key) for row, key in enumerate(keys)}
        unknown = np.array([row for row, found in known.items() if not self._fits(keys[row], found)], dtype=np.int64)
        missing = [
            (int(unknown[i]), evaluator, code)
            for rows, evaluator, own in self._beginnings(codes[unknown], training)
            for i, code in zip(rows, own, strict=True)
        ]
        most = [training.settings.max_epochs if halving else self._epochs(keys[row]) for row, _, _ in missing]
        with one_thread():
            twins = [evaluator.model(code) for _, evaluator, code in missing]
            formats = [evaluator.formats(code) for _, evaluator, code in missing]

        def judge(members: Sequence[int], states: Sequence[StateDict]) -> NDArray[np.bool_]:
            assert halving is not None
            there = [
                missing[i][1].trained(_shadow(missing[i][1].space.graph, state), formats[i])
                for i, state in zip(members, states, strict=True)
            ]
            return going_on(self._at_rung(there, halving), halving.keep)

        with threads(self.job.threads):
            trained = _train(twins, training, self.job.device, most, judge if halving else None) if twins else []
        for (row, evaluator, _), own, (state, epochs) in zip(missing, formats, trained, strict=True):
            known[row] = TrainedCandidate(_shadow(evaluator.space.graph, state), epochs, own)
        networks = {int(row): evaluator for rows, evaluator, _ in self._untrained(codes) for row in rows}
        for row, evaluator in sorted(networks.items()):
            found = known[row]
            assert found is not None
            self.candidates.put(keys[row], found)
            if halving:
                self.stopped[keys[row]] = found.epochs
            yield np.array([row]), evaluator.trained(found.state, found.formats, found.epochs), ONLY_CODE[None]

    def _epochs(self, key: bytes) -> int:
        """How long a candidate is trained where nobody judges it."""
        assert self.job.training is not None
        return self.stopped.get(key, self.job.training.settings.max_epochs)

    def _fits(self, key: bytes, known: TrainedCandidate | None) -> bool:
        return known is not None and known.epochs == self._epochs(key)

    def _at_rung(self, members: Sequence[FixedEvaluator], halving: Halving) -> NDArray[np.float64]:
        """What a cohort is judged by at a rung, shape (candidates, 1 + costs), smaller is better."""
        samples = self.accuracy_samples
        assert samples is not None, "the plan checks that"
        rows = []
        for own in members:
            scores = own.scores(ONLY_CODE[None], samples.split, samples.number)
            costs = own.closed_form_values(ONLY_CODE[None], [name for name, _ in halving.costs])
            rows.append([-float(scores.correct[0]), *(sign * float(costs[name][0]) for name, sign in halving.costs)])
        return np.array(rows)

    def _untrained(self, codes: Codes) -> Iterator[tuple[NDArray[np.int64], FixedEvaluator, Codes]]:
        """(rows of `codes` of the same widths, the evaluator of the network they begin as, their codes there)."""
        widths, formats = self._space.split(codes)
        if not len(codes):
            return
        distinct, which = np.unique(widths, axis=0, return_inverse=True)
        for index, options in enumerate(distinct):
            rows = np.flatnonzero(which.reshape(-1) == index)
            yield rows, self._network(self._space.widths(options)), formats[rows]

    def _beginnings(
        self, codes: Codes, training: CandidateTraining
    ) -> Iterator[tuple[NDArray[np.int64], FixedEvaluator, Codes]]:
        """As ``_untrained``, after the networks were trained in float, where they are; those of a batch together."""
        parts = list(self._untrained(codes))
        other = (
            [evaluator for _, evaluator, _ in parts if evaluator is not self._float] if training.float_epochs else []
        )
        missing = [evaluator for evaluator in other if evaluator not in self._begun]
        if missing:
            settings = replace(training.settings, max_epochs=training.float_epochs)
            with threads(self.job.threads):
                models = [evaluator.space.graph.model for evaluator in missing]
                epochs = [training.float_epochs] * len(models)
                trained = _train(models, replace(training, settings=settings), self.job.device, epochs)
            for evaluator, (state, _) in zip(missing, trained, strict=True):
                model = copy.deepcopy(evaluator.space.graph.model)
                model.load_state_dict(state)
                graph = replace(evaluator.space.graph, model=model.eval())
                job, space = replace(self._plain, model=model), self._space.quantization(graph)
                self._begun[evaluator] = FixedEvaluator(job, space, evaluator.effort, self._float)
        for rows, evaluator, own in parts:
            yield rows, self._begun.get(evaluator, evaluator), own

    def _network(self, widths: Mapping[int, int]) -> FixedEvaluator:
        """The evaluator of the network of these widths, in the weights that it begins with."""
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
            graph = capture(model, self.job.sample)
        job = replace(self._plain, model=graph.model)
        network = FixedEvaluator(job, self._space.quantization(graph), beside=self._float)
        self._networks.put(key, network)
        return network


class _Recent(Generic[Key, Value]):
    """A mapping that forgets what was not asked for longest."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[Key, Value] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """The value; None where there is none."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Key, value: Value) -> None:
        """Keep a value."""
        self._kept[key] = value
        self._kept.move_to_end(key)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)


def _train(
    models: Sequence[nn.Module],
    training: CandidateTraining,
    device: str,
    epochs: Sequence[int],
    judge: Judge | None = None,
) -> list[tuple[StateDict, int]]:
    """(weights, epochs) of each model after training, each as if it were the only one.

    Args:
        epochs: of each model; the schedule of the learning rate is that of all epochs in any case.
        judge: with it, models that it does not let go on stop at a rung.

    Raises:
        EvaluationError: one of them diverged.
    """
    # The last weights are taken, whatever the epochs between were worth: a choice among them would need samples that
    # neither they were trained on nor will be evaluated on. So the loop has few to look at.
    x, y = training.x, training.y
    few = Dataset(
        name="candidates",
        x={"train": x, "val": x[:WATCHED]},
        y={"train": y, "val": y[:WATCHED]},
        class_names=tuple(map(str, range(training.classes))),
        source="the training split",
    )
    rungs = training.halving.rungs if judge and training.halving else ()
    stops = list(epochs)

    def keep(epoch: int, _: object, state: Callable[[int], StateDict]) -> list[bool]:
        going = [i for i, stop in enumerate(stops) if stop > epoch]
        if judge and epoch in rungs:
            for i, goes_on in zip(going, judge(going, [state(i) for i in going]), strict=True):
                stops[i] = stops[i] if goes_on else epoch
        return [stop > epoch for stop in stops]

    members = train_population(models, few, training.settings, device=device, keep=keep, alone=training.separately)
    for member in members:
        if member.error:
            raise EvaluationError(member.error)
    return [(member.state, stop) for member, stop in zip(members, stops, strict=True)]


def _shadow(graph: Graph, trained: Mapping[str, Tensor]) -> StateDict:
    """The weights of a network in float, from the state of its quantized twin.

    Twins keep the names of what they stand for. Where the graph was rewritten, one of several calls of a shared module
    has a name of its own, and what nobody calls is not in it.
    """
    names = {f"{site.name}_quantized": site.path for site in graph.sites if site.path}
    renamed = {}
    for name, tensor in trained.items():
        path, dot, key = name.rpartition(".")
        renamed[f"{names.get(path, path)}{dot}{key}"] = tensor
    return {name: renamed.get(name, own.cpu()) for name, own in graph.model.state_dict().items()}
