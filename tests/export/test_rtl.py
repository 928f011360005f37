"""Verilog: the logic of single steps against the oracle, and what the target checks beside the conformance of targets."""

import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from test_targets import candidate

from bitfront.errors import ConfigError, ExportError
from bitfront.exporters import circuit, oracle
from bitfront.exporters.exporting import export, target_named
from bitfront.exporters.program import Add, Leak, Limit, Offset, Pool, Program, Round, Value, Window
from bitfront.exporters.targets.rtl import Rtl

pytest.importorskip("alkaid")


def in_numbers(shape, low, high, point=3):
    """A step that takes whole numbers from `low` to `high`, and its value."""
    points, ends = np.full(shape, point), [np.full(shape, end) for end in (low, high)]
    return Round((), points, *ends, "even", "saturate", point), Value("x", shape, *ends, point)


def computed(program, x):
    """(what the logic computes, what the oracle computes)."""
    logic = circuit.laid_out(program)
    numbers = logic.predict(circuit.numbers_in(program, x).astype(np.float64), n_threads=1)
    return numbers.reshape(len(x), *program.result.shape), oracle.run(program, x)


@pytest.mark.parametrize("overflow", ["saturate", "wrap"])
@pytest.mark.parametrize("rounding", ["even", "half_up", "floor"])
@pytest.mark.parametrize("divisor", [1, 4])
def test_every_rounding(rounding, overflow, divisor):
    first, value = in_numbers((6,), -70, 90)
    mean = Value("mean", (6,), value.low, value.high, 3, divisor)
    points = np.array([3, 1, 0, -1, -2, 4])
    low, high = np.array([-4, -8, -2, -4, -2, -16]), np.array([3, 7, 1, 3, 1, 15])
    last = Round((1,), points, low, high, rounding, overflow, 4)
    program = Program(
        (6,), (first, Offset((0,), np.zeros(6, np.int64)), last), (value, mean, Value("y", (6,), low, high, 4)), 2
    )
    circuit.check(program)
    x = np.arange(-70, 91)[:, None].repeat(6, 1).astype(np.float32) / 8
    logic, expected = computed(program, x)
    assert np.array_equal(logic, expected)


@pytest.mark.parametrize(
    ("step", "shape"),
    [
        (Limit((0,), 0, None), (4, 4)),
        (Limit((0,), -3, 20, 1), (4, 4)),
        (Leak((0,), 3, 4), (4, 4)),
        (Add((0, 0), (1, 0), (1, -1)), (4, 4)),
        (Pool((0,), "largest", Window((3,), (2,), (1,), (1,), (1,))), (4, 2)),
        (Pool((0,), "sum", Window((2,), (1,), (0,), (0,), (2,))), (4, 2)),
    ],
    ids=["relu", "relu6", "leaky", "sum", "pool", "sums"],
)
def test_every_step(step, shape):
    first, value = in_numbers((4, 4), -9, 12)
    beyond = np.full(shape, 1000)
    program = Program((4, 4), (first, step), (value, Value("y", shape, -beyond, beyond, 3)), 1)
    x = np.random.default_rng(0).normal(0, 1, (200, 4, 4)).astype(np.float32)
    logic, expected = computed(program, x)
    assert np.array_equal(logic, expected)


@pytest.fixture(scope="module")
def pipelined(tmp_path_factory):
    if shutil.which("iverilog") is None:
        pytest.skip("there is no iverilog")
    given, x = candidate("mlp", "elements")
    return (
        export(given, target_named("rtl", {"latency_cutoff": 2.0}), tmp_path_factory.mktemp("rtl") / "out", x),
        given,
        x,
    )


def test_a_pipeline_takes_a_sample_with_every_clock(pipelined):
    result, given, x = pipelined
    assert result.samples == len(x)
    assert result.figures["clocks_of_latency"] > 3
    assert result.figures["registers_bits"] > 0
    assert "clk" in (result.folder / "src" / f"{given.name}.v").read_text()


