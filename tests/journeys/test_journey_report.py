"""``bitfront report`` as a user types it."""

import json

import pytest

pytestmark = pytest.mark.journey


def test_report_of_a_search(searched):
    typed = searched("report", "small")
    page, *figures = typed.out.splitlines()
    assert page == "runs/small/report.html"
    assert (searched.folder / page).stat().st_size < 2_000_000
    assert len(figures) == 12
    for figure in figures:
        assert (searched.folder / figure).stat().st_size > 1000
    assert "runs/small/figures/front.svg" in figures


def test_grids_elsewhere_as_json(searched):
    plan = json.loads(searched("plan", "--config", "small.toml", "--json").out)
    x, y = (p["name"] for p in plan["parameters"][:2])
    typed = searched("report", "runs/small", "--x", x, "--y", y, "--metric", "accuracy", "-o", "shown", "--json")
    written = json.loads(typed.out)
    assert written["page"] == "shown/report.html"
    assert "shown/figures/bars-accuracy.png" in written["figures"]
    assert not (searched.folder / "runs" / "small" / "report.html").exists()
    typed = searched("report", "small", "--x", x[:-1], "--y", y, code=2)
    assert f"--x: this run has no parameter that varies '{x[:-1]}'; allowed: {x}, {y}" in typed.err
    assert f"Did you mean '{x}'?" in typed.err


def test_what_cannot_be_reported(searched):
    typed = searched("report", "smal", code=2)
    assert "smal: there is no such run folder" in typed.err
    searched.write("taken", "a file")
    assert "taken/figures: cannot be written" in searched("report", "small", "-o", "taken", code=2).err


def test_without_the_extra(searched):
    """As if jinja2 were not there."""
    program = "import sys; sys.modules['jinja2'] = None\nimport bitfront as bf\n"
    program += "try:\n    bf.write_report('runs/small')\nexcept bf.UserError as error:\n    print(error)"
    missing = "the report needs jinja2, which is not installed: pip install 'bitfront[report]'\n"
    assert searched.python(program, cold=True) == missing
