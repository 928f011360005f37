"""A number format of another package: joined by an entry point, searched with, trained, and read back by its name."""

import json

import pytest
from journey import settings

import bitfront as bf
from bitfront import checkpoints

pytestmark = pytest.mark.journey

#: Its class is called otherwise than the format, and it learns something that is stored.
FORMAT = '''
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from bitfront.formats import FORMATS
from bitfront.formats.base import Format, FormatError, FormatParameter


@FORMATS.register("my-format")
@dataclass(frozen=True)
class MyFmt(Format):
    """Whole multiples of a step that the largest value decides."""

    width: int
    steps: tuple[float, ...] | None = None

    parameters: ClassVar[Mapping[str, FormatParameter]] = {"width": FormatParameter("bits of a value", low=2, high=8)}

    @classmethod
    def _build(cls, values, kind, signed):
        return cls(values["width"])

    @property
    def bits(self):
        return self.width

    @property
    def label(self):
        return f"my{self.width}"

    @property
    def calibrates(self):
        return self.steps is None

    def calibrated(self, sample):
        if not self.calibrates:
            return self
        return replace(self, steps=(max(float(sample.abs().max()), 1e-6) / self.largest,))

    @property
    def largest(self):
        return 2 ** (self.width - 1) - 1

    def bounds(self, x):
        return -self.largest * self.step, self.largest * self.step

    def round(self, x):
        return torch.clamp(torch.round(x / self.step), -self.largest, self.largest) * self.step

    @property
    def step(self):
        if self.steps is None:
            raise FormatError("my-format must be calibrated before it is used")
        return self.steps[0]
'''
TRAINED = """
[search.strategy.sw_runner.basic_train]
max_epochs = 2
[search.finetune]
trials = 1
max_epochs = 4
"""


@pytest.fixture
def installed(trained):
    """A command line beside whose ``small.toml`` a package is installed that brings the format."""
    package = trained.folder / "site" / "third_party"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "formats.py").write_text(FORMAT)
    described = trained.folder / "site" / "third_party-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[bitfront.formats]\nmy-format = third_party.formats\n")
    trained.env["PYTHONPATH"] += f":{trained.folder / 'site'}"
    return trained


def assert_rebuilt(shell, number, metrics, checkpoint):
    """``transform --check`` measures what the run says of a trial, in the formats of a checkpoint."""
    typed = shell("transform", "--run", "runs/small", "--trial", number, "--check", "--json", cold=True)
    measured = json.loads(typed.out)
    assert (measured["accuracy"], measured["loss"]) == (metrics["accuracy"], metrics["loss"])
    run = shell.folder / "runs/small"
    formats = json.loads((run / f"transformed/trial-{number}/quantization.json").read_text())["formats"]
    assert formats == checkpoints.read_meta(run / "checkpoints" / checkpoint)["formats"]
    assert {f["format"] for site in formats.values() for f in site.values()} == {"my-format"}
    assert all(f["steps"][0] > 0 for site in formats.values() for f in site.values())


@pytest.mark.long
def test_a_format_of_another_package_is_searched_trained_and_rebuilt(installed, data):
    assert "my-format" in installed("list", "formats", cold=True).out

    text = settings(data, strategy='name = "brute_force"', weights="[2, 8]")
    text = text.replace('"integer"', '"my-format"').replace("data_in_width = [4, 8]", "data_in_width = [8]")
    lines = [line for line in text.splitlines() if "_frac_width" not in line]
    installed.write("third.toml", "\n".join(lines) + TRAINED)
    installed("search", "--config", "third.toml", cold=True)
    run = bf.Run.load(installed.folder / "runs/small")
    ((number, tuned),) = run.finetuned.items()
    plain = next(t for t in run.front if t.finetuned is None)

    # Each in a new process: nothing but the run folder and the installed package says what the format is.
    assert_rebuilt(installed, plain.number, plain.metrics, f"trial-{plain.number}.pt")
    if tuned.kept:
        assert_rebuilt(installed, number, tuned.metrics, f"finetuned-{number}.pt")
    else:
        assert_rebuilt(installed, number, run.trial(number).metrics, f"trial-{number}.pt")

    # Without the package the run is still read, and says what is missing.
    installed.env["PYTHONPATH"] = installed.env["PYTHONPATH"].split(":")[0]
    without = bf.Run.load(installed.folder / "runs/small")
    assert [(t.number, t.code, t.metrics) for t in without.trials] == [
        (t.number, t.code, t.metrics) for t in run.trials
    ]
    typed = installed("transform", "--run", "runs/small", "--trial", plain.number, cold=True, code=2)
    assert "there is no format 'my-format'" in typed.err
