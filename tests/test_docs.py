"""Every command and code block of the documents is run, in order, in one folder per document."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitfront import config, testing, tomlfile
from bitfront.data.arrays import from_arrays
from bitfront.engine.planning.builder import make_plan
from warm import Warm

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from blocks import ROOT, Block, Typing, blocks, outputs, renewed, run, shape, typed, unprinted

#: The page that starts the most clusters; tests/executors does the same with less.
SLOWEST = "docs/howto/cluster.md"
PAGES = ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md")))]
#: ``py``: the cells of the notebook, which ``tests/test_notebook.py`` runs as one program.
KNOWN = {"sh", "python", "py", "toml", "text", ""}
#: Those that are written to files are tested by the commands that take them.
TOML = [b for p in PAGES for b in blocks(p) if b.language == "toml" and b.file is None]


def runnable(page: str) -> list[Block]:
    return [b for b in blocks(page) if b.runs]


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_of_a_kind_that_is_tested(page: str) -> None:
    assert {b.language for b in blocks(page)} <= KNOWN


@pytest.fixture
def forked(warm: Warm) -> Typing:
    """Runs a command as ``blocks.typed`` does, without its imports where it is one of Python."""

    def fork(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
        if command[0] == "bitfront":
            arguments = ["-m", *command]
        elif command[0] == sys.executable:
            arguments = command[1:]
        else:
            return typed(command, folder, environment)
        process = warm.start(arguments, folder, environment, merged=True)
        printed, _ = process.communicate(timeout=300)
        return process.returncode, printed

    return fork


@pytest.mark.journey
@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=pytest.mark.long if p == SLOWEST else ()) for p in PAGES if runnable(p)]
)
def test_commands_and_code_run(page: str, tmp_path: Path, forked: Typing) -> None:
    listed = blocks(page)
    shown = outputs(listed)
    for block in listed:
        printed = run(block, tmp_path, forked)
        for promised in re.findall(r"^# (.*)$", block.text, re.M) if "print(" in block.text else []:
            assert promised in printed, f"{page}:{block.line}: prints {printed!r}, not {promised!r}"
        if block in shown:
            assert unprinted(shown[block].text, printed) == [], f"{page}:{shown[block].line}: make docs"


@pytest.mark.parametrize("block", TOML, ids=lambda b: f"{b.page}:{b.line}")
def test_toml_makes_a_plan(block: Block) -> None:
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    data = from_arrays(x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long())
    text = block.text
    if "sw_runner" not in text:
        text += "\n[search.strategy.sw_runner.basic_evaluation]\n[search.strategy.metrics]\naccuracy.scale = 1.0\n"
    if "search_space" not in text:
        text += "\n[search.search_space.seed.linear.config]\nname = ['integer']\ndata_in_width = [4, 8]\nweight_width = [4]\n"
    if "setup.by" not in text:
        text += "\n[search.search_space.setup]\nby = 'type'\n"
    plan = make_plan(config.from_document(tomlfile.parse(text, block.page), {"model": "jsc-new"}), dataset=data)
    assert plan.space.size > 1
    assert not plan.space.unused


def test_outputs_are_compared_by_their_shape() -> None:
    printed = "| 1,025 | loss 0.07 |\nneighbours: 8 from 46 (p = 0.77), 7 from 8 (p = 0.3) and 1 more\n"
    assert unprinted("|  7 | loss 1.5e-3 |\n...\nneighbours: 1 from 2 (p = 1)\n", printed) == []
    assert unprinted("| 7 | accuracy 0.9 |\n", printed) == ["| 7 | accuracy 0.9 |"]
    assert shape("a  1   b") == "a # b"
    assert renewed("old\n", "new\n") == "new\n"
    assert renewed("row 2 of 3\n...\n", "row 1 of 5\nrow 2 of 5\nend\n") == "row 2 of 5\n...\n"
    with pytest.raises(ValueError, match="not printed any more: gone"):
        renewed("gone\n...\n", "here\n")


def test_readme_shows_the_table_that_is_printed() -> None:
    shown = next(b for b in blocks("README.md") if b.language == "text").text.splitlines()
    assert [c.strip() for c in shown[0].strip("|").split("|")] == [
        "number",
        "software_metrics",
        "hardware_metrics",
        "scaled_metrics",
        "test accuracy",
    ]
    assert shown[2].split("|")[1].strip() == "float"


def test_make_search_is_the_embedded_default() -> None:
    # Tests run below `make test`, which hands what it was given to a make inside of it.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "-n", "search"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == ".venv/bin/bitfront search"


#: Runs a file as ``python FILE WORDS`` does, in a process that has torch imported already.
SCRIPT = """if True:
    import runpy, sys
    sys.argv = sys.argv[1:]
    sys.path[0] = str(__import__("pathlib").Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_configuration_reference_is_up_to_date(warm: Warm) -> None:
    process = warm.start(["-c", SCRIPT, "docs/generate.py", "--check"], ROOT, dict(os.environ), merged=True)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said


def test_the_places_of_new_members_are_there() -> None:
    """The table in CONTRIBUTING.md: its files and folders, and every suite of ``bitfront.testing``."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("## Where does a new X go?")[1].split("##")[0]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.*`.*\|$", table, re.M)]
    for _, place, _, suite in rows[1:]:
        assert (ROOT / "src" / "bitfront" / place.strip("`")).exists(), place
        assert suite == "–" or suite.strip("`") in testing.__all__
    assert {suite.strip("`") for *_, suite in rows[1:]} - {"–"} == set(testing.__all__)


def test_links_between_pages_lead_somewhere() -> None:
    links = [
        (page, target)
        for page in PAGES
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    ]
    assert "README.md" in {page for page, _ in links}
    assert [link for link in links if not ((ROOT / link[0]).parent / link[1]).exists()] == []


@pytest.mark.journey
@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_example_scripts_run(script: Path, tmp_path: Path, warm: Warm) -> None:
    process = warm.start(["-W", "error", "-c", SCRIPT, str(script)], tmp_path, dict(os.environ), merged=True)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert "accuracy" in printed


#: Examples whose candidates take half a second or more each, and how many of them are evaluated.
FEWER = {"jsc_fpga.toml": 4, "kws_mcu.toml": 4}
#: Steps of a training, which show as much as an epoch.
STEPS = "20"


@pytest.mark.journey
@pytest.mark.parametrize("example", sorted((ROOT / "examples").rglob("*.toml")), ids=lambda p: p.name)
def test_example_files_run(example: Path, tmp_path: Path, forked: Typing, request: pytest.FixtureRequest) -> None:
    environment, number = dict(os.environ), FEWER.get(example.name, 12)
    if 'dataset = "jsc"' in example.read_text():
        environment["BITFRONT_DATA"] = str(request.getfixturevalue("few_jets"))
    command = ["bitfront", "search", "--config", str(example), "--max-epochs", "1", "--n-trials", str(number)]
    command += ["--max-steps", STEPS]
    code, printed = forked(command, tmp_path, environment)
    assert code == 0, printed
    assert f"\n{number} of " in printed
