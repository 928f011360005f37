"""A torch module without Bitfront: its source, its weights as safetensors, and an exported program."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitfront.errors import ExportError
from bitfront.exporters.program import (
    FLOAT_DIGITS,
    Add,
    Cut,
    Floats,
    Join,
    Leak,
    Limit,
    Move,
    Offset,
    Pool,
    Product,
    Program,
    Quantize,
    Round,
    Scale,
    Step,
    Value,
    width,
)
from bitfront.exporters.targets import TARGETS
from bitfront.exporters.targets.base import Candidate, Target
from bitfront.files import safetensors

#: Samples that are computed at a time.
_CHUNK = 256


@TARGETS.register("torch")
class Torch(Target):
    """A torch module of its own, its weights as safetensors, and the same as an exported program (.pt2)."""

    judge = "torch"

    def check(self, candidate: Candidate) -> None:
        """Raises ExportError for sums that float64 does not hold."""
        for value in candidate.program.values:
            if value.bits > 53 and not value.floats:
                raise ExportError(f"{value.name}: a sum of {value.bits} bits, more than the 53 of torch's float64")

    def write(self, candidate: Candidate, folder: Path) -> None:
        """NAME.py, NAME.safetensors and NAME.pt2."""
        name, source = candidate.name, _Module(candidate.program)
        (folder / f"{name}.py").write_text(source.text(name), encoding="utf-8")
        write_safetensors(folder / f"{name}.safetensors", source.tensors)
        sample = torch.zeros(2, *candidate.graph.sample_shape)
        batch = {0: torch.export.Dim("batch", min=1)}
        exported = torch.export.export(_loaded(folder, name), (sample,), dynamic_shapes=(batch,))
        torch.export.save(exported, folder / f"{name}.pt2")

    def computed(self, candidate: Candidate, folder: Path, x: Floats) -> NDArray[Any]:
        """What the module and the exported program compute; both must agree."""
        models = _loaded(folder, candidate.name), torch.export.load(folder / f"{candidate.name}.pt2").module()
        with torch.no_grad():
            parts = torch.split(torch.from_numpy(x), _CHUNK)
            first, second = (torch.cat([model(part) for part in parts]) for model in models)
        if not torch.equal(first, second):
            raise ExportError("the module and the exported program compute different numbers; please report this")
        result: NDArray[Any] = first.numpy()
        return result

    def usage(self, candidate: Candidate) -> str:
        """How to load it."""
        name = candidate.name
        return f"""
```python
import torch
from {name} import load

model = load("{name}.safetensors")     # or torch.export.load("{name}.pt2").module()
numbers = model(x)                     # x: float32, the batch in front
```

Every tensor holds whole numbers, in a type that holds all sums exactly, so the results are the same on every device and
in every order of summation. It needs torch alone.
"""


def write_safetensors(path: Path, tensors: dict[str, NDArray[Any]]) -> None:
    """Arrays as a safetensors file: a header of JSON, then the bytes."""
    kinds = {"int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "float32": "F32"}
    path.write_bytes(safetensors((name, kinds[a.dtype.name], a.shape, a.tobytes()) for name, a in tensors.items()))


def _loaded(folder: Path, name: str) -> torch.nn.Module:
    """The module that the source of a folder defines, with its weights."""
    spec = importlib.util.spec_from_file_location(f"{name}_exported", folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model: torch.nn.Module = module.load(str(folder / f"{name}.safetensors"))
    return model


_HEAD = '''"""{name}, written by Bitfront: the integer program of a candidate, in torch.

