"""The command line: parses, calls the Python API, prints. No logic.

``subcommands.py`` lists the subcommands, ``searching.py`` and ``results.py`` hold most of them, ``options.py`` what
several of them share. ``flags.py`` makes flags from the configuration's keys, ``completing.py`` completes words for the
shell, ``printing.py`` shows results and errors. Results go to standard output, everything else to standard error. Exit
codes: 0 success, 1 the work failed, 2 the request is wrong, 130 interrupted.
"""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from bitfront.cli import printing
from bitfront.cli.flags import with_flag_names, with_flags
from bitfront.cli.printing import end_of_json, print_error
from bitfront.cli.subcommands import BUDGET, CONFIGURED, SUBCOMMANDS
from bitfront.errors import BitfrontError
from bitfront.interrupts import contained

#: Environment variables in which bash, and zsh and fish, give the line that is being completed.
COMPLETED = ("COMP_WORDS", "_TYPER_COMPLETE_ARGS")


def _show_version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        print(f"bitfront {version('bitfront')}")
        raise typer.Exit


def _main(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Finds the whole accuracy-against-cost front of a PyTorch model."""


def application(argv: list[str]) -> typer.Typer:
    """The command with all its subcommands, for the words `argv` that follow its name.

    Only the subcommand named in `argv` gets the flags of the configuration, because reading the schema takes longer
    than everything else that ``--help`` does. While the shell completes a line, its words are in the environment.
    """
    typed = {*argv, *" ".join(os.environ.get(name, "") for name in COMPLETED).split()}
    app = typer.Typer(
        name="bitfront",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_main)
    for name, function in SUBCOMMANDS.items():
        if function not in CONFIGURED:
            app.command(name=name)(_contained(function))
        elif name in typed:
            app.command(name=name)(with_flags(_contained(function), BUDGET.get(function, ())))
        else:
            app.command(name=name)(_description_only(function))
    return app


def _contained(function: Callable[..., None]) -> Callable[..., None]:
    """A subcommand that does not end with the exit code of code that it loads, and says that it was interrupted."""

    @functools.wraps(function)
    def subcommand(*arguments: Any, **options: Any) -> None:
        try:
            with contained():
                function(*arguments, **options)
        except KeyboardInterrupt:  # typer would end with the same code, without a word
            print_error("interrupted")
            raise typer.Exit(130) from None

    return subcommand


def _description_only(function: Callable[..., None]) -> Callable[..., None]:
    """A subcommand without its flags, for the list that ``--help`` shows."""

    def placeholder() -> None:
        raise AssertionError("a subcommand that runs has its flags")

    placeholder.__doc__ = function.__doc__
    return placeholder


def main() -> None:
    """The command ``bitfront``: runs a subcommand, and turns an error into one message and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        # In a locale that has no arrows or umlauts, a result with one is shown with a ? and not lost.
        if isinstance(stream, io.TextIOWrapper) and not printing.is_unicode(stream):
            stream.reconfigure(errors="replace")
    try:
        application(sys.argv[1:])()
    except BitfrontError as error:
        print_error(f"error: {with_flag_names(error)}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print_error("interrupted")
        sys.exit(130)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print_error(f"error: {error.filename or 'a file'}: {error.strerror or error}")
            sys.exit(2)
        # The reader has closed the pipe (head, less).
        sys.stderr.close()
        sys.exit(0)
    finally:
        end_of_json()
