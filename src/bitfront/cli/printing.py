"""How the command prints: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from bitfront.report.live import Live


def console(*, stderr: bool = False) -> Console:
    """Standard output or standard error, as rich writes to it."""
    made = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not made.is_terminal:
        made.width = 10_000  # a pipe has no width; folding would only break what reads it
    return made


def events(quiet: bool) -> Live:
    """What a verb tells while it works, shown on standard error."""
    from bitfront.report.live import Live

    return Live(console(stderr=True), quiet=quiet)


def print_json(document: object) -> None:
    """A result for machines, the only thing on standard output."""
    # JSON has no NaN: what could not be measured is null.
    finite = json.loads(json.dumps(document, default=str), parse_constant=lambda _: None)
    print(json.dumps(finite, indent=2, ensure_ascii=False))


def complain(text: str) -> None:
    """An error, on standard error."""
    from rich.markup import escape

    head, colon, rest = text.partition(":")
    console(stderr=True).print(f"[bold red]{head}{colon}[/bold red]{escape(rest)}", soft_wrap=True)
