"""Updates docs/tutorial.md: the outputs of its commands, and its pictures. `make docs` runs it."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from blocks import ROOT, blocks, outputs, renewed, run

PAGE = "docs/tutorial.md"


def main() -> None:
    """Run the page in a new folder, and put the outputs and pictures into the page."""
    path, page = ROOT / PAGE, blocks(PAGE)
    text, shown = path.read_text(encoding="utf-8"), outputs(page)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        printed = {block: run(block, folder) for block in page}
        for block, output in reversed(shown.items()):
            text = text[: output.start] + renewed(output.text, printed[block]) + text[output.end :]
        for picture in re.findall(r"!\[[^]]*\]\((tutorial/\S+)\)", text):
            (drawn,) = folder.glob(f"runs/*/figures/{Path(picture).name}")
            shutil.copy(drawn, path.parent / picture)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
