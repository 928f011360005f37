"""QONNX: an ONNX file whose Quant nodes say how each value is rounded, for FINN, hls4ml and what else reads it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bitfront.errors import ExportError, parsing, require
from bitfront.exporters.fixed import placed
from bitfront.exporters.oracle import as_floats
from bitfront.exporters.program import Floats, Value
from bitfront.exporters.qonnx_graph import qonnx_model
from bitfront.exporters.qonnx_parts import INPUT, IR, OPSET, OUTPUT
from bitfront.exporters.targets import TARGETS
from bitfront.exporters.targets.base import Candidate, Target, TargetSettings, without_floats

#: Numbers of the largest tensor that the judge holds at a time.
_AT_A_TIME = 2**24
#: Samples that the judge runs at a time, at most.
_CHUNK = 1024


class QonnxSettings(TargetSettings):
    """Settings of the target qonnx."""

    layout: Literal["channels_first", "channels_last"] = Field(
        "channels_first",
        description="where channels lie: as in torch and ONNX, or behind, as FINN and hls4ml compute; then a sequence "
        "is an image of height 1",
    )


@TARGETS.register("qonnx")
class Qonnx(Target):
    """QONNX: an ONNX file with Quant nodes, for FINN, hls4ml and other compilers for FPGAs."""

    Settings = QonnxSettings
    settings: QonnxSettings
    judge = "the qonnx executor"

    @property
    def _last(self) -> bool:
        return self.settings.layout == "channels_last"

    def check(self, candidate: Candidate) -> None:
        """Raises ExportError for floats and for steps without such a form, MissingExtraError without qonnx."""
        require("qonnx", "qonnx", "the target qonnx")
        qonnx_model(without_floats(candidate, "qonnx"), candidate.name, self._last)

    def write(self, candidate: Candidate, folder: Path) -> None:
        """NAME.onnx."""
        model = qonnx_model(candidate.program, candidate.name, self._last).model
        (folder / f"{candidate.name}.onnx").write_bytes(model.SerializeToString(deterministic=True))

    def computed(self, candidate: Candidate, folder: Path, x: Floats) -> NDArray[Any]:
        """What the qonnx executor makes of the file."""
        onnx: Any = require("onnx", "qonnx", "the target qonnx")
        wrapper: Any = require("qonnx.core.modelwrapper", "qonnx", "the target qonnx")
        executor: Any = require("qonnx.core.onnx_exec", "qonnx", "the target qonnx")
        with parsing(ExportError, "the qonnx executor refuses the file", "please report this"), suited(onnx):
            model = onnx.load(folder / f"{candidate.name}.onnx")
            shapes = [info.type.tensor_type.shape for info in (*model.graph.value_info, *model.graph.input)]
            largest = max(int(np.prod([d.dim_value for d in shape.dim])) for shape in shapes)
            chunk = max(1, min(_CHUNK, _AT_A_TIME // largest))
            parts = []
            for at in range(0, len(x), chunk):
                samples = np.stack([placed(sample, self._last) for sample in x[at : at + chunk]])
                _set_batch(model.graph, len(samples))
                parts.append(executor.execute_onnx(wrapper.ModelWrapper(model), {INPUT: samples})[OUTPUT])
        return as_numbers(candidate.program.result, np.concatenate(parts), self._last)

    def usage(self, candidate: Candidate) -> str:
        """How to read and run the file."""
        value = candidate.program.result
        given, taken = (
            (1, *placed(np.empty(shape, np.bool_), self._last).shape)
            for shape in (candidate.program.input_shape, value.shape)
        )
        behind = " Channels are last." if self._last else ""
        return f"""
`{candidate.name}.onnx`: opset {OPSET}, IR version {IR}, `Quant` nodes of the domain `qonnx.custom_op.general`. The
input is `{INPUT}`, float32 {given}; the output is `{OUTPUT}`, float32 {taken}: the values that the whole numbers stand
for.{behind} The batch is 1; `qonnx.transformation.change_batchsize` changes it.
ONNX Runtime must know the version of the file format that the package onnx writes, as 1.32 does with onnx 1.23.

```python
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx

output = execute_onnx(ModelWrapper("{candidate.name}.onnx"), {{"{INPUT}": x}})["{OUTPUT}"]
```

Zero points are 0 and roundings are half to even, unless a format says otherwise. Bits of each value, as learned bits
have them, are a scale for each value, with `Max` and `Min` before the `Quant` node.
"""


def as_numbers(value: Value, floats: NDArray[np.float32], channels_last: bool = False) -> NDArray[Any]:
    """The whole numbers that values stand for; what is no such value stays as it is, and so equals none.

    Args:
        value: what they are.
        floats: float32, shape (samples, *dimensions), as they lie.
        channels_last: whether their channels are the last dimension.

    Returns:
        float64, shape (samples, *value.shape).
    """
    if channels_last and len(value.shape) > 1:
        floats = np.moveaxis(floats, -1, 1)
    floats = floats.reshape(len(floats), *value.shape)
    scaled = np.ldexp(floats.astype(np.float64), value.point)
    if value.divisor == 1:
        return scaled
    whole = np.rint(scaled * value.divisor)
    return np.where(as_floats(value, whole) == floats, whole, scaled)


@contextmanager
def suited(onnx: Any) -> Iterator[None]:
    """Lets the executor hand its nodes to ONNX Runtime in an old version of the file format, and without warnings. It
    takes the newest that the package onnx has, which ONNX Runtime often cannot read yet."""
    runtime: Any = require("onnxruntime", "qonnx", "the target qonnx")
    helper, made = onnx.helper, onnx.helper.make_model
    helper.make_model = lambda graph, **settings: made(graph, **{"ir_version": IR, **settings})
    runtime.set_default_logger_severity(3)
    try:
        yield
    finally:
        helper.make_model = made
        runtime.set_default_logger_severity(2)


def _set_batch(graph: Any, samples: int) -> None:
    """Set the number of samples of every tensor that has some."""
    batched = {INPUT}
    for node in graph.node:
        if batched & {*node.input}:
            batched |= {*node.output}
    for info in (*graph.input, *graph.value_info, *graph.output):
        if info.name in batched:
            info.type.tensor_type.shape.dim[0].dim_value = samples
