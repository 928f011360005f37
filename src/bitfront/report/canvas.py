"""The figures of the report: matplotlib's, which a notebook shows. Importing this imports matplotlib."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

#: Dots per inch of a figure in a notebook.
RESOLUTION = 100


class ShownFigure(Figure):
    """A figure that a notebook shows as it is. One that pyplot has not made would be shown as a line of text."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=RESOLUTION)
        return file.getvalue()
