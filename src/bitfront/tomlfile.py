"""TOML with line numbers, and TOML written back.

``tomllib`` parses; it keeps no positions, so a second, forgiving scan of the text finds the line of every key, for
messages. What is nested too deep for a parser is refused before. ``tomli_w`` writes what a configuration holds: tables,
lists, strings, numbers and booleans.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from bitfront.errors import ConfigError, parsing

Key = tuple[str, ...]
#: Larger files are no configurations.
LARGEST = 2**24
#: A configuration is nested some ten deep.
DEEPEST = 64
#: Byte order marks of encodings that TOML does not allow; the longer ones first.
_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
#: What changes the depth, or hides what does: quotes and comments.
_TOKEN = re.compile(r"""\"{3}|'{3}|["'.\[\]{},=\n]|#[^\n]*""")
_CLOSING = {
    '"': re.compile(r'(?:[^"\\\n]|\\.)*+(?:"|(?=\n))'),
    "'": re.compile(r"[^'\n]*+(?:'|(?=\n))"),
    '"""': re.compile(r'(?:[^"\\]|\\.|"(?!""))*+"{3,5}', re.DOTALL),
    "'''": re.compile(r"(?:[^']|'(?!''))*+'{3,5}"),
}
_KEY_PART = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'[^']*'|[A-Za-z0-9_-]+)\s*""")


@dataclass(frozen=True)
class Document:
    """A parsed file: its values, and the line of each key."""

    name: str
    values: Mapping[str, Any]
    lines: Mapping[Key, int] = field(default_factory=dict)

    def line(self, key: Key) -> int | None:
        """The line on which `key`, or the nearest table around it, stands."""
        for length in range(len(key), 0, -1):
            if key[:length] in self.lines:
                return self.lines[key[:length]]
        return None


def read(path: Path) -> Document:
    """Parse the file at `path`: UTF-8, with or without a byte order mark.

    Raises:
        ConfigError: it cannot be read, is in another encoding, or is not TOML; with the line.
    """
    why = f"{path}: cannot read the configuration"
    with parsing(ConfigError, why, "give the path of a TOML file"), path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ConfigError(
            f"cannot read the configuration: it has more than {LARGEST // 2**20} MiB; is it a TOML file?",
            file=str(path),
        )
    return parse(_decoded(data, str(path)), str(path))


def _decoded(data: bytes, name: str) -> str:
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            raise ConfigError(
                f"cannot read the configuration: it is {encoding} text, and TOML is UTF-8; save it as UTF-8", file=name
            )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"cannot read the configuration: it is not UTF-8 text (byte 0x{data[error.start]:02x}); save it as UTF-8",
            file=name,
            line=data.count(b"\n", 0, error.start) + 1,
        ) from None


def parse(text: str, name: str) -> Document:
    """Parse `text`; `name` is what messages call it. Raises ConfigError."""
    _check_depth(text, name)
    with parsing(ConfigError, f"{name}: this is not valid TOML", "correct it"):
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            position = re.search(r"\(at line (\d+), column \d+\)", str(error))
            message = re.sub(r" \(at .*\)$", "", str(error))
            line = int(position[1]) if position else len(text.splitlines())
            raise ConfigError(f"this is not valid TOML: {message}", file=name, line=line) from None
        return Document(name, values, _scan(text))


def _check_depth(text: str, name: str) -> None:
    """Refuse what is nested deeper than a configuration ever is: parsers need stack for it, and for a key of many parts
    a time that grows with their square."""
    depth = dots = at = 0
    while token := _TOKEN.search(text, at):
        begin, at, what = token.start(), token.end(), token[0]
        if what in ('"', "'", '"""', "'''"):
            closing = _CLOSING[what].search(text, at)
            if closing is None:
                return  # the parser says what is wrong
            at = closing.end()
        elif what == ".":
            dots += 1
        elif what in "[{":
            depth += 1
        elif what in "]}":
            depth -= 1
        elif what in ",=\n":
            dots = 0
        if max(depth, dots) > DEEPEST:
            raise ConfigError(
                f"this is nested more than {DEEPEST} deep, which no configuration is",
                file=name,
                line=text.count("\n", 0, begin) + 1,
            )


def _scan(text: str) -> dict[Key, int]:
    lines: dict[Key, int] = {}
    table: Key = ()
    open_brackets, quote = 0, ""
    # Not splitlines, which knows ends of lines that TOML does not.
    for number, line in enumerate(text.split("\n"), 1):
        if open_brackets or quote:
            open_brackets, quote = _balance(line, open_brackets, quote)
            continue
        header = re.match(r"\s*\[\[?", line)
        if header:
            table = _parts(line[header.end() :])[0]
            _note(lines, table, number)
            continue
        key, rest = _parts(line)
        if key and rest.startswith("="):
            _note(lines, table + key, number)
            open_brackets, quote = _balance(rest[1:], 0, "")
    return lines


def _note(lines: dict[Key, int], key: Key, number: int) -> None:
    for length in range(1, len(key) + 1):
        lines.setdefault(key[:length], number)


def _parts(text: str) -> tuple[Key, str]:
    """Leading dotted key of `text`, and what follows it."""
    parts: list[str] = []
    while match := _KEY_PART.match(text):
        part = match[1]
        parts.append(next(iter(tomllib.loads(f"{part} = 0"))))
        text = text[match.end() :]
        if not text.startswith("."):
            break
        text = text[1:]
    return tuple(parts), text


def _balance(text: str, depth: int, quote: str) -> tuple[int, str]:
    """Brackets still open, and the multi-line quote still open, after `text`."""
    i = 0
    while i < len(text):
        c = text[i]
        if quote:
            if text.startswith(quote, i):
                i, quote = i + 3, ""
            else:
                i += 2 if quote == '"""' and c == "\\" else 1
            continue
        if c in "\"'":
            if text[i : i + 3] == c * 3:
                quote, i = c * 3, i + 3
                continue
            i += 1
            while i < len(text) and text[i] != c:
                i += 2 if c == '"' and text[i] == "\\" else 1
        elif c == "#":
            break
        elif c in "[{":
            depth += 1
        elif c in "]}":
            depth -= 1
        i += 1
    return depth, quote


def value_of(text: str) -> Any:
    """A value as it is typed on a command line: as in TOML, or, where that is no TOML, the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def dumps(values: Mapping[str, Any]) -> str:
    """`values` as TOML text. None is left out, and ``"NA"`` within a list. Raises TypeError for what a configuration
    cannot hold."""
    text = tomli_w.dumps(_writable(values))
    # tomli-w writes one item of a list per line; here a list stands on the line of its key. Texts and keys stay as they
    # are, since tomli-w escapes the line breaks in them.
    text = re.sub(r"\[\n *", "[", text)
    text = re.sub(r",\n *]", "]", text)
    return re.sub(r",\n *", ", ", text)


def _writable(value: Any) -> Any:
    """`value` without None, and of nothing but what a configuration holds."""
    if isinstance(value, Mapping):
        return {key: _writable(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, (list, tuple)):
        return ["NA" if inner is None else _writable(inner) for inner in value]
    if isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{value!r} cannot be written to a configuration")
