"""The evaluator of networks whose bits were learned: each has its weights and its formats from a course of training.

The course is trained when its networks are asked for, cycle by cycle. What is reported of a network is measured as for
any other: by a ``FixedEvaluator`` with its weights and formats, which knows nothing of the training.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront.engine.evaluation.fixed import FixedEvaluator, one_thread, threads
from bitfront.engine.evaluation.interface import ONLY_CODE, BatchMetrics, BitsLearning, EvaluationJob, Evaluator, joined
from bitfront.learned_bits.course import Course, Network, Samples, starting_ranges
from bitfront.learned_bits.floats import EPOCHS, TEACHERS, WIDER, fresh_models, soft_targets
from bitfront.learned_bits.network import formats_of, state_of
from bitfront.learned_bits.space import LearnedBitsSpace
from bitfront.learned_bits.steering import Target
from bitfront.metrics.base import Kind, Scores, Values
from bitfront.spaces.base import Codes
from bitfront.spaces.quantize import QuantizationSpace
from bitfront.tasks.base import Results
from bitfront.training import TrainSettings
from bitfront.transforms.fold import folded

#: So many training samples say how large the values of a layer are at the start.
RANGE_SAMPLES = 4096


class LearnedBitsEvaluator(Evaluator):
    """Evaluates the networks of a training with learned bits."""

    def __init__(self, job: EvaluationJob, space: LearnedBitsSpace) -> None:
        assert job.learning is not None
        self.job = job
        self.learning: BitsLearning = job.learning
        self._space = space
        alone = replace(job, learning=None, model=space.graph.model, memory=None)
        self._float = FixedEvaluator(alone, space.quantization(space.graph))
        self.runners = self._float.runners

    @property
    def space(self) -> LearnedBitsSpace:
        """The space of the search."""
        return self._space

    @property
    def closed_form(self) -> frozenset[str]:
        """None: everything depends on the training."""
        return frozenset()

    def kinds(self) -> dict[str, tuple[Kind, str]]:
        """Metric → (how its values are obtained, the reason if that is not the usual way)."""
        return self._float.kinds()

    def float_evaluator(self) -> FixedEvaluator:
        """An evaluator whose only candidate, the empty code, is the float model as the user has it."""
        original = self._space.original
        job = replace(self._float.job, model=original.model)
        return FixedEvaluator(job, QuantizationSpace.of_float(original), self._float.limits, self._float)

    def with_splits(self, splits: Mapping[str, tuple[Tensor, Tensor]]) -> LearnedBitsEvaluator:
        """An evaluator of the same networks on other samples."""
        return LearnedBitsEvaluator(replace(self.job, splits=splits), self._space)

    def samples(self, split: str, num_samples: int | None) -> tuple[Tensor, Tensor]:
        """The samples (x, y) that ``scores`` uses."""
        return self._float.samples(split, num_samples)

    def alone(self, code: NDArray[np.int64]) -> tuple[FixedEvaluator, NDArray[np.int64]]:
        """(the evaluator of one network with its weights and formats, the empty code)."""
        (position,) = self._space.positions(code[None])
        # Each member is trained on one thread, so its bits depend on nothing else.
        self.learning.course.threads = self.job.threads or torch.get_num_threads()
        with one_thread():
            network = self.learning.course.network(*position, self._space.program, self._begin)
        return self._evaluator(network), ONLY_CODE

    def _evaluator(self, network: Network) -> FixedEvaluator:
        graph = self._space.graph
        return self._float.trained(state_of(graph, network.layers), formats_of(graph, network.layers))

    def _begin(self) -> Course:
        models = [self._space.graph.model, *self._fresh(self.learning.schedule.members - 1)]
        return self._course(models, self._targets())

    def _course(self, models: Sequence[nn.Module], targets: Tensor | None) -> Course:
        """A course at its start, with these members."""
        learning, space = self.learning, self._space
        some = learning.x[:RANGE_SAMPLES].float()
        largest = starting_ranges(space.graph.model, space.program, some, lambda m, x: m(x))
        train, val = Samples.of(learning.x, learning.y), Samples.of(learning.val_x, learning.val_y)
        return Course.begin(space.program, models, largest, learning.schedule, learning.cost, train, val, targets)

    def seconds_per_epoch(self) -> float:
        """Seconds of one epoch of one member with all its weights, measured; no teacher, and nothing is kept."""
        with one_thread():
            return self._course([self._space.graph.model], None).seconds_per_epoch()

    def _fresh(self, count: int) -> list[nn.Module]:
        """Where the members after the first one start."""
        learning, schedule = self.learning, self.learning.schedule
        if not count or not learning.float_epochs:
            return [self._space.graph.model] * count
        models = self._trained(learning.float_epochs, schedule.seed + 1, count)
        original = self._space.original
        return [folded(replace(original, model=model)).graph.model for model in models]

    def _trained(self, epochs: int, seed: int, count: int, wider: int = 1) -> list[nn.Module]:
        learning, schedule = self.learning, self.learning.schedule
        settings = TrainSettings(
            max_epochs=epochs, batch_size=schedule.batch_size, learning_rate=schedule.learning_rate, seed=seed
        )
        graph = self._space.original
        with threads(learning.course.threads):
            return fresh_models(graph, learning.x, learning.y, learning.classes, settings, count, wider)

    def _targets(self) -> Tensor | None:
        """The answers of the teachers on the training samples; None without a teacher."""
        learning, graph = self.learning, self._space.original
        if learning.teacher == "none":
            return None
        if learning.teacher == "self":
            models = [graph.model]
        elif learning.teacher == "ensemble":
            # Other seeds than those of the members.
            models = self._trained(EPOCHS, learning.schedule.seed + 500, TEACHERS, WIDER)
        else:
            model = copy.deepcopy(graph.model)
            model.load_state_dict(learning.teacher)
            models = [model.eval()]
        return soft_targets(models, learning.x, learning.temperature, graph.outputs)

    def evaluate(self, codes: Codes) -> BatchMetrics:
        """All metrics of some networks; those that are not known yet are trained first."""
        return joined([self._evaluate(code) for code in codes])

    def _evaluate(self, code: NDArray[np.int64]) -> BatchMetrics:
        start = time.perf_counter()
        evaluator, only = self.alone(code)
        metrics = evaluator.evaluate(only[None])
        return replace(metrics, seconds=(time.perf_counter() - start,))

    def closed_form_values(self, codes: Codes, metrics: Collection[str]) -> Mapping[str, Values]:
        """Some closed-form metrics of a batch of networks."""
        columns: dict[str, list[float]] = {name: [] for name in metrics}
        for code in codes:
            evaluator, only = self.alone(code)
            for name, values in evaluator.closed_form_values(only[None], metrics).items():
                columns[name].append(float(values[0]))
        return {name: np.array(values) for name, values in columns.items()}

    def scores(self, codes: Codes, split: str, num_samples: int | None) -> Scores:
        """Loss and correct answers of each network on fixed samples of `split`."""
        parts = []
        for code in codes:
            evaluator, only = self.alone(code)
            parts.append(evaluator.scores(only[None], split, num_samples))
        return Scores.joined(parts, len(self.samples(split, num_samples)[1]))

    def answers(self, codes: Codes, split: str, start: int = 0, stop: int | None = None) -> NDArray[np.bool_]:
        """Which samples each network classifies correctly, bool, shape (networks, samples)."""
        rows = []
        for code in codes:
            evaluator, only = self.alone(code)
            rows.append(evaluator.answers(only[None], split, start, stop)[0])
        return np.array(rows, dtype=bool).reshape(len(codes), -1)

    def results(self, codes: Codes, split: str, num_samples: int | None) -> list[Results | None]:
        """The results per sample of each network."""
        found: list[Results | None] = []
        for code in codes:
            evaluator, only = self.alone(code)
            found += evaluator.results(only[None], split, num_samples)
        return found

    def steer(self, target: Target) -> None:
        """Spend the rest of the training where the constraints of the search are met."""
        self.learning.course.target = target

    def keep_in(self, folder: Path) -> None:
        """Keep the networks of each complete cycle in a run folder, and go on behind the last one that is there."""
        self.learning.course.folder = folder
        self.learning.course.source = self._source()

    def _source(self) -> str:
        """A fingerprint of everything that the training depends on beside the constraints."""
        learning, digest = self.learning, hashlib.sha256()
        settings = (learning.schedule, learning.cost, learning.default, sorted(learning.named.items()))
        teacher = learning.teacher if isinstance(learning.teacher, str) else "a checkpoint"
        digest.update(repr((settings, teacher, learning.temperature, learning.float_epochs)).encode())
        given = {} if isinstance(learning.teacher, str) else learning.teacher
        tensors = [learning.x, learning.y, learning.val_x, learning.val_y, *given.values()]
        for tensor in [*tensors, *self._space.graph.model.state_dict().values()]:
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
