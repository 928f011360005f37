"""Writes docs/configuration.md from the schema, so that the two cannot disagree. A test compares them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from bitfront import config
from bitfront.formats import FORMATS
from bitfront.metrics import RUNNERS
from bitfront.strategies import STRATEGIES

TARGET = Path(__file__).parent / "configuration.md"
HEAD = """\
# The configuration

*Made from the schema by `docs/generate.py`; do not edit.*

One TOML file describes training, search and transformation. Every key has a default; an unknown key or a wrong value is
an error that names the line. `"NA"` is none. Keys at the top have a flag of the same name (`max_epochs` →
`--max-epochs`), and so have `strategy`, `sampler`, `n_trials`, `n_jobs`, `timeout`, `max_size`, `tensorboard` and, for
`search.finetune.trials`, `finetune`; flags override the file. `bitfront init` writes a commented file that runs;
`bitfront plan FILE` shows what a file means without doing it.
The configuration as it took effect is saved in the run folder.
"""
TABLES = [
    ("The top", "", config.Config),
    ("`[search]`", "Beside the tables below.\n\n", config.SearchTable),
    ("`[search.search_space]`", "", config.SearchSpace),
    ("`[search.search_space.setup]`", "", config.SpaceSetup),
    ("`[search.search_space.seed.KEY]`", "", config.ChoicesTable),
    (
        "`[search.search_space.quantize]` and `[search.search_space.widths]`",
        'The two parts of `name = "joint"`: `mixed_precision_ptq` and `channel_size`, each with its own setup and '
        "seed.\n\n",
        config.SpacePart,
    ),
    ("`[search.strategy]`", "", config.StrategyTable),
    (
        "`[search.strategy.setup]`",
        "What every search has; beside it stand [the settings of the strategy](#strategies).\n\n",
        config.StrategySetup,
    ),
    ("`[search.strategy.metrics.METRIC]`", "", config.MetricSetup),
    (
        "`[search.calibration]`",
        "See [number formats](formats.md#calibration).\n\n",
        config.CalibrationTable,
    ),
    ("`[search.finetune]`", "See [training the winners on](howto/finetune.md).\n\n", config.FinetuneTable),
]
SEED = """\
### What may be chosen

`KEY` is `default`, or what `setup.by` says: a site's name (`seq_blocks_2`, or the module path `seq_blocks.2`), a type
of site (`linear`, `conv1d`, `conv2d`, `relu`, `add`, `sub`, `mul`, `matmul`, `bmm`), or a regular expression that
matches the whole name. With `by = "name"` a key that is a type is allowed, and named as unused; so is a site's name
with `by = "type"`. Sites that no key names get `default`; without one they stay in float.

In `config`, `name` lists number formats (`"NA"`: stay in float) and `<operand>_<parameter>` their parameters, for the
operands `data_in`, `weight` and `bias`. An operand without a `width` stays in float. Every value is a list of choices;
the choices of an operand are all combinations that are valid, so that `width` never meets a `frac_width` larger than
itself. A list of tables is a choice between whole settings:

```toml
[search.search_space.seed.linear.config]
name = ["integer", "NA"]
data_in = [{width = 8, frac_width = 4}, {width = 4, frac_width = 2}]
weight_width = [2, 4, 8]
weight_frac_width = ["NA", "auto"]
bias_width = [8]
```

`bypass = true` leaves a site in float, as `name = "NA"` does. `[passes.quantize]` takes the same tables with one value
each; `bitfront transform --config FILE` applies it.

### What widths may be chosen

With `name = "channel_size"` (`graph/quantize/channel_size_modifier`) `KEY` names layers: what has weights and output
channels. In `config`:

| key | allowed | default | meaning |
| --- | --- | --- | --- |
| `channel_multiplier` | numbers above 0 | `1` | by what the layer's output width is multiplied |
| `name` | `"output_only"`, `"both"`, `"input_only"`, `"NA"` | `"NA"` | the layer keeps its width with the last two |
| `divisor` | one whole number ≥ 1 | `1` | a new width is rounded to the nearest multiple of it |
| `parent_block_name` | a node | | what makes the layer's input. Not needed; another one than in the model is an error |

Input widths always follow from the model, through whatever lies between, and so do layers that share their channels, as
the two sides of an addition: they take the same choices, or one of them takes none. Multipliers that come to the same
width are one candidate, and the multiplier of an `input_only` layer has no effect. The model's output keeps its width:
to multiply it by its name is an error, by `default`, a type or a pattern it is left out, with a note.