``load`` gives the module. Tensors hold whole numbers; {meaning}.
"""

import json

import torch
import torch.nn.functional as F


def load(path="{name}.safetensors"):
    """The network with its weights, from a safetensors file: a header of JSON, then the bytes."""
    with open(path, "rb") as file:
        data = file.read()
    start = 8 + int.from_bytes(data[:8], "little")
    model, state = Network(), {{}}
    kinds = {{"I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "F32": torch.float32}}
    for tensor, held in json.loads(data[8:start]).items():
        first, last = held["data_offsets"]
        values = torch.frombuffer(bytearray(data[start + first : start + last]), dtype=kinds[held["dtype"]])
        state[tensor] = values.reshape(held["shape"])
    model.load_state_dict(state)
    return model.eval()


def quotient(x, divisor):
    """A whole number divided by another, half to even."""
    below = torch.floor(x / divisor)
    twice = 2 * (x - below * divisor)
    return below + ((twice > divisor) | ((twice == divisor) & (below % 2 != 0))).to(x.dtype)


class Network(torch.nn.Module):
    """Float32 samples in, whole numbers out."""

    def __init__(self):
        super().__init__()
'''


class _Module:
    """The source of the module, and its tensors."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.tensors: dict[str, NDArray[Any]] = {}
        self.lines: list[str] = []
        for number, (step, value) in enumerate(zip(program.steps, program.values, strict=True)):
            self.number, self.kind = number, _kind(program, step, value)
            given = [self._source(source, step) for source in step.sources]
            self.lines.append(f"v{number} = {_WRITERS[type(step)](self, step, given, value)}  # {value.name}")

    def _source(self, number: int, step: Step) -> str:
        """A source in the type in which a step computes."""
        value = self.program.values[number]
        held = _kind(self.program, self.program.steps[number], value)
        return f"v{number}" if held == self.kind or isinstance(step, Scale) else f"v{number}.to({self.kind})"

    def entry(self, what: str, values: Any, dtype: Any = None) -> str:
        """A constant: a number, or a buffer."""
        array = np.asarray(values)
        if array.size and (array == array.ravel()[0]).all():
            return repr(array.ravel()[0].item())
        name = f"s{self.number}_{what}"
        self.tensors[name] = array.astype(dtype) if dtype is not None else _smallest(array)
        return f"self.{name}.to({self.kind})"

    def text(self, name: str) -> str:
        """The file."""
        value = self.program.result
        meaning = "an output is a float" if value.floats else f"an output n stands for n * 2**{-value.point}"
        meaning += "" if value.divisor == 1 else f" / {value.divisor}"
        text = _HEAD.format(name=name, meaning=meaning)
        for tensor, array in self.tensors.items():
            shape = ", ".join(map(str, array.shape))
            text += (
                f'        self.register_buffer("{tensor}", torch.zeros(({shape},), dtype=torch.{array.dtype.name}))\n'
            )
        text += "\n    def forward(self, x):\n"
        text += "".join(f"        {line}\n" for line in self.lines)
        end = "" if value.floats else ".to(torch.int64)"
        return f"{text}        return v{self.program.output}{end}\n"


def _smallest(array: NDArray[Any]) -> NDArray[Any]:
    """In the smallest type that holds it; factors are powers of two, some times a divisor, which float32 holds."""
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    bits = width(min(int(array.min(initial=0)), -1), int(array.max(initial=0)))
    return array.astype(next(f"int{b}" for b in (8, 16, 32, 64) if bits <= b))


def _kind(program: Program, step: Step, value: Value) -> str:
    """The type in which a step computes: float32 where it holds every number on the way, else float64."""
    if value.floats:
        return "torch.float32"
    sources = [program.values[number] for number in step.sources]
    bits = max([value.bits, *(source.bits for source in sources)])
    room = 0
    if isinstance(step, Round) and sources:
        room = int(np.abs(step.points - sources[0].point).max(initial=0)) + sources[0].divisor.bit_length() + 1
    elif isinstance(step, Product):
        room = 1
    return "torch.float32" if bits + room <= FLOAT_DIGITS else "torch.float64"


def _places(m: _Module, step: Any, x: str) -> str:
    """The input of the network as a rounding takes it."""
    if step.places is None:
        return x
    shape = ", ".join(map(str, step.places.shape))
    m.tensors[f"s{m.number}_places"] = _smallest(step.places.ravel())
    return f"{x}.flatten(1)[:, self.s{m.number}_places.long()].reshape(-1, {shape})"


def _round(m: _Module, step: Round, given: list[str], value: Value) -> str:
    low, high = m.entry("low", step.low), m.entry("high", step.high)
    if not given:
        m.kind = "torch.float64" if step.rounding == "half_up" else "torch.float32"
        factor = m.entry("factor", np.ldexp(np.float32(1), step.points.astype(np.int32)))
        scaled = f"({_places(m, step, 'x')}.to({m.kind}) * {factor})"
        codes = {"even": f"torch.round({scaled})", "half_up": f"torch.floor({scaled} + 0.5)"}.get(
            step.rounding, f"torch.floor({scaled})"
        )
    else:
        source = m.program.values[step.sources[0]]
        up = m.entry("up", 2.0 ** np.maximum(step.points - source.point, 0))
        down = m.entry("down", source.divisor * 2.0 ** np.maximum(source.point - step.points, 0))
        numerator = given[0] if up == "1.0" else f"{given[0]} * {up}"
        codes = {
            "even": f"quotient({numerator}, {down})",
            "half_up": f"torch.floor((2 * {numerator} + {down}) / (2 * {down}))",
        }.get(step.rounding, f"torch.floor({numerator} / {down})")
        codes = numerator if down == "1.0" else codes
    if step.overflow == "wrap":
        codes = f"torch.remainder({codes} - {low}, {m.entry('count', step.high - step.low + 1)}) + {low}"
    elif low.startswith("self") or high.startswith("self"):
        ends = [end if end.startswith("self") else f"torch.tensor({end}, dtype={m.kind})" for end in (low, high)]
        codes = f"torch.clamp({codes}, {ends[0]}, {ends[1]})"
    else:
        codes = f"torch.clamp({codes}, {low}, {high})"
    align = m.entry("align", 2.0 ** np.maximum(step.point - step.points, 0))
    codes = codes if align == "1.0" else f"({codes}) * {align}"
    return codes if m.kind == _kind(m.program, step, value) else f"({codes}).to({_kind(m.program, step, value)})"


