"""Recurrent layers: LSTM, GRU, RNN, and their cells.

Weights and biases are operands per layer and direction, under torch's names; so is the state, which is rounded after
each step. A layer whose state has a format is computed step by step, by torch's formulas. Any other layer is one call
of torch's kernel with rounded weights. oneDNN's LSTM is such a kernel: its results differ from those of the steps by
about 1e-7, and may depend on the number of samples in a call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitfront.operations.base import Call, Count, Operands, OperandSpec, Role, classes, define
from bitfront.operations.recurrent_onnx import write_recurrent

#: A recurrent layer is computed by torch in one call.
_KERNELS: dict[str, Callable[..., Any]] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}
#: Inputs and states have no channels, so they have one scale; products with them sum over their last dimension.
_VALUES: dict[str, Any] = {"channel_axis": None, "summed_axis": -1}
#: Names of several operands, which a file may have keys for; each takes the keys of the next one that it lists.
_SHARED = (
    OperandSpec("data_in", "activation", **_VALUES),
    OperandSpec("weight", "weight", channel_axis=0),
    *(OperandSpec(f"weight_{k}", "weight", channel_axis=0, format_of=("weight",)) for k in ("ih", "hh", "hr")),
    OperandSpec("bias", "bias", channel_axis=0),
    *(OperandSpec(f"bias_{k}", "bias", channel_axis=0, format_of=("bias",)) for k in ("ih", "hh")),
    OperandSpec("state", "inner", **_VALUES),
    OperandSpec("cell_state", "inner", format_of=("state",), **_VALUES),
)


@dataclass(frozen=True)
class _Direction:
    """One direction of a layer, or a cell.

    Attributes:
        suffix: behind the names of its operands: ``_l0``, ``_l1_reverse``; empty for a cell.
        data: the operand that flows in.
    """

    suffix: str
    data: str = "data_in"

    def operands(self, cell_state: bool) -> tuple[OperandSpec, ...]:
        """Its weights, biases and states."""
        end, state = self.suffix, f"state{self.suffix}"

        def held(role: Role, kind: str, multiplied: str = "") -> OperandSpec:
            name = f"{role}_{kind}"
            shared = (name, role) if end else (role,)
            return OperandSpec(name + end, role, channel_axis=0, format_of=shared, multiplies=multiplied)

        states = [OperandSpec(state, "inner", format_of=("state",) if end else (), **_VALUES)]
        if cell_state:
            shared = ("cell_state", "state") if end else ("state",)
            states.append(OperandSpec(f"cell_state{end}", "inner", format_of=shared, **_VALUES))
        return (
            held("weight", "ih", self.data),
            held("weight", "hh", state),
            held("weight", "hr"),  # a projection multiplies what the step has just computed
            held("bias", "ih"),
            held("bias", "hh"),
            *states,
        )


def _layers(module: Any) -> list[list[_Direction]]:
    """The directions of each layer; a cell is one."""
    if not isinstance(module, nn.RNNBase):
        return [[_Direction("")]]
    ends = ("", "_reverse") if module.bidirectional else ("",)
    return [[_Direction(f"_l{i}{end}", _input_of(i)) for end in ends] for i in range(module.num_layers)]


def _input_of(layer: int) -> str:
    return f"data_in_l{layer}" if layer else "data_in"


def _operands_of(module: nn.Module) -> tuple[OperandSpec, ...]:
    """The operands of a module: input, weights, biases, states, inputs of later layers.

    The input of a later layer is the state of the one before. It has the state's format, where the file has one; else,
    the format of the first layer's input.
    """
    layers = _layers(module)
    steps_first = isinstance(module, nn.RNNBase) and not module.batch_first
    data_in = OperandSpec("data_in", sample_axis=int(steps_first), **_VALUES)
    specs = [s for layer in layers for d in layer for s in d.operands(isinstance(module, (nn.LSTM, nn.LSTMCell)))]
    between = [
        OperandSpec(_input_of(i), "inner", format_of=(f"state{layers[i - 1][0].suffix}", "state", "data_in"), **_VALUES)
        for i in range(1, len(layers))
    ]
    by_role = [[s for s in specs if s.role == role] for role in ("weight", "bias", "inner")]
    return (data_in, *(s for of_role in by_role for s in of_role), *between)


# --- one step --------------------------------------------------------------------------------------------------------

#: Per step: hidden state (samples, hidden size), or projection size; for an LSTM also its cell state.
State = tuple[Tensor, ...]


def _step(kind: str, operands: Operands, end: str, gates_in: Tensor, state: State) -> State:
    """The state after one step, in its format.

    Args:
        kind: ``LSTM``, ``GRU``, ``RNN_TANH`` or ``RNN_RELU``.
        end: of the names of its operands.
        gates_in: input times weight plus bias, shape (samples, gates · hidden size).
        state: before the step.
    """
    gates = F.linear(state[0], operands[f"weight_hh{end}"], operands.get(f"bias_hh{end}"))
    if kind == "GRU":
        hidden = _gru(gates_in, gates, state[0])
    elif kind == "LSTM":
        hidden, cell = _lstm(gates.add_(gates_in), state[1], lambda c: operands.round(f"cell_state{end}", c))
        projection = operands.get(f"weight_hr{end}")
        hidden = hidden if projection is None else F.linear(hidden, projection)
        return operands.round(f"state{end}", hidden), cell
    else:
        hidden = (torch.tanh if kind == "RNN_TANH" else torch.relu)(gates.add_(gates_in))
    return (operands.round(f"state{end}", hidden),)


def _lstm(gates: Tensor, cell: Tensor, rounded: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Hidden state and cell state; gates in torch's order i, f, g, o."""
    # Part by part, as torch does: over all gates at once, the last values would get other bits.
    i, f, g, o = gates.chunk(4, 1)
    cell = rounded((f.sigmoid() * cell).add_(i.sigmoid() * g.tanh()))
    return o.sigmoid() * cell.tanh(), cell


