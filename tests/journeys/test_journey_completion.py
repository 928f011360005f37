"""What the command offers to the shell for completion, asked in the protocol of its scripts, in fresh processes."""

import subprocess
import sys
from pathlib import Path

import pytest

from bitfront import listing
from bitfront.cli import completing
from bitfront.data import DATASETS
from bitfront.models import MODELS
from bitfront.registry import names_in_source
from bitfront.strategies import STRATEGIES
from bitfront.strategies.learned_bits import LearnedBits
from bitfront.strategies.optuna import SAMPLERS
from bitfront.template import TARGETS

pytestmark = pytest.mark.journey
#: The protocol depends on the command's name.
BITFRONT = Path(sys.executable).parent / "bitfront"


@pytest.fixture
def complete(shell):
    """(line, shell) -> what that shell is offered for its last word. Nothing slow may be imported for it."""

    def ask(line, kind="bash"):
        words = line.split(" ")
        line_variables = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
        if kind != "bash":
            line_variables = {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        env = {**shell.env, **line_variables, "_BITFRONT_COMPLETE": f"complete_{kind}", "PYTHONPROFILEIMPORTTIME": "1"}
        done = subprocess.run([BITFRONT], env=env, cwd=shell.folder, capture_output=True, text=True, check=False)
        imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
        assert not {"torch", "optuna", "numpy"} & imported
        assert "Traceback" not in done.stderr
        return done.stdout.split()

    return ask


def test_subcommands_options_and_names(complete, shell):
    (shell.folder / "runs" / "mine").mkdir(parents=True)
    (shell.folder / "runs" / "mine" / "trials.sqlite").touch()
    (shell.folder / "runs" / "nothing").mkdir()
    assert complete("bitfront ")[:3] == ["search", "compare", "plan"]
    assert complete("bitfront search --tens") == ["--tensorboard"]
    assert complete("bitfront search --model jsc-t") == [
        "jsc-three-linear-layers",
        "jsc-three-linears",
        "jsc-tiny",
        "jsc-toy",
    ]
    assert complete("bitfront plan --accelerator c") == ["cpu", "cuda"]
    assert complete("bitfront init --dataset ") == DATASETS.names()
    assert complete("bitfront compare --strategy optuna:n") == ["optuna:nsgaii", "optuna:nsgaiii"]
    assert complete("bitfront compare --strategy e") == ["evolution"]
    assert complete("bitfront convert ") == ["mine"]
    assert complete("bitfront convert mine --to p") == ["parquet"]
    assert complete("bitfront list sa") == ["samplers"]
    assert complete("bitfront list o") == ["operations"]


def test_other_shells(complete):
    assert complete("bitfront convert mine --to ", "fish") == ["csv", "parquet", "optuna"]
    assert "digits-cnn" in "".join(complete("bitfront search --model digits-c", "zsh"))


def test_completion_knows_what_the_code_knows():
    for room, registry in (("models", MODELS), ("data", DATASETS), ("strategies", STRATEGIES)):
        assert names_in_source(f"bitfront.{room}") == registry.names()
    assert tuple(SAMPLERS) == completing.SAMPLERS
    assert tuple(LearnedBits.variants) == completing.GRANULARITIES
    assert tuple(listing.ROOMS) == completing.ROOMS
    assert tuple(TARGETS) == completing.TARGETS


def test_a_shell_is_shown_its_script(shell):
    script = shell.folder / "show.sh"
    script.write_text(f'"{BITFRONT}" --show-completion\n"{BITFRONT}" --install-completion\n')
    done = subprocess.run(
        ["bash", script], env=shell.env, cwd=shell.folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "_BITFRONT_COMPLETE=complete_bash" in done.stdout
    assert "complete_bash" in (shell.folder / ".bash_completions" / "bitfront.sh").read_text()
