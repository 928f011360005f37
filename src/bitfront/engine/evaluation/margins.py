"""What each option alone does to the outputs, for the samples of a classification that are nearly right or wrong.

Gradients (``sensitivity.py``) say how much an option disturbs the outputs on average. For a few bits less or more that
is too coarse: an accuracy changes where single samples change sides. So every option is evaluated alone, all other
sites being in float, on the samples whose margin is smallest: by how much the best other class is above the label. A
few others stand for the rest, which changes sides where there is much noise. What several options do together is close
to the sum of what each does alone, as long as accuracy has not fallen far (isolated sensitivities, per sample in place
of on average). With the other sites in a format of many bits it would not be: a change makes all sites after it round
other values up, and this noise would be in the effect of every option.

It takes up to some ``EVALUATIONS`` evaluations: where a space has many options, fewer samples are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.kernels.losses import log_probability
from bitfront.spaces.base import Codes
from bitfront.spaces.margins import Margins
from bitfront.spaces.quantize import QuantizationSpace

Values = NDArray[np.float64]
#: What all options together may take, in evaluations of a candidate; half of the layers are shared with another one.
EVALUATIONS, SHARED = 20, 0.5
#: Samples: with fewer nothing is known, and more are not needed.
LEAST, MOST = 64, 2048
#: The share of them that stands for samples with larger margins.
OTHERS = 0.25
#: Other classes that are looked at, per sample: those with the largest outputs.
CLASSES = 4
#: Numbers that are kept, at most: 16 MB.
KEPT = 2**22
#: Outputs that are looked at together: 64 MB.
TOGETHER = 2**24
#: What stands for an output that is not finite.
FAR = 1e6


def margins(evaluator: FixedEvaluator, noise: Sequence[Values]) -> Margins | None:
    """The margins of the nearest samples, and what options do to them.

    Args:
        evaluator: of candidates that all have the weights of one model.
        noise: per group that of each option, shape (options,).

    Returns:
        None where the task is no classification, where the model is not evaluated node by node, where nothing can be
        chosen, and where there are so many options that too few samples would be left.

    Raises:
        RuntimeError, TypeError: the outputs are not of shape (samples, classes), or the model fails.
    """
    number, of_accuracy = _number(evaluator, noise), evaluator.accuracy_samples
    if not number or of_accuracy is None:
        return None
    x, y = evaluator.samples(of_accuracy.split, of_accuracy.number)
    one_by_one, alone = _alone(evaluator)
    labels = y.cpu().numpy()
    nearest = _nearest(one_by_one, alone[:1], x, labels)
    if nearest is None:
        return None
    chosen, weights = _chosen(nearest[0], number)
    rivals, of_labels = nearest[1][chosen], labels[chosen][:, None]
    samples, parts = x[torch.from_numpy(chosen)], []
    for codes in np.split(alone, range(0, len(alone), max(1, TOGETHER // (number * nearest[2])))[1:]):
        output = _outputs(one_by_one, codes, samples)
        assert output is not None, "it was evaluated node by node before"
        of_label = np.take_along_axis(output, of_labels[None], axis=2)
        parts.append(np.take_along_axis(output, rivals[None], axis=2) - of_label)
    found = np.nan_to_num(np.concatenate(parts), nan=FAR, posinf=FAR, neginf=-FAR)
    found = np.ascontiguousarray(found.transpose(0, 2, 1))
    ends = np.cumsum([len(options) for options in noise])[:-1]
    return Margins(found[0], tuple(np.split(found[1:] - found[0], ends)), weights)


def evaluations(evaluator: FixedEvaluator, noise: Sequence[Values]) -> float:
    """About how many evaluations of a candidate ``margins`` takes; 0 where it gives None at once. Same arguments."""
    number, of_accuracy = _number(evaluator, noise), evaluator.accuracy_samples
    if not number or of_accuracy is None:
        return 0.0
    samples = len(evaluator.samples(of_accuracy.split, of_accuracy.number)[1])
    return SHARED * sum(map(len, noise)) * number / samples


def _number(evaluator: FixedEvaluator, noise: Sequence[Values]) -> int:
    """How many samples are looked at; 0 for no margins. Arguments as for ``margins``."""
    of_accuracy, number_of_options = evaluator.accuracy_samples, sum(len(options) for options in noise)
    if not evaluator.job.task.classifies or of_accuracy is None or number_of_options == len(noise):
        return 0
    samples = len(evaluator.samples(of_accuracy.split, of_accuracy.number)[1])
    affordable = int(EVALUATIONS / SHARED * samples / number_of_options)
    number = min(samples, MOST, affordable, KEPT // (CLASSES * number_of_options))
    return number if number >= LEAST else 0


def _nearest(
    evaluator: FixedEvaluator, code: Codes, x: Tensor, labels: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64], int] | None:
    """(the margin of each sample, shape (samples,); its other classes with the largest outputs, shape (samples,
    ``CLASSES`` or all); number of classes) of one candidate. None where it is not evaluated node by node.

    A few samples at a time, because outputs may be of many classes.
    """
    margins_of, rivals = [], []
    size = evaluator.chunk
    for start in range(0, len(x), size):
        output = _outputs(evaluator, code, x[start : start + size])
        if output is None:
            return None
        others, of_labels = output[0], labels[start : start + size][:, None]
        if of_labels.max() >= others.shape[1]:
            raise RuntimeError(f"a label is {of_labels.max()}, and there are {others.shape[1]} outputs")
        of_label = np.take_along_axis(others, of_labels, axis=1)
        np.put_along_axis(others, of_labels, -np.inf, axis=1)
        margins_of.append(others.max(axis=1) - of_label[:, 0])
        rivals.append(np.argsort(-others, axis=1, kind="stable")[:, : min(CLASSES, others.shape[1] - 1)])
    return np.concatenate(margins_of), np.concatenate(rivals), others.shape[1]


def _chosen(margin: NDArray[np.float32], number: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(the samples that are looked at, the share of all samples that each stands for), each of shape (number,).

    Args:
        margin: of all samples, shape (samples,).
        number: how many to choose.
    """
    by_margin = np.argsort(np.abs(np.nan_to_num(margin, nan=0.0)), kind="stable")
    if number == len(margin):
        return by_margin, np.full(number, 1 / number, dtype=np.float32)
    near = by_margin[: number - int(OTHERS * number)]
    # Evenly along their margins.
    far = by_margin[len(near) :]
    places = (np.arange(number - len(near)) + 0.5) * len(far) / (number - len(near))
    others = far[places.astype(np.int64)]
    weights = np.full(number, 1 / len(margin), dtype=np.float32)
    weights[len(near) :] = len(far) / len(others) / len(margin)
    return np.concatenate([near, others]), weights


