"""What a target is: it writes a candidate as files, and runs these files with a reader or a simulator of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray
from torch import nn

from bitfront.config import Table
from bitfront.errors import ExportError
from bitfront.exporters.lowering import lowered
from bitfront.exporters.program import Floats, Program
from bitfront.exporters.walking import SiteFormats
from bitfront.graph import Graph


class TargetSettings(Table):
    """Settings of a target; this class has none. Unknown keys are errors."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """What is exported.

    Attributes:
        name: of the files, and of what they define: a word of letters, digits and ``_``.
        graph: the captured model, with its weights; on the CPU.
        formats: site name → formats by operand, calibrated.
        model: the deployed model: the graph in these formats.
        origin: where it comes from, for the README: ``trial 12 of runs/jsc``.
        metrics: metric → value, likewise.
        classes: the name of each class, by the index of its output, likewise; empty where outputs are no classes.
        standardised: (name, mean, scale) of each feature of a sample, flattened: inputs are ``(x - mean) / scale``.
            Empty where features are taken as they are.
        data: facts about the data and how samples were made of it, likewise.
        change: what a target has changed of the searched network, in words; empty if nothing.
        changed: the titles of the layers whose parameters it has changed.
    """

    name: str
    graph: Graph
    formats: Mapping[str, SiteFormats]
    model: nn.Module
    origin: str = ""
    metrics: Mapping[str, float] | None = None
    classes: Sequence[str] = ()
    standardised: Sequence[tuple[str, float, float]] = ()
    data: Sequence[str] = ()
    change: str = ""
    changed: Sequence[str] = ()

    @property
    def program(self) -> Program:
        """It as integer operations. Raises ExportError if it has no such form."""
        if isinstance(self._lowered, ExportError):
            raise self._lowered
        return self._lowered

    @property
    def has_program(self) -> bool:
        """Whether it has a form in integer operations."""
        return isinstance(self._lowered, Program)

    @property
    def obstacle(self) -> str:
        """Why it has no form in integer operations; empty if it has one."""
        return str(self._lowered) if isinstance(self._lowered, ExportError) else ""

    @cached_property
    def _lowered(self) -> Program | ExportError:
        # A large network that has none is not run anew whenever somebody asks.
        try:
            return lowered(self.graph, self.formats)
        except ExportError as error:
            return error


class Target(ABC):
    """Writes a candidate for one kind of hardware or runtime.

    **What it does.** ``check`` says why a candidate cannot be written, before anything is. ``write`` writes the files.
    ``computed`` reads them back and runs them with the judge. Whoever exports compares what that gives with what the
    candidate computes, and keeps the files only if all numbers are equal.

    **What it may not do.** Use anything in ``computed`` but the files, or round a number that it gives.

    Class attributes:
        Settings: its settings, by ``--set KEY=VALUE``; they arrive as `settings`.
        judge: what runs the files, for messages: ``gcc with UBSan``.
        notice: why the judge takes long, for the end of a message; empty if it does not.
        whole: whether ``computed`` gives the numbers of the program's output; otherwise the float32 outputs.
    """

    Settings: ClassVar[type[TargetSettings]] = TargetSettings
    settings: TargetSettings
    judge: ClassVar[str]
    notice: ClassVar[str] = ""
    whole: ClassVar[bool] = True

    def __init__(self, settings: TargetSettings | None = None) -> None:
        self.settings = self.Settings() if settings is None else settings

    def check(self, candidate: Candidate) -> None:  # noqa: B027 (most targets have nothing to check)
        """Raises ExportError if the candidate cannot be written: what, why, and what to do. MissingExtraError if the
        judge is not installed."""

    def ready(self) -> None:  # noqa: B027 (most judges are libraries)
        """Raises ExportError if the judge is not installed. Not called where files are written without a check."""

    def suited(self, candidate: Candidate) -> Candidate:
        """The candidate as the files have it: itself, unless a runtime would change it. Then it is another network; its
        `change` says in what, and files are compared with it."""
        return candidate

    def exact(self, candidate: Candidate) -> bool:  # noqa: ARG002
        """Whether all numbers must be equal. If not, the README says by how much they differ."""
        return True

    @abstractmethod
    def write(self, candidate: Candidate, folder: Path) -> None:
        """Write the files into an empty folder."""

    @abstractmethod
    def computed(self, candidate: Candidate, folder: Path, x: Floats) -> NDArray[Any]:
        """What the files compute.

        Args:
            candidate: for names and shapes.
            folder: that of the files.
            x: float32, shape ``(samples, *features)``.

        Returns:
            shape ``(samples, *outputs)``: int64 or float32, as `whole` says.

        Raises:
            ExportError: the judge refuses the files; the message has its words.
        """

    @abstractmethod
    def usage(self, candidate: Candidate) -> str:
        """How to use the files, as Markdown: a section of the README."""

    def figures(self, candidate: Candidate) -> dict[str, float]:  # noqa: ARG002
        """What the files need, by name with a unit: ``flash_bytes``."""
        return {}


def without_floats(candidate: Candidate, target: str) -> Program:
    """The program of a candidate, for a target that has no float arithmetic.

    Raises:
        ExportError: there are floats in it.
    """
    program = candidate.program
    if program.floats:
        raise ExportError(
            f"{program.floats[0]}: its numbers are float32, because a scale is no power of two or a bias has no "
            f"format, and {target} has no floats; search `integer` formats for every operand, biases too, or take the "
            "target c"
        )
    return program
