"""Networks for microcontrollers: MLPerf Tiny's four, searched, exported and compared; and the model of cycles.

MLPerf Tiny (mlcommons/tiny): ResNet-8, DS-CNN, MobileNet-V1 0.25 and the autoencoder, with random weights, batch norms
that belong to them, and folded. Each is searched briefly for flash against its float outputs; of every network of the
front the C is compiled, run, and compared number by number, and so is its ONNX file in ONNX Runtime. No accuracy is
looked at: there is no data here.

The model of cycles (``exporters/c99/cycles.py``) is compared with the instructions that QEMU counts for small networks,
where gcc-arm-none-eabi and qemu-system-arm are installed. ``--fit`` prints costs that are fitted to the counts.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import parser, report
from scipy.optimize import nnls
from torch import Tensor, nn

import bitfront as bf
from bitfront.data.arrays import from_splits
from bitfront.data.targets import NUMBERS
from bitfront.errors import ExportError
from bitfront.exporters.c99 import cortex_m
from bitfront.exporters.c99.cycles import INSTRUCTIONS, counts
from bitfront.exporters.c99.loops import Source
from bitfront.exporters.lowering import lowered
from bitfront.exporters.targets.base import Candidate
from bitfront.exporters.targets.c import C
from bitfront.formats.affine import Affine
from bitfront.formats.fixed_map import FixedMap
from bitfront.formats.integer import Integer
from bitfront.graph import Graph, capture
from bitfront.transforms import calibrate, quantize
from bitfront.transforms.fold import folded
from models import DsCnn, settled

# -- MLPerf Tiny


class ResNetBlock(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps of half the size where the stride is 2."""
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        result: Tensor = self.relu2(y + self.shortcut(x))
        return result


def resnet8() -> nn.Module:
    """Image classification, 3 x 32 x 32, 10 classes, 78 thousand parameters."""
    blocks = [ResNetBlock(16, 16, 1), ResNetBlock(16, 32, 2), ResNetBlock(32, 64, 2)]
    stem = (nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(64, 10))


