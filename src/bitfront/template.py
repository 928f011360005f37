"""The commented TOML that ``bitfront init`` writes, and that a search without a file runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import tomli_w

from bitfront.errors import ConfigError, nearest, one_of
from bitfront.files import short_name

#: The model and the dataset of a search without a file.
DEFAULT_MODEL, DEFAULT_DATASET = "digits-cnn", "digits"

_TOP = """\
# A search by Bitfront: bitfront search --config {file}
model = "{model}"
dataset = "{dataset}"{path}
project = "{project}"      # results go to runs/{project}
accelerator = "auto"
seed = 0

# Training, unless load_name names a checkpoint. It runs once; later searches use its result.
max_epochs = {epochs}
batch_size = {batch_size}
learning_rate = 2e-3
training_optimizer = "adam"
# load_name = "model.pt"

{settings}{search}# The search space. Every value is a list of choices; `default` is for all that no other key names.
{why}[search.search_space]
name = "graph/quantize/mixed_precision_ptq"
setup.by = "type"                    # or "name" (one layer), or "regex_name"

[search.search_space.seed.default.config]
name = ["NA"]                        # float
"""
_CHOICES = """
[search.search_space.seed.{op}.config]
{choices}"""
_FOLDED = """\
[search]
fold_batch_norm = true               # what is searched is what is deployed

"""
_STRATEGY = """
[search.strategy]
name = "{strategy}"{comment}

[search.strategy.setup]
n_jobs = 1                           # worker processes
{budget}timeout = 3600                       # seconds

# The metrics. `bitfront list metrics` shows all of them.
[search.strategy.sw_runner.basic_evaluation]
data_loader = "val_dataloader"       # not the test split: only the front is measured on it, once, at the end

[search.strategy.hw_runner.average_bitwidth]
compare_to = 32

[search.strategy.hw_runner.model_size]
{runners}
# The objectives. With several of them the result is their Pareto front.
[search.strategy.metrics]
{leading}.scale = 1.0
{leading}.direction = "{direction}"
{cost}.scale = 1.0
{cost}.direction = "minimize"
"""


@dataclass(frozen=True)
class Target:
    """What a file starts from for one kind of hardware.

    Attributes:
        why: comments that say what it starts from, and why.
        choices: the lines of TOML with the format of a type of layer, and its choices.
        options: how many candidates the choices make of one layer.
        cost: the metric that is minimised.
        runners: further tables of metrics, as TOML; "" for none.
        search: tables of TOML in front of the search space; "" for none.
        folds: whether batch norms must be folded into layers, where the model has some.
        others: types of sites without weights whose inputs need a format too → its lines of TOML.
        suffix: ends the names of project and file, so that two targets of one model do not share a run folder.
    """

    why: str
    choices: str
    options: int
    cost: str
    runners: str = ""
    search: str = ""
    folds: bool = False
    others: Mapping[str, str] = field(default_factory=dict)
    suffix: str = ""


@dataclass(frozen=True)
class Leading:
    """A task, and the metric of it that leads."""

    task: str
    metric: str
    direction: str


CLASSIFIES = Leading("classification", "accuracy", "maximize")
PROCESSOR = Target(
    why="""\
# For processors: integers with a scale of any size, which their integer kernels multiply with. Weights have a scale per
# output channel, inputs one scale and a zero point. For a file that is fast in ONNX Runtime: bitfront init --target
# onnxruntime; for fixed point: --target fpga, or microcontroller.
""",
    choices="""\
name = ["affine"]                    # `bitfront list formats` shows more
data_in_width = [4, 8]               # bits
weight_width = [2, 4, 8]
weight_range = ["mse"]               # scales with the smallest squared error; matters most for few bits
bias_width = [8]
""",
    options=6,
    cost="average_bitwidth",
)
#: Sums, products and means, whose inputs runtimes and programs in whole numbers round too.
_JOINED = ("add", "mul")
_MEANS = ("avg_pool", "adaptive_avg_pool", "mean")
_TWO_BYTES = """\
name = ["affine"]
data_in_width = [8]
data_in_2_width = [8]
"""
_BYTE = """\
name = ["affine"]
data_in_width = [8]
"""
ONNX_RUNTIME = Target(
    why="""\
# For the fast kernels of ONNX Runtime, and compilers that read QDQ (TensorRT, OpenVINO): they take bytes, and fuse a
# layer with what is around it if its input, and both inputs of an addition, have 8 bits. Weights of 4 bits make the
# file smaller, not faster. "NA" beside "affine" lets a layer stay in float.
# Then: bitfront export PROJECT --trial N --to qdq
""",
    choices="""\
name = ["affine"]                    # `bitfront list formats` shows more
data_in_width = [8]                  # bits
weight_width = [4, 8]
weight_range = ["mse"]               # scales with the smallest squared error; matters most for few bits
""",
    options=2,
    cost="average_bitwidth",
    search="""\
[search.calibration]
integer_bias = true                  # biases as kernels hold them: whole numbers of 32 bits, in steps of the sums

""",
    folds=True,
    others={**dict.fromkeys(_JOINED, _TWO_BYTES), **dict.fromkeys(_MEANS, _BYTE)},
    suffix="-onnxruntime",
)
_FIXED_BYTE = """\
name = ["integer"]
data_in_width = [8]
data_in_frac_width = ["auto"]
"""
MICROCONTROLLER = Target(
    why="""\
