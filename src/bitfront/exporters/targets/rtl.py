"""Verilog or VHDL by alkaid, without multipliers: judged by its bit-exact interpreter, and by a simulator."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from bitfront.errors import ConfigError, ExportError, require
from bitfront.exporters import circuit, fabric, oracle
from bitfront.exporters.program import Floats, Int, Program, Round
from bitfront.exporters.targets import TARGETS
from bitfront.exporters.targets.base import Candidate, Target, TargetSettings, without_floats
from bitfront.exporters.testbench import Language, testbench

#: Rows that a simulator computes; the interpreter computes all.
SIMULATED = 1000
#: Vectors that are written beside the testbench.
VECTORS = 64
#: Seconds after which a simulator is taken to hang.
_PATIENCE = 1800
#: Look-up tables times rows from which on Verilator is quicker, with its compiler, than iverilog: for 1,000 rows of
#: 33,000 look-up tables it takes 37 s (AMD EPYC, one core), iverilog 200 s; for 64 rows iverilog takes 15.
_LARGE = 6_000_000
#: Language → what can run it, the first one that is installed being taken; its name; the end of its files.
_SIMULATORS: Mapping[Language, tuple[str, ...]] = {"verilog": ("iverilog", "verilator"), "vhdl": ("ghdl",)}
_WRITTEN: Mapping[Language, str] = {"verilog": "Verilog", "vhdl": "VHDL"}
_SUFFIX: Mapping[Language, str] = {"verilog": "v", "vhdl": "vhd"}
_GHDL = ("--std=08",)
#: Language → (how the testbench is built and run, for the README; what is in front of its arguments).
_USED: Mapping[Language, tuple[str, str]] = {
    "verilog": ("iverilog -g2012 -o sim testbench.v $(find src -name '*.v' ! -name '*_wrapper.v') && vvp sim", "+"),
    "vhdl": (
        "ghdl -i --std=08 testbench.vhd $(find src -name '*.vhd' ! -name '*_wrapper.vhd') && "
        "ghdl -m --std=08 testbench && ghdl -r --std=08 testbench",
        "-g",
    ),
}
#: Versions before 5.008 do not know two messages, which the files name.
_VERILATOR = "--binary --timing -Wno-fatal -Wno-lint -Wfuture-WIDTHTRUNC -Wfuture-WIDTHEXPAND --top-module testbench"
#: The same for large logic.
_OTHERWISE = f"""
Large logic is quicker with Verilator:
`verilator {_VERILATOR} testbench.v $(find src -name '*.v' ! -name '*_wrapper.v')`,
and then `obj_dir/Vtestbench` in the place of `vvp sim`.
"""


class RtlSettings(TargetSettings):
    """Settings of the target rtl."""

    latency_cutoff: float = Field(
        0.0,
        ge=0,
        description="longest path between registers, an adder being about 1.1; 0: no registers",
    )
    language: Language = Field("verilog", description="of the files")
    simulator: Literal["auto", "iverilog", "verilator", "ghdl"] = Field(
        "auto",
        description="what runs the files; 'auto' is iverilog, or verilator where that is not installed or the logic is "
        "large, and ghdl for VHDL",
    )


@TARGETS.register("rtl")
class Rtl(Target):
    """Verilog or VHDL without multipliers, combinational or pipelined, with a testbench and vectors."""

    Settings = RtlSettings
    settings: RtlSettings

    def __init__(self, settings: TargetSettings | None = None) -> None:
        super().__init__(settings)
        language, simulator = self.settings.language, self.settings.simulator
        if simulator not in ("auto", *_SIMULATORS[language]):
            able = " or ".join(map(repr, _SIMULATORS[language]))
            raise ConfigError(
                f"{simulator!r} does not read {_WRITTEN[language]}; take {able}", key=("export", "rtl", "simulator")
            )
        self._figures: dict[str, float] = {}

    @property
    def judge(self) -> str:  # type: ignore[override]
        """Depends on the language."""
        return f"alkaid's interpreter and a {_WRITTEN[self.settings.language]} simulator"

    @property
    def notice(self) -> str:  # type: ignore[override]
        """Depends on the language, and on what was written."""
        if self.settings.language == "vhdl":
            return "; ghdl takes minutes for thousands of look-up tables"
        luts = self._figures.get("luts_by_alkaid", 0)
        return f"; of {luts:,.0f} look-up tables that takes minutes" if luts * SIMULATED > _LARGE else ""

    def check(self, candidate: Candidate) -> None:
        """Raises ExportError for what logic cannot compute."""
        fabric.check_installed("the target rtl")
        circuit.check(without_floats(candidate, "rtl"))

    def ready(self) -> None:
        """Raises ExportError if there is no simulator."""
        self.simulator()

    def write(self, candidate: Candidate, folder: Path) -> None:
        """src/*.v or src/*.vhd, the same logic as model/comb.json.gz, a testbench, and vectors."""
        program = without_floats(candidate, "rtl")
        logic = circuit.laid_out(program)
        cutoff, language = self.settings.latency_cutoff, self.settings.language
        codegen: Any = require("alkaid.codegen", fabric.EXTRA, "the target rtl")
        model = codegen.RTLModel(
            logic, folder, candidate.name, language, latency_cutoff=cutoff or -1.0, print_latency=False
        )
        model.write()
        shutil.rmtree(folder / "sim")  # alkaid's binder; the testbench is ours
        registers = int(model.latency) + 1 if cutoff else 0
        layout: dict[str, Any] = {
            "inputs": _entering(program, _fields(model._comb.inp_qint)),
            "outputs": _fields(model._comb.out_qint),
            "registers": registers,
        }
        (folder / "ports.json").write_text(json.dumps(layout, indent=1) + "\n", encoding="utf-8")
        widths = _width(layout["inputs"]), _width(layout["outputs"])
        source = testbench(language, candidate.name, *widths, registers)
        (folder / f"testbench.{_SUFFIX[language]}").write_text(source, encoding="utf-8")
        _write_vectors(program, layout, folder / "vectors")
        self._figures = {
            "luts_by_alkaid": round(model._comb.cost),
            "depth_adders": round(float(model._comb.latency[1]), 1),
            "registers_bits": float(model.reg_bits),
            "clocks_of_latency": float(registers),
        }

    def computed(self, candidate: Candidate, folder: Path, x: Floats) -> NDArray[Any]:
        """What the interpreter computes of the saved logic; the simulator must give the same on the first rows."""
        types: Any = require("alkaid.types", fabric.EXTRA, "the target rtl")
        logic = types.CombLogic.load(folder / "model" / "comb.json.gz")
        numbers = circuit.numbers_in(candidate.program, x)
        outputs: Int = logic.predict(numbers.astype(np.float64), n_threads=1).astype(np.int64)
        simulated = self._simulated(candidate, folder, numbers[:SIMULATED], float(logic.cost))
        differing = int((simulated != outputs[: len(simulated)]).any(axis=1).sum())
        if differing:
            raise ExportError(
                f"the {_WRITTEN[self.settings.language]} gives other numbers than the logic that it was made of, on "
                f"{differing} of {len(simulated)} samples; please report this"
            )
        return outputs.reshape(len(x), *candidate.program.result.shape)

    def simulator(self, luts: float = 0.0, rows: int = SIMULATED) -> str:
        """What simulates so many rows of logic of so many look-up tables. Raises ExportError if it is not installed."""
        wanted, language = self.settings.simulator, self.settings.language
        names = _SIMULATORS[language] if wanted == "auto" else (wanted,)
        if luts * rows > _LARGE and all(map(shutil.which, ("verilator", "g++", "make"))):
            names = (*names[1:], names[0])
        found = next((name for name in names if shutil.which(name)), None)
        if found is None:
            raise ExportError(
                f"there is no {' or '.join(names)} to run the {_WRITTEN[language]}; install "
                f"{'one' if len(names) > 1 else 'it'} (Debian: apt-get install {names[0]})"
            )
        return found

    def _simulated(self, candidate: Candidate, folder: Path, numbers: Int, luts: float) -> Int:
        layout = json.loads((folder / "ports.json").read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory() as place:
            build, given, got = Path(place), Path(place, "in.hex"), Path(place, "out.hex")
            given.write_text(_hex(numbers, layout["inputs"]), encoding="ascii")
            simulator = self.simulator(luts, len(numbers))
            command, written = _built(simulator, candidate.name, folder.absolute(), build), self.settings.language
            sign = "-g" if simulator == "ghdl" else "+"
            _run([*command, f"{sign}inputs={given}", f"{sign}outputs={got}"], build, written)
            lines = got.read_text(encoding="ascii").split()
        if len(lines) != len(numbers) or any(set(line) & set("xzXZ") for line in lines):
            raise ExportError(f"the {_WRITTEN[self.settings.language]} simulator gives no number for some samples")
        return _read(lines, layout["outputs"])

    def usage(self, candidate: Candidate) -> str:
        """How to use the Verilog or VHDL."""
        name, program, language = candidate.name, candidate.program, self.settings.language
        simulator, sign = _USED[language]
        large = _OTHERWISE if language == "verilog" else ""
        unit = "module" if language == "verilog" else "entity"
        return f"""
The {unit} `{name}` in `src/` takes all inputs in `model_inp` and gives all outputs in `model_out`. Numbers lie
side by side, the first one in the lowest bits; `ports.json` has the lowest bit, the width, the sign and the binary
point of each. A number is two's complement; with `point` p its bits stand for bits · 2^-p. With registers there is a
clock, `clk`: a sample enters with every clock.

{_meaning(program)}

`testbench.{_SUFFIX[language]}` runs the vectors in `vectors/` and says how many outputs differ:
`{simulator} {sign}inputs=vectors/inputs.hex {sign}expected=vectors/outputs.hex`.{large}
`model/comb.json.gz` is the logic that the {_WRITTEN[language]} was made of, for {fabric.version()};
`build_vivado_prj.tcl` is its script for Vivado, and was not run.
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


def _entering(program: Program, fields: list[dict[str, int]]) -> list[dict[str, Any]]:
    """The fields of the inputs, with how a value of the flattened sample becomes the bits of each."""
    roundings: list[dict[str, Any]] = []
    for step in circuit.entering(program):
        places = np.arange(int(np.prod(program.input_shape))) if step.places is None else step.places
        of_step: list[dict[str, Any]] = [{"feature": feature} for feature in places.reshape(-1).tolist()]
        if isinstance(step, Round):
            numbers = np.stack([of.reshape(-1) for of in (step.points, step.low, step.high)], axis=1).tolist()
            how = {"rounding": step.rounding, "overflow": step.overflow}
            of_step = [
                {**of, "value_point": point, "low": low, "high": high, **how}
                for of, (point, low, high) in zip(of_step, numbers, strict=True)
            ]
        roundings += of_step
    return [{**of, **rounding} for of, rounding in zip(fields, roundings, strict=True)]


def _meaning(program: Program) -> str:
    return f"""
Inputs are values of the sample, rounded as the first layers round them: bits = round(x · 2^v), x being the value in
the place `feature` of the flattened sample and v its `value_point`. `rounding` is half to even, half up or down
(floor); what is beyond `low` and `high` is cut to them (saturate), or wraps around.
Outputs are the whole numbers of the program; n stands for n · 2^{-program.result.point}.
""".strip()


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
    language: Language = "vhdl" if simulator == "ghdl" else "verilog"
    suffix = _SUFFIX[language]
    left_out = (f"{name}_wrapper.{suffix}", "lookup_table.v")
    sources = [p for p in sorted((folder / "src").rglob(f"*.{suffix}")) if p.name not in left_out]
    files = [str(folder / f"testbench.{suffix}"), *map(str, sources)]
    if simulator == "ghdl":
        _run(["ghdl", "-i", *_GHDL, *files], build, language)
        _run(["ghdl", "-m", *_GHDL, "testbench"], build, language)
        # Before the first sample the inputs of arithmetic are undefined, of which it warns.
        return ["ghdl", "-r", *_GHDL, "testbench", "--ieee-asserts=disable-at-0"]
    if simulator == "iverilog":
        _run(["iverilog", "-g2012", "-s", "testbench", "-o", "sim", *files], build, language)
        return ["vvp", "sim"]
    # Most of the time is the compiler's, and what it compiles runs once.
    quick = ["-MAKEFLAGS", "OPT_FAST=-O0 OPT_SLOW=-O0 OPT_GLOBAL=-O0"]
    _run(["verilator", *_VERILATOR.split(), "--Mdir", ".", *quick, *files], build, language)
    return [str(build / "Vtestbench")]


def _run(command: list[str], folder: Path, language: Language) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise ExportError(f"{command[0]} took more than {_PATIENCE} s") from None
    if done.returncode:
        words = (done.stderr + done.stdout).strip()[-600:]
        raise ExportError(f"{command[0]} refuses the {_WRITTEN[language]}: {words}")
