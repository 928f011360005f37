"""Models and metrics whose code does what it should not: a candidate that fails, and never a search that ends."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from journey import rows, settings

pytestmark = pytest.mark.journey

#: A model that does SOMETHING where its first layer is coarse. It cannot be traced, so each candidate runs its code.
MODEL = """\
import os, signal, sys, time
import torch.nn.functional as F
from torch import nn


class Rude(nn.Module):
    def __init__(self, *_):
        super().__init__()
        self.fc1 = nn.Linear(16, 12)
        self.fc2 = nn.Linear(12, 5)

    def forward(self, x):
        exact = F.linear(x, self.fc1.weight, self.fc1.bias)
        if (self.fc1(x) - exact).abs().max() > 2.0:
            SOMETHING
        return self.fc2(F.relu(self.fc1(x)))
"""


def rude(shell, data, something, inputs="[4, 8]", **options):
    shell.write("rude.py", MODEL.replace("SOMETHING", something))
    text = settings(data, model="rude:Rude", by="name", sites="fc1", **options)
    return shell.write("rude.toml", text.replace("data_in_width = [4, 8]", f"data_in_width = {inputs}"))


def failures(shell):
    return {row[2] for row in rows(shell.folder / "runs/small/trials.sqlite")} - {""}


@pytest.mark.parametrize(
    ("something", "error"),
    [
        ("sys.exit()", "SystemExit"),
        ("sys.exit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise GeneratorExit('gone')", "GeneratorExit: gone"),
        ("raise BaseException", "BaseException"),
        ("raise StopIteration('over')", "RuntimeError: generator raised StopIteration"),
        ("raise ValueError('[/x] ' + chr(27) + '[31m' + chr(0xd800) + '\\nmore')", "ValueError: [/x]  [31m?"),
    ],
)
def test_what_would_end_the_program_is_a_failed_candidate(shell, data, something, error):
    rude(shell, data, something)
    typed = shell("search", "--config", "rude.toml")
    assert "6 of 6 candidates evaluated (space exhausted)" in typed.out
    assert failures(shell) == {error}
    assert f"candidates failed; the first with: {error}" in typed.out or "1 candidate failed" in typed.out


def test_so_it_is_in_worker_processes(shell, data):
    rude(shell, data, "raise KeyboardInterrupt")
    typed = shell("search", "--config", "rude.toml", "--n-jobs", 2)
    assert "6 of 6 candidates evaluated (space exhausted)" in typed.out
    assert failures(shell) == {"KeyboardInterrupt"}


def test_the_text_of_an_error_is_cut(shell, data):
    rude(shell, data, "raise ValueError('x' * 10_000_000)")
    typed = shell("search", "--config", "rude.toml")
    (error,) = failures(shell)
    assert error == "ValueError: " + "x" * (10_000 - 12) + " ... (cut at 10 kB)"
    assert len(typed.out) < 50_000


def test_a_model_that_always_leaves_is_named(shell, data):
    rude(shell, data, "pass")
    text = (shell.folder / "rude.py").read_text().replace("super().__init__()", "sys.exit(0)")
    shell.write("rude.py", text)
    typed = shell("search", "--config", "rude.toml", code=1)
    assert typed.err.endswith(
        "error: the code of a model or metric raised SystemExit: 0, which would end the program; remove that\n"
    )


NOISY = """print('noise'); print('noise', file=sys.__stdout__); os.write(1, b'noise\\n'); os.system('echo noise')
        if True:
            pass"""


@pytest.mark.sampled(2)
@pytest.mark.parametrize("more", [[], ["--n-jobs", "2"]], ids=["one process", "several"])
def test_json_is_alone_on_standard_output(shell, data, more):
    rude(shell, data, "pass")
    text = (shell.folder / "rude.py").read_text().replace("exact = F", f"{NOISY}\n        exact = F")
    shell.write("rude.py", "import atexit\natexit.register(print, 'noise')\nprint('noise')\n" + text)
    for verb in (["search", *more], ["test"], ["plan"]):
        typed = shell(*verb, "--config", "rude.toml", "--json", cold=verb == ["test"])
        assert typed.out.startswith("{")
        json.loads(typed.out)
        assert "noise" in typed.err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
@pytest.mark.parametrize("something", ["", "\n                raise ValueError"], ids=["goes on", "raises"])
def test_a_process_that_a_model_forks_does_not_search_too(shell, data, something):
    fork = f"child = os.fork()\n            if child: os.waitpid(child, 0)\n            else:{something or ' pass'}"
    rude(shell, data, fork)
    typed = shell("search", "--config", "rude.toml", "--json")
    assert json.loads(typed.out)["trials"] == 6
    assert typed.err.count("searched: 6 candidates") == 1
    assert len(rows(shell.folder / STORE)) == 6
    assert not failures(shell)


@pytest.mark.parametrize("something", ["sys.stdout.close()", "sys.stderr.close()"])
def test_a_model_closes_what_it_prints_to(shell, data, something):
    rude(shell, data, something)
    assert json.loads(shell("search", "--config", "rude.toml", "--json").out)["trials"] == 6
    assert not failures(shell)


def test_warnings_that_a_model_turns_into_errors(shell, data):
    rude(shell, data, "__import__('warnings').simplefilter('error')")
    typed = shell("search", "--config", "rude.toml", "--json", cold=True)
    assert json.loads(typed.out)["trials"] == 6
    assert "Warning" not in typed.err


def test_without_json_a_model_may_print(shell, data):
    rude(shell, data, "pass")
    text = (shell.folder / "rude.py").read_text().replace("exact = F", f"{NOISY}\n        exact = F")
    shell.write("rude.py", text)
    shell("train", "--config", "rude.toml")
    assert "noise" in shell("test", "--config", "rude.toml").out


@pytest.mark.sampled(2)
@pytest.mark.parametrize("more", [["--json"], []])
def test_the_reader_of_the_output_has_gone(trained, more):
    """As in ``bitfront test --json | head -0``."""
    command = [sys.executable, "-m", "bitfront", "list", "models", *more]
    process = subprocess.Popen(
        command, cwd=trained.folder, env=trained.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1


NAMES = ["[/x]", "[bold]red"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NAMES)
def test_names_that_look_like_markup(trained, name):
    folder = trained.folder / name
    folder.mkdir(parents=True)
    file = f"{name}/small.toml"
    (trained.folder / file).write_text((trained.folder / "small.toml").read_text())
    flags = ["--config", file, "--project-dir", name]
    assert f"configuration: {file}" in trained("search", *flags).err
    assert f"{name}/small/checkpoints/" in trained("train", *flags).out
    assert "candidates" in trained("plan", *flags).out
    assert "accuracy" in trained("test", *flags).out
    run = f"{name}/small"
    assert f"saved to {run}" in trained("transform", "--run", run, "--trial", 0).out
    assert "fc1" in trained("analyze", "--run", run, "--trial", 0).out
    assert f"{run}/trials.csv" in trained("convert", run, "--to", "csv").out
    assert (
        f"wrote {name}/new.toml; now: bitfront search --config {name}/new.toml\n"
        == trained("init", "-o", f"{name}/new.toml").out
    )
    typed = trained("search", "--config", f"{name}/none.toml", code=2)
    assert f"{name}/none.toml" in typed.err
    typed = trained("report", f"{name}/none", code=2)
    assert f"{name}/none" in typed.err


STORE = "runs/small/trials.sqlite"
#: How the error of a candidate begins that ends its process.
ENDED = "the process of this candidate was ended: it ended its worker, 3 times"


def reference(shell, data, **options):
    """(code → metrics of the candidates that do nothing bad, how many are bad), from a search whose model only raises."""
    rude(shell, data, "raise ValueError", project="reference", **options)
    shell("search", "--config", "rude.toml")
    found = rows(shell.folder / "runs/reference/trials.sqlite")
    return {row[1]: row[3:] for row in found if not row[2]}, sum(bool(row[2]) for row in found)


def check_whole(shell, expected, error):
    """Every candidate is there once; the bad ones have failed with `error`, the others have their numbers."""
    fine, bad = expected
    found = rows(shell.folder / STORE)
    assert len({row[1] for row in found}) == len(found) == len(fine) + bad
    assert {row[1]: row[3:] for row in found if not row[2]} == fine
    errors = [row[2] for row in found if row[2]]
    assert len(errors) == bad > 0
    assert all(text.startswith(error) for text in errors), errors


@pytest.mark.long
@pytest.mark.slow
def test_a_candidate_that_ends_its_process_is_passed_by(shell, data):
    """In one process the search dies with it; the next one knows which it was."""
    expected = reference(shell, data)
    rude(shell, data, "os._exit(0)")
    typed = shell.finish(shell.start("search", "--config", "rude.toml"), code=None)
    assert "candidates evaluated" not in typed.out
    typed = shell("search", "--config", "rude.toml")
    assert "being evaluated when a process ended; now they are evaluated in another process" in typed.err
    check_whole(shell, expected, ENDED)
    assert f"{expected[1]} candidates failed; the first with: {ENDED}" in typed.out
    assert "6 of 6 candidates evaluated" in shell("search", "--config", "rude.toml").out


@pytest.mark.long
@pytest.mark.slow
def test_in_worker_processes_it_is_passed_by_at_once(shell, data):
    expected = reference(shell, data)
    rude(shell, data, "os.kill(os.getpid(), signal.SIGSEGV)")
    typed = shell("search", "--config", "rude.toml", "--n-jobs", 2)
    check_whole(shell, expected, f"{ENDED} (killed by SIGSEGV)")
    assert "6 of 6 candidates evaluated" in typed.out


@pytest.mark.slow
def test_a_candidate_that_hangs_is_ended(shell, data):
    """It holds Python's lock for ever, so that neither a signal nor a thread gets through. One of three does, as each
    needs a worker for the block that it is in, and one for itself."""
    expected = reference(shell, data, inputs="[8]")
    rude(shell, data, "sum(__import__('itertools').repeat(0))", inputs="[8]")
    typed = shell("search", "--config", "rude.toml", "--candidate-timeout", 0.5)
    check_whole(
        shell, expected, "the process of this candidate was ended: it took longer than candidate_timeout = 0.5 s"
    )
    assert "3 of 3 candidates evaluated" in typed.out


def test_a_time_limit_needs_a_positive_number(shell, data):
    rude(shell, data, "pass")
    typed = shell("search", "--config", "rude.toml", "--candidate-timeout", 0, code=2)
    assert "--candidate-timeout" in typed.err
    assert "greater than 0" in typed.err


#: Once there are trials, and where STUCK is set, it holds on to the process whatever is raised, and says so in a file.
STUBBORN = """\
import contextlib, os, sqlite3, time
import torch.nn.functional as F
from torch import nn

