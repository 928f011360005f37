"""Small searches whose every trial is pinned: what a change of the code's structure must not change.

``python tests/golden/runs.py FOLDER`` writes what each of them gives into one file: its trials, its
``best.json`` and its printed tables. ``--against FOLDER`` compares with what another checkout wrote on this machine, with
``PYTHONPATH`` set to its ``src``. ``test_golden.py`` compares with the files in ``expected``.
"""

import argparse
import contextlib
import difflib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

#: Written here so that nothing is shared with the journeys, whose settings may change.
HEAD = """\
model = "{model}"
dataset = "npz"
dataset_path = "{data}"
project = "golden"
max_epochs = 2
batch_size = 64
learning_rate = 1e-2
accelerator = "cpu"
"""

FORMATS = """
[{at}setup]
by = "type"

[{at}seed.default.config]
name = ["NA"]

[{at}seed.linear.config]
name = ["integer"]
data_in_width = [4, 6, 8]
data_in_frac_width = ["auto"]
weight_width = [2, 3, 4, 8]
weight_frac_width = ["auto"]
bias_width = [8]
bias_frac_width = ["auto"]
"""

AFFINE = """
[search.search_space.setup]
by = "type"

[search.search_space.seed.linear.config]
name = ["affine", "integer", "NA"]
data_in_width = [4, 8]
weight_width = [3, 8]
bias_width = [8]

[search.search_space.seed.relu.config]
name = ["integer", "NA"]
data_in_width = [6]
"""

CONVOLUTIONS = """
[search.search_space.setup]
by = "type"

[search.search_space.seed.conv2d.config]
name = ["integer"]
data_in_width = [4, 8]
data_in_frac_width = ["auto"]
weight_width = [2, 4, 8]
weight_frac_width = ["auto"]
bias_width = [8]
bias_frac_width = ["auto"]

[search.search_space.seed.linear.config]
name = ["integer"]
data_in_width = [4, 8]
data_in_frac_width = ["auto"]
weight_width = [4, 8]
weight_frac_width = ["auto"]
bias_width = [8]
bias_frac_width = ["auto"]
"""

WIDTHS = """
[search.search_space]
name = "joint"

[search.search_space.widths.seed.default.config]
name = ["output_only"]
channel_multiplier = [0.5, 1, 1.5]
"""

METRICS = """
[search.strategy]
name = "{strategy}"

[search.strategy.setup]
n_trials = {trials}

[search.strategy.sw_runner.basic_evaluation]

[search.strategy.hw_runner.average_bitwidth]
compare_to = 32

[search.strategy.hw_runner.ebops]

[search.strategy.metrics]
accuracy.direction = "maximize"
average_bitwidth.scale = 0.2
average_bitwidth.direction = "minimize"
"""

TRAIN = """
[search.strategy.sw_runner.basic_train]
max_epochs = 6
learning_rate = 0.005
"""

HALVING = TRAIN + "halving = {rungs = [1, 3], keep = 0.4, cohort = 8}\n"

FINETUNE = """
[search.finetune]
trials = 2
max_epochs = 3
learning_rate = 0.003
"""

CONSTRAINTS = """
[search.constraints]
accuracy_drop = "<= 5 %"
ebops = "<= 60000"
"""

#: The bound of CONSTRAINTS is of EBOPs with signs, without biases.
SIGNED = ("hw_runner.ebops]\n", "hw_runner.ebops]\nsign_bits = true\nbiases = false\n")

SAMPLERS = ("tpe", "nsgaii", "random")
PLAIN = FORMATS.format(at="search.search_space.")
JOINT = WIDTHS + FORMATS.format(at="search.search_space.quantize.")


def settings(strategy: str, trials: int, space: str = PLAIN, more: str = "") -> str:
    """The tables behind the head; `strategy` is a strategy's name, or that of one of Optuna's samplers."""
    text = space + METRICS.format(strategy=strategy, trials=trials) + more
    if strategy in SAMPLERS:
        text = text.replace(f'name = "{strategy}"', 'name = "optuna"')
        text = text.replace("n_trials =", f'sampler = "{strategy}"\nn_trials =')
    return text


#: name → (model, what follows the head of the file, the command's further words).
RUNS = {
    "brute-force": ("digits-mlp", settings("brute_force", 144), "search"),
    "affine": ("digits-mlp", settings("brute_force", 400, AFFINE), "search"),
    "convolutions": ("digits-cnn", settings("brute_force", 100, CONVOLUTIONS), "search"),
    "evolution": ("digits-mlp", settings("evolution", 60), "search"),
    "tpe": ("digits-mlp", settings("tpe", 40), "search"),
    "nsgaii": ("digits-mlp", settings("nsgaii", 60), "search"),
    "random": ("digits-mlp", settings("random", 30, CONVOLUTIONS.replace("conv2d", "relu")), "search"),
    "constraints": ("digits-mlp", settings("evolution", 60, more=CONSTRAINTS).replace(*SIGNED), "search"),
    "compare": (
        "digits-mlp",
        settings("brute_force", 40),
        "compare --strategy brute_force --strategy evolution --strategy optuna:tpe --seeds 2",
    ),
    "halving": ("digits-mlp", settings("evolution", 24, more=HALVING), "search"),
    "joint": ("digits-mlp", settings("evolution", 24, JOINT, TRAIN), "search"),
    "finetuning": ("digits-mlp", settings("brute_force", 144, more=FINETUNE), "search"),
}
#: Those with sums that float32 rounds: their bits depend on the instructions that the processor has.
INEXACT = ("affine", "convolutions", "halving", "joint", "finetuning")


