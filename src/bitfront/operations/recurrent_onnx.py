"""How recurrent layers are written as ONNX: by ONNX's operators, or step by step where a state has a format.

ONNX has the gates in another order than torch, and an operator per layer with both directions. Its operators round
nothing on their way. So a layer whose state has a format, a layer with projections, and a cell are written as the
products, sums and nonlinearities that ``operations/recurrent.py`` computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx, nn

from bitfront.errors import ExportError
from bitfront.operations.onnx import Named, OnnxWriter, reads

#: Class → the order of ONNX's gates, as places among torch's.
_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
#: Tensors of the state: hidden state, and an LSTM's cell state.
States = tuple[str, ...]


@dataclass(frozen=True)
class _Layer:
    """A layer, or a cell.

    Attributes:
        kind: ``LSTM``, ``GRU`` or ``RNN``.
        ends: what is behind the names of the operands, for each direction.
        size: of the hidden state; of an LSTM's cell state, where the hidden state is projected.
        projected: the size of the projection, or 0.
        activation: of an RNN: ``Tanh`` or ``Relu``.
        steps: how many; 0 for a cell.
    """

    kind: str
    ends: tuple[str, ...]
    size: int
    projected: int
    activation: str
    steps: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the hidden state, and of the cell state."""
        hidden = self.projected or self.size
        return (hidden, self.size) if self.kind == "LSTM" else (hidden,)


def _of_module(module: Any, ends: tuple[str, ...], steps: int = 0) -> _Layer:
    names = [kind.__name__ for kind in type(module).__mro__]
    kind = next(k for k in _GATES if k in names or f"{k}Cell" in names)
    activation = "Relu" if getattr(module, "nonlinearity", "tanh") == "relu" else "Tanh"
    return _Layer(kind, ends, module.hidden_size, getattr(module, "proj_size", 0), activation, steps)


def write_recurrent(w: OnnxWriter, n: fx.Node) -> Named:
    """LSTM, GRU, RNN: (output, last state); their cells: the state."""
    module: Any = w.module_of(n)
    assert module is not None
    return _sequence(w, n, module) if isinstance(module, nn.RNNBase) else _cell(w, n, module)


def _given(w: OnnxWriter, n: fx.Node) -> States:
    """The tensors of the state before the first step; empty if the caller gives none."""
    given = w.argument(n, 1, "hx")
    if given is None:
        return ()
    each = given if isinstance(given, (tuple, list)) else (given,)
    if not all(isinstance(state, fx.Node) for state in each):
        raise ExportError(f"{n.name} ({w.kind(n)}): a state that is no tensor of the network")
    return tuple(w.name_of(state) for state in each)


def _sequence(w: OnnxWriter, n: fx.Node, module: Any) -> Named:
    shape = tuple(w.sample(n, 0, "input").shape)
    batch_axis = 0 if module.batch_first else 1
    if len(shape) != 3 or w.sample_dims(n) != {batch_axis}:
        raise ExportError(f"{n.name} ({w.kind(n)}): its input has no dimension of samples where it takes one")
    steps, batch, directions = shape[1 - batch_axis], shape[batch_axis], 2 if module.bidirectional else 1
    ends = ("", "_reverse")[:directions]
    given, x, last = _given(w, n), w.value(n, 0, "input"), list[States]()
    for i in range(module.num_layers):
        layer = _of_module(module, tuple(f"_l{i}{end}" for end in ends), steps)
        if i:
            width = directions * layer.sizes[0]
            x = w.inner(n, f"data_in_l{i}", x, (batch, steps, width) if module.batch_first else (steps, batch, width))
        x = w.add("Transpose", [x], f"{n.name}.steps_first", perm=[1, 0, 2]) if module.batch_first else x
        chosen = w.constant(f"{n.name}.layer", np.arange(i * directions, (i + 1) * directions))
        before = tuple(w.add("Gather", [state, chosen], f"{n.name}.before", axis=0) for state in given)
        x, after = _layer(w, n, layer, x, before, batch)
        x = w.add("Transpose", [x], f"{n.name}.samples_first", perm=[1, 0, 2]) if module.batch_first else x
        last.append(after)
    if not reads(n, 1):
        return x, None
    states = tuple(w.add("Concat", each, f"{n.name}.last", axis=0) for each in zip(*last, strict=True))
    return x, states if len(states) > 1 else states[0]


