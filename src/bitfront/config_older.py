"""Files of MASE that were written for another version of its schema, put into the tables that they mean today.

What is understood is said in a note, and an error in such a file still names the line on which the key stands:

* ``[search_space]``, ``[strategy]`` and ``[runner]`` at the top belong below ``[search]``; choices that stand in the
  table itself, or in its ``quantization``, are those of ``seed.default``;
* ``sw_runner = "basic_evaluation"`` with ``num_samples`` beside it is a table of runners;
* ``[default]`` and ``[linear]`` at the top, with a format, are the choices of ``[passes.quantize]``;
* ``accelerator`` may stand in any table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from bitfront import tomlfile
from bitfront.errors import ConfigError

Key = tuple[str, ...]
#: Older path → path today, of tables whose errors get a line.
Moves = list[tuple[Key, Key]]
PTQ = "graph/quantize/mixed_precision_ptq"
#: What an older table of a space calls its kind → its name.
STYLES = {"mixed_precision": PTQ}
#: Lists of types of sites that an older file changes; each holds a table per type.
CLASSES = ("module_classes_to_modify", "function_classes_to_modify", "method_classes_to_modify")
#: Keys that say on which samples candidates are evaluated.
SAMPLES = ("data_loader", "dataloader", "num_samples", "num_batches")
#: Keys of older tables that mean nothing here.
DROPPED = ("training", "runner", "runner_style", "model_parallel", "device", "save_name")
#: Samples in a batch where the file does not say.
BATCH = 128


def understood(document: tomlfile.Document, known: frozenset[str]) -> tuple[tomlfile.Document, list[str]]:
    """The document with everything in the tables that it belongs in today, and notes on what was moved.

    Args:
        document: a parsed file; not changed.
        known: the keys that there are at the top.

    Raises:
        ConfigError: the file is for a part of MASE that is not here; the message says which.
    """
    values, moves, notes = _copied(document.values), Moves(), list[str]()
    try:
        notes += _search_at_the_top(values, moves)
        notes += _runners_by_name(values, moves)
        notes += _formats_at_the_top(values, moves, known)
        notes += _accelerators(values)
    except ConfigError as error:
        error.located(document.name, document.line(error.key))
        raise
    lines = dict(document.lines)
    for old, new in moves:
        for key, line in document.lines.items():
            if key[: len(old)] == old:
                lines.setdefault(new + key[len(old) :], line)
    return replace(document, values=values, lines=lines), [f"{document.name}: {note}" for note in notes]


def _search_at_the_top(values: dict[str, Any], moves: Moves) -> list[str]:
    """Move ``[search_space]``, ``[strategy]`` and ``[runner]`` below ``[search]``, in place. Returns notes."""
    older = [key for key in ("search_space", "strategy", "runner") if isinstance(values.get(key), Mapping)]
    if "search" in values or not {"search_space", "strategy"} & {*older}:
        return []
    space, strategy, runner = (
        values.pop(key) if key in older else {} for key in ("search_space", "strategy", "runner")
    )
    notes = [f"{_listed(f'[{key}]' for key in older)} at the top: read as the tables of [search]"]
    where = ("search_space", "quantization") if isinstance(space.get("quantization"), dict) else ("search_space",)
    table, choices = _space(space)
    if choices:
        moves.append((where, ("search", "search_space", "seed", "default", "config")))
        notes.append(f"the choices of [{'.'.join(where)}] are those of every layer, seed.default")
    moves += [(("search_space",), ("search", "search_space")), (("strategy",), ("search", "strategy"))]
    moves.append((("runner",), ("search", "strategy", "sw_runner", "basic_evaluation")))
    samples = {key: strategy.pop(key) for key in SAMPLES if key in strategy}
    samples |= {key: runner.pop(key) for key in SAMPLES if key in runner}
    runner.pop("name", None)
    dropped = [key for table in (strategy, strategy.get("setup", {}), runner) for key in DROPPED if _drop(table, key)]
    if dropped:
        notes.append(f"{_listed(dropped)} of these tables: no effect here")
    if "metrics" not in strategy and isinstance(strategy.setdefault("hw_runner", {}), dict):
        strategy["metrics"] = {"accuracy": {}, "average_bitwidth": {}}
        strategy["hw_runner"].setdefault("average_bitwidth", {})
        notes.append("no metrics are named: accuracy and average_bitwidth are the objectives")
    evaluation = _evaluation(samples, values)
    strategy.setdefault("sw_runner", {"basic_evaluation": evaluation})
    values["search"] = {"search_space": table, "strategy": {**runner, **strategy}}
    return notes


def _space(space: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """(the table of a space today, whether choices stood in the older table itself). Raises ConfigError."""
    space.pop("runner", None)
    style = space.pop("style", None)
    if style is not None and not (isinstance(style, str) and style in STYLES):
        raise ConfigError(
            f"{style!r} is a space of MASE for its copies of language models; Bitfront searches the layers of any "
            f"model: name = {PTQ!r} with the choices in [search.search_space.seed.default.config]",
            key=("search_space", "style"),
        )
    if style is None and ("seed" in space or "setup" in space):
        return space, False
    inner = space.get("quantization")
    choices = dict(inner if isinstance(inner, dict) else space)
    setup = {"by": choices.pop("by")} if "by" in choices else {}
    config = {key: value if isinstance(value, list) else [value] for key, value in choices.items()}
    return {"name": STYLES.get(str(style), PTQ), "setup": setup, "seed": {"default": {"config": config}}}, True


def _evaluation(samples: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The table of basic_evaluation for older keys; batches become samples."""
    table = dict(samples)
    batches = table.pop("num_batches", None)
    if isinstance(batches, int) and "num_samples" not in table:
        size = values.get("batch_size", BATCH)
        table["num_samples"] = batches * size if isinstance(size, int) else batches
    return table


