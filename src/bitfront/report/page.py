"""The page: one HTML file with everything in it, to be opened anywhere and mailed. It asks the network for nothing.

Tables are written here, so that they are there for every reader; pictures are drawn in the browser by plotly.js and
``page.js`` from the JSON in the page. Every text of the user's (names, errors, paths) is escaped. A content security
policy in the page forbids it to load anything.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitfront import tomlfile
from bitfront.errors import require
from bitfront.report import data, figures
from bitfront.report.grid import COLOURS, CellGrid, bars, readable
from bitfront.report.importance import Effect, Importance, active
from bitfront.report.tables import compared, constrained, number, reasons
from bitfront.spaces.model_space import Size

if TYPE_CHECKING:
    from bitfront.engine.storage.run import Run, Trial

#: Bytes that the page stays below, so that it can be mailed.
LIMIT = 5_900_000
#: (trials drawn, whether bars stand beside the tables of grids); the next one is taken where the page is too large.
DRAWN = ((data.SHOWN, True), (1000, True), (500, True), (200, True), (50, False))
#: Rows of the tables of the front and of failures.
ROWS = 50
#: Characters of an error in the page.
ERROR = 2000


def page(run: Run, grids: Sequence[CellGrid], influences: Sequence[Importance]) -> str:
    """The whole page as text.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    offline: Any = require("plotly.offline", "report", "the report")
    script = offline.get_plotlyjs()
    fixed = {
        "title": html.escape(run.config.run_name),
        "style": _part("page.css"),
        "plotly": script,
        "code": _part("page.js"),
        "summary": _summary(run),
        "best": _best(run),
        "layers": _layers(run),
        "influences": _influences(run, influences),
        "failures": _failures(run),
        "config": html.escape(tomlfile.dumps(run.config.effective())),
    }
    template = Template(_part("page.html"))
    pictures = [_picture(own) for own in grids]
    for limit, pictured in DRAWN:
        drawn = _grids(grids, pictures if pictured else [])
        text = template.substitute(fixed, grids=drawn, data=_json(content(run, influences, limit)))
        if len(text.encode()) < LIMIT:
            break
    return text


def content(run: Run, influences: Sequence[Importance], limit: int = data.SHOWN) -> dict[str, Any]:
    """What the pictures of the page are drawn from, as JSON.

    Args:
        limit: trials drawn, where there are more.
    """
    cloud, history = data.cloud(run, limit), data.history(run, limit)
    lines = data.parallel(run, influences)
    own, rows = run.columns, np.union1d(cloud.rows, np.concatenate([cloud.front, lines.rows]))
    place = {row: i for i, row in enumerate(rows.tolist())}
    codes = own.codes(rows)
    kept = [np.where(active(run.space, c, codes), codes[:, c], -1) for c in range(codes.shape[1])]
    names = data.metric_names(run)
    table, keys, roots = _interned(run.space.decode(code) for code in codes)
    heights = data.heights(lines)
    return {
        "command": f"bitfront transform --run {shlex.quote(str(run.folder))} --check --trial ",
        "metrics": {m: data.title(run, m) for m in names},
        "better": {m: data.better(run, m) for m in names},
        "quality": cloud.quality,
        "costs": list(cloud.costs),
        "note": cloud.note,
        "reference": {m: run.reference.get(m) for m in names},
        "parameters": [{"name": p.name, "labels": p.labels} for p in run.space.parameters],
        "number": own.number[rows].tolist(),
        "values": {m: [_brief(v) for v in own.metrics[m][rows].tolist()] for m in names},
        "choices": [c.tolist() for c in kept],
        "drawn": [place[r] for r in cloud.rows.tolist()],
        "front": [place[r] for r in cloud.front.tolist()],
        "low": _numbers(cloud.low),
        "high": _numbers(cloud.high),
        "test": [run.test_results.get(n, {}).get("accuracy") for n in own.number[cloud.front].tolist()],
        "config": {"nodes": table, "keys": keys, "roots": roots},
        "influences": [
            {
                "metric": i.metric,
                "title": data.title(run, i.metric),
                "missing": i.missing,
                "rest": i.rest,
                "trials": i.trials,
                "parameters": [
                    {"name": p.parameter, "share": p.share, "effects": _effects(p.effects, run.space.sizes)}
                    for p in i.parameters[: figures.CELLS]
                ],
            }
            for i in influences
        ],
        "history": {
            "courses": [
                {
                    "title": c.title,
                    "direction": c.direction,
                    "trials": (c.rows + 1).tolist(),
                    "numbers": own.number[c.rows].tolist(),
                    "seconds": _numbers(history.end_seconds[c.rows]),
                    "values": _numbers(c.values),
                    "steps": (c.steps + 1).tolist(),
                    "step_seconds": _numbers(history.end_seconds[c.steps]),
                    "best": _numbers(c.best),
                }
                for c in history.courses
            ],
            "end": [len(run), float(history.end_seconds[-1]) if len(run) else 0.0],
            "trials": history.trials.tolist(),
            "seconds": _numbers(history.seconds),
            "volume": _numbers(history.volume),
            "missing": history.missing,
        },
        "parallel": {
            "axes": [{"title": a.title, "ticks": figures.ticks(lines, i)} for i, a in enumerate(lines.axes)],
            "rows": [place[r] for r in lines.rows.tolist()],
            "front": lines.front.tolist(),
            "heights": [_numbers(h) for h in heights],
            "left_out": lines.left_out,
        },
    }


