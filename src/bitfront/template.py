"""The commented TOML that ``bitfront init`` writes, and that a search without a file runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

{settings}# The search space. Every value is a list of choices; `default` is for all layers that no other key names.
{why}[search.search_space]
name = "graph/quantize/mixed_precision_ptq"
setup.by = "type"                    # or "name" (one layer), or "regex_name"

[search.search_space.seed.default.config]
name = ["NA"]                        # float
"""
_CHOICES = """
[search.search_space.seed.{op}.config]
{choices}"""
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
        cost: the metric that is minimised.
        runners: further tables of metrics, as TOML; "" for none.
        suffix: ends the names of project and file, so that two targets of one model do not share a run folder.
    """

    why: str
    choices: str
    cost: str
    runners: str = ""
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
# output channel, inputs one scale and a zero point. For fixed point: bitfront init --target fpga.
""",
    choices="""\
name = ["affine"]                    # `bitfront list formats` shows more
data_in_width = [4, 8]               # bits
weight_width = [2, 4, 8]
weight_range = ["mse"]               # scales with the smallest squared error; matters most for few bits
bias_width = [8]
""",
    cost="average_bitwidth",
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
    cost="ebops",
    runners="""
[search.strategy.hw_runner.ebops]    # bits of weight times bits of input, over all products: goes with the area
""",
    suffix="-fpga",
)
#: What ``--target`` takes; the first is the default.
TARGETS: Mapping[str, Target] = MappingProxyType({"processor": PROCESSOR, "fpga": FPGA})
DEFAULT_TARGET = "processor"
#: With more sites than this, each with 6 options, there are too many candidates to try all.
MANY_SITES = 5


def target_named(name: str) -> Target:
    """The target of this name. Raises ConfigError where there is none."""
    if name not in TARGETS:
        raise ConfigError(f"there is no target {name!r}; {one_of(TARGETS)}.{nearest(name, TARGETS)}")
    return TARGETS[name]


def template(
    model: str,
    dataset: str,
    ops: Sequence[str] = ("linear", "conv2d"),
    weight_sites: int = MANY_SITES + 1,
    samples: int = 10_000,
    dataset_path: str | None = None,
    file: str = "FILE.toml",
    target: str = DEFAULT_TARGET,
    task: Leading = CLASSIFIES,
    settings: Mapping[str, object] = MappingProxyType({}),
) -> str:
    """The text of a configuration that runs.

    Args:
        model: a model's name, that of a library, or ``package.module:factory``.
        dataset: a dataset's name, that of a library, a path, or ``package.module:factory``.
        ops: the types of the model's sites with weights.
        weight_sites: the number of these sites; with at most MANY_SITES the strategy is brute force.
        samples: size of the training split; decides on epochs and batch size.
        dataset_path: file or folder of the data.
        file: the name of the file, for the comment in its first line.
        target: the hardware, a name in TARGETS.
        task: what the samples are.
        settings: of the dataset.

    Raises:
        ConfigError: there is no such target.
    """
    hardware = target_named(target)
    few = weight_sites <= MANY_SITES
    data = Path(dataset_path).stem if dataset == "npz" and dataset_path else short_name(dataset)
    project = f"{short_name(model)}-{data}{hardware.suffix}".replace(".", "-")
    top = _TOP.format(
        why=hardware.why,
        settings=f"[dataset_settings]\n{tomli_w.dumps(dict(settings))}\n" if settings else "",
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
        comment=f"                 # every one of the {6**weight_sites:,} candidates" if few else "",
        budget="" if few else "n_trials = 200                       # distinct candidates\n",
    )
    return top + "".join(_CHOICES.format(op=op, choices=hardware.choices) for op in ops) + strategy
