"""A command line for the journeys, and a small search to type into it.

Nothing here waits forever, and what went wrong is said with everything the command printed.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import bitfront
from bitfront.engine.storage.store import read
from bitfront.errors import BitfrontError
from warm import Started, Warm

#: Seconds after which a command is taken to hang; far above what any takes on a busy machine.
PATIENCE = 240
#: Where the package stands that the tests import: the commands run that one, also from a second checkout.
SOURCE = Path(bitfront.__file__).parents[1]
#: Where Matplotlib keeps its list of fonts, which takes longer to make than any figure.
FONTS = Path(tempfile.gettempdir()) / f"bitfront-fonts-{os.getuid()}"

#: Cannot be traced, so its candidates are evaluated one by one; where `SLOWLY` is set, each takes its time on any machine.
SLOW_NET = """
import os, time
from bitfront.models.digits import DigitsMLP

class Slow(DigitsMLP):
    def forward(self, x):
        if not self.training and float(x.sum()) > -1e30:
            time.sleep(float(os.environ.get("SLOW_SECONDS", 0)))
        return super().forward(x)

def net(sample_shape, num_classes):
    return Slow(*sample_shape, num_classes)
"""
#: The environment of a command that is to be stopped in the middle.
SLOWLY = {"SLOW_SECONDS": "0.03"}


@dataclass(frozen=True)
class Typed:
    """A finished command."""

    line: str
    code: int
    out: str
    err: str

    def __str__(self):
        return f"$ {self.line}\n--- exit code {self.code}, standard output:\n{self.out}--- standard error:\n{self.err}"


#: Types several lines in one process.
TYPING = """if True:
    import contextlib, io, json, sys
    from bitfront import cli
    typed = []
    for line in sys.argv[1:]:
        sys.argv[1:] = line.split()
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as end:
                code = end.code or 0
        typed.append((code, out.getvalue(), err.getvalue()))
    print(json.dumps(typed))
