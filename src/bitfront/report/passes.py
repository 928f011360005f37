"""Tables of the passes that show something of a transformed model, under MASE's names, and files of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bitfront.errors import RunError, parsing
from bitfront.files import write_text
from bitfront.report.tables import Sheet, changes

if TYPE_CHECKING:
    from bitfront.engine.rebuild import Transformed


def sheets(result: Transformed) -> Iterator[tuple[str, Sheet]]:
    """(what it is, the table) of each pass that shows something, in the order of the file."""
    if result.pruned:
        yield "prune", _pruned(result)
    for name, _ in result.reports:
        yield name, TABLES[name](result)


def write(result: Transformed) -> list[Path]:
    """Write the tables that are to be saved, as CSV. Returns the files. Raises RunError where one cannot be written."""
    written = []
    for name, file in result.reports:
        if file:
            path = Path(file).expanduser()
            with parsing(RunError, f"{path}: cannot be written", "choose another file"):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, TABLES[name](result).to_csv(), RunError)
            written.append(path)
    return written


def _pruned(result: Transformed) -> Sheet:
    """Zeros of each pruned weight, as it is deployed: rounding makes more of them."""
    rows = [[name, f"{n:,}", f"{z:,}", f"{z / n:.1%}"] for name, (z, n) in result.pruned.items()]
    zeros, total = (sum(counts[k] for counts in result.pruned.values()) for k in (0, 1))
    rows.append(["total", f"{total:,}", f"{zeros:,}", f"{zeros / max(1, total):.1%}"])
    columns = ["site", "weights", "zero", "share"]
    return Sheet(columns, rows, right=columns[1:])


def _types(result: Transformed) -> Sheet:
    sites = {site.name for site in result.graph.sites}
    rows = [[n.name, n.path, n.op, n.type, "yes" if n.name in sites else "no"] for n in result.graph.nodes]
    return Sheet(["node", "module", "operation", "type", "can have a format"], rows)


def _shapes(result: Transformed) -> Sheet:
    """Shapes per sample; of parameters as they are."""
    held = {name: tuple(p.shape) for name, p in result.graph.model.named_parameters(remove_duplicate=False)}
    rows = [
        [
            node.name,
            ", ".join(map(_shape, node.inputs)),
            _shape(node.output),
            ", ".join(f"{name.rpartition('.')[2]} {_shape(held[name])}" for name in node.parameters if name in held),
        ]
        for node in result.graph.nodes
    ]
    return Sheet(["node", "in", "out", "parameters"], rows)


def _parameters(result: Transformed) -> Sheet:
    """What is known of each node: shapes, formats of its operands, and its cost."""
    rows = []
    for node in result.graph.nodes:
        formats = result.formats.get(node.name, {})
        shown = ", ".join(f"{operand} {form.label}" for operand, form in formats.items()) or "float"
        operations = "-" if node.operations is None else f"{node.operations:,}"
        rows.append([node.name, node.op, _shape(node.output), shown, operations, f"{node.macs:,}"])
    columns = ["node", "operation", "out", "formats", "operations", "multiply-accumulates"]
    return Sheet(columns, rows, right=columns[-2:])


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "-"


#: Pass → its table.
TABLES: Mapping[str, Callable[[Transformed], Sheet]] = {
    "summarize_quantization": changes,
    "report_node_type": _types,
    "report_node_shape": _shapes,
    "report_node_meta_param": _parameters,
}
