"""The evaluator of networks whose bits were learned: each has its weights and its formats from a course of training.

The course is trained when its networks are asked for, cycle by cycle. What is reported of a network is measured as for
any other: by a ``FixedEvaluator`` with its weights and formats, which knows nothing of the training.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront.constraints import total
from bitfront.engine.evaluation.fixed import FixedEvaluator, one_thread, threads
from bitfront.engine.evaluation.interface import ONLY_CODE, BatchMetrics, BitsLearning, EvaluationJob, Evaluator, joined
from bitfront.formats.base import Format, Operand
from bitfront.learned_bits.course import Course, Network, starting_ranges
from bitfront.learned_bits.floats import EPOCHS, TEACHERS, WIDER, fresh_models, soft_targets
from bitfront.learned_bits.network import formats_of, state_of
from bitfront.learned_bits.program import BitsProgram, Program
from bitfront.learned_bits.space import LearnedBitsSpace
from bitfront.learned_bits.state import Floats, Samples
from bitfront.learned_bits.steering import Target
from bitfront.learned_bits.torch_program import TorchProgram
from bitfront.metrics.base import Kind, Scores, Values
from bitfront.scoring import outputs_of
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
        state = state_of(graph, network.layers, network.floats)
        return self._float.trained(state, {**self._fixed, **formats_of(graph, network.layers)})

    @functools.cached_property
    def _fixed(self) -> dict[str, dict[Operand, Format]]:
        """Site → operand → format, of what learns no bits; calibrated on the model where the training starts."""
        fixed = self._space.fixed
        formats = self._float.formats(ONLY_CODE) if fixed else {}
        return {site: of_site for site, of_site in formats.items() if site in fixed}

    def _begin(self) -> Course:
        largest = self._largest()  # it may be an error, so it comes before everything that takes time
        models = [self._space.graph.model, *self._fresh(self.learning.schedule.members - 1)]
        return self._course(models, largest, self._targets())

    def _largest(self) -> list[Floats]:
        """The largest magnitude of each value of the input of each layer."""
        program, some = self._space.program, self.learning.x[:RANGE_SAMPLES]
        some = some.float() if isinstance(program, BitsProgram) else some
        return starting_ranges(self._space.graph.model, program, some, lambda m, x: m(x))

    @property
    def program(self) -> Program:
        """The steps of the network, with the formats of what learns no bits."""
        program = self._space.program
        return replace(program, fixed=self._fixed) if isinstance(program, TorchProgram) else program

    def _course(self, models: Sequence[nn.Module], largest: Sequence[Floats], targets: Tensor | None) -> Course:
        """A course at its start, with these members."""
        learning = self.learning
        train, val = (self._samples(*split) for split in ((learning.x, learning.y), (learning.val_x, learning.val_y)))
        if targets is not None:
            train = replace(train, targets=targets.to(train.x.device))
        program = self.program
        course = Course.begin(program, models, largest, learning.schedule, learning.cost, train, val)
        return replace(course, scale=self._scale())

    def _scale(self) -> float:
        """How large a loss is: 1 of one in nats, otherwise that of the mean of the float model's outputs."""
        task, some = self.job.task, slice(RANGE_SAMPLES)
        if task.loss.unit == "nats":
            return 1.0
        outputs = outputs_of(self._space.graph.model, self.learning.x[some])
        constant = outputs.mean(dim=0, keepdim=True).expand_as(outputs)
        loss = float(task.minimised(constant, self.learning.y[some], self._space.graph.outputs))
        return loss if math.isfinite(loss) and loss > 0 else 1.0

    def _samples(self, x: Tensor, y: Tensor) -> Samples:
        """Samples as the network's trainer takes them."""
        if isinstance(self._space.program, BitsProgram):
            return Samples.of(x, y)
        y = y.int() if self.job.task.classifies else y
        return Samples(x.to(self.learning.device), y.to(self.learning.device))

    @property
    def trainer(self) -> str:
        """Who carries out the training, and why, in words."""
        return self._space.program.trainer

    def seconds_per_epoch(self) -> float:
        """Seconds of one epoch of one member with all its weights, measured; no teacher, and nothing is kept."""
        with one_thread():
            return self._course([self._space.graph.model], self._largest(), None).seconds_per_epoch()

    def measured_pace(self) -> tuple[float, float]:
        """(seconds of an epoch of all members, seconds in which a network is measured), both measured. Teachers and
        float members are trained for it, and then are there."""
        trained = self.learning.course
        trained.threads = self.job.threads or torch.get_num_threads()
        with one_thread():
            trained.course = trained.course or self._begin()
            epoch, network = trained.course.seconds_per_epoch(trained.threads), trained.course.beginning()
            for _ in range(2):  # the first one has what happens once
                begin = time.perf_counter()
                self._evaluator(network).evaluate(ONLY_CODE[None])
                seconds = time.perf_counter() - begin
        return epoch, seconds

    def _fresh(self, count: int) -> list[nn.Module]:
        """Where the members after the first one start."""
        learning, schedule = self.learning, self.learning.schedule
        if not count or not learning.float_epochs:
            return [self._space.graph.model] * count
        models = self._trained(learning.float_epochs, schedule.seed + 1, count)
        original = self._space.original
        dropouts = isinstance(self._space.program, BitsProgram)
        graphs = (replace(original, model=model) for model in models)
        return [folded(graph, self.learning.x[:2], dropouts=dropouts).graph.model for graph in graphs]

    def _trained(self, epochs: int, seed: int, count: int, wider: int = 1) -> list[nn.Module]:
        learning, schedule = self.learning, self.learning.schedule
        settings = TrainSettings(
            max_epochs=epochs, batch_size=schedule.batch_size, learning_rate=schedule.learning_rate, seed=seed
        )
        graph = self._space.original
        with threads(learning.course.threads):
            given = (learning.x, learning.y, learning.classes)
            return fresh_models(graph, *given, settings, count, wider, self.job.task)

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
        metrics = {constraint.metric for constraint in target.others}

        def fulfils(network: Network) -> bool:
            with one_thread():
                values = self._evaluator(network).closed_form_values(ONLY_CODE[None], metrics)
            return not total(target.others, values).any()

        self.learning.course.fulfils = fulfils if metrics else None

    def keep_in(self, folder: Path) -> None:
        """Keep the networks of each complete cycle in a run folder, and go on behind the last one that is there."""
        trainer = "compiled" if isinstance(self._space.program, BitsProgram) else (self.learning.device, self._written)
        self.learning.course.folder = folder
        source, origin = self._fingerprints(trainer, ("any", self._written))
        self.learning.course.source, self.learning.course.origin = source, origin

    @property
    def _written(self) -> dict[str, list[tuple[Operand, str]]]:
        """The formats of what learns no bits, as text."""
        # An earlier version had no such fields.
        usual = ", rounding='even', overflow='saturate'"
        return {
            site: sorted((o, repr(f).replace(usual, "")) for o, f in of.items())
            for site, of in self._space.fixed.items()
        }

    def _fingerprints(self, *trainers: object) -> list[str]:
        """Fingerprints of everything that the training depends on beside the constraints.

        Args:
            trainers: who trains, and on what; each gives a fingerprint.
        """
        learning = self.learning
        teacher = learning.teacher if isinstance(learning.teacher, str) else "a checkpoint"
        digests = []
        for trainer in trainers:
            settings = (learning.schedule, learning.cost, learning.default, sorted(learning.named.items()), trainer)
            text = repr((settings, teacher, learning.temperature, learning.float_epochs))
            digests.append(hashlib.sha256(text.encode()))
        parts = []
        roundings = {key: of.data_in_rounding for key, of in {"": learning.default, **learning.named}.items()}
        if set(roundings.values()) != {"even"}:
            parts.append(repr(sorted(roundings.items())).encode())
        if not self.job.task.plainly_trained:
            parts.append(repr(self.job.task).encode())
        given = {} if isinstance(learning.teacher, str) else learning.teacher
        tensors = [learning.x, learning.y, learning.val_x, learning.val_y, *given.values()]
        tensors += self._space.graph.model.state_dict().values()
        for part in chain(parts, (t.detach().cpu().contiguous().numpy().tobytes() for t in tensors)):
            for digest in digests:
                digest.update(part)
        return [digest.hexdigest() for digest in digests]