def _layer(w: OnnxWriter, n: fx.Node, layer: _Layer, x: str, before: States, batch: int) -> tuple[str, States]:
    """(output (steps, samples, width), last states (directions, samples, size)) of a layer on x (steps, samples, ..).

    Args:
        before: states before the first step, (directions, samples, size); empty: zeros.
        batch: number of samples, for the shapes of what is rounded.
    """
    named = [f"{state}{end}" for state in ("state", "cell_state") for end in layer.ends]
    if not layer.projected and not any(w.has_format(n, operand) for operand in named):
        return _by_operator(w, n, layer, x, before)
    outputs, last = [], []
    for k, end in enumerate(layer.ends):
        if before:
            place = w.constant(f"{n.name}.direction", np.array(k))
            now = tuple(w.add("Gather", [state, place], f"{n.name}{end}.before", axis=0) for state in before)
            now = _rounded(w, n, end, now, layer, batch)
        else:
            now = tuple(_zeros(w, n, x, size) for size in layer.sizes)
        gates = _product(w, n, x, f"_ih{end}")
        hidden: list[str] = []
        for t in reversed(range(layer.steps)) if end.endswith("_reverse") else range(layer.steps):
            here = w.add("Gather", [gates, w.constant(f"{n.name}.step", np.array(t))], f"{n.name}{end}.here", axis=0)
            now = _step(w, n, layer, end, here, now, batch)
            hidden.append(now[0])
        axis = w.constant(f"{n.name}.axis", np.array([0]))
        rows = [w.add("Unsqueeze", [h, axis], f"{n.name}{end}.row") for h in hidden]
        ordered = rows[::-1] if end.endswith("_reverse") else rows
        outputs.append(w.add("Concat", ordered, f"{n.name}{end}.steps", axis=0))
        last.append(tuple(w.add("Unsqueeze", [state, axis], f"{n.name}{end}.last") for state in now))
    out = outputs[0] if len(outputs) == 1 else w.add("Concat", outputs, f"{n.name}.both", axis=2)
    return out, tuple(w.add("Concat", each, f"{n.name}.directions", axis=0) for each in zip(*last, strict=True))


def _by_operator(w: OnnxWriter, n: fx.Node, layer: _Layer, x: str, before: States) -> tuple[str, States]:
    """As ``_layer``, by ONNX's operator."""
    name, count = f"{n.name}{layer.ends[0]}", len(_GATES[layer.kind])
    order = np.concatenate([np.arange(g * layer.size, (g + 1) * layer.size) for g in _GATES[layer.kind]])
    chosen, axis = w.constant(f"{name}.gates", order), w.constant(f"{name}.axis", np.array([0]))

    def stacked(kinds: Sequence[str]) -> str:
        """What each direction has of some operands, in ONNX's order of gates: (directions, ...)."""
        rows = []
        for end in layer.ends:
            each = [w.held(n, f"{kind}{end}") for kind in kinds]
            turned = [w.add("Gather", [tensor, chosen], f"{name}.ordered", axis=0) for tensor in each if tensor]
            joined = turned[0] if len(turned) == 1 else w.add("Concat", turned, f"{name}.joined", axis=0)
            rows.append(w.add("Unsqueeze", [joined, axis], f"{name}.row"))
        return rows[0] if len(rows) == 1 else w.add("Concat", rows, f"{name}.rows", axis=0)

    inputs = [x, stacked(["weight_ih"]), stacked(["weight_hh"])]
    inputs += [stacked(["bias_ih", "bias_hh"]) if w.held(n, f"bias_ih{layer.ends[0]}") else "", "", *before]
    attributes: dict[str, Any] = {"hidden_size": layer.size}
    attributes["direction"] = "bidirectional" if len(layer.ends) == 2 else "forward"
    if layer.kind == "RNN":
        attributes["activations"] = [layer.activation] * len(layer.ends)
    if layer.kind == "GRU":
        attributes["linear_before_reset"] = 1
    assert count * layer.size == len(order)
    names = [name, *(f"{name}.last" for _ in layer.sizes)]
    while not inputs[-1]:
        inputs.pop()
    out, *last = w.add_several(layer.kind, inputs, names, **attributes)
    out = w.add("Transpose", [out], f"{name}.by_sample", perm=[0, 2, 1, 3])
    shape = w.constant(f"{name}.shape", np.array([layer.steps, -1, len(layer.ends) * layer.size]))
    return w.add("Reshape", [out, shape], f"{name}.out"), tuple(last)


