"""What happens to a network between its training and its evaluation: from its quantized twin back to float weights.

If ``[search.calibration] batch_norm`` is set, the batch norms get new statistics, with the trained weights and formats.
Biases and rounding are corrected before training only, as its start. After it there is nothing that they could be
corrected towards: the outputs of the float weights are not what was trained.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from bitfront.engine.evaluation.fixed import one_thread
from bitfront.engine.evaluation.interface import ModelEvaluator
from bitfront.formats.base import Format, Operand
from bitfront.graph import Graph
from bitfront.training import StateDict
from bitfront.transforms.reestimate import reestimated


def with_new_statistics(
    evaluator: ModelEvaluator, state: StateDict, formats: Mapping[str, Mapping[Operand, Format]], batch_size: int
) -> StateDict:
    """The float weights of a trained network, with the statistics that its batch norms have under its formats.

    Args:
        evaluator: an evaluator of this network, with any weights; its calibration samples are used.
        state: float weights, a state dict of the captured model.
        formats: site name → operand → calibrated format.
        batch_size: number of samples per training step.
    """
    graph = evaluator.trained(state, formats).space.graph
    with one_thread():
        new = reestimated(graph, formats, evaluator.job.calibration, batch_size, evaluator.device)
    return {**state, **new}


def float_state(graph: Graph, trained: Mapping[str, Tensor]) -> StateDict:
    """The state dict of the float network, from that of its quantized twin.

    A twin's parameters have the names of the float network's. There is an exception: if a shared module is called
    several times, the rewritten graph names each call's module differently. A module that is not called is missing
    from the twin; its state stays that of the float network.
    """
    names = {f"{site.name}_quantized": site.path for site in graph.sites if site.path}
    renamed = {}
    for name, tensor in trained.items():
        path, dot, key = name.rpartition(".")
        renamed[f"{names.get(path, path)}{dot}{key}"] = tensor
    return {name: renamed.get(name, tensor.cpu()) for name, tensor in graph.model.state_dict().items()}
