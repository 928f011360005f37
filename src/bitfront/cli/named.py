"""The words after a subcommand: a configuration file, or a model and a dataset as MASE's command takes them.

``bitfront search FILE``, ``bitfront search MODEL DATASET`` and ``bitfront search MODEL DATASET --config FILE`` are all
possible. What exists decides: a word that is a file is the configuration, and the others are names. A note says how
names were read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bitfront.cli import printing
from bitfront.errors import ConfigError, nearest
from bitfront.registry import canonical, names_in_source

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FILE] [MODEL [DATASET]]",
        help="The same as --config; a model and a dataset are the same as --model and --dataset.",
        show_default=False,
    ),
]
#: What the names mean, in their order.
KEYS = ("model", "dataset")


def read_words(
    words: list[str] | None, option: Path | None, overrides: dict[str, Any], *, quiet: bool = False
) -> tuple[Path | None, dict[str, Any]]:
    """(the configuration file, None if there is none; the overrides, with the model and the dataset among the words).

    Args:
        words: what follows the subcommand.
        option: the value of ``--config``.
        overrides: dotted key → value, from the flags.
        quiet: whether no note is printed.

    Raises:
        ConfigError: there are two files, a model or dataset is given twice, or a word is neither a file nor a model.
    """
    files = [word for word in words or () if _is_file(word)]
    names = [word for word in words or () if word not in files]
    if len(files) > 1 or (files and option is not None):
        other = f"--config {option}" if option is not None else files[1]
        raise ConfigError(f"there are two configuration files, {files[0]} and {other}; give one")
    if len(names) > len(KEYS):
        raise ConfigError(f"{' '.join(names)}: too many words; allowed: a configuration file, a model and a dataset")
    given = dict(zip(KEYS, names, strict=False))
    for key, name in given.items():
        if key in overrides:
            raise ConfigError(f"there are two {key}s, {name} and --{key} {overrides[key]}; give one")
    if names:
        _check_model(names[0])
    if not quiet:
        _say(files, given)
    return (Path(files[0]) if files else option), {**overrides, **given}


def _is_file(word: str) -> bool:
    """Whether a word means a file: it is one, or it cannot be a name."""
    return Path(word).is_file() or word.endswith(".toml")


def _is_model(word: str) -> bool:
    """Whether there is a model of that name; those of Bitfront are known without an import of torch."""
    if ":" in word or _is_known_name(word):
        return True
    from bitfront.models import MODELS

    return word in MODELS


def _check_model(word: str) -> None:
    if not _is_model(word):
        from bitfront.models import MODELS

        near = nearest(word, MODELS.names())
        raise ConfigError(
            f"{word}: there is no such file, and no model of that name. Give a configuration file, or a model and a "
            f"dataset; a model of a library has a prefix, such as torchvision:resnet18.{near}"
        )


def _say(files: list[str], given: dict[str, str]) -> None:
    """Say how words were read, where they could have been read otherwise."""
    if given:
        read = ", ".join(f"{key} {name}" for key, name in given.items())
        printing.print_line(f"note: {read}, from the words of the command", stderr=True)
    for file in files:
        if not file.endswith(".toml") and _is_known_name(file):
            note = f"note: {file} is a file here, and read as the configuration; for the model: --model {file}"
            printing.print_line(note, stderr=True)


def _is_known_name(word: str) -> bool:
    """Whether it is the name of a model of Bitfront."""
    return canonical(word) in map(canonical, names_in_source("bitfront.models"))
