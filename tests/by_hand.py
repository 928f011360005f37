"""The evaluation of a network under number formats by hand: without Bitfront, and without torch.fx.

The network runs as its author wrote it. Around it, calls of layers and of functions get rounded operands. Rounding is
written out from docs/formats.md.
"""

from collections import Counter
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode

#: Modules of torch whose layers are called one by one.
LOOKED_INTO = (
    nn.Sequential,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
#: Function → its operation. Operators are methods of tensors here.
FUNCTIONS = {
    F.linear: "linear",
    F.conv1d: "conv1d",
    F.conv2d: "conv2d",
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), "relu"),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__), "add"),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.__sub__, Tensor.sub_, Tensor.__isub__), "sub"),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_, Tensor.__imul__), "mul"),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), "matmul"),
    **dict.fromkeys((torch.bmm, Tensor.bmm), "bmm"),
    **dict.fromkeys((torch.mm, Tensor.mm), "mm"),
    **dict.fromkeys((torch.addmm, Tensor.addmm), "addmm"),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), "baddbmm"),
    torch.einsum: "einsum",
}
#: Operation → (operand, its place, its keyword).
PLACES = {
    **dict.fromkeys(
        ("linear", "conv1d", "conv2d"), (("data_in", 0, "input"), ("weight", 1, "weight"), ("bias", 2, "bias"))
    ),
    "relu": [("data_in", 0, "input")],
    **dict.fromkeys(("add", "sub", "mul"), (("data_in", 0, "input"), ("data_in_2", 1, "other"))),
    "matmul": [("data_in", 0, "input"), ("weight", 1, "other")],
    **dict.fromkeys(("bmm", "mm"), (("data_in", 0, "input"), ("weight", 1, "mat2"))),
    "addmm": [("data_in", 1, "mat1"), ("weight", 2, "mat2"), ("bias", 0, "input")],
    "baddbmm": [("data_in", 1, "batch1"), ("weight", 2, "batch2"), ("bias", 0, "input")],
    "einsum": [("data_in", 1, ""), ("weight", 2, "")],
}
IN_PLACE = {Tensor.add_: Tensor.add, Tensor.sub_: Tensor.sub, Tensor.mul_: Tensor.mul, Tensor.relu_: Tensor.relu}
IN_PLACE |= {Tensor.__iadd__: Tensor.add, Tensor.__isub__: Tensor.sub, Tensor.__imul__: Tensor.mul}
IN_PLACE |= {torch.relu_: torch.relu}


