"""Mistakes in the file or on the command line: one message, exit code 2, before any work."""

import json

import pytest
from journey import Shell, Typed, rows, settings

pytestmark = pytest.mark.journey

NAME = 'name = "brute_force"'
#: what is wrong → (text in the file, what stands there instead, key, all that the message says).
MISTAKES = {
    "unknown top key": ("batch_size = 64", "batch_sise = 64", "batch_sise", ["Did you mean 'batch_size'?"]),
    "unknown nested key": (NAME, f"{NAME}\nsetup.n_trails = 5", "search.strategy.setup.n_trails", ["'n_trials'?"]),
    "unknown table": ("[search.search_space.setup]", "[search.searchspace.setup]", "search.searchspace", ["allowed:"]),
    "wrong type": ("max_epochs = 2", 'max_epochs = "two"', "max_epochs", ["'two' is of the wrong type", "integer"]),
    "out of range": ("max_epochs = 2", "max_epochs = -1", "max_epochs", ["-1 is not possible", "greater than"]),
    "not TOML": ("batch_size = 64", "batch_size = = 64", "", ["this is not valid TOML"]),
    "unknown model": ('"digits-mlp"', '"digit-mlp"', "model", ["allowed:", "jsc-tiny", "Did you mean 'digits-mlp'?"]),
    "unknown dataset": ('dataset = "npz"', 'dataset = "nzp"', "dataset", ["allowed:", "Did you mean 'npz'?"]),
    "unknown strategy": (NAME, 'name = "optunna"', "search.strategy.name", ["allowed:", "Did you mean 'optuna'?"]),
    "unknown sampler": (
        NAME,
        'name = "optuna"\nsetup.sampler = "nsga2"',
        "search.strategy.setup.sampler",
        ["'nsga2'", "nsgaii"],
    ),
    "unknown format": (
        'name = ["integer"]',
        'name = ["intger"]',
        "search.search_space.seed.linear.config.name",
        ["'intger'", "allowed:", "Did you mean 'integer'?"],
    ),
    "unknown parameter": (
        "weight_frac_width",
        "weigth_frac_width",
        "search.search_space.seed.linear.config.weigth_frac_width",
        ["Did you mean 'weight_frac_width'?"],
    ),
    "unknown metric runner": (
        "hw_runner.average_bitwidth",
        "hw_runner.average_bitwith",
        "search.strategy.hw_runner.average_bitwith",
        ["allowed:", "Did you mean 'average_bitwidth'?"],
    ),
    "unknown setting of a runner": (
        "compare_to = 32",
        "compared_to = 32",
        "search.strategy.hw_runner.average_bitwidth.compared_to",
        ["Did you mean 'compare_to'?"],
    ),
    "the test split": (
        "val_dataloader",
        "test_dataloader",
        "search.strategy.sw_runner.basic_evaluation.data_loader",
        ["'test_dataloader' is not possible", "val_dataloader"],
    ),
    "a metric that no runner produces": (
        "accuracy.scale = 1.0",
        "latency.scale = 1.0",
        "search.strategy.metrics.latency",
        ["no configured runner produces this metric; allowed: loss, accuracy", "bitfront list metrics"],
    ),
    "a site that the model does not have": (
        "[search.search_space.seed.linear.config]",
        "[search.search_space.seed.fc3.config]",
        "search.search_space.seed.fc3",
        ["allowed: ", "fc1", "Did you mean 'fc"],
    ),
    "a type that does not exist": (
        "[search.search_space.seed.linear.config]",
        "[search.search_space.seed.liner.config]",
        "search.search_space.seed.liner",
        ["'liner'", "allowed:", "Did you mean 'linear'?"],
    ),
    "a frac width that no number has": (
        'weight_frac_width = ["auto"]',
        "weight_frac_width = [9, 100]",
        "search.search_space.seed.linear.config.weight",
        ["frac_width"],
    ),
    "an empty list of choices": (
        "weight_width = [2, 4, 8]",
        "weight_width = []",
        "search.search_space.seed.linear.config.weight_width",
        ["empty"],
    ),
    "a sum without direction": (
        NAME,
        f"{NAME}\nsetup.sum_scaled_metrics = true",
        "search.strategy.setup.sum_scaled_metrics",
        ["needs direction = 'maximize' or 'minimize'"],
    ),
    "brute force too large": (
        NAME,
        f"{NAME}\nsetup.max_size = 35",
        "search.strategy.setup.max_size",
        ["the space has 36 candidates", "max_size = 35", "surrogate"],
    ),
    "bad by": ('by = "type"', 'by = "typ"', "search.search_space.setup.by", ["allowed: name, type, regex_name", "'type'?"]),
    "unknown space": (
        "[search.search_space.setup]",
        '[search.search_space]\nname = "graph/quantize/mixed_precision"\n[search.search_space.setup]',
        "search.search_space.name",
        ["Did you mean 'graph/quantize/mixed_precision_ptq'?"],
    ),
    "a file that is not there": ("clouds.npz", "cloud.npz", "", ["cloud.npz"]),
    "no path": ("dataset_path", "# dataset_path", "", ["needs dataset_path"]),
    "a scale of nothing": ("scale = 0.2", "scale = 0.0", "search.strategy.metrics.average_bitwidth.scale", ["equal"]),
    "a sampler for brute force": (
        NAME,
        f'{NAME}\nsetup.sampler = "tpe"',
        "search.strategy.setup.sampler",
        ["a sampler belongs to strategy 'optuna', and this one is 'brute_force'"],
    ),
    "no folder's name": ('project = "small"', 'project = "../small"', "project", ["is not the name of a folder"]),
    "nothing but float": ('name = ["integer"]', 'name = ["NA"]', "search.search_space.seed", ["every site stays in float"]),
}  # fmt: skip


