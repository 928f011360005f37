"""The table of docs/howto/mase.md: files and commands as users of MASE have them, tried, and what Bitfront says.

``generate.py`` writes it. Each case is run in this process, on a network of a hundred weights.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from bitfront.cli import application
from bitfront.cli.flags import with_flag_names
from bitfront.errors import BitfrontError

PAGE = "howto/mase.md"
BEGIN, END = "<!-- tried, by docs/mase.py -->\n", "<!-- end -->\n"
TOP = 'model = "toy"\ndataset = "toy_tiny"\ntask = "cls"\nmax_epochs = 1\n'
SPACE = """\
[search.search_space]
name = "graph/quantize/mixed_precision_ptq"
[search.search_space.setup]
by = "type"
[search.search_space.seed.default.config]
name = ["NA"]
[search.search_space.seed.linear.config]
name = ["integer"]
data_in_width = [4, 8]
data_in_frac_width = ["NA"]
weight_width = [2, 4, 8]
weight_frac_width = ["NA"]
bias_width = [8]
bias_frac_width = ["NA"]
"""
STRATEGY = """\
[search.strategy]
name = "optuna"
eval_mode = true
[search.strategy.sw_runner.basic_evaluation]
data_loader = "val_dataloader"
num_samples = 256
[search.strategy.hw_runner.average_bitwidth]
compare_to = 32
[search.strategy.setup]
n_jobs = 1
n_trials = 20
timeout = 20000
sampler = "tpe"
sum_scaled_metrics = false
[search.strategy.metrics]
accuracy.scale = 1.0
accuracy.direction = "maximize"
average_bitwidth.scale = 0.2
average_bitwidth.direction = "minimize"
"""
FILE = TOP + SPACE + STRATEGY
QUANTIZE = """\
[passes.quantize]
by = "type"
[passes.quantize.default.config]
name = "NA"
[passes.quantize.linear.config]
name = "integer"
data_in_width = 8
data_in_frac_width = 4
weight_width = 8
weight_frac_width = 4
bias_width = 8
bias_frac_width = 4
"""
OLDER = """\
[search_space]
style = "mixed_precision"
name = "integer"
data_in_width = [4, 8]
weight_width = [2, 4, 8]
bias_width = [8]
[strategy]
name = "optuna"
data_loader = "val_dataloader"
num_batches = 2
[strategy.setup]
n_jobs = 1
n_trials = 10
timeout = 20000
sampler = "TPE"
"""
OLD_FORMATS = """\
[default]
name = "integer"
data_in_width = 8
data_in_frac_width = 5
weight_width = 8
weight_frac_width = 3
bias_width = 8
bias_frac_width = 5
"""
SUMMED = STRATEGY.replace("sum_scaled_metrics = false", 'sum_scaled_metrics = true\ndirection = "maximize"')
COMPUTED = SUMMED.replace("average_bitwidth", "total_bitops").replace("hw_runner.total_bitops", "hw_runner.NAME")
COMPUTED = COMPUTED.replace("compare_to = 32\n", "").replace("hw_runner.NAME", "hw_runner.basic_computation")
COMPUTED = COMPUTED.replace('"minimize"', '"maximize"')
TRAIN = """\
[search.strategy.sw_runner.basic_train]
num_samples = 256
max_epochs = 1
optimizer = "adam"
learning_rate = 1e-2
"""
#: Arguments of the command, and the text of ``search.toml``.
Case = tuple[str, str]
PLAN, TRANSFORM = "plan search.toml", "transform --config search.toml"


def _changed(old: str, new: str) -> Case:
    assert old in FILE, old
    return PLAN, FILE.replace(old, new)


def _passes(text: str) -> Case:
    return TRANSFORM, TOP + QUANTIZE + text


#: What a file or a command has → how it is tried.
CASES: dict[str, Case] = {
    "a file of the labs: `by`, seeds, runners, metrics with scale and direction": (PLAN, FILE),
    '`sampler = "TPE"`, `"Random"`, `"nsgaii"`, `"nsgaiii"`, `"qmc"`': _changed('"tpe"', '"NSGAII"'),
    '`sampler = "brute"`, `"bruteforce"`, `"brute-force"`, `"brute_force"`': _changed('"tpe"', '"brute-force"'),
    '`name = "brute_force"` in `[search.strategy]`': (PLAN, FILE.replace('"optuna"', '"bruteforce"').replace('sampler = "tpe"\n', "")),
    "`bypass = [true, false]`": _changed('name = ["integer"]\n', 'name = ["integer"]\nbypass = [true, false]\n'),
    "a `frac_width` above its `width`": _changed('weight_frac_width = ["NA"]', "weight_frac_width = [3, 6, 9]"),
    '`"NA"` among choices': _changed('name = ["integer"]', 'name = ["integer", "NA"]'),
    '`name = ["minifloat_ieee"]`, and the other formats': (
        PLAN,
        FILE.replace('name = ["integer"]', 'name = ["integer", "minifloat_ieee"]\nweight_exponent_width = [2]\nweight_exponent_bias = ["NA"]\ndata_in_exponent_width = [3]\ndata_in_exponent_bias = ["NA"]\nbias_exponent_width = [4]\nbias_exponent_bias = ["NA"]'),
    ),
    "`pkl_ckpt`, `save_every_n_trials`": _changed("n_jobs = 1", 'n_jobs = 1\npkl_ckpt = "study.pkl"\nsave_every_n_trials = 10'),
    '`lr_scheduler = "linear"`, `num_warmup_steps` in `basic_train`': (
        PLAN,
        FILE.replace("eval_mode = true", "eval_mode = false") + TRAIN + 'lr_scheduler = "linear"\nnum_warmup_steps = 2\n',
    ),
    "`gradient_accumulation_steps = 2` in `basic_train`": (
        PLAN,
        FILE.replace("eval_mode = true", "eval_mode = false") + TRAIN + "gradient_accumulation_steps = 2\n",
    ),
    '`name = "accuracy"` in `basic_train`': (
        PLAN,
        FILE.replace("eval_mode = true", "eval_mode = false") + TRAIN + 'name = "accuracy"\n',
    ),
    "`accumulate_grad_batches = 2` at the top": (PLAN, "accumulate_grad_batches = 2\n" + FILE),
    '`load_type = "pl"` with a checkpoint of Lightning': (PLAN, 'load_name = "best.ckpt"\nload_type = "pl"\n' + FILE),
    '`load_type = "mz"` without `load_name`': (PLAN, 'load_type = "mz"\n' + FILE),
    '`load_type = "mz"`': (PLAN, 'load_name = "graph.mz"\nload_type = "mz"\n' + FILE),
    '`load_type = "hf"`': (PLAN, 'load_name = "folder"\nload_type = "hf"\n' + FILE),
    "`[transform]` with a `style`": (PLAN, FILE + '[transform]\nstyle = "graph"\n'),
    "`num_workers`, `log_level`, `trainer_precision` …": (PLAN, 'num_workers = 4\ntrainer_precision = "16-mixed"\n' + FILE),
    "`accelerator` inside another table": _changed('by = "type"', 'by = "type"\naccelerator = "cpu"'),
    "`[search_space]` and `[strategy]` at the top": (PLAN, TOP + OLDER),
    '`sw_runner = "basic_evaluation"` with `num_samples` beside it': (
        PLAN,
        TOP + SPACE + STRATEGY.replace('[search.strategy.sw_runner.basic_evaluation]\n', 'sw_runner = "basic_evaluation"\n'),
    ),
    "`[default]` with a format at the top": (TRANSFORM, TOP + OLD_FORMATS),
    "a sum of metrics, one with a negative scale": (PLAN, TOP + SPACE + COMPUTED.replace("scale = 0.2", "scale = -5e-6")),
    "a sum with a term that is too small to count": (PLAN, TOP + SPACE + COMPUTED.replace("scale = 0.2", "scale = -5e-10")),
    '`per = "batch"` in `basic_computation`': (
        PLAN,
        TOP + SPACE + COMPUTED.replace("basic_computation]", 'basic_computation]\nper = "batch"').replace("scale = 0.2", "scale = -5e-8"),
    ),
    "the directions of a sum's terms": (PLAN, TOP + SPACE + SUMMED),
    "`[passes.quantize]`, by type, name or regex_name": _passes(""),
    '`[passes.prune.weight]`, `method = "l1-norm"`': _passes('[passes.prune.weight]\nscope = "local"\ngranularity = "elementwise"\nmethod = "l1-norm"\nsparsity = 0.5\n'),
    "`[passes.summarize_quantization]`, `report_node_type`, `report_node_shape`, `report_node_meta_param`": _passes(
        '[passes.summarize_quantization]\nsave_dir = "out"\n[passes.report_node_type]\n[passes.report_node_shape]\n[passes.report_node_meta_param]\nwhich = "all"\n'
    ),
    "`[passes.prune.activation]`": _passes("[passes.prune.activation]\nsparsity = 0.1\n"),
    '`[passes.prune.weight]`, `method = "random"`': _passes('[passes.prune.weight]\nmethod = "random"\nsparsity = 0.1\n'),
    "`[passes.conv_bn_fusion]`, and other passes": _passes("[passes.conv_bn_fusion]\n"),
    "a key that does not exist": _changed("n_jobs = 1", "n_job = 1"),
    "a setting of no quantizer": _changed("weight_width", "weight_widht"),
    'the strategy `"rl"`': _changed('name = "optuna"', 'name = "rl"'),
    'the space `"module/manual_hf/quantize/llm_mixed_precision_ptq"`': _changed("graph/quantize/mixed_precision_ptq", "module/manual_hf/quantize/llm_mixed_precision_ptq"),
    'the formats `"lutnet"` and `"logicnets"`': _changed('name = ["integer"]', 'name = ["logicnets"]'),
    "`hw_runner.resource_usage`, which was empty": _changed("[search.strategy.setup]", "[search.strategy.hw_runner.resource_usage]\n[search.strategy.setup]"),
    '`model = "resnet18"`': _changed('model = "toy"', 'model = "resnet18"'),
    '`dataset = "sst2"`': _changed('dataset = "toy_tiny"', 'dataset = "sst2"'),
    "`plan MODEL DATASET --config FILE`": ("plan toy-tiny toy_tiny --config search.toml", FILE),
    "`--load FILE --load-type pl`": ("plan search.toml --load best.ckpt --load-type pl", FILE),
    "`--cpu 4`, `--gpu 1`, `--log-level debug`": ("plan search.toml --cpu 4 --gpu 1 --log-level debug", FILE),
    "`--strategy brute_force` beside a file with a sampler": ("plan search.toml --strategy brute_force", FILE),
    "`--strategy ddp`": ("plan search.toml --strategy ddp", FILE),
    "an option equal to its default: `--load-type pt` beside `load_type = \"mz\"`": ("plan search.toml --load-type pt", 'load_type = "mz"\n' + FILE),
}  # fmt: skip


def page(text: str) -> str:
    """The page with the table as it is today."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + table() + END + rest.split(END)[1]


