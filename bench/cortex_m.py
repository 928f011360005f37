"""The cycle model of the target c against the instructions that QEMU counts (``python bench/cortex_m.py``).

Small networks are compiled for a Cortex-M4 and run in QEMU. ``--fit`` fits the costs of ``exporters/c99/cycles.py`` to
the counts and prints them; without it, the table shows how far the model is off. Needs gcc-arm-none-eabi and
qemu-system-arm.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn

from bitfront.errors import ExportError
from bitfront.exporters.c99 import cortex_m
from bitfront.exporters.c99.cycles import INSTRUCTIONS, counts
from bitfront.exporters.c99.loops import Source
from bitfront.exporters.targets.base import Candidate
from bitfront.exporters.targets.c import C
from bitfront.formats.affine import Affine
from bitfront.formats.fixed_map import FixedMap
from bitfront.formats.integer import Integer
from bitfront.graph import Graph, capture
from bitfront.transforms import calibrate, quantize


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


def networks() -> list[tuple[str, nn.Module, tuple[int, ...]]]:
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


def main() -> None:
    """Print the table, or the fitted costs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fit", action="store_true", help="fit the costs")
    rows: list[tuple[str, Counter[str], float]] = []
    for name, network, shape in networks():
        for family in ("integer8", "integer4", "integer2", "integer12", "few", "affine"):
            x = torch.randn(32, *shape, generator=torch.Generator().manual_seed(1))
            made = candidate(capture(network.eval(), x[:2]), family, x)
            try:
                program = made.program
            except ExportError:  # a mean of floats, or of sums of too many bits
                continue
            with tempfile.TemporaryDirectory() as folder:
                C().write(made, Path(folder))
                measured = cortex_m.run("net", Path(folder), x[:4].numpy()).instructions
            source = Source(program)
            done = Counter[str]()
            for stage in source.stages:
                done += counts(source.program, stage)
            rows.append((f"{name}, {family}", done, measured))
    if parser.parse_args().fit:
        names = sorted({what for _, done, _ in rows for what in done})
        # Relative errors count.
        matrix = np.array([[done[what] / measured for what in names] for _, done, measured in rows])
        # What these networks hardly tell apart stays near the costs that are there.
        before = np.array([INSTRUCTIONS[what] for what in names])
        costs, _ = nnls(
            np.vstack([matrix, 0.1 * np.diag(1 / before)]), np.append(np.ones(len(rows)), np.full(len(names), 0.1))
        )
        for what, cost in zip(names, costs, strict=True):
            print(f'    "{what}": {cost:.1f},')
        predicted = matrix @ costs
    else:
        predicted = np.array(
            [sum(INSTRUCTIONS[w] * n for w, n in done.items()) / measured for _, done, measured in rows]
        )
    for (name, _, measured), ratio in zip(rows, predicted, strict=True):
        print(f"{name:60} {measured:10.0f} {ratio:6.2f}")
    print(f"model / QEMU: {np.percentile(predicted, [0, 5, 50, 95, 100]).round(2).tolist()}")


if __name__ == "__main__":
    main()
