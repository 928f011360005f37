"""Every benchmark runs, in sizes that mean nothing, and keeps the promised shape. No timing is looked at here."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from warm import Warm

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
SHARED = {"baseline", "common", "models", "plots"}
SCRIPTS = sorted(p for p in BENCH.glob("*.py") if p.stem not in SHARED)
PROMISED = {
    "trial_cost": {
        *("ms_per_candidate_512", "vs_plain_512", "vs_dataloader_512", "vs_plain_16384"),
        *("tiny_ms_per_candidate_512", "tiny_vs_plain_512", "tiny_vs_dataloader_512", "tiny_vs_plain_16384"),
        *("max_accuracy_difference", "max_loss_difference"),
    },
    "cluster": {"most_candidates_per_second", "workers_fed_at_1_s", "most_megabytes"},
    "deploy": {"members", "c_differing", "onnx_differing"},
    "roofline": {
        *("max_difference", "nsga_ii_forwards", "brute_force_forwards", "gemm_gflops_1", "copy_gbs_1"),
        *(
            f"{model}_{form}_nsga_ii_forwards"
            for model in ("digits_cnn", "resnet_20", "mobilenet", "ds_cnn", "vit_tiny", "bert_tiny")
            for form in ("integer", "affine")
        ),
    },
}
#: What a script needs beside Bitfront.
NEEDS = {"fpga": "alkaid"}


@pytest.fixture(scope="module")
def plots():
    """bench/plots.py as a module; it finds its neighbour as it does when it is run."""
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location("bench_plots", BENCH / "plots.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCH))
        sys.modules.pop("bench_plots", None)
        sys.modules.pop("common", None)


#: What computes with several threads that take turns, or takes more than five seconds also in its smallest size.
LONG = {
    *("population", "roofline", "int8", "networks", "scaling", "calibration", "zoo"),
    *("strategies", "runtime", "learned_bits", "joint", "microcontroller", "granularity", "samplers"),
    *("big", "deploy", "fpga"),
}
RUNS = [pytest.param(path, marks=[pytest.mark.long] if path.stem in LONG else [], id=path.stem) for path in SCRIPTS]
#: Runs a script as ``python SCRIPT WORDS`` does, in a process that has torch imported already.
RUN = "import runpy, sys; sys.argv = sys.argv[1:]; sys.path[0] = {folder!r}; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.mark.journey
@pytest.mark.parametrize("script", RUNS)
def test_runs_and_keeps_the_promised_shape(script: Path, tmp_path: Path, warm: Warm) -> None:
    if script.stem in NEEDS:
        pytest.importorskip(NEEDS[script.stem])
    file = tmp_path / "out.json"
    environment = {k: v for k, v in os.environ.items() if k != "BITFRONT_DATA"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    words = [str(script), "--quick", "--json", str(file)]
    process = warm.start(["-c", RUN.format(folder=str(BENCH)), *words], tmp_path, environment)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    written = json.loads(file.read_text())
    assert set(written) == {"machine", "rows", "summary"}
    assert {"cpu", "cores", "torch", "numpy", "python", "bitfront", "load_at_start"} <= set(written["machine"])
    assert written["rows"]
    assert all(set(row) == set(written["rows"][0]) for row in written["rows"])
    assert all(isinstance(v, (int, float)) for v in written["summary"].values())
    assert PROMISED.get(script.stem, set()) <= set(written["summary"])
    for key, value in written["summary"].items():
        assert f"{key} = " in out, value


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_says_what_it_measures(script: Path) -> None:
    assert len(ast.get_docstring(ast.parse(script.read_text())) or "") > 200


@functools.cache
def make_bench() -> str:
    """The commands of ``make bench`` and of ``make big``, which takes long."""
    return subprocess.run(["make", "-n", "bench", "big"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_has_its_place_on_the_page_and_in_make_bench(script: Path) -> None:
    pages = [page.read_text() for page in (ROOT / "docs").glob("*.md")]
    assert sum(f"<!-- begin:{script.stem} -->" in page for page in pages) == 1
    assert f"bench/results/{script.stem}.json" in make_bench()


def result(**summary: float) -> dict:
    machine = dict.fromkeys(("cpu", "cores", "memory_gib", "python", "torch", "numpy", "bitfront", "compiler"), "x")
    return {"machine": {**machine, "load_at_start": 0.1}, "rows": [{"a": 1, "b": "text"}], "summary": summary}


def test_verdicts_are_computed(plots, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(plots, "TARGETS", {"it": (plots.Target("ms", 2, "ms", "cost", at_most=True),)})
    monkeypatch.setattr(plots, "PICTURES", tmp_path)
    assert "| ≤ 2 ms | 1.00     | met     |" in plots.region("it", result(ms=1.0))
    assert "**missed**" in plots.region("it", result(ms=3.0))
    assert "not measured" in plots.region("it", result(other=3.0))
    assert (tmp_path / "it.svg").stat().st_size < 100_000


def test_a_region_is_replaced_and_nothing_else(plots) -> None:
    page = "before\n<!-- begin:one -->\nold\n<!-- end -->\nbetween\n<!-- begin:two -->\nkept\n<!-- end -->\n"
    once = plots.rewritten(page, {"one": "new"})
    assert once.replace("\nnew\n", "old") == page
    assert plots.rewritten(once, {"one": "new"}) == once
    with pytest.raises(KeyError, match="begin:three"):
        plots.rewritten(page, {"three": "new"})


def test_rows_of_several_situations_are_separate_tables(plots) -> None:
    rows = [{"where": w, "a": a, "b": b} for w, a, b in (("one: x", 1, ""), ("one: x", 2, ""), ("two", 3, 4))]
    heading, first, other, second = plots.split(rows, "where")
    assert (heading, other) == ("**one: x**", "**two**")
    assert first.splitlines()[0] == "| a |"
    assert second.splitlines()[-1] == "| 3 | 4 |"


def test_targets_name_promised_numbers(plots) -> None:
    for name, keys in PROMISED.items():
        assert {t.key for t in plots.TARGETS[name]} <= keys
