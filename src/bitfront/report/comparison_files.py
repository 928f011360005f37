"""Writes the files of a comparison: ``compare.json``, and the figures if matplotlib is installed."""

from __future__ import annotations

from pathlib import Path

from bitfront.engine.comparison.results import Comparison
from bitfront.engine.storage.results import write_json
from bitfront.errors import RunError
from bitfront.report import comparison


def write_comparison(result: Comparison) -> tuple[Path, ...]:
    """Write ``compare.json``, and ``figures/`` if matplotlib is installed. Returns the paths of the figures.

    Raises:
        RunError: a file cannot be written.
    """
    write_json(result.folder / comparison.RESULT, comparison.as_json(result))
    if not comparison.can_draw():
        return ()
    from bitfront.report import comparison_figures, figures

    folder = result.folder / "figures"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = [("courses", comparison_figures.courses(comparison.panels(result)))]
        if planes := comparison.planes(result):
            drawn.append(("fronts", comparison_figures.fronts(planes, result)))
        return tuple(p for name, figure in drawn for p in figures.save(figure, folder, name))
    except OSError as error:
        raise RunError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from None
