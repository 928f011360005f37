"""Reads the jet substructure data from an ARFF file, as OpenML publishes it."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitfront.data.jsc_columns import CLASSES, feature_columns, plain_name
from bitfront.data.raw import Array
from bitfront.errors import DataError, one_of, parsing

CHUNK_BYTES = 1 << 24
ATTRIBUTE = re.compile(r"""@attribute\s+('[^']*'|"[^"]*"|\S+)\s+(.+)""", re.IGNORECASE)


def read_arff(path: Path) -> tuple[Array, Array]:
    """(features (samples, 16) float32 in the order of FEATURES, labels (samples,) as positions in CLASSES).

    Raises:
        DataError: a feature or the class is missing, a line cannot be read, or there is no row.
    """
    with parsing(DataError, f"{path} cannot be read as ARFF", "get the file again"), path.open("rb") as file:
        header = _arff_header(file, path)
        order = feature_columns(header.names, path)
        # Classes are single letters that no number contains. So one table of bytes turns labels into class
        # indices and line ends into separators, and numpy's parser reads the result at full speed.
        codes = {ord(c): ord("0") + i for i, c in enumerate(CLASSES)} | {ord("\n"): ord(",")}
        translation = bytes(codes.get(byte, byte) for byte in range(256))
        xs, ys = [], []
        for first_line, chunk in _chunks_of_lines(file, header.lines):
            rows = chunk.count(b"\n")
            numbers = chunk.translate(translation, b"\r'\" \t").rstrip(b",")
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", DeprecationWarning)  # how numpy reports text that is not a number
                    flat = np.fromstring(numbers.decode("ascii"), sep=",", dtype=np.float64)
                values = flat.reshape(rows, len(header.names))
            except (ValueError, DeprecationWarning) as error:
                raise _bad_line(chunk, first_line, header, path) from error
            labels = values[:, header.label]
            if not np.isin(labels, np.arange(len(CLASSES))).all():
                raise _bad_line(chunk, first_line, header, path)
            xs.append(values[:, order].astype(np.float32))
            ys.append(labels.astype(np.int64))
    if not xs:
        raise DataError(f"{path} has no rows after @DATA; the file may be cut short, get it again")
    return np.concatenate(xs), np.concatenate(ys)


@dataclass(frozen=True)
class _ArffHeader:
    """What the lines up to @DATA say.

    Attributes:
        names: of all attributes, in the order of the columns.
        label: which of them is the class.
        lines: how many lines the header has.
    """

    names: Sequence[str]
    label: int
    lines: int


def _arff_header(file: io.BufferedReader, path: Path) -> _ArffHeader:
    names: list[str] = []
    labels: list[int] = []
    for number, raw in enumerate(file, start=1):
        text = raw.decode("utf-8-sig", errors="replace").strip()
        if text.lower().startswith("@data"):
            if len(labels) != 1:
                raise DataError(
                    f"{path} declares {len(labels)} attributes with the classes g, q, w, z, t; needed is one, e.g. "
                    "@ATTRIBUTE class {g, q, t, w, z}"
                )
            return _ArffHeader(names, labels[0], number)
        match = ATTRIBUTE.match(text)
        if match:
            kind = match[2].strip()
            if kind.startswith("{"):
                values = [plain_name(value) for value in kind.strip("{} ").split(",")]
                if sorted(values) != sorted(CLASSES):
                    raise DataError(
                        f"{path}:{number}: the attribute {match[1]} has the values {', '.join(values)}; needed are "
                        "the classes g, q, w, z, t"
                    )
                labels.append(len(names))
            names.append(plain_name(match[1]))
    raise DataError(f"{path} has no @DATA line; the file may be cut short, get it again")


def _chunks_of_lines(file: io.BufferedReader, line: int) -> Iterator[tuple[int, bytes]]:
    """(number of the first line, whole lines) in chunks; blank lines and comments are dropped."""
    rest = b""
    while chunk := file.read(CHUNK_BYTES):
        whole, newline, rest = (rest + chunk).rpartition(b"\n")
        if newline:
            yield line + 1, _rows_only(whole + newline)
            line += whole.count(b"\n") + 1
    if rest.strip():
        yield line + 1, _rows_only(rest + b"\n")


def _rows_only(lines: bytes) -> bytes:
    lines = lines.replace(b"\r", b"")
    if b"%" not in lines and b"\n\n" not in lines and not lines.startswith(b"\n"):
        return lines
    kept = [row for row in lines.split(b"\n") if row.strip() and not row.lstrip().startswith(b"%")]
    return b"\n".join([*kept, b""])


def _bad_line(chunk: bytes, first_line: int, header: _ArffHeader, path: Path) -> DataError:
    """The error for the first line of `chunk` that is not one number per attribute and one class."""
    for number, raw in enumerate(chunk.decode("utf-8", errors="replace").splitlines(), start=first_line):
        cells = raw.split(",")
        needed = len(header.names)
        if len(cells) != needed:
            return DataError(f"{path}: about line {number}: {len(cells)} values; needed are {needed}: {raw[:80]!r}")
        for index, cell in enumerate(cells):
            if index == header.label:
                if plain_name(cell) not in CLASSES:
                    return DataError(f"{path}: about line {number}: the class is {cell!r}; {one_of(CLASSES)}")
                continue
            try:
                float(cell.strip().strip("'\""))
            except ValueError:
                return DataError(
                    f"{path}: about line {number}: {header.names[index]} is {cell.strip()!r}, which is not a number"
                )
    return DataError(f"{path}: the lines from {first_line} on cannot be read as numbers")
