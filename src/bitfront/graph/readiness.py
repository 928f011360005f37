"""Models that no graph can be captured of as they are, and the line that makes each of them one that can."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from bitfront.errors import CaptureError
from bitfront.graph.baking import private_copy

#: Every value of these is a value of float32 too.
HALVES = (torch.float16, torch.bfloat16)


def refuse_unready(model: nn.Module) -> None:
    """Raises CaptureError for a model without weights, or whose Python code is gone; the message says what to do."""
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            "the model is a ScriptModule, whose layers cannot be replaced; give the Python model that it was made "
            "from, with its weights: model.load_state_dict(scripted.state_dict())"
        )
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    lazy = [name for name, tensor in tensors.items() if is_lazy(tensor)]
    if lazy:
        raise CaptureError(
            f"{lazy[0]} has no shape yet, as in LazyLinear before its first call; call the model once before it is "
            "trained: with torch.no_grad(): model(x[:2])"
        )
    without_values = [name for name, tensor in tensors.items() if tensor.is_meta]
    if without_values:
        raise CaptureError(
            f"{without_values[0]} is on the meta device, without values; give it some: model.to_empty(device='cpu'), "
            "then model.load_state_dict(...)"
        )


def hint_for_failure(model: nn.Module) -> str:
    """What may make a model fail on its input, for the end of a message; empty where nothing is to be seen."""
    if any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for module in model.modules()):
        return "; samples are float32, and an embedding takes whole numbers: write embedding(x.long())"
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    if not kinds - {"float32"}:
        return ""
    return (
        f"; its weights are {', '.join(sorted(kinds))}, and samples are float32. Give the model in single precision: "
        "model.float()"
    )


def _halves(model: nn.Module) -> list[str]:
    """The half-precision types of a model's parameters and buffers."""
    kinds = {t.dtype for t in (*model.parameters(), *model.buffers())}
    return [str(kind).removeprefix("torch.") for kind in HALVES if kind in kinds]


def in_float32(model: nn.Module) -> nn.Module:
    """A copy of a half-precision model with the same values in float32; any other model itself.

    Arithmetic in half precision has no order of sums that another machine would repeat, so the float model that
    candidates are compared with computes in float32. One parameter after the other is converted.
    """
    return private_copy(model).float() if _halves(model) else model


def halves_note(model: nn.Module) -> list[str]:
    """What the user should know about a half-precision model; empty for others."""
    kinds = " and ".join(_halves(model))
    if not kinds:
        return []
    return [
        f"the model's weights are {kinds}: their values are taken as float32, which changes none of them, and the "
        "float model that candidates are compared with computes in float32; your model is not changed"
    ]
