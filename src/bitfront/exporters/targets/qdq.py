"""ONNX with QuantizeLinear and DequantizeLinear, which runtimes and compilers fuse into fast integer kernels."""

from __future__ import annotations

from dataclasses import replace
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
from bitfront.transforms import quantize
from bitfront.transforms.correct import Correction, bias_in_steps, corrected, has_bias, step_of_sums


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

    def suited(self, candidate: Candidate) -> Candidate:
        """With biases in the steps of the sums that they are added to: runtimes hold them so where they fuse."""
        graph, formats = candidate.graph, dict(candidate.formats)
        changes: dict[str, Correction] = {}
        for site in graph.sites:
            held = formats.get(site.name, {})
            step = step_of_sums(site, held)
            if step is None or site.bias is None or not has_bias(graph, site):
                continue
            bias = parameter(graph.model, site.bias).detach()
            searched = held["bias"].quantize(bias) if "bias" in held else bias
            rounded, _ = bias_in_steps(searched, step)
            if not torch.equal(rounded, searched):
                changes[site.name] = Correction(rounded)
                formats[site.name] = {operand: form for operand, form in held.items() if operand != "bias"}
        if not changes:
            return candidate
        graph = corrected(graph, changes)
        biases = "1 bias" if len(changes) == 1 else f"{len(changes)} biases"
        return replace(
            candidate, graph=graph, formats=formats, model=quantize(graph, formats, bake=True),
            change=f"{biases} rounded to steps of the sums, as runtimes hold them",
            changed=[graph.site(name).title for name in changes],
        )  # fmt: skip

    def exact(self, candidate: Candidate) -> bool:  # noqa: ARG002
        """Never: runtimes round once more where they fuse."""
        return False

    def write(self, candidate: Candidate, folder: Path) -> None:
        """NAME.onnx."""
        model = onnx_model(candidate.graph, candidate.formats, "qdq")
        (folder / f"{candidate.name}.onnx").write_bytes(model.SerializeToString())

    def usage(self, candidate: Candidate) -> str:
        """How to run it."""
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
rounds outputs of layers in its own way, so outputs may differ a little from those that were searched; the target
`onnx` has them exactly. Without the setting above, x86 processors without VNNI add products of bytes in 16 bits, which
saturate, and outputs are far off. It is fast where batch norms are folded (`fold_batch_norm = true`), outputs of layers
and both inputs of additions have formats of 8 bits, and biases are those of integer kernels (`[search.calibration]
integer_bias = true`).
"""
