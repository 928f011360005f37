"""Tables: what they say, on a terminal and in a pipe."""

import io
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from bitfront.cli import printing
from bitfront.engine.search.loop import Progress
from bitfront.pareto import Front
from bitfront.report import remarks
from bitfront.report.live import Live
from bitfront.report.tables import Sheet, duration, number
from bitfront.training import EpochRecord

SHEET = Sheet(["name", "what [it] is"], [["a", "first\nsecond"], ["bb", "[red]not markup[/red]"]], right=["name"])


def shown(sheet, *, terminal, width=80):
    out = io.StringIO()
    sheet.show(Console(file=out, force_terminal=terminal, width=width, highlight=False, color_system=None))
    return out.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (8.0, "8"),
        (0.75, "0.75"),
        (0.724365234375, "0.7244"),
        (-0.5, "-0.5"),
        (999.96, "1000"),
        (1000.0, "1,000"),
        (1234567.8, "1,234,568"),
        (-4.8016e-05, "-4.802e-05"),
        (math.nan, "-"),
        (math.inf, "inf"),
    ],
)
def test_numbers_are_written_for_people(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (12.3, "12 s"),
        (250, "4 min 10 s"),
        (7500, "2 h 5 min"),
        (3600, "60 min"),
        (20000, "5 h 33 min"),
    ],
)
def test_durations_are_written_for_people(seconds, text):
    assert duration(seconds) == text


def test_markdown_in_a_pipe():
    assert shown(SHEET, terminal=False, width=20) == (
        "| name | what [it] is          |\n"
        "| ---: | --------------------- |\n"
        "|    a | first, second         |\n"
        "|   bb | [red]not markup[/red] |\n"
    )


