"""Writes docs/configuration.md from the schema, docs/operations.md from the records of operations, and
docs/howto/notebook.md from examples/notebook.ipynb, so that pages and code cannot disagree. A test compares them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

import mase
from pydantic.fields import FieldInfo

from bitfront import config, passes
from bitfront.data import DATASETS
from bitfront.data import sources as data_sources
from bitfront.formats import FORMATS
from bitfront.metrics import RUNNERS
from bitfront.models import sources as model_sources
from bitfront.operations import OPERATIONS
from bitfront.operations.base import Operation
from bitfront.operations.lookup import sites
from bitfront.strategies import STRATEGIES
from bitfront.tasks import TASKS
from bitfront.trackers import TRACKERS

FOLDER = Path(__file__).parent
NOTEBOOK = FOLDER.parent / "examples" / "notebook.ipynb"
NOTEBOOK_HEAD = (
    "*Generated from [`examples/notebook.ipynb`](../../examples/notebook.ipynb) by `docs/generate.py`; do not edit.*\n"
)
HEAD = """\
# The configuration

*Generated from the schema by `docs/generate.py`; do not edit.*

One TOML file describes training, search and transformation. Every key has a default; an unknown key or a wrong value is
an error that names the line. `"NA"` means none. Keys at the top have a flag of the same name (`max_epochs` →
`--max-epochs`). So have `strategy`, `sampler`, `n_trials`, `n_jobs`, `timeout`, `candidate_timeout`, `max_size`,
`tensorboard`, `track`, `image_size` and `target_column` (of `[dataset_settings]`) and, for
`search.finetune.trials`, `finetune`; flags override the file. `bitfront init` writes a commented file that runs;
`bitfront plan FILE` shows what a file means without running it.
The configuration that was used is saved in the run folder.
"""
TABLES = [
    ("The top", "", config.Config),
    ("`[search]`", "And the tables below.\n\n", config.SearchTable),
    ("`[search.search_space]`", "", config.SearchSpace),
    ("`[search.search_space.setup]`", "", config.SpaceSetup),
    ("`[search.search_space.seed.KEY]`", "", config.ChoicesTable),
    (
        "`[search.search_space.quantize]` and `[search.search_space.widths]`",
        'The two parts of `name = "joint"`: `mixed_precision_ptq` and `channel_size`, each with a setup and a '
        "seed.\n\n",
        config.SpacePart,
    ),
    ("`[search.strategy]`", "", config.StrategyTable),
    (
        "`[search.strategy.setup]`",
        "The keys of every search; the same table has [the settings of the strategy](#strategies).\n\n",
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

`KEY` is `default`, or of the kind that `setup.by` sets: a site's name (`seq_blocks_2`, or the module path
`seq_blocks.2`), a type of site (the [operations](operations.md) with operands), or a regular expression that
matches the whole name. With `by = "name"` a key that is a type is allowed, but a note says that it is unused; the same
holds for a site's name with `by = "type"`. Sites that no key names get `default`; without one they stay in float.

`default` means the usual types of sites:
SITES.
All others with operands (norms, other activations, softmax, pooling, quotients, means, concatenations ...) stay in
float unless a key names them. A regular expression that matches a usual
site means the usual sites alone: `encoder.*` is for the layers of an encoder, and `encoder.*norm` for its norms. With
`default_for = "all"` in the setup, `default` and every regular expression mean all sites; `[passes.quantize]` takes
`default_for` too. It has no effect on widths.

In `config`, `name` lists number formats (`"NA"`: stay in float) and `<operand>_<parameter>` their parameters, for the
operands `data_in`, `weight` and `bias`, and for the result, `data_out`, which has a format only where a key names it
([results](formats.md#results)). All tensors of a concatenation are its `data_in`: one format rounds each of
them, and learns from all. An operand without a `width` stays in float. Every value is a list of choices;
the choices of an operand are all combinations that are valid, so that a `frac_width` is never larger than
its `width`. A list of tables is a choice between complete settings:

```toml
[search.search_space.seed.linear.config]
name = ["integer", "NA"]
data_in = [{width = 8, frac_width = 4}, {width = 4, frac_width = 2}]
weight_width = [2, 4, 8]
weight_frac_width = ["NA", "auto"]
bias_width = [8]
```

The value of a parameter that is a list, such as `block_size`, is a list within the list: `[[1, 16], [1, 64]]` are two
choices, `[1, 16]` is one.

`bypass = true` leaves a site in float, like `name = "NA"`. `[passes.quantize]` takes the same tables with one value
each; `bitfront transform --config FILE` applies it.

### What widths may be chosen

With `name = "channel_size"` (`graph/quantize/channel_size_modifier`) `KEY` names layers: sites with weights and output
channels. In `config`:

| key | allowed | default | meaning |
| --- | --- | --- | --- |
| `channel_multiplier` | numbers above 0 | `1` | factor of the layer's output width |
| `name` | `"output_only"`, `"both"`, `"input_only"`, `"NA"` | `"NA"` | the layer keeps its width with the last two |
| `divisor` | one whole number ≥ 1 | `1` | a new width is rounded to the nearest multiple of it |
| `parent_block_name` | a node | | the node before the layer. Not needed; another node than in the model is an error |

Input widths always follow from the model. Layers that share their channels, such as the two sides of an addition, must
have the same choices, or only one of them has choices. Multipliers that give the same width are one candidate, and the
multiplier of an `input_only` layer has no effect. The model's output keeps its width: a key with its name is an error;
with `default`, a type or a pattern it is skipped, with a note.

A wider layer first computes the same as before; a narrower one keeps the channels with the largest filters. Without
[`basic_train`](#sw_runnerbasic_train) candidates are evaluated in this state, which says little about their accuracy
after training.
"""
OPERATIONS_HEAD = """\
# Operations

*Generated from the records in `src/bitfront/operations/` by `docs/generate.py`; do not edit.*

What Bitfront knows about each kind of layer and function. Without a mark, the operation takes a correct, slower path,
or is refused by name:

| column | with a mark | without |
| --- | --- | --- |
| operands | what can have a format: the prefix of its keys; `data_out`, the result, can too | it stays in float |
| default | the key `default` gives its sites formats | only a key that names them does |
| counted | its operations are counted | the network's total says that it is unknown |
| merged | how many candidates are computed at once if weights are fixed | computed once per distinct input |
| channels | widths are followed through it | the widths around it are fixed |
| trained | learned bits trains it, and a population, except series, groups, dilation, joins and ReLUs with bounds \
or a slope | candidates with it are trained one by one, and learned bits refuses it |
| ONNX | it is written as ONNX; *integer*: also with integer operators | the export is refused |
| byte kernel | the kernel of bytes that PyTorch runs | if it is quantized, latency and energy are modelled |

A mark does not include every setting of a layer: for example, of the paddings of a convolution, only zeros are written
as ONNX. The message then names the setting. [How to add one](howto/extend.md#an-operation).

"""
#: Column → the text of its cells.
CAPABILITIES: dict[str, Callable[[Operation], str]] = {
    "operands": lambda o: ", ".join(f"`{name}`" for name in o.formatted),
    "default": lambda o: "✓" if o.operands and o.by_default else "",
    "counted": lambda o: _mark(o.count),
    "merged": lambda o: o.merge.kind if o.merge is not None else "",
    "channels": lambda o: _mark(o.channels),
    "trained": lambda o: _mark(o.train),
    "ONNX": lambda o: "integer" if o.onnx_integer is not None else _mark(o.onnx),
    "byte kernel": lambda o: o.kernel or "",
}
#: Text about a runner besides its metrics and settings.
MORE = {
    "basic_train": """\
If this table is present, each candidate is trained. It begins with the float model's weights, in its widths, and is
trained with its formats and straight-through gradients. It is evaluated with the weights after the last epoch, in the
formats that it was trained in, in eval mode (also with `eval_mode = false`), on another split than the training split.
Its result depends neither on other candidates nor on `n_jobs`. [Corrections](formats.md#corrections-and-training) go
with it: `equalisation` and `bias_correction` before the training, `batch_norm` after it. `rounding = "adaptive"` does
not.

Formats are calibrated before this training, on the network in its state then. Directly after its widths were changed, a
network has a low accuracy; with `float_epochs` it is first trained in float, once for all candidates with its widths.

With `halving = {rungs = [1], keep = 0.5, cohort = 16}`, 16 candidates at a time are compared after each of the epochs
in `rungs`. Candidates that others dominate, in accuracy and in the costs among the objectives, stop there. They are
trials like any other, with a smaller `trained_epochs`. How long a candidate is trained then depends on its cohort,
which consists of consecutive proposals, but still neither on `n_jobs` nor on interruptions. The results of the others
do not change. With constraints, candidates that cannot meet what is known before any training are not trained. Of the
others those go on that meet the constraints at the rung, the front of these first, and then those closest to the
bounds.

"""
}


