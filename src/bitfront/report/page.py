"""The page: one HTML file that contains everything, so that it can be opened anywhere and sent by mail.

The tables are HTML, so that every reader can use them. The pictures are drawn in the browser by ``page.js``, from JSON
in the page, with plotly.js: its basic bundle, which has lines, points and bars, and a quarter of the bytes of the
whole. ``page.plotly-basic.min.js`` is the file of the package plotly.js-basic-dist-min on npm, unchanged. Jinja2 fills
in ``page.html`` and escapes every text, since names, errors and paths come from the user. A content security policy
forbids the page to load anything from the network.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from bitfront import tomlfile
from bitfront.errors import require
from bitfront.report import data, learned, page_data, page_tables
from bitfront.report.grid import CellGrid, bars
from bitfront.report.importance import Importance

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.figure import Figure

    from bitfront.engine.storage.run import Run

#: The page has fewer bytes than this, so that it can be sent by mail.
LIMIT = 2_000_000
#: The colours of matplotlib on a dark page; ``page.css`` has the same.
PAPER, INK, LINE, PANEL = "#16181b", "#ececec", "#44484d", "#202327"
DARK: dict[Any, str] = {
    **dict.fromkeys(("figure.facecolor", "savefig.facecolor", "axes.facecolor", "legend.facecolor"), PAPER),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("grid.color", "legend.edgecolor"), LINE),
    **dict.fromkeys((f"axes3d.{axis}axis.panecolor" for axis in "xyz"), PANEL),
}
#: (number of trials drawn, whether grids have bars). If a page is too large, the next entry is tried.
DRAWN = ((data.SHOWN, True), (1000, True), (500, True), (200, True), (50, False))


def page(run: Run, grids: Sequence[CellGrid], influences: Sequence[Importance]) -> str:
    """The whole page as text.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    bits = learned.learned_front(run)
    facts, remarks = page_tables.summary(run)
    fixed = {
        "title": run.config.run_name,
        "style": _part("page.css"),
        "plotly": _part("page.plotly-basic.min.js"),
        "code": _part("page.js"),
        "facts": facts,
        "remarks": remarks,
        "best": page_tables.best(run),
        "layers": page_tables.layers(run) if bits is None else page_tables.learned_layers(run, bits),
        "influences": page_tables.influences(run, influences),
        "explained": page_tables.explained(run) if bits is None else [],
        "failures": page_tables.failures(run),
        "learned": [_both(lambda: learned.bits(run, bits)), _both(lambda: learned.course(run, bits))] if bits else [],
        "config": tomlfile.dumps(run.config.effective()),
    }
    heatmaps, pictures = (
        [page_tables.heatmap(cells) for cells in grids],
        [_both(functools.partial(bars, cells)) for cells in grids],
    )
    template = _template()
    for limit, pictured in DRAWN:
        shown = [
            {"table": table, "picture": picture if pictured else None, "alt": _alt(cells)}
            for cells, table, picture in zip(grids, heatmaps, pictures, strict=True)
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
    # JSON without spaces, in UTF-8, has half the bytes. ``tojson`` escapes what could end the script.
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False,
        "allow_nan": False,
        "separators": (",", ":"),
    }
    template: Template = environment.from_string(_part("page.html"))
    return template


def _part(name: str) -> str:
    return files("bitfront.report").joinpath(name).read_text(encoding="utf-8")


def _alt(cells: CellGrid) -> str:
    return f"{cells.title} as bars over {cells.x} and {cells.y}; the values are in the table"


def _both(draw: Callable[[], Figure]) -> dict[str, str]:
    """The same picture for a light and for a dark page, as images."""
    import matplotlib

    drawn = {}
    for page in ("light", "dark"):
        with matplotlib.rc_context(DARK if page == "dark" else None):
            drawn[page] = _inline(draw())
    return drawn


def _inline(figure: Figure) -> str:
    """A figure as an image with 128 colours, which needs a third of the bytes."""
    from PIL import Image

    drawn, out = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=90, bbox_inches="tight")  # bars have wide margins
    Image.open(drawn).convert("RGB").quantize(128).save(out, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
