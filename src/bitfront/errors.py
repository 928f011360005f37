"""Every error a user can meet, in one tree.

    BitfrontError
    ├── UserError                    the request cannot be fulfilled; the command exits with 2, without a traceback
    │   ├── ConfigError              a key or value of the configuration is wrong: file, key, line, what is allowed
    │   │   └── UnknownNameError     a name that is not registered: model, format, metric, sampler ...
    │   ├── DataError                a dataset is missing, or cannot be read or split
    │   │   └── DownloadError        a download failed; says which file to put where instead
    │   ├── CheckpointError          a checkpoint does not fit the model, or cannot be read safely
    │   ├── CaptureError             a model cannot be captured at all
    │   ├── ExportError              a model, or a number format, cannot be written for another runtime; names the node
    │   ├── RunError                 a run folder is missing, of another configuration, or lacks the requested trial
    │   └── MissingExtraError        an optional dependency is needed; says what to install
    └── EvaluationError              a candidate, or every candidate, could not be evaluated; the command exits with 1

A message says what is wrong, where, what is allowed and what to do. It names arguments of Python functions and keys of
the TOML; the command replaces them by its flags (``cli.flags.with_flag_names``). Messages are tested.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType

#: Of the text of a foreign error, so many characters are shown.
_SHOWN = 300


class BitfrontError(Exception):
    """Base class of every error that Bitfront raises on purpose."""

    exit_code = 1


class UserError(BitfrontError):
    """The user's request cannot be fulfilled.

    Args:
        arguments: the parts of the message that are arguments of Python functions, word for word: ``restart=True``,
            ``project=...``, or dotted keys that a flag can override.
    """

    exit_code = 2

    def __init__(self, message: str, *, arguments: Sequence[str] = ()) -> None:
        self.arguments = tuple(arguments)
        super().__init__(message)


class ConfigError(UserError):
    """A key or a value of the configuration is wrong.

    Args:
        message: what is wrong, what is allowed and what to do.
        key: the path of the wrong key, e.g. ``("search", "strategy", "name")``, or the argument of a Python function,
            e.g. ``("seeds",)``.
        file: the TOML file; where only the value is known, :meth:`located` adds it later.
        line: the line in that file; added like `file`.
        arguments: as for :class:`UserError`.
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
        """This error, after adding the file and the line that it is about."""
        self.file, self.line = file, line
        return self


class UnknownNameError(ConfigError):
    """A name under which nothing is registered."""


class DataError(UserError):
    """A dataset is missing, or cannot be read or split."""


class DownloadError(DataError):
    """A download failed or did not match its checksum."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, or does not fit the model."""


class CaptureError(UserError):
    """A model cannot be captured as a graph of sites."""


class ExportError(UserError):
    """A model, or a number format in it, cannot be written for another runtime. The message names the node."""


class RunError(UserError):
    """A run folder is missing, belongs to another configuration, or lacks the requested trial."""


class MissingExtraError(UserError):
    """An optional dependency is not installed."""


class EvaluationError(BitfrontError):
    """A candidate, or every candidate, could not be evaluated."""


@contextlib.contextmanager
def parsing(kind: type[UserError], what: str, remedy: str) -> Iterator[None]:
    """Where foreign bytes become values: whatever a parser raises in this block comes out as an error of Bitfront.

    A parser of somebody else's format meets damaged and hostile files, and may then raise anything, running out of
    memory or of stack included. Errors of Bitfront and what ends a process pass as they are.

    Args:
        kind: the error that fits this sort of file.
        what: the beginning of the message: the file, and what could not be done with it.
        remedy: the end of the message: what to do.

    Raises:
        UserError: of that kind.
    """
    try:
        yield
    except BitfrontError:
        raise
    except Exception as error:
        raise kind(f"{what}: {cause(error)}; {remedy}") from error


def cause(error: Exception) -> str:
    """What a foreign error says, in one short line."""
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    shown = first if len(first) <= _SHOWN else f"{first[:_SHOWN]}..."
    if isinstance(error, OSError | ValueError) and shown:
        return shown
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


#: Bytes, in UTF-8, of the longest text of an error that is kept or shown.
LONGEST_TEXT = 10_000


def cut(text: str) -> str:
    """`text` without what a terminal or a database would choke on, cut at ``LONGEST_TEXT``."""
    data = text[:LONGEST_TEXT].encode("utf-8", "replace")[:LONGEST_TEXT].decode("utf-8", "ignore")
    kept = "".join(c if c.isprintable() or c == "\n" else " " for c in data)
    return kept if len(data) == len(text) else f"{kept} ... (cut at {LONGEST_TEXT // 1000} kB)"


def described(error: BaseException) -> str:
    """One line about an error of somebody's code, whatever it is."""
    try:
        text = getattr(error, "what", None) or f"{type(error).__name__}: {error}"
    except Exception as other:
        text = f"{type(error).__name__}, whose text cannot be read: {type(other).__name__}"
    return cut(text.strip().split("\n")[0])


def nearest(name: str, allowed: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the closest of `allowed`, or an empty string where none is close."""
    by_lower_case = {word.lower(): word for word in allowed}
    matches = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.6)
    return f" Did you mean {by_lower_case[matches[0]]!r}?" if matches else ""


def one_of(allowed: Iterable[object]) -> str:
    """``"allowed: a, b, c"``, for the end of a message."""
    return "allowed: " + ", ".join(str(item) for item in allowed)


def first_few(names: Iterable[str], most: int) -> str:
    """``"a, b and 3 more"``: the first `most` of some names, and how many others there are."""
    names = list(names)
    others = len(names) - most
    return ", ".join(names[:most]) + (f" and {others:,} more" if others > 0 else "")


def require(module: str, extra: str, purpose: str, *, arguments: Sequence[str] = ()) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: the module to import, e.g. ``"sklearn.datasets"``.
        extra: the extra of Bitfront that installs it.
        purpose: what needs it; the beginning of the message.
        arguments: the parts of `purpose` that are arguments of Python functions, word for word.

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
