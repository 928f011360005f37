"""Tables for the terminal. On a terminal they have a frame and fit its width; in a pipe they are plain Markdown."""

from __future__ import annotations

import csv
import io
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bitfront.constraints import fulfilled, total
from bitfront.engine.storage.records import SMALL, shares
from bitfront.errors import first_few
from bitfront.metrics.intervals import SIGNIFICANT
from bitfront.operations import DATA_OUT
from bitfront.spaces.base import counted

if TYPE_CHECKING:
    from bitfront.checkpoints.cycles import LearnedNetwork
    from bitfront.engine.analysis import Analysis
    from bitfront.engine.rebuild import Transformed
    from bitfront.engine.storage.run import Run
    from bitfront.engine.storage.trial import Trial

#: Number of the best trials that are printed; best.json has all.
SHOWN = 20
#: With more layers than these, choices are printed as counts; the page has a map of all.
LAYERS = 24
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
    for trial in _shown(run) if trials is None else trials:
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


def _shown(run: Run) -> list[Trial]:
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


def summary(run: Run) -> list[str]:
    """The remarks below the table of the best trials, one per line, and what to type next."""
    lines = remarks(run)
    if len(run.front_rows):
        folder = shlex.quote(str(run.folder))
        best = run.columns.number[run.front_rows[0]]
        lines.append(f"rebuild one: bitfront transform --run {folder} --trial {best}")
        lines.append(f"see it: bitfront report {folder}")
    return lines


def remarks(run: Run) -> list[str]:
    """The remarks below the table of the best trials, one per line."""
    lines = []
    shown = _shown(run)
    if shown:
        lines += ["", *_choices(run, shown)]
    if len(run.front_rows) > len(shown):
        lines.append(f"  ... and {len(run.front_rows) - len(shown):,} more of the front in {run.folder / 'best.json'}")
    lines.append("")
    lines += compared(run)
    lines += optimistic(run)
    lines += [f"{name} is {kind}: {why}" for name, (kind, why) in reasons(run).items()]
    lines += [text] if (text := run.in_float.text) else []
    if run.constraints:
        lines.append(constrained(run))
    failed = int((~run.columns.complete).sum())
    if failed:
        lines.append(f"{failed:,} candidates failed; the first with: {run.columns.first_error}")
    front = "" if len(run.objectives.directions) == 1 else f"; {len(run.front_rows):,} on the front"
    lines.append(
        f"{len(run):,} of {counted(run.space.size)} candidates evaluated ({run.stopped}){front}; saved in {run.folder}"
    )
    return lines


def compared(run: Run) -> list[str]:
    """Which trials of the front the samples can distinguish in accuracy, or in what leads, one line per statement."""
    if len(run.compared) < 2:
        return []
    best, *others = run.compared
    lines = []
    same = [c.number for c in others if c.p_best >= SIGNIFICANT]
    where = f"on the same {run.samples:,} samples, paired" if run.samples else "paired"
    cost = next((p for p in run.objectives.parts if p.metric not in run.qualities), None)
    most, test = ("the most accurate", "McNemar p") if run.leading == "accuracy" else ("the best", "paired bootstrap p")
    if same and cost is not None:
        trials = [run.trial(n) for n in same]
        sign = 1 if (cost.direction == "minimize") == (cost.scale > 0) else -1
        cheapest = min(trials, key=lambda t: sign * t.metrics[cost.metric])
        best_cost, least_cost = run.trial(best.number).metrics[cost.metric], cheapest.metrics[cost.metric]
        if sign * least_cost < sign * best_cost:
            word = "smaller" if sign > 0 else "larger"
            p = next(c.p_best for c in others if c.number == cheapest.number)
            lines.append(
                f"trial {cheapest.number} is {word} than trial {best.number}, {most} ({cost.metric} "
                f"{number(least_cost)} against {number(best_cost)}), and not distinguishably worse "
                f"({test} = {p:.2g}, {where})"
            )
    near = [f"{c.number} from {c.above} (p = {c.p_above:.2g})" for c in others if c.p_above >= SIGNIFICANT]
    if near:
        lines.append(f"neighbours that these samples do not tell apart: {first_few(near, 5)}")
    return lines


def optimistic(run: Run) -> list[str]:
    """By how much the front looks better on the samples of the search than on the test split, where that is more than
    chance explains."""
    found = run.optimism
    if found is None or found.interval[0] <= 0:
        return []
    unit = "points" if run.qualities[run.leading].share else "%"
    low, high = (f"{end:.2g}" for end in found.interval)
    trials = f"mean of {found.members} trials" if found.members > 1 else "one trial"
    return [
        f"the front looks {found.value:.2g} {unit} better than it is ({trials}; 95 % interval {low} to {high}): "
        f"compared with the float model, its {run.leading} is {_worse(found.tested, unit)} on the test split, and "
        f"{_worse(found.searched, unit)} on the samples of the search. A search also picks what its samples favour by "
        "chance; more samples help"
    ]


def _worse(by: float, unit: str) -> str:
    """How much worse than another value a metric is."""
    return f"{abs(by):.2g} {unit} {'worse' if by >= 0 else 'better'}"


def reasons(run: Run) -> dict[str, tuple[str, str]]:
    """Metric → (kind, reason), for kinds that are not the usual one of the metric; the first metric per reason."""
    names: dict[tuple[str, str], str] = {}
    for name, (kind, reason) in run.kinds.items():
        if reason:
            names.setdefault((kind, reason), name)
    return {name: kind_and_reason for kind_and_reason, name in names.items()}


