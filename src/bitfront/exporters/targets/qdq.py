"""ONNX with QuantizeLinear and DequantizeLinear, which runtimes and compilers fuse into fast integer kernels."""

from __future__ import annotations

from pathlib import Path

from bitfront.errors import ExportError
from bitfront.exporters.onnx import INPUT, OPSET, OUTPUT, onnx_model
from bitfront.exporters.packing import packing
from bitfront.exporters.sessions import PRECISE
from bitfront.exporters.targets import TARGETS
from bitfront.exporters.targets.base import Candidate
from bitfront.exporters.targets.onnx import Onnx


@TARGETS.register("qdq")
class Qdq(Onnx):
    """ONNX in the form that runtimes fuse into integer kernels: fast, and approximate."""

    judge = "ONNX Runtime, with its default optimizations"
    form = "qdq"

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
        model = onnx_model(candidate.graph, candidate.formats, self.form)
        (folder / f"{candidate.name}.onnx").write_bytes(model.SerializeToString())

    def usage(self, candidate: Candidate) -> str:
        """How to run it."""
        return f"""
```python
import onnxruntime

options = onnxruntime.SessionOptions()
options.add_session_config_entry{PRECISE}  # for x86 without VNNI
session = onnxruntime.InferenceSession("{candidate.name}.onnx", options, providers=["CPUExecutionProvider"])
outputs = session.run(None, {{"{INPUT}": x}})[0]     # x: float32, any batch
```

Opset {OPSET}, input `{INPUT}`, output `{OUTPUT}`. Operands are rounded by QuantizeLinear and DequantizeLinear, which
ONNX Runtime fuses with the layers between them; compilers such as TensorRT and OpenVINO read the same form. A runtime
rounds biases and outputs of layers in its own way, so outputs differ a little from those that were searched; the target
`onnx` has them exactly. It is fast where batch norms are folded (`fold_batch_norm = true`), outputs of layers and both
inputs of additions have formats of 8 bits, and biases are those of integer kernels (`[search.calibration]
integer_bias = true`).

Without the entry, sums of bytes saturate on x86 processors that have AVX2 or AVX-512 and no VNNI, and the file answers
otherwise. On all other processors it changes nothing.
"""
