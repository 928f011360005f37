"""Weights on disk: written completely or not at all, and read without running code from the file.

A checkpoint is a PyTorch file that holds a plain state dict. Facts about it are in ``NAME.json`` beside it.
Lightning's ``.ckpt`` files (``load_type="pl"``) and the common ``{"state_dict": ...}`` can be read too.

A ``.pt`` file is a pickle, and unpickling can run any code. So every file is read with ``weights_only=True``. Other
objects in it (hyper-parameter classes, callbacks, a whole model) are replaced by placeholders that do nothing. So the
weights of a Lightning file can be read without trusting the rest of it.
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

#: Messages list at most this many names.
_LISTED = 8
_CONTAINERS = ("state_dict", "model_state_dict", "model")


def save_checkpoint(state: Mapping[str, Tensor], path: Path, meta: Mapping[str, object] | None = None) -> None:
    """Write `state` to `path`. A file that exists is replaced only when the new one is complete.

    Args:
        state: a state dict; stored on the CPU, as a plain dict.
        path: the file; its folder is created where it is missing.
        meta: JSON values, for :func:`read_meta`; None for none.

    Raises:
        CheckpointError: the file cannot be written.
        TypeError: `meta` is not JSON; nothing is written.
    """
    path = Path(path)
    sidecar = _sidecar(path)
    # Cloned, so that a view into a large tensor does not store all of that tensor.
    tensors = {key: value.detach().cpu().clone() for key, value in state.items()}
    json_meta = json.loads(json.dumps(meta))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = _write_atomically(path, lambda file: torch.save(tensors, file))
        if json_meta is None:
            sidecar.unlink(missing_ok=True)
        else:
            text = json.dumps({"version": 1, "sha256": digest, "meta": json_meta}, indent=2) + "\n"
            _write_atomically(sidecar, lambda file: file.write(text.encode()))
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {path}: {error.strerror or error}") from error


def read_meta(path: Path) -> dict[str, Any]:
    """The `meta` that :func:`save_checkpoint` stored with this checkpoint; empty where there is none.

    Raises:
        CheckpointError: the file beside the checkpoint is damaged, or belongs to other weights.
    """
    sidecar = _sidecar(Path(path))
    if not sidecar.is_file():
        return {}
    try:
        document = json.loads(sidecar.read_text(encoding="utf-8"))
        digest, meta = document["sha256"], document["meta"]
        actual = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}, only {sidecar}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{sidecar} is damaged ({error}); delete it to continue without it") from error
    if not isinstance(meta, dict) or digest != actual:
        raise CheckpointError(
            f"{sidecar} describes other weights than those in {path} (was saving interrupted, or the file replaced?); "
            "delete it to continue without it"
        )
    return meta


def load_checkpoint(path: Path, model: nn.Module, load_type: LoadType = "pt") -> StateDict:
    """The weights in the file at `path`, on the CPU, under the names of `model`'s state dict.

    Args:
        path: the file.
        model: the model that the weights must fit; not changed. The caller does ``model.load_state_dict(...)``.
        load_type: ``"pt"``: a state dict, at the top or under ``state_dict``, ``model_state_dict`` or ``model``.
            ``"pl"``: a Lightning checkpoint; the entries with the model's prefix (``model.``, or the one that fits
            best) are used, and others, such as metrics, are ignored.

    Raises:
        CheckpointError: there is no such file, it is not a checkpoint, it is of another type, or it does not fit the
            model. In the last case the message lists the entries that are missing, unexpected or of another shape.
    """
    path = Path(path)
    _check_type(load_type)
    content = _load_safely(path)
    entries = _entries(content, path, load_type)
    expected = model.state_dict()
    prefix = _prefix(entries, expected, path)
    fitting = {key[len(prefix) :]: value for key, value in entries.items() if key.startswith(prefix)}
    if load_type == "pt" and len(fitting) < len(entries):
        # A plain state dict holds the model and nothing else: entries without the prefix are unexpected.
        fitting = entries
    misfits = _misfits(fitting, expected)
    if misfits:
        hint = "" if load_type == "pl" else " If Lightning wrote the file, use load_type = 'pl'."
        raise CheckpointError(
            f"{path} does not fit the model ({type(model).__name__}; {len(expected)} entries, the file has "
            f"{len(entries)}):\n"
            + "\n".join(misfits)
            + "\nIs it a checkpoint of this model, with the same number of features and classes?"
            + hint
        )
    return {key: fitting[key] for key in expected}


class _Placeholder:
    """Takes the place of an object that is not a weight: accepts what a pickle does to it, and does nothing."""

    def __new__(cls, *_args: object, **_kwargs: object) -> _Placeholder:
        return super().__new__(cls)

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        return

    def __setstate__(self, _state: object) -> None:
        return


class _DictPlaceholder:
    """The same for subclasses of dict: becomes an OrderedDict, which torch can fill."""

    def __new__(cls, *_args: object, **_kwargs: object) -> OrderedDict[object, object]:  # type: ignore[misc]
        return OrderedDict()


def _placeholder(name: str) -> type:
    # A pickle does not contain the base classes. AttributeDict, EasyDict, defaultdict are recognised by their names.
    return type(name, (_DictPlaceholder if name.lower().endswith("dict") else _Placeholder,), {})


def _load_safely(path: Path) -> object:
    """What torch loads from the file, with placeholders for all objects that are not plain data."""
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir() if p.suffix in (".pt", ".pth", ".ckpt"))
        hint = f" It holds {', '.join(files[:_LISTED])}." if files else ""
        raise CheckpointError(f"{path} is a directory; name the checkpoint file in it.{hint}")
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        where = "" if path.parent.is_dir() else f" (nor a directory {path.parent})"
        raise CheckpointError(f"there is no checkpoint {path}{where}.{nearest(path.name, siblings)}")
    try:
        # Read once, so that the bytes that are checked below are the bytes that are loaded.
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    if not data:
        raise CheckpointError(f"{path} is empty; was writing it interrupted? Save or copy the checkpoint again.")
    try:
        placeholders: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
            (_placeholder(name), name) for name in _unsafe_names(data)
        ]
        with warnings.catch_warnings(), torch.serialization.safe_globals(placeholders):
            # torch warns about unusual pickles. Where they matter, the errors below say so.
            warnings.simplefilter("ignore")
            content: object = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged or foreign file can make the reader fail in any way
        raise CheckpointError(
            f"{path} is not a PyTorch checkpoint that can be read safely: {_torch_reason(error)}. {_RESAVE}"
        ) from error
    if isinstance(content, _Placeholder | nn.Module):
        raise CheckpointError(
            f"{path} holds a pickled {type(content).__name__}, not its weights; Bitfront does not unpickle objects, "
            f"because that runs code from the file. {_RESAVE}"
        )
    return content


_RESAVE = "Save only the weights, where the model can be loaded: torch.save(model.state_dict(), 'weights.pt')."


def _torch_reason(error: Exception) -> str:
    """torch's reason in one line, without its advice to load with weights_only=False."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        # The second paragraph says what is wrong; in some versions of torch it follows words of the first.
        paragraphs = [p.strip() for p in text.partition("WeightsUnpickler error:")[2].split("\n\n")]
        paragraphs += [p.strip() for p in text.split("\n\n")[1:]]
        text = next((p for p in paragraphs if p), text)
    first = re.split(r"\. |\n| Please ", text.strip())[0].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _unsafe_names(data: bytes) -> list[str]:
    """Names in the file that torch does not consider safe; none for the formats before torch 1.6."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)))
    except ValueError:
        return []


def _entries(content: object, path: Path, load_type: LoadType) -> dict[str, Any]:
    """The tensors in a loaded file, by their names in it."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, but a state dict (names → tensors) is needed. {_RESAVE}"
        )
    containers = ("state_dict",) if load_type == "pl" else _CONTAINERS
    inner = next((content[key] for key in containers if isinstance(content.get(key), Mapping)), None)
    if inner is None and load_type == "pl":
        raise CheckpointError(
            f"{path} is not a Lightning checkpoint: it has no 'state_dict'. If it is a plain state dict, use "
            "load_type = 'pt'."
        )
    entries: Mapping[Any, Any] = content if inner is None else inner
    others = [f"{key} ({type(value).__name__})" for key, value in entries.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(
            f"{path} is not a state dict: not everything in it is a tensor: {_shortened(others)}. "
            f"Weights are looked for at the top and under {', '.join(map(repr, containers))}. {_RESAVE}"
        )
    return {str(key): value for key, value in entries.items()}


def _prefix(entries: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> str:
    """The text before the model's names in the file: the prefix under which most entries fit."""
    scores = {"": (0, 0), "model.": (0, 0)}
    for key in entries:
        parts = key.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in expected:
                scores["".join(f"{part}." for part in parts[:cut])] = (0, 0)
    for prefix in scores:
        present = [key for key in expected if prefix + key in entries]
        fitting = sum(entries[prefix + key].shape == expected[key].shape for key in present)
        scores[prefix] = (fitting, len(present))
    best = max(scores.values())
    leading = [prefix for prefix, score in scores.items() if score == best]
    for usual in ("", "model."):
        if usual in leading:
            return usual
    if len(leading) > 1 and best[0] == len(expected):
        raise CheckpointError(
            f"{path} holds {len(leading)} sets of weights that fit the model, under {_shortened(leading)}; save the "
            "one you want in a separate file, as a plain state dict"
        )
    return leading[0]


def _misfits(entries: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """A line for each way in which `entries` differ from the state dict that a model expects."""
    missing = [key for key in expected if key not in entries]
    unexpected = [key for key in entries if key not in expected]
    shapes = [
        f"{key} {tuple(entries[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in entries and entries[key].shape != value.shape
    ]
    groups = {
        "missing from the file": missing,
        "in the file, not in the model": unexpected,
        "of another shape in the file": shapes,
    }
    return [f"  {len(keys)} {what}: {_shortened(keys)}" for what, keys in groups.items() if keys]


def _shortened(items: list[str]) -> str:
    """``"a, b and 3 more"``."""
    more = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _check_type(load_type: str) -> None:
    allowed = get_args(LoadType)
    if load_type in allowed:
        return
    hint = (
        " A .mz file is a pickled graph; MASE saves its weights beside it, in state_dict.pt: load that file with 'pt'."
        if load_type == "mz"
        else ""
    )
    raise CheckpointError(f"load_type = {load_type!r} is not possible; {one_of(allowed)}.{hint}")


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> str:
    """Write a temporary file and move it to `path`; returns its SHA-256."""
    # Not tempfile: only their owner can read its files, and the mode would stay after the move.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest
