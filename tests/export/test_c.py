"""How the C of a network is laid out: memory, the order of roundings, and the forms of weights."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from programs import case, cases
from torch import nn

from bitfront.exporters import oracle
from bitfront.exporters.c99.early import rounded_early
from bitfront.exporters.c99.loops import Source
from bitfront.exporters.c99.stages import memory, stages
from bitfront.exporters.c99.tables import Tables
from bitfront.exporters.exporting import export, target_named
from bitfront.exporters.lowering import lowered
from bitfront.exporters.program import Round
from bitfront.exporters.targets.base import Candidate
from bitfront.formats.base import OperandKind
from bitfront.formats.fixed_map import FixedMap
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.transforms import calibrate, quantize
from properties import max_examples


def _integers(graph, x, width=8):
    """Every weight and input in so many bits, the bias in 16."""
    formats = {}
    for site in graph.sites:
        for operand in site.operands:
            signed = operand != "data_in" or site.negative_inputs_matter
            form = Integer.parse(
                {"width": 16 if operand == "bias" else width, "frac_width": "auto"},
                site.operation.operand(operand).kind(),
                signed=signed,
            )
            formats.setdefault(site.name, {})[operand] = form
    return calibrate(graph, formats, x)


@max_examples(12)
@given(cases())
def test_a_rounding_before_a_pooling_changes_no_number(drawn):
    graph, formats, x = drawn
    program, _ = case(graph, formats)
    early = rounded_early(program)
    assert np.array_equal(oracle.run(early, x.numpy()), oracle.run(program, x.numpy()))
    lows, highs = np.array([(v.low.min(), v.high.max()) for v in early.values]).T
    for low, high, numbers in zip(lows, highs, oracle.every_value(early, x.numpy()), strict=True):
        assert low <= numbers.min()
        assert numbers.max() <= high
    _check_memory(early)


def _check_memory(program):
    """No two values that are needed at the same time share a byte."""
    loops, held = stages(program)
    placed = memory(program, loops, held)
    sizes = {"float": 4} | {f"{u}int{b}_t": b // 8 for u in ("", "u") for b in (8, 16, 32, 64)}
    bytes_of = {}
    for k, (kind, at) in placed.places.items():
        begin = at * sizes[kind]
        bytes_of[k] = range(begin, begin + sizes[kind] * int(np.prod(program.values[k].shape)))
        assert bytes_of[k].stop <= placed.bytes
        assert placed.bytes % sizes[kind] == 0
    for i, stage in enumerate(loops):
        later = {s for other in loops[i + 1 :] for s in other.sources}
        alive = {
            k for k in placed.places if k in {s.result for s in loops[: i + 1]} and k in later | set(stage.sources)
        }
        alive |= {stage.result} & placed.places.keys()
        for a in alive:
            for b in alive - {a}:
                assert not set(bytes_of[a]) & set(bytes_of[b])


def test_the_sums_of_a_convolution_are_never_in_memory():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )
    x = torch.randn(8, 1, 8, 8)
    graph = capture(model.eval(), x[:2])
    source = Source(lowered(graph, _integers(graph, x)))
    # The input and the first convolution's result, or that result and the pooled one: one byte a number.
    assert source.ram == 8 * 64 + 8 * 16
    assert set(source.memory.kinds) <= {"int8_t", "uint8_t"}


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.relu = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        x = self.relu(self.first(x))
        return self.head((self.second(x) + x).flatten(1))


def test_the_sums_of_a_branch_are_added_in_its_loop():
    torch.manual_seed(0)
    x = torch.randn(8, 1, 4, 4)
    graph = capture(Shortcut().eval(), x[:2])
    weighted = {site.name for site in graph.sites if site.weight}
    formats = {name: of_site for name, of_site in _integers(graph, x).items() if name in weighted}
    activation = OperandKind("activation", True, None)
    relu = Integer.parse({"width": 8, "frac_width": "auto"}, activation, signed=True)
    graph = graph.naming({"relu"})
    formats = calibrate(graph, formats | {"relu": {"data_out": relu}}, x)
    program = lowered(graph, formats)
    source = Source(program)
    # What the ReLU gives, and the sums with the other branch: one byte a number.
    assert source.ram == 64 + 64
    assert len(source.stages) == 4
    # The second convolution takes the ReLU's format, so nothing is rounded again.
    assert sum(isinstance(step, Round) for step in program.steps) == 3


WEIGHTS = st.tuples(st.integers(1, 5), st.integers(1, 700), st.sampled_from([0.0, 0.02, 0.3, 1.0]), st.integers(0, 9))


def _values(tables, name):
    kind, values = tables._arrays[name]
    return kind, np.asarray(values)


def _unpacked(tables, name, bits, count):
    """The numbers of a packed table, as the C reads them."""
    _, values = _values(tables, name)
    if bits >= 8:
        return values[:count]
    each = 8 // bits
    numbers = (values[:, None] >> (bits * np.arange(each))) & (2**bits - 1)
    return (numbers - 2**bits * (numbers >> (bits - 1))).ravel()[:count]


@given(WEIGHTS, st.sampled_from([2, 8, 100, 40000]), st.sampled_from([0.0, 0.01, 1.0]))
def test_a_weight_in_any_form_is_the_weight(shape, largest, wide):
    rows, columns, dense, seed = shape
    rng = np.random.default_rng(seed)
    weight = rng.integers(-largest, largest, (rows, columns)) // np.where(rng.random((rows, columns)) < wide, 1, 8)
    weight *= rng.random((rows, columns)) < dense
    tables = Tables()
    held = tables.add_weight("w", weight)
    got = np.zeros(weight.shape, np.int64)
    if held.table is not None:
        got += _unpacked(tables, held.table, held.bits, weight.size).reshape(weight.shape)
    if held.starts is not None:
        starts, gaps = _values(tables, held.starts)[1], _values(tables, held.gaps)[1]
        values = _unpacked(tables, held.values, held.value_bits, len(gaps))
        for row in range(rows):
            entries = slice(starts[row], starts[row + 1])
            np.add.at(got[row], np.cumsum(gaps[entries]), values[entries])
    assert np.array_equal(got, weight)
    packed = next(b for b in (2, 4, 8, 16, 32) if (abs(weight * 2 + 1) < 2**b).all())
    assert tables.bytes <= max(1, -(-weight.size * packed // 8))


@pytest.mark.parametrize("case_", ["few", "mixed"])
def test_lists_of_weights_compute_the_same(case_, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 25, 5))
    x = torch.randn(30, 2, 5, 5)
    graph = capture(model.eval(), x[:2])
    formats = _integers(graph, x)
    rng = np.random.default_rng(0)
    for site in (s for s in graph.sites if s.weight):
        shape = dict(site.shapes)["weight"]
        chosen = rng.random(shape) < 0.1
        widths = np.where(chosen, 8, 0 if case_ == "few" else 2).astype(np.int8)
        formats[site.name]["weight"] = FixedMap.of(
            widths, np.where(chosen, 7, 2).astype(np.int8), signed=True, samples=False
        )
    given_ = Candidate("net", graph, formats, quantize(graph, formats, bake=True))
    result = export(given_, target_named("c"), tmp_path / "out", x)
    assert result.differing == 0
    source = (tmp_path / "out" / "net.c").read_text()
    assert "_gaps[" in source
    if case_ == "few":
        assert result.figures["flash_bytes"] < 0.5 * sum(p.numel() for p in model.parameters())
