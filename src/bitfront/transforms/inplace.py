"""Functions that change their first argument, in a graph that is rewritten.

Their operands are rounded copies, so the result is computed as a new tensor and written into the tensor that was given.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

#: Operators that change the tensor on their left, and those that do not.
_OPERATORS: dict[object, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.imatmul: operator.matmul,
}


def without_change(node: fx.Node) -> bool:
    """Let a function or method return what it used to write into its first argument. False if it changes nothing."""
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    parameters = [] if isinstance(target, str) else _parameters_of(target)
    if "inplace" in parameters:
        return _take_inplace(node, parameters.index("inplace"))
    if name.endswith("_") and not name.endswith("__"):
        plain = name[:-1]
        node.target = plain if isinstance(target, str) else getattr(torch, plain, None) or getattr(F, plain)
        return True
    node.target = _OPERATORS.get(target, target)
    return target in _OPERATORS


def _parameters_of(function: Any) -> list[str]:
    """The names of a Python function's parameters; none for a function of C++."""
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


def _take_inplace(node: fx.Node, position: int) -> bool:
    """Take the argument ``inplace`` from a call, whose last one it is; what it was."""
    inplace = node.kwargs.get("inplace", node.args[position] if position < len(node.args) else False)
    node.args, node.kwargs = node.args[:position], {k: v for k, v in node.kwargs.items() if k != "inplace"}
    return bool(inplace)


def written_into(node: fx.Node, argument: fx.Node) -> None:
    """Write the result of a node into `argument`, which the model may read afterwards under any name."""
    with node.graph.inserting_after(node):
        written = node.graph.call_method("copy_", (argument, node))
    node.replace_all_uses_with(written, delete_user_cb=lambda user: bool(user is not written))
