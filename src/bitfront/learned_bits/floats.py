"""Float models beside the one that is searched: where members start, and teachers.

A teacher's answers take the place of labels (Hinton et al. 2015, arXiv:1503.02531). The probabilities are
softmax(logits / temperature), mean over the teachers. A temperature below 1 sharpens them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bitfront.data.base import Dataset
from bitfront.errors import EvaluationError
from bitfront.graph import Graph, channels
from bitfront.kernels.losses import Outputs
from bitfront.population import train_population
from bitfront.tasks.base import Task
from bitfront.tasks.classification import CLASSIFICATION
from bitfront.training import TrainSettings
from bitfront.transforms.widen import fresh, widen

#: Teachers of an ensemble, their epochs, and how much wider they are than the model, where its widths can change.
TEACHERS, EPOCHS, WIDER = 2, 40, 2
#: Samples that go through a teacher at a time.
CHUNK = 8192


def soft_targets(models: Sequence[nn.Module], x: Tensor, temperature: float, outputs: Outputs = "logits") -> Tensor:
    """The mean probabilities of some models, float32, shape (samples, classes), contiguous.

    Args:
        models: in evaluation mode.
        x: samples.
        temperature: above 0; 1 leaves the probabilities as they are.
        outputs: what the models give: logits, probabilities or their logarithms.
    """

    def logits(values: Tensor) -> Tensor:
        # Logarithms of probabilities are logits, too.
        return values.clamp(min=1e-30).log() if outputs == "probabilities" else values

    parts = []
    with torch.no_grad():
        for start in range(0, len(x), CHUNK):
            part = x[start : start + CHUNK]
            part = part.float() if part.is_floating_point() else part
            parts.append(torch.stack([(logits(model(part)) / temperature).softmax(-1) for model in models]).mean(0))
    return torch.cat(parts).contiguous()


def fresh_models(
    graph: Graph,
    x: Tensor,
    y: Tensor,
    classes: int,
    settings: TrainSettings,
    count: int,
    wider: int = 1,
    task: Task = CLASSIFICATION,
) -> list[nn.Module]:
    """New float models with the layers of the captured one, trained from fresh weights, each from another seed.

    Args:
        graph: the captured model; it is not changed.
        x, y: samples to train on.
        classes: number of classes.
        settings: of the training.
        count: how many models.
        task: what the samples are.
        wider: factor of the widths that can change; those of a model that is not traced cannot.

    Raises:
        EvaluationError: a training diverged.
    """
    seeds = [settings.seed + place for place in range(count)]
    if wider > 1 and graph.fx_graph is not None:
        widths: dict[int | str, int] = {g.index: wider * g.width for g in channels(graph).groups if not g.fixed}
        models = [widen(graph, widths, init="fresh", seed=seed) for seed in seeds]
    else:
        models = [fresh(copy.deepcopy(graph.model), seed) for seed in seeds]
    few = Dataset(
        name="float models",
        x={"train": x, "val": x[:64]},
        y={"train": y, "val": y[:64]},
        class_names=tuple(map(str, range(classes))),
        source="the training split",
        targets=task.targets,
    )
    trained = train_population(models, few, settings, outputs=graph.outputs, task=task)
    for model, member in zip(models, trained, strict=True):
        if member.error:
            raise EvaluationError(f"a float model could not be trained: {member.error}")
        model.load_state_dict(member.state)
    return [model.eval() for model in models]