"""


class Shell:
    """Types commands in a folder, with a private home and cache, and without settings of the user."""

    def __init__(self, folder: Path, warm: Warm | None = None, kernels: Sequence[Path] = (), **env: str):
        """With `warm`, commands are forked from a process that has torch imported, unless a cold start is asked for; with
        `kernels`, they find these compiled."""
        self.folder, self.warm = folder, warm
        for library in kernels:
            (folder / "cache").mkdir(exist_ok=True)
            shutil.copy(library, folder / "cache")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("BITFRONT_", "PYTHON", "COLUMNS"))}
        private = {"OMP_NUM_THREADS": "1", "BITFRONT_CACHE": str(folder / "cache"), "HOME": str(folder)}
        private |= {"PYTHONPATH": str(SOURCE), "MPLCONFIGDIR": str(FONTS)}
        self.env = {**kept, **private, **env}
        self.running: list[subprocess.Popen[str] | Started] = []

    def __call__(self, *words: object, code: int | None = 0, before: str = "", cold: bool = False) -> Typed:
        """Type ``bitfront *words`` and wait for it; `before` is what the shell does first, e.g. ``ulimit -f 40``.

        Whatever happens, nobody wants to read a traceback.
        """
        process = self.start(*words, before=before, cold=cold)
        return self.finish(process, code=code)

    def start(
        self, *words: object, before: str = "", cold: bool = False, **env: str
    ) -> "subprocess.Popen[str] | Started":
        """Type ``bitfront *words`` with `env` set, and leave it running, in a new process group."""
        if self.warm is not None and not before and not cold:
            process = self.warm.start(["-m", "bitfront", *map(str, words)], self.folder, {**self.env, **env})
            self.running.append(process)
            return process
        command = [sys.executable, "-m", "bitfront", *map(str, words)]
        if before:
            command = ["bash", "-c", f'{before} && exec "$@"', "bash", *command]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.running.append(process)
        return process

    def finish(self, process: "subprocess.Popen[str] | Started", *, code: int | None = 0) -> Typed:
        """Wait for a command and take its output; `code` is the exit code it must have, None for any."""
        line = "bitfront " + " ".join(process.args[process.args.index("bitfront") + 1 :])
        try:
            out, err = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"this did not end within {PATIENCE} s:\n{Typed(line, -9, out, err)}")
        typed = Typed(line, process.returncode, out, err)
        assert "Traceback" not in err, f"nobody wants to read a traceback:\n{typed}"
        if code is not None:
            assert typed.code == code, f"the exit code should be {code}:\n{typed}"
        return typed

    def python(self, program: str, *words: object, cold: bool = False) -> str:
        """Standard output of a Python program in a new process."""
        if self.warm is not None and not cold:
            process = self.warm.start(["-c", program, *map(str, words)], self.folder, self.env)
            self.running.append(process)
            out, err = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, err
            return out
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, words)],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def together(self, *lines: str, before: str = "") -> list[tuple[int, str, str]]:
        """(exit code, standard output, standard error) of several lines that are typed in one process, after the Python
        of `before`."""
        return [tuple(answer) for answer in json.loads(self.python(f"{before}\n{TYPING}", *lines))]

    def write(self, name: str, text: str) -> Path:
        """Write a file into the folder."""
        (self.folder / name).write_text(text, encoding="utf-8")
        return self.folder / name

    def end(self) -> None:
        """End whatever still runs."""
        for process in self.running:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def rows(store: Path) -> list[tuple[object, ...]]:
    """What is in a store of trials, except for how long it took: (number, code, error, *metrics) of each.

    Empty while there is none.
    """
    try:
        opened = read(store)
    except BitfrontError:
        return []
    with contextlib.closing(opened):
        trials = opened.trials()
    metrics = [[None if math.isnan(v) else v for v in column.tolist()] for column in trials.metrics.values()]
    errors = [trials.errors.get(n, "") for n in trials.number.tolist()]
    return list(zip(trials.number.tolist(), map(tuple, trials.code.tolist()), errors, *metrics, strict=True))


def wait_for_rows(store: Path, number: int, shell: Shell, process: "subprocess.Popen[str] | Started") -> int:
    """Wait until `process` has written that many trials; how many there are."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        count = len(rows(store))
        if count >= number:
            return count
        if process.poll() is not None:
            pytest.fail(f"it ended before it had written {number} trials:\n{shell.finish(process, code=None)}")
        time.sleep(0.02)
    pytest.fail(f"there were not {number} trials in {store} after {PATIENCE} s")


def settings(
    data: Path,
    *,
    model: str = "digits-mlp",
    project: str = "small",
    by: str = "type",
    sites: str = "linear",
    weights: str = "[2, 4, 8]",
    top: str = "",
    strategy: str = 'name = "brute_force"',
) -> str:
    """The text of a small search: one or two linear layers of a model on `data`."""
    return f"""\
model = "{model}"
dataset = "npz"
dataset_path = "{data}"
project = "{project}"
max_epochs = 2
batch_size = 64
learning_rate = 1e-2
accelerator = "cpu"
{top}

[search.search_space.setup]
by = "{by}"

[search.search_space.seed.default.config]
name = ["NA"]

[search.search_space.seed.{sites}.config]
name = ["integer"]
data_in_width = [4, 8]
data_in_frac_width = ["auto"]
weight_width = {weights}
weight_frac_width = ["auto"]
bias_width = [8]
bias_frac_width = ["auto"]

[search.strategy]
{strategy}

[search.strategy.sw_runner.basic_evaluation]
data_loader = "val_dataloader"

[search.strategy.hw_runner.average_bitwidth]
compare_to = 32

[search.strategy.metrics]
accuracy.scale = 1.0
accuracy.direction = "maximize"
average_bitwidth.scale = 0.2
average_bitwidth.direction = "minimize"
"""
