"""How the command prints: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, TextIO

from rich.console import Console

if TYPE_CHECKING:
    from bitfront.report.live import Live


def console(*, stderr: bool = False) -> Console:
    """A rich console on standard output or standard error; if it is not a terminal, wide enough for any line."""
    writer = Console(stderr=stderr, highlight=False, soft_wrap=False, markup=False, emoji=False)
    if not writer.is_terminal:
        writer.width = 10_000  # a pipe has no width, and a folded line would break the program that reads it
    return writer


def events(quiet: bool) -> Live:
    """Progress of the work, shown on standard error."""
    from bitfront.report.live import Live

    return Live(console(stderr=True), quiet=quiet)


def print_json(document: object) -> None:
    """Prints a result for programs. JSON has no NaN, so what was not measured is null."""
    finite = json.loads(json.dumps(document, default=str), parse_constant=lambda _: None)
    print(json.dumps(finite, indent=2, ensure_ascii=not is_unicode(sys.stdout)))


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

    head, colon, rest = text.partition(":")
    console(stderr=True).print(Text.assemble((head + colon, "bold red"), rest), soft_wrap=True)
