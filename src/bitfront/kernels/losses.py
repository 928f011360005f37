"""What a network's outputs are, and the loss that follows from it: one rule for evaluation and for training.

Most networks give logits, of which the loss is the cross entropy. One that ends in a softmax gives probabilities: the
cross entropy of these, taken for logits, would be another number. So the loss is the negative logarithm of what the
label got. One that ends in a sigmoid gives a probability per class: the loss is the binary cross entropy against
one-hot labels, the mean over the classes, as ``torch.nn.BCELoss`` and Keras's ``binary_crossentropy`` have it.

A logarithm is at least −100, as in ``torch.nn.BCELoss``: a probability of zero costs 100 nats and not infinity.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from bitfront.kernels import plain

#: What the outputs of a network are. The last two are one probability per class, which need not sum to 1.
Outputs = Literal["logits", "probabilities", "log_probabilities", "class_probabilities", "class_log_probabilities"]
#: What the loss of each is called, for people.
LOSSES: dict[Outputs, str] = {
    "logits": "cross entropy",
    "probabilities": "cross entropy, from the probabilities themselves: −log of what the label got",
    "log_probabilities": "cross entropy, from the log-probabilities themselves: minus what the label got",
    "class_probabilities": "binary cross entropy against one-hot labels, mean over the classes",
    "class_log_probabilities": "binary cross entropy against one-hot labels, mean over the classes",
}
#: The least logarithm of a probability, in nats.
FLOOR = -100.0
_SMALLEST = 2.0**-126
_LOG_2 = 0.6931471805599453


def log_probability(p: Tensor) -> Tensor:
    """log p, at least ``FLOOR``, NaN where p is. Single operations in a fixed order: the same bits everywhere.

    Args:
        p: float32, any shape; below 0 counts as 0.
    """
    # Numbers below the smallest normal one have no exponent to read off.
    tiny = p < _SMALLEST
    found = plain.log_positive(torch.where(tiny, p * 2.0**64, p)) - torch.where(tiny, 64 * _LOG_2, 0.0)
    found = torch.where(p <= 0, FLOOR, found.clamp(min=FLOOR))
    return torch.where(p == p, found, p)


def score(values: Tensor, labels: Tensor, outputs: Outputs) -> tuple[Tensor, Tensor]:
    """Loss and right answers where outputs are no logits; see :func:`bitfront.kernels.score`."""
    loss, right = of_samples(values, labels, outputs)
    return loss.double().sum(dim=1), right.sum(dim=1)


def of_samples(values: Tensor, labels: Tensor, outputs: Outputs) -> tuple[Tensor, Tensor]:
    """The loss of each sample, float32, and whether it is right: both of shape (candidates, samples).

    The same numbers as :func:`bitfront.kernels.score` adds up, of any outputs.
    """
    if outputs == "logits":
        return plain.of_samples(values, labels, False)
    index = labels.long().expand(len(values), 1, -1)
    if outputs == "log_probabilities":
        chosen = values.gather(1, index).squeeze(1)
        loss = -torch.where(chosen == -torch.inf, FLOOR, chosen)
    elif outputs == "probabilities":
        loss = -log_probability(values.gather(1, index).squeeze(1))
    else:
        p = values if outputs == "class_probabilities" else plain.exp_nonpositive(values)
        loss = torch.zeros_like(p[:, 0])
        for c in range(p.shape[1]):
            loss -= log_probability(torch.where(labels == c, p[:, c], 1.0 - p[:, c]))
        loss = loss / p.shape[1]
    # A NaN of another class is this sample's too: its largest output is not known.
    loss = torch.where(values.isnan().any(dim=1), torch.nan, loss)
    return torch.round(loss * 2.0**20) * 2.0**-20, values.argmax(dim=1) == labels


def log_probabilities(values: Tensor, outputs: Outputs) -> Tensor:
    """Logarithms of the probabilities of the classes, with gradients, of outputs that are one distribution.

    Args:
        values: outputs, shape (samples, classes).
        outputs: what the values are: logits, probabilities or their logarithms.
    """
    if outputs == "logits":
        return functional.log_softmax(values, 1)
    # A gradient of 1/p is finite from the smallest normal number on.
    return values.clamp(min=_SMALLEST).log() if outputs == "probabilities" else values


def training_loss(values: Tensor, labels: Tensor, outputs: Outputs) -> Tensor:
    """The mean loss of a batch, with gradients.

    Args:
        values: outputs, shape (samples, classes).
        labels: class indices, int64, shape (samples,).
        outputs: what the values are.
    """
    if outputs == "logits":
        return functional.cross_entropy(values, labels)
    if outputs in ("probabilities", "log_probabilities"):
        return functional.nll_loss(log_probabilities(values, outputs), labels)
    p = values if outputs == "class_probabilities" else values.exp()
    return functional.binary_cross_entropy(p, functional.one_hot(labels, values.shape[1]).to(p.dtype))