def table() -> str:
    """The cases in three groups: what runs unchanged, what is read differently, what is refused; with what is said."""
    groups: dict[str, list[tuple[str, str]]] = {"Runs unchanged": [], "Runs, with a note": [], "Is refused": []}
    with _folder():
        for what, (command, text) in CASES.items():
            refused, said = tried(command, text)
            group = "Is refused" if refused else "Runs, with a note" if said else "Runs unchanged"
            groups[group].append((what, said))
    parts = []
    for title, rows in groups.items():
        said = any(text for _, text in rows)
        lines = [f"| {title} |{' what Bitfront says |' if said else ''}", f"| --- |{' --- |' if said else ''}"]
        lines += [f"| {what} |{' ' + _cell(text) + ' |' if said else ''}" for what, text in rows]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def tried(command: str, text: str) -> tuple[bool, str]:
    """(whether it was refused, what was said beside the results) of a command, with `text` as its ``search.toml``."""
    Path("search.toml").write_text(text, encoding="utf-8")
    out, messages = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(messages):
        try:
            application(command.split())(command.split(), standalone_mode=False)
        except BitfrontError as error:
            return True, with_flag_names(error)
    lines = [
        line for line in messages.getvalue().splitlines() if not re.match(r"training:|trained:|weights from", line)
    ]
    return False, "; ".join(line.removeprefix("note: ") for line in lines)


@contextlib.contextmanager
def _folder() -> Iterator[None]:
    """An empty folder to work in, with a checkpoint of Lightning."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            from bitfront.models.base import build_model

            state = build_model("toy", (1, 2, 2), 2, seed=0).state_dict()
            torch.save({"state_dict": {f"model.{key}": value for key, value in state.items()}}, "best.ckpt")
            yield
        finally:
            os.chdir(before)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
