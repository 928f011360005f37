"""What calibration learned, in files of a run folder: formats with their scales, corrected biases, statistics.

``calibration/`` holds any number of files, each written once and whole. The name of a file is its checksum. A file has
the checksum (SHA-256, hexadecimal) and a line feed, the length of a JSON text (8 bytes, little-endian), this text, and
the values of the tensors that it describes. The text also says what everything was learned from. A file that is
damaged, or was learned from something else, is never believed; what it held is learned again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bitfront.errors import RunError, UnknownNameError, parsing
from bitfront.files import shown, whole
from bitfront.formats.base import Format, Operand
from bitfront.formats.spelling import as_json, from_json

#: The folder below the run folder, and how its files are called.
FOLDER, SUFFIX = "calibration", ".learned"
#: Counts up when files are written in another way.
VERSION = 1
#: Kinds of numbers in the tensors, as NumPy spells them.
_DTYPES = {torch.float32: "<f4", torch.float64: "<f8", torch.float16: "<f2", torch.int64: "<i8", torch.uint8: "|u1"}
_DIGEST = 64


@dataclass(frozen=True)
class Learned:
    """What is learned at a time, and of what; a key.

    Attributes:
        kind: which sort of thing.
        site: name of the site.
        operand: the operand, of a format.
        formats: the formats that it depends on, as the space gives them: (operand, format), sorted.
        corrections: the corrections that it depends on, as text; empty where it depends on none.
    """

    kind: Literal["format", "bias", "norms", "rounding"]
    site: str
    operand: Operand
    formats: tuple[tuple[Operand, Format], ...]
    corrections: str = ""


@dataclass(frozen=True, eq=False)
class Entry:
    """What was learned: the value of a key.

    Attributes:
        form: the calibrated format; None where the key is of none that learns.
        tensors: name → values.
        losses: of a format: what is lost → (share of the values, label of the format).
    """

    form: Format | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    losses: Mapping[str, tuple[float, str]] = field(default_factory=dict)


def write(folder: Path, source: str, entries: Mapping[Learned, Entry]) -> None:
    """Write a file with some entries. Those with a format that has no registered name are left out.

    Args:
        folder: the run folder.
        source: what the entries were learned from, as a fingerprint.

    Raises:
        RunError: the file cannot be written.
    """
    spelled, blobs, start = [], [], 0
    for key, entry in entries.items():
        try:
            one = _spelled(key, entry)
        except UnknownNameError:
            continue
        for name, tensor in entry.tensors.items():
            blob = tensor.detach().cpu().contiguous().numpy().astype(_DTYPES[tensor.dtype]).tobytes()
            described = {"name": name, "dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "start": start}
            one["tensors"].append(described)
            blobs.append(blob)
            start += len(blob)
        spelled.append(one)
    if not spelled:
        return
    text = json.dumps({"version": VERSION, "source": source, "entries": spelled}).encode()
    body = b"".join([len(text).to_bytes(8, "little"), text, *blobs])
    digest = hashlib.sha256(body).hexdigest()
    path = folder / FOLDER / f"{digest[:16]}{SUFFIX}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{shown(path.parent)}: cannot be created: {error.strerror or error}") from None
    if not path.exists():
        with whole(path) as part:
            part.write_bytes(digest.encode() + b"\n" + body)


def files(folder: Path) -> list[Path]:
    """The files of a run folder, sorted by name."""
    return sorted((folder / FOLDER).glob(f"*{SUFFIX}"))


def read(path: Path) -> tuple[str, dict[Learned, Entry]]:
    """(what the entries of a file were learned from, the entries).

    Raises:
        RunError: the file is damaged, or of another version.
    """
    with parsing(RunError, f"{shown(path)} cannot be read", "it is left out, and what it held is learned again"):
        data = path.read_bytes()
        digest, body = data[:_DIGEST], data[_DIGEST + 1 :]
        if hashlib.sha256(body).hexdigest().encode() != digest:
            raise ValueError("its contents differ from its checksum")
        size = int.from_bytes(body[:8], "little")
        document = json.loads(body[8 : 8 + size])
        if document["version"] != VERSION:
            raise ValueError(f"it is of version {document['version']}, and this Bitfront reads version {VERSION}")
        values = memoryview(body)[8 + size :]
        return str(document["source"]), dict(_read(one, values) for one in document["entries"])


def _spelled(key: Learned, entry: Entry) -> dict[str, Any]:
    return {
        "kind": key.kind,
        "site": key.site,
        "operand": key.operand,
        "formats": [[operand, as_json(form)] for operand, form in key.formats],
        "corrections": key.corrections,
        "form": None if entry.form is None else as_json(entry.form),
        "losses": {kind: list(loss) for kind, loss in entry.losses.items()},
        "tensors": [],
    }


def _read(one: Mapping[str, Any], values: memoryview) -> tuple[Learned, Entry]:
    formats = tuple((operand, from_json(form)) for operand, form in one["formats"])
    key = Learned(one["kind"], one["site"], one["operand"], formats, one["corrections"])
    tensors = {described["name"]: _tensor(described, values) for described in one["tensors"]}
    losses = {kind: (float(share), str(label)) for kind, (share, label) in one["losses"].items()}
    return key, Entry(None if one["form"] is None else from_json(one["form"]), tensors, losses)


def _tensor(described: Mapping[str, Any], values: memoryview) -> Tensor:
    kind, shape = np.dtype(described["dtype"]), described["shape"]
    number = math.prod(shape)
    flat = np.frombuffer(values, kind, number, described["start"])
    return torch.from_numpy(flat.reshape(shape).astype(kind.newbyteorder("=")))
