"""Writes what docs/tutorial.md shows anew: the outputs of its commands, and its pictures. `make docs` runs it."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from blocks import ROOT, blocks, outputs, renewed, run

PAGE = "docs/tutorial.md"


def main() -> None:
    """Run the page in a new folder; put what came out of it into the page."""
    path, found = ROOT / PAGE, blocks(PAGE)
    text, shown = path.read_text(encoding="utf-8"), outputs(found)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        printed = {block: run(block, folder) for block in found}
        for block, own in reversed(shown.items()):
            text = text[: own.start] + renewed(own.text, printed[block]) + text[own.end :]
        for picture in re.findall(r"!\[[^]]*\]\((tutorial/\S+)\)", text):
            (made,) = folder.glob(f"runs/*/figures/{Path(picture).name}")
            shutil.copy(made, path.parent / picture)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