#: Types one command after the other in one process: that loads torch once, and not thirty times.
PROGRAM = """
import contextlib, io, json, os, sys
from bitfront import cli

answers, here = {}, os.getcwd()
for folder in sys.argv[1:]:
    os.chdir(os.path.join(here, folder))
    sys.argv[1:] = ["search", "--config", "bad.toml"]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    answers[folder] = [code, out.getvalue(), err.getvalue()]
print(json.dumps(answers))
"""


def written(what, data):
    """(a good file, the same with the mistake in it)."""
    good = settings(data, by="name" if "site that" in what else "type")
    assert MISTAKES[what][0] in good
    return good, good.replace(*MISTAKES[what][:2], 1)


@pytest.fixture(scope="module")
def answers(tmp_path_factory, data, warm):
    """What is wrong → (folder, the command's answer)."""
    shell = Shell(tmp_path_factory.mktemp("mistakes"), warm)
    for what in MISTAKES:
        (shell.folder / what).mkdir()
        shell.write(f"{what}/bad.toml", written(what, data)[1])
    answers = json.loads(shell.python(PROGRAM, *MISTAKES))
    return {what: (shell.folder / what, Typed("search --config bad.toml", *answers[what])) for what in MISTAKES}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_in_the_file(what, answers, data):
    old, new, key, parts = MISTAKES[what]
    good = written(what, data)[0]
    folder, typed = answers[what]
    assert typed.code == 2, typed
    message = typed.err.removeprefix("configuration: bad.toml\n")
    assert message.startswith("error: ")
    assert "training:" not in typed.err
    assert typed.out == ""
    if key:
        # The line of the key, or of the nearest table around it that the file has.
        line = (
            1
            + good[: good.index(old)].count("\n")
            + (new.split(key.rsplit(".", 1)[-1])[0].count("\n") if "\n" in new else 0)
        )
        if what == "nothing but float":
            line = 1 + good[: good.index("[search.search_space.seed.")].count("\n")
        if what == "a frac width that no number has":
            line = int(message.split(":")[2])
        assert message.startswith(f"error: bad.toml:{line}: {key}"), typed
    for part in parts:
        assert part in message, f"{part!r} is missing:\n{typed}"
    assert not (folder / "runs").exists()


