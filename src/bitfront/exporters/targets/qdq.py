"""ONNX with QuantizeLinear and DequantizeLinear, which runtimes and compilers fuse into fast integer kernels."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from bitfront.errors import ExportError
from bitfront.exporters.onnx import INPUT, OPSET, OUTPUT, Form, onnx_model
from bitfront.exporters.packing import packing
from bitfront.exporters.sessions import PRECISE
from bitfront.exporters.targets import TARGETS
from bitfront.exporters.targets.base import Candidate
from bitfront.exporters.targets.onnx import Onnx
from bitfront.graph.capture import parameter
from bitfront.transforms.correct import bias_in_steps, step_of_sums


@TARGETS.register("qdq")
class Qdq(Onnx):
    """ONNX in the form that runtimes fuse into integer kernels: fast, and approximate."""

    judge = "ONNX Runtime, with its default optimizations"
    form: ClassVar[Form] = "qdq"

    def check(self, candidate: Candidate) -> None:
        """Raises ExportError for an activation with a scale per channel, which runtimes do not fuse, or run."""
        super().check(candidate)
        for site in candidate.graph.sites:
            for operand, rounding in candidate.formats.get(site.name, {}).items():
                held = packing(rounding, activation=True)
                flows = site.operand(operand).role in ("activation", "result")
                if flows and held is not None and held.axis is not None:
                    raise ExportError(
                        f"{site.title}: {operand} is {rounding.label}, with a scale per channel, which runtimes do not "
                        "fuse; search one per tensor for it"
                    )

    def exact(self, candidate: Candidate) -> bool:  # noqa: ARG002
        """Never: runtimes round once more where they fuse."""
        return False

    def write(self, candidate: Candidate, folder: Path) -> None:
        """NAME.onnx."""
        model = onnx_model(candidate.graph, candidate.formats, "qdq")
        (folder / f"{candidate.name}.onnx").write_bytes(model.SerializeToString())

    def figures(self, candidate: Candidate) -> dict[str, float]:
        """How many biases runtimes round once more."""
        return {"biases_rounded_again": len(rounded_again(candidate))}

    def usage(self, candidate: Candidate) -> str:
        """How to run it."""
        again = rounded_again(candidate)
        biases = (
            f"Runtimes round these biases once more, because they are no multiples of the step of the sums: "
            f"{', '.join(again)}. A search with `integer_bias = true` and without `bias_width` evaluates what runtimes "
            "compute.\n"
        )
        return f"""
```python
import onnxruntime

options = onnxruntime.SessionOptions()
options.add_session_config_entry({PRECISE[0]!r}, {PRECISE[1]!r})  # exact on x86 without VNNI too
session = onnxruntime.InferenceSession("{candidate.name}.onnx", options, providers=["CPUExecutionProvider"])
outputs = session.run(None, {{"{INPUT}": x}})[0]     # x: float32, any batch
```

Opset {OPSET}, input `{INPUT}`, output `{OUTPUT}`. Operands are rounded by QuantizeLinear and DequantizeLinear, which
ONNX Runtime fuses with the layers between them; compilers such as TensorRT and OpenVINO read the same form. A runtime
rounds biases and outputs of layers in its own way, so outputs differ a little from those that were searched; the target
`onnx` has them exactly. Without the setting above, x86 processors without VNNI add products of bytes in 16 bits, which
saturate, and outputs are far off. It is fast where batch norms are folded (`fold_batch_norm = true`), outputs of layers
and both inputs of additions have formats of 8 bits, and biases are those of integer kernels (`[search.calibration]
integer_bias = true`).
{biases if again else ""}"""


def rounded_again(candidate: Candidate) -> list[str]:
    """The layers whose bias runtimes round once more where they fuse: it has values that are no multiples of the step
    of the sums."""
    titles = []
    for site in candidate.graph.sites:
        formats = candidate.formats.get(site.name, {})
        step = step_of_sums(site, formats) if site.bias is not None else None
        if step is None or site.bias is None:
            continue
        bias = parameter(candidate.graph.model, site.bias).detach()
        bias = formats["bias"].quantize(bias) if "bias" in formats else bias
        if not torch.equal(bias_in_steps(bias, step)[0], bias):
            titles.append(site.title)
    return titles
