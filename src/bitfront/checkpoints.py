"""Weights on disk: written whole or not at all, read without running anything that the file contains.

A checkpoint is a PyTorch file that holds a plain state dict; what is worth knowing about it stands beside it,
in ``NAME.json``. Read are also Lightning's ``.ckpt`` files (``load_type="pl"``) and the usual
``{"state_dict": ...}``.

A ``.pt`` file is a pickle, and unpickling can run any code. So every file is read with ``weights_only=True``,
and whatever else it names (hyper-parameter classes, callbacks, a whole model) is replaced by an inert
stand-in rather than imported: the weights of a Lightning file can be had without trusting the rest of it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import uuid
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Literal, get_args

import torch
from torch import Tensor, nn

from bitfront.errors import CheckpointError, nearest, one_of

LoadType = Literal["pt", "pl"]
StateDict = dict[str, Tensor]

_LISTED = 8
_CONTAINERS = ("state_dict", "model_state_dict", "model")


def save(state: Mapping[str, Tensor], path: Path, meta: Mapping[str, object] | None = None) -> None:
    """Write `state` to `path`, replacing what is there only once the new file is complete.

    Args:
        state: a state dict; stored on the CPU, as a plain dict.
        path: its folder is made where it is missing.
        meta: JSON values, to be had back from :func:`read_meta`.

    Raises:
        CheckpointError: the file cannot be written.
        TypeError: `meta` is not JSON; nothing has been written.
    """
    path = Path(path)
    sidecar = _sidecar(path)
    # Cloned, so that a view into a large tensor does not take all of it along.
    tensors = {key: value.detach().cpu().clone() for key, value in state.items()}
    described = json.loads(json.dumps(meta))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = _write(path, lambda file: torch.save(tensors, file))
        if described is None:
            sidecar.unlink(missing_ok=True)
        else:
            text = json.dumps({"version": 1, "sha256": digest, "meta": described}, indent=2) + "\n"
            _write(sidecar, lambda file: file.write(text.encode()))
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {path}: {error.strerror or error}") from error


def read_meta(path: Path) -> dict[str, Any]:
    """What :func:`save` was given as `meta` for this checkpoint; empty if it was given nothing.

    Raises:
        CheckpointError: the file beside the checkpoint is damaged, or belongs to other weights.
    """
    sidecar = _sidecar(Path(path))
    if not sidecar.is_file():
        return {}
    try:
        document = json.loads(sidecar.read_text(encoding="utf-8"))
        digest, meta = document["sha256"], document["meta"]
        found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}, only {sidecar}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{sidecar} is damaged ({error}); delete it to go on without it") from error
    if not isinstance(meta, dict) or digest != found:
        raise CheckpointError(
            f"{sidecar} describes other weights than {path} holds (was saving interrupted, or the file "
            "replaced?); delete it to go on without it"
        )
    return meta


def load(path: Path, model: nn.Module, load_type: LoadType = "pt") -> StateDict:
    """The weights in the file at `path`, on the CPU, under the names of `model`'s state dict.

    Args:
        path: the file.
        model: what the weights must fit; not changed. The caller does ``model.load_state_dict(...)``.
        load_type: ``"pt"``: a state dict, bare or under ``state_dict``, ``model_state_dict`` or ``model``;
            ``"pl"``: a Lightning checkpoint, of which the entries with the model's prefix (``model.``, or
            whichever fits) are taken and the rest, such as metrics, is left.

    Raises:
        CheckpointError: there is no such file, it is not a checkpoint or not of that type, or it does not
            fit; then the message lists what is missing, unexpected and of another shape.
    """
    path = Path(path)
    _check_type(load_type)
    content = _read(path)
    entries = _entries(content, path, load_type)
    wanted = model.state_dict()
    prefix = _prefix(entries, wanted, path)
    fitting = {key[len(prefix) :]: value for key, value in entries.items() if key.startswith(prefix)}
    if load_type == "pt" and len(fitting) < len(entries):
        # A bare state dict holds the model and nothing else: what has no prefix does not belong to it.
        fitting = entries
    problems = _misfits(fitting, wanted)
    if problems:
        hint = "" if load_type == "pl" else " If Lightning wrote the file, use load_type = 'pl'."
        raise CheckpointError(
            f"{path} does not fit the model ({type(model).__name__}; {len(wanted)} entries, the file has "
            f"{len(entries)}):\n"
            + "\n".join(problems)
            + "\nIs it a checkpoint of this model, made for as many features and classes?"
            + hint
        )
    return {key: fitting[key] for key in wanted}


class _StandIn:
    """In place of an object that is not a weight: accepts what a pickle does to it, and does nothing."""

    def __new__(cls, *_args: object, **_kwargs: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        return

    def __setstate__(self, _state: object) -> None:
        return


class _DictStandIn:
    """The same for subclasses of dict: becomes an OrderedDict, which torch can fill."""

    def __new__(cls, *_args: object, **_kwargs: object) -> OrderedDict[object, object]:  # type: ignore[misc]
        return OrderedDict()


def _stand_in(name: str) -> type:
    # A pickle does not say what a class derives from; AttributeDict, EasyDict, defaultdict go by their name.
    return type(name, (_DictStandIn if name.lower().endswith("dict") else _StandIn,), {})


def _read(path: Path) -> object:
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir() if p.suffix in (".pt", ".pth", ".ckpt"))
        hint = f" It holds {', '.join(files[:_LISTED])}." if files else ""
        raise CheckpointError(f"{path} is a directory; name the checkpoint file itself.{hint}")
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        where = "" if path.parent.is_dir() else f" (nor a directory {path.parent})"
        raise CheckpointError(f"there is no checkpoint {path}{where}.{nearest(path.name, siblings)}")
    try:
        # Read once: what is checked for names below is then, byte for byte, what is loaded.
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    if not data:
        raise CheckpointError(f"{path} is empty; was writing it interrupted? Make or copy the checkpoint again.")
    try:
        stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
            (_stand_in(name), name) for name in _objects_named(data)
        ]
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            # torch warns of unusual pickles; what comes of them is said below, as an error, or is no trouble.
            warnings.simplefilter("ignore")
            content: object = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged or foreign file can make the reader fail in any way
        raise CheckpointError(
            f"{path} is not a PyTorch checkpoint that can be read safely: {_reason(error)}. {_RESAVE}"
        ) from error
    if isinstance(content, _StandIn | nn.Module):
        raise CheckpointError(
            f"{path} holds a pickled {type(content).__name__}, not its weights; Bitfront does not unpickle "
            f"objects, since that runs code from the file. {_RESAVE}"
        )
    return content


_RESAVE = "Save the weights alone, where the model can be loaded: torch.save(model.state_dict(), 'weights.pt')."


def _reason(error: Exception) -> str:
    """torch's reason in one line, without its advice to load with weights_only=False."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        # The second paragraph says what is wrong, behind some words of the first in some versions of torch.
        paragraphs = [p.strip() for p in text.partition("WeightsUnpickler error:")[2].split("\n\n")]
        paragraphs += [p.strip() for p in text.split("\n\n")[1:]]
        text = next((p for p in paragraphs if p), text)
    first = re.split(r"\. |\n| Please ", text.strip())[0].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _objects_named(data: bytes) -> list[str]:
    """Names in the file that torch does not take for harmless; none for the formats before torch 1.6."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)))
    except ValueError:
        return []


def _entries(content: object, path: Path, load_type: LoadType) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, but a state dict (names → tensors) is needed. {_RESAVE}"
        )
    containers = ("state_dict",) if load_type == "pl" else _CONTAINERS
    inner = next((content[key] for key in containers if isinstance(content.get(key), Mapping)), None)
    if inner is None and load_type == "pl":
        raise CheckpointError(
            f"{path} is not a Lightning checkpoint: it has no 'state_dict'. "
            "If it is a plain state dict, use load_type = 'pt'."
        )
    entries: Mapping[Any, Any] = content if inner is None else inner
    foreign = [f"{k} ({type(v).__name__})" for k, v in entries.items() if not isinstance(v, Tensor)]
    if foreign:
        raise CheckpointError(
            f"{path} is not a state dict: not everything in it is a tensor: {_listed(foreign)}. "
            f"Weights are looked for at the top and under {', '.join(map(repr, containers))}. {_RESAVE}"
        )
    return {str(key): value for key, value in entries.items()}


def _prefix(entries: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> str:
    """What stands before the model's names in the file: the prefix under which most entries fit."""
    scores = {"": (0, 0), "model.": (0, 0)}
    for key in entries:
        parts = key.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in wanted:
                scores["".join(f"{part}." for part in parts[:cut])] = (0, 0)
    for prefix in scores:
        there = [key for key in wanted if prefix + key in entries]
        fitting = sum(entries[prefix + key].shape == wanted[key].shape for key in there)
        scores[prefix] = (fitting, len(there))
    best = max(scores.values())
    leading = [prefix for prefix, score in scores.items() if score == best]
    for usual in ("", "model."):
        if usual in leading:
            return usual
    if len(leading) > 1 and best[0] == len(wanted):
        raise CheckpointError(
            f"{path} holds {len(leading)} sets of weights that fit the model, under {_listed(leading)}; save "
            "the one you want on its own, as a plain state dict"
        )
    return leading[0]


def _misfits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    missing = [key for key in wanted if key not in found]
    unexpected = [key for key in found if key not in wanted]
    shapes = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in found and found[key].shape != value.shape
    ]
    groups = {
        "missing from the file": missing,
        "in the file, not in the model": unexpected,
        "of another shape in the file": shapes,
    }
    return [f"  {len(keys)} {what}: {_listed(keys)}" for what, keys in groups.items() if keys]


def _listed(items: list[str]) -> str:
    more = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _check_type(load_type: str) -> None:
    allowed = get_args(LoadType)
    if load_type in allowed:
        return
    hint = (
        " A .mz file is a pickled graph; MASE saved its weights beside it, in state_dict.pt: load that with 'pt'."
        if load_type == "mz"
        else ""
    )
    raise CheckpointError(f"load_type = {load_type!r} is not possible; {one_of(allowed)}.{hint}")


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _write(path: Path, write: Callable[[IO[bytes]], object]) -> str:
    """Write a file aside and move it into place; its SHA-256."""
    # Not tempfile: its files are readable by their owner only, and the mode would stay after the move.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with aside.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        digest = hashlib.sha256(aside.read_bytes()).hexdigest()
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return digest
