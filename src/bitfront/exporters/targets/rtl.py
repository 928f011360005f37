"""Verilog by alkaid, without multipliers: judged by its bit-exact interpreter, and by a Verilog simulator."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bitfront.errors import ExportError, require
from bitfront.exporters import circuit, fabric, oracle
from bitfront.exporters.program import Floats, Int, Program
from bitfront.exporters.targets import TARGETS
from bitfront.exporters.targets.base import Candidate, Target, TargetSettings, without_floats

#: Rows that a simulator computes; the interpreter computes all.
SIMULATED = 1000
#: Vectors that are written beside the testbench.
VECTORS = 64
#: Seconds after which a simulator is taken to hang.
_PATIENCE = 1800


class RtlSettings(TargetSettings):
    """Settings of the target rtl."""

    latency_cutoff: float = Field(
        0.0,
        ge=0,
        description="longest path between registers, an adder being about 1.1; 0: no registers",
    )
    simulator: Literal["auto", "iverilog", "verilator"] = Field(
        "auto", description="what runs the Verilog; 'auto' is iverilog, or verilator where that is not installed"
    )


@TARGETS.register("rtl")
class Rtl(Target):
    """Verilog without multipliers, combinational or pipelined, with a testbench and vectors."""

    Settings = RtlSettings
    settings: RtlSettings
    judge = "alkaid's interpreter and a Verilog simulator"

    def __init__(self, settings: TargetSettings | None = None) -> None:
        super().__init__(settings)
        self._figures: dict[str, float] = {}

    def check(self, candidate: Candidate) -> None:
        """Raises ExportError for what logic cannot compute, or if there is no simulator."""
        fabric.check_installed("the target rtl")
        circuit.check(without_floats(candidate, "rtl"))
        self._simulator()

    def write(self, candidate: Candidate, folder: Path) -> None:
        """src/*.v, the same logic as model/comb.json.gz, testbench.v, and vectors."""
        program = without_floats(candidate, "rtl")
        logic = circuit.laid_out(program)
        cutoff = self.settings.latency_cutoff
        codegen: Any = require("alkaid.codegen", fabric.EXTRA, "the target rtl")
        model = codegen.RTLModel(
            logic, folder, candidate.name, "verilog", latency_cutoff=cutoff or -1.0, print_latency=False
        )
        model.write()
        shutil.rmtree(folder / "sim")  # alkaid's binder; the testbench is ours
        registers = int(model.latency) + 1 if cutoff else 0
        layout = {
            "inputs": _fields(model._comb.inp_qint),
            "outputs": _fields(model._comb.out_qint),
            "registers": registers,
        }
        (folder / "ports.json").write_text(json.dumps(layout, indent=1) + "\n", encoding="utf-8")
        (folder / "testbench.v").write_text(_testbench(candidate.name, layout), encoding="utf-8")
        _write_vectors(program, layout, folder / "vectors")
        self._figures = {
            "luts_by_alkaid": round(model._comb.cost),
            "depth_adders": round(float(model._comb.latency[1]), 1),
            "registers_bits": float(model.reg_bits),
            "clocks_of_latency": float(registers),
        }

    def computed(self, candidate: Candidate, folder: Path, x: Floats) -> NDArray[Any]:
        """What the interpreter computes of the saved logic; the Verilog must give the same on the first rows."""
        types: Any = require("alkaid.types", fabric.EXTRA, "the target rtl")
        logic = types.CombLogic.load(folder / "model" / "comb.json.gz")
        numbers = circuit.numbers_in(candidate.program, x)
        outputs: Int = logic.predict(numbers.astype(np.float64), n_threads=1).astype(np.int64)
        simulated = self._simulated(candidate, folder, numbers[:SIMULATED])
        differing = int((simulated != outputs[: len(simulated)]).any(axis=1).sum())
        if differing:
            raise ExportError(
                f"the Verilog gives other numbers than the logic that it was made of, on {differing} of "
                f"{len(simulated)} samples; please report this"
            )
        return outputs.reshape(len(x), *candidate.program.result.shape)

    def _simulator(self) -> str:
        wanted = self.settings.simulator
        names = ("iverilog", "verilator") if wanted == "auto" else (wanted,)
        found = next((name for name in names if shutil.which(name)), None)
        if found is None:
            raise ExportError(
                f"there is no {' or '.join(names)} to run the Verilog; install one (Debian: apt-get install iverilog)"
            )
        return found

    def _simulated(self, candidate: Candidate, folder: Path, numbers: Int) -> Int:
        layout = json.loads((folder / "ports.json").read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory() as place:
            build, given, got = Path(place), Path(place, "in.hex"), Path(place, "out.hex")
            given.write_text(_hex(numbers, layout["inputs"]), encoding="ascii")
            command = _built(self._simulator(), candidate.name, folder.absolute(), build)
            _run([*command, f"+inputs={given}", f"+outputs={got}"], build)
            lines = got.read_text(encoding="ascii").split()
        if len(lines) != len(numbers) or any(set(line) & set("xzXZ") for line in lines):
            raise ExportError("the Verilog simulator gives no number for some samples")
        return _read(lines, layout["outputs"])

    def usage(self, candidate: Candidate) -> str:
        """How to use the Verilog."""
        name, program = candidate.name, candidate.program
        simulator = "iverilog -g2012 -o sim testbench.v $(find src -name '*.v' ! -name '*_wrapper.v') && vvp sim"
        return f"""
The module `{name}` in `src/` takes all inputs in `model_inp` and gives all outputs in `model_out`. Numbers lie side by
side, the first one in the lowest bits; `ports.json` has the lowest bit, the width, the sign and the binary point of
each. A number is two's complement; with `point` p its bits stand for bits · 2^-p. With registers there is a clock,
`clk`: a sample enters with every clock.

{_meaning(program)}

`testbench.v` runs the vectors in `vectors/` and says how many outputs differ:
`{simulator} +inputs=vectors/inputs.hex +expected=vectors/outputs.hex`. `model/comb.json.gz` is the logic that the
Verilog was made of, for {fabric.version()}; `build_vivado_prj.tcl` is its script for Vivado, and was not run.
"""

    def figures(self, candidate: Candidate) -> dict[str, float]:  # noqa: ARG002
        """Look-up tables and depth as alkaid estimates them, and what registers there are."""
        return dict(self._figures)


def _fields(intervals: Iterable[Any]) -> list[dict[str, int]]:
    """Where each number of a port is."""
    fields, bit = [], 0
    for interval in intervals:
        sign, whole, fraction = (int(number) for number in interval.kif)
        bits = max(0, sign + whole + fraction) if interval.min != interval.max or interval.min else 0
        fields.append({"bit": bit, "bits": bits, "signed": sign, "point": fraction})
        bit += bits
    return fields


def _width(fields: Sequence[dict[str, int]]) -> int:
    return max(1, sum(field["bits"] for field in fields))


def _hex(numbers: Int, fields: Sequence[dict[str, int]]) -> str:
    """A line per sample: all its numbers as one of Verilog's."""
    digits = -(-_width(fields) // 4)
    lines = []
    for row in numbers.tolist():
        word = 0
        for number, field in zip(row, fields, strict=True):
            code = number << field["point"] if field["point"] >= 0 else number >> -field["point"]
            word |= (code & ((1 << field["bits"]) - 1)) << field["bit"]
        lines.append(f"{word:0{digits}x}\n")
    return "".join(lines)


def _read(lines: Sequence[str], fields: Sequence[dict[str, int]]) -> Int:
    """The opposite, int64 of shape (samples, numbers)."""
    numbers = np.zeros((len(lines), len(fields)), dtype=np.int64)
    for row, line in zip(numbers, lines, strict=True):
        word = int(line, 16)
        for i, field in enumerate(fields):
            code = (word >> field["bit"]) & ((1 << field["bits"]) - 1)
            if field["signed"] and field["bits"] and code >> (field["bits"] - 1):
                code -= 1 << field["bits"]
            row[i] = code >> field["point"] if field["point"] >= 0 else code << -field["point"]
    return numbers


def _meaning(program: Program) -> str:
    return (
        "Inputs are whole numbers, the inputs of the network rounded as its first layers round them; outputs are the "
        f"whole numbers of the program, which stand for n · 2^{-program.result.point}."
    )


def _write_vectors(program: Program, layout: dict[str, Any], folder: Path) -> None:
    """Some samples of random numbers, and what the oracle computes of them."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (VECTORS, *program.input_shape)).astype(np.float32)
    expected = oracle.run(program, x).reshape(VECTORS, -1)
    folder.mkdir()
    (folder / "inputs.hex").write_text(_hex(circuit.numbers_in(program, x), layout["inputs"]), encoding="ascii")
    (folder / "outputs.hex").write_text(_hex(expected, layout["outputs"]), encoding="ascii")


def _built(simulator: str, name: str, folder: Path, build: Path) -> list[str]:
    """The command that runs the testbench."""
    sources = [p for p in sorted((folder / "src").rglob("*.v")) if p.name != f"{name}_wrapper.v"]
    sources = [p for p in sources if p.name != "lookup_table.v"]
    files = [str(folder / "testbench.v"), *map(str, sources)]
    if simulator == "iverilog":
        _run(["iverilog", "-g2012", "-s", "testbench", "-o", "sim", *files], build)
        return ["vvp", "sim"]
    # Versions before 5.008 do not know these messages, which the files name.
    future = ["-Wfuture-WIDTHTRUNC", "-Wfuture-WIDTHEXPAND"]
    flags = ["--binary", "--timing", "-Wno-fatal", "-Wno-lint", *future, "--top-module", "testbench", "--Mdir", "."]
    _run(["verilator", *flags, *files], build)
    return [str(build / "Vtestbench")]


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise ExportError(f"{command[0]} took more than {_PATIENCE} s") from None
    if done.returncode:
        raise ExportError(f"{command[0]} refuses the Verilog: {(done.stderr + done.stdout).strip()[-600:]}")


def _testbench(name: str, layout: dict[str, Any]) -> str:
    registers = layout["registers"]
    places = {
        "@NAME": name,
        "@IN": str(_width(layout["inputs"]) - 1),
        "@OUT": str(_width(layout["outputs"]) - 1),
        "@CLOCK": ".clk(clk), " if registers else "",
        # A result is there after so many clocks; without registers it is there at once.
        "@STEP": f"#1 clk = 1; #1 clk = 0; clocks = clocks + 1; if (clocks >= {registers}) leave;"
        if registers
        else "#1; if (more) leave;",
    }
    text = _TESTBENCH
    for place, what in places.items():
        text = text.replace(place, what)
    return text


_TESTBENCH = """// Runs @NAME on the lines of a file, a sample with every clock, and writes or compares what it gives:
// +inputs=FILE, and +outputs=FILE or +expected=FILE. Written by Bitfront.
`timescale 1 ns / 1 ps

module testbench;
    reg clk = 0;
    reg [@IN:0] sample, line;
    wire [@OUT:0] result;
    reg [@OUT:0] wanted;
    reg [8*1024-1:0] inputs, outputs, expected;
    integer from, to, beside, entered, left, differing, clocks, more;

    @NAME dut (@CLOCK.model_inp(sample), .model_out(result));

    task leave;
        begin
            if (to) $fdisplay(to, "%h", result);
            if (beside) begin
                if ($fscanf(beside, "%h\\n", wanted) != 1 || wanted !== result) differing = differing + 1;
            end
            left = left + 1;
        end
    endtask

    initial begin
        to = 0; beside = 0; entered = 0; left = 0; differing = 0; clocks = 0; more = 1;
        if (!$value$plusargs("inputs=%s", inputs)) begin $display("give +inputs=FILE"); $finish; end
        from = $fopen(inputs, "r");
        if ($value$plusargs("outputs=%s", outputs)) to = $fopen(outputs, "w");
        if ($value$plusargs("expected=%s", expected)) beside = $fopen(expected, "r");
        while (more || left < entered) begin
            if (more) begin
                // An assignment, because some simulators do not notice what a file is read into.
                if ($fscanf(from, "%h\\n", line) == 1) entered = entered + 1;
                else more = 0;
                sample = line;
            end
            @STEP
        end
        if (to) $fclose(to);
        if (beside) $display("%0d of %0d samples differ", differing, left);
        $finish;
    end
endmodule
"""
