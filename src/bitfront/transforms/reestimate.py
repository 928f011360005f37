"""The statistics of batch norms estimated anew after a network was trained in its formats.

While weights are trained with their formats, they jump between neighbouring values of the grid, and the moving averages
of the batch norms lag behind (Nagel et al. 2022, arXiv:2203.11086, section 4). With the weights and formats as they are
in the end, samples are sent through the network once more, in batches as in training, and each batch norm gets the mean
of its batches' statistics. It normalises by those of the batch meanwhile, so the old averages have no influence, and
doing it again changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitfront.formats.base import Format, Operand
from bitfront.graph import Graph
from bitfront.transforms.correct import is_norm
from bitfront.transforms.quantize import quantize


def norms_of(model: nn.Module) -> tuple[str, ...]:
    """Module paths of the batch norms whose statistics can be estimated anew."""
    return tuple(path for path, module in model.named_modules() if is_norm(module))


def reestimated(
    graph: Graph,
    formats: Mapping[str, Mapping[Operand, Format]],
    x: Tensor,
    batch_size: int,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """The statistics that the batch norms of a trained network have under these formats.

    Args:
        graph: the captured network, with its trained float weights.
        formats: site name → operand → calibrated format.
        x: samples, float32, shape (samples, ...), at least two of them.
        batch_size: largest number of samples in a batch; batches differ by at most one sample.
        device: where to compute.

    Returns:
        Name of a running mean or variance in the network's state dict → its new value, on the CPU. A batch norm that no
        sample reaches is missing, and a channel without a finite value keeps what it has.
    """
    model = quantize(graph, formats).to(device)
    twins = dict(model.named_modules())
    norms: dict[str, Any] = {path: twins[path] for path in norms_of(graph.model) if path in twins}
    for norm in norms.values():
        norm.train()
        norm.momentum = None  # the mean over all batches
        norm.num_batches_tracked.zero_()
    with torch.no_grad():
        for batch in x.tensor_split(math.ceil(len(x) / batch_size)):
            model(batch.to(device).clone())
    new: dict[str, Tensor] = {}
    for path, norm in norms.items():
        if not int(norm.num_batches_tracked):
            continue
        before: Any = graph.model.get_submodule(path)
        for name in ("running_mean", "running_var"):
            value, old = getattr(norm, name).cpu(), getattr(before, name).cpu()
            new[f"{path}.{name}"] = torch.where(value.isfinite(), value, old)
    return new
