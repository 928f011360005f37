"""Every word of the glossary exists in the code, where the page says it does."""

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "glossary.md"
ROWS = re.findall(r"^\| ([^|]+) \| [^|]+ \| `([\w.]+):([\w.]+)` \|$", PAGE.read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize(("word", "module", "path"), ROWS, ids=[row[0] for row in ROWS])
def test_the_word_exists_in_the_code(word, module, path):
    member = importlib.import_module(module)
    for part in path.split("."):
        assert hasattr(member, part), f"{word}: {module} has no {path}"
        member = getattr(member, part)


def test_every_row_is_read():
    table = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(ROWS) == len(table) - 4, "a row that the test cannot read"


def test_a_word_stands_once():
    words = [word for word, _, _ in ROWS]
    assert sorted(set(words)) == sorted(words)