def _runners_by_name(values: dict[str, Any], moves: Moves) -> list[str]:
    """Make tables of runners that are given as a name, in place. Returns notes."""
    search = values.get("search")
    strategy = search.get("strategy") if isinstance(search, dict) else None
    if not isinstance(strategy, dict):
        return []
    notes, where = [], ("search", "strategy")
    for side in ("sw_runner", "hw_runner"):
        name = strategy.get(side)
        if isinstance(name, str):
            samples = {key: strategy.pop(key) for key in SAMPLES if side == "sw_runner" and key in strategy}
            moves += [((*where, key), (*where, side, name, key)) for key in samples]
            strategy[side] = {name: _evaluation(samples, values)}
            beside = f" with {_listed(samples)}" if samples else ""
            notes.append(f"{side} = {name!r} is read as [search.strategy.{side}.{name}]{beside}")
    return notes


def _formats_at_the_top(values: dict[str, Any], moves: Moves, known: frozenset[str]) -> list[str]:
    """Move ``[default]``, ``[linear]`` ... with formats below ``[passes.quantize]``, in place. Returns notes."""
    default = values.get("default")
    if not isinstance(default, Mapping) or not {"name", "config"} & {*default} or "passes" in values:
        return []
    lists = {key: values.pop(key) for key in CLASSES if isinstance(values.get(key), Mapping)}
    tables = {
        key: values.pop(key)
        for key, value in list(values.items())
        if key not in known and isinstance(value, Mapping) and {"name", "config"} & {*value}
    }
    by = str(values.pop("by", "type"))
    for classes in lists.values():
        tables |= {
            kind: default if table.get("name") == "default" else table
            for kind, table in classes.items()
            if isinstance(table, Mapping)
        }
    if lists:
        tables["default"] = {"name": "NA"}
    moves += [((key,), ("passes", "quantize", key, "config")) for key in tables]
    configs = {key: table if "config" in table else {"config": dict(table)} for key, table in tables.items()}
    values["passes"] = {"quantize": {"by": by, **configs}}
    shown = _listed(f"[{key}]" for key in tables)
    return [f"{shown} at the top: read as the tables of [passes.quantize], by = {by!r}"]


def _accelerators(values: dict[str, Any]) -> list[str]:
    """Move an accelerator that stands in a table to the top, in place. Returns notes."""
    notes = []
    for table, where in _tables(values, ()):
        given = table.pop("accelerator")
        top = values.setdefault("accelerator", given)
        what = "read as the one at the top" if top == given else f"no effect, that at the top is {top!r}"
        notes.append(f"accelerator = {given!r} in [{'.'.join(where)}]: {what}")
    return notes


def _tables(values: dict[str, Any], where: Key) -> Iterator[tuple[dict[str, Any], Key]]:
    """Every table below the top that holds an accelerator, with its path."""
    for key, inner in list(values.items()):
        if isinstance(inner, dict):
            if isinstance(inner.get("accelerator"), str):
                yield inner, (*where, key)
            yield from _tables(inner, (*where, key))


def _drop(table: object, key: str) -> bool:
    """Whether `table` had the key, which is removed."""
    return isinstance(table, dict) and table.pop(key, None) is not None


def _listed(words: Any) -> str:
    return ", ".join(words)


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copied(v) if isinstance(v, Mapping) else v for k, v in values.items()}


#: Kinds of checkpoints of MASE that only MASE or another library can open → what to do.
REFUSED = {
    "mz": "a .mz file is a pickled graph, which only MASE can open. MASE writes the weights beside it: name that "
    "state_dict.pt with load_name, and load_type = 'pt'. Or open the .mz in MASE, and save graph.model.state_dict() "
    "with torch.save",
    "hf": "such a folder is a model of its library: write model = 'hf:FOLDER' and weights = true, and leave load_name "
    "and load_type out",
}


def check_load_type(values: dict[str, Any]) -> list[str]:
    """Refuse a kind of checkpoint that cannot be opened; without a checkpoint it is removed. Returns notes.

    Raises:
        ConfigError: with ``key``, and with what to do.
    """
    given = values.get("load_type")
    if not isinstance(given, str) or given not in REFUSED:
        return []
    if values.get("load_name") in (None, "NA"):
        del values["load_type"]
        return [f"load_type = {given!r} has no effect: there is no load_name"]
    raise ConfigError(f"{given!r} is not possible: {REFUSED[given]}", key=("load_type",))
