"""Every error a user can meet, in one tree.

    BitfrontError
    ├── UserError                    what was asked cannot be done; the command exits with 2, without a traceback
    │   ├── ConfigError              a key or value of the configuration is wrong: file, key, line, what is allowed
    │   │   └── UnknownNameError     a name nobody registered: model, format, metric, sampler ...
    │   ├── DataError                a dataset cannot be read, found or split
    │   │   └── DownloadError        a download failed; says which file to put where instead
    │   ├── CheckpointError          a checkpoint does not fit the model, or cannot be read safely
    │   ├── CaptureError             a model cannot be captured at all
    │   ├── ExportError              a model, or a number format, cannot be written for another runtime; names the node
    │   ├── RunError                 a run folder is missing, of another configuration, or lacks the trial asked for
    │   └── MissingExtraError        an optional dependency is needed; says what to install
    └── EvaluationError              a candidate, or every candidate, could not be evaluated; the command exits with 1

A message says what was asked, what was found, what is allowed and what to do. It speaks of the arguments of Python
functions and the keys of the TOML; where the command shows it, its flags take their places
(``cli.flags.with_flag_names``). Messages are tested.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Sequence
from types import ModuleType


class BitfrontError(Exception):
    """Base class of everything Bitfront raises on purpose."""

    exit_code = 1


class UserError(BitfrontError):
    """Something the user asked for cannot be done as asked.

    Args:
        arguments: the parts of the message that are arguments of Python functions, word for word: ``restart=True``,
            ``project=...``, or dotted keys that may be overridden.
    """

    exit_code = 2

    def __init__(self, message: str, *, arguments: Sequence[str] = ()) -> None:
        self.arguments = tuple(arguments)
        super().__init__(message)


class ConfigError(UserError):
    """A key or a value of the configuration is wrong.

    ``key`` is the path of the offending key, e.g. ``("search", "strategy", "name")``, or the argument of a Python
    function, e.g. ``("seeds",)``. The file and the line are filled in by :meth:`located` where the document is known;
    code that only sees a value raises without them, and so does what is wrong with an argument.
    """

    def __init__(
        self,
        message: str,
        *,
        key: Sequence[str] = (),
        file: str | None = None,
        line: int | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        self.message, self.key, self.file, self.line = message, tuple(key), file, line
        super().__init__(message, arguments=arguments)

    def __str__(self) -> str:
        place = self.file or ""
        if self.line is not None:
            place += f":{self.line}"
        dotted = ".".join(self.key)
        head = ": ".join(part for part in (place, dotted) if part)
        return f"{head}: {self.message}" if head else self.message

    def located(self, file: str, line: int | None) -> ConfigError:
        """The same error, with the place it comes from."""
        self.file, self.line = file, line
        return self


class UnknownNameError(ConfigError):
    """A name that no implementation is registered under."""


class DataError(UserError):
    """A dataset cannot be read, found or split."""


class DownloadError(DataError):
    """A download failed or did not match its checksum."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, or does not fit the model."""


class CaptureError(UserError):
    """A model cannot be captured as a graph of sites."""


class ExportError(UserError):
    """A model, or a number format in it, cannot be written for another runtime. The message names the node."""


class RunError(UserError):
    """A run folder is missing, belongs to another configuration, or lacks what was asked for."""


class MissingExtraError(UserError):
    """An optional dependency is not installed."""


class EvaluationError(BitfrontError):
    """A candidate, or every candidate, could not be evaluated."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the closest of `allowed`, or an empty string where none is close."""
    by_lower = {a.lower(): a for a in allowed}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""


def one_of(allowed: Iterable[object]) -> str:
    """``"allowed: a, b, c"``, for the end of a message."""
    return "allowed: " + ", ".join(str(a) for a in allowed)


def require(module: str, extra: str, purpose: str, *, arguments: Sequence[str] = ()) -> ModuleType:
    """Import an optional dependency, or say which extra brings it.

    Args:
        purpose: what needs it; `arguments` are the parts of it that are arguments of a Python function.

    Raises:
        MissingExtraError: `module` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise MissingExtraError(
            f"{purpose} needs {module.split('.')[0]}, which is not installed: pip install 'bitfront[{extra}]'",
            arguments=arguments,
        ) from None
