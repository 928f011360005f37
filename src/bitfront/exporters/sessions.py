"""The options with which ONNX files are run here.

On x86 processors with AVX2 or AVX-512 and without VNNI, ONNX Runtime's kernels for products of uint8 and int8 add two
of them in 16 bits, which saturates: 255 · 127 · 2 is more than 32,767. Files of 8-bit weights then compute another
network (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html#when-and-why-do-i-need-to-try-u8u8).
The form ``integer`` has uint8 weights there, for which there are other kernels. The form ``qdq`` has int8, which
compilers ask for; with the entry ``PRECISE`` a session on such a processor makes uint8 of them. On all other
processors it changes nothing.
"""

from __future__ import annotations

from typing import Any

#: An entry of the configuration of a session: its key and value.
PRECISE = ("session.x64quantprecision", "1")


def session_options(runtime: Any, form: str) -> Any:
    """Options of a session: warnings are not printed, and sums of products of bytes do not saturate.

    Args:
        runtime: the module onnxruntime.
        form: of the file. All but ``qdq`` get a default session beside, so that what is compared is what users run.
    """
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if form == "qdq":
        options.add_session_config_entry(*PRECISE)
    return options
