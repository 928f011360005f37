"""Conformance of every target: what it writes computes the same numbers, or the candidate is refused by name.

A new target is listed in ``TARGETS`` by itself; what it cannot take is named in ``REFUSES``.
"""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from programs import Overlapping, Pooled
from torch import nn

from bitfront.errors import ExportError, MissingExtraError
from bitfront.events import Events
from bitfront.exporters.exporting import export, target_named
from bitfront.exporters.targets import TARGETS
from bitfront.exporters.targets.base import Candidate
from bitfront.formats.affine import Affine
from bitfront.formats.fixed_map import FixedMap
from bitfront.formats.integer import Integer
from bitfront.graph import capture
from bitfront.testing import check_target
from bitfront.transforms import calibrate, quantize
from bitfront.transforms.fold import folded
from random_networks import Depthwise, Network, Residual


def _mlp():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7, bias=False), nn.ReLU(), nn.Linear(7, 3))


NETWORKS = {
    "mlp": (_mlp, (6,)),
    "flattened": (lambda: nn.Sequential(nn.Flatten(), *_mlp()), (2, 3)),
    "residual": (lambda: Network([(Residual, 1)], True), Network.shape),
    "depthwise": (lambda: Network([(Depthwise, 1)], False), Network.shape),
    "joined": (lambda: Network([(Overlapping, 1)], True), Network.shape),
    "pooled": (lambda: Network([(Pooled, 1), (Pooled, 2)], True), Network.shape),
    "sequence": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(),
                                       nn.Linear(12, 3)), (2, 6)),
}  # fmt: skip


def _fixed(width):
    def form(site, operand):
        signed = operand != "data_in" or site.negative_inputs_matter
        bits = 12 if operand == "bias" else width
        return Integer.parse(
            {"width": bits, "frac_width": "auto"}, site.operation.operand(operand).kind(), signed=signed
        )

    return form