def test_a_frame_on_a_terminal():
    text = shown(SHEET, terminal=True)
    assert text.startswith("╭")
    assert "[red]not markup[/red]" in text
    assert "what [it] is" in text
    assert "first, second" not in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_table_too_wide_goes_on_below(width):
    words = [f"column{i}" for i in range(9)]
    sheet = Sheet(["name", *words], [["first", *(f"long_value_{i}" for i in range(9))], ["second", *"abcdefghi"]])
    text = shown(sheet, terminal=True, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert all(text.count(f"long_value_{i} ") == 1 for i in range(9))
    assert text.count("first") == text.count("second") == text.count("╭") > 1


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_frame_fits_its_terminal_and_breaks_between_words(width):
    columns = ["number", "software_metrics", "hardware_metrics", "scaled_metrics", "test accuracy"]
    row = [
        "1234",
        "loss 0.6816\naccuracy 0.748 [0.709, 0.784]",
        "average_bitwidth 18.76\nmemory_density 1.706",
        "accuracy 0.748\naverage_bitwidth 3.752",
        "0.7392",
    ]
    text = shown(Sheet(columns, [row], right=["number", "test accuracy"]), terminal=True, width=width)
    assert max(map(len, text.splitlines())) <= width
    for word in ("software_metrics", "hardware_metrics", "scaled_metrics", "average_bitwidth", "memory_density"):
        assert word in text, text


def test_what_a_trial_chose_in_one_line():
    config = {
        "by": "name",
        "default": {"config": {"name": "NA"}},
        "fc1": {"config": {"name": "integer", "data_in_width": 8, "weight_width": 4, "bias_width": 8}},
        "fc2": {"config": {"name": "NA"}},
        "fc3": {"config": {"name": "integer", "weight_width": 4}},
    }
    trial = SimpleNamespace(config=config)
    bits = {"fc1": {"data_in": 8, "weight": 4, "bias": 8}, "fc3": {"weight": 4}}
    assert remarks.chosen(trial, bits) == "fc1 integer 8/4/8, fc2 float, fc3 integer -/4/-"
    assert remarks.chosen(trial, bits, named=False) == "fc1 8/4/8, fc2 float, fc3 -/4/-"
    same = bits | {"fc3": bits["fc1"]}
    assert remarks.chosen(trial, same, named=False, as_counts=True) == "2 × 8/4/8, 1 × float"
    assert remarks.chosen(trial, {"fc1": {"weight": None}}, named=False) == "fc1 -/?/-, fc2 float, fc3 -/-/-"


def test_notes_come_once_and_quiet_says_nothing():
    out = io.StringIO()
    console = Console(file=out, width=40)
    with Live(console) as live:
        for _ in range(2):
            live.note("a [note] that is longer than the console is wide, and stays one line")
    assert out.getvalue() == "a [note] that is longer than the console is wide, and stays one line\n"
    out = io.StringIO()
    settings = SimpleNamespace(max_epochs=1, optimizer="adam")
    record = EpochRecord(1, 0.5, 0.8, 0.4, 0.9, 1e-3, True)
    with Live(Console(file=out), quiet=True) as live:
        live.note("nothing")
        live.training(settings, 100)
        live.epoch(record)
    assert out.getvalue() == ""
    with Live(Console(file=out, width=200)) as live:
        live.training(settings, 1000)
        live.step(1, lambda: pytest.fail("nobody sees it, so nobody asks for it"))
        live.epoch(record)
        live.downloading(1_000_000, 2_000_000)
    first, second = out.getvalue().splitlines()
    assert first == "training: 1 epoch on 1,000 samples, adam"
    assert second.startswith("trained: 1 epoch in 0.")
    assert second.endswith("s, last val loss 0.4000, val accuracy 0.9000")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_progress_tells_the_best_so_far(width):
    out = io.StringIO()
    plan = SimpleNamespace(
        objectives=SimpleNamespace(names=("accuracy", "size"), directions=("maximize", "minimize")),
        settings=SimpleNamespace(strategy=SimpleNamespace(setup=SimpleNamespace(timeout=60.0))),
    )
    front = Front(2)
    front.add(np.array([[-0.9, 1200.0], [np.nan, np.nan], [-0.8, 1000.0]]))
    progress = Progress(done=3, new=3, total=9, failed=1, skipped=0, seconds=1.5, front=front)
    with Live(Console(file=out, force_terminal=True, width=width, color_system=None)) as live:
        live.progress(progress, plan)
        live._bar.refresh()
    assert "3/9, 1 failed  best accuracy 0.9, size 1,000 " in out.getvalue()
    wide = width >= 100
    assert ("searching" in out.getvalue()) == ("━" in out.getvalue()) == ("timeout 60 s" in out.getvalue()) == wide
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", out.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= width


MARKUP = ["[/x]", "[bold]", "[link=http://x]y[/link]", ":smile:", "[]", "\\[/red]"]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("name", MARKUP)
def test_names_that_look_like_markup_are_text(name, terminal):
    text = shown(Sheet([name, "error"], [[f"a {name}", name]]), terminal=terminal)
    assert text.count(name) == 3


@pytest.mark.parametrize("name", MARKUP)
def test_messages_that_look_like_markup_are_text(name, capsys):
    out = io.StringIO()
    with Live(Console(file=out, width=200, force_terminal=True, color_system=None)) as live:
        live.note(f"reading {name}")
        live.running(f"{name}, seed 0")
        live._start(live._searching, 3)
        live._update(1, name)
    assert f"reading {name}\n" in out.getvalue()
    assert f"{name}, seed 0" in out.getvalue()
    printing.print_line(f"wrote {name}")
    printing.print_error(f"error: {name}: no such file")
    assert capsys.readouterr() == (f"wrote {name}\n", f"error: {name}: no such file\n")


def test_a_cell_of_markdown_ends_where_it_should():
    text = shown(Sheet(["a|b", "c"], [["x|y", "one\ntwo\r\nthree"]]), terminal=False)
    assert text.splitlines()[0].split() == ["|", "a\\|b", "|", "c", "|"]
    assert text.splitlines()[2] == "| x\\|y | one, two, three |"
