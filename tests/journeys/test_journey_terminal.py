"""How the command prints, and what it ends with: colours, JSON alone on standard output, exit codes."""

import json
import os
import pty
import signal
import subprocess
import sys

import pytest
from journey import PATIENCE, settings, wait_for_rows

from bitfront.cli.printing import print_error

pytestmark = pytest.mark.journey


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({}, "error: [no] markup: here\n"),
        ({"FORCE_COLOR": "1"}, "\x1b[1;31merror:\x1b[0m [no] markup: here\n"),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, "\x1b[1merror:\x1b[0m [no] markup: here\n"),
    ],
)
def test_errors_are_red_where_colours_are_wanted(env, text, monkeypatch, capsys):
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", **env}.items():
        monkeypatch.setenv(name, value)
    print_error("error: [no] markup: here")
    assert capsys.readouterr().err == text


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_errors_are_red_on_a_terminal_and_results_are_not_mixed_with_them(shell):
    main, terminal = pty.openpty()
    env = {k: v for k, v in shell.env.items() if k not in ("NO_COLOR", "FORCE_COLOR")} | {"TERM": "xterm-256color"}
    command = [sys.executable, "-m", "bitfront", "search", "--config", "missing.toml"]
    done = subprocess.run(
        command, cwd=shell.folder, env=env, stdout=subprocess.PIPE, stderr=terminal, timeout=PATIENCE, check=False
    )
    os.close(terminal)
    seen = os.read(main, 65536).decode()
    os.close(main)
    assert (done.returncode, done.stdout) == (2, b"")
    assert seen.startswith("\x1b[1;31merror:\x1b[0m missing.toml")


def test_exit_codes(shell, data):
    """0 and 2 in most journeys; here what fails while it works, and what is interrupted."""
    shell.write("small.toml", settings(data, strategy='name = "optuna"\nsetup.sampler = "tpe"'))
    process = shell.start("search", "--config", "small.toml", "--json", cold=True)
    wait_for_rows(shell.folder / "runs/small/trials.sqlite", 3, shell, process)
    process.send_signal(signal.SIGINT)
    typed = shell.finish(process, code=130)
    assert json.loads(typed.out)["stopped"] == "interrupted"  # and nothing else on standard output


def test_json_is_all_there_is_on_standard_output(searched):
    """Of every subcommand that has it; notes and bars are elsewhere."""
    lines = (
        "search --config small.toml --json",
        "plan small.toml --json",
        "test --config small.toml --json",
        "transform --run small --trial 0 --json",
        "analyze --run small --trial 0 --json",
        "convert small --to csv --json",
        "list samplers --json",
    )
    for line, (code, out, _) in zip(lines, searched.together(*lines), strict=True):
        assert code == 0, line
        json.loads(out)
