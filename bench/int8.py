"""int8 networks beside their float originals, and beside ONNX Runtime's static quantization of the same networks.

``digits-cnn`` and a small ResNet are trained here on MNIST images, from three random seeds. Bitfront quantizes every
convolution and linear layer: weights in 8 bits, symmetric, a scale per output channel; inputs in unsigned 8 bits with a
zero point per tensor, under each rule for ranges. ONNX Runtime gets the float network as ONNX, folds batch norms as its
pre-processing does, and quantizes it (QDQ, per channel, uint8 inputs, int8 weights) with each of its calibrations. Both
learn from the same 512 training samples and are measured on the same test samples. ONNX Runtime's file is run with and
without graph optimisation, and the better one counts, because its integer kernels saturate on some processors.

Each side is judged by its best rule on the mean over the seeds. A network of Bitfront is evaluated as a search does it,
and once more alone as deployed; exit status 1 where these differ.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import images, make_job, measured, parser, report
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from bitfront.data.base import Dataset
from bitfront.engine.evaluation.fixed import FixedEvaluator
from bitfront.exporters.onnx import INPUT, onnx_model
from bitfront.exporters.sessions import opened
from bitfront.graph import capture
from bitfront.models.base import build_model
from bitfront.scoring import evaluate
from bitfront.training import TrainSettings, train
from models import small_resnet

#: Bitfront's rules for the ranges of inputs; weights take "mse" beside "mse", else the whole range.
RULES = ("minmax", "percentile", "mse", "entropy")
#: ONNX Runtime's.
METHODS = ("MinMax", "Percentile", "Entropy")
CALIBRATION = 512
MODELS = ("digits-cnn", "ResNet-8")


def network(name: str, data: Dataset, seed: int, epochs: int) -> nn.Module:
    """A network after training, in evaluation mode."""
    shape = tuple(data.x["train"].shape[1:])
    model = build_model("digits-cnn", shape, 10, seed) if name == "digits-cnn" else small_resnet(shape[0], seed)
    settings = TrainSettings(max_epochs=epochs, batch_size=64, learning_rate=2e-3, seed=seed)
    model.load_state_dict(train(model, data, settings).last_state)
    return model.eval()


def of_bitfront(model: nn.Module, data: Dataset, calibration: Tensor, rule: str) -> tuple[float, bool]:
    """(test accuracy as a search measures it, whether the deployed model alone has the same loss and accuracy)."""
    table = {
        "name": "affine",
        "data_in_width": 8,
        "data_in_symmetric": False,
        "data_in_range": rule,
        "weight_width": 8,
        "weight_symmetric": True,
        "weight_granularity": "channel",
        "weight_range": "mse" if rule == "mse" else "minmax",
    }
    x, y = data.split("test")
    evaluator = FixedEvaluator(make_job(model, x, y, {"conv2d": table, "linear": table}, calibration=calibration))
    codes = evaluator.space.numbered(0, 1)
    values = measured(evaluator, codes).values
    alone = evaluate(evaluator.model(codes[0]), x, y, batch_size=evaluator.chunk)
    return float(values["accuracy"][0]), (alone.loss, alone.accuracy) == (values["loss"][0], values["accuracy"][0])


class _Reader(quantization.CalibrationDataReader):
    """The calibration samples, as ONNX Runtime asks for them."""

    def __init__(self, x: Tensor) -> None:
        self._batches: Iterator[dict[str, Any]] = iter([{INPUT: batch.numpy()} for batch in x.split(64)])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)


def of_onnxruntime(float_file: Path, data: Dataset, calibration: Tensor, method: str) -> float:
    """Test accuracy of the file that ONNX Runtime quantizes, in the better of its two ways to run it."""
    file = float_file.with_name(f"{method}.onnx")
    quantization.quantize_static(
        float_file,
        file,
        _Reader(calibration),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        calibrate_method=getattr(quantization.CalibrationMethod, method),
    )
    return max(accuracy_of(file, data, optimized=optimized) for optimized in (True, False))


def accuracy_of(file: Path, data: Dataset, *, optimized: bool) -> float:
    """Test accuracy of an ONNX file in the form QDQ."""
    session = opened(file, "qdq", optimized=optimized)
    x, y = data.split("test")
    answers = np.concatenate([session.run(None, {INPUT: part.numpy()})[0].argmax(1) for part in x.split(500)])
    return float((answers == y.numpy()).mean())


def float_onnx(model: nn.Module, data: Dataset, folder: Path) -> Path:
    """The float network as ONNX, with its batch norms folded."""
    given, folded = folder / "given.onnx", folder / "float.onnx"
    given.write_bytes(onnx_model(capture(model, data.x["train"][:2]), {}).SerializeToString())
    quant_pre_process(str(given), str(folded), skip_symbolic_shape=True)
    return folded


def main() -> int:
    """Run; 1 where a deployed network is not what was measured."""
    options = parser(__doc__ or "").parse_args()
    warnings.filterwarnings("ignore", module="onnxruntime")
    data, described = images()
    generator = torch.Generator().manual_seed(0)
    train_x = data.x["train"]
    calibration = train_x[torch.randperm(len(train_x), generator=generator)[:CALIBRATION]]
    seeds, epochs = ((0,), 1) if options.quick else ((0, 1, 2), 6)
    rows: list[dict[str, Any]] = []
    differing = 0
    for name in MODELS:
        for seed in seeds:
            model = network(name, data, seed, epochs)
            row: dict[str, Any] = {"model": name, "seed": seed}
            row["float"] = 100 * evaluate(model, *data.split("test")).accuracy
            for rule in RULES:
                accuracy, same = of_bitfront(model, data, calibration, rule)
                row[rule], differing = 100 * accuracy, differing + (not same)
            with tempfile.TemporaryDirectory() as folder:
                file = float_onnx(model, data, Path(folder))
                for method in METHODS:
                    row[f"ORT {method}"] = 100 * of_onnxruntime(file, data, calibration, method)
            rows.append(row)
            print(row, flush=True)
    summary = summed(rows)
    summary["differing_networks"] = differing
    report("int8", rows, summary, options.json, data=described)
    return 1 if differing else 0


def summed(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Per network, in percentage points of the mean over the seeds."""
    summary: dict[str, float] = {}
    for name in MODELS:
        mean = {
            c: float(np.mean([row[c] for row in rows if row["model"] == name]))
            for c in rows[0]
            if c not in ("model", "seed")
        }
        best, other = max(mean[rule] for rule in RULES), max(mean[f"ORT {method}"] for method in METHODS)
        key = name.lower().replace("-", "_")
        summary[f"{key}_below_float"] = mean["float"] - best
        summary[f"{key}_above_onnxruntime"] = best - other
    return summary


if __name__ == "__main__":
    sys.exit(main())
