"""The command line: parses, calls the API, prints. No logic.

``verbs.py`` and ``showing.py`` have the verbs, ``flags.py`` makes flags of the configuration's keys, ``completing.py``
knows what the shell completes, ``printing.py`` how results and errors are shown. Results go to standard output,
everything else to standard error. Exit codes: 0 done, 1 the work failed, 2 what was asked cannot be done, 130
interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from bitfront.cli.flags import as_typed, with_flags
from bitfront.cli.printing import complain
from bitfront.cli.verbs import BUDGET, CONFIGURED, VERBS
from bitfront.errors import BitfrontError

#: Where bash, and where zsh and fish say what is being completed.
COMPLETED = ("COMP_WORDS", "_TYPER_COMPLETE_ARGS")


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        print(f"bitfront {version('bitfront')}")
        raise typer.Exit


def _main(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Finds the whole accuracy-against-cost front of a PyTorch model."""


def build(argv: list[str]) -> typer.Typer:
    """The command, as it is needed for `argv`.

    Only the verb that is asked for gets the flags of the configuration: reading the schema takes longer than
    everything else that ``--help`` does. While the shell completes, the words are in the environment.
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
    for name, verb in VERBS.items():
        if verb in CONFIGURED:
            app.command(name=name)(with_flags(verb, BUDGET.get(verb, ())) if name in typed else _described_only(verb))
        else:
            app.command(name=name)(verb)
    return app


def _described_only(verb: Callable[..., None]) -> Callable[..., None]:
    def nothing() -> None:
        raise AssertionError("a verb that is run has its flags")

    nothing.__doc__ = verb.__doc__
    return nothing


def main() -> None:
    """The command ``bitfront``: runs a verb, and turns errors into one message and an exit code."""
    try:
        build(sys.argv[1:])()
    except BitfrontError as error:
        complain(f"error: {as_typed(error)}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        complain("interrupted")
        sys.exit(130)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            complain(f"error: {error.filename or 'a file'}: {error.strerror or error}")
            sys.exit(2)
        # Whoever read our output has had enough (head, less).
        sys.stderr.close()
        sys.exit(0)
