"""A flag for every key of the configuration, made from its schema, so that the two cannot disagree; and errors in terms
of flags, which they name as arguments of the Python API."""

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
    "strategy": ("search.strategy.name", str, "The strategy: brute_force, evolution, optuna."),
    "sampler": ("search.strategy.setup.sampler", str, "Optuna's sampler: tpe, random, nsgaii, nsgaiii, qmc, gp."),
    "n_trials": ("search.strategy.setup.n_trials", int, "Budget in distinct candidates."),
    "n_jobs": ("search.strategy.setup.n_jobs", int, "Worker processes; the numbers are the same for any."),
    "timeout": ("search.strategy.setup.timeout", float, "Seconds after which no further candidates are started."),
    "finetune": ("search.finetune.trials", int, "So many trials of the front are trained on, quantized."),
    "tensorboard": ("search.tensorboard", bool, "Log to tensorboard/ in the run folder."),
    "max_size": ("search.strategy.setup.max_size", int, "Brute force refuses larger spaces."),
}


def with_flags(verb: Callable[..., None], more: Collection[str]) -> Callable[..., None]:
    """`verb` with a flag for every key of the configuration's top level, and `more` of SEARCH_FLAGS.

    The verb receives them as ``overrides``, dotted key → value, without those not given.
    """
    from bitfront.config import Config

    keys = Config.model_fields.items()
    flags = [(n, n, _plain(f.annotation), f.description or "", of_key(n, f.annotation)) for n, f in keys]
    flags += [(name, *SEARCH_FLAGS[name], of_key(name, SEARCH_FLAGS[name][1])) for name in more]
    flags = [flag for flag in flags if flag[2] is not None]
    parameters = [p for p in inspect.signature(verb, eval_str=True).parameters.values() if p.name != "overrides"]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    for name, _, kind, text, complete in flags:
        option = typer.Option(
            "--" + name.replace("_", "-"),
            help=text[:1].upper() + text[1:],
            show_default=False,
            autocompletion=complete,
        )
        annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))

    def wrapper(**given: Any) -> None:
        overrides = {key: given.pop(name) for name, key, *_ in flags}
        verb(**given, overrides={k: v for k, v in overrides.items() if v is not None})

    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapper.__doc__ = verb.__doc__
    return wrapper


#: Arguments of Python functions whose flags are spelled otherwise.
OTHERWISE = {"strategies": "strategy", "metrics": "metric"}


def as_typed(error: BitfrontError) -> str:
    """The message of an error as the command shows it: flags take the places of arguments and of overridden keys."""
    text = str(error)
    if isinstance(error, ConfigError) and error.key and error.file is None:
        argument, *rest = error.key
        dotted = ".".join(error.key)
        if dotted in _paths():
            text = f"{_flag(dotted)}: {error.message}"
        elif argument in OTHERWISE or not rest:
            text = f"{' '.join([_flag(argument), *rest])}: {error.message}"
    for argument in getattr(error, "arguments", ()):
        text = text.replace(argument, _flag(argument))
    return text


def _flag(argument: str) -> str:
    """``--project`` of ``project=...``, ``--port 0`` of ``port=0``, ``--n-trials`` of the key it overrides."""
    name, _, value = argument.partition("=")
    flag = "--" + _paths().get(name, OTHERWISE.get(name, name)).replace("_", "-")
    return flag if value in ("", "...", "True") else f"{flag} {ast.literal_eval(value)}"


def _paths() -> dict[str, str]:
    """Dotted key → the name of the flag that overrides it, where that is below a table."""
    return {path: name for name, (path, *_) in SEARCH_FLAGS.items()}


def _plain(annotation: Any) -> type | None:
    """The type a flag of that field parses; None for tables. Words are checked by the schema, for its messages."""
    if get_origin(annotation) is dict:
        return None
    for part in (annotation, *get_args(annotation)):
        if part in (str, int, float):
            return part  # type: ignore[no-any-return]
    return str if all(isinstance(a, str) for a in get_args(annotation)) and get_args(annotation) else None