# For microcontrollers: a program of whole numbers in C, with fixed point of 8 bits between layers. Its weights are
# packed, so few bits save flash. `flash` and `ram` are bytes of that program; a budget is a constraint:
#     [search.constraints]
#     flash = "<= 60 kB"
# Then: bitfront export PROJECT --trial N --to c
""",
    choices="""\
name = ["integer"]                   # `bitfront list formats` shows more
data_in_width = [8]                  # bits
data_in_frac_width = ["auto"]        # fraction bits: the best for the data; "NA" is half of the width
weight_width = [2, 4, 8]
weight_frac_width = ["auto"]
bias_width = [16]
bias_frac_width = ["auto"]
""",
    options=3,
    cost="flash",
    runners="""
[search.strategy.hw_runner.microcontroller]      # flash, ram, cycles
""",
    folds=True,
    others=dict.fromkeys(_MEANS, _FIXED_BYTE),
    suffix="-microcontroller",
)
FPGA = Target(
    why="""\
# For FPGAs: fixed point. They have no cheap multiplication by a scale of any size, so scales are powers of two, and one
# per output channel is wiring. Bits that are learned with the weights, each weight with its own, need far less logic
# for the same accuracy: see examples/jsc_fpga.toml.
""",
    choices="""\
name = ["integer"]                   # `bitfront list formats` shows more
data_in_width = [4, 8]               # bits
data_in_frac_width = ["auto"]        # fraction bits: the best for the data; "NA" is half of the width
weight_width = [2, 4, 8]
weight_frac_width = ["auto"]
weight_granularity = ["channel"]     # a binary point per output channel
bias_width = [8]
bias_frac_width = ["auto"]
""",
    options=6,
    cost="ebops",
    runners="""
[search.strategy.hw_runner.ebops]    # bits of weight times bits of input, over all products: goes with the area
""",
    suffix="-fpga",
)
#: What ``--target`` takes; the first is the default.
TARGETS: Mapping[str, Target] = MappingProxyType(
    {"processor": PROCESSOR, "onnxruntime": ONNX_RUNTIME, "fpga": FPGA, "microcontroller": MICROCONTROLLER}
)
DEFAULT_TARGET = "processor"
#: With more candidates than this there are too many to try all.
MANY = 6**5


def target_named(name: str) -> Target:
    """The target of this name. Raises ConfigError where there is none."""
    if name not in TARGETS:
        raise ConfigError(f"there is no target {name!r}; {one_of(TARGETS)}.{nearest(name, TARGETS)}")
    return TARGETS[name]


def template(
    model: str,
    dataset: str,
    ops: Sequence[str] = ("linear", "conv2d"),
    weight_sites: int = 6,
    samples: int = 10_000,
    dataset_path: str | None = None,
    file: str = "FILE.toml",
    target: str = DEFAULT_TARGET,
    task: Leading = CLASSIFIES,
    settings: Mapping[str, object] = MappingProxyType({}),
    others: Sequence[str] = (),
) -> str:
    """The text of a configuration that runs.

    Args:
        model: a model's name, that of a library, or ``package.module:factory``.
        dataset: a dataset's name, that of a library, a path, or ``package.module:factory``.
        ops: the types of the model's sites with weights.
        weight_sites: the number of these sites; with at most MANY candidates the strategy is brute force.
        samples: size of the training split; decides on epochs and batch size.
        dataset_path: file or folder of the data.
        file: the name of the file, for the comment in its first line.
        target: the hardware, a name in TARGETS.
        task: what the samples are.
        settings: of the dataset.
        others: the types of all other operations in the model.

    Raises:
        ConfigError: there is no such target.
    """
    hardware = target_named(target)
    candidates = hardware.options**weight_sites
    few = candidates <= MANY
    search = hardware.search
    if hardware.folds and "batch_norm" in others:
        search = _FOLDED + search
    data = Path(dataset_path).stem if dataset == "npz" and dataset_path else short_name(dataset)
    project = f"{short_name(model)}-{data}{hardware.suffix}".replace(".", "-")
    top = _TOP.format(
        why=hardware.why.replace("PROJECT", project),
        settings=f"[dataset_settings]\n{tomli_w.dumps(dict(settings))}\n" if settings else "",
        search=search,
        file=file,
        model=model,
        dataset=dataset,
        path=(f'\ndataset_path = "{dataset_path}"' if dataset_path else "")
        + (f'\ntask = "{task.task}"' if task != CLASSIFIES else ""),
        project=project,
        epochs=40 if samples < 20_000 else 10,
        batch_size=64 if samples < 20_000 else 512,
    )
    strategy = _STRATEGY.format(
        leading=task.metric,
        direction=task.direction,
        runners=hardware.runners,
        cost=hardware.cost,
        strategy="brute_force" if few else "surrogate",
        comment=f"                 # every one of the {candidates:,} candidates" if few else "",
        budget="" if few else "n_trials = 200                       # distinct candidates\n",
    )
    choices = dict.fromkeys(ops, hardware.choices) | {op: hardware.others[op] for op in others if op in hardware.others}
    return top + "".join(_CHOICES.format(op=op, choices=lines) for op, lines in choices.items()) + strategy
