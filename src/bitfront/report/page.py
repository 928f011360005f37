"""The page: one HTML file with everything in it, to be opened anywhere and mailed. It asks the network for nothing.

Tables stand in it as HTML, so that they are there for every reader; pictures are drawn in the browser by plotly.js and
``page.js`` from the JSON in the page. Jinja2 fills in ``page.html``; it escapes every text, since names, errors and
paths are the user's. A content security policy in the page forbids it to load anything.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from bitfront import tomlfile
from bitfront.errors import require
from bitfront.report import data, page_data, page_tables
from bitfront.report.grid import CellGrid, bars
from bitfront.report.importance import Importance

if TYPE_CHECKING:
    from jinja2 import Template

    from bitfront.engine.storage.run import Run

#: Bytes that the page stays below, so that it can be mailed.
LIMIT = 5_900_000
#: (trials drawn, whether bars stand beside the tables of grids); the next one is taken where the page is too large.
DRAWN = ((data.SHOWN, True), (1000, True), (500, True), (200, True), (50, False))


def page(run: Run, grids: Sequence[CellGrid], influences: Sequence[Importance]) -> str:
    """The whole page as text.

    Raises:
        MissingExtraError: plotly or jinja2 is not installed.
    """
    offline: Any = require("plotly.offline", "report", "the report")
    facts, remarks = page_tables.summary(run)
    fixed = {
        "title": run.config.run_name,
        "style": _part("page.css"),
        "plotly": offline.get_plotlyjs(),
        "code": _part("page.js"),
        "facts": facts,
        "remarks": remarks,
        "best": page_tables.best(run),
        "layers": page_tables.layers(run),
        "influences": page_tables.influences(run, influences),
        "failures": page_tables.failures(run),
        "config": tomlfile.dumps(run.config.effective()),
    }
    heatmaps, pictures = [page_tables.heatmap(own) for own in grids], [_picture(own) for own in grids]
    template = _template()
    for limit, pictured in DRAWN:
        shown = [
            {"table": table, "picture": picture if pictured else "", "alt": _alt(own)}
            for own, table, picture in zip(grids, heatmaps, pictures, strict=True)
        ]
        content = page_data.content(run, influences, limit)
        text = template.render(fixed, grids=shown, pictured=pictured, data=content)
        if len(text.encode()) < LIMIT:
            break
    return text


def _template() -> Template:
    jinja2: Any = require("jinja2", "report", "the report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # JSON without spaces, and in UTF-8: half the bytes. ``tojson`` escapes what could end the script.
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False,
        "allow_nan": False,
        "separators": (",", ":"),
    }
    template: Template = environment.from_string(_part("page.html"))
    return template


def _part(name: str) -> str:
    return files("bitfront.report").joinpath(name).read_text(encoding="utf-8")


def _alt(own: CellGrid) -> str:
    return f"{own.title} as bars over {own.x} and {own.y}; the values are in the table"


def _picture(own: CellGrid) -> str:
    """The bars as an image in a palette of 128 colours: a third of the bytes."""
    from PIL import Image

    drawn, out = io.BytesIO(), io.BytesIO()
    bars(own).savefig(drawn, format="png", dpi=90)
    Image.open(drawn).convert("RGB").quantize(128).save(out, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
