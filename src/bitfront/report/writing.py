"""Writes the report of a run folder: ``report.html`` and ``figures/``. It reads stored results and measures nothing."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitfront.engine.storage.run import Run
from bitfront.errors import RunError, require
from bitfront.files import write_text

#: Objects that are created between two searches for cycles of objects.
COLLECTED = 50_000


@dataclass(frozen=True)
class Report:
    """The files of a report: the page, and the figures, each as PNG and SVG."""

    page: Path
    figures: tuple[Path, ...]


def write_report(
    run: Run | str | Path,
    output: str | Path | None = None,
    *,
    x: str | None = None,
    y: str | None = None,
    metrics: Sequence[str] = (),
) -> Report:
    """Write the report of a run, finished or still running.

    Args:
        run: the run, or its folder.
        output: where to write; default: the run folder.
        x, y: parameters of the grid pictures, e.g. ``"fc1/weight"``. Default: a space with two parameters uses these.
        metrics: metrics of the grid pictures; empty: all.

    Raises:
        MissingExtraError: jinja2, matplotlib or pillow is not installed.
        RunError: there is no such run, or a file cannot be written.
        ConfigError: there is no such parameter or metric.
    """
    for module in ("jinja2", "matplotlib", "PIL"):
        require(module, "report", "the report")
    with _seldom_collected():
        return _written(run, output, x, y, metrics)


def _written(
    run: Run | str | Path, output: str | Path | None, x: str | None, y: str | None, metrics: Sequence[str]
) -> Report:
    from bitfront.report import data, figures, grid, learned, page

    loaded = run if isinstance(run, Run) else Run.load(run)
    cloud, failed, bits = data.cloud(loaded), data.failures(loaded), learned.learned_front(loaded)
    # Cycles and places in a cycle are no parameters that a user looks at, unless one asks.
    asked = bits is None or x is not None or y is not None or metrics
    grids = grid.grids(loaded, x, y, metrics) if asked else ()
    influences = data.influences(loaded) if bits is None else ()
    target = Path(output) if output is not None else loaded.folder
    try:
        (target / "figures").mkdir(parents=True, exist_ok=True)
        path = target / "report.html"
        write_text(path, page.page(loaded, grids, influences))
        # What a trial chose; where bits were learned, what was learned, as cycles are no choices.
        chosen = (
            [
                ("layers", figures.layers(data.layer_map(loaded, cloud.front))),
                ("importance", figures.importances(influences)),
                ("effects", figures.effects(loaded, influences)),
            ]
            if bits is None
            else [("bits", learned.bits(loaded, bits)), ("learning", learned.course(loaded, bits))]
        )
        drawn = [
            ("front", figures.front(loaded, cloud)),
            *chosen,
            ("history", figures.history(data.history(loaded))),
            ("parallel", figures.parallel(data.parallel(loaded, influences))),
            *([("failures", figures.failures(failed))] if failed else []),
            *((f"grid-{g.metric}", grid.heatmap(g)) for g in grids),
            *((f"bars-{g.metric}", grid.bars(g)) for g in grids),
        ]
        written = [p for name, figure in drawn for p in figures.save(figure, target / "figures", name)]
    except OSError as error:
        raise RunError(f"{error.filename or target}: cannot be written: {error.strerror or error}") from None
    return Report(path, tuple(written))


@contextlib.contextmanager
def _seldom_collected() -> Iterator[None]:
    """Look for cycles of objects less often: a figure has thousands of objects, and that takes a tenth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], COLLECTED) if before[0] else 0, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