#: flags → what the message says.
FLAGS = {
    ("--accelerator", "tpu"): "error: --accelerator: 'tpu' is not possible; allowed: auto, cpu, gpu, cuda, mps.",
    ("--executor", "nope:3"): "error: --executor: there is no executor called 'nope'; allowed: dask, loky, mpi,",
    ("--n-trials", "0"): "error: --n-trials: 0 is not possible: input should be greater than or equal to 1",
    ("--n-trials", "many"): "Invalid value for '--n-trials': Input should be a valid integer",
    ("--max-epoch", "3"): "--max-epochs",
    ("--config", "nowhere.toml"): "error: nowhere.toml: cannot read the configuration: No such file or directory",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_a_mistake_on_the_command_line(flags, shell, data):
    shell.write("small.toml", settings(data))
    typed = shell("search", "--config", "small.toml", *flags, code=2)
    assert FLAGS[flags] in typed.err
    assert typed.out == ""


def test_a_format_without_widths(shell, data):
    lines = settings(data).splitlines()
    shell.write("bare.toml", "\n".join(line for line in lines if "_width = [" not in line))
    typed = shell("search", "--config", "bare.toml", code=2)
    assert "search.search_space.seed.linear: every site stays in float: no operand has a width" in typed.err


def test_no_mistake_costs_the_trials_of_an_earlier_search(searched):
    store = searched.folder / "runs/small/trials.sqlite"
    before, best = rows(store), (searched.folder / "runs/small/best.json").read_bytes()
    for flags in (["--load-name", "nope.pt"], ["--sampler", "tpee"], ["--max-size", 3]):
        searched("search", "--config", "small.toml", "--restart", *flags, code=2)
        assert rows(store) == before
        assert (searched.folder / "runs/small/best.json").read_bytes() == best


def test_places_that_cannot_be_written_to(shell):
    typed = shell("init", "--output", "nowhere/x.toml", code=2)
    assert typed.err == "error: nowhere/x.toml: cannot be written: No such file or directory\n"
    typed = shell("init", "--output", ".", "--force", code=2)
    assert "Is a directory" in typed.err


def test_two_configurations(shell, data):
    shell.write("small.toml", settings(data))
    typed = shell("plan", "small.toml", "--config", "other.toml", code=2)
    assert "there are two configuration files, small.toml and --config other.toml; give one" in typed.err
    assert "36 distinct candidates" in shell("plan", "small.toml").out


def test_a_file_without_a_search(shell, data):
    shell.write("top.toml", settings(data).split("[search")[0])
    typed = shell("search", "--config", "top.toml", code=2)
    assert "there is no [search] in this configuration; `bitfront init` writes one that runs" in typed.err


def test_a_verb_that_does_not_exist(shell):
    typed = shell("serch", code=2)
    assert "No such command 'serch'" in typed.err
    typed = shell("list", "modles", code=2)
    assert "there is nothing called 'modles' to list; allowed: models, " in typed.err
    assert "Did you mean 'models'?" in typed.err
    typed = shell("transform", code=2)
    assert typed.err == "error: give either --run RUN --trial N, or --config FILE\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run", "x"], "error: give --run RUN --trial N, or --config FILE, or neither\n"),
        (["--csv", "--json"], "error: give --csv or --json, not both\n"),
        (["--batch", "0"], "error: a batch of 0 samples is not possible; allowed: 1 or more\n"),
        (["--run", "x", "--trial", "1"], "error: x: there is no such run folder\n"),
        (["--run", "x", "--trial", "1", "--seed", "1"], "leave out --seed\n"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_what_analyze_refuses(shell, words, message):
    assert shell("analyze", *words, code=2).err.endswith(message)
