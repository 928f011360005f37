"""Weights on disk: written completely or not at all, and read without running code from the file.

A checkpoint is a PyTorch file that holds a plain state dict. Facts about it, and its checksum, are in ``NAME.json``
beside it. Files of other tools can be read too: ``pickled.py`` and ``safetensors.py`` read them, and ``fitting.py``
finds the model's weights in them.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from bitfront.checkpoints.fitting import CONTAINERS, LISTED, Loaded, LoadType, StateDict, fitted
from bitfront.checkpoints.pickled import read_pickled
from bitfront.checkpoints.safetensors import is_safetensors, read_safetensors, written_safetensors
from bitfront.errors import CheckpointError, nearest, one_of, parsing
from bitfront.files import whole, write_text

__all__ = [
    "CONTAINERS",
    "LoadType",
    "Loaded",
    "StateDict",
    "has_meta",
    "load_checkpoint",
    "read_checkpoint",
    "read_meta",
    "read_tensors",
    "save_checkpoint",
]


def save_checkpoint(state: Mapping[str, Tensor], path: Path, meta: Mapping[str, object] | None = None) -> None:
    """Write `state` to `path`. A file that exists is replaced only when the new one is complete.

    Args:
        state: a state dict; stored on the CPU, as a plain dict.
        path: the file; its folder is created where it is missing. One called ``.safetensors`` is of that format, any
            other of PyTorch's.
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
        with whole(path, CheckpointError) as part, part.open("xb") as file:
            if path.suffix == ".safetensors":
                file.write(written_safetensors(tensors))
            else:
                torch.save(tensors, file)
            file.flush()
            digest = hashlib.sha256(part.read_bytes()).hexdigest()
        if json_meta is None:
            sidecar.unlink(missing_ok=True)
        else:
            document = {"version": 1, "sha256": digest, "meta": json_meta}
            write_text(sidecar, json.dumps(document, indent=2) + "\n", CheckpointError)
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {path}: {error.strerror or error}") from error


def has_meta(path: Path) -> bool:
    """Whether a checkpoint was written to its end with `meta`. The facts are written last, so after a kill between the
    two, the tensors may be there without them."""
    return Path(path).is_file() and _sidecar(Path(path)).is_file()


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
        raise _other_weights(Path(path))
    return meta


def load_checkpoint(path: Path, model: nn.Module, load_type: LoadType = "pt") -> StateDict:
    """The weights in the file at `path`, on the CPU, under the names of `model`'s state dict.

    Args:
        path: the file.
        model: the model that the weights must fit; not changed. The caller does ``model.load_state_dict(...)``.
        load_type: ``"pt"``: a state dict or a safetensors file; at the top, or under one of the names in
            ``CONTAINERS``, such as ``state_dict``, ``model`` or ``ema``. Prefixes of wrappers (``module.``,
            ``_orig_mod.``) and counters of profilers are left out, a missing ``num_batches_tracked`` is 0, and other
            dtypes are converted. ``"pl"``: a Lightning checkpoint; the entries with the model's prefix (``model.``, or
            the one that fits best) are used, and others, such as metrics, are ignored.

    Raises:
        CheckpointError: there is no such file, it is not a checkpoint, it is of another type, or it does not fit the
            model. In the last case the message lists the entries that are missing, unexpected or of another shape.
    """
    return read_checkpoint(path, model, load_type).state


def read_checkpoint(path: Path, model: nn.Module, load_type: LoadType = "pt") -> Loaded:
    """As :func:`load_checkpoint`, with notes about what was chosen or converted on the way."""
    path = Path(path)
    _check_type(load_type)
    with parsing(CheckpointError, f"{path} cannot be read as a checkpoint", "save the model's state dict again"):
        data = _read(path)
        _check_sidecar(path, data)
        content = read_safetensors(data, path) if is_safetensors(data, path) else read_pickled(data, path)
        return fitted(content, path, model, load_type)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors that :func:`save_checkpoint` wrote, by name, on the CPU, of whatever model.

    Raises:
        CheckpointError: the file is missing or damaged, or holds something else than tensors.
    """
    path = Path(path)
    with parsing(CheckpointError, f"{path} cannot be read as a checkpoint", "delete it, and start the search again"):
        data = _read(path)
        _check_sidecar(path, data)
        tensors = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
            raise ValueError("it does not hold tensors by name")
        return tensors


def _check_sidecar(path: Path, data: bytes) -> None:
    """Raises CheckpointError where facts that Bitfront wrote beside these weights belong to others: then one of the two
    files is damaged."""
    if not _sidecar(path).is_file():
        return
    try:
        document = json.loads(_sidecar(path).read_bytes())
        digest = document["sha256"] if "meta" in document else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # a file of somebody else's; who needs the facts calls read_meta
    if digest is not None and digest != hashlib.sha256(data).hexdigest():
        raise _other_weights(path)


def _other_weights(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{_sidecar(path)} describes other weights than those in {path} (was saving interrupted, or the file replaced "
        "or damaged?); delete it to continue without it"
    )


def _read(path: Path) -> bytes:
    """The bytes of the file, once: those that are checked are those that are loaded."""
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir() if p.suffix in (".pt", ".pth", ".ckpt"))
        hint = f" It holds {', '.join(files[:LISTED])}." if files else ""
        raise CheckpointError(f"{path} is a directory; name the checkpoint file in it.{hint}")
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        where = "" if path.parent.is_dir() else f" (nor a directory {path.parent})"
        raise CheckpointError(f"there is no checkpoint {path}{where}.{nearest(path.name, siblings)}")
    if not path.is_file():
        raise CheckpointError(f"{path} is a pipe or a device; give the path of a file that holds the weights")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    if not data:
        raise CheckpointError(f"{path} is empty; was writing it interrupted? Save or copy the checkpoint again.")
    return data


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
