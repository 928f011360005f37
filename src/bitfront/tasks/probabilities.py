"""Logarithms of the probabilities that outputs stand for: of classes that exclude each other, or of labels.

Each is at least −100, as in ``torch.nn.BCELoss``: a wrong certainty costs 100 nats and not infinity. All have finite
gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bitfront.kernels.losses import FLOOR, Outputs


def of_classes(outputs: Tensor, ends: Outputs, axis: int = 1) -> Tensor:
    """Logarithms of the probabilities of classes that exclude each other, of the shape of the outputs.

    Args:
        outputs: any shape.
        ends: what they are; anything but ``probabilities`` and ``log_probabilities`` is taken for logits.
        axis: that of the classes.
    """
    if ends == "probabilities":
        return outputs.clamp(min=2.0**-126).log().clamp(min=FLOOR)
    return outputs.clamp(min=FLOOR) if ends == "log_probabilities" else outputs.log_softmax(dim=axis)


def of_labels(outputs: Tensor, ends: Outputs) -> tuple[Tensor, Tensor]:
    """(log of the probability that a label is there, log of that it is not), both of the shape of the outputs.

    Args:
        outputs: any shape.
        ends: what they are; anything but ``class_probabilities`` and ``class_log_probabilities`` is taken for logits.
    """
    if ends not in ("class_probabilities", "class_log_probabilities"):
        there, absent = functional.logsigmoid(outputs), functional.logsigmoid(-outputs)
        return there.clamp(min=FLOOR), absent.clamp(min=FLOOR)
    limits = torch.finfo(outputs.dtype)
    is_log = ends == "class_log_probabilities"
    there, p = (outputs, outputs.exp()) if is_log else (outputs.clamp(min=limits.tiny).log(), outputs)
    # The logarithm of 1 − p has no finite gradient at p = 1.
    absent = torch.where(p >= 1, FLOOR, torch.log1p(-p.clamp(max=1 - limits.eps / 2)))
    return there.clamp(min=FLOOR), absent.clamp(min=FLOOR)
