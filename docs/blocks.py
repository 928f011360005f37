"""The code blocks of the documents: found, run, and compared with the outputs that are shown.

- ``sh`` and ``python`` blocks are run in their order, all of a page in one folder.
- One whose first line is a file's name in a comment (``# mine.py``) is written to that file instead, ``toml`` too.
- A ``text`` block right after one that is run is what was printed; ``...`` in it stands for any lines. Numbers may
  differ, as they do between machines.

The tests run every page. ``docs/record.py`` writes the outputs and pictures of the tutorial anew.
"""

from __future__ import annotations

import itertools
import os
import re
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
    """A fenced block: where it stands, and the span of its content in the page's text."""

    page: str
    line: int
    language: str
    text: str
    start: int
    end: int

    @property
    def file(self) -> str | None:
        """The file that it is the content of."""
        found = NAMED.match(self.text)
        return found[1] if found and self.language in ("python", "toml") else None

    @property
    def runs(self) -> bool:
        """Whether it is run where it stands."""
        return self.language in ("sh", "python") and self.file is None


def blocks(page: str) -> list[Block]:
    """Those of a page, given by its path from the root."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.M | re.S)
    return [Block(page, text[: m.start()].count("\n") + 1, m[1], m[2], *m.span(2)) for m in found]


def outputs(page: list[Block]) -> dict[Block, Block]:
    """Block that is run → the ``text`` block right after it."""
    return {
        block: after
        for block, after in itertools.pairwise(page)
        if block.runs and after.language == "text" and after.line == block.line + block.text.count("\n") + 3
    }


#: (command, folder, environment) → (exit code, what it prints to both streams).
Typing = Callable[[list[str], Path, dict[str, str]], tuple[int, str]]


def typed(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Run a command as a process of its own."""
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    return done.returncode, done.stdout


def run(block: Block, folder: Path, typed: Typing = typed) -> str:
    """What a block prints, to both streams, as somebody sees it who types it in `folder`; or write its file there.

    Args:
        typed: runs a command; the tests have one that is quicker.

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
    """What serves forever: on any port that is free, without a browser, until it has answered."""
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
    commands = [line.split() for line in lines if line]
    for i, command in enumerate(commands):
        # Installing again, or starting the tests from a test, would say nothing: the target must exist.
        if command[0] == "make":
            commands[i] = ["make", "-n", "-C", str(ROOT), *command[1:]]
        if command[0].startswith(".venv/"):
            commands[i] = [str(Path(sys.executable).parent / Path(command[0]).name), "--version"]
    return commands


def shape(line: str) -> str:
    """A line without what may differ between machines: numbers, spaces, how often a phrase comes in a row."""
    line = re.sub(r"\s+", " ", NUMBER.sub("#", line)).strip()
    line = re.sub(r"-{3,}", "---", line)
    return re.sub(r"(?<= )([^,]{3,})(?:, \1)+(?: and # more)?", r"\1", line)


def unprinted(shown: str, printed: str) -> list[str]:
    """Lines of a ``text`` block that have no counterpart among those printed."""
    there = {shape(line) for line in printed.splitlines()}
    return [line for line in shown.splitlines() if line.strip() != "..." and shape(line) not in there]


def renewed(shown: str, printed: str) -> str:
    """A ``text`` block with what is printed now: all of it, or, where it has gaps, the lines that were shown before.

    Raises:
        ValueError: a line that was shown has no counterpart any more.
    """
    lines = [line.rstrip() for line in printed.splitlines()]
    if "..." not in shown.splitlines():
        return "\n".join(lines) + "\n"
    found = []
    for line in shown.splitlines():
        if line.strip() == "...":
            found.append(line)
            continue
        alike = [i for i, other in enumerate(lines) if shape(other) == shape(line)]
        if not alike:
            raise ValueError(f"not printed any more: {line}")
        # Of the rows of a table the one of the same trial, while there is one.
        at = next((i for i in alike if _first_number(lines[i]) == _first_number(line)), alike[0])
        found.append(lines[at])
        lines = lines[at + 1 :]
    return "\n".join(found) + "\n"


def _first_number(line: str) -> str:
    found = NUMBER.search(line)
    return found[0] if found else ""
