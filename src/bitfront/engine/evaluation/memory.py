"""What calibration has learned so far, shared by the evaluators of a search, and kept in its run folder.

Everything is filed under a fingerprint of what it was learned from: the model with its weights, the calibration
samples, and the code that learns. So an evaluator of another model asks for other things, and edited code learns again.
A worker process gets what is known when it is started.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from bitfront.engine.storage import learned
from bitfront.engine.storage.learned import Entry, Learned
from bitfront.errors import UserError
from bitfront.formats.base import Operand
from bitfront.graph import Graph
from bitfront.transforms.observe import Observed

#: What took so many seconds to learn is written at once, the rest at the end.
WORTH_WRITING = 0.2
#: The parts of Bitfront whose code decides what is learned.
_LEARNING = ("formats", "operations", "transforms", "graph", "engine/evaluation/calibration.py")


@dataclass(eq=False)
class Known:
    """What is known of one model and its samples; it grows.

    Attributes:
        entries: what was learned.
        observed: (whole samples are kept, site, operand) → what was seen there; of this process.
        statistics: site → the statistics of its output in float; of this process.
    """

    entries: dict[Learned, Entry] = field(default_factory=dict)
    observed: dict[tuple[bool, str, Operand], Observed] = field(default_factory=dict)
    statistics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(eq=False)
class Memory:
    """Everything that calibration has learned in a search. Picklable, without what was observed.

    Attributes:
        folder: the run folder that it is kept in; None: nowhere.
        writes: whether new files are written there.
        trouble: why it is not kept; empty if it is.
    """

    folder: Path | None = None
    writes: bool = True
    trouble: str = ""
    _known: dict[str, Known] = field(default_factory=dict)
    _new: dict[str, dict[Learned, Entry]] = field(default_factory=dict)
    _seconds: float = 0.0
    _sources: WeakKeyDictionary[Graph, tuple[Tensor, str]] = field(default_factory=WeakKeyDictionary)

    def __getstate__(self) -> dict[str, Any]:
        known = {source: Known(of.entries) for source, of in self._known.items()}
        return {"folder": self.folder, "writes": self.writes, "_known": known}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(state["folder"], state["writes"])  # type: ignore[misc]
        self._known.update(state["_known"])

    def of(self, graph: Graph, x: Tensor) -> tuple[str, Known]:
        """(the fingerprint, what is known) of a float model and its calibration samples."""
        if graph not in self._sources or self._sources[graph][0] is not x:
            self._sources[graph] = x, fingerprint(graph, x)
        source = self._sources[graph][1]
        return source, self._known.setdefault(source, Known())

    def add(self, source: str, entries: Mapping[Learned, Entry], seconds: float) -> None:
        """Remember what was learned, and write it where it took long.

        Args:
            source: as ``of`` gives it.
            entries: in `Known` already.
            seconds: how long that took.
        """
        self._new.setdefault(source, {}).update(entries)
        self._seconds += seconds
        if self._seconds > WORTH_WRITING:
            self.write()

    def write(self) -> None:
        """Write everything new. Where that fails, ``trouble`` says why, and nothing is written any more."""
        new, self._new, self._seconds = self._new, {}, 0.0
        if self.folder is None or not self.writes or self.trouble:
            return
        try:
            for source, entries in new.items():
                learned.write(self.folder, source, entries)
        except UserError as error:
            self.trouble = f"what calibration learned is not kept, and learned again next time: {error}"

    def keep(self, folder: Path, graph: Graph, x: Tensor, writes: bool = True) -> list[str]:
        """Take up what a run folder has for a model and its samples, and keep everything there from now on.

        Args:
            writes: whether files are written and deleted there.

        Returns:
            Notes on files that are damaged, or were learned from something else; they are deleted.
        """
        self.folder, self.writes = folder, writes
        self._new = {source: dict(of.entries) for source, of in self._known.items() if of.entries}
        paths = learned.files(folder)
        if not paths:
            return []
        source, known = self.of(graph, x)
        damaged, foreign, notes = [], [], []
        for path in paths:
            try:
                before, entries = learned.read(path)
            except UserError as error:
                damaged.append(path)
                notes.append(str(error))
                continue
            if before != source:
                foreign.append(path)
                continue
            known.entries.update(entries)
            self._new[source] = {key: e for key, e in self._new.get(source, {}).items() if key not in entries}
        if foreign:
            notes.append(
                f"what calibration learned before is learned again: the model, its weights, the samples or the code "
                f"are others than those of {foreign[0].name}"
                + (f" and {len(foreign) - 1} more files" if len(foreign) > 1 else "")
            )
        if writes:
            for path in (*damaged, *foreign):
                path.unlink(missing_ok=True)
        return notes


def fingerprint(graph: Graph, x: Tensor) -> str:
    """SHA-256, in hexadecimal, of everything that calibration on samples `x` depends on: the model's weights and graph,
    the samples, the code that learns."""
    digest = hashlib.sha256()
    modules = {type(module).__module__ for module in graph.model.modules()}
    modules |= {str(getattr(site.operation.call, "__module__", "")) for site in graph.sites}
    parts = [torch.__version__, _code(), code_of(modules), repr(graph.nodes)]
    parts += [str(node.format_node()) for node in graph.fx_graph.nodes] if graph.fx_graph is not None else []
    for part in parts:
        digest.update(part.encode() + b"\0")
    for name, tensor in (*graph.model.state_dict().items(), ("samples", x)):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


@cache
def _code() -> str:
    """A fingerprint of the code that learns."""
    digest, root = hashlib.sha256(), Path(__file__).parents[2]
    for part in _LEARNING:
        path = root / part
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def code_of(modules: Iterable[str]) -> str:
    """A fingerprint of the source files of modules outside torch and Bitfront; empty where there are none."""
    outside = sorted({name for name in modules if name.partition(".")[0] not in ("torch", "bitfront", "")})
    digest = hashlib.sha256()
    for name in outside:
        try:
            source = inspect.getsource(sys.modules[name])
        except (OSError, TypeError, KeyError):  # of an interactive session
            source = ""
        digest.update(f"{name}\0{source}\0".encode())
    return digest.hexdigest() if outside else ""