def test_the_testbench_compares_with_the_vectors(pipelined, tmp_path):
    result, _, _ = pipelined
    sources = [p for p in (result.folder / "src").rglob("*.v") if not p.name.endswith("_wrapper.v")]
    built = ["iverilog", "-g2012", "-o", tmp_path / "sim", result.folder / "testbench.v", *sources]
    subprocess.run(built, check=True, capture_output=True)
    vectors = result.folder / "vectors"

    def said(expected):
        command = ["vvp", tmp_path / "sim", f"+inputs={vectors}/inputs.hex", f"+expected={expected}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert "0 of 64 samples differ" in said(vectors / "outputs.hex")
    first, *others = (vectors / "outputs.hex").read_text().splitlines(keepends=True)
    other = tmp_path / "other.hex"
    other.write_text("".join([others[0] if others[0] != first else "0\n", *others]))
    assert "1 of 64 samples differ" in said(other)


@pytest.mark.parametrize("formats", ["fixed8", "elements"])
def test_the_bits_of_an_input_follow_from_what_is_said_of_the_ports(formats, tmp_path):
    """Somebody who has only the folder makes the inputs of the vectors from the values that they were made of."""
    given, x = candidate("mlp", formats)
    result = export(given, target_named("rtl"), tmp_path / "out", x, check=False)
    ports = json.loads((result.folder / "ports.json").read_text())["inputs"]
    lines = (result.folder / "vectors" / "inputs.hex").read_text().split()
    samples = np.random.default_rng(0).normal(0, 1, (len(lines), *given.program.input_shape)).astype(np.float32)
    for sample, line in zip(samples.reshape(len(lines), -1).tolist(), lines, strict=True):
        word = 0
        for port in ports:
            assert port["overflow"] == "saturate"
            rounded = {"even": round, "half_up": lambda v: math.floor(v + 0.5), "floor": math.floor}[port["rounding"]]
            bits = rounded(sample[port["feature"]] * 2.0 ** port["value_point"])
            bits = min(max(bits, port["low"]), port["high"])
            word |= (bits & ((1 << port["bits"]) - 1)) << port["bit"]
        assert word == int(line, 16)


@pytest.mark.parametrize("cutoff", [0.0, 2.0], ids=["combinational", "pipelined"])
def test_vhdl_computes_the_same(cutoff, tmp_path):
    if shutil.which("ghdl") is None:
        pytest.skip("there is no ghdl")
    given, x = candidate("mlp", "elements")
    result = export(given, target_named("rtl", {"language": "vhdl", "latency_cutoff": cutoff}), tmp_path / "out", x)
    assert (result.samples, result.differing) == (len(x), 0)
    assert "VHDL simulator" in result.message
    readme = (result.folder / "README.md").read_text()
    command = re.search(r"`(ghdl .*)`", readme).group(1)
    said = subprocess.run(command, shell=True, cwd=result.folder, check=True, capture_output=True, text=True).stdout
    assert "0 of 64 samples differ" in said
    vectors = result.folder / "vectors" / "outputs.hex"
    first, *others = vectors.read_text().splitlines(keepends=True)
    vectors.write_text("".join([others[0] if others[0] != first else "0\n", *others]))
    said = subprocess.run(command, shell=True, cwd=result.folder, check=True, capture_output=True, text=True).stdout
    assert "1 of 64 samples differ" in said


def test_vhdl_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    if shutil.which("ghdl") is None:
        pytest.skip("there is no ghdl")
    given, x = candidate("mlp", "elements")
    write = Rtl.write

    def damaged(self, chosen, folder):
        write(self, chosen, folder)
        top = folder / "src" / f"{chosen.name}.vhd"
        top.write_text(re.sub(r"(model_out\([^;]*<= )(?=\w)", r"\1not ", top.read_text()))

    monkeypatch.setattr(Rtl, "write", damaged)
    with pytest.raises(ExportError, match="the VHDL gives other numbers than the logic"):
        export(given, target_named("rtl", {"language": "vhdl"}), tmp_path / "out", x)
    assert not list(tmp_path.iterdir())


def test_a_simulator_of_another_language_is_an_error():
    with pytest.raises(ConfigError, match="'iverilog' does not read VHDL; take 'ghdl'"):
        target_named("rtl", {"language": "vhdl", "simulator": "iverilog"})


def test_verilog_that_computes_something_else_is_not_kept(pipelined, tmp_path, monkeypatch):
    _, given, x = pipelined
    write = Rtl.write

    def damaged(self, chosen, folder):
        write(self, chosen, folder)
        top = folder / "src" / f"{chosen.name}.v"
        top.write_text(re.sub(r"(assign model_out\S* = )", r"\1~", top.read_text()))

    monkeypatch.setattr(Rtl, "write", damaged)
    with pytest.raises(ExportError, match="the Verilog gives other numbers than the logic"):
        export(given, target_named("rtl"), tmp_path / "out", x)
    assert not list(tmp_path.iterdir())


def test_verilator_simulates_too(tmp_path):
    if shutil.which("verilator") is None:
        pytest.skip("there is no verilator")
    given, x = candidate("mlp", "elements")
    target = target_named("rtl", {"simulator": "verilator", "latency_cutoff": 2.0})
    assert export(given, target, tmp_path / "out", x).differing == 0


def test_large_logic_is_for_verilator_where_it_can_be_compiled(monkeypatch):
    installed = {"iverilog", "verilator", "g++", "make"}
    monkeypatch.setattr(shutil, "which", lambda name: name if name in installed else None)
    target = target_named("rtl")
    assert (target.simulator(100), target.simulator(100_000)) == ("iverilog", "verilator")
    assert target.simulator(100_000, rows=20) == "iverilog"
    assert target_named("rtl", {"simulator": "iverilog"}).simulator(100_000) == "iverilog"
    installed.remove("g++")
    assert target.simulator(100_000) == "iverilog"
    installed.remove("iverilog")
    assert target.simulator(100) == "verilator"


def test_without_a_simulator_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    given, x = candidate("mlp", "elements")
    with pytest.raises(ExportError, match="no iverilog or verilator to run the Verilog; install one"):
        export(given, target_named("rtl"), tmp_path / "out", x)
    target = target_named("rtl", {"language": "vhdl"})
    with pytest.raises(ExportError, match="no ghdl to run the VHDL; install it"):
        export(given, target, tmp_path / "out", x)
    unchecked = export(given, target, tmp_path / "out", x, check=False)
    assert (unchecked.folder.name, unchecked.judge) == ("out-unchecked", "")
    assert (unchecked.folder / "src" / f"{given.name}.vhd").is_file()
