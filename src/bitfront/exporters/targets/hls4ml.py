"""hls4ml: a project for high-level synthesis with the type of every layer, judged by compiling its C++ with g++."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bitfront.errors import ExportError, parsing, require
from bitfront.exporters.fixed import Fixed, input_type, offset_of, placed, types_of
from bitfront.exporters.program import Cut, Floats, Pool, Product, Program
from bitfront.exporters.qonnx_graph import Written, qonnx_model
from bitfront.exporters.qonnx_parts import INPUT
from bitfront.exporters.targets import TARGETS
from bitfront.exporters.targets.base import Candidate, Target, TargetSettings, without_floats
from bitfront.exporters.targets.qonnx import as_numbers

#: The folder of the project, and the file of the types.
PROJECT, CONFIGURATION = "project", "hls4ml_config.json"
#: Nodes that take weights.
_WEIGHTED = ("MatMul", "Conv")
#: Seconds after which a compiler or a program is taken to hang.
_PATIENCE = 3600
#: A type that no layer may have: hls4ml gives it to layers whose types are not stated.
_UNSTATED = "model_default_t"


class Hls4mlSettings(TargetSettings):
    """Settings of the target hls4ml."""

    backend: Literal["Vitis", "Vivado"] = Field("Vitis", description="what the C++ is for")
    part: str = Field("xcvu13p-flga2577-2-e", description="the FPGA")
    clock_period: float = Field(5.0, gt=0, description="of the clock, in ns")
    reuse_factor: int = Field(1, ge=1, description="how many products one multiplier computes, one after the other")
    strategy: Literal["Latency", "Resource"] = Field(
        "Latency", description="whether layers are unrolled, or multipliers are used again"
    )
    io_type: Literal["io_parallel", "io_stream"] = Field(
        "io_parallel", description="whether the values of a sample come at once, or one after the other"
    )


@TARGETS.register("hls4ml")
class Hls4ml(Target):
    """hls4ml: a project for high-level synthesis on FPGAs, with the type of every layer stated."""

    Settings = Hls4mlSettings
    settings: Hls4mlSettings
    judge = "hls4ml's emulation in C++"
    notice = "; g++ compiles the project first, which takes from ten seconds to minutes"

    def check(self, candidate: Candidate) -> None:
        """Raises ExportError for what hls4ml has no exact form of; MissingExtraError without hls4ml."""
        require("hls4ml", "hls4ml", "the target hls4ml")
        program = without_floats(candidate, "hls4ml")
        _check_steps(program)
        if self.settings.io_type == "io_stream" and any(len(value.shape) > 1 for value in program.values):
            raise ExportError("hls4ml computes other numbers for convolutions with io_stream; take io_type=io_parallel")
        if shutil.which("g++") is None:
            raise ExportError("there is no g++ to judge the files; install g++")
        qonnx_model(program, candidate.name, channels_last=True, for_hls=True)

    def write(self, candidate: Candidate, folder: Path) -> None:
        """NAME.onnx, the types of all layers, and the project."""
        hls4ml: Any = require("hls4ml", "hls4ml", "the target hls4ml")
        written = qonnx_model(candidate.program, candidate.name, channels_last=True, for_hls=True)
        (folder / f"{candidate.name}.onnx").write_bytes(written.model.SerializeToString(deterministic=True))
        configuration = self._configuration(candidate.program, written)
        (folder / CONFIGURATION).write_text(json.dumps(configuration, indent=2) + "\n", encoding="utf-8")
        chosen = self.settings
        printed = io.StringIO()
        with (
            parsing(ExportError, "hls4ml refuses the network", "the target c takes every network of whole numbers"),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            model = hls4ml.converters.convert_from_onnx_model(
                written.model, str(folder / PROJECT), candidate.name, backend=chosen.backend, part=chosen.part,
                clock_period=chosen.clock_period, io_type=chosen.io_type, hls_config=configuration,
            )  # fmt: skip
            model.write()
        _check_types(model)
        # It holds the same again, and where it was written.
        (folder / PROJECT / "hls4ml_config.yml").unlink(missing_ok=True)

    def _configuration(self, program: Program, written: Written) -> dict[str, Any]:
        """What hls4ml is told: a type for the input, and for the result, sums and constants of every layer."""
        kind, rounds = input_type(program)
        behaviour = "RND_CONV,SAT" if rounds else "TRN,SAT"
        layers: dict[str, dict[str, str]] = {INPUT: {"result": _typed(kind, behaviour)}}
        kinds = {node.name: node.op_type for node in written.model.graph.node}
        held_types = types_of(program)
        for name, result in written.types.items():
            number = written.numbers[name]
            held = layers[name] = {"result": _typed(result)}
            if kinds[name] == "MatMul":
                follower = offset_of(program, number) if isinstance(program.steps[number], Product) else None
                sums = result if follower is None else result.beside(held_types[follower])
                # hls4ml adds a bias to the sums only where their type is left to it: that of the sums with the bias.
                held |= {"result": held["result"] if follower is None else "auto", "accum": _typed(sums)}
            elif kinds[name] == "Conv":
                # Its type is that of the sums with the bias.
                held["accum"] = _typed(result.beside(held_types[number]))
            elif kinds[name] == "MaxPool":
                held["accum"] = held["result"]
            if kinds[name] in _WEIGHTED:
                held["bias"] = "ufixed<1,1>"
        return {
            "Model": {
                "Precision": {"default": "fixed<16,6>"},
                "ReuseFactor": self.settings.reuse_factor,
                "Strategy": self.settings.strategy,
            },
            "LayerName": {name: {"Precision": types} for name, types in layers.items()},
        }

    def computed(self, candidate: Candidate, folder: Path, x: Floats) -> NDArray[Any]:
        """What the project computes, compiled with g++."""
        place = (folder / PROJECT).absolute()
        before = set(place.rglob("*"))
        given = np.stack([placed(sample, True) for sample in x]).astype(np.float32)
        value = candidate.program.result
        shape = placed(np.empty(value.shape, np.bool_), True).shape
        try:
            _run(["bash", "build_lib.sh"], place, b"", "g++ refuses the project")
            libraries = sorted(place.rglob("*.so"))
            if len(libraries) != 1:
                raise ExportError("hls4ml's build_lib.sh has made no library of the project; please report this")
            sizes = [str(int(np.prod(given.shape[1:]))), str(int(np.prod(shape)))]
            command = [sys.executable, "-c", _CALL, str(libraries[0]), f"{candidate.name}_float", *sizes]
            out = _run(command, place, given.tobytes(), "the compiled project failed")
        finally:
            for path in sorted(set(place.rglob("*")) - before, reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        return as_numbers(value, np.frombuffer(out, np.float32).reshape(len(x), *shape), True)

    def usage(self, candidate: Candidate) -> str:
        """How to synthesise it, and how to change it."""
        chosen = self.settings
        call = (
            f'backend="{chosen.backend}", part="{chosen.part}", clock_period={chosen.clock_period:g}, '
            f'io_type="{chosen.io_type}"'
        )
        tool = (
            "vitis-run --mode hls --tcl build_prj.tcl" if chosen.backend == "Vitis" else "vivado_hls -f build_prj.tcl"
        )
        channels = (
            " Channels are last in the input and in the output." if len(candidate.program.input_shape) > 1 else ""
        )
        return f"""
