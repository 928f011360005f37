"""The site: README, docs/ and the docstrings of the package, as pages that work offline. `make site` builds it.

To add a page, write its name into ``NAVIGATION``; a page that is missing there is an error. The Markdown files
also work in a repository browser: README is the start page, and its table of contents is added only for the site.
"""

from __future__ import annotations

import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from bitfront.config import Table

#: Part of the navigation → its pages, in order.
NAVIGATION = {
    "Begin": ["docs/tutorial"],
    "How to": [
        "docs/howto/your-model",
        "docs/howto/models-and-data",
        "docs/howto/tasks",
        "docs/howto/choose-layers",
        "docs/howto/budgets",
        "docs/howto/widths",
        "docs/howto/large-spaces",
        "docs/howto/finetune",
        "docs/howto/measure",
        "docs/howto/results",
        "docs/howto/notebook",
        "docs/howto/explain",
        "docs/howto/export",
        "docs/howto/fpga",
        "docs/howto/microcontroller",
        "docs/howto/interruptions",
        "docs/howto/cluster",
        "docs/howto/tracking",
        "docs/howto/mase",
        "docs/howto/other-tools",
        "docs/howto/extend",
    ],
    "Reference": [
        "docs/configuration",
        "docs/formats",
        "docs/matrix",
        "docs/operations",
        "docs/metrics",
        "docs/report",
    ],
    "Python": ["docs/api/search", "docs/api/models", "docs/api/quantization", "docs/api/extending"],
    "Background": [
        "docs/strategies",
        "docs/gap",
        "docs/learned_bits",
        "docs/architecture",
        "docs/glossary",
        "docs/benchmarks",
        "CONTRIBUTING",
        "CHANGELOG",
    ],
}

project = "Bitfront"
version = release = metadata.version("bitfront")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
# The source folder is the repository.
include_patterns = ["*.md", "docs/**.md", "docs/**.rst"]
exclude_patterns = [".*", "bench", "build", "examples", "runs", "site", "src", "tests"]
nitpicky = True
# Names of other packages are not looked up: the build asks the network for nothing.
nitpick_ignore_regex = [("py:.*", r"(?!bitfront\.).*")]
#: Types in signatures that users neither create nor read.
INNER = """
preparation.Preparation config.SearchTable engine.evaluation.interface.Evaluator registry.T spaces.assignment.Assignment
transforms.correct.Correction operations.base.Chosen
"""
nitpick_ignore = [("py:class", f"bitfront.{name}") for name in INNER.split()]
show_warning_types = True

# The same anchors as in a repository browser, so that links to headings work in both.
myst_heading_anchors = 4

default_role = "code"
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Class attributes", "params_style")]

html_theme = "furo"
html_title = "Bitfront"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_use_index = False
# A summary would be fetched, which browsers do not allow for pages that are opened as files.
html_show_search_summary = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]


def with_contents(_: Sphinx, name: str, source: list[str]) -> None:
    """Adds the navigation to the start page."""
    if name == root_doc:
        parts = [f":hidden:\n:caption: {part}\n\n" + "\n".join(pages) for part, pages in NAVIGATION.items()]
        source[0] += "".join(f"\n```{{toctree}}\n{part}\n```\n" for part in parts)


def readable(
    _: Sphinx, kind: str, name: str, member: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str, str | None] | None:
    """Signatures without parts that cannot be parsed; none for tables: the configuration reference has their keys."""
    del name, options
    if kind == "class" and issubclass(member, Table):
        return "", None
    return (re.sub(r"<[\w .]+>", "...", signature), returned) if signature else None


def started(app: Sphinx, error: Exception | None) -> None:
    """Copies the start page to ``index.html``, which opens with the folder."""
    if error is None:
        shutil.copy(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", with_contents)
    app.connect("autodoc-process-signature", readable)
    app.connect("build-finished", started)