def _effects(own: Sequence[Effect], sizes: Mapping[str, Size]) -> list[dict[str, Any]]:
    brief = data.shortened([e.label for e in own], sizes)
    return [{**vars(e), "short": text} for e, text in zip(own, brief, strict=True)]


def _part(name: str) -> str:
    return files("bitfront.report").joinpath(name).read_text(encoding="utf-8")


def _json(document: object) -> str:
    """JSON that can stand in a script: no NaN, and nothing that ends the script or begins a comment."""
    text = json.dumps(_finite(document), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def _numbers(values: NDArray[np.float64]) -> list[float]:
    return [_brief(v) for v in values.tolist()]


def _brief(value: float) -> float:
    """Seven digits: more than a picture shows, in half the bytes."""
    return float(f"{value:.7g}")


def _interned(configs: Iterable[Mapping[str, Any]]) -> tuple[list[Any], list[list[str]], list[int]]:
    """Candidates spelled out, with what they share written once: (nodes, lists of keys, a node per candidate).

    A node is a list of a value alone, or [index of a list of keys, the node of each].
    """
    nodes: dict[tuple[Any, ...], int] = {}
    keys: dict[tuple[str, ...], int] = {}

    def node(value: Any) -> int:
        if isinstance(value, Mapping):
            own = keys.setdefault(tuple(value), len(keys))
            key: tuple[Any, ...] = ("table", own, tuple(node(v) for v in value.values()))
        else:
            key = ("value", json.dumps(value))
        return nodes.setdefault(key, len(nodes))

    roots = [node(config) for config in configs]
    written = [[k[1], list(k[2])] if k[0] == "table" else [json.loads(k[1])] for k in nodes]
    return written, [list(k) for k in keys], roots


def _summary(run: Run) -> str:
    space, own = run.space, run.columns
    failed = int((~own.complete).sum())
    objectives = zip(run.objectives.names, run.objectives.directions, strict=True)
    facts = {
        "model": run.config.model,
        "dataset": run.config.dataset,
        "objectives": ", ".join(f"{name} ({direction})" for name, direction in objectives),
        "trials": f"{len(run):,} of {space.size:,} candidates" + (f", {failed:,} failed" if failed else ""),
        "state": run.stopped or "the search was still running when this page was made",
        "strategy": run.config.search.strategy.name if run.config.search else "",
        "front": f"{len(run.front_rows):,} trials",
        "samples": f"{run.samples:,} per candidate" if run.samples else "",
        "evaluation": f"{own.duration.sum():,.3g} s, summed over trials",
        "run folder": str(run.folder),
    }
    facts["undefined"] = ", ".join(f"{m} has no value in {n:,} trials" for m, n in data.undefined(run).items())
    rows = "".join(f"<div><dt>{k}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items() if v)
    remarks = compared(run) + [f"{m} is {kind}: {why}" for m, (kind, why) in reasons(run).items()]
    remarks += [constrained(run)] if run.constraints else []
    told = "".join(f"<li>{html.escape(line)}</li>" for line in remarks)
    return f"<dl>{rows}</dl>" + (f"<ul>{told}</ul>" if told else "")


def _table(caption: str, head: Sequence[str], rows: Iterable[str], kind: str = "") -> str:
    """A table that scrolls inside its own box, which the keyboard reaches."""
    cells = "".join(f'<th scope="col">{h}</th>' for h in head)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(caption)}">'
        f'<table class="{kind}"><caption>{html.escape(caption)}</caption><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _best(run: Run) -> str:
    names = list(dict.fromkeys([*(p.metric for p in run.objectives.parts), *data.metric_names(run)]))
    tested, trained = bool(run.reference_test), bool(run.finetuned)
    head = ["trial", *(html.escape(data.title(run, m)) for m in names)]
    head += ["test accuracy"] * tested + ["fine-tuned accuracy"] * trained

    def cells(values: Mapping[str, float | None], ends: Mapping[str, tuple[float, float]]) -> str:
        out = ""
        for name in names:
            value = values.get(name)
            text = number(math.nan if value is None else value)
            span = "–".join(number(e) for e in ends[name]) if name in ends else ""
            out += f"<td>{text}" + (f" <small>{span}</small>" if span else "") + "</td>"
        return out

    reference = {m: math.nan if v is None else v for m, v in run.reference.items()}
    last = f"<td>{number(run.reference_test.get('accuracy', math.nan))}</td>" * tested + "<td></td>" * trained
    rows = [f'<tr><th scope="row">float model</th>{cells(reference, run.intervals(reference))}{last}</tr>']
    shown = [run.row(int(r)) for r in run.front_rows[:ROWS]]
    shown += [run.trial(n) for n in run.finetuned if n not in {t.number for t in shown}]
    for trial in shown:
        button = f'<button type="button" class="trial" data-trial="{trial.number}">{trial.number}</button>'
        last = f"<td>{number(trial.test_metrics.get('accuracy', math.nan))}</td>" * tested
        last += f"<td>{_trained(trial)}</td>" * trained
        rows.append(f'<tr><th scope="row">{button}</th>{cells(trial.metrics, trial.intervals)}{last}</tr>')
    more = len(run.front_rows) - ROWS
    note = f"<p>{more:,} more trials of the front are in best.json.</p>" if more > 0 else ""
    return _table("Best trials, with 95 % intervals where there are any", head, rows, "numbers") + note


def _trained(trial: Trial) -> str:
    own = trial.finetuned
    if own is None:
        return ""
    if own.failed:
        return html.escape(f"failed: {own.failed}")
    value = own.metrics.get("accuracy")
    return number(math.nan if value is None else value) + ("" if own.kept else " (no better)")


def _layers(run: Run) -> str:
    own = data.layer_map(run, data.cloud(run).front[:ROWS])
    if not own.places:
        return "<p>Nothing was to be chosen.</p>"
    if not own.numbers:
        return "<p>No trial is on the front.</p>"
    head = [
        "site/operand",
        *(f'<button type="button" class="trial" data-trial="{n}">{n}</button>' for n in own.numbers),
    ]
    rows = []
    for place, labels, clear, shades in zip(own.places, own.labels, own.short, own.shades, strict=True):
        cells = "".join(
            f'<td style="{_paint(shade)}" title="{html.escape(label)}">{html.escape(text)}</td>'
            for label, text, shade in zip(labels, clear, shades.tolist(), strict=True)
        )
        rows.append(f'<tr><th scope="row">{html.escape(place)}</th>{cells}</tr>')
    return _table("Bits or widths that the trials of the front chose", head, rows, "map")


def _paint(shade: float) -> str:
    """The colour of a share, and a text colour that can be read on it."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if not math.isfinite(shade):
        return ""
    colour = colormaps[COLOURS](shade)
    return f"background:{to_hex(colour)};color:{readable(colour)}"


def _grids(grids: Sequence[CellGrid], pictures: Sequence[str]) -> str:
    """Heatmaps as tables, with bars beside them where there are `pictures`."""
    if not grids:
        return (
            "<p>Give two parameters to see every metric over them: "
            "<code>bitfront report RUN --x PARAMETER --y PARAMETER</code>.</p>"
        )
    parts = [] if pictures else ["<p>For bars there is no room in this page; they stand in the folder figures.</p>"]
    for own, picture in zip(grids, pictures or [""] * len(grids), strict=True):
        known = own.values[np.isfinite(own.values)]
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
        rows = []
        for r in range(len(own.rows) - 1, -1, -1):
            cells = ""
            for c in range(len(own.columns)):
                value = float(own.values[r, c])
                style = _paint((value - low) / (high - low) if high > low else 0.5) if own.trials[r, c] else ""
                kind = "" if own.trials[r, c] else ("failed" if own.failed[r, c] else "empty")
                tip = f"{own.trials[r, c]:,} trials" if own.trials[r, c] else kind.replace("empty", "never evaluated")
                cells += f'<td class="{kind}" style="{style}" title="{tip}"><span>{own.text(r, c)}</span></td>'
            rows.append(f'<tr><th scope="row">{html.escape(own.rows[r])}</th>{cells}</tr>')
        head = ["", *map(html.escape, own.columns)]
        caption = ", ".join(filter(None, [own.title, own.note])) + f"; {own.x} across, {own.y} up"
        alt = f"{own.title} as bars over {own.x} and {own.y}; the values are in the table"
        image = f'<img src="{picture}" alt="{html.escape(alt)}">' if picture else ""
        parts.append(f'<div class="grid">{_table(caption, head, rows, "map")}{image}</div>')
    return "".join(parts)


def _picture(own: CellGrid) -> str:
    """The bars as an image in a palette of 128 colours: a third of the bytes."""
    from PIL import Image

    drawn, out = io.BytesIO(), io.BytesIO()
    bars(own).savefig(drawn, format="png", dpi=90)
    Image.open(drawn).convert("RGB").quantize(128).save(out, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _influences(run: Run, own: Sequence[Importance]) -> str:
    """The main effects as a table, for who does not see the picture."""
    parts = []
    for one in own:
        if one.missing:
            parts.append(f"<p>{html.escape(one.metric)}: {html.escape(one.missing)}.</p>")
            continue
        rows = [
            f'<tr><th scope="row">{html.escape(p.parameter)}</th><td>{p.share:.1%}</td><td>{html.escape(e.label)}</td>'
            f"<td>{number(e.mean)}</td><td>{e.effect:+.4g}</td><td>{e.trials:,}</td></tr>"
            for p in one.parameters[: figures.CELLS]
            for e in p.effects
        ]
        head = ["parameter", "share of the variance", "option", "mean with it", "difference", "trials"]
        caption = f"What the options do to {data.title(run, one.metric)}"
        parts.append(
            f"<details><summary>{html.escape(caption)}, as a table</summary>{_table(caption, head, rows, 'numbers')}"
            "</details>"
        )
    return "".join(parts)


def _failures(run: Run) -> str:
    found = data.failures(run)
    if not found:
        return "<p>No candidate failed.</p>"
    rows = [
        f'<tr><th scope="row">{f.count:,}</th><td>{f.first}</td>'
        f'<td class="error">{html.escape(f.error[:ERROR])}</td></tr>'
        for f in found[:ROWS]
    ]
    more = f"<p>{len(found) - ROWS:,} more kinds of error are in the store.</p>" if len(found) > ROWS else ""
    return _table("Why candidates failed", ["trials", "the first", "error"], rows) + more
