"""What is said of a run below the table of its best trials, one line per statement.

What trials chose, which of them the samples tell apart, how much is chance, what stays in float, what to type next.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bitfront.constraints import fulfilled, total
from bitfront.engine.storage.records import SMALL, shares
from bitfront.errors import first_few
from bitfront.metrics.intervals import SIGNIFICANT
from bitfront.operations import DATA_OUT
from bitfront.report.tables import number, shown
from bitfront.spaces.base import counted

if TYPE_CHECKING:
    from bitfront.checkpoints.cycles import LearnedNetwork
    from bitfront.engine.storage.run import Run
    from bitfront.engine.storage.trial import Trial

#: With more layers than these, choices are printed as counts; the page has a map of all.
LAYERS = 24


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
    few = shown(run)
    if few:
        lines += ["", *_choices(run, few)]
    if len(run.front_rows) > len(few):
        lines.append(f"  ... and {len(run.front_rows) - len(few):,} more of the front in {run.folder / 'best.json'}")
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