def _gru(gates_in: Tensor, gates: Tensor, hidden: Tensor) -> Tensor:
    """Hidden state; gates in torch's order r, z, n, where r resets what is already multiplied."""
    size = hidden.shape[1]
    reset, update = (gates[:, : 2 * size] + gates_in[:, : 2 * size]).chunk(2, 1)
    new = (gates_in[:, 2 * size :] + gates[:, 2 * size :] * reset.sigmoid()).tanh()
    return ((hidden - new) * update.sigmoid()).add_(new)


# --- modules ---------------------------------------------------------------------------------------------------------


def _call(module: nn.Module, operands: Operands) -> Any:
    if "data_in" not in operands.values:
        raise TypeError(
            f"{_name(module)} gets a PackedSequence, which it does not take in number formats: pad the sequences, or "
            "leave the layer in float (name = 'NA')"
        )
    return _sequence(module, operands) if isinstance(module, nn.RNNBase) else _cell(module, operands)


def _initial(module: Any, given: Any, zeros: Callable[[int], Tensor]) -> State:
    """The state before the first step: what the caller gives, or zeros; shape as given.

    Args:
        zeros: size → zeros.
    """
    if given is not None:
        return tuple(given) if isinstance(given, (tuple, list)) else (given,)
    hidden = zeros(getattr(module, "proj_size", 0) or module.hidden_size)
    return (hidden, zeros(module.hidden_size)) if isinstance(module, (nn.LSTM, nn.LSTMCell)) else (hidden,)


def _rounded(operands: Operands, end: str, state: State) -> State:
    """A given state in its format."""
    return tuple(operands.round(f"{name}{end}", s) for name, s in zip(("state", "cell_state"), state, strict=False))


def _given(operands: Operands) -> Any:
    return operands.args[1] if len(operands.args) > 1 else operands.kwargs.get("hx")


def _cell(module: Any, operands: Operands) -> Any:
    x, given = operands["data_in"], _given(operands)
    single = x.dim() == 1
    x = x.unsqueeze(0) if single else x
    state = _initial(module, given, lambda size: x.new_zeros(len(x), size))
    if given is not None:
        state = tuple(s.unsqueeze(0) if single else s for s in state)
        state = _rounded(operands, "", state)
    kind = {"LSTMCell": "LSTM", "GRUCell": "GRU"}.get(_name(module)) or f"RNN_{module.nonlinearity.upper()}"
    gates = F.linear(x, operands["weight_ih"], operands.get("bias_ih"))
    after = _step(kind, operands, "", gates, state)
    after = tuple(s.squeeze(0) if single else s for s in after)
    return after if kind == "LSTM" else after[0]


def _name(module: nn.Module) -> str:
    """The name of torch's class that a module is of, or derived from."""
    return next(kind.__name__ for kind in type(module).__mro__ if kind in MODULES)


