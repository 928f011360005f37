"""The loss and the metrics of a model on some samples: accuracy, or what its task has.

``measure`` is the one way in which a whole model is measured: in training, as the deployed model that a search is
checked with, and by ``transform --check``.

Data is passed as whole tensors and evaluated chunk by chunk, without gradients. The model passed in is never changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront import kernels
from bitfront.errors import DataError, EvaluationError
from bitfront.interrupts import contained
from bitfront.kernels.losses import Outputs
from bitfront.tasks.base import Results, Task, as_results

#: Number of samples that go through a model at a time, where nobody says another.
CHUNK = 8192
#: Results per sample are computed from so many outputs at a time.
RESULT_VALUES = 2**22


@dataclass(frozen=True)
class Evaluation:
    """How well a model does on some samples.

    Attributes:
        loss: mean loss in nats.
        accuracy: top-1, 0 to 1.
        correct: number of samples with the right answer.
        samples: number of all samples.
    """

    loss: float
    accuracy: float
    correct: int
    samples: int

    @property
    def values(self) -> dict[str, float]:
        """Metric → value: the loss, then the others."""
        return {"loss": self.loss, "accuracy": self.accuracy}


@dataclass(frozen=True)
class TaskEvaluation:
    """The same for another task than classification.

    Attributes:
        loss: mean loss.
        metrics: the other metrics of the task, by name.
        samples: number of all samples.
    """

    loss: float
    metrics: Mapping[str, float]
    samples: int

    @property
    def values(self) -> dict[str, float]:
        """Metric → value: the loss, then the others."""
        return {"loss": self.loss, **self.metrics}


def measure(
    task: Task, model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = CHUNK, outputs: Outputs = "logits"
) -> Evaluation | TaskEvaluation:
    """The loss and the metrics of `model` for a task, in eval mode and without gradients.

    Args:
        task: says what the metrics are.
        model, x, y, batch_size, outputs: as for ``evaluate``; `y` are the targets of the task.

    Raises:
        DataError: there are no samples.
        EvaluationError: the model's output does not fit the targets.
    """
    if task.classifies:
        return evaluate(model, x, y, batch_size=batch_size, outputs=outputs)
    return evaluation_of(task, results(task, model, x, y, batch_size=batch_size, outputs=outputs))


def results(
    task: Task, model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = CHUNK, outputs: Outputs = "logits"
) -> Results:
    """The results of each sample, as the task has them: name → float64, shape (samples, ...).

    Arguments and errors as for ``measure``.
    """
    if len(y) == 0:
        raise DataError("there are no samples to evaluate on")
    device = next((p.device for p in model.parameters()), x.device)
    parts = [chunk_results(task, given, target, outputs) for given, target in _given(model, x, y, batch_size, device)]
    return as_results(parts)


def chunk_results(task: Task, given: object, targets: Tensor, outputs: Outputs) -> Mapping[str, Tensor]:
    """The results of one chunk of samples: what ``results`` puts together.

    Args:
        given: the output of the model for these samples, in evaluation mode.
        targets: of these samples.

    Raises:
        EvaluationError: the output does not fit the targets.
    """
    # Sums over the pixels or tokens of a sample must not depend on the order of the outputs in memory.
    checked, targets = checked_outputs(task, given, targets).cpu().contiguous(), targets.cpu()
    # In float64 the outputs for many pixels or tokens would take much memory. Results of a sample are its own.
    some = max(1, RESULT_VALUES // max(1, checked[:1].numel()))
    pieces = zip(torch.split(checked, some), torch.split(targets, some), strict=True)
    parts = [task.results(part, wanted, outputs) for part, wanted in pieces]
    return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def checked_outputs(task: Task, given: object, targets: Tensor) -> Tensor:
    """The output of a model, checked to fit the targets of the same samples. Raises EvaluationError."""
    wrong = task.wrong(given, targets) if isinstance(given, Tensor) else "a tensor is needed"
    if isinstance(given, Tensor) and not wrong:
        return given
    output = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
    raise EvaluationError(f"the model returned {output} for {len(targets)} samples; {wrong}")


def evaluation_of(task: Task, given: Results) -> TaskEvaluation:
    """The loss and the metrics that follow from results per sample."""
    metrics = {metric.name: metric.value(given) for metric in task.measured}
    return TaskEvaluation(task.loss.value(given), metrics, len(given["samples"]))


@dataclass
class Tally:
    """Adds up what one candidate's outputs are worth, chunk by chunk, as ``measure`` does.

    Attributes:
        task: of the samples.
        outputs: what the model's outputs are.
        classes: the largest label of all samples, plus one; for a classification alone.
    """

    task: Task
    outputs: Outputs
    classes: int = 0
    _loss: float = 0.0
    _correct: int = 0
    _samples: int = 0
    _parts: list[Mapping[str, Tensor]] = field(default_factory=list)

    def add(self, given: object, targets: Tensor) -> None:
        """Add the output of the model for the next chunk of samples, and their targets, on its device.

        Raises:
            EvaluationError: the output does not fit the targets.
        """
        self._samples += len(targets)
        if self.task.classifies:
            lost, right = chunk_score(given, targets, self.classes, self.outputs)
            self._loss += lost
            self._correct += right
        else:
            self._parts.append(chunk_results(self.task, given, targets, self.outputs))

    def evaluation(self) -> Evaluation | TaskEvaluation:
        """What the samples so far give."""
        if self.task.classifies:
            right = self._correct
            return Evaluation(self._loss / self._samples, right / self._samples, right, self._samples)
        return evaluation_of(self.task, as_results(self._parts))


def evaluate(
    model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = CHUNK, outputs: Outputs = "logits"
) -> Evaluation:
    """Mean loss and top-1 accuracy of `model` on (x, y), in eval mode and without gradients.

    The mean is taken in float64 over the loss of each sample, so the size of the chunks does not change it.
    The training flag of every module is restored at the end.

    Args:
        model: outputs of shape (samples, classes) from x.
        x: samples, shape (samples, *sample_shape); moved to the model's device chunk by chunk.
        y: int64 class indices, shape (samples,).
        batch_size: samples per chunk; it changes the memory needed, not the result.
        outputs: what the model's outputs are; the loss follows from it (``kernels.losses``).

    Raises:
        DataError: there are no samples.
        EvaluationError: the model's output does not have that shape, or too few classes for `y`.
    """
    if len(y) == 0:
        raise DataError("there are no samples to evaluate on")
    device = next((p.device for p in model.parameters()), x.device)
    losses = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for logits, target in _outputs(model, x, y, batch_size):
        loss, right = _score(logits, target, outputs)
        losses += loss
        correct += right
    total = float(losses)
    hits = int(correct)
    return Evaluation(total / len(y), hits / len(y), hits, len(y))


def chunk_score(logits: object, target: Tensor, classes: int, outputs: Outputs) -> tuple[float, int]:
    """The sum of losses, and the number of right answers, of one chunk of samples: what ``evaluate`` adds up.

    Args:
        logits: the output of the model for these samples, in evaluation mode.
        target: their labels, int64, shape (samples,).
        classes: the largest label of all samples, plus one.
        outputs: what the model's outputs are.

    Raises:
        EvaluationError: the output does not have the shape (samples, classes).
    """
    loss, right = _score(checked_logits(logits, len(target), classes, exact=False), target, outputs)
    return float(loss), int(right)


def _score(logits: Tensor, target: Tensor, outputs: Outputs) -> tuple[Tensor, Tensor]:
    loss, right = kernels.score(logits.t().unsqueeze(0), target.int(), outputs=outputs)
    return loss[0], right[0]


def outputs_of(model: nn.Module, x: Tensor, *, batch_size: int = CHUNK, limit_bytes: int | None = None) -> Tensor:
    """What a model gives for some samples: float32 on the CPU, shape (samples, ...).

    Args:
        model: in any mode; it is called in evaluation mode and without gradients.
        x: samples, shape (samples, *sample_shape).
        batch_size: samples per chunk.
        limit_bytes: the most memory that the outputs may take; None for no limit.

    Raises:
        EvaluationError: the model returns no tensor with a row per sample.
        DataError: the outputs take more memory than that, or are not finite.
    """
    device = next((p.device for p in model.parameters()), x.device)
    parts: list[Tensor] = []
    for given, chunk in _given(model, x, x, batch_size, device):
        if not isinstance(given, Tensor) or given.ndim < 2 or len(given) != len(chunk):
            what = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise EvaluationError(f"the model returned {what} for {len(chunk)} samples; a row per sample is needed")
        size = given[:1].numel() * len(x) * 4
        if limit_bytes is not None and size > limit_bytes:
            raise DataError(
                f"the outputs of the float model for {len(x):,} samples take {size / 2**30:.3g} GiB, and "
                f"{limit_bytes / 2**30:.3g} are allowed; give fewer samples"
            )
        if not bool(given.isfinite().all()):
            raise DataError("the float model's outputs are not finite for some samples, so nothing can agree with them")
        parts.append(given.float().cpu())
    return torch.cat(parts).clone()


def right_answers(model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = CHUNK) -> NDArray[np.bool_]:
    """Which samples the model answers correctly, shape (samples,), bool: those that ``evaluate`` counts as correct.

    Arguments and errors as for ``evaluate``.
    """
    hits = [(logits.argmax(dim=1) == target).cpu() for logits, target in _outputs(model, x, y, batch_size)]
    return torch.cat(hits).numpy() if hits else np.zeros(0, dtype=bool)


def _outputs(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits, labels) chunk by chunk, on the model's device, in eval mode and without gradients."""
    device = next((p.device for p in model.parameters()), x.device)
    classes = int(y.max()) + 1
    for outputs, labels in _given(model, x, y, batch_size, device):
        target = labels.to(device)
        yield checked_logits(outputs, len(target), classes, exact=False), target


def _given(
    model: nn.Module, x: Tensor, y: Tensor, batch_size: int, device: torch.device
) -> Iterator[tuple[object, Tensor]]:
    """(what the model returns, targets) chunk by chunk, in eval mode and without gradients."""
    with _eval_mode(model), torch.inference_mode():
        for x_chunk, y_chunk in zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True):
            with contained():
                outputs = model(x_chunk.to(device, copy=True))  # a model may change its input in place
            yield outputs, y_chunk


def checked_logits(logits: object, samples: int, classes: int, *, exact: bool) -> Tensor:
    """The output of a model, checked to be logits of shape (samples, classes).

    Args:
        exact: whether more columns than `classes` are an error, too.

    Raises:
        EvaluationError: it has another shape, or is no tensor.
    """
    # Without this check a wrong output is an IndexError on the CPU, and breaks the CUDA context on a GPU.
    if isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == samples:
        width = logits.shape[1]
        if width == classes or (width > classes and not exact):
            return logits
    output = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
    raise EvaluationError(
        f"for {samples} samples of {classes} classes the model must return logits of shape ({samples}, "
        f"{classes}); it returned {output}"
    )


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
