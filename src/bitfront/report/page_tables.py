"""The tables of the page, cell by cell. All cells are plain text, which the template escapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bitfront.engine.storage.run import UNCHECKED
from bitfront.report import data, explanation, figures
from bitfront.report.grid import COLOURS, CellGrid, readable
from bitfront.report.importance import Importance
from bitfront.report.learned import LearnedFront, rows_of
from bitfront.report.remarks import compared, constrained, optimistic, reasons
from bitfront.report.tables import number
from bitfront.spaces.base import counted

if TYPE_CHECKING:
    from bitfront.engine.storage.run import Run
    from bitfront.engine.storage.trial import Trial

#: Rows of the tables of the front and of failures.
ROWS = 50
#: Characters of an error in the page.
ERROR = 2000


@dataclass(frozen=True)
class HtmlCell:
    """One cell.

    Attributes:
        note: text in small print after the text.
        kind: its CSS class.
        style: its CSS.
        tip: text that the browser shows when the pointer is on the cell.
        trial: the cell is a button that shows the trial with this number; None: it is no button.
    """

    text: str = ""
    note: str = ""
    kind: str = ""
    style: str = ""
    tip: str = ""
    trial: int | None = None


@dataclass(frozen=True)
class HtmlTable:
    """A table; the first cell of a row is its heading.

    Attributes:
        kind: its CSS class.
        note: a paragraph below the rows; without rows it replaces the table.
    """

    caption: str = ""
    head: tuple[HtmlCell, ...] = ()
    rows: tuple[tuple[HtmlCell, ...], ...] = ()
    kind: str = ""
    note: str = ""


def summary(run: Run) -> tuple[dict[str, str], list[str]]:
    """Facts about the run (title → text), and remarks."""
    space, columns = run.space, run.columns
    failed = int((~columns.complete).sum())
    objectives = zip(run.objectives.names, run.objectives.directions, strict=True)
    facts = {
        "model": run.config.model,
        "dataset": run.config.dataset,
        "objectives": ", ".join(f"{name} ({direction})" for name, direction in objectives),
        "trials": f"{len(run):,} of {counted(space.size)} candidates" + (f", {failed:,} failed" if failed else ""),
        "state": run.stopped or "the search was still running when this page was written",
        "strategy": run.config.search.strategy.name if run.config.search else "",
        "front": f"{len(run.front_rows):,} trials",
        "samples": f"{run.samples:,} per candidate" if run.samples else "",
        "evaluation": f"{columns.duration.sum():,.3g} s, summed over trials",
        "run folder": str(run.folder),
    }
    facts["undefined"] = ", ".join(f"{m} has no value in {n:,} trials" for m, n in data.undefined(run).items())
    remarks = [*compared(run), *optimistic(run), *(f"{m} is {kind}: {why}" for m, (kind, why) in reasons(run).items())]
    remarks += [text] if (text := run.in_float.text) else []
    remarks += [constrained(run)] if run.constraints else []
    remarks += [note for note in run.notes if note == UNCHECKED]
    return {title: text for title, text in facts.items() if text}, remarks


def best(run: Run) -> HtmlTable:
    """The float model, the front, and the fine-tuned trials."""
    names = list(dict.fromkeys([*(p.metric for p in run.objectives.parts), *data.metric_names(run)]))
    tested, trained = bool(run.reference_test), bool(run.finetuned)
    head = ["trial", *(data.title(run, m) for m in names)]
    head += [f"test {run.leading}"] * tested + [f"fine-tuned {run.leading}"] * trained

    def cells(values: Mapping[str, float | None], ends: Mapping[str, tuple[float, float]]) -> list[HtmlCell]:
        spans = ["–".join(number(e) for e in ends[name]) if name in ends else "" for name in names]
        return [HtmlCell(_number(values.get(name)), note=span) for name, span in zip(names, spans, strict=True)]

    def last(values: Mapping[str, float], finetuned: str) -> list[HtmlCell]:
        return [HtmlCell(_number(values.get(run.leading)))] * tested + [HtmlCell(finetuned)] * trained

    reference = {m: math.nan if v is None else v for m, v in run.reference.items()}
    rows = [
        [HtmlCell("float model"), *cells(reference, run.intervals(reference, "float")), *last(run.reference_test, "")]
    ]
    shown = [run.row(int(r)) for r in run.front_rows[:ROWS]]
    shown += [run.trial(n) for n in run.finetuned if n not in {t.number for t in shown}]
    for trial in shown:
        measured = cells(trial.metrics, trial.intervals)
        rows.append([_button(trial.number), *measured, *last(trial.test_metrics, _finetuned(trial, run.leading))])
    more = len(run.front_rows) - ROWS
    note = f"{more:,} more trials of the front are in best.json." if more > 0 else ""
    return _table("Best trials, with 95 % intervals where there are any", head, rows, "numbers", note)


def layers(run: Run) -> HtmlTable:
    """The choices of each layer in the trials of the front."""
    chosen = data.layer_map(run, data.cloud(run).front[:ROWS])
    if not chosen.places:
        return HtmlTable(note="There was nothing to choose.")
    if not chosen.numbers:
        return HtmlTable(note="No trial is on the front.")
    rows = []
    for place, labels, short, shades in zip(chosen.places, chosen.labels, chosen.short, chosen.shades, strict=True):
        cells = zip(labels, short, shades.tolist(), strict=True)
        rows.append([HtmlCell(place), *(HtmlCell(text, style=_paint(s), tip=label) for label, text, s in cells)])
    head = [HtmlCell("site/operand"), *(_button(n) for n in chosen.numbers)]
    return _table("Bits or widths that the trials of the front chose", head, rows, "map")


def learned_layers(run: Run, front: LearnedFront) -> HtmlTable:
    """What was learned of each layer, in some networks of the front."""
    head = [HtmlCell("layer"), *(_button(int(run.columns.number[front.rows[place]])) for place in front.spread)]
    rows = [[HtmlCell(text) for text in row] for row in rows_of(front)]
    caption = "Mean bits of the weights that are not zero / share of zeros / mean bits of the input; without signs"
    return _table(caption, head, rows, "map")


def heatmap(cells: CellGrid) -> HtmlTable:
    """A metric over two parameters; the first row is the topmost."""
    known = cells.values[np.isfinite(cells.values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)

    def cell(row: int, column: int) -> HtmlCell:
        trials, text = cells.trials[row, column], cells.text(row, column)
        if not trials and cells.failed[row, column]:
            return HtmlCell(text, kind="failed", tip="failed")
        if not trials:
            return HtmlCell(text, kind="empty", tip="never evaluated")
        share = (float(cells.values[row, column]) - low) / (high - low) if high > low else 0.5
        return HtmlCell(text, style=_paint(share), tip=f"{trials:,} trials")

    rows = [
        [HtmlCell(name), *(cell(row, column) for column in range(len(cells.columns)))]
        for row, name in reversed(list(enumerate(cells.rows)))
    ]
    caption = ", ".join(filter(None, [cells.title, cells.note])) + f"; {cells.x} across, {cells.y} up"
    return _table(caption, ["", *cells.columns], rows, "map")


def influences(run: Run, importances: Sequence[Importance]) -> list[HtmlTable]:
    """The main effects per metric as tables, for readers who cannot see the picture; or why they are not known."""
    head = ["parameter", "share of the variance", "option", "mean with it", "difference", "trials"]
    tables = []
    for one in importances:
        if one.missing:
            tables.append(HtmlTable(note=f"{one.metric}: {one.missing}."))
            continue
        rows = [
            [p.parameter, f"{p.share:.1%}", e.label, number(e.mean), f"{e.effect:+.4g}", f"{e.trials:,}"]
            for p in one.parameters[: figures.CELLS]
            for e in p.effects
        ]
        caption = f"What the options do to {data.title(run, one.metric)}"
        tables.append(_table(caption, head, [[HtmlCell(c) for c in row] for row in rows], "numbers"))
    return tables


def explained(run: Run) -> list[tuple[str, tuple[str, ...], HtmlTable | None]]:
    """The parts of the run's explanation: (heading, sentences, table)."""
    parts = []
    for section in explanation.sections_for_page(run):
        sheet, table = section.table, None
        if sheet is not None:
            rows, heading = [], ""
            for first, *cells in sheet.rows:
                heading = first or heading  # each row of a page has its heading
                rows.append([HtmlCell(heading), *map(HtmlCell, cells)])
            table = _table(section.title, list(sheet.columns), rows, "numbers")
        parts.append((section.title, section.sentences, table))
    return parts


