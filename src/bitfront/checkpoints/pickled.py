"""PyTorch's own files, read without running code from them.

Such a file is a pickle, in a zip archive since torch 1.6, and unpickling can run any code. So every file is read with
``weights_only=True``. Other objects in it (hyper-parameter classes, callbacks, a whole model) are replaced by
placeholders that do nothing, so that the weights can be read without trusting the rest. NumPy arrays are put together
here, from their bytes.
"""

from __future__ import annotations

import io
import pickle
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bitfront.archives import check_contents
from bitfront.errors import BitfrontError, CheckpointError, cause

RESAVE = "Save only the weights, where the model can be loaded: torch.save(model.state_dict(), 'weights.pt')."


class Placeholder:
    """Takes the place of an object that is not a weight: accepts what a pickle does to it, and does nothing."""

    def __new__(cls, *_args: object, **_kwargs: object) -> Placeholder:  # noqa: D102
        return super().__new__(cls)

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        return

    def __setstate__(self, _state: object) -> None:
        return


class _DictPlaceholder:
    """The same for subclasses of dict: becomes an OrderedDict, which torch can fill."""

    def __new__(cls, *_args: object, **_kwargs: object) -> OrderedDict[object, object]:  # type: ignore[misc]
        return OrderedDict()


class _Dtype(Placeholder):
    """A NumPy dtype in a file: its letter and size, and then its byte order."""

    def __init__(self, letters: object = "", *_rest: object) -> None:
        self.letters, self.big = letters, sys.byteorder == "big"

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.big = state[1] == ">"


class Array(Placeholder):
    """A NumPy array in a file. NumPy's own function would believe what the file says of its dtype."""

    def __init__(self, *_args: object) -> None:
        self._state: object = None

    def __setstate__(self, state: object) -> None:
        self._state = state

    def value(self) -> np.ndarray[Any, Any] | None:
        """The array; None where it is not one of plain numbers."""
        match self._state:
            case (_, tuple(shape), _Dtype() as dtype, fortran, bytes(data)):
                pass
            case _:
                return None
        if not isinstance(dtype.letters, str) or not re.fullmatch(r"[fiub][1248]", dtype.letters):
            return None
        kind = np.dtype(dtype.letters).newbyteorder(">" if dtype.big else "<")
        flat = np.frombuffer(data, dtype=kind).astype(kind.newbyteorder("="))
        return flat.reshape(shape, order="F" if fortran else "C").copy(order="C")


def _placeholder(name: str) -> type:
    known = {"reconstruct": Array, "numpy.dtype": _Dtype}
    numpys = "reconstruct" if re.fullmatch(r"numpy\._?core\.multiarray\._reconstruct", name) else name
    # A pickle does not contain the base classes. AttributeDict, EasyDict, defaultdict are recognised by their names.
    base = known.get(numpys) or (_DictPlaceholder if name.lower().endswith("dict") else Placeholder)
    return type(name, (base,), {})


def read_pickled(data: bytes, path: Path) -> object:
    """What torch loads from the bytes of a file, with placeholders for all objects that are not plain data.

    Raises:
        CheckpointError: the file is damaged, is none of torch's, or holds a whole model.
    """
    try:
        if data.startswith(b"PK"):
            _check_archive(data, path)
        with warnings.catch_warnings():
            # torch warns about unusual pickles. Where they matter, the errors below say so.
            warnings.simplefilter("ignore")
            placeholders: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
                (_placeholder(name), name) for name in _foreign_names(data)
            ]
            with torch.serialization.safe_globals(placeholders):
                content: object = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except BitfrontError:
        raise
    except Exception as error:  # a damaged or foreign file can make the reader fail in any way
        raise CheckpointError(
            f"{path} is not a PyTorch checkpoint that can be read safely: {_torch_reason(error)}. {RESAVE}"
        ) from error
    if isinstance(content, Placeholder | nn.Module):
        raise CheckpointError(
            f"{path} holds a pickled {type(content).__name__}, not its weights; Bitfront does not unpickle objects, "
            f"because that runs code from the file. {resave_lines(path, 'model = torch.load({}, weights_only=False)')}"
        )
    return content


def resave_lines(path: Path, load: str) -> str:
    """The two lines that make a state dict of a file; `load` is the first one, with a place for the file's name."""
    return (
        "Where you trust the file, make a state dict of it with these two lines, and give that:\n"
        f"  {load.format(repr(str(path)))}\n"
        "  torch.save(model.state_dict(), 'weights.pt')"
    )


def _check_archive(data: bytes, path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        check_contents(path, archive, len(data), CheckpointError)
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names) and any("/code/" in name for name in names):
        raise CheckpointError(
            f"{path} is a TorchScript archive, which holds code beside its weights. "
            + resave_lines(path, "model = torch.jit.load({}, map_location='cpu')")
        )


def _foreign_names(data: bytes) -> Iterable[str]:
    """Names in the file that torch does not consider safe, and NumPy's; none for the formats before torch 1.6."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)))
    except ValueError:
        return []


def _torch_reason(error: Exception) -> str:
    """torch's reason in one line, without its advice to load with weights_only=False."""
    text = str(error)
    if not isinstance(error, pickle.UnpicklingError):
        return re.split(r"\. | Please ", cause(error))[0].rstrip(".")
    # The second paragraph says what is wrong; in some versions of torch it follows words of the first.
    paragraphs = [p.strip() for p in text.partition("WeightsUnpickler error:")[2].split("\n\n")]
    paragraphs += [p.strip() for p in text.split("\n\n")[1:]]
    text = next((p for p in paragraphs if p), text)
    first = re.split(r"\. |\n| Please ", text.strip())[0].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
