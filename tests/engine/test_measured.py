"""What runners may give, and what is refused by the metric's name."""

import math

import numpy as np
import pytest
import torch

from bitfront.engine.evaluation.measured import measured
from bitfront.errors import LONGEST_TEXT, EvaluationError, cut, described
from bitfront.interrupts import CodeExitError, contained
from bitfront.metrics.base import Metric, Runner, RunnerSettings


def metric(name):
    return Metric(name, "", "minimize", "measured", "a number")


class Odd(Runner):
    """Gives whatever it is asked to give."""

    produces = (metric("size"), metric("speed"))
    given = None

    def measure(self, subject, codes):
        return self.given


CODES = np.zeros((2, 1), dtype=np.int64)
FINE = np.array([1.0, 2.0])


def gives(given):
    runner = Odd(RunnerSettings())
    runner.given = given
    return measured(runner, None, CODES)


@pytest.mark.parametrize(
    "values",
    [[1, 2], (1.0, 2.0), np.array([1, 2], dtype=np.int8), np.array([1, 2], dtype=np.float32), torch.tensor([1.0, 2.0])],
)
def test_one_number_per_candidate_is_taken(values):
    found = gives({"size": values, "speed": FINE})
    assert {name: (v.dtype.name, v.tolist()) for name, v in found.items()} == {
        "size": ("float64", [1.0, 2.0]),
        "speed": ("float64", [1.0, 2.0]),
    }


def test_what_the_runner_keeps_is_not_changed():
    assert not np.shares_memory(gives({"size": FINE, "speed": FINE})["size"], FINE)


@pytest.mark.parametrize(
    "values",
    [
        "ab",
        ["a", "b"],
        "1.0",
        1.0,
        [1.0],
        [1.0, 2.0, 3.0],
        [[1.0], [2.0]],
        [[1.0], [2.0, 3.0]],
        np.array([1j, 2]),
        np.array([None, 1.0]),
        torch.tensor([1.0, 2.0], requires_grad=True),
        {},
        None,
        object(),
        b"ab",
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_refused_by_name(values):
    with pytest.raises(EvaluationError, match=r"^the metric speed of the runner Odd is a \w+ "):
        gives({"size": FINE, "speed": values})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "the runner Odd of size, speed returned a NoneType"),
        ([FINE, FINE], "the runner Odd of size, speed returned a list"),
        ({"size": FINE}, "did not return the metric speed"),
        ({"size": FINE, "speed": FINE, math.nan: FINE}, "returned the metric nan, which is not one that it declares"),
        ({"size": FINE, "speed": FINE, "Speed": FINE}, r"the metric 'Speed', .* declares in `produces`: size, speed"),
        ({"size": FINE, "speed": FINE, None: FINE}, "the metric None"),
    ],
)
def test_other_metrics_than_declared_are_refused(given, said):
    with pytest.raises(EvaluationError, match=said):
        gives(given)


@pytest.mark.parametrize("error", [SystemExit(), GeneratorExit("x"), BaseException("y")])
def test_what_would_end_the_program_becomes_an_error(error):
    with pytest.raises(CodeExitError) as found, contained():
        raise error
    assert described(found.value) == f"{type(error).__name__}: {error}".removesuffix(": ")


def test_ctrl_c_is_left_alone_where_nobody_notes_signals():
    with pytest.raises(KeyboardInterrupt), contained():
        raise KeyboardInterrupt


class UnreadableError(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def test_any_error_can_be_described():
    assert described(UnreadableError()) == "UnreadableError, whose text cannot be read: RuntimeError"
    assert described(ValueError("a\0b\x1b[1m\nsecond line")) == "ValueError: a b [1m"
    assert described(ValueError()) == "ValueError:"


@pytest.mark.parametrize("letter", ["x", "ü", "😀"])
def test_long_texts_are_cut_between_letters(letter):
    short = cut(letter * LONGEST_TEXT * 2)
    assert short.endswith(f"{letter} ... (cut at 10 kB)")
    assert len(short.encode()) <= LONGEST_TEXT + 20
    assert cut(letter * 100) == letter * 100
