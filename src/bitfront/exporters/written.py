"""An ONNX file that was read back: what ONNX Runtime computes of it, beside what the deployed model computes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront.errors import ExportError, parsing, require
from bitfront.exporters.onnx import INPUT, Form, SiteFormats, onnx_model
from bitfront.exporters.sessions import session_options
from bitfront.graph import Graph
from bitfront.transforms import quantize

#: How far two values of outputs may be apart to be alike, as a share of the largest output.
NEAR = 1e-4


@dataclass(frozen=True)
class OnnxFile:
    """A file, and how it compares with the deployed model on the samples that were given.

    Attributes:
        samples: how many were compared.
        alike: for how many the answer is the same: the largest output, or all values.
        difference: the largest difference between two outputs, absolute.
    """

    path: Path
    form: Form
    samples: int
    alike: int
    difference: float

    @property
    def message(self) -> str:
        """What was compared with what, and what came out."""
        kind = "" if self.form == "integer" else ", an approximate form"
        return (
            f"{self.path} (form {self.form}{kind}): read back with ONNX Runtime and compared with the deployed model "
            f"on {self.samples:,} samples: {self.alike:,} of {self.samples:,} answers alike, outputs differ by at most "
            f"{self.difference:.3g}"
        )


def write_onnx(
    graph: Graph,
    formats: Mapping[str, SiteFormats],
    path: str | Path,
    x: Tensor,
    *,
    model: nn.Module | None = None,
    form: Form = "integer",
    may_differ: int = 0,
    answers: Literal["largest", "values"] = "largest",
) -> OnnxFile:
    """Write an ONNX file, read it back, and compare it with the deployed model.

    In the form ``integer`` the file must answer as the deployed model does, or it is not written. With sums in float32,
    which depend on their order, a sample may lie so close between two classes, or a value between two steps, that it
    does not; `may_differ` accepts some of these.

    Args:
        graph, formats, form: as in ``onnx_model``.
        path: the file; what is there is overwritten, once the new file was read back.
        x: samples to compare on, float32 of shape (samples, *features), on the CPU; at least one.
        model: the deployed model, e.g. ``Transformed.model``; default: the graph in these formats.
        may_differ: for how many samples the file may answer otherwise, 0 or more; the form ``qdq``, which is
            approximate, for all.
        answers: what an answer is: the largest output, as in a classification, or the values of all outputs, as in a
            regression. Outputs that are no classes (one column, pixels, tokens) are compared by their values anyway.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
        ExportError: as ``onnx_model``; there are no samples, ONNX Runtime refuses the model or answers otherwise, or
            the file cannot be written.
    """
    runtime: Any = require("onnxruntime", "onnx", "reading an ONNX file back")
    if not len(x):
        raise ExportError("there are no samples to compare the ONNX file on; give at least one")
    written = onnx_model(graph, formats, form).SerializeToString()
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(written)
        with parsing(ExportError, f"{path}: not written: ONNX Runtime does not run the model", "try another form"):
            options = session_options(runtime, form)
            session = runtime.InferenceSession(str(part), options, providers=["CPUExecutionProvider"])
            computed = session.run(None, {INPUT: x.numpy()})[0]
        with torch.no_grad():
            expected = (quantize(graph, formats) if model is None else model)(x.clone()).numpy()
        alike = _alike(computed, expected, answers)
        difference, others = float(np.abs(computed - expected).max()), len(x) - alike
        if form == "integer" and others > may_differ:
            raise ExportError(
                f"{path}: not written: ONNX Runtime answers otherwise than the deployed model for {others:,} of "
                f"{len(x):,} samples; outputs differ by at most {difference:.3g}. Where these are sums in float32 in "
                f"another order, fixed-point formats for every operand avoid them, or may_differ={others} accepts them"
            )
        os.replace(part, path)  # noqa: PTH105 (as atomic as the system has it)
    except OSError as error:
        raise ExportError(f"{path}: the file cannot be written: {error.strerror}; choose another path") from None
    finally:
        part.unlink(missing_ok=True)
    return OnnxFile(path, form, len(x), alike, difference)


def _alike(computed: NDArray[np.float32], expected: NDArray[np.float32], answers: str) -> int:
    """For how many samples two outputs are the same answer."""
    if answers == "largest" and expected.ndim == 2 and expected.shape[1] > 1:
        return int((computed.argmax(1) == expected.argmax(1)).sum())
    near = np.abs(computed - expected) <= NEAR * np.abs(expected).max()
    return int(near.reshape(len(near), -1).all(axis=1).sum())
