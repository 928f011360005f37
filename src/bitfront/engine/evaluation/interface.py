"""The interface of evaluators: a batch of codes in, arrays of metrics out.

An ``Evaluator`` is built from a plain, picklable ``EvaluationJob``. There are two. ``FixedEvaluator`` evaluates
candidates that all have the weights of one model. ``TrainedEvaluator`` evaluates candidates that are separate networks,
because their widths differ or because each is trained. ``open_evaluator`` in ``trained.py`` decides which one a job
needs; no other code asks. A ``ModelEvaluator`` can also build the model of a candidate. Every evaluator can give one
for a single candidate (``alone``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront.data.base import Dataset
from bitfront.data.packing import PackedInput
from bitfront.data.targets import Targets
from bitfront.engine.evaluation.calibration import Corrections
from bitfront.engine.evaluation.halving import Halving
from bitfront.engine.evaluation.keeping import KeptWeights
from bitfront.engine.evaluation.memory import Memory
from bitfront.engine.evaluation.range_loss import RangeLosses, merged
from bitfront.formats.base import Format, Operand
from bitfront.graph import Graph, capture
from bitfront.learned_bits.course import Schedule
from bitfront.learned_bits.program import Granularities
from bitfront.learned_bits.space import LearnedBitsSpace
from bitfront.learned_bits.state import Cost
from bitfront.learned_bits.steering import Target
from bitfront.learned_bits.torch_program import open_program
from bitfront.learned_bits.trained import TrainedCourse
from bitfront.metrics.base import Kind, Runner, SampleChoice, Scores, Values
from bitfront.metrics.configured import ConfiguredRunner
from bitfront.spaces import SPACES
from bitfront.spaces.base import Codes
from bitfront.spaces.model_space import FormatSpace, ModelSpace
from bitfront.spaces.quantize import QuantizationSpace
from bitfront.spaces.request import Choices, DefaultFor, Part, SpaceRequest
from bitfront.tasks.base import Results, Task
from bitfront.tasks.classification import CLASSIFICATION
from bitfront.training import StateDict, TrainSettings
from bitfront.transforms.correct import Correction
from bitfront.transforms.equalise import equalised
from bitfront.transforms.fold import folded
from bitfront.transforms.quantize import SiteFormats

#: The space of formats, in which a file can give some to layers that learn no bits.
QUANTIZE = "graph/quantize/mixed_precision_ptq"
#: The only candidate of a space with one option everywhere.
ONLY_CODE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class CandidateTraining:
    """How each candidate of a search is trained before it is evaluated. Picklable.

    Attributes:
        x, y: the training samples, the same for every candidate.
        classes: number of classes.
        settings: the training's settings; their seed is also used for new weights.
        init: whether a candidate starts from the float model's weights ("inherit") or from new ones ("fresh").
        float_epochs: number of epochs for which a network of other widths is first trained in float.
        halving: which candidates are not trained to the end; None if all are.
        separately: why each candidate must be trained alone; empty if several may be trained together.
        inputs: the inputs by name that a row of `x` holds, if it holds several.
    """

    x: Tensor
    y: Tensor
    classes: int
    settings: TrainSettings
    init: Literal["inherit", "fresh"] = "inherit"
    float_epochs: int = 0
    halving: Halving | None = None
    separately: str = ""
    inputs: tuple[PackedInput, ...] = ()

    def dataset(self, targets: Targets, checked: int, used: slice = slice(None)) -> Dataset:
        """The training samples as a dataset, whose val split is the first `checked` of them.

        Args:
            targets: what `y` is.
            used: the samples that are used.
        """
        x, y = self.x[used], self.y[used]
        return Dataset(
            name="candidates",
            x={"train": x, "val": x[:checked]},
            y={"train": y, "val": y[:checked]},
            class_names=tuple(map(str, range(self.classes))),
            source="the training split",
            targets=targets,
            inputs=self.inputs,
        )


@dataclass(frozen=True, eq=False)
class BitsLearning:
    """How weights and bits are learned together.

    Attributes:
        x, y: the training samples.
        val_x, val_y: the samples by which networks are chosen.
        schedule: the cycles.
        metric: the metric that the training presses on.
        cost: what a bit costs there.
        default, named: which values share their bits: of all layers, and of those that differ.
        classes: number of classes.
        teacher: whose answers take the place of labels: "none", "self" (the float model), "ensemble" (new, wider float
            models), or a state dict of the model.
        temperature: of these answers.
        float_epochs: for how many epochs members after the first are trained in float, from new weights; 0: they start
            from the model.
        course: the training so far, shared by all jobs that are derived from one.
        device: where it is trained.
        task: what the samples are.
    """

    x: Tensor
    y: Tensor
    val_x: Tensor
    val_y: Tensor
    schedule: Schedule
    metric: str
    cost: Cost
    default: Granularities
    named: Mapping[str, Granularities] = field(default_factory=dict)
    classes: int = 0
    teacher: Literal["none", "self", "ensemble"] | StateDict = "none"
    temperature: float = 1.0
    float_epochs: int = 0
    course: TrainedCourse = field(default_factory=TrainedCourse)
    device: str = "cpu"
    task: Task = CLASSIFICATION

    def space(self, graph: Graph, offered: Mapping[str, Sequence[SiteFormats]] | None = None) -> LearnedBitsSpace:
        """The space of the positions on the course of a captured model.

        Args:
            offered: site → the formats by operand that a file offers there.
        """
        some = self.x[:3]
        changed, program = open_program(graph, some, self.default, self.named, self.device, offered, self.task)
        return LearnedBitsSpace(changed, program, self.schedule, graph)


@dataclass(frozen=True, eq=False)
class EvaluationJob:
    """Everything an evaluation depends on. Picklable.

    Attributes:
        model: the trained float model.
        sample: two input samples, for capture.
        space: name of the space. It is built from `by`, `choices`, `default_for` and `parts`.
        runners: the metric runners with their settings, in the order of their metrics.
        splits: split → (x, y): the samples to evaluate on, already selected and in order.
        calibration: samples of the training split; formats learn their scales from them, and sites their corrections.
        corrections: which corrections are done for quantized sites.
        device: where to compute.
        threads: largest number of threads for the work of this process; None for torch's number of threads.
        parts: the parts of the space, if it has several.
        training: how each candidate is trained; None if all candidates have the weights of `model`.
        unmerged: names of graph nodes that are computed state by state, because their fast path gave other numbers.
        whole: why each candidate is evaluated alone as a whole model; empty if candidates are evaluated together.
        trains: whether candidates are trained, in the search or after it.
        memory: what calibration has learned, shared by all jobs that are derived from this one; None: each evaluator
            learns for itself.
        learning: how weights and bits are learned together; None if they are not.
        equalise: whether channels between two layers of `model` are equalised, before anything is learned.
        fold_batch_norm: whether candidates have no batch norms where these can be folded into the layers before them;
            `model` is the user's, with all of them.
        task: what the samples are.
        weights: where quantized weights are kept, shared by all jobs that are derived from this one.
    """

    model: nn.Module
    sample: Tensor
    space: str
    by: str
    choices: Choices
    runners: tuple[ConfiguredRunner, ...]
    splits: Mapping[str, tuple[Tensor, Tensor]]
    calibration: Tensor
    device: str = "cpu"
    threads: int | None = None
    corrections: Corrections = field(default_factory=Corrections)
    parts: Mapping[str, Part] = field(default_factory=dict)
    training: CandidateTraining | None = None
    unmerged: frozenset[str] = frozenset()
    whole: str = ""
    trains: bool = False
    memory: Memory | None = None
    equalise: bool = False
    fold_batch_norm: bool = False
    learning: BitsLearning | None = None
    default_for: DefaultFor = "usual"
    task: Task = CLASSIFICATION
    weights: KeptWeights = field(default_factory=KeptWeights)

    def without_corrections(self, model: nn.Module) -> EvaluationJob:
        """The same job with another model, whose weights need no corrections."""
        return replace(self.of_network(model), corrections=Corrections())

    def of_network(self, model: nn.Module) -> EvaluationJob:
        """The same job with the model of one network of the search, in which everything is folded already."""
        return replace(self, model=model, memory=None, fold_batch_norm=False)

    def captured(self) -> Graph:
        """The model of the job, with nothing folded or equalised."""
        return capture(self.model, self.sample, training=self.trains)

    def build_space(self) -> ModelSpace:
        """The space, of the captured model."""
        graph = self.captured()
        if self.fold_batch_norm:
            graph = folded(graph, self.sample, dropouts=False, training=self.trains).graph
        graph = equalised(graph) if self.equalise else graph
        if self.learning is not None:
            return self.learned_space(graph)
        request = SpaceRequest(graph, self.by, self.choices, parts=self.parts, default_for=self.default_for)
        return SPACES.get(self.space)(request)

    def learned_space(self, graph: Graph) -> LearnedBitsSpace:
        """The space of a training with learned bits of a captured model. Raises ConfigError."""
        assert self.learning is not None
        if not self.choices or SPACES.official(self.space) != QUANTIZE:
            return self.learning.space(graph)
        request = SpaceRequest(graph, self.by, self.choices, float_only=True, default_for=self.default_for)
        space = QuantizationSpace(request)
        offered = zip((site.name for site in space.sites), space.site_formats, strict=True)
        return self.learning.space(graph, dict(offered))

    def make_runners(self) -> tuple[Runner, ...]:
        """New metric runners."""
        return tuple(runner.make() for runner in self.runners)


@dataclass(frozen=True, eq=False)
class BatchMetrics:
    """The metrics of some candidates, in their order.

    Attributes:
        values: metric → values of shape (candidates,); NaN where it could not be measured.
        errors: why a candidate failed; empty where it did not.
        seconds: time per candidate.
        inexact: site → why its sums are not of whole numbers; of all candidates evaluated so far.
        plain: why candidates were evaluated as whole models, one by one; empty if they were not.
        losses: what ranges lose of the calibration samples; of all candidates evaluated so far.
        above_limit: bytes that a process took after them, where the memory limit leaves it less; else 0.
    """

    values: Mapping[str, Values]
    errors: tuple[str, ...]
    seconds: tuple[float, ...]
    inexact: Mapping[str, str] = field(default_factory=dict)
    plain: str = ""
    losses: RangeLosses = field(default_factory=dict)
    above_limit: int = 0

    def __len__(self) -> int:
        return len(self.errors)


class Evaluator(ABC):
    """Evaluates the candidates of one job.

    Attributes:
        runners: the metric runners, one of each for the whole search.
    """

    job: EvaluationJob
    runners: tuple[Runner, ...]

    @property
    @abstractmethod
    def space(self) -> ModelSpace:
        """The space of the search, to which the codes belong."""

    @property
    def sample(self) -> Tensor:
        """Two input samples, on the CPU."""
        return self.job.sample.cpu()

    def range_losses(self) -> RangeLosses:
        """What the formats of the space lose of the calibration samples; empty where it takes long to find out, or
        where candidates have weights of their own."""
        return {}

    @property
    def device(self) -> str:
        """Where it computes."""
        return self.job.device

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """The names of all metrics, in the order of the runners."""
        return tuple(m.name for runner in self.runners for m in runner.produces)

    @property
    def closed_form(self) -> frozenset[str]:
        """Metrics of a candidate that are known before it is evaluated."""
        return frozenset(m.name for runner in self.runners if runner.closed_form for m in runner.produces)

    @property
    def of_weights(self) -> frozenset[str]:
        """Metrics that look at the values of the weights."""
        return frozenset(m.name for runner in self.runners if runner.of_weights for m in runner.produces)

    @property
    def accuracy_samples(self) -> SampleChoice | None:
        """The samples that accuracy, or what leads in another task, is measured on; None where no runner does it."""
        leading = self.job.task.leading.name
        choices = (r.settings.samples for r in self.runners if any(m.name == leading for m in r.produces))
        return next(choices, None)

    @abstractmethod
    def kinds(self) -> dict[str, tuple[Kind, str]]:
        """Metric → (how its values are obtained in this search, the reason if that is not the usual way)."""

    @abstractmethod
    def float_evaluator(self) -> ModelEvaluator:
        """An evaluator whose only candidate, the empty code, is the float model."""

    @abstractmethod
    def with_splits(self, splits: Mapping[str, tuple[Tensor, Tensor]]) -> Evaluator:
        """An evaluator of the same candidates, with the same weights, on other samples."""

    @abstractmethod
    def alone(self, code: NDArray[np.int64]) -> tuple[ModelEvaluator, NDArray[np.int64]]:
        """(an evaluator whose model has the weights of one candidate, the code of the candidate in that evaluator)."""

    @abstractmethod
    def evaluate(self, codes: Codes) -> BatchMetrics:
        """All metrics of a batch of candidates.

        A candidate that fails has an entry in ``errors``, and does not affect the others.
        """

    @abstractmethod
    def closed_form_values(self, codes: Codes, metrics: Collection[str]) -> Mapping[str, Values]:
        """Some closed-form metrics of a batch of candidates. No candidate is evaluated for that."""

    @abstractmethod
    def scores(self, codes: Codes, split: str, num_samples: int | None) -> Scores:
        """Loss and metrics of the task of each candidate on fixed samples of `split`."""

    @abstractmethod
    def answers(self, codes: Codes, split: str, start: int = 0, stop: int | None = None) -> NDArray[np.bool_]:
        """Which samples each candidate classifies correctly, bool, shape (candidates, samples)."""

    @abstractmethod
    def results(self, codes: Codes, split: str, num_samples: int | None) -> list[Results | None]:
        """The results per sample of each candidate, as its task has them; None for one that fails."""

    @abstractmethod
    def samples(self, split: str, num_samples: int | None) -> tuple[Tensor, Tensor]:
        """The samples (x, y) that ``scores`` uses."""

    @property
    def trainer(self) -> str:
        """Who carries out a training with learned bits, and why, in words; empty without one."""
        return ""

    def seconds_per_epoch(self) -> float:
        """Seconds of an epoch of a training with learned bits, measured; 0 without one."""
        return 0.0

    def steer(self, target: Target) -> None:  # noqa: ARG002
        """Spend the rest of a training with learned bits where the constraints of the search are met."""
        return

    def keep_in(self, folder: Path) -> None:  # noqa: ARG002
        """Keep what is learned on the way in a run folder, and go on with what is there, if anything is."""
        return

    def keep(self, code: NDArray[np.int64], path: Path) -> None:  # noqa: ARG002
        """Write the weights of one candidate to `path`, if candidates are trained and the file does not exist."""
        return

    def recall(self, code: NDArray[np.int64], metrics: Mapping[str, float], path: Path) -> None:  # noqa: ARG002
        """Take over one candidate's training from an earlier session, if candidates are trained.

        Args:
            metrics: the candidate's stored metrics.
            path: where ``keep`` wrote its weights; the file may be missing.

        Raises:
            CheckpointError: the file is damaged, or belongs to another network.
        """
        return


class ModelEvaluator(Evaluator):
    """An evaluator whose candidates all have the weights of one captured model. It can build each candidate's model."""

    @property
    @abstractmethod
    def space(self) -> FormatSpace:
        """The space that the codes belong to; its ``graph`` is the captured model."""

    @property
    @abstractmethod
    def chunk(self) -> int:
        """Number of samples that go through the model at a time. Sums of floats may depend on it in the last bit."""

    @abstractmethod
    def with_splits(self, splits: Mapping[str, tuple[Tensor, Tensor]]) -> ModelEvaluator:
        """An evaluator of the same candidates on other samples."""

    @abstractmethod
    def formats(self, code: NDArray[np.int64]) -> dict[str, dict[Operand, Format]]:
        """Site → operand → calibrated format of one candidate; an operand left in float is absent."""

    @abstractmethod
    def parts(self, code: NDArray[np.int64]) -> tuple[Graph, dict[str, dict[Operand, Format]], dict[str, Correction]]:
        """The parts of one candidate: (the float model, formats by site, corrections by site)."""

    @abstractmethod
    def model(self, code: NDArray[np.int64], *, bake: bool = False) -> nn.Module:
        """The model of one candidate, in evaluation mode. Its parameters are copies.

        Args:
            bake: store the quantized weights as parameters, so that the model does not quantize them at each call.
        """

    @abstractmethod
    def trained(
        self, state: StateDict, formats: Mapping[str, Mapping[Operand, Format]], epochs: int = 0
    ) -> ModelEvaluator:
        """An evaluator for this network with trained weights. Its only candidate is the empty code.

        The formats are those that the network was trained in; they are not calibrated again. The weights contain the
        corrections already.

        Args:
            state: float weights, a state dict of the captured model.
            formats: site name → operand → calibrated format; sites that are absent stay in float.
            epochs: number of epochs it was trained for in the search.
        """


def joined(parts: Sequence[BatchMetrics]) -> BatchMetrics:
    """Several batches joined into one."""
    return BatchMetrics(
        values={m: np.concatenate([p.values[m] for p in parts]) for m in (parts[0].values if parts else ())},
        errors=tuple(e for p in parts for e in p.errors),
        seconds=tuple(s for p in parts for s in p.seconds),
        inexact={site: why for p in parts for site, why in p.inexact.items()},
        plain=next((p.plain for p in parts if p.plain), ""),
        losses=merged(p.losses for p in parts),
        above_limit=max((p.above_limit for p in parts), default=0),
    )
