"""Which tensors of a loaded file are the model's, whatever the tool that wrote it has put around them.

A file may have its weights under a name (``state_dict``, ``ema``), with prefixes that wrappers give (``module.`` of
DataParallel and AveragedModel, ``_orig_mod.`` of torch.compile), with counters beside them that are no weights, in
another floating-point dtype, or as NumPy arrays. All of that is undone here, and what changes a number is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitfront.checkpoints.pickled import RESAVE, Array, Placeholder, resave_lines
from bitfront.errors import CheckpointError, first_few

LoadType = Literal["pt", "pl"]
StateDict = dict[str, Tensor]

#: Messages list at most this many names.
LISTED = 8
#: Names under which weights are looked for; where several fit, the first one counts. Averages come last.
CONTAINERS = tuple(
    "state_dict model_state_dict model model_state net network weights params module "
    "state_dict_ema ema model_ema ema_model ema_state_dict ema_model_state_dict params_ema swa_model".split()
)
#: Of a name, so many parts at its end are compared.
_PARTS = 64
#: What a container may lie in.
_DEPTH = 3
#: Parts of a name that a wrapper adds.
_WRAPPERS = frozenset({"module", "_orig_mod"})
#: Last parts of names of what is no weight: of AveragedModel, and of the profilers thop and ptflops.
_COUNTERS = frozenset({"n_averaged", "total_ops", "total_params", "__flops__", "__params__"})
#: What a batch norm of before torch 0.4.1 does not have, and no evaluation uses.
_TRACKED = "num_batches_tracked"


@dataclass(frozen=True)
class Loaded:
    """The weights in a file.

    Attributes:
        state: under the names of the model's state dict, with its dtypes, on the CPU.
        notes: what was chosen or changed on the way, in one line each.
    """

    state: StateDict
    notes: tuple[str, ...] = ()


def fitted(content: object, path: Path, model: nn.Module, load_type: LoadType) -> Loaded:
    """The weights of `model` among what was loaded from a file.

    Raises:
        CheckpointError: they are not there, or do not fit; the message says what the file holds.
    """
    expected = model.state_dict()
    places = _places(content, path, load_type)
    aligned = [_aligned(_tensors(table)[0], expected, load_type, path) for table in places.values()]
    fitting = [
        place
        for (place, table), own in zip(places.items(), aligned, strict=True)
        if not _tensors(table)[1] and not _misfits(own, expected)
    ]
    place = fitting[0] if fitting else next(iter(places))
    entries, others = _tensors(places[place])
    if others:
        raise _not_tensors(others, path, load_type)
    own = aligned[list(places).index(place)]
    misfits = _misfits(own, expected)
    if misfits:
        hint = "" if load_type == "pl" else " If Lightning wrote the file, use load_type = 'pl'."
        raise CheckpointError(
            f"{path} does not fit the model ({type(model).__name__}; {len(expected)} entries, the file has "
            f"{len(entries)}):\n"
            + "\n".join(misfits)
            + "\nIs it a checkpoint of this model, with the same number of features and classes?"
            + hint
        )
    return Loaded({k: _converted(own[k], v, k, path) for k, v in expected.items()}, _notes(own, expected, fitting))


def _notes(own: Mapping[str, Tensor], expected: Mapping[str, Tensor], fitting: list[str]) -> tuple[str, ...]:
    notes = []
    if len(fitting) > 1:
        notes.append(f"the weights under {fitting[0]!r} are taken; the file also has {', '.join(fitting[1:])}")
    stored = sorted({_dtype(own[k]) for k, v in expected.items() if own[k].dtype != v.dtype})
    if stored:
        notes.append(f"weights are stored as {', '.join(stored)}, and converted to the dtype that the model has")
    return tuple(notes)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _places(content: object, path: Path, load_type: LoadType) -> dict[str, Mapping[Any, Any]]:
    """Where in a loaded file weights may be → what is there, what counts first first; at least one."""
    if not isinstance(content, Mapping):
        hint = ""
        if isinstance(content, list | tuple):
            at = next((i for i, item in enumerate(content) if isinstance(item, Mapping)), None)
            if at is not None:
                hint = (
                    f"Take it out of the {type(content).__name__}: "
                    f"torch.save(torch.load({str(path)!r}, weights_only=True)[{at}], 'weights.pt'). "
                )
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, but a state dict (names → tensors) is needed. {hint}{RESAVE}"
        )
    if load_type == "pl":
        inner = content.get("state_dict")
        if isinstance(inner, Mapping):
            return {"state_dict": inner}
        raise CheckpointError(
            f"{path} is not a Lightning checkpoint: it has no 'state_dict'. If it is a plain state dict, use "
            "load_type = 'pt'."
        )
    return dict(_inside(content, "", _DEPTH)) or {"": content}


def _inside(table: Mapping[Any, Any], place: str, depth: int) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    for name in CONTAINERS if depth else ():
        inner = table.get(name)
        if isinstance(inner, Mapping):
            below = f"{place}.{name}" if place else name
            yield from list(_inside(inner, below, depth - 1)) or [(below, inner)]


def _tensors(table: Mapping[Any, Any]) -> tuple[dict[str, Tensor], dict[str, object]]:
    """(the tensors in a table, by name; what else is in it). Counters are neither."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, object] = {}
    for key, value in table.items():
        name = str(key)
        array = value.value() if isinstance(value, Array) else None
        if array is not None:
            tensors[name] = torch.from_numpy(array)
        elif isinstance(value, Tensor):
            tensors[name] = value.detach()
        elif name.rpartition(".")[2] not in _COUNTERS:
            others[name] = value
    return tensors, others


