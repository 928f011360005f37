"""Which texts of a configuration cannot be used, and why: refused before a path or a module is made of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from bitfront import tomlfile
from bitfront.errors import ConfigError

#: Keys whose values become names of files.
OF_FILES = (("dataset_path",), ("project",), ("project_dir",), ("load_name",))


def check_texts(value: Any, key: tuple[str, ...], document: tomlfile.Document, changes: Mapping[str, Any]) -> None:
    """Refuse texts that no file or module can have as a name.

    These are texts with a NUL character and texts that are not Unicode; under the keys that name files, also those that
    the locale cannot encode.

    Args:
        value: a value of the configuration, of any type.
        key: its path.
        document: where it stands, for the message.
        changes: dotted keys that do not stand in the document.

    Raises:
        ConfigError: there is such a text.
    """
    if isinstance(value, Mapping):
        for part, inner in value.items():
            check_texts(part, (*key, str(part)), document, changes)
            check_texts(inner, (*key, str(part)), document, changes)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_texts(inner, key, document, changes)
    elif isinstance(value, str):
        problem = _unusable(value, names_file=key in OF_FILES)
        if problem:
            given = ".".join(key) in changes
            raise ConfigError(
                f"{value!a} {problem}",
                key=[ascii(part)[1:-1] for part in key],
                file=None if given else document.name,
                line=None if given else document.line(key),
            )


def _unusable(text: str, *, names_file: bool) -> str:
    """Why a text cannot be used; empty if it can."""
    if "\0" in text:
        return "has a NUL character, which is not possible in a name or a text; leave it out"
    try:
        os.fsencode(text) if names_file else text.encode()
    except UnicodeEncodeError:
        if names_file:
            return (
                f"cannot be the name of a file in this locale, whose encoding is {sys.getfilesystemencoding()}; set "
                "PYTHONUTF8=1 or LC_ALL=C.UTF-8, or choose a name of ASCII letters"
            )
        return "is not Unicode text; write it in UTF-8"
    return ""