A wider layer begins with what it computed before, a narrower one with its channels of the largest filters. Without
[`basic_train`](#sw_runnerbasic_train) candidates are evaluated like that, which says little about what they can learn.
"""
#: What there is to say of a runner beside its metrics and settings.
MORE = {
    "basic_train": """\
That it is there is what asks for it: each candidate begins with the float model's weights, in its own widths, and is
trained with its formats in place and straight-through gradients. It is evaluated with the weights after the last epoch,
in the formats that it was trained in, in eval mode (also with `eval_mode = false`), on another split than the
training's. Its result depends on no other candidate, nor on `n_jobs`. `bias_correction` and `batch_norm` of the
calibration have no place beside it.

Formats learn their scales before that, from the network as it is then. One that was just cut to other widths is hardly
a network; with `float_epochs` it is trained in float first, once for all candidates of its widths.

With `halving = {rungs = [1], keep = 0.5, cohort = 16}` so many candidates at a time are compared after each of the
epochs in `rungs`, and those that others dominate, in accuracy and in the costs among the objectives, stop there. They
are trials like any other, with a smaller `trained_epochs`. How long a candidate is trained then depends on its cohort,
which is cut from what is proposed: still on neither `n_jobs` nor interruptions. The others' results do not change.

"""
}


def main() -> None:
    """Write the file, or with ``--check`` say whether it is up to date."""
    text = page()
    if "--check" in sys.argv:
        sys.exit(0 if TARGET.read_text(encoding="utf-8") == text else f"{TARGET} is out of date: make docs")
    TARGET.write_text(text, encoding="utf-8")


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, text, table in TABLES:
        parts.append(f"## {title}\n\n{text}{_table(table.model_fields)}")
        if table is config.ChoicesTable:
            parts.append(SEED)
            parts.append(_formats())
    parts.append(_runners())
    parts.append(_strategies())
    parts.append(
        "## Accepted without effect\n\nKeys of the system that these files come from, which mean nothing here; each is "
        "named in a note: " + ", ".join(f"`{k}`" for k in sorted(config.WITHOUT_EFFECT)) + ".\n"
    )
    return "\n".join(parts)


def _formats() -> str:
    parts = ["### Parameters of the formats\n"]
    for name, meaning in FORMATS.described():
        rows = [
            (f"`{p}`", v.allowed(), "required" if v.default is ... else f"`{_written(v.default)}`", v.meaning)
            for p, v in FORMATS.get(name).parameters.items()
        ]
        parts.append(f"`{name}`: {meaning}\n\n" + _rows(["parameter", "allowed", "default", "meaning"], rows))
    return "\n".join(parts)


def _runners() -> str:
    parts = [
        "## Metric runners: `[search.strategy.sw_runner.NAME]` and `hw_runner`\n\n"
        "A runner may stand under either table; its metrics are reported as software or hardware metrics accordingly.\n"
    ]
    for name in RUNNERS.names():
        runner = RUNNERS.get(name)
        metrics = "; ".join(
            f"`{m.name}`{f' ({m.unit})' if m.unit else ''}, {m.kind}: {m.meaning}" for m in runner.produces
        )
        settings = MORE.get(name, "")
        settings += _table(runner.Settings.model_fields) if runner.Settings.model_fields else "No settings.\n"
        parts.append(f"### `{runner.side}.{name}`\n\n{metrics}.\n\n{settings}")
    return "\n".join(parts)


def _strategies() -> str:
    parts = [
        "## Strategies\n\n`name` in `[search.strategy]`; settings stand in `[search.strategy.setup]`. "
        '`optuna:tpe` is strategy `optuna` with `sampler = "tpe"`. A setting of another strategy has no effect, and '
        "is named in a note.\n"
    ]
    for name, meaning in STRATEGIES.described():
        strategy = STRATEGIES.get(name)
        fields = strategy.Settings.model_fields
        parts.append(f"### `{name}`\n\n{meaning}\n\n{_table(fields) if fields else 'No settings.' + chr(10)}")
        if strategy.variants:
            parts.append(
                _rows([f"`{strategy.variant}`", "what it is"], [(f"`{n}`", m) for n, m in strategy.variants.items()])
            )
    return "\n".join(parts)


def _table(fields: dict[str, FieldInfo]) -> str:
    rows = []
    for name, field in fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, config.Table):
            continue
        if any(isinstance(a, type) and issubclass(a, config.Table) for a in get_args(field.annotation)):
            default = ""
        else:
            default = "required" if field.is_required() else f"`{_written(field.default)}`"
        rows.append((f"`{name}`", _type(field), default, field.description or ""))
    return _rows(["key", "type", "default", "meaning"], rows)


def _type(field: FieldInfo) -> str:
    annotation = field.annotation
    words = [a for part in (annotation, *get_args(annotation)) for a in get_args(part) if isinstance(a, str)]
    words = list(dict.fromkeys(words or [a for a in get_args(annotation) if isinstance(a, str)]))
    if words:
        return ", ".join(f'`"{w}"`' for w in words)
    if get_origin(annotation) is dict or any(
        isinstance(a, type) and issubclass(a, config.Table) for a in get_args(annotation)
    ):
        return "table"
    plain = {str: "text", int: "whole number", float: "number", bool: "true, false"}
    kind = next(plain[t] for t in (annotation, *get_args(annotation)) if t in plain)
    limits = []
    for limit in field.metadata:
        for attribute, symbol in (("ge", "≥"), ("gt", ">"), ("le", "≤")):
            if getattr(limit, attribute, None) is not None and getattr(limit, attribute) < 2**60:
                limits.append(f"{symbol} {getattr(limit, attribute)}")
    return " ".join([kind, *limits])


def _written(value: Any) -> str:
    if value is None:
        return "NA"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _rows(columns: list[str], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, ["---"] * len(columns), *map(list, rows)]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
