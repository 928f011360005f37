"""The subcommand export: a trial as files for hardware or another runtime."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from bitfront.cli import printing
from bitfront.cli.completing import members
from bitfront.cli.options import AsJson, Quiet, RunArgument, run_folder
from bitfront.errors import ConfigError
from bitfront.tomlfile import value_of


def export(
    run: RunArgument,
    trial: Annotated[int, typer.Option("--trial", metavar="N", help="The trial to export.")],
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="TARGET", help="See `bitfront list targets`.", autocompletion=members("exporters.targets")
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Default: exported/trial-N-TARGET in the run folder."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", metavar="N", min=1, help="Samples that are compared.")] = 1000,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not run the files; their folder is called ...-unchecked.")
    ] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the target; can be repeated.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a trial for hardware, run the files, and compare every number.

    The files are kept only if they compute what was searched, to the bit.
    """
    import bitfront as bf

    with printing.events(quiet) as events:
        result = bf.export(
            run_folder(run),
            trial,
            to=to,
            output=output,
            check=not no_check,
            samples=samples,
            settings=dict(map(_setting, settings or [])),
            events=events,
        )
    if as_json:
        printing.print_json({**asdict(result), "folder": str(result.folder)})
        return
    printing.print_line(result.message)
    if result.accumulator_bits is not None:
        printing.print_line(f"widest sum: {result.accumulator_bits} bits")
    for name, value in result.figures.items():
        printing.print_line(f"{name}: {value:,.0f}" if value == int(value) else f"{name}: {value:,.4g}")


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text}: give KEY=VALUE")
    return key.strip(), value_of(value.strip())