def failures(run: Run) -> HtmlTable:
    """Kinds of error, the most frequent first."""
    kinds = data.failures(run)
    if not kinds:
        return HtmlTable(note="No candidate failed.")
    rows = [
        [HtmlCell(f"{f.count:,}"), HtmlCell(str(f.first)), HtmlCell(f.error[:ERROR], kind="error")]
        for f in kinds[:ROWS]
    ]
    more = len(kinds) - ROWS
    note = f"{more:,} more kinds of error are in the store." if more > 0 else ""
    return _table("Why candidates failed", ["trials", "the first", "error"], rows, note=note)


def _table(
    caption: str,
    head: Sequence[str | HtmlCell],
    rows: Sequence[Sequence[HtmlCell]],
    kind: str = "",
    note: str = "",
) -> HtmlTable:
    cells = tuple(HtmlCell(h) if isinstance(h, str) else h for h in head)
    return HtmlTable(caption, cells, tuple(map(tuple, rows)), kind, note)


def _button(trial: int) -> HtmlCell:
    return HtmlCell(str(trial), trial=trial)


def _number(value: float | None) -> str:
    return number(math.nan if value is None else value)


def _finetuned(trial: Trial, leading: str) -> str:
    result = trial.finetuned
    if result is None:
        return ""
    if result.failed:
        return f"failed: {result.failed}"
    return _number(result.metrics.get(leading)) + ("" if result.kept else " (no better)")


def _paint(shade: float) -> str:
    """CSS: the colour for a share, and a text colour that is readable on it."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if not math.isfinite(shade):
        return ""
    colour = colormaps[COLOURS](shade)
    return f"background:{to_hex(colour)};color:{readable(colour)}"
