"""How torch.fx traces a model here: as it is called with one tensor, hooks and all, in evaluation and in training.

Further arguments of ``forward`` keep their defaults, as concrete values, so a traced graph has one placeholder. What
``self.training`` decides is frozen by a trace. So where candidates are trained the model is traced in training mode
too. Where the two graphs differ in plain arguments alone (the ``training`` of a functional dropout) these are
*switches*, which a rebuilt model sets by its own mode; where they differ in more, the graph is for evaluation only.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import keyword
import linecache
import random
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from bitfront.graph.base import Switch
from bitfront.graph.composites import is_composite, unfused, without_questions
from bitfront.operations.lookup import is_leaf

#: How often a model is traced whose forward seems to draw random numbers: another thread of the process, such as one of
#: Dask in a worker, may have drawn them. A model draws every time.
TRIES = 5


class OneInputTracer(fx.Tracer):
    """Traces a call of the model with one tensor."""

    def create_args_for_root(self, *_: Any, **__: Any) -> tuple[Any, list[Any]]:
        """One placeholder, and the call itself, so that hooks of the model and a replaced ``forward`` are traced."""
        name = input_name(self.root)
        x = self.create_proxy("placeholder", name, (), {})
        return (lambda root, value: root(value)), [self.root, x]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Modules that a record names, and those of torch, but its transformers; never the model itself."""
        if not module_qualified_name or is_composite(m):
            return False
        return is_leaf(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """As torch.fx does, but transformers of torch do not ask for shapes."""
        return super().call_module(m, without_questions(m) or forward, args, kwargs)


def input_name(model: nn.Module) -> str:
    """The name of the tensor that ``forward`` takes; ``x`` where it takes any number of arguments."""
    by_place = [p for p in _arguments(model) if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return by_place[0].name if by_place else "x"


def other_inputs(model: nn.Module) -> tuple[str, ...]:
    """Arguments without a default that ``forward`` has beside its first one."""
    arguments = _arguments(model)
    first = input_name(model)
    return tuple(
        p.name
        for p in arguments
        if p.name != first and p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    )


def _arguments(model: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return []  # a forward that is not written in Python


def trace(
    model: nn.Module, *, training: bool = False, tracer: type[OneInputTracer] = OneInputTracer
) -> tuple[fx.Graph | None, str]:
    """(the graph of `model`; why there is none, and which line of the user's stopped the tracer).

    Args:
        model: tensors that its forward makes while it is traced become attributes of it; nothing else changes.
        training: trace what it does in training.
        tracer: knows which modules are one node each.
    """
    graph, why, traced = _trace(model, training, tracer)
    if graph is not None:
        for target in _constants(graph, model):
            setattr(model, target, getattr(traced, target))
    return graph, why


def _trace(model: nn.Module, training: bool, tracer: type[OneInputTracer]) -> tuple[fx.Graph | None, str, nn.Module]:
    """As ``trace``, and the copy that was traced, which has the constants and whatever else the forward left there."""
    for _ in range(TRIES):
        copied = copy.deepcopy(model).train(training)
        with seeded(0), unfused():
            before = _random_states()
            try:
                graph = tracer().trace(copied)
            except Exception as error:
                return None, _culprit(error), copied
            drawn = _random_states() != before
        if not drawn:
            break
    else:
        return None, "the model's forward draws random numbers that torch.fx does not see", copied
    for node in graph.nodes:
        parts = str(node.target).split(".") if node.op in ("call_module", "get_attr") else ()
        reserved = [part for part in parts if keyword.iskeyword(part)]
        if reserved:
            return None, f"{node.target}: {reserved[0]!r} is a word of Python, and cannot be an attribute there", copied
        if node.op == "call_module":
            # Whoever calls this module in the graph would get what the attribute was before.
            left = [k for k, v in vars(copied.get_submodule(str(node.target))).items() if isinstance(v, fx.Proxy)]
            if left:
                return None, f"the model's forward sets {node.target}.{left[0]}, which a traced graph does not", copied
    return graph, "", copied


def _constants(graph: fx.Graph, model: nn.Module) -> list[str]:
    """Attributes that the tracer added."""
    targets = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    return [target for target in targets if "." not in target and not hasattr(model, target)]


def _culprit(error: Exception) -> str:
    """The user's line that stopped the tracer: the innermost one that is neither in torch nor in this folder."""
    library_folders = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(library_folders) and Path(frame.filename).suffix == ".py":
            line = frame.line or linecache.getline(frame.filename, frame.lineno or 0).strip()
            return f"{frame.filename}:{frame.lineno}: {line}"
    return f"{type(error).__name__}: {error}"


# --- random numbers ---------------------------------------------------------------------------------------------------


def _random_states() -> tuple[object, ...]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), name, np.asarray(keys).tobytes(), tuple(rest)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch, Python and NumPy from `seed`; afterwards as if nobody had drawn any."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


# --- training ---------------------------------------------------------------------------------------------------------


def either(training: bool, in_training: Any, in_evaluation: Any) -> Any:
    """What a switch passes on."""
    return in_training if training else in_evaluation


def install(graph: fx.Graph, by_name: Mapping[str, fx.Node], switches: Iterable[Switch]) -> None:
    """Let arguments in the graph of a model that is rebuilt follow the mode of its GraphModule.

    Args:
        by_name: the node of each name in the captured graph.
    """
    for switch in switches:
        node = by_name[switch.node]
        with graph.inserting_before(node):
            training = graph.get_attr("training")
            value = graph.call_function(either, (training, switch.in_training, switch.in_evaluation))
        if isinstance(switch.argument, int):
            node.update_arg(switch.argument, value)
        else:
            node.update_kwarg(switch.argument, value)


def switches_of(model: nn.Module, evaluated: fx.Graph) -> tuple[tuple[Switch, ...], str]:
    """(what `model` does otherwise in training, as switches; what it does otherwise beside, in words).

    Args:
        model: in evaluation mode; not changed.
        evaluated: its graph there.
    """
    graph, why, copied = _trace(model, True, OneInputTracer)
    if graph is None:
        return (), f"in training the model cannot be traced ({why})"
    return _differences(evaluated, graph, model, copied)


def _differences(
    evaluated: fx.Graph, trained: fx.Graph, model: nn.Module, copied: nn.Module
) -> tuple[tuple[Switch, ...], str]:
    pairs = dict(zip(evaluated.nodes, trained.nodes, strict=False))
    if len(evaluated.nodes) != len(trained.nodes):
        first = next((e for e, t in pairs.items() if (e.op, e.target) != (t.op, t.target)), None)
        return (), f"the model's forward does other steps in training{f', from {first.name} on' if first else ''}"
    switches: list[Switch] = []
    for e, t in pairs.items():
        constant = e.op == t.op == "get_attr" and all("_tensor_constant" in str(n.target) for n in (e, t))
        same = constant or (e.op, e.target) == (t.op, t.target)
        if not same or len(e.args) != len(t.args) or e.kwargs.keys() != t.kwargs.keys():
            return (), f"the model's forward does another step at {e.name} in training"
        if e.op == "get_attr" and not _same_constant(model, str(e.target), copied, str(t.target)):
            return (), f"the model's forward makes another constant at {e.name} in training"
        places = [*enumerate(e.args), *e.kwargs.items()]
        for place, value in places:
            other = t.args[place] if isinstance(place, int) else t.kwargs[place]
            if fx.map_arg(value, lambda n: pairs[n]) == other:
                continue
            if _nodes_in(value) or _nodes_in(other):
                return (), f"the model's forward passes other values to {e.name} in training"
            switches.append(Switch(e.name, place, other, value))
    return tuple(switches), ""


def _nodes_in(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


def _same_constant(model: nn.Module, target: str, other: nn.Module, other_target: str) -> bool:
    one, two = (
        getattr(m.get_submodule(path), name)
        for m, (path, _, name) in ((model, target.rpartition(".")), (other, other_target.rpartition(".")))
    )
    return not isinstance(one, Tensor) or torch.equal(one, two)
