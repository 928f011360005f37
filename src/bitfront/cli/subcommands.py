"""All subcommands by their names, and the two for a start: init and list.

A subcommand calls the Python API and prints the result; it holds no logic. What it needs is imported inside it, because
``--help`` must not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated

import typer

from bitfront.cli import printing
from bitfront.cli.completing import ROOMS, TARGETS, members, words
from bitfront.cli.exporting import export
from bitfront.cli.flags import DATA_FLAGS, SEARCH_FLAGS
from bitfront.cli.options import AsJson, Quiet
from bitfront.cli.results import analyze, convert, dashboard, explain, report, transform
from bitfront.cli.searching import compare, plan, search, test, train
from bitfront.errors import ConfigError
from bitfront.files import short_name, write_text
from bitfront.template import DEFAULT_TARGET, target_named


def init(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="A model's name, that of a library (timm:NAME), or package.module:factory.",
            autocompletion=members("models"),
        ),
    ] = "digits-cnn",
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            help="A dataset's name, that of a library (torchvision:NAME), a path, or package.module:factory. Default: "
            "what the model is made for.",
            autocompletion=members("data"),
        ),
    ] = None,
    dataset_path: Annotated[str | None, typer.Option("--dataset-path", help="File or folder of the data.")] = None,
    image_size: Annotated[int | None, typer.Option("--image-size", help=DATA_FLAGS["image_size"][2])] = None,
    target_column: Annotated[str | None, typer.Option("--target-column", help=DATA_FLAGS["target_column"][2])] = None,
    target: Annotated[
        str,
        typer.Option("--target", metavar="HARDWARE", help=f"{', '.join(TARGETS)}.", autocompletion=words(TARGETS)),
    ] = DEFAULT_TARGET,
    task: Annotated[
        str, typer.Option("--task", help="A task's name, or package.module:name.", autocompletion=members("tasks"))
    ] = "classification",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Default: MODEL-DATASET.toml, with -TARGET if one is given; - for stdout.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write a commented TOML file that runs."""
    suffix = target_named(target).suffix
    from bitfront.config import load_config

    named = load_config(None, {"model": model, "dataset": dataset})
    dataset = named.dataset if named.names_dataset else None
    file = output or Path(f"{short_name(model)}-{short_name(named.dataset)}{suffix}.toml")
    if str(file) != "-" and file.exists() and not force:
        raise ConfigError(f"{file} exists; --force overwrites it, --output names another file")
    from bitfront import api

    keys = {"dataset_settings.image_size": image_size, "dataset_settings.target_column": target_column}
    shown = str(file) if str(file) != "-" else "FILE.toml"
    text, notes = api.init(model, dataset, dataset_path, shown, target, task, keys)
    for note in () if quiet else notes:
        printing.print_line(f"note: {note}", stderr=True)
    if str(file) == "-":
        print(text, end="")
        return
    write_text(file, text, ConfigError)
    hint = "" if quiet else f"; now: bitfront search --config {file}"
    printing.print_line(f"wrote {file}{hint}")


def list_(
    what: Annotated[
        str | None,
        typer.Argument(metavar="KIND", help="Which kind; without one, the kinds.", autocompletion=words(ROOMS)),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the members of a kind: its models, formats, metrics and so on.

    Without a kind, list what can be listed.
    """
    from bitfront import listing
    from bitfront.report import tables

    columns, rows = listing.members(what)
    if as_json:
        printing.print_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    tables.Sheet(columns, rows).show(printing.console())


SUBCOMMANDS: dict[str, Callable[..., None]] = {
    "search": search,
    "compare": compare,
    "plan": plan,
    "train": train,
    "test": test,
    "transform": transform,
    "export": export,
    "analyze": analyze,
    "report": report,
    "explain": explain,
    "convert": convert,
    "dashboard": dashboard,
    "init": init,
    "list": list_,
}
CONFIGURED = (search, compare, plan, train, test, transform, analyze)
#: The flags that a subcommand has besides those of the configuration's top level.
BUDGET: dict[Callable[..., None], Collection[str]] = {
    search: SEARCH_FLAGS,
    plan: SEARCH_FLAGS,
    compare: (
        "n_trials",
        "n_jobs",
        "executor",
        "timeout",
        "candidate_timeout",
        "fold_batch_norm",
        "memory_limit",
        "max_size",
    ),
}