def rounded(form, x):
    """`x` in a calibrated format, as docs/formats.md defines it."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return rounded(form, x.float()).to(x.dtype)
    if hasattr(form, "frac_width"):
        step = 2.0**-form.frac_width
        low, high = (-(2 ** (form.width - 1)), 2 ** (form.width - 1) - 1) if form.signed else (0, 2**form.width - 1)
        return torch.clamp(torch.round(x / step), low, high) * step
    low, high = (-(2 ** (form.width - 1)), 2 ** (form.width - 1) - 1) if form.symmetric else (0, 2**form.width - 1)
    scale, zero = torch.tensor(form.scale), torch.tensor(form.zero_point, dtype=torch.float32)
    if scale.numel() > 1:
        shape = [1] * x.dim()
        shape[form.axis] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    else:
        scale, zero = scale.reshape(()), zero.reshape(())
    return (torch.clamp(torch.round(x / scale) + zero, low, high) - zero) * scale


def plain_weights(copied):
    """`copied` with plain parameters in place of computed weights.

    Its class is changed: a copy of another model with parametrizations would share, and break, the class of that model.
    """
    for module in copied.modules():
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            for kind in list(module._forward_pre_hooks.values()):
                if type(kind).__name__ == "WeightNorm":
                    nn.utils.remove_weight_norm(module)
                elif type(kind).__name__ == "SpectralNorm":
                    nn.utils.remove_spectral_norm(module)
                elif isinstance(kind, prune.BasePruningMethod):
                    prune.remove(module, kind._tensor_name)
    return copied.eval()


@contextmanager
def _swapped(module, formats):
    kept = {}
    for operand in ("weight", "bias"):
        tensor = getattr(module, operand, None)
        if operand in formats and tensor is not None:
            kept[operand] = tensor.data
            tensor.data = rounded(formats[operand], tensor.data)
    yield
    for operand, data in kept.items():
        getattr(module, operand).data = data


class _FunctionalFormats(TorchFunctionMode):
    """Rounds the operands of functions that are called between modules of torch, in the order of the calls, or by the
    path of the module that calls them, their operation, and how many of it the module called before."""

    def __init__(self, formats, paths):
        super().__init__()
        self.called = formats if isinstance(formats, dict) else None
        self.formats, self.inside = None if formats is None or self.called is not None else iter(formats), 0
        self.paths, self.entered = paths, []

    def next_of(self, op):
        """The formats of the next call of an operation; None where it is no site."""
        if self.called is None:
            expected, chosen = next(self.formats)
            assert expected == op, f"the graph has {expected} where {op} is called"
            return chosen
        path, earlier = self.entered[-1]
        earlier[op] += 1
        return self.called.get((path, op, earlier[op] - 1))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs = list(args), dict(kwargs or {})
        op = FUNCTIONS.get(func)
        if op is None or (self.formats is None and self.called is None) or self.inside:
            return func(*args, **kwargs)
        held = {operand: args if place < len(args) else kwargs for operand, place, _ in PLACES[op]}
        keys = {operand: place if place < len(args) else name for operand, place, name in PLACES[op]}
        two = op not in ("linear", "conv1d", "conv2d", "relu")
        if two and not all(isinstance(held[o][keys[o]], Tensor) for o, _, _ in PLACES[op]):
            return func(*args, **kwargs)  # a number
        chosen = self.next_of(op)
        if chosen is None:
            return func(*args, **kwargs)
        target = held["data_in"][keys["data_in"]]
        if func in (Tensor.__radd__, Tensor.__rmul__):
            args = args[::-1]
        for operand, key in keys.items():
            if operand in chosen and isinstance(held[operand], list | dict):
                value = held[operand][key] if isinstance(key, int) else held[operand].get(key)
                if value is not None:
                    held[operand][key] = rounded(chosen[operand], value)
        changes = func in IN_PLACE or kwargs.get("inplace") or (func is F.relu and len(args) > 1 and args[1])
        if not changes:
            return func(*args, **kwargs)
        if func is F.relu:
            return target.copy_(torch.relu(held["data_in"][keys["data_in"]]))
        return target.copy_(IN_PLACE[func](*args, **kwargs))


@contextmanager
def _calls_inside(mode, leaves):
    """Functions that run while a module of torch is called, with its hooks, do not count."""
    usual = nn.Module.__call__

    def call(module, *args, **kwargs):
        mode.inside += module in leaves
        mode.entered.append((mode.paths.get(module), Counter()))
        try:
            return usual(module, *args, **kwargs)
        finally:
            mode.entered.pop()
            mode.inside -= module in leaves

    nn.Module.__call__ = call
    try:
        yield
    finally:
        nn.Module.__call__ = usual


def by_hand(model, calls, functions, x):
    """The outputs of `model` under formats. The model is changed.

    Args:
        calls: path of a module → formats by operand of each of its calls, in the order of the calls.
        functions: (operation, formats) of each call of a function, in the order of the calls; or (path of the caller,
            operation, calls of it before) → formats; None: all stay in float.
    """
    plain = plain_weights(model)
    mode = _FunctionalFormats(functions, {m: path for path, m in plain.named_modules()})
    leaves = {
        m for m in plain.modules() if type(m).__module__.startswith("torch.nn") and not isinstance(m, LOOKED_INTO)
    }
    for path, formats in calls.items():
        module = plain.get_submodule(path)
        counter = iter(range(1000))

        def forward(*given, inner=module.forward, module=module, formats=formats, counter=counter, **named):
            chosen = formats[min(next(counter), len(formats) - 1)]
            original = given[0] if given else named["input"]
            inputs = rounded(chosen["data_in"], original) if "data_in" in chosen else original
            given, named = ((inputs, *given[1:]), named) if given else ((), {**named, "input": inputs})
            with _swapped(module, chosen):
                out = inner(*given, **named)
            return original.copy_(out) if getattr(module, "inplace", False) else out

        module.forward = forward
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a fused kernel calls no layers
    try:
        with torch.no_grad(), mode, _calls_inside(mode, leaves):
            out = plain(x.clone())
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    assert mode.formats is None or next(mode.formats, None) is None, "the graph has more calls of functions"
    return out