def main() -> None:
    """Write the files; with ``--check``, only say whether they are up to date."""
    files = FOLDER / mase.PAGE
    pages = {
        FOLDER / "configuration.md": configuration(),
        FOLDER / "operations.md": operations(),
        FOLDER / "howto" / "notebook.md": notebook(),
        files: mase.page(files.read_text(encoding="utf-8")),
    }
    if "--check" in sys.argv:
        old = [str(path) for path, text in pages.items() if path.read_text(encoding="utf-8") != text]
        sys.exit(f"out of date: {', '.join(old)}: make docs" if old else 0)
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")


def notebook() -> str:
    """The cells of the notebook as a page. Its code has the language ``py``: it is one program, in one namespace."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    parts = ["".join(cell["source"]) for cell in cells]
    code = [cell["cell_type"] == "code" for cell in cells]
    parts = [f"```py\n{part}\n```" if is_code else part for part, is_code in zip(parts, code, strict=True)]
    title, *rest = parts[0].split("\n")
    return "\n\n".join([f"{title}\n\n{NOTEBOOK_HEAD}" + "\n".join(rest), *parts[1:]]) + "\n"


def operations() -> str:
    """The page about operations."""
    records = [OPERATIONS.get(name) for name in OPERATIONS.names()]
    rows = [(f"`{o.name}`", o.summary, *(tell(o) for tell in CAPABILITIES.values())) for o in records]
    return OPERATIONS_HEAD + _rows(["operation", "what it is", *CAPABILITIES], rows)


def _mark(answer: object) -> str:
    return "" if answer is None else "✓"


def configuration() -> str:
    """The configuration reference."""
    parts = [HEAD]
    for title, text, table in TABLES:
        parts.append(f"## {title}\n\n{text}{_table(table.model_fields)}")
        if table is config.ChoicesTable:
            parts.append(SEED.replace("SITES", ", ".join(f"`{name}`" for name, o in sites().items() if o.by_default)))
            parts.append(_formats())
    parts.append(_models())
    parts.append(_data())
    parts.append(_tasks())
    parts.append(_runners())
    parts.append(_strategies())
    parts.append(_trackers())
    parts.append(_passes())
    parts.append(
        "## Accepted without effect\n\nKeys of MASE that have no effect in Bitfront; a note names each of them: "
        + ", ".join(f"`{k}`" for k in sorted(config.WITHOUT_EFFECT))
        + ".\n"
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


def _models() -> str:
    rows = [(f"`{prefix}:NAME`", meaning) for prefix, meaning in model_sources.SOURCES.described()]
    return (
        "## Models: `model` and `weights`\n\n"
        "A name that `bitfront list models` shows, `package.module:factory`, or a name of a library. With "
        "`weights = true` the model of a library has its pretrained weights; where its classifier fits the data, "
        "nothing is trained. "
        "[How to](howto/models-and-data.md)\n\n" + _rows(["`model`", "what it is"], rows)
    )


def _data() -> str:
    parts = [
        "## Data: `dataset` and `[dataset_settings]`\n\n"
        "The keys of the table, by dataset. Those of images default to what a model of a library needs; datasets that "
        "are not listed have no settings. `image_size` and `target_column` have flags. "
        "[How to](howto/models-and-data.md)\n"
    ]
    members = [(f"`{name}`", DATASETS.facts(name), text) for name, text in DATASETS.described()]
    members += [
        (f"`{prefix}:NAME`", data_sources.SOURCES.facts(prefix), text)
        for prefix, text in data_sources.SOURCES.described()
    ]
    for title, facts, text in members:
        if "settings" in facts:
            parts.append(f"### {title}\n\n{text}\n\n{_table(facts['settings'].model_fields)}")
    return "\n".join(parts)


def _tasks() -> str:
    parts = [
        "## Tasks: `task` and `[task_settings]`\n\n"
        "What `basic_evaluation` measures, and what training minimises. [How to](howto/tasks.md)\n"
    ]
    for name, meaning in TASKS.described():
        task = TASKS.get(name)
        metrics = "; ".join(
            f"`{m.name}`{f' ({m.unit})' if m.unit else ''}, {m.direction}: {m.meaning}"
            for m in (task.loss, *task.metrics)
        )
        settings = _table(task.Settings.model_fields) if task.Settings.model_fields else "No settings.\n"
        parts.append(f"### `{name}`\n\n{meaning}\n\nTargets: {task.targets.needed}. Metrics: {metrics}.\n\n{settings}")
    return "\n".join(parts)


def _runners() -> str:
    parts = [
        "## Metric runners: `[search.strategy.sw_runner.NAME]` and `hw_runner`\n\n"
        "A runner may be in either table; its metrics are reported as software or hardware metrics accordingly.\n"
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
        "## Strategies\n\n`name` in `[search.strategy]`; settings are in `[search.strategy.setup]`. "
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


def _trackers() -> str:
    parts = [
        "## Trackers\n\n`[search.track.NAME]` follows the search with a tracker, in its settings; with "
        '`track = "NAME"` or a list of names in `[search]`, and with `--track NAME`, in the defaults. '
        "[How to](howto/tracking.md)\n"
    ]
    for name, meaning in TRACKERS.described():
        fields = TRACKERS.get(name).Settings.model_fields
        parts.append(f"### `track.{name}`\n\n{meaning}\n\n{_table(fields) if fields else 'No settings.' + chr(10)}")
    return "\n".join(parts)


def _passes() -> str:
    return (
        "## Passes: `[passes.NAME]`\n\n"
        "What `bitfront transform --config FILE` does to the trained model. `[passes.quantize]` has the tables of a "
        "seed, with one value in place of each list. Weights are pruned first, whatever the order of the tables. "
        f"{', '.join(f'`{name}`' for name in config.REPORTS)} print tables, in the order of the file. "
        "[Files of MASE](howto/mase.md)\n\n"
        f"### `[passes.prune.weight]`\n\n{_table(passes.PruneSettings.model_fields)}\n"
        f"### `[passes.report_node_type]` and the like\n\n{_table(passes.ReportSettings.model_fields)}"
    )


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
    numbers = [str(a) for part in (annotation, *get_args(annotation)) for a in get_args(part) if type(a) is int]
    if numbers:
        return ", ".join(f"`{n}`" for n in numbers)
    words = [a for part in (annotation, *get_args(annotation)) for a in get_args(part) if isinstance(a, str)]
    words = list(dict.fromkeys(words or [a for a in get_args(annotation) if isinstance(a, str)]))
    if words:
        return ("list of " if _has_list(annotation) else "") + ", ".join(f'`"{w}"`' for w in words)
    if dict in (get_origin(annotation), *map(get_origin, get_args(annotation))) or any(
        isinstance(a, type) and issubclass(a, config.Table) for a in get_args(annotation)
    ):
        return "table"
    if _has_list(annotation) and "str" in str(annotation):
        return "list of texts"
    if _has_list(annotation):
        return "list of numbers" if "float" in str(annotation) else "list of whole numbers"
    plain = {str: "text", int: "whole number", float: "number", bool: "true, false"}
    kind = next(plain[t] for t in (annotation, *get_args(annotation)) if t in plain)
    limits = []
    for limit in field.metadata:
        for attribute, symbol in (("ge", "≥"), ("gt", ">"), ("le", "≤")):
            if getattr(limit, attribute, None) is not None and getattr(limit, attribute) < 2**60:
                limits.append(f"{symbol} {getattr(limit, attribute)}")
    return " ".join([kind, *limits])


def _has_list(annotation: Any) -> bool:
    return get_origin(annotation) is list or any(map(_has_list, get_args(annotation)))


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
