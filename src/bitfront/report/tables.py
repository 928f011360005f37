"""Tables for the terminal. On a terminal they have a frame and fit its width; in a pipe they are plain Markdown."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bitfront.operations import DATA_OUT

if TYPE_CHECKING:
    from bitfront.engine.analysis import Analysis
    from bitfront.engine.rebuild import Transformed
    from bitfront.engine.storage.run import Run
    from bitfront.engine.storage.trial import Trial

#: Number of the best trials that are printed; best.json has all.
SHOWN = 20
#: Units that are always printed.
PHYSICAL = ("ms", "mJ", "W")


@dataclass(frozen=True)
class Sheet:
    """A table of text. A cell may have several lines; Markdown shows them as one.

    Attributes:
        columns: the headers.
        rows: the cells, one per column.
        right: columns that are aligned to the right.
        whole: columns whose cells are never broken into lines, not even on a narrow terminal.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Sequence[str] = ()
    whole: Sequence[str] = ()

    def show(self, console: Console) -> None:
        """Print the table: with a frame and fitted to the width on a terminal, as Markdown elsewhere."""
        if console.is_terminal:
            several = any("\n" in cell for row in self.rows for cell in row)
            for part in self._parts(console.width):
                framed = Table(box=box.ROUNDED, show_lines=several)
                for c in part:
                    right = self.columns[c] in self.right
                    framed.add_column(
                        Text(self._header(c)),
                        justify="right" if right else "left",
                        overflow="fold",
                        no_wrap=self.columns[c] in self.whole,
                        min_width=min(self._need(c), console.width // 2),
                    )
                for row in self.rows:
                    framed.add_row(*(Text(row[c]) for c in part))
                console.print(framed)
            return
        lines = [[_in_markdown(str(c)) for c in row] for row in (self.columns, *self.rows)]
        widths = [max(len(row[i]) for row in lines) for i in range(len(self.columns))]
        rule = ["-" * (w - 1) + ":" if c in self.right else "-" * w for c, w in zip(self.columns, widths, strict=True)]
        for row in [lines[0], rule, *lines[1:]]:
            cells = [
                cell.rjust(w) if c in self.right else cell.ljust(w)
                for cell, w, c in zip(row, widths, self.columns, strict=True)
            ]
            console.print(Text("| " + " | ".join(cells) + " |"), soft_wrap=True)

    def to_csv(self) -> str:
        """The table as CSV, with a header."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()

    def _parts(self, width: int) -> list[list[int]]:
        """The columns of each frame. Columns that do not fit without breaking words go into another frame below, which
        repeats the first column."""
        parts = [[0]]
        for c in range(1, len(self.columns)):
            room = sum(self._need(other) + 3 for other in [*parts[-1], c]) + 1
            if room > width and len(parts[-1]) > 1:
                parts.append([0])
            parts[-1].append(c)
        return parts

    def _need(self, column: int) -> int:
        """The least width of a column: its longest word, or its longest line if it must not be broken."""
        cells = [row[column] for row in self.rows]
        pieces = self._header(column).split()
        pieces += [
            s for cell in cells for s in (cell.split("\n") if self.columns[column] in self.whole else cell.split())
        ]
        return max(map(len, pieces), default=1)

    def _header(self, column: int) -> str:
        """The header of a column. Above numbers it has one word per line, so that the column stays narrow."""
        name = self.columns[column]
        return name.replace(" ", "\n") if name in self.right else name


def _in_markdown(cell: str) -> str:
    """A cell on one line, in which no bar ends it."""
    return ", ".join(cell.splitlines()).replace("|", "\\|")


def number(value: float) -> str:
    """A number for people: four significant digits, thousands separated, no point in whole numbers; ``-`` for NaN."""
    if math.isnan(value):
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if value == int(value) and abs(value) < 1000:
        return f"{int(value)}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """A time for people: ``0.3 s``, ``12 s``, ``4 min 10 s``, ``2 h 5 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    large, small, units = (seconds, 60, ("min", "s")) if seconds < 7200 else (seconds / 60, 60, ("h", "min"))
    whole, rest = divmod(int(large), small)
    return f"{whole} {units[0]}" + (f" {rest} {units[1]}" if rest else "")


def _metrics(
    values: Mapping[str, float], intervals: Mapping[str, tuple[float, float]] | None = None, run: Run | None = None
) -> str:
    """Metrics, one per line: physical quantities with their units, and the kind of a metric if it is not the usual
    one (measured, modelled, estimated)."""
    parts = []
    ends = {f"{name}{end}" for name in values for end in ("_low", "_high")}
    for name, value in values.items():
        if name in ends:
            continue
        part = f"{name} {number(value)}"
        unit = run.units.get(name, "") if run else ""
        part += f" {unit}" if unit in PHYSICAL else ""
        if intervals and name in intervals:
            low, high = intervals[name]
            plain = unit in PHYSICAL or (run is not None and name in run.stored_intervals.get("float", {}))
            part += f" [{number(low)}, {number(high)}]" if plain else f" [{low:.3f}, {high:.3f}]"
        kind, why = run.kinds.get(name, ("", "")) if run else ("", "")
        part += f" ({kind})" if why else ""
        parts.append(part)
    return "\n".join(parts)


def best_trials(run: Run, trials: Sequence[Trial] | None = None) -> Sheet:
    """The float model, then trials: metrics on the samples of the search, with intervals, and the accuracy, or what
    leads in another task, on the test split.

    Args:
        run: the run.
        trials: trials of it; None: the first ones of the front, and all that were fine-tuned.
    """
    tested, leading = bool(run.reference_test), f"test {run.leading}"
    columns = ["number", "software_metrics", "hardware_metrics", "scaled_metrics"] + [leading] * tested
    columns += ["fine-tuned"] * bool(run.finetuned)
    reference = {m: math.nan if v is None else v for m, v in run.reference.items()}
    sides = {side: {m: v for m, v in reference.items() if run.sides[m] == side} for side in ("sw_runner", "hw_runner")}
    rows = [
        [
            "float",
            _metrics(sides["sw_runner"], run.intervals(reference, "float"), run),
            _metrics(sides["hw_runner"], run.intervals(reference, "float"), run),
            "",
            *([number(run.reference_test[run.leading])] if tested else []),
            *([""] if run.finetuned else []),
        ]
    ]
    for trial in shown(run) if trials is None else trials:
        test = trial.test_metrics.get(run.leading, math.nan)
        rows.append(
            [
                str(trial.number),
                _metrics(trial.software_metrics, trial.intervals, run),
                _metrics(trial.hardware_metrics, trial.intervals, run),
                _metrics({**trial.scaled_metrics, **({"sum": trial.values[0]} if run.objectives.summed else {})}),
                *([number(test)] if tested else []),
                *([_finetuned(run, trial)] if run.finetuned else []),
            ]
        )
    return Sheet(columns, rows, right=["number", leading])


def shown(run: Run) -> list[Trial]:
    """The first trials of the front, and all fine-tuned trials."""
    front = run.front_rows[:SHOWN].tolist()
    others = [n for n in run.finetuned if run.columns.position(n) not in front]
    return [*map(run.row, front), *map(run.trial, others)]


def _finetuned(run: Run, trial: Trial) -> str:
    """The result of fine-tuning a trial: the metrics that changed, the test accuracy, and whether it was kept."""
    finetuned = trial.finetuned
    if finetuned is None:
        return ""
    if finetuned.failed:
        return f"failed: {finetuned.failed}"
    before = trial.metrics
    names = [m for m in run.objectives.parts if finetuned.metrics[m.metric] != before[m.metric]]
    shown = {m.metric: math.nan if (v := finetuned.metrics[m.metric]) is None else v for m in names}
    parts = [_metrics(shown, run.intervals(shown), run)] if shown else ["nothing changed"]
    if run.leading in finetuned.test:
        parts.append(f"test {run.leading} {number(finetuned.test[run.leading])}")
    return "\n".join([*parts, "kept" if finetuned.kept else "no better: the trial is not changed"])


def analysis(result: Analysis) -> Sheet:
    """The analysis of a model: one row per module, the total last."""
    columns, rows = result.table()
    return Sheet(columns, rows, right=columns[4:])


def changes(result: Transformed) -> Sheet:
    """The number of nodes per type: all, quantized, and unchanged."""
    counts: dict[str, list[int]] = {}
    for node in result.graph.nodes:
        row = counts.setdefault(node.type, [0, 0])
        row[0] += 1
        row[1] += node.name in result.formats
    rows = [[name, str(total), str(done), str(total - done)] for name, (total, done) in counts.items()]
    columns = ["type", "original", "quantized", "unchanged"]
    return Sheet(columns, rows, right=columns[1:])


def formats(result: Transformed) -> Sheet:
    """The format of each operand, per quantized site."""
    from bitfront.operations.base import result_of

    rows: list[list[str]] = []
    specs = {site: (*specs, result_of(specs)) for site in result.formats if (specs := result.graph.site(site).specs)}
    shown = {"data_in", "weight", "bias", *(operand for operands in result.formats.values() for operand in operands)}
    shown |= {"state" for each in specs.values() for s in each if s.role == "inner"}
    names = [n for n in ("data_in", "data_in_2", "weight", "bias", "state", DATA_OUT) if n in shown]
    for site, operands in result.formats.items():
        rows.append([site])
        for name in names:
            # Several operands under one name, such as the weights of an LSTM: every label once.
            there = [s.name for s in specs[site] if s.name == name] or [s.name for s in specs[site] if name in s.names]
            labels = dict.fromkeys(operands[o].label if o in operands else "float" for o in there)
            rows[-1].append(", ".join(labels) or "float")
    return Sheet(["site", *names], rows)


def as_json(run: Run) -> dict[str, Any]:
    """A run as JSON: its folder, why it stopped, its reference and its front."""
    return {
        "folder": str(run.folder),
        "stopped": run.stopped,
        "trials": len(run),
        "space_size": int(run.space.size),
        "reference": dict(run.reference),
        "reference_test": dict(run.reference_test),
        "kinds": {name: kind for name, (kind, _) in run.kinds.items()},
        "constraints": [c.text for c in run.constraints],
        "compared": [vars(c) for c in run.compared],
        "optimism": None if run.optimism is None else vars(run.optimism),
        "front": [
            {
                "number": t.number,
                "software_metrics": dict(t.software_metrics),
                "hardware_metrics": dict(t.hardware_metrics),
                "scaled_metrics": dict(t.scaled_metrics),
                "test_metrics": dict(t.test_metrics),
                "sampled_config": t.config,
            }
            for t in run.front
        ],
    }
