"""Runs the code blocks of the documents, and compares their output with the text that the pages show.

- ``sh`` and ``python`` blocks are run in their order, all of a page in one folder.
- A block whose first line is a file name in a comment (``# mine.py``) is written to that file instead, also ``toml``.
- A ``text`` block directly after a block that is run shows its output; ``...`` in it stands for any lines. Numbers may
  differ, as they do between machines.

The tests run every page. ``docs/record.py`` updates the outputs and pictures of the tutorial.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"# ([\w.-]+\.(?:py|toml))$", re.M)
NUMBER = re.compile(r"\d[\d,]*(\.\d+)?(e[+-]?\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page and line, and the span of its content in the text of the page."""

    page: str
    line: int
    language: str
    text: str
    start: int
    end: int

    @property
    def file(self) -> str | None:
        """The file that it is written to, if any."""
        name = NAMED.match(self.text)
        return name[1] if name and self.language in ("python", "toml") else None

    @property
    def runs(self) -> bool:
        """Whether it is run where it stands."""
        return self.language in ("sh", "python") and self.file is None


def blocks(page: str) -> list[Block]:
    """The blocks of a page, given by its path from the root."""
    text = (ROOT / page).read_text(encoding="utf-8")
    matches = re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.M | re.S)
    return [Block(page, text[: m.start()].count("\n") + 1, m[1], m[2], *m.span(2)) for m in matches]


def outputs(page: list[Block]) -> dict[Block, Block]:
    """Block that is run → the ``text`` block directly after it."""
    return {
        block: after
        for block, after in itertools.pairwise(page)
        if block.runs and after.language == "text" and after.line == block.line + block.text.count("\n") + 3
    }


#: (command, folder, environment) → (exit code, what it prints to both streams).
Typing = Callable[[list[str], Path, dict[str, str]], tuple[int, str]]


def typed(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Run a command in a new process."""
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    return done.returncode, done.stdout


def run(block: Block, folder: Path, typed: Typing = typed) -> str:
    """Run a block in `folder`, and return what it prints to both streams; or write its file there.

    Args:
        typed: runs a command; the tests use a faster one.

    Raises:
        AssertionError: a command failed.
    """
    if block.file is not None:
        (folder / block.file).write_text(block.text, encoding="utf-8")
    if not block.runs:
        return ""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
    }
    printed = ""
    for command in _commands(block):
        if command[:2] == ["bitfront", "dashboard"]:
            _serves_until_interrupted(command, folder, environment)
            continue
        code, said = typed(command, folder, environment)
        assert code == 0, f"{block.page}:{block.line}: {command}\n{said}"
        printed += said
    return printed


def _serves_until_interrupted(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Run a server on any free port, without a browser, until it has answered once."""
    command = [*command, "--port", "0", "--no-browser"]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            with urllib.request.urlopen(address, timeout=60) as page:
                assert page.status == 200
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def _commands(block: Block) -> list[list[str]]:
    if block.language == "python":
        return [[sys.executable, "-W", "error", "-c", block.text]]
    lines = [line.split("#")[0].strip() for line in block.text.splitlines()]
    commands = [shlex.split(line) for line in lines if line]
    for i, command in enumerate(commands):
        # Do not install again or start the tests from a test; only check that the target exists.
        if command[0] == "make":
            commands[i] = ["make", "-n", "-C", str(ROOT), *command[1:]]
        if command[0].startswith(".venv/"):
            commands[i] = [str(Path(sys.executable).parent / Path(command[0]).name), "--version"]
    return commands


def shape(line: str) -> str:
    """A line without what may differ between machines: numbers, spaces, repeats of a phrase."""
    line = re.sub(r"\s+", " ", NUMBER.sub("#", line)).strip()
    line = re.sub(r"-{3,}", "---", line)
    return re.sub(r"(?<= )([^,]{3,})(?:, \1)+(?: and # more)?", r"\1", line)


def unprinted(shown: str, printed: str) -> list[str]:
    """Lines of a ``text`` block that were not printed."""
    there = {shape(line) for line in printed.splitlines()}
    return [line for line in shown.splitlines() if line.strip() != "..." and shape(line) not in there]


def renewed(shown: str, printed: str) -> str:
    """A ``text`` block with the new output: all of it, or, if the block has gaps, the lines that it showed before.

    Raises:
        ValueError: a line of the block is not printed any more.
    """
    lines = [line.rstrip() for line in printed.splitlines()]
    if "..." not in shown.splitlines():
        return "\n".join(lines) + "\n"
    new = []
    for line in shown.splitlines():
        if line.strip() == "...":
            new.append(line)
            continue
        alike = [i for i, other in enumerate(lines) if shape(other) == shape(line)]
        if not alike:
            raise ValueError(f"not printed any more: {line}")
        # Of the rows of a table, take that of the same trial if there is one.
        at = next((i for i in alike if _first_number(lines[i]) == _first_number(line)), alike[0])
        new.append(lines[at])
        lines = lines[at + 1 :]
    return "\n".join(new) + "\n"


def _first_number(line: str) -> str:
    number = NUMBER.search(line)
    return number[0] if number else ""