def constrained(run: Run) -> str:
    """The number of trials that fulfil the constraints; if there are none, which trial comes nearest."""
    texts = ", ".join(c.text for c in run.constraints)
    count = int((fulfilled(run.constraints, run.columns.metrics) & run.columns.complete).sum()) if len(run) else 0
    if count:
        return f"constraints: {texts}; {count:,} of the evaluated candidates fulfil them"
    if not run.columns.complete.any():
        return f"no candidate was evaluated that fulfils {texts}"
    missed = np.where(run.columns.complete, total(run.constraints, run.columns.metrics), np.inf)
    row = int(np.argmin(missed))
    misses = ", ".join(
        f"{c.metric} {number(run.columns.metrics[c.metric][row])} ({c.comparison} {number(c.bound)} is asked)"
        for c in run.constraints
        if c.excess(run.columns.metrics[c.metric][row : row + 1])[0] != 0
    )
    return f"no evaluated candidate fulfils {texts}; the nearest is trial {run.columns.number[row]} with {misses}"


def _choices(run: Run, shown: Sequence[Trial]) -> list[str]:
    """The choices of trials, one line each, below a line that says what is shown."""
    from bitfront.checkpoints.cycles import learned_network  # it loads torch, which the page does without

    learned = [learned_network(run.folder, trial.config) for trial in shown]
    if any(learned):
        return [
            "what they learned: mean bits of the weights that are not zero, share of those that are, mean bits of the "
            "input; without signs:",
            *(f"  {t.number}: {_learned(network)}" for t, network in zip(shown, learned, strict=True)),
        ]
    named = {e["config"]["name"] for t in shown for e in _sites(t).values()} - {"NA"}
    results = " → data_out" if any(f"{DATA_OUT}_" in str(_sites(t)) for t in shown) else ""
    what = [f"bits of data_in/weight/bias{results}{_in(named)}"] if any(_sites(t) for t in shown) else []
    widths = {t.number: run.space.layer_widths(np.array(t.code, dtype=np.int64)) for t in shown}
    what += ["widths"] if any(widths.values()) else []
    as_counts = max((len(_sites(t)) + len(widths[t.number]) for t in shown), default=0) > LAYERS
    title = "how many layers chose what (the report names them)" if as_counts else "what they chose"
    lines = [f"{title}, {' and '.join(what)}:"]
    for trial in shown:
        bits = run.space.operand_bits(np.array(trial.code, dtype=np.int64))
        line = chosen(trial, bits, named=len(named) > 1, widths=widths[trial.number], as_counts=as_counts)
        lines.append(f"  {trial.number}: {line}{_left_by_choice(run, trial.number)}")
    return lines


def _learned(network: LearnedNetwork | None) -> str:
    """What was learned of each layer, in one line."""
    layers = () if network is None else network.layers
    return ", ".join(f"{e.path} {e.weight_bits:.1f}/{e.pruned:.0%}/{e.data_in_bits:.1f}" for e in layers) or "unknown"


def _left_by_choice(run: Run, number: int) -> str:
    """What a trial leaves in float, if that is clearly more than what every candidate does."""
    weights, macs = run.float_shares.get(number, (0.0, 0.0))
    if max(weights - run.in_float.weights, macs - run.in_float.macs) <= SMALL:
        return ""
    return f"; in float: {shares(weights, macs)}"


def _sites(trial: Trial) -> dict[str, Any]:
    """Site → table of its format, in the configuration of a trial."""
    formats = trial.config if "by" in trial.config else trial.config["quantize"]
    sites = {site: entry for site, entry in formats.items() if site not in ("by", "default", "default_for")}
    return {site: entry for site, entry in sites.items() if "channel_multiplier" not in entry["config"]}


def _in(formats: set[str]) -> str:
    return f" in {next(iter(formats))}" if len(formats) == 1 else ""


def chosen(
    trial: Trial,
    bits: Mapping[str, Mapping[str, int | None]],
    *,
    named: bool = True,
    widths: Mapping[str, tuple[str, int]] | None = None,
    as_counts: bool = False,
) -> str:
    """The choices of a trial in one line: bits of data_in/weight/bias → data_out, ``-`` for an operand in float.

    Args:
        bits: site → operand → bits; None, shown as ``?``, if they are not known.
        named: with the name of the number format.
        widths: layer → (label of its multiplier, number of channels), for layers whose width is a choice.
        as_counts: with the number of layers that chose the same in place of their names, the most frequent first.
    """
    parts = [(layer, f"{label} ({width})") for layer, (label, width) in (widths or {}).items()]
    for site, entry in _sites(trial).items():
        config = entry["config"]
        sizes = "/".join(_bits_of(role, bits.get(site, {})) for role in ("data_in", "weight", "bias"))
        sizes += f" → {_bits_of(DATA_OUT, bits[site])}" if DATA_OUT in bits.get(site, {}) else ""
        what = f"{config['name']} " if named else ""
        parts.append((site, "float" if config["name"] == "NA" else f"{what}{sizes}"))
    if as_counts:
        return ", ".join(
            f"{count} × {choice}" for choice, count in Counter(choice for _, choice in parts).most_common()
        )
    return ", ".join(f"{layer} {choice}" for layer, choice in parts)


def _bits_of(role: str, bits: Mapping[str, int | None]) -> str:
    """The bits of a site's operands of a role, joined by ``+``: there may be ``weight_ih`` and ``weight_hh``."""
    there = [b for o, b in bits.items() if o == role or (role != "data_in" and o.startswith(f"{role}_"))]
    return "+".join("?" if b is None else str(b) for b in there) or "-"


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
