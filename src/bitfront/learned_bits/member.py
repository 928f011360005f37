"""A network in training by compiled steps: its live weights as lists, which get shorter as weights are removed.

After weights were removed the operations are written anew, so that training costs what is alive.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitfront import kernels
from bitfront.kernels import bits as compiled
from bitfront.kernels import training as steps
from bitfront.kernels.whole import ROUNDINGS
from bitfront.learned_bits.program import BitsProgram, Indices, Product, Round
from bitfront.learned_bits.state import Cost, Member, Samples, Steps
from bitfront.operations.training import Bend
from bitfront.population.compiled_program import mark_gradients, operation_of, rounded_up
from bitfront.population.programs import TrainingStep

#: Bytes of values and gradients of a tile of samples: they should fit into the cache of one core.
TILE_BYTES = 1 << 19


@dataclass(eq=False)
class BitsMember(Member):
    """A network in training by compiled steps."""

    program: BitsProgram
    prepared: ClassVar[tuple[str, ...]] = ("native", "workspace", "_operations", "_held")

    def learn(self, samples: Samples, steps: Steps) -> float:
        """One step of Adam per batch."""
        loss = compiled.learn(
            self.native,
            self.workspace,
            steps.cost.native,
            samples.x,
            samples.y,
            samples.targets,
            steps.order,
            steps.batch,
            steps.rates,
            steps.betas,
            self.taken,
            self.first_bits,
            steps.bits_rate,
        )
        self.taken += len(steps.rates)
        return loss

    def measured(self, samples: Samples, cost: Cost) -> tuple[float, float]:
        """(what the bits cost, how many of the samples are classified correctly)."""
        everything = torch.arange(len(samples.y), dtype=torch.int32)
        logits, total = compiled.logits(self.native, self.workspace, cost.native, samples.x, everything)
        _, right = kernels.score(logits.unsqueeze(0), samples.y)
        return total, float(right)

    def reshape(self) -> None:
        """Write the operations anew; call it when weights were removed."""
        program = self.program
        first_row, rows = {0: -1}, 0
        for step in program.steps:
            if not isinstance(step, Round | Product) and step.kind == "flatten":
                first_row[step.output] = first_row[step.inputs[0]]
                continue
            first_row[step.output] = rows
            rows += math.prod(program.shapes[step.output])
        self._held: list[Tensor] = []
        operations: list[steps.NativeOperation] = []
        rounding: dict[int, int] = {}
        packed = 0
        for step in program.steps:
            if isinstance(step, Round):
                rounding[step.layer] = len(operations)
                operation, size = self._round(step)
            elif isinstance(step, Product):
                operation, size = self._product(step, rounding[step.layer])
            elif step.kind == "flatten":
                continue
            elif step.kind == "concatenate":
                operations += self._copies(step, first_row)
                continue
            else:
                operation, held = operation_of(step, program.shapes[step.inputs[0]], program.shapes[step.output])
                size = 0
                self._held += held
            inputs = step.inputs if not isinstance(step, Round | Product) else (step.input,)
            operation.input, operation.input2 = first_row[inputs[0]], first_row[inputs[-1]]
            operation.output, operation.scratch = first_row[step.output], packed
            packed += rounded_up(size, steps.LANES)
            operations.append(operation)
        mark_gradients(operations)
        self._operations = (steps.NativeOperation * len(operations))(*operations)
        self.native = steps.NativeMember(
            ctypes.addressof(self._operations),
            len(operations),
            len(self.values),
            first_row[program.logits],
            program.shapes[program.logits][0],
            self.values.data_ptr(),
            None,
            self.moments[0].data_ptr(),
            self.moments[1].data_ptr(),
        )
        tile = TILE_BYTES // (8 * max(1, rows)) // steps.LANES * steps.LANES
        self.workspace = compiled.Workspace.of(
            rows,
            packed,
            len(self.values),
            math.prod(program.shapes[0]) + program.shapes[program.logits][0],
            max(layer.weight_groups(slots)[1] for layer, slots in zip(program.layers, self.live, strict=True)),
            min(compiled.LARGEST_TILE, max(4 * steps.LANES, tile)),
        )

    def _copies(self, step: TrainingStep, first_row: Mapping[int, int]) -> list[steps.NativeOperation]:
        """Channels are rows one after another, so each part is copied to its place."""
        operations, row = [], first_row[step.output]
        for value in step.inputs:
            shape = self.program.shapes[value]
            operation, _ = operation_of(TrainingStep("bend", (value,), step.output, bend=Bend()), shape, shape)
            operation.input = operation.input2 = first_row[value]
            operation.output = row
            row += math.prod(shape)
            operations.append(operation)
        return operations

    def _hold(self, array: NDArray[np.int64]) -> int:
        tensor = torch.from_numpy(array.astype(np.int32))
        self._held.append(tensor)
        return tensor.data_ptr()

    def _round(self, step: Round) -> tuple[steps.NativeOperation, int]:
        layer, place = self.program.layers[step.layer], self.places[step.layer]
        rows = math.prod(layer.source)
        operation = steps.NativeOperation(
            kind=steps.KINDS.index("round"),
            channels_in=rows,
            channels=rows,
            positions_in=1,
            positions=1,
            rectify=step.rectify,
            fractions=place.fractions.start,
            integers=place.integers.start,
            groups=self._hold(layer.input_groups[0]),
            widths=layer.magnitudes["data_in"],
            way=ROUNDINGS.index(layer.shared.data_in_rounding),
        )
        return operation, 6 * rounded_up(rows, steps.LANES)

    def _product(self, step: Product, source: int) -> tuple[steps.NativeOperation, int]:
        layer, place, slots = self.program.layers[step.layer], self.places[step.layer], self.live[step.layer]
        out, slot, row = layer.products(slots)
        positions_in, positions_out = layer.positions
        rows_out, rows_in = math.prod(layer.target), math.prod(layer.source)
        operation = steps.NativeOperation(
            kind=steps.KINDS.index("sparse"),
            channels_in=layer.source[0],
            channels=layer.target[0],
            positions_in=positions_in,
            positions=positions_out,
            weight=place.weight.start,
            bias=place.bias.start if layer.bias else -1,
            fractions=place.weight_bits.start,
            bias_fractions=place.bias_bits.start if layer.bias else -1,
            slots=len(slots),
            source=source,
            forward=self._lists(rows_out, out, slot, row),
            backward=self._lists(rows_in, row, slot, out),
            groups=self._hold(layer.weight_groups(slots)[0]),
            widths=layer.magnitudes["weight"],
            bias_widths=layer.magnitudes["bias"],
            sharing=layer.sharing,
        )
        return operation, 3 * rounded_up(len(slots), steps.LANES) + layer.target[0]

    def _lists(self, count: int, which: Indices, first: Indices, second: Indices) -> steps.NativeLists:
        order = np.argsort(which, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(which, minlength=count))])
        pairs = np.stack([first[order], second[order]], axis=1) if len(order) else np.zeros((1, 2), dtype=np.int64)
        return steps.NativeLists(self._hold(starts), self._hold(pairs.reshape(-1)))