def write_data(path: Path) -> None:
    """Five classes of noisy 8 × 8 images, as .npz."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 1, 8, 8))
    arrays = {}
    for split, number in (("train", 1500), ("val", 800), ("test", 800)):
        y = rng.permutation(np.arange(number) % 5)
        arrays[f"X_{split}"] = (centres[y] + 2.2 * rng.normal(size=(number, 1, 8, 8))).astype(np.float32)
        arrays[f"y_{split}"] = y
    np.savez(path, **arrays)


#: (arguments of Python, folder, environment) → (exit code, standard output, standard error).
Python = Callable[[list[str], Path, dict[str, str]], tuple[int, str, str]]


def cold(arguments: list[str], folder: Path, env: dict[str, str]) -> tuple[int, str, str]:
    """``python ARGUMENTS`` in a new process."""
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def typed(words: str, folder: Path, python: Python) -> str:
    """The tables that ``bitfront WORDS`` prints in `folder`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    code, out, err = python(["-m", "bitfront", *words.split()], folder, env)
    if code:
        raise SystemExit(f"bitfront {words}: exit code {code}\n{out}{err}")
    return "".join(table(out.splitlines(keepends=True)))


def table(lines: list[str]) -> Iterator[str]:
    """The tables among printed lines, without the columns that depend on the clock."""
    timed: set[int] = set()
    for line, above in zip(lines, ["", *lines], strict=False):
        if line.startswith("|"):
            cells = line.split("|")
            if not above.startswith("|"):
                timed = {i for i, cell in enumerate(cells) if "seconds" in cell}
            yield "|".join(" TIME " if i in timed else cell for i, cell in enumerate(cells))


def trials(store: Path) -> str:
    """Every trial of a store, a line each, with all digits."""
    with contextlib.closing(sqlite3.connect(store)) as db:
        metrics = db.execute("SELECT value FROM meta WHERE key = 'metrics'").fetchone()[0]
        lines = [f"metrics {metrics}"]
        for first, count, codes, values, _ in db.execute(
            "SELECT first, count, codes, metrics, durations FROM blocks ORDER BY first"
        ):
            table = np.frombuffer(values, "<f8").reshape(-1, count)
            size = len(codes) // count
            for i in range(count):
                code = codes[i * size : (i + 1) * size].hex()
                lines.append(f"{first + i} {code} {' '.join(map(repr, table[:, i].tolist()))}")
        lines += [f"failed {row}" for row in db.execute("SELECT number, error FROM failures ORDER BY number")]
        lines += [
            f"test {row}"
            for row in db.execute("SELECT number, metric, value FROM test_results ORDER BY number, metric")
        ]
    return "\n".join(lines) + "\n"


def outcome(name: str, folder: Path, python: Python = cold) -> str:
    """What the run `name` gives, run in an empty `folder`: its trials, best.json and printed tables."""
    model, text, words = RUNS[name]
    write_data(folder / "data.npz")
    weights = Path(__file__).parent / f"{model}.pt"
    head = HEAD.format(model=model, data="data.npz")
    if weights.exists():
        shutil.copy(weights, folder)
        head += f'load_name = "{weights.name}"\nload_type = "pt"\n'
    (folder / "golden.toml").write_text(head + text)
    verb, *more = words.split()
    printed = typed(" ".join([verb, "--config", "golden.toml", *more]), folder, python)
    parts = [f"### printed\n{printed}"]
    for file in sorted((folder / "runs").rglob("*.sqlite")):
        parts.append(f"### {file.relative_to(folder)}\n{trials(file)}")
    for file in sorted((folder / "runs").rglob("best.json")):
        parts.append(f"### {file.relative_to(folder)}\n{file.read_text()}")
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--only", nargs="*", default=list(RUNS))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    differing = 0
    for name in given.only:
        work = Path(tempfile.mkdtemp())
        text = outcome(name, work)
        shutil.rmtree(work)
        (given.folder / f"{name}.txt").write_text(text)
        if given.against:
            before = (given.against / f"{name}.txt").read_text()
            print(f"{name}: {'the same' if before == text else 'DIFFERS'}")
            if before != text:
                differing += 1
                lines = list(difflib.unified_diff(before.splitlines(), text.splitlines(), lineterm="", n=0))
                print("\n".join(lines[:12]))
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