def _quantize(m: _Module, step: Quantize, given: list[str], _: Value) -> str:
    m.kind = "torch.float32"
    x = (given[0] if given else _places(m, step, "x")) + ".to(torch.float32)"
    grid, zero = m.entry("step", step.step), m.entry("zero", step.zero)
    return f"torch.clamp(torch.round({x} / {grid}) + {zero}, {int(step.low)}, {int(step.high)}) - {zero}"


def _scale(m: _Module, step: Scale, given: list[str], _: Value) -> str:
    x = f"{given[0]}.to(torch.float32)" + (f" / {step.divisor}" if step.divisor != 1 else "")
    scaled = f"{x} * {m.entry('scale', step.scale)}"
    return scaled if step.bias is None else f"{scaled} + {m.entry('bias', step.bias)}"


def _product(m: _Module, step: Product, given: list[str], _: Value) -> str:
    m.tensors[f"s{m.number}_weight"] = _smallest(step.weight)
    weight = f"self.s{m.number}_weight.to({m.kind})"
    if step.window is None:
        return f"F.linear({given[0]}, {weight})"
    w, dims = step.window, len(step.window.kernel)
    x = _padded(given[0], w, "0")
    return f"F.conv{dims}d({x}, {weight}, None, {w.stride}, 0, {w.dilation}, {step.groups})"


def _padded(x: str, window: Any, value: str) -> str:
    pads = [p for pair in reversed(list(zip(window.before, window.after, strict=True))) for p in pair]
    return f"F.pad({x}, {pads}, value={value})" if any(pads) else x


def _pool(m: _Module, step: Pool, given: list[str], value: Value) -> str:
    w, dims = step.window, len(step.window.kernel)
    if step.kind == "largest":
        return f"F.max_pool{dims}d({_padded(given[0], w, '-torch.inf')}, {w.kernel}, {w.stride}, 0, {w.dilation})"
    weight = f"torch.ones(({value.shape[0]}, 1, {', '.join(map(str, w.kernel))}), dtype={m.kind}, device=x.device)"
    return f"F.conv{dims}d({_padded(given[0], w, '0')}, {weight}, None, {w.stride}, 0, {w.dilation}, {value.shape[0]})"


def _shifted(x: str, shift: int) -> str:
    return f"{x} * {float(2**shift)}" if shift else x


def _limit(_: _Module, step: Limit, given: list[str], __: Value) -> str:
    return f"torch.clamp({_shifted(given[0], step.shift)}, {step.low}, {step.high})"


def _leak(_: _Module, step: Leak, given: list[str], __: Value) -> str:
    x = given[0]
    return f"torch.where({x} < 0, {x} * {step.slope!r}, {_shifted(x, step.shift)})"


def _add(_: _Module, step: Add, given: list[str], __: Value) -> str:
    terms = zip(given, step.shifts, step.signs, strict=True)
    return " ".join(f"{'-' if sign < 0 else '+'} {_shifted(x, by)}" for x, by, sign in terms).removeprefix("+ ")


def _join(_: _Module, step: Join, given: list[str], __: Value) -> str:
    parts = ", ".join(_shifted(x, by) for x, by in zip(given, step.shifts, strict=True))
    return f"torch.cat([{parts}], {step.dim + 1})"


def _move(m: _Module, step: Move, given: list[str], value: Value) -> str:
    shape = ", ".join(map(str, value.shape))
    if step.reshapes and math.prod(m.program.values[step.sources[0]].shape) == step.places.size:
        return f"{given[0]}.reshape(-1, {shape})"
    m.tensors[f"s{m.number}_places"] = _smallest(step.places.ravel())
    places = f"self.s{m.number}_places.long()"
    flat = f"{given[0]}.flatten(1)"
    taken = f"{flat}[:, {places}]" if (step.places >= 0).all() else f"F.pad({flat}, (0, 1))[:, {places}]"
    return f"{taken}.reshape(-1, {shape})"


def _cut(m: _Module, _: Cut, given: list[str], value: Value) -> str:
    # To float32 and back: what it holds of a number is the cut.
    m.kind = _kind(m.program, m.program.steps[m.number], value)
    return f"{given[0]}.to(torch.float32).to({m.kind})"


def _offset(m: _Module, step: Offset, given: list[str], _: Value) -> str:
    return f"{_shifted(given[0], step.shift)} + {m.entry('bias', step.constant)}"


_WRITERS: dict[type[Step], Callable[[_Module, Any, list[str], Value], str]] = {
    Round: _round,
    Quantize: _quantize,
    Scale: _scale,
    Product: _product,
    Offset: _offset,
    Cut: _cut,
    Limit: _limit,
    Leak: _leak,
    Add: _add,
    Join: _join,
    Pool: _pool,
    Move: _move,
}