def _not_tensors(others: Mapping[str, object], path: Path, load_type: LoadType) -> CheckpointError:
    containers = ("state_dict",) if load_type == "pl" else CONTAINERS
    listed = [f"{name} ({type(value).__name__})" for name, value in others.items()]
    model = next((name for name, value in others.items() if name in containers and isinstance(value, Placeholder)), "")
    advice = resave_lines(path, f"model = torch.load({{}}, weights_only=False)[{model!r}]") if model else RESAVE
    return CheckpointError(
        f"{path} is not a state dict: not everything in it is a tensor: {first_few(listed, LISTED)}. "
        f"Weights are looked for at the top and under {', '.join(map(repr, containers))}. {advice}"
    )


def _aligned(
    entries: Mapping[str, Tensor], expected: Mapping[str, Tensor], load_type: LoadType, path: Path
) -> dict[str, Tensor]:
    """`entries` under the names of the model, as far as they can be told."""
    weights = {k: v for k, v in entries.items() if k in expected or k.rpartition(".")[2] not in _COUNTERS}
    named = _unwrapped(weights, expected)
    prefix = _prefix(named, expected, path)
    own = {key[len(prefix) :]: value for key, value in named.items() if key.startswith(prefix)}
    if load_type == "pt" and len(own) < len(named):
        # A plain state dict holds the model and nothing else: entries without the prefix are unexpected.
        own = dict(named)
    for key, value in expected.items():
        place, _, last = key.rpartition(".")
        if last == _TRACKED and key not in own and f"{place}.running_mean".lstrip(".") in own:
            own[key] = torch.zeros_like(value, device="cpu")
    return own


def _unwrapped(entries: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`entries` without the parts of names that wrappers of the model, or of a module in it, have added."""
    plain = {_without_wrappers(key): key for key in expected}
    names = {key: key if key in expected else _without_wrappers(key) for key in entries}
    names = {key: name if name in expected else plain.get(name, name) for key, name in names.items()}
    unique = len(plain) == len(expected) and len(set(names.values())) == len(names)
    return {names[key]: value for key, value in entries.items()} if unique else entries


def _without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _prefix(entries: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> str:
    """The text before the model's names in the file: the prefix under which most entries fit."""
    scores = {"": (0, 0), "model.": (0, 0)}
    for key in entries:
        parts = key.split(".")[-_PARTS:]
        skipped = key[: len(key) - len(".".join(parts))]
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in expected:
                scores[skipped + "".join(f"{part}." for part in parts[:cut])] = (0, 0)
    for prefix in scores:
        present = [key for key in expected if prefix + key in entries]
        fitting = sum(_shape(entries[prefix + key]) == expected[key].shape for key in present)
        scores[prefix] = (fitting, len(present))
    best = max(scores.values())
    leading = [prefix for prefix, score in scores.items() if score == best]
    for usual in ("", "model."):
        if usual in leading:
            return usual
    if len(leading) > 1 and best[0] == len(expected):
        raise CheckpointError(
            f"{path} holds {len(leading)} sets of weights that fit the model, under {first_few(leading, LISTED)}; save "
            "the one you want in a separate file, as a plain state dict"
        )
    return leading[0]


def _shape(tensor: Tensor) -> tuple[int, ...] | None:
    """The shape of a tensor; None for one that has none (nested)."""
    return None if tensor.is_nested else tuple(tensor.shape)


def _misfits(entries: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """A line for each way in which `entries` differ from the state dict that a model expects."""
    both = {key: entries[key] for key in expected if key in entries}
    unusual = {key: word for key, tensor in both.items() if (word := _unusual(tensor, expected[key]))}
    groups = {
        "missing from the file": [key for key in expected if key not in entries],
        "in the file, not in the model": [key for key in entries if key not in expected],
        "of another shape in the file": [
            f"{key} {_shape(tensor)} instead of {tuple(expected[key].shape)}"
            for key, tensor in both.items()
            if _shape(tensor) != tuple(expected[key].shape)
        ],
        "in the file with values that are no plain numbers": [f"{key} ({word})" for key, word in unusual.items()],
    }
    return [f"  {len(keys)} {what}: {first_few(keys, LISTED)}" for what, keys in groups.items() if keys]


def _unusual(tensor: Tensor, expected: Tensor) -> str:
    """What keeps a tensor from being a weight, and what to do; empty where nothing does."""
    if tensor.is_meta:
        return "on the meta device, without values: save the model after it was given some"
    if tensor.is_quantized:
        return "quantized: save tensor.dequantize()"
    if tensor.layout != torch.strided or tensor.is_nested:
        return "sparse or nested: save tensor.to_dense()"
    if tensor.is_complex() and not expected.is_complex():
        return "complex: save its real part, if that is meant"
    return ""


def _converted(tensor: Tensor, expected: Tensor, key: str, path: Path) -> Tensor:
    """`tensor` in the dtype that the model has. Raises CheckpointError where a value does not survive that."""
    if tensor.dtype == expected.dtype:
        return tensor
    converted = tensor.to(expected.dtype)
    floating = tensor.is_floating_point() and expected.is_floating_point()
    if floating:
        kept = bool((converted.isfinite() == tensor.isfinite()).all())
    else:
        kept = torch.equal(converted.to(tensor.dtype), tensor)
    if not kept:
        raise CheckpointError(
            f"{path}: {key} is stored as {_dtype(tensor)}, and not every value of it can be a {_dtype(expected)}, "
            "which the model has; convert it before saving"
        )
    return converted