def _ways(site, operand):
    """Every way to round and to treat what is out of range, over the operands of a network."""
    number = len(site.name) + len(operand)
    ways = {
        "rounding": ("half_up", "floor", "even")[number % 3],
        "overflow": ("wrap", "saturate_symmetric", "saturate")[number // 3 % 3],
    }
    signed = operand != "data_in" or site.negative_inputs_matter
    settings = {"width": 12 if operand == "bias" else 5, "frac_width": "auto", **ways}
    return Integer.parse(settings, site.operation.operand(operand).kind(), signed=signed)


def _affine(site, operand):
    kind = site.operation.operand(operand).kind()
    return Affine.parse({"width": 8, "granularity": "NA" if operand == "weight" else "tensor"}, kind)


def _elements(site, operand):
    """Bits of each value, also none, as learned bits have them."""
    generator = np.random.default_rng(len(site.name))
    inputs = operand == "data_in"
    shape = site.inputs[0] if inputs else dict(site.shapes)[operand]
    widths = generator.integers(0, 8, shape).astype(np.int8)
    points = generator.integers(1, 6, shape).astype(np.int8)
    rounding = ("floor", "even")[len(site.name) % 2] if inputs else "even"
    signed = not inputs or site.negative_inputs_matter
    return FixedMap.of(widths, points, signed=signed, samples=inputs, rounding=rounding)


def _channels(site, operand):
    """A binary point per channel."""
    kind = site.operation.operand(operand).kind()
    signed = operand != "data_in" or site.negative_inputs_matter
    granularity = "tensor" if operand == "bias" else "channel"
    settings = {"width": 12 if operand == "bias" else 5, "frac_width": "auto", "granularity": granularity}
    return Integer.parse(settings, kind, signed=signed)


FORMATS = {
    "fixed4": _fixed(4),
    "fixed8": _fixed(8),
    "ways": _ways,
    "affine": _affine,
    "elements": _elements,
    "channels": _channels,
}
#: Those in fixed point.
FIXED = tuple(name for name in FORMATS if name != "affine")
#: What has no integer program: (network, formats) → what of the message names the reason.
NO_PROGRAM = dict.fromkeys([("depthwise", "affine"), ("pooled", "affine")], "a mean of float32 numbers")
#: target → the same, for what it cannot take besides; ("", formats) stands for all networks.
REFUSES: dict[str, dict[tuple[str, str], str]] = {
    "rtl": {("", "affine"): "its numbers are float32, because a scale is no power of two .* and rtl has no floats"}
    | dict.fromkeys([("pooled", f) for f in FIXED], "it rounds a mean of 9 values")
    | dict.fromkeys([("joined", f) for f in FIXED], "cuts them to 24 digits"),
    "qdq": {
        ("", "ways"): "runtimes round half to even and saturate",
        ("", "elements"): "only whole numbers of at most 8 bits",
        ("", "channels"): "with a scale per channel, which runtimes do not fuse",
    },
    "qonnx": {("", "affine"): "a scale is no power of two", ("", "ways"): "it wraps around"},
    "hls4ml": {("", "affine"): "a scale is no power of two", ("", "ways"): "it wraps around"}
    | dict.fromkeys([("joined", f) for f in FIXED], "more than 24 bits|wraps around")
    | dict.fromkeys([("pooled", f) for f in FIXED], "9 times a power of two|wraps around"),
}
#: What takes more than five seconds, most of them in the simulator.
LEFT_OUT = {
    ("rtl", "residual", "fixed4"),
    ("rtl", "residual", "fixed8"),
    ("rtl", "depthwise", "fixed8"),
    ("rtl", "depthwise", "fixed4"),
}
#: What takes that long too, and sees what the same network in other formats has seen.
LONG = {("rtl", "residual", "channels")}
#: Targets whose judge takes a second or more.
SLOW = {"torch"}
#: Where a judge takes ten seconds: what it runs here. The other files are only written.
JUDGED = {"hls4ml": {("mlp", "fixed4"), ("depthwise", "fixed8"), ("residual", "elements")}}


@functools.cache
def candidate(network, formats):
    build, shape = NETWORKS[network]
    x = torch.randn(40, *shape, generator=torch.Generator().manual_seed(1))
    graph = folded(capture(build().eval(), x[:2]), x[:2]).graph
    form = FORMATS[formats]
    # Sums and joins of bits per value have no formats: their operands are as their layers give them.
    chosen = [s for s in graph.sites if s.weight or formats != "elements"]
    wanted = {s.name: {o: form(s, o) for o in s.operands} for s in chosen}
    calibrated = calibrate(graph, wanted, x)
    return Candidate(f"{network}_{formats}", graph, calibrated, quantize(graph, calibrated, bake=True)), x


def _pairs():
    """Every target with every network and format; a slow one with each network and each format."""
    for name in TARGETS.names():
        for i, network in enumerate(NETWORKS):
            slow = list(FORMATS)[i % len(FORMATS)] if name in SLOW else None
            for formats in FORMATS:
                marks = [pytest.mark.slow] if (network, formats) in JUDGED.get(name, ()) else []
                marks += [pytest.mark.long] if (name, network, formats) in LONG else []
                if slow in (None, formats) and (name, network, formats) not in LEFT_OUT:
                    yield pytest.param(name, network, formats, marks=marks)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "network", "formats"), list(_pairs()))
def test_what_a_target_writes_computes_the_same_numbers(name, network, formats, tmp_path):
    given, x = candidate(network, formats)
    target = target_named(name)
    refused = REFUSES.get(name, {}) | (NO_PROGRAM if target.whole else {})
    expected = refused.get((network, formats)) or refused.get(("", formats))
    judged = (network, formats) in JUDGED.get(name, {(network, formats)})
    try:
        check_target(target, given, x, tmp_path / "out", refusal=expected or "", judged=judged)
    except MissingExtraError as error:
        pytest.skip(str(error))


