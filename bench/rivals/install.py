"""A virtual environment for each rival, so that its packages meet neither Bitfront's nor one another's.

    python bench/rivals/install.py              all of them
    python bench/rivals/install.py hgq2         one

``NAME.txt`` lists the packages of a rival, pinned; the environment is ``build/rivals/envs/NAME``, which git ignores.
One that was installed from the same list is left alone. What does not install is said with pip's last lines, and the
others are installed all the same; the exit status is then 1. Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
#: Where environments are made.
ENVIRONMENTS = HERE.parents[1] / "build" / "rivals" / "envs"
#: So many of pip's last lines are shown when it fails.
LAST_LINES = 12


def known(folder: Path) -> list[str]:
    """The rivals that have a list in this folder."""
    return sorted(file.stem for file in folder.glob("*.txt"))


def python_of(name: str, environments: Path = ENVIRONMENTS) -> Path:
    """The interpreter of an environment, whether it exists or not."""
    return environments / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def installed(name: str, lists: Path = HERE, environments: Path = ENVIRONMENTS) -> bool:
    """Whether the environment is complete, and from the list as it is now."""
    copied = environments / name / "installed.txt"
    return copied.is_file() and copied.read_bytes() == (lists / f"{name}.txt").read_bytes()


def install(name: str, lists: Path, environments: Path, options: Sequence[str] = ()) -> str | None:
    """Make an environment. None if all went well, else pip's last lines.

    Args:
        name: of the rival.
        lists: the folder of its list.
        environments: the folder to make it in.
        options: more options of ``pip install``.
    """
    if installed(name, lists, environments):
        return None
    folder = environments / name
    folder.mkdir(parents=True, exist_ok=True)
    venv.create(folder, clear=True, with_pip=True)
    packages = lists / f"{name}.txt"
    command = [str(python_of(name, environments)), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    done = subprocess.run(
        [*command, *options, "--requirement", str(packages)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        return "\n".join(done.stdout.splitlines()[-LAST_LINES:])
    (folder / "installed.txt").write_bytes(packages.read_bytes())
    return None


def main(words: Sequence[str] | None = None) -> int:
    """Install what is named, and say what came of it."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("rivals", nargs="*", metavar="NAME", help="default: all that have a list")
    arguments.add_argument("--lists", type=Path, default=HERE, help="the folder of the lists")
    arguments.add_argument("--envs", type=Path, default=ENVIRONMENTS, help="the folder of the environments")
    arguments.add_argument(
        "--pip", action="append", default=[], metavar="OPTION", help="for pip install, e.g. --no-index"
    )
    given = arguments.parse_args(words)
    names = known(given.lists)
    unknown = [name for name in given.rivals if name not in names]
    if unknown:
        print(f"there is no list {given.lists / unknown[0]}.txt; there are lists of {', '.join(names) or 'none'}")
        return 2
    failed = []
    for name in given.rivals or names:
        problem = install(name, given.lists, given.envs, given.pip)
        if problem is None:
            print(f"{name}: installed in {given.envs / name}")
        else:
            failed.append(name)
            print(f"{name}: does not install. The last lines of pip:\n{problem}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
