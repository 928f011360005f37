"""The files of a comparison: ``compare.json``, and the figures where Matplotlib is installed."""

from __future__ import annotations

from pathlib import Path

from bitfront.engine.comparison.results import Comparison
from bitfront.engine.storage.run import write_json
from bitfront.errors import RunError
from bitfront.report import comparison


def write_comparison(own: Comparison) -> tuple[Path, ...]:
    """Write ``compare.json`` and, where matplotlib is installed, ``figures/``; gives the figures' files.

    Raises:
        RunError: something cannot be written.
    """
    write_json(own.folder / comparison.RESULT, comparison.as_json(own))
    if not comparison.can_draw():
        return ()
    from bitfront.report import comparison_figures, figures

    folder = own.folder / "figures"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = [("courses", comparison_figures.courses(comparison.panels(own)))]
        if flat := comparison.planes(own):
            drawn.append(("fronts", comparison_figures.fronts(flat, own)))
        return tuple(p for name, figure in drawn for p in figures.save(figure, folder, name))
    except OSError as error:
        raise RunError(f"{error.filename or folder}: cannot be written: {error.strerror or error}") from None
