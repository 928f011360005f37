"""Flags for the keys of the configuration, and errors that name flags.

Flags are generated from the schema, so the two cannot disagree. Errors name arguments of the Python API or keys of the
TOML; on the command line they are replaced by the flags.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Collection
from typing import Annotated, Any, get_args, get_origin

import typer

from bitfront.cli.completing import of_key
from bitfront.errors import BitfrontError, ConfigError

#: Keys below the top of the configuration that have a flag too.
SEARCH_FLAGS = {
    "strategy": ("search.strategy.name", str, "The strategy: brute_force, surrogate, evolution, optuna, learned_bits."),
    "sampler": ("search.strategy.setup.sampler", str, "Optuna's sampler: tpe, random, nsgaii, nsgaiii, qmc, gp."),
    "n_trials": ("search.strategy.setup.n_trials", int, "Budget in distinct candidates."),
    "n_jobs": ("search.strategy.setup.n_jobs", int, "Worker processes; the results do not depend on it."),
    "executor": (
        "search.strategy.executor",
        str,
        "What carries out the evaluations, e.g. processes:4, loky:8, dask:tls://host:8786; bitfront list executors.",
    ),
    "batch": ("search.strategy.setup.batch", int, "How many candidates the strategy proposes at a time."),
    "timeout": ("search.strategy.setup.timeout", float, "Seconds after which no new candidate is started."),
    "candidate_timeout": ("search.strategy.setup.candidate_timeout", float, "Seconds that one candidate may take."),
    "memory_limit": ("search.strategy.setup.memory_limit", str, "Memory that the search may take, e.g. '8 GB'."),
    "finetune": ("search.finetune.trials", int, "How many trials of the front are fine-tuned."),
    "fold_batch_norm": ("search.fold_batch_norm", bool, "Search the network without batch norms, folded into layers."),
    "tensorboard": ("search.tensorboard", bool, "Log to tensorboard/ in the run folder."),
    "track": ("search.track", list[str], "Follow the search with a tracker: mlflow, wandb, trackio; can be repeated."),
    "max_size": ("search.strategy.setup.max_size", int, "Brute force refuses larger spaces."),
}


#: Keys in tables of the data, which have a flag of the same name in every subcommand with a configuration.
DATA_FLAGS = {
    "image_size": ("dataset_settings.image_size", int, "Pixels of a side of images."),
    "target_column": ("dataset_settings.target_column", str, "The column of a table that is the target."),
}
#: Further names of flags, which MASE's command has.
OTHER_NAMES = {"load_name": ("--load",), "num_workers": ("--cpu",), "num_devices": ("--gpu",)}
#: Flags of MASE's command that are accepted, and not shown, because they have no effect; a note says so.
ACCEPTED = {
    **dict.fromkeys(("num_workers", "num_devices", "nodes", "num_targets", "max_token_len"), int),
    **dict.fromkeys(("log_level", "report_to", "trainer_precision", "target"), str),
    **dict.fromkeys(("debug", "no_warnings", "disable_dataset_cache", "profile", "pretrained"), bool),
}


def with_flags(subcommand: Callable[..., None], more: Collection[str]) -> Callable[..., None]:
    """`subcommand` with a flag for every key at the configuration's top level, and with `more` of SEARCH_FLAGS.

    The subcommand receives the flags that are given as ``overrides``, dotted key → value.
    """
    from bitfront.config import Config

    keys = Config.model_fields.items()
    flags = [
        (n, n, bool if f.default is False else _flag_type(f.annotation), f.description or "", of_key(n, f.annotation))
        for n, f in keys
    ]
    flags += [(name, *given, None) for name, given in DATA_FLAGS.items()]
    flags += [(name, *SEARCH_FLAGS[name], of_key(name, SEARCH_FLAGS[name][1])) for name in more]
    flags += [(name, name, kind, "", None) for name, kind in ACCEPTED.items()]
    flags = [flag for flag in flags if flag[2] is not None]
    signature = inspect.signature(subcommand, eval_str=True)
    parameters = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != "overrides"
    ]
    for name, _, kind, text, complete in flags:
        option = typer.Option(
            "--" + name.replace("_", "-"),
            *OTHER_NAMES.get(name, ()),
            hidden=name in ACCEPTED,
            help=text[:1].upper() + text[1:],
            show_default=False,
            autocompletion=complete,
        )
        annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))

    def wrapper(**arguments: Any) -> None:
        overrides = {key: arguments.pop(name) for name, key, *_ in flags}
        given = {key: value for key, value in overrides.items() if value not in (None, [])}
        subcommand(**arguments, overrides=given)

    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapper.__doc__ = subcommand.__doc__
    return wrapper


#: Arguments of Python functions whose flags have another name.
RENAMED = {"strategies": "strategy", "metrics": "metric"}


def with_flag_names(error: BitfrontError) -> str:
    """The message of an error as the command shows it: flags in place of arguments and of overridden keys."""
    text = str(error)
    if isinstance(error, ConfigError) and error.key and error.file is None:
        argument, *rest = error.key
        dotted = ".".join(error.key)
        # A flag may give a whole table as one text.
        over = next((name for name in _flag_names() if f"{dotted}.".startswith(f"{name}.")), None)
        if over is not None:
            text = f"{_flag(over)}: {error.message}"
        elif argument in RENAMED or not rest:
            text = f"{' '.join([_flag(argument), *rest])}: {error.message}"
    for argument in getattr(error, "arguments", ()):
        text = text.replace(argument, _flag(argument))
    return text


def _flag(argument: str) -> str:
    """``--project`` of ``project=...``, ``--port 0`` of ``port=0``, ``--n-trials`` of the key it overrides."""
    name, _, value = argument.partition("=")
    flag = "--" + _flag_names().get(name, RENAMED.get(name, name)).replace("_", "-")
    return flag if value in ("", "...", "True") else f"{flag} {ast.literal_eval(value)}"


def _flag_names() -> dict[str, str]:
    """Dotted key below a table → the name of the flag that overrides it."""
    return {path: name for name, (path, *_) in (SEARCH_FLAGS | DATA_FLAGS).items()}


def _flag_type(annotation: Any) -> type | None:
    """The type as which a flag is parsed; None for tables. The schema checks words, with better messages."""
    if get_origin(annotation) is dict:
        return None
    for part in (annotation, *get_args(annotation)):
        if part in (str, int, float):
            return part  # type: ignore[no-any-return]
    return str if all(isinstance(a, str) for a in get_args(annotation)) and get_args(annotation) else None
