"""From a candidate to files on disk: written, read back, compared, and only then called good."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitfront.config import settings_of
from bitfront.errors import ExportError
from bitfront.events import Events
from bitfront.exporters import oracle
from bitfront.exporters.targets import TARGETS
from bitfront.exporters.targets.base import Candidate, Target
from bitfront.files import shown

#: At the end of the name of a folder whose files were not compared.
UNCHECKED = "-unchecked"
#: Samples that the deployed model computes at a time.
_CHUNK = 1024


@dataclass(frozen=True)
class Exported:
    """Files that were written.

    Attributes:
        target: the name of the target.
        folder: the folder of the files.
        files: their names.
        judge: what ran them; empty if nothing did.
        samples: on how many samples their numbers were compared; 0: on none.
        differing: on how many of these a number differs; 0 for every target but an approximate one.
        difference: the largest difference of two outputs, absolute.
        alike: on how many samples the largest output is the same one.
        figures: what the files need, by name with a unit.
        accumulator_bits: bits of the widest sum; None for a target that is not made of the integer program.
        change: what the target has changed of the searched network, in words; files are compared with it then.
        metrics: what a changed network reaches, by metric, measured on the samples of the search.
    """

    target: str
    folder: Path
    files: tuple[str, ...]
    judge: str
    samples: int
    differing: int
    difference: float = 0.0
    alike: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)
    accumulator_bits: int | None = None
    change: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def message(self) -> str:
        """What was written and how it was checked, in a sentence or two."""
        folders = Counter(file.partition("/")[0] for file in self.files if "/" in file)
        listed = ", ".join(
            [f for f in self.files if "/" not in f] + [f"{name}/ ({count} files)" for name, count in folders.items()]
        )
        reached = ", ".join(f"{metric} {_value(value)}" for metric, value in self.metrics.items())
        reached = f"; measured with this change: {reached}" if reached else ""
        if not self.samples:
            changed = f"; {self.change}{reached}" if self.change else ""
            return f"{shown(self.folder)}: {listed}; not checked{changed}"
        equal = self.samples - self.differing
        return (
            f"{shown(self.folder)}: {listed}; run with {self.judge} on {self.samples:,} samples: {equal:,} of "
            f"{self.samples:,} equal to the searched network in every bit"
            f"{f', with {self.change}' if self.change else ''}"
            f"{f'; {self.approximation}' if self.differing else ''}{reached}"
        )

    @property
    def approximation(self) -> str:
        """How far the outputs of an approximate target are off, in words."""
        return (
            f"the largest output is the same one on {self.alike:,} of {self.samples:,}, and outputs differ by at most "
            f"{self.difference:.3g}"
        )


def target_named(name: str, settings: Mapping[str, Any] | None = None) -> Target:
    """A target with its settings.

    Raises:
        ConfigError: there is no such target, or a setting is unknown or has a wrong value.
    """
    kind = TARGETS.get(name)
    return kind(settings_of(kind.Settings, settings or {}, ("export", TARGETS.official(name))))


def export(
    candidate: Candidate,
    target: Target,
    folder: Path,
    x: Tensor,
    *,
    check: bool = True,
    measure: Callable[[nn.Module], Mapping[str, float]] | None = None,
    events: Events | None = None,
) -> Exported:
    """Write a candidate, run the files, compare, and put them into their place.

    Args:
        candidate: what is exported.
        target: the form.
        folder: where the files go. One that an earlier export has written is replaced.
        x: samples to compare on, float32 of shape (samples, *features), on the CPU; at least one.
        check: whether the files are run. If not, ``-unchecked`` is added to the name of the folder.
        measure: gives the metrics of a model on the samples of the search. It is called where the target changes the
            network; without it, the README has the metrics of the searched one alone.
        events: receives notes on what is being done.

    Raises:
        ExportError: the candidate has no such form; the files compute something else, and are not kept; or they cannot
            be written.
    """
    events, name = events or Events(), TARGETS.name_of(type(target))
    if check and not len(x):
        raise ExportError("there are no samples to compare on; give at least one")
    target.check(candidate)
    if check:
        target.ready()
    folder = folder if check else folder.with_name(f"{folder.name}{UNCHECKED}")
    if folder.exists() and not (folder / README).is_file():
        raise ExportError(f"{shown(folder)} exists, and no export has written it; choose another --output")
    candidate = target.suited(candidate)
    metrics = measure(candidate.model) if measure and candidate.change else {}
    expected = _expected(candidate, target, x) if check else None
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        target.write(candidate, part)
        if candidate.standardised:
            _write_scaler(candidate, part / SCALER)
        differing, difference, alike = 0, 0.0, 0
        if expected is not None:
            on = f"on {len(x):,} samples{target.notice}"
            events.note(f"running what was written for {name} with {target.judge}, {on}")
            differing, difference, alike = _differing(candidate, target, part, x, expected)
        files = tuple(sorted(str(p.relative_to(part)) for p in part.rglob("*") if p.is_file()))
        whole = candidate.program.widest if target.whole else None
        result = Exported(
            name, folder, (*files, README), target.judge if check else "", len(x) if check else 0, differing,
            difference, alike, target.figures(candidate), whole, candidate.change, metrics,
        )  # fmt: skip
        (part / README).write_text(_readme(candidate, target, result), encoding="utf-8")
        if folder.exists():
            events.note(f"the files of an earlier export in {shown(folder)} are replaced")
            shutil.rmtree(folder)
        part.replace(folder)
    except OSError as error:
        raise ExportError(f"{shown(folder)}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return result


README = "README.md"
#: How features become inputs, where they are standardised.
SCALER = "standardise.json"
#: Names of classes that the README lists.
_LISTED = 50


def _write_scaler(candidate: Candidate, path: Path) -> None:
    names, means, scales = zip(*candidate.standardised, strict=True)
    path.write_text(json.dumps({"features": names, "mean": means, "scale": scales}, indent=1) + "\n", encoding="utf-8")


def _expected(candidate: Candidate, target: Target, x: Tensor) -> NDArray[Any]:
    """What the files must compute. A program is first compared with the deployed model.

    Raises:
        ExportError: they differ.
    """
    with torch.no_grad():
        deployed = np.concatenate([candidate.model(part.clone()).numpy() for part in torch.split(x, _CHUNK)])
    if not target.whole:
        return deployed
    program = candidate.program
    numbers = oracle.run(program, x.numpy())
    differing = _rows(oracle.as_floats(program.result, numbers), deployed)
    if differing:
        raise ExportError(
            f"the integer program computes something else than the deployed model on {differing:,} of {len(x):,} "
            "samples, so nothing is exported; please report this"
        )
    return numbers


def _differing(
    candidate: Candidate, target: Target, folder: Path, x: Tensor, expected: NDArray[Any]
) -> tuple[int, float, int]:
    """(on how many samples the files compute something else, the largest difference, on how many samples the largest
    output is the same one)."""
    computed = target.computed(candidate, folder, x.numpy())
    differing = _rows(computed, expected)
    if computed.shape != expected.shape or (differing and target.exact(candidate)):
        raise ExportError(
            f"{TARGETS.name_of(type(target))}: not kept: on {differing:,} of {len(x):,} samples {target.judge} "
            "computes other numbers of these files than the searched network has; please report this"
        )
    difference = float(np.abs(computed.astype(np.float64) - expected).max(initial=0.0))
    same = computed.reshape(len(x), -1).argmax(axis=1) == expected.reshape(len(x), -1).argmax(axis=1)
    return differing, difference, int(same.sum())


def _rows(computed: NDArray[Any], expected: NDArray[Any]) -> int:
    """On how many samples two arrays differ."""
    if computed.shape != expected.shape:
        return len(expected)
    return int((computed != expected).reshape(len(expected), -1).any(axis=1).sum())


def _readme(candidate: Candidate, target: Target, result: Exported) -> str:
    """What lies in the folder, how to use it, and how it was checked."""
    lines = [f"# {candidate.name}, for {result.target}", ""]
    if candidate.origin:
        lines += [f"{candidate.origin[0].upper()}{candidate.origin[1:]}, exported by Bitfront.", ""]
    if result.change:
        lines += [f"The searched network with {result.change}: those of {', '.join(candidate.changed)}.", ""]
    if candidate.metrics:
        # The file is another network then, however little; what it has is not known.
        other = result.differing or result.change
        lines += _metrics("metric of the searched network" if other else "metric", candidate.metrics)
    if result.metrics:
        lines += _metrics("metric with this change, measured on the same samples", result.metrics)
    shape = candidate.graph.sample_shape
    lines += [f"Input: float32, shape {shape} per sample{', standardised' if candidate.standardised else ''}."]
    if candidate.standardised:
        lines += [f"Of a feature x it is (x - mean) / scale, computed in float64; `{SCALER}` has both."]
    if target.whole:
        value = candidate.program.result
        stands = "float32" if value.floats else f"whole numbers; n stands for {_meaning(value.point, value.divisor)}"
        lines += [f"Output: {stands}, shape {value.shape} per sample."]
        lines += [f"Widest sum: {candidate.program.widest} bits, for every possible input."]
    if 0 < len(candidate.classes) <= _LISTED:
        lines += [f"Classes, in the order of the outputs: {', '.join(candidate.classes)}."]
    if candidate.data:
        lines += ["", "The data of the search:", "", *(f"- {how}" for how in candidate.data)]
    lines += ["", *target.usage(candidate).strip().splitlines(), ""]
    if result.figures:
        lines += [
            "| needs | |",
            "|---|---|",
            *(f"| {name} | {value:,.6g} |" for name, value in result.figures.items()),
            "",
        ]
    if result.samples:
        lines += [
            f"Checked: {target.judge} ran these files on {result.samples:,} samples. "
            f"{result.samples - result.differing:,} of {result.samples:,} equal the searched network in every bit"
            f"{f', with {result.change}' if result.change else ''}."
            f"{f' {result.approximation.capitalize()}.' if result.differing else ''}"
        ]
    else:
        lines += ["**Not checked**: nothing has run these files."]
    return "\n".join(lines) + "\n"


def _metrics(heading: str, metrics: Mapping[str, float]) -> list[str]:
    """A table of metrics, as Markdown."""
    return [f"| {heading} | value |", "|---|---|", *(f"| {m} | {_value(v)} |" for m, v in metrics.items()), ""]


def _value(value: float) -> str:
    """A metric: whole numbers in full."""
    return f"{value:,.0f}" if value == round(value, 0) and abs(value) >= 1000 else f"{value:.6g}"


def _meaning(point: int, divisor: int) -> str:
    return f"n · 2^{-point}" + ("" if divisor == 1 else f" / {divisor}")
