"""Options and arguments that several subcommands share, and what they mean: a configuration, a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitfront.cli.completing import runs
from bitfront.cli.printing import json_alone
from bitfront.errors import ConfigError

if TYPE_CHECKING:
    from bitfront.config import Config

ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="The TOML file. Flags override it.")
]
RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, or the name of a run below runs.", autocompletion=runs)
]
RunOption = Annotated[Path | None, typer.Option("--run", metavar="RUN", help="A run folder.", autocompletion=runs)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.", callback=json_alone)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]


def load_configuration(file: Path | None, overrides: dict[str, Any]) -> Config:
    """The configuration in `file`; without a file the one that ``bitfront init`` writes for the model and dataset.

    Args:
        overrides: dotted key → value, from the flags.

    Raises:
        ConfigError: a key or value is wrong; the message says where.
    """
    from bitfront import config, tomlfile

    if file is not None:
        return config.load_config(file, overrides)  # needs no torch, so a mistake in the file is reported at once
    from bitfront import api

    top = {key: value for key, value in overrides.items() if not key.startswith("search.")}
    named = config.load_config(None, top)
    dataset = named.dataset if named.names_dataset or ":" not in named.model else None
    text, _ = api.init(named.model, dataset, named.dataset_path, keys=top)
    return config.from_document(tomlfile.parse(text, "the default configuration"), overrides)


def refuse_flags(overrides: dict[str, Any]) -> None:
    """Raises ConfigError if flags would override the configuration of a run folder."""
    if set(overrides) - {"project_dir"}:
        given = ", ".join("--" + key.replace("_", "-") for key in overrides)
        raise ConfigError(f"--run takes its configuration from the run folder; leave out {given}")


def run_folder(run: Path, project_dir: str = "runs") -> Path:
    """The folder of a run, given as a path or as the name of a run below the project folder.

    If neither exists and `run` is a single word, the folder below the project folder, so that messages name it.
    """
    below_project = Path(project_dir) / run
    is_name = below_project.exists() or (len(run.parts) == 1 and below_project.parent.is_dir())
    return below_project if not run.exists() and is_name else run