def _sequence(module: Any, operands: Operands) -> Any:
    """What a layer of the class computes: (output, last state), in the shapes of torch."""
    x, given = operands["data_in"], _given(operands)
    single = x.dim() == 2
    batch_axis = 0 if module.batch_first else 1
    x = x.unsqueeze(batch_axis) if single else x
    layers = _layers(module)
    stacked = len(layers) * len(layers[0])
    state = _initial(module, given, lambda size: x.new_zeros(stacked, x.shape[batch_axis], size))
    if given is not None and single:
        state = tuple(s.unsqueeze(1) for s in state)
    module.check_forward_args(x, state if len(state) > 1 else state[0], None)
    if given is not None:
        ends = [d.suffix for layer in layers for d in layer]
        each = [_rounded(operands, end, tuple(s[k] for s in state)) for k, end in enumerate(ends)]
        state = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
    if operands.rounds:
        x, state = _by_layer(module, operands, layers, x, state)
    else:
        x, state = _kernel(module, operands, layers, x, state)
    if single:
        x, state = x.squeeze(batch_axis), tuple(s.squeeze(1) for s in state)
    return x, state if len(state) > 1 else state[0]


def _kernel(
    module: Any, operands: Operands, layers: Sequence[Sequence[_Direction]], x: Tensor, state: State
) -> tuple[Tensor, State]:
    """Some layers in one call of torch's kernel."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    named = (operands.get(f"{kind}{d.suffix}") for layer in layers for d in layer for kind in kinds)
    held = [tensor for tensor in named if tensor is not None]
    settings = module.bias, len(layers), module.dropout, module.training, module.bidirectional, module.batch_first
    out, *after = _KERNELS[module.mode](x, state if len(state) > 1 else state[0], held, *settings)
    return out, tuple(after)


def _by_layer(
    module: Any, operands: Operands, layers: Sequence[Sequence[_Direction]], x: Tensor, state: State
) -> tuple[Tensor, State]:
    """Layer by layer: one with a format for a state by steps, any other one by torch's kernel."""
    after: list[State] = []
    for i, layer in enumerate(layers):
        if i:
            x = F.dropout(x, module.dropout, module.training) if module.dropout else x
            x = _rounded_between(module, operands, i, x)
        before = tuple(s[i * len(layer) : (i + 1) * len(layer)] for s in state)
        if any(f"{name}{d.suffix}" in operands.rounds for d in layer for name in ("state", "cell_state")):
            x, last = _by_step(module, operands, layer, x, before)
        else:
            x, last = _kernel(module, operands, [layer], x, before)
        after.append(last)
    return x, tuple(torch.cat(parts) for parts in zip(*after, strict=True))


def _rounded_between(module: Any, operands: Operands, layer: int, x: Tensor) -> Tensor:
    if module.batch_first:
        return operands.round(_input_of(layer), x)
    return operands.round(_input_of(layer), x.transpose(0, 1)).transpose(0, 1)


def _by_step(
    module: Any, operands: Operands, layer: Sequence[_Direction], x: Tensor, state: State
) -> tuple[Tensor, State]:
    """A layer step by step: (output, last state of each direction)."""
    steps = x.transpose(0, 1).contiguous() if module.batch_first else x
    outputs, last = [], []
    for k, direction in enumerate(layer):
        end, now = direction.suffix, tuple(s[k] for s in state)
        gates = F.linear(steps, operands[f"weight_ih{end}"], operands.get(f"bias_ih{end}")).unbind(0)
        hidden: list[Tensor] = []
        for t in reversed(range(len(gates))) if end.endswith("_reverse") else range(len(gates)):
            now = _step(module.mode, operands, end, gates[t], now)
            hidden.append(now[0])
        outputs.append(torch.stack(hidden[::-1] if end.endswith("_reverse") else hidden, int(module.batch_first)))
        last.append(now)
    return torch.cat(outputs, 2), tuple(torch.stack(parts) for parts in zip(*last, strict=True))


# --- counts ----------------------------------------------------------------------------------------------------------


def _recurrent(call: Call) -> Count:
    """Products of both weights of each layer and direction at every step; then, per unit, the operations of the gates.

    An LSTM's unit adds 4 pairs of sums, has 5 nonlinearities, 3 products and 1 sum; a GRU's 3, 3, 3 and 2; an RNN's
    1 and 1.
    """
    module: Any = call.module
    steps = math.prod(call.tensors[0][:-1])
    per_unit = {"LSTM": 13, "GRU": 11, "RNN": 2}[_name(module).removesuffix("Cell")]
    # Cells have one layer and one direction.
    layers, directions = getattr(module, "num_layers", 1), 2 if getattr(module, "bidirectional", False) else 1
    matrices = [p for name, p in module.named_parameters() if "weight" in name]
    macs = steps * sum(p.numel() for p in matrices)
    return Count(macs + steps * layers * directions * module.hidden_size * per_unit, macs)


MODULES = classes("LSTM GRU RNN LSTMCell GRUCell RNNCell")
RECURRENT = define(
    "recurrent",
    "LSTM, GRU and RNN, and their cells.",
    modules=MODULES,
    operands=_SHARED,
    operands_of=_operands_of,
    count=_recurrent,
    call=_call,
    onnx=write_recurrent,
)
