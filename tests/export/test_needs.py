"""Flash and RAM of a candidate are those of the C that is written for it, and cycles follow what loops do."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from programs import cases
from torch import nn

from bitfront.errors import ExportError
from bitfront.exporters.c99 import cortex_m
from bitfront.exporters.c99.needs import CandidateNeeds, needs
from bitfront.exporters.exporting import export, target_named
from bitfront.exporters.lowering import lowered
from bitfront.exporters.targets.base import Candidate
from bitfront.exporters.targets.c import C
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.transforms import calibrate, quantize
from properties import max_examples


def _stated(candidate, folder):
    """What the header of the written files says: (flash, RAM), and the bytes of the arrays of the source."""
    C().write(candidate, folder)
    header, source = ((folder / f"{candidate.name}.{end}").read_text() for end in "hc")
    stated = tuple(int(re.search(rf"_{what}_BYTES (\d+)", header)[1]) for what in ("FLASH", "RAM"))
    arrays = re.findall(r"static const (?:u?int(\d+)_t|float) \w+\[(\d+)\]", source)
    counted = sum(int(bits or 32) // 8 * int(count) for bits, count in arrays)
    union = re.search(r"static union \{(.*?)\} arena;", source, re.S)
    sizes = re.findall(r"(?:u?int(\d+)_t|float) \w+\[(\d+)\]", union[1]) if union else []
    row = re.search(r"static int8_t row\[(\d+)\];", source)
    ram = max((int(bits or 32) // 8 * int(count) for bits, count in sizes), default=0)
    return stated, (counted, ram + (int(row[1]) if row else 0))


@max_examples(8)
@given(cases())
def test_the_metric_is_what_export_writes(tmp_path_factory, drawn):
    graph, formats, _ = drawn
    counted = CandidateNeeds(graph)
    names, rng = list(formats), np.random.default_rng(0)
    for _ in range(3):
        # Another candidate of the same network: some bits of some weights are others.
        changed = {
            name: {
                o: f.parse(
                    {"width": int(rng.integers(2, 9)), "frac_width": 3}, site_kind(graph, name, o), signed=f.signed
                )
                if o == "weight" and isinstance(f, Integer) and rng.random() < 0.5
                else f
                for o, f in formats[name].items()
            }
            for name in names
        }
        candidate = Candidate("net", graph, changed, quantize(graph, changed))
        try:
            expected = needs(lowered(graph, changed, full_ranges=True))
        except ExportError as error:
            with pytest.raises(ExportError, match=re.escape(str(error)[:40])):
                counted.of(changed)
            continue
        found = counted.of(changed)
        assert found == expected
        stated, arrays = _stated(candidate, tmp_path_factory.mktemp("c"))
        assert (found.flash, found.ram) == stated == arrays


def site_kind(graph, name, operand):
    site = next(s for s in graph.sites if s.name == name)
    return site.operation.operand(operand).kind()


def _network(channels=8):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(channels * 16, 4)
    )
    x = torch.randn(20, 1, 8, 8)
    graph = capture(model.eval(), x[:2])
    formats = {
        s.name: {
            o: Integer.parse(
                {"width": 12 if o == "bias" else 8, "frac_width": "auto"},
                s.operation.operand(o).kind(),
                signed=o != "data_in" or s.negative_inputs_matter,
            )
            for o in s.operands
        }
        for s in graph.sites
    }
    calibrated = calibrate(graph, formats, x)
    return Candidate("net", graph, calibrated, quantize(graph, calibrated, bake=True)), x


def test_more_channels_take_more_cycles():
    small, large = (needs(lowered(*_of(_network(c)[0]), full_ranges=True)).cycles for c in (4, 8))
    assert 1.7 * small < large < 2.2 * small


def _of(candidate):
    return candidate.graph, candidate.formats


@pytest.mark.skipif(cortex_m.missing() != "", reason=f"{cortex_m.missing()} is not installed")
class TestCortexM4:
    def test_it_computes_the_same_and_the_model_knows_how_long(self, tmp_path):
        candidate, x = _network()
        target = target_named("c", {"qemu": True})
        result = export(candidate, target, tmp_path / "out", x)
        assert result.differing == 0
        assert not (tmp_path / "out" / "cortex-m4").exists()
        assert "Cortex-M4" in (tmp_path / "out" / "README.md").read_text()
        ran = cortex_m.run("net", tmp_path / "out", x[:4].numpy())
        assert 0.6 < result.figures["cycles"] / (1.5 * ran.instructions) < 1.6

    def test_other_numbers_are_an_error(self, tmp_path, monkeypatch):
        candidate, x = _network(2)
        real = cortex_m.run
        monkeypatch.setattr(cortex_m, "run", lambda *given: cortex_m.Ran(real(*given).outputs[::-1], 1.0))
        with pytest.raises(ExportError, match="the Cortex-M4 computes other numbers"):
            export(candidate, target_named("c", {"qemu": True}), tmp_path / "out", x)


def test_a_missing_tool_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(cortex_m, "missing", lambda: "qemu-system-arm")
    candidate, x = _network(2)
    with pytest.raises(ExportError, match="no qemu-system-arm, which qemu = true needs; install it"):
        export(candidate, target_named("c", {"qemu": True}), tmp_path / "out", x)
