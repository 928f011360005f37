"""What a notebook shows of results: the tables of the command as HTML, the front as a figure, the progress as lines.

The HTML is small, without styles or scripts of other places, and every text in it is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from bitfront.engine.analysis import Analysis
from bitfront.engine.explanation.results import Explanation
from bitfront.engine.planning.plan import Plan
from bitfront.engine.storage.run import Run
from bitfront.engine.storage.trial import Trials
from bitfront.errors import require
from bitfront.report import data, explanation, plans, remarks, tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Rows of a table that a notebook shows; of more it shows the first and the last ones.
ROWS = 50


def html(value: Run | Trials | Plan | Analysis | Explanation) -> str:
    """A result as HTML: its table, and below it what the command says."""
    if isinstance(value, Run):
        best = value.columns.number[value.front_rows[:1]].tolist()
        next_ = [f"run.model({number}) is the network of a trial, run.plot() draws the front" for number in best]
        return _page(tables.best_trials(value), [*remarks.remarks(value), *next_])
    if isinstance(value, Trials):
        return _of_trials(value)
    if isinstance(value, Plan):
        return _page(plans.plan_sites(value), [*plans.plan_summary(value), *value.notes])
    if isinstance(value, Explanation):
        parts = [_section(section) for section in explanation.sections(value)]
        return "\n".join(["<div>", *parts, "</div>"])
    return _page(tables.analysis(value), value.remarks())


def plot(run: Run) -> Figure:
    """The front of a run, as the report draws it. Raises MissingExtraError."""
    require("matplotlib", "report", "run.plot()")
    from bitfront.report import figures

    return figures.front(run, data.cloud(run))


def _section(section: explanation.Section) -> str:
    """A section: its title, its sentences, then its table."""
    text = "<br>\n".join(map(escape, section.sentences))
    return f"<h4>{escape(section.title)}</h4>\n<p>{text}</p>" + (_table(section.table) if section.table else "")


def _of_trials(trials: Trials) -> str:
    assert trials.run is not None
    more = [f"... and {len(trials) - tables.SHOWN:,} more"] if len(trials) > tables.SHOWN else []
    return _page(tables.best_trials(trials.run, trials[: tables.SHOWN]), more)


def _page(sheet: tables.Sheet, lines: Sequence[str]) -> str:
    """A table and lines of text below it."""
    text = "<br>\n".join(escape(line) for line in lines if line)
    return f"<div>{_table(sheet)}\n<p>{text}</p></div>"


def _table(sheet: tables.Sheet) -> str:
    """A table; of a long one the first and the last rows."""
    first, last, left_out = sheet.rows, sheet.rows[:0], len(sheet.rows) - ROWS
    if left_out > 0:
        first, last = sheet.rows[: ROWS // 2], sheet.rows[-ROWS // 2 :]
    rows = [_row(sheet, "th", sheet.columns), *(_row(sheet, "td", row) for row in first)]
    if left_out > 0:
        rows.append(f'<tr><td colspan="{len(sheet.columns)}">... {left_out:,} rows are left out ...</td></tr>')
    rows += [_row(sheet, "td", row) for row in last]
    return "\n".join(["<table>", *rows, "</table>"])


def _row(sheet: tables.Sheet, tag: str, cells: Sequence[str]) -> str:
    """A row of a table: numbers to the right, and a line break wherever a cell has one."""
    sides = ["right" if column in sheet.right else "left" for column in sheet.columns]
    parts = zip(cells, sides, strict=True)
    return (
        "<tr>" + "".join(f'<{tag} style="text-align: {side}">{_lines(cell)}</{tag}>' for cell, side in parts) + "</tr>"
    )


def _lines(cell: str) -> str:
    return escape(cell).replace("\n", "<br>")
