"""Sessions of ONNX Runtime: how a file is opened for a form, so that its numbers are those that are written in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitfront.errors import require
from bitfront.exporters.onnx_tensors import Form

#: On x86 processors without VNNI, ONNX Runtime adds two products of bytes in 16 bits, which saturate, unless this
#: setting makes it take wider sums there. It changes nothing elsewhere. Files of the form ``integer`` do without it.
PRECISE = ("session.x64quantprecision", "1")


def opened(model: bytes | Path, form: Form, *, optimized: bool = True, threads: int | None = None) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU.

    Args:
        model: the file, or its content.
        form: of the model; ``qdq`` gets the setting ``PRECISE``.
        optimized: whether ONNX Runtime makes its default optimizations, else none.
        threads: how many compute; None: as many as it takes.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    runtime: Any = require("onnxruntime", "onnx", "running an ONNX file")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    levels = runtime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    if form == "qdq":
        options.add_session_config_entry(*PRECISE)
    if threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    given = model if isinstance(model, bytes) else str(model)
    return runtime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
