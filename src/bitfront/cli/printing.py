"""How the command prints: results to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, TextIO

from rich.console import Console

from bitfront.errors import cut

if TYPE_CHECKING:
    from bitfront.report.live import Live

#: File descriptors of standard output and standard error.
STDOUT, STDERR = 1, 2


@functools.cache
def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


class _Console(Console):
    """Where the reader of standard output has gone (head, less), rich would end the program by itself. Where the user's
    code has closed the stream, nothing is shown, and the work goes on."""

    @property
    def file(self) -> IO[str]:
        stream = super().file
        return _nowhere() if stream.closed else stream

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def console(*, stderr: bool = False) -> Console:
    """A rich console on standard output or standard error; if it is not a terminal, wide enough for any line."""
    writer = _Console(stderr=stderr, highlight=False, soft_wrap=False, markup=False, emoji=False)
    if not writer.is_terminal:
        writer.width = 10_000  # a pipe has no width, and a folded line would break the program that reads it
    return writer


def events(quiet: bool) -> Live:
    """Progress of the work, shown on standard error."""
    from bitfront.report.live import Live

    return Live(console(stderr=True), quiet=quiet)


#: Where JSON goes, while everything else that is printed goes to standard error; empty without ``--json``.
_FOR_JSON: list[TextIO] = []
#: What standard output was then.
_BEFORE: list[TextIO] = []


def json_alone(wanted: bool) -> bool:
    """The callback of ``--json``: from here on, whatever else is printed to standard output goes to standard error.

    A model may print what it likes, also from C and in worker processes: the result is one JSON document all the same.
    """
    if wanted and not _FOR_JSON:
        sys.stdout.flush()
        _BEFORE.append(sys.stdout)
        _FOR_JSON.append(_moved_aside(sys.stdout))
        sys.stdout = sys.stderr
    return wanted


def _moved_aside(out: TextIO) -> TextIO:
    """A file that writes where `out` does, after the descriptor 1 was pointed to standard error; `out` itself where it
    has another descriptor, or none."""
    try:
        if out.fileno() != STDOUT:
            return out
        kept = os.dup(STDOUT)
    except (OSError, ValueError):  # closed, or no file
        return out
    try:
        os.dup2(STDERR, STDOUT)
    except OSError:  # there is no standard error
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
    return os.fdopen(kept, "w", encoding=out.encoding, errors=out.errors)


def end_of_json() -> None:
    """The command is over, and its JSON is written. What is printed still later stays apart from it."""
    if _FOR_JSON:
        file, before = _FOR_JSON.pop(), _BEFORE.pop()
        if file is before:
            sys.stdout = before
        else:
            with contextlib.suppress(OSError):  # its reader has gone, or the user's code has closed it
                file.close()


def print_json(document: object) -> None:
    """Prints a result for programs. JSON has no NaN, so what was not measured is null."""
    finite = json.loads(json.dumps(document, default=str), parse_constant=lambda _: None)
    out = _FOR_JSON[0] if _FOR_JSON else sys.stdout
    print(json.dumps(finite, indent=2, ensure_ascii=not is_unicode(out)), file=out, flush=True)


def is_unicode(stream: TextIO) -> bool:
    """Whether any text can be written there."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "") in ("utf8", "utf16", "utf32")


def print_line(text: str, *, stderr: bool = False) -> None:
    """Prints one line as it is, however long. Paths, names and errors in it may look like markup, and are none."""
    from rich.text import Text

    console(stderr=stderr).print(Text(text), soft_wrap=True)


def print_error(text: str) -> None:
    """Prints an error on standard error; what stands before the first colon is red."""
    from rich.text import Text

    head, colon, rest = cut(text).partition(":")
    console(stderr=True).print(Text.assemble((head + colon, "bold red"), rest), soft_wrap=True)