`{PROJECT}/` is a project of hls4ml for {chosen.backend}: `cd {PROJECT} && {tool}` synthesises it. The values come and
go as fixed-point numbers, whose types `{PROJECT}/firmware/defines.h` has.{channels}

`{candidate.name}.onnx` is the network as QONNX, and `{CONFIGURATION}` has the type of every layer. The project again,
perhaps with other settings:

```python
import json
import hls4ml, onnx

model = hls4ml.converters.convert_from_onnx_model(
    onnx.load("{candidate.name}.onnx"), "project", "{candidate.name}", hls_config=json.load(open("{CONFIGURATION}")),
    {call},
)
model.write()
```

`reuse_factor` and `strategy` are in `{CONFIGURATION}`. No synthesis has been run: resources and timing are not known.
"""


def _typed(kind: Fixed, behaviour: str = "") -> str:
    """A type as hls4ml writes it."""
    return f"{'' if kind.signed else 'u'}fixed<{kind.bits},{kind.whole}{',' if behaviour else ''}{behaviour}>"


def _check_steps(program: Program) -> None:
    """Raises ExportError for steps that hls4ml has no exact form of."""
    for step, value in zip(program.steps, program.values, strict=True):
        why = ""
        if isinstance(step, Cut):
            why = "its sums have more than 24 bits, which float32 cuts and hls4ml does not; take formats of fewer bits"
        elif value.divisor != 1:
            why = f"it is a mean of values whose number is {value.divisor} times a power of two, which hls4ml cuts"
        elif isinstance(step, Pool) and set(step.window.dilation) != {1}:
            why = "hls4ml ignores the dilation of a pool"
        elif isinstance(step, Product) and step.window is None and len(value.shape) > 1:
            why = "a linear layer over the last of several dimensions is not written for hls4ml"
        if why:
            raise ExportError(f"{value.name}: {why}")


def _check_types(model: Any) -> None:
    """Raises ExportError if a layer has a type that nobody has stated."""
    unstated = [
        f"{layer.name} ({layer.class_name})"
        for layer in model.get_layers()
        if any(kind.name == _UNSTATED for kind in layer.types.values())
    ]
    if unstated:
        raise ExportError(f"hls4ml gives {unstated[0]} a default type; please report this")


def _run(command: list[str], place: Path, given: bytes, what: str) -> bytes:
    try:
        done = subprocess.run(command, cwd=place, input=given, capture_output=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise ExportError(f"{what}: it took more than {_PATIENCE} s") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines()
        wrong = [line for line in lines if "error" in line] or lines[-5:]
        raise ExportError(f"{what}: {'; '.join(wrong)[:600]}")
    return done.stdout


#: Calls a compiled project once for each sample on standard input. It may crash, so it has a process to itself.
_CALL = """
import ctypes, sys
import numpy as np
library, function, inputs, outputs = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
call = getattr(ctypes.CDLL(library), function)
kind = np.ctypeslib.ndpointer(ctypes.c_float, flags="C_CONTIGUOUS")
call.restype, call.argtypes = None, [kind, kind]
x = np.frombuffer(sys.stdin.buffer.read(), np.float32).reshape(-1, inputs)
y = np.zeros((len(x), outputs), np.float32)
for sample, result in zip(x, y):
    call(np.ascontiguousarray(sample), result)
sys.stdout.buffer.write(y.tobytes())
"""
