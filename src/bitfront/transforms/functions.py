"""Functions in formats that a model calls which torch.fx cannot trace.

There is no graph in which such a call could be replaced. So it is replaced while the model runs: every module says when
it is entered and left (two hooks), and a ``TorchFunctionMode`` sees the functions that the innermost one calls. A call
is known by this module, the operation, and how many calls of that operation the module did before it since it was
entered; ``graph/recording.py`` counts in the same way.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from bitfront.formats.base import Operand
from bitfront.graph import Site
from bitfront.operations.base import Rounds
from bitfront.operations.lookup import of_function
from bitfront.transforms.arguments import (
    called,
    formats_of,
    function_product,
    inner_rounds,
    rounded_arguments,
    rounded_result,
)

#: (operation, number of its calls before this one) → what rounds the operands of the call, whether its weight depends
#: on the samples, and what is to be called before it.
Calls = Mapping[tuple[str, int], tuple[Mapping[Operand, Rounds], bool, Callable[[], None]]]


def _nothing(_site: Site) -> None:
    """Nobody wants to know of calls."""


def replace_calls(
    model: nn.Module,
    sites: Iterable[Site],
    rounds: Mapping[str, Mapping[Operand, Rounds]],
    before: Callable[[Site], None] = _nothing,
) -> None:
    """Let the functions of some sites compute with rounded operands, wherever modules of `model` call them.

    Args:
        model: gets hooks.
        sites: functions of a model that is not traced.
        rounds: site name → operand → what rounds it; looked at in each call.
        before: is given each of these sites before its call.
    """
    calls: dict[str, dict[tuple[str, int], tuple[Mapping[Operand, Rounds], bool, Callable[[], None]]]] = {}
    for site in sites:
        call = rounds[site.name], site.flows("weight"), partial(before, site)
        calls.setdefault(site.caller, {})[site.op, site.earlier_calls] = call
    for path, module in model.named_modules():
        module.register_forward_pre_hook(_Enter(calls.get(path, {})))
        module.register_forward_hook(_leave, always_call=True)


class _Entered(TorchFunctionMode):
    """One module, from when it is entered until it is left."""

    def __init__(self, module: nn.Module, calls: Calls) -> None:
        super().__init__()
        self.module, self.calls = module, calls
        self.earlier: Counter[str] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operation = of_function(func) if _entered()[-1] is self else None
        if operation is None:
            return func(*args, **kwargs)
        call = self.calls.get((operation.name, self.earlier[operation.name]))
        self.earlier[operation.name] += 1
        if call is None:
            return func(*args, **kwargs)
        rounds, flows, before = call
        before()
        inputs, named = rounded_arguments(operation, args, kwargs, rounds)
        inner = inner_rounds(operation.operands, rounds)
        if inner:
            result = called(operation, func, inputs, named, inner)
        elif operation.product is not None and not self.module.training:
            result = function_product(operation, func, inputs, named, formats_of(rounds), flows)
        else:
            result = func(*inputs, **named)
        return rounded_result(operation.operands, rounds, result)


class _Enter:
    """A hook that runs before a module's ``forward``."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def __call__(self, module: nn.Module, _inputs: Any) -> None:
        frame = _Entered(module, self.calls)
        _entered().append(frame)
        if self.calls:
            frame.__enter__()  # type: ignore[no-untyped-call]


def _leave(_module: nn.Module, _inputs: Any, _result: Any) -> None:
    frame = _entered().pop()
    if frame.calls:
        frame.__exit__(None, None, None)  # type: ignore[no-untyped-call]


def seen_by_another(module: nn.Module) -> bool:
    """Whether the functions that `module` calls now count as calls of another module: its ``forward`` was called, and
    not itself."""
    frames = _entered()
    return bool(frames) and frames[-1].module is not module


_LOCAL = threading.local()


def _entered() -> list[_Entered]:
    """The modules that this thread has entered, the innermost one last."""
    if not hasattr(_LOCAL, "entered"):
        _LOCAL.entered = []
    frames: list[_Entered] = _LOCAL.entered
    return frames
