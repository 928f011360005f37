"""int8 files in ONNX Runtime's default session, one image at a time on one thread: ours, its own, and float.

ResNet-18 and MobileNetV2 at 224 × 224, with random weights and batch norm statistics that belong to them. Bitfront
evaluates with ``fold_batch_norm`` and ``integer_bias``; every convolution, the linear layer, additions and the pooling
at the end have inputs of 8 bits, and weights have 8 bits with a scale per output channel. The candidate is written in
the form ``qdq``. ONNX Runtime gets the float network as ONNX, folds batch norms as its pre-processing does, and
quantizes it statically (QDQ, per channel, uint8 inputs, int8 weights, MinMax). Both learn from the same samples.

fused        convolutions that ONNX Runtime computes as QLinearConv, of all, in the graph that it runs
ms           median of the runs, which take turns; with quartiles
alike        samples of which the default session gives the same largest output as the evaluated candidate, for ours

Exit status 1 where less than 90 % are fused. Times are judged on the page.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from common import make_job, paired, parser, ratio, report, spread
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from bitfront.engine.evaluation.calibration import Corrections
from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.exporters.onnx import INPUT, onnx_model
from bitfront.exporters.sessions import PRECISE
from bitfront.graph import capture
from bitfront.transforms.correct import corrected
from models import mobilenet_v2, resnet18

NETWORKS = {"ResNet-18": resnet18, "MobileNetV2": mobilenet_v2}
INPUTS = {"name": "affine", "data_in_width": 8}
LAYERS = {**INPUTS, "weight_width": 8}
CHOICES = {"conv2d": LAYERS, "linear": LAYERS, "add": INPUTS, "adaptive_avg_pool": INPUTS}
#: Operators that compute a convolution.
CONVOLUTIONS = ("QLinearConv", "Conv", "FusedConv", "ConvInteger")


def settled(make: Callable[[], nn.Module], size: int) -> nn.Module:
    """A network with random weights, and batch norm statistics that are those of three batches."""
    model = make().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        for seed in range(3):
            model(torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(seed)))
    return model.eval()


def of_bitfront(model: nn.Module, x: Tensor, path: Path) -> Tensor:
    """Write the candidate of 8 bits everywhere; returns what it gives as evaluated."""
    job = make_job(model, x, torch.zeros(len(x), dtype=torch.int64), CHOICES, calibration=x)
    job = replace(job, fold_batch_norm=True, corrections=Corrections(integer_bias=True))
    evaluator = FixedEvaluator(job)
    (code,) = evaluator.space.numbered(0, 1)
    graph, formats, corrections = evaluator.parts(code)
    path.write_bytes(onnx_model(corrected(graph, corrections), formats, "qdq").SerializeToString())
    with torch.no_grad():
        outputs: Tensor = evaluator.model(code)(x)
    return outputs


class _Reader(quantization.CalibrationDataReader):
    """The calibration samples, as ONNX Runtime asks for them."""

    def __init__(self, x: Tensor) -> None:
        self._batches: Iterator[dict[str, Any]] = iter([{INPUT: batch.numpy()} for batch in x.split(8)])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)


def of_onnxruntime(model: nn.Module, x: Tensor, floating: Path, path: Path) -> None:
    """Write the float network, and ONNX Runtime's quantized one."""
    floating.write_bytes(onnx_model(capture(model, x[:2]), {}).SerializeToString())
    folded = path.with_suffix(".folded.onnx")
    quant_pre_process(str(floating), str(folded), skip_symbolic_shape=True)
    quantization.quantize_static(
        folded,
        path,
        _Reader(x),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )


def opened(path: Path) -> tuple[Any, Counter[str]]:
    """(a session with default optimizations on one thread, how many nodes of each type it runs)."""
    options, run = onnxruntime.SessionOptions(), path.with_suffix(".run.onnx")
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry(*PRECISE)
    options.optimized_model_filepath = str(run)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session, Counter(node.op_type for node in onnx.load(run).graph.node)


def main() -> int:
    """Run; 1 where a target is missed."""
    options = parser(__doc__ or "").parse_args()
    warnings.filterwarnings("ignore", module="onnxruntime")
    torch.set_num_threads(1)
    size, samples, repeats = (32, 2, 2) if options.quick else (224, 8, 60)
    rows: list[dict[str, Any]] = []
    summary: dict[str, float] = {}
    for name, make in NETWORKS.items():
        model = settled(make, size)
        x = torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(9))
        with tempfile.TemporaryDirectory() as folder:
            paths = {kind: Path(folder) / f"{kind}.onnx" for kind in ("bitfront", "onnxruntime", "float")}
            expected = of_bitfront(model, x, paths["bitfront"]).numpy()
            of_onnxruntime(model, x, paths["float"], paths["onnxruntime"])
            sessions = {kind: opened(path) for kind, path in paths.items()}
        one = {INPUT: x[:1].numpy()}
        calls = {kind: partial(session.run, None, one) for kind, (session, _) in sessions.items()}
        paired(calls, 3)  # to warm up
        times = paired(calls, repeats)
        given = sessions["bitfront"][0].run(None, {INPUT: x.numpy()})[0]
        alike = int((given.argmax(1) == expected.argmax(1)).sum())
        for kind, (_, counts) in sessions.items():
            about = spread([1e3 * t for t in times[kind]])
            convolutions = sum(counts[op] for op in CONVOLUTIONS)
            row = {"network": name, "file": kind, "convolutions": convolutions, "fused": counts["QLinearConv"]}
            row |= {"ms": about["median"], "q1": about["q1"], "q3": about["q3"]}
            rows.append(row | {"alike": f"{alike} of {samples}" if kind == "bitfront" else ""})
        key, ours = name.lower().replace("-", "_"), sessions["bitfront"][1]
        summary[f"{key}_fused"] = ours["QLinearConv"] / sum(ours[op] for op in CONVOLUTIONS)
        summary[f"{key}_largest_difference"] = float(np.abs(given - expected).max() / np.abs(expected).max())
        for other in ("onnxruntime", "float"):
            summary[f"{key}_time_over_{other}"] = ratio(times["bitfront"], times[other])
    report("runtime", rows, summary, options.json, data="random images")
    return int(any(value < 0.9 for name, value in summary.items() if name.endswith("_fused")))


if __name__ == "__main__":
    sys.exit(main())