def mobilenet() -> nn.Module:
    """Visual wake words, 3 x 96 x 96, 2 classes: MobileNet-V1 with a quarter of the channels."""
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    width = 8
    for outputs, stride in ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), *[(128, 1)] * 5, (256, 2), (256, 1)):
        layers += [nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        width = outputs
    return nn.Sequential(*layers, nn.AvgPool2d(3), nn.Flatten(), nn.Linear(width, 2))


def autoencoder() -> nn.Module:
    """Anomaly detection, 640 numbers in and out."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((640, 128), *[(128, 128)] * 3, (128, 8), (8, 128), *[(128, 128)] * 3):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 640))


def ds_cnn() -> nn.Module:
    """Keyword spotting, 1 x 49 x 10, 12 words."""
    layers = DsCnn().layers
    layers[-3] = nn.AvgPool2d((25, 5))
    return layers


TINY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-8": (resnet8, (3, 32, 32)),
    "DS-CNN": (ds_cnn, (1, 49, 10)),
    "MobileNet-V1 0.25": (mobilenet, (3, 96, 96)),
    "autoencoder": (autoencoder, (640,)),
}
_WEIGHTS = {"weight_width": [2, 4, 8], "weight_frac_width": ["auto"], "bias_width": [16], "bias_frac_width": ["auto"]}
_INPUTS = {"data_in_width": [8], "data_in_frac_width": ["auto"]}
SPACE = {
    "conv2d": {"name": ["integer"], **_INPUTS, **_WEIGHTS},
    "linear": {"name": ["integer"], **_INPUTS, **_WEIGHTS},
    "avgpool2d": {"name": ["integer"], **_INPUTS},
    # What a ReLU gives is stored in 8 bits, so that a shortcut does not keep sums.
    "relu": {"name": ["integer"], "data_out_width": [8], "data_out_frac_width": ["auto"]},
}


def tiny(name: str, trials: int, samples: int) -> list[dict[str, Any]]:
    """The front of one network: what each member needs, and on how many samples its C and its ONNX file differ."""
    begin = time.perf_counter()
    make, shape = TINY[name]
    x = torch.randn(3 * samples, *shape, generator=torch.Generator().manual_seed(0))
    model = folded(capture(settled(make, shape), x[:2]), x[:2]).graph.model
    with torch.no_grad():
        outputs = model(x)
    data = from_splits({s: (x[i::3], outputs[i::3]) for i, s in enumerate(("train", "val", "test"))}, targets=NUMBERS)
    kinds = {type(module).__name__.lower() for module in model.modules()}
    with tempfile.TemporaryDirectory() as folder:
        run = bf.search(
            model=model,
            data=data,
            space={kind: choices for kind, choices in SPACE.items() if kind in kinds},
            metrics={"mse": "minimize", "flash": "minimize"},
            strategy={"name": "surrogate", "setup": {"n_trials": trials}},
            project_dir=folder,
            task="regression",
        )
        rows = []
        for trial in run.front:
            files = bf.export(trial, to="c", model=model, data=data, samples=samples)
            needed = (files.figures["flash_bytes"], files.figures["ram_bytes"], files.figures["cycles"])
            assert needed == (trial.metrics["flash"], trial.metrics["ram"], round(trial.metrics["cycles"]))
            onnx = bf.export(trial, to="onnx", model=model, data=data, samples=samples)
            (file,) = onnx.folder.glob("*.onnx")
            rows.append(
                _row(name, f"trial {trial.number}")
                | {
                    "noise": float(trial.metrics["mse"]) / float(outputs.var()),
                    "flash, kB": needed[0] / 1e3,
                    "RAM, kB": needed[1] / 1e3,
                    "Mcycles": needed[2] / 1e6,
                    "ONNX, kB": file.stat().st_size / 1e3,
                    "differ": files.differing + onnx.differing,
                }
            )
    seconds = time.perf_counter() - begin
    return [row | {"seconds": seconds if i == 0 else None} for i, row in enumerate(rows)]


def _row(where: str, what: str) -> dict[str, Any]:
    needs = ("noise", "flash, kB", "RAM, kB", "Mcycles", "ONNX, kB")
    columns = (*needs, "differ", "instructions", "model / QEMU", "seconds")
    return {"network": where, "what": what, **dict.fromkeys(columns)}


# -- the model of cycles


class Adding(nn.Module):
    """Two branches, added and joined."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 3, padding=1)
        self.end = nn.Conv2d(2 * channels, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs of some samples."""
        a, b = self.a(x), self.b(x)
        return self.end(torch.cat([a + b, b], dim=1)).mean((2, 3))


def small_networks() -> list[tuple[str, nn.Module, tuple[int, ...]]]:
    """(name, network, shape of a sample)."""
    torch.manual_seed(0)
    linear = [
        (f"linear {i}-{o}", nn.Sequential(nn.Linear(i, o), nn.ReLU(), nn.Linear(o, 4)), (i,))
        for i, o in ((8, 8), (16, 64), (64, 16), (128, 32), (10, 100))
    ]
    convolutions = [
        (
            f"conv {c}-{o}, {k}x{k}, stride {s}, padding {p}, groups {g}",
            nn.Sequential(nn.Conv2d(c, o, k, s, p, groups=g), nn.ReLU(), nn.Conv2d(o, 4, 1), nn.Flatten()),
            (c, 8, 8),
        )
        for c, o, k, s, p, g in (
            (1, 8, 3, 1, 1, 1), (8, 8, 3, 1, 1, 8), (8, 16, 1, 1, 0, 1), (4, 4, 5, 2, 2, 1), (3, 6, 3, 1, 0, 3),
            (2, 8, (3, 1), 1, (1, 0), 1), (16, 4, 3, 2, 1, 1),
        )
    ]  # fmt: skip
    pools = [
        (
            f"{type(pool).__name__} {pool.kernel_size}",
            nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), pool, nn.Flatten(), nn.Linear(96, 4)),
            (1, 8, 8),
        )
        for pool in (nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1))
    ]
    return [*linear, *convolutions, *pools, ("added and joined", Adding(4), (4, 6, 6))]


def candidate(graph: Graph, family: str, x: torch.Tensor) -> Candidate:
    """A network in formats of a family."""
    generator, formats = np.random.default_rng(0), {}
    for site in graph.sites:
        of_site = formats.setdefault(site.name, {})
        for operand in site.operands:
            kind, signed = site.operation.operand(operand).kind(), operand != "data_in" or site.negative_inputs_matter
            shape = dict(site.shapes).get(operand)
            bits = 12 if operand == "bias" else {"integer4": 4, "integer2": 2, "integer12": 12}.get(family, 8)
            if family == "few" and operand == "weight":
                widths = (7 * (generator.random(shape) < 0.2)).astype(np.int8)
                of_site[operand] = FixedMap.of(widths, np.full(shape, 6, np.int8), signed=True, samples=False)
            elif family == "affine":
                granularity = "NA" if operand == "weight" else "tensor"
                of_site[operand] = Affine.parse({"width": bits, "granularity": granularity}, kind)
            else:
                of_site[operand] = Integer.parse({"width": bits, "frac_width": "auto"}, kind, signed=signed)
    calibrated = calibrate(graph, formats, x)
    return Candidate("net", graph, calibrated, quantize(graph, calibrated, bake=True))


def counted(quick: bool) -> list[tuple[str, str, Counter[str], float]]:
    """(network, formats, what its loops do, instructions of a sample on QEMU)."""
    rows = []
    for name, network, shape in small_networks()[: 1 if quick else None]:
        for family in ("integer8", "integer4", "integer2", "integer12", "few", "affine"):
            x = torch.randn(32, *shape, generator=torch.Generator().manual_seed(1))
            made = candidate(capture(network.eval(), x[:2]), family, x)
            try:
                source = Source(lowered(made.graph, made.formats, full_ranges=True))
            except ExportError:  # a mean of floats, or of sums of too many bits
                continue
            with tempfile.TemporaryDirectory() as folder:
                C().write(made, Path(folder))
                measured = cortex_m.run("net", Path(folder), x[:4].numpy()).instructions
            done = Counter[str]()
            for stage in source.stages:
                done += counts(source.program, stage)
            rows.append((name, family, done, measured))
    return rows


def fit(rows: list[tuple[str, str, Counter[str], float]]) -> None:
    """Print costs with which the model is nearest to the counts."""
    names = sorted({what for _, _, done, _ in rows for what in done})
    # Relative errors count.
    matrix = np.array([[done[what] / measured for what in names] for _, _, done, measured in rows])
    # What these networks hardly tell apart stays near the costs that are there.
    before = np.array([INSTRUCTIONS[what] for what in names])
    matrix = np.vstack([matrix, 0.1 * np.diag(1 / before)])
    costs, _ = nnls(matrix, np.append(np.ones(len(rows)), np.full(len(names), 0.1)))
    for what, cost in zip(names, costs, strict=True):
        print(f'    "{what}": {cost:.1f},')


def main() -> None:
    """All networks, and the model beside QEMU."""
    options = parser(__doc__)
    options.add_argument("--fit", action="store_true", help="only print costs fitted to QEMU's counts")
    given = options.parse_args()
    if given.fit:
        fit(counted(quick=False))
        return
    rows: list[dict[str, Any]] = []
    for name in ("autoencoder",) if given.quick else TINY:
        rows += tiny(name, *((2, 8) if given.quick else (6, 40)))
    summary = {
        "networks_exported": float(len(rows)),
        "samples_that_differ": float(sum(row["differ"] for row in rows)),
        "slowest_seconds": max(row["seconds"] or 0.0 for row in rows),
    }
    if not cortex_m.missing():
        ratios = []
        for name, family, done, measured in counted(given.quick):
            ratios.append(sum(INSTRUCTIONS[what] * n for what, n in done.items()) / measured)
            rows.append(_row(name, family) | {"instructions": measured, "model / QEMU": ratios[-1]})
        off = np.abs(np.array(ratios) - 1)
        summary |= {
            "cycle_model_error_median": float(np.median(off)),
            "cycle_model_error_largest": float(off.max()),
        }
    report("Microcontrollers", rows, summary, given.json)


if __name__ == "__main__":
    main()