def _alone(evaluator: FixedEvaluator) -> tuple[FixedEvaluator, Codes]:
    """An evaluator of networks with one site that is not in float, and their codes: the float model, then every option
    of every site. Corrections are left out."""
    graph, formats = evaluator.space.graph, evaluator.option_formats()
    space = QuantizationSpace.of_options(graph, [[{}, *of_site] for of_site in formats])
    options = np.zeros((1 + sum(map(len, formats)), len(formats)), dtype=np.int64)
    row = 1
    for g, of_site in enumerate(formats):
        options[row : row + len(of_site), g] = np.arange(1, 1 + len(of_site))
        row += len(of_site)
    job = evaluator.job.without_corrections(graph.model)
    return FixedEvaluator(job, space, evaluator.limits, evaluator), space.codes(options)


def _outputs(evaluator: FixedEvaluator, codes: Codes, x: Tensor) -> NDArray[np.float32] | None:
    """Logits, or logarithms of probabilities: shape (candidates, samples, classes)."""
    output = evaluator.outputs(codes, x)
    if output is None:
        return None
    if output.dim() != 3 or output.shape[2] < 2:
        raise RuntimeError(f"outputs of shape {tuple(output.shape[1:])}, and not (samples, classes)")
    if evaluator.space.graph.outputs in ("probabilities", "class_probabilities"):
        output = log_probability(output)
    values: NDArray[np.float32] = output.numpy()
    return values
