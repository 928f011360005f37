"""TOML with line numbers, and TOML written back.

``tomllib`` parses; it keeps no positions, so a second, forgiving scan of the text finds the line of every key, for
messages. Writing covers what a configuration holds: tables, lists, strings, numbers and booleans.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitfront.errors import ConfigError

Key = tuple[str, ...]
_BARE = re.compile(r"[A-Za-z0-9_-]+\Z")
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
    """Parse the file at `path`.

    Raises:
        ConfigError: it cannot be read, or is not TOML; with the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the configuration: {reason}", file=str(path)) from None
    return parse(text, str(path))


def parse(text: str, name: str) -> Document:
    """Parse `text`; `name` is what messages call it. Raises ConfigError."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at line (\d+), column \d+\)", str(error))
        message = re.sub(r" \(at .*\)$", "", str(error))
        line = int(found[1]) if found else len(text.splitlines())
        raise ConfigError(f"this is not valid TOML: {message}", file=name, line=line) from None
    return Document(name, values, _scan(text))


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


def dumps(values: Mapping[str, Any]) -> str:
    """`values` as TOML text. None is left out. Raises TypeError for what a configuration cannot hold."""
    out: list[str] = []
    _table(values, (), out)
    return "\n".join(out).strip() + "\n"


def _table(values: Mapping[str, Any], path: Key, out: list[str]) -> None:
    plain = {k: v for k, v in values.items() if not isinstance(v, Mapping) and v is not None}
    if path and (plain or not values):
        out += ["", f"[{'.'.join(map(_name, path))}]"]
    out += [f"{_name(k)} = {_value(v)}" for k, v in plain.items()]
    for key, value in values.items():
        if isinstance(value, Mapping):
            _table(value, (*path, key), out)


def _name(key: str) -> str:
    return key if _BARE.match(key) else _quoted(key)


def _quoted(text: str) -> str:
    # JSON's escapes are TOML's, except that TOML wants DEL escaped too.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_name(k)} = {_value(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join('"NA"' if v is None else _value(v) for v in value) + "]"
    raise TypeError(f"{value!r} cannot be written to a configuration")