def _cell(w: OnnxWriter, n: fx.Node, module: Any) -> Named:
    layer, shape = _of_module(module, ("",)), tuple(w.sample(n, 0, "input").shape)
    if len(shape) != 2 or w.sample_dims(n) != {0}:
        raise ExportError(f"{n.name} ({w.kind(n)}): its input has no samples")
    x, given = w.value(n, 0, "input"), _given(w, n)
    if given:
        now = _rounded(w, n, "", given, layer, shape[0])
    else:
        samples = w.add("Unsqueeze", [x, w.constant(f"{n.name}.axis", np.array([0]))], f"{n.name}.one_step")
        now = tuple(_zeros(w, n, samples, size) for size in layer.sizes)
    after = _step(w, n, layer, "", _product(w, n, x, "_ih"), now, shape[0])
    return after if layer.kind == "LSTM" else after[0]


def _zeros(w: OnnxWriter, n: fx.Node, x: str, size: int) -> str:
    """(samples, size) zeros, for x (steps, samples, ...)."""
    samples = w.add("Shape", [x], f"{n.name}.samples", start=1, end=2)
    shape = w.add("Concat", [samples, w.constant(f"{n.name}.size", np.array([size]))], f"{n.name}.of_state", axis=0)
    return w.add("Expand", [w.constant(f"{n.name}.zero", np.zeros((1, 1), np.float32)), shape], f"{n.name}.zeros")


def _rounded(w: OnnxWriter, n: fx.Node, end: str, state: States, layer: _Layer, batch: int) -> States:
    names = zip(("state", "cell_state"), state, layer.sizes, strict=False)
    return tuple(w.inner(n, f"{name}{end}", tensor, (batch, size)) for name, tensor, size in names)


def _product(w: OnnxWriter, n: fx.Node, x: str, end: str) -> str:
    """x · weightᵀ + bias, of the weight and the bias whose names end so."""
    weight, bias = w.held(n, f"weight{end}"), w.held(n, f"bias{end}")
    assert weight is not None
    turned = w.add("Transpose", [weight], f"{n.name}{end}.turned", perm=[1, 0])
    product = w.add("MatMul", [x, turned], f"{n.name}{end}.product")
    return product if bias is None else w.add("Add", [product, bias], f"{n.name}{end}.sum")


def _step(w: OnnxWriter, n: fx.Node, layer: _Layer, end: str, gates_in: str, state: States, batch: int) -> States:
    """The state after one step, in its format; all tensors (samples, ...). As ``operations.recurrent._step``."""
    name, gates = f"{n.name}{end}", _product(w, n, state[0], f"_hh{end}")

    def add(op: str, *inputs: str) -> str:
        return w.add(op, inputs, f"{name}.{op.lower()}")

    def split(tensor: str) -> list[str]:
        count = len(_GATES[layer.kind])
        return w.add_several("Split", [tensor], [f"{name}.gate"] * count, axis=1, num_outputs=count)

    if layer.kind == "GRU":
        (reset_in, update_in, new_in), (reset, update, new) = split(gates_in), split(gates)
        resets, updates = add("Sigmoid", add("Add", reset, reset_in)), add("Sigmoid", add("Add", update, update_in))
        new = add("Tanh", add("Add", new_in, add("Mul", new, resets)))
        hidden = add("Add", add("Mul", add("Sub", state[0], new), updates), new)
        return _rounded(w, n, end, (hidden,), layer, batch)
    both = add("Add", gates, gates_in)
    if layer.kind == "RNN":
        return _rounded(w, n, end, (add(layer.activation, both),), layer, batch)
    i, f, g, o = split(both)
    cell = add("Add", add("Mul", add("Sigmoid", f), state[1]), add("Mul", add("Sigmoid", i), add("Tanh", g)))
    cell = w.inner(n, f"cell_state{end}", cell, (batch, layer.size))
    hidden = add("Mul", add("Sigmoid", o), add("Tanh", cell))
    if layer.projected:
        projection = w.held(n, f"weight_hr{end}")
        assert projection is not None
        hidden = add("MatMul", hidden, w.add("Transpose", [projection], f"{name}.projection", perm=[1, 0]))
    return w.inner(n, f"state{end}", hidden, (batch, layer.sizes[0])), cell