def trials():
    try:
        with contextlib.closing(sqlite3.connect("file:runs/small/trials.sqlite?mode=ro", uri=True)) as db:
            return db.execute("SELECT count(*) FROM blocks").fetchone()[0]
    except sqlite3.Error:
        return 0  # not there yet

class Stubborn(nn.Module):
    def __init__(self, *_):
        super().__init__()
        self.fc1 = nn.Linear(16, 12)
        self.fc2 = nn.Linear(12, 5)

    def forward(self, x):
        if float(x.sum()) > -1e30 and os.environ.get("STUCK") and trials():
            open("stuck", "w").close()
            while True:
                try:
                    time.sleep(1000)
                except BaseException:
                    pass
        return self.fc2(F.relu(self.fc1(x)))
"""


@pytest.mark.sampled(2)
@pytest.mark.parametrize("more", [[], ["--n-jobs", "2"]], ids=["one process", "several"])
def test_ctrl_c_twice_ends_everything(shell, data, more):
    """Also where the user's code catches everything. What was finished is kept, and the same command goes on."""
    shell.write("rude.py", STUBBORN)
    shell.write("rude.toml", settings(data, model="rude:Stubborn"))
    shell("search", "--config", "rude.toml", "--project", "reference")
    process = shell.start("search", "--config", "rude.toml", *more, STUCK="yes")
    while not (shell.folder / "stuck").exists():
        assert process.poll() is None, shell.finish(process, code=None)
        time.sleep(0.02)
    kept = rows(shell.folder / STORE)
    assert 0 < len(kept) <= 36
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.3)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    shell.finish(process, code=130)
    # Another worker may have ended what came before.
    assert rows(shell.folder / STORE)[: len(kept)] == kept
    typed = shell("search", "--config", "rude.toml")
    assert "36 of 36 candidates evaluated" in typed.out
    assert rows(shell.folder / STORE) == rows(shell.folder / "runs/reference/trials.sqlite")