def test_a_file_that_has_neither_form_says_why_in_both(tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed: pip install 'bitfront[onnx]'")
    x = torch.randn(4, 1, 4, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Conv1d(1, 2, 1), nn.AvgPool1d(4), nn.Flatten(), nn.Linear(2, 3)).eval()
    graph, form = capture(model, x[:2]), _fixed(16)
    formats = calibrate(graph, {s.name: {o: form(s, o) for o in s.operands} for s in graph.sites if s.weight}, x)
    given = Candidate("wide", graph, formats, quantize(graph, formats, bake=True))
    with pytest.raises(ExportError, match=r"whole numbers \(.* the sum of 4 values .* floats \(.* at most 8 bits"):
        export(given, target_named("onnx"), tmp_path / "out", x)


def test_an_onnx_file_holds_what_all_values_share_once(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'bitfront[onnx]'")
    given, _ = candidate("residual", "fixed8")
    target_named("onnx").write(given, tmp_path)
    constants = onnx.load(tmp_path / f"{given.name}.onnx").graph.initializer
    floats = [list(c.dims) for c in constants if c.data_type == onnx.TensorProto.FLOAT]
    assert floats
    assert all(sum(size > 1 for size in dims) <= 1 for dims in floats)  # one number, or one per channel


@pytest.mark.parametrize("formats", ["fixed8", "elements"])
@pytest.mark.parametrize("network", ["depthwise", "joined", "pooled", "sequence"])
def test_qonnx_with_channels_last_computes_the_same_numbers(network, formats, tmp_path):
    pytest.importorskip("qonnx", reason="qonnx is not installed: pip install 'bitfront[qonnx]'")
    given, x = candidate(network, formats)
    assert export(given, target_named("qonnx", {"layout": "channels_last"}), tmp_path / "out", x).differing == 0


def test_every_layer_of_hls4ml_has_a_type_that_was_stated(tmp_path):
    pytest.importorskip("hls4ml", reason="hls4ml is not installed: pip install 'bitfront[hls4ml]'")
    given, x = candidate("residual", "fixed8")
    folder = export(
        given, target_named("hls4ml", {"part": "xcku115-flvb2104-2-i"}), tmp_path / "out", x, check=False
    ).folder
    layers = json.loads((folder / "hls4ml_config.json").read_text())["LayerName"]
    assert layers["global_in"]["Precision"] == {"result": "fixed<8,3,RND_CONV,SAT>"}
    assert {"result", "accum", "bias"} <= layers["stem"]["Precision"].keys()
    types = (folder / "project" / "firmware" / "defines.h").read_text()
    assert "fixed<16,6>" not in types
    assert "xcku115-flvb2104-2-i" in (folder / "project" / "project.tcl").read_text()


def test_convolutions_of_hls4ml_are_not_streamed(tmp_path):
    pytest.importorskip("hls4ml", reason="hls4ml is not installed: pip install 'bitfront[hls4ml]'")
    given, x = candidate("depthwise", "fixed8")
    with pytest.raises(ExportError, match="take io_type=io_parallel"):
        export(given, target_named("hls4ml", {"io_type": "io_stream"}), tmp_path / "out", x)


def test_files_that_compute_something_else_are_not_kept(tmp_path, monkeypatch):
    given, x = candidate("mlp", "fixed8")
    target = target_named("c")
    write = type(target).write

    def damaged(self, chosen, folder):
        write(self, chosen, folder)
        source = folder / f"{chosen.name}.c"
        source.write_text(source.read_text().replace("int32_t v = 0;", "int32_t v = 1;", 1))

    monkeypatch.setattr(type(target), "write", damaged)
    with pytest.raises(ExportError, match=r"c: not kept: on .* samples a C compiler with UBSan computes other numbers"):
        export(given, target, tmp_path / "out", x)
    assert not list(tmp_path.iterdir())


def test_the_folder_says_how_features_become_inputs_and_which_output_is_which_class(tmp_path):
    given, x = candidate("mlp", "fixed8")
    alone = export(given, target_named("c"), tmp_path / "alone", x, check=False)
    assert "standardise" not in (alone.folder / "README.md").read_text()
    scaled = replace(given, classes=("cat", "dog"), standardised=[("mass", 80.5, 0.1), ("width", -3.0, 2.0)])
    result = export(scaled, target_named("c"), tmp_path / "out", x, check=False)
    readme = (result.folder / "README.md").read_text()
    assert "standardised.\n" in readme
    assert "in the order of the outputs: cat, dog." in readme
    assert "standardise.json" in result.files
    written = json.loads((result.folder / "standardise.json").read_text())
    assert written == {"features": ["mass", "width"], "mean": [80.5, -3.0], "scale": [0.1, 2.0]}


def test_metrics_beside_files_of_another_network_are_said_to_be_of_the_searched_one(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    given, x = candidate("mlp", "fixed8")
    given, target = replace(given, metrics={"accuracy": 0.75}), target_named("qdq")
    equal = export(given, target, tmp_path / "equal", x)
    computed = type(target).computed
    monkeypatch.setattr(type(target), "computed", lambda *given: computed(*given) + np.float32(1e-3))
    other = export(given, target, tmp_path / "other", x)
    assert equal.differing == 0 < other.differing
    assert "| metric | value |" in (equal.folder / "README.md").read_text()
    assert "| metric of the searched network | value |" in (other.folder / "README.md").read_text()


@pytest.mark.parametrize("format_of_bias", ["finer", "as fine", "none"])
def test_biases_that_a_runtime_would_round_again_are_rounded_before(format_of_bias, tmp_path):
    """They are finer than the sums of their layer. Files and metrics are those of the network with the rounded ones."""
    pytest.importorskip("onnxruntime")
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    graph = capture(model, x[:2])
    # Inputs in steps of 1/16, weights of 1/32: sums of 1/512.
    bits = {"data_in": (8, 4), "weight": (8, 5), "bias": (16, 9)}
    wanted = {}
    for site in (s for s in graph.sites if s.weight):
        widths = dict(bits)
        if site.path == "2" and format_of_bias == "finer":
            widths["bias"] = (16, 11)
        elif site.path == "2" and format_of_bias == "none":
            del widths["bias"]
        wanted[site.name] = {
            o: Integer.parse({"width": w, "frac_width": f}, site.operation.operand(o).kind())
            for o, (w, f) in widths.items()
        }
    formats = calibrate(graph, wanted, x)
    given = Candidate("net", graph, formats, quantize(graph, formats, bake=True), metrics={"loss": 1.0, "bits": 8.0})
    measured = []

    def measure(model):
        measured.append(model(x))
        return {"loss": 2.5}

    result = export(given, target_named("qdq"), tmp_path / "out", x, measure=measure)
    readme = (result.folder / "README.md").read_text()
    assert result.differing == 0
    if format_of_bias == "as fine":
        assert not result.change
        assert not measured
        assert "| metric | value |" in readme
        return
    change = "with 1 bias rounded to steps of the sums, as runtimes hold them"
    assert result.message.endswith(
        f"equal to the searched network in every bit, {change}; measured with this change: loss 2.5"
    )
    assert f"The searched network {change}: those of _2 (Linear)." in readme
    assert "| metric of the searched network | value |" in readme
    assert "| metric with this change, measured on the same samples | value |\n|---|---|\n| loss | 2.5 |" in readme
    # By hand: what is added to the sums of the second layer is n / 512.
    layers, bias = [model[0], model[2], model[4]], formats["_2"].get("bias")
    held = layers[1].bias.detach() if bias is None else bias.quantize(layers[1].bias.detach())
    y = x
    for i, layer in enumerate(layers):
        y = torch.clamp(torch.round(y * 16), -128, 127) / 16
        weight = torch.clamp(torch.round(layer.weight.detach() * 32), -128, 127) / 32
        own = torch.round(layer.bias.detach() * 512) / 512 if i != 1 else torch.round(held * 512) / 512
        y = y @ weight.T + own
        y = torch.relu(y) if i < 2 else y
    assert torch.equal(measured[0], y)
    assert not torch.equal(given.model(x), y)  # the user's is as it was


def test_a_folder_that_no_export_has_written_is_not_touched(tmp_path):
    given, x = candidate("mlp", "fixed8")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="no export has written it"):
        export(given, target_named("c"), tmp_path, x)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_earlier_export_is_replaced_and_that_is_said(tmp_path):
    given, x = candidate("mlp", "fixed8")

    class Said(Events):
        def __init__(self):
            self.notes = []

        def note(self, text):
            self.notes.append(text)

    first, second = Said(), Said()
    for events in (first, second):
        export(given, target_named("c"), tmp_path / "out", x, check=False, events=events)
        (tmp_path / "out-unchecked" / "built.o").touch()
    assert not any("replaced" in note for note in first.notes)
    assert any("earlier export in " in note and note.endswith("out-unchecked are replaced") for note in second.notes)
    export(given, target_named("c"), tmp_path / "out", x, check=False)
    assert not (tmp_path / "out-unchecked" / "built.o").exists()


def test_what_is_not_checked_says_so(tmp_path):
    given, x = candidate("mlp", "fixed8")
    result = export(given, target_named("c"), tmp_path / "out", x, check=False)
    assert result.folder == tmp_path / "out-unchecked"
    assert "not checked" in result.message
    assert "Not checked" in (result.folder / "README.md").read_text()
